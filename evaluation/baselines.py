"""Simple rating predictors, scored on the same targets as the learners.

Each is fitted to the training users' ratings, has its few constants chosen on the validation users, and predicts a
new user's rating from the user's support. Shapes: T targets, S longest support.
"""

from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy import sparse

from evaluation.metrics import ORDER_TARGETS, prediction_errors
from utils import random_stream

ITEM_DAMPING = (2.0, 5.0, 10.0, 20.0)
USER_DAMPING = (2.0, 3.0, 5.0, 10.0)
FACTORS = (10, 20)
REGULARISATION = (4.0, 8.0, 14.0)
USUAL = 10, 8.0  # factors and regularisation where they are not chosen
RIDGE = (0.25, 0.5, 1.0, 2.0)
VALIDATION_TARGETS = 5  # the constants are chosen on this many last ratings of each validation user
MOST_FACTORISED = 3_000_000  # ratings; with more, one factorisation is fitted instead of one for each choice
BLOCK = 4096  # users, items or targets computed at a time; bounds the memory


class Support(NamedTuple):
    """Users' known ratings, and the item to predict for each. Padding follows the ratings: item -1, value 0."""

    items: np.ndarray  # (T, S) int64, item numbers, oldest first
    values: np.ndarray  # (T, S) float64
    target_item: np.ndarray  # (T,) int64


def last_support(ratings, users, longest, back=0):
    """The users' last rating but `back`, and up to `longest` ratings before it: (Support, target (T,)).

    Users who have no such rating are left out.
    """
    target = ratings.offsets[users + 1] - 1 - back
    inside = target >= ratings.offsets[users]
    return take_support(ratings, users[inside], target[inside], target[inside], longest)


def order_support(ratings, users, longest):
    """The targets whose order is scored, user by user: (user (T,), Support, target (T,)).

    These are each user's last ten ratings, of a shorter user all but one; the support is the ratings before them, up
    to `longest`. Users with fewer than three ratings have no two targets and are left out.
    """
    length = np.diff(ratings.offsets)
    users = users[length[users] > 2]
    count = np.minimum(ORDER_TARGETS, length[users] - 1)
    first = np.repeat(ratings.offsets[users + 1] - count, count)
    target = first + np.arange(len(first)) - np.repeat(np.cumsum(count) - count, count)
    users = np.repeat(users, count)
    return users, *take_support(ratings, users, first, target, longest)


def take_support(ratings, users, end, target, longest):
    """Up to `longest` of each user's ratings before row `end`, and the rating of row `target`: (Support, target)."""
    start = np.maximum(ratings.offsets[users], end - longest)
    place = start[:, None] + np.arange(longest)
    inside = place < end[:, None]
    place = np.minimum(place, end[:, None])
    items = np.where(inside, ratings.items[place], -1).astype(np.int64)
    values = np.where(inside, ratings.values[place], 0).astype(np.float64)
    return Support(items, values, ratings.items[target].astype(np.int64)), ratings.values[target].astype(np.float64)


# -----------------------------------------------------------------------------
# fitting, on training users


def training_rows(ratings, train_users):
    """The training users' ratings: (user 0..n_train - 1, item, value), each (n,)."""
    length = np.diff(ratings.offsets)
    rows = np.repeat(np.isin(np.arange(len(length)), train_users), length)
    user = np.repeat(np.arange(len(train_users)), length[np.sort(train_users)])
    return user, ratings.items[rows].astype(np.int64), ratings.values[rows].astype(np.float64)


def damped_mean(group, values, n_groups, damping):
    """Sum over count plus damping of each group's values: (n_groups,); 0 where a group has none."""
    count = np.bincount(group, minlength=n_groups)
    total = np.bincount(group, values, n_groups)
    return np.divide(total, count + damping, out=np.zeros(n_groups), where=count > 0)


def fit_effects(ratings, train_users, damping=5.0):
    """Mean of the training ratings, and the items' damped mean deviations from it (n_items,)."""
    _, item, value = training_rows(ratings, train_users)
    mean = float(value.mean())
    return mean, damped_mean(item, value - mean, len(ratings.item_ids), damping)


def factorise(ratings, train_users, k, regularisation, sweeps=10, seed=0, damping=(5.0, 10.0)):
    """Matrix factorisation, by alternating least squares, of the ratings without item and user effects.

    Returns (mean, item_effect (n_items,), item_factor (n_items, k)) in units of ratings. The training users'
    effects and vectors have mean 0 and the vectors covariance 1; the factors are orthogonal, largest first,
    each with its entry of largest magnitude positive. An item without training ratings has zeros.
    `damping` is that of the (item, user) effects. The same arguments give the same bits.
    """
    user, item, value = training_rows(ratings, train_users)
    n_users, n_items = len(train_users), len(ratings.item_ids)
    mean, user_effect = value.mean(), np.zeros(n_users)
    for _ in range(5):
        item_effect = damped_mean(item, value - mean - user_effect[user], n_items, damping[0])
        user_effect = damped_mean(user, value - mean - item_effect[item], n_users, damping[1])
    rest = value - mean - item_effect[item] - user_effect[user]
    by_user = sparse.csr_array((rest, (user, item)), shape=(n_users, n_items))
    by_item = by_user.T.tocsr()
    item_factor = random_stream(seed).normal(0, 0.1, (n_items, k))
    for _ in range(sweeps):
        user_factor = ridge_rows(by_user, item_factor, regularisation)
        item_factor = ridge_rows(by_item, user_factor, regularisation)
    centre = user_factor.mean(0)
    item_effect = item_effect + np.einsum("ik,k->i", item_factor, centre)
    return float(mean + user_effect.mean()), item_effect, principal_axes(user_factor - centre, item_factor)


def ridge_rows(matrix, factor, regularisation):
    """The ridge regression of each row's stored values on the columns' `factor`: (n_rows, k)."""
    k = factor.shape[1]
    one, other = np.triu_indices(k)
    products = factor[:, one] * factor[:, other]
    known = sparse.csr_array((np.ones_like(matrix.data), matrix.indices, matrix.indptr), shape=matrix.shape)
    moment = matrix @ factor
    out = np.empty_like(moment)
    for start in range(0, len(out), BLOCK):
        rows = slice(start, start + BLOCK)
        flat = known[rows] @ products
        gram = np.empty((len(flat), k, k))
        gram[:, one, other] = gram[:, other, one] = flat
        gram += regularisation * np.eye(k)
        out[rows] = np.linalg.solve(gram, moment[rows, :, None])[..., 0]
    return out


def principal_axes(user_factor, item_factor):
    """`item_factor` rotated as `factorise` says; its products with the users' vectors do not change.

    einsum and not @, because the order in which BLAS adds may depend on the number of threads.
    """
    variance, axes = np.linalg.eigh(np.einsum("uk,ul->kl", user_factor, user_factor) / len(user_factor))
    turned = np.einsum("ik,kl->il", item_factor, axes * np.sqrt(np.maximum(variance, 0)))
    _, axes = np.linalg.eigh(np.einsum("ik,il->kl", turned, turned))
    turned = np.einsum("ik,kl->il", turned, axes[:, ::-1])
    largest = turned[np.abs(turned).argmax(0), np.arange(turned.shape[1])]
    return turned * np.where(largest < 0, -1.0, 1.0)


# -----------------------------------------------------------------------------
# prediction, from a support


def predict_effects(mean, item_effect, user_damping, support):
    """Mean + item effect + the user's damped mean deviation from these in the support: (T,).

    Infinite damping leaves the user out; without damping and item effects it is the mean of the user's ratings.
    """
    known = support.items >= 0
    rest = np.where(known, support.values - mean - item_effect[support.items], 0)
    user_effect = rest.sum(1) / np.maximum(known.sum(1) + user_damping, 1e-9)
    return mean + item_effect[support.target_item] + user_effect


def predict_factors(mean, item_effect, item_factor, ridge, user_damping, support):
    """A factorisation's predictions (T,), with user effect and vector from a ridge regression on the support."""
    known = support.items >= 0
    rest = np.where(known, support.values - mean - item_effect[support.items], 0)
    design = np.concatenate([item_factor, np.ones((len(item_factor), 1))], axis=1)
    rows = design[support.items] * known[..., None]
    penalty = np.append(np.full(item_factor.shape[1], ridge), user_damping)
    gram = np.einsum("tsk,tsl->tkl", rows, rows) + np.diag(penalty)
    user = np.linalg.solve(gram, np.einsum("tsk,ts->tk", rows, rest)[..., None])[..., 0]
    return mean + item_effect[support.target_item] + np.einsum("tk,tk->t", design[support.target_item], user)


# -----------------------------------------------------------------------------
# all of them


def candidates(ratings, train_users):
    """Every predictor that may be chosen, fitted: (name, constants, function of a `Support`)."""
    effects = {damping: fit_effects(ratings, train_users, damping) for damping in ITEM_DAMPING}
    without_items = effects[ITEM_DAMPING[0]][0], np.zeros(len(ratings.item_ids))
    yield "global mean", {}, partial(predict_effects, *without_items, np.inf)
    yield "user mean", {}, partial(predict_effects, *without_items, 0.0)
    for item_damping, fitted in effects.items():
        yield "item mean", dict(item_damping=item_damping), partial(predict_effects, *fitted, np.inf)
        for user_damping in USER_DAMPING:
            constants = dict(item_damping=item_damping, user_damping=user_damping)
            yield "damped means", constants, partial(predict_effects, *fitted, user_damping)
    is_large = len(ratings.values) > MOST_FACTORISED
    for k, regularisation in [USUAL] if is_large else product(FACTORS, REGULARISATION):
        fitted = factorise(ratings, train_users, k, regularisation)
        for ridge, user_damping in product(RIDGE, USER_DAMPING):
            constants = dict(k=k, regularisation=regularisation, ridge=ridge, user_damping=user_damping)
            yield "matrix factorisation", constants, partial(predict_factors, *fitted, ridge, user_damping)


def fit_baselines(ratings, train_users, validation_users, max_seq_len):
    """The best of each kind on the validation users: ({name: function of a `Support`}, {name: constants})."""
    pairs = [last_support(ratings, validation_users, max_seq_len - 1, b) for b in range(VALIDATION_TARGETS)]
    supports, targets = zip(*pairs, strict=True)
    support = Support(*(np.concatenate(parts) for parts in zip(*supports, strict=True)))
    target, best = np.concatenate(targets), {}
    for name, constants, predictor in candidates(ratings, train_users):
        error = np.mean(prediction_errors(target, predict(predictor, support), ratings.low, ratings.high) ** 2)
        if name not in best or error < best[name][0]:
            best[name] = error, constants, predictor
    return {name: entry[2] for name, entry in best.items()}, {name: entry[1] for name, entry in best.items()}


def predict(predictor, support):
    """A predictor's predictions (T,), not clipped to the scale, made for a bounded number of targets at a time."""
    blocks = range(0, max(1, len(support.target_item)), BLOCK)
    return np.concatenate([predictor(Support(*(part[i : i + BLOCK] for part in support))) for i in blocks])


def reference_rmse(ratings, train_users, users, lengths, num_targets):
    """RMSE of damped means and of a matrix factorisation on the last ratings of `users`, as lines to compare with.

    {name: RMSE}, on the targets of `evaluate.evaluate` with supports of each of the `lengths`. It takes a second for a
    million ratings: there is one factorisation, none for large data, and only the users' damping is chosen, on these
    targets themselves.
    """
    length = np.diff(ratings.offsets)
    each = product(lengths, range(num_targets))
    pairs = [last_support(ratings, users[length[users] > back + 1], longest, back) for longest, back in each]
    pairs = [(support, target) for support, target in pairs if len(target)]
    effects = fit_effects(ratings, train_users)
    found = {"damped means": [partial(predict_effects, *effects, damping) for damping in USER_DAMPING]}
    if length[train_users].sum() <= MOST_FACTORISED:
        fitted = factorise(ratings, train_users, *USUAL, sweeps=5)
        found["matrix factorisation"] = [partial(predict_factors, *fitted, r, USER_DAMPING[1]) for r in RIDGE]

    def error(predictor):
        squared = [prediction_errors(t, predict(predictor, s), ratings.low, ratings.high) ** 2 for s, t in pairs]
        return float(np.sqrt(np.concatenate(squared).mean()))

    return {name: min(map(error, predictors)) for name, predictors in found.items()}
