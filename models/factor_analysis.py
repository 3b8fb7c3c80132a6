"""Where the learner's item effects, factors and users start: factor analysis of the training users' ratings.

User u's standardised rating of item i is  effect_i + s b_u + factor_i . p_u + noise  with (b_u, p_u) ~ N(centre, I),
effect_i ~ N(0, v_0) and factor_ik ~ N(0, v_k). All of noise, s, centre, v_0 and v_k are estimated, so nothing is left
to choose: factors that the ratings do not support get a variance v_k near 0 (automatic relevance determination).

Users and items are fitted in turns by variational Bayes: each side counts with how uncertain the other is. Alternating
least squares does not, and so fits items to users as if they were known; a new user with a few ratings is not. A fixed
number of sweeps ends a fit: many more let the factors follow small groups of users.
"""

import contextlib
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import ArpackError, svds

SWEEPS = 20
DAMPING = 5.0  # ratings that shrink the means from which a fit starts
LEAST = 1e-3  # noise and spread of users
LARGEST = 0.15  # root mean square of the first factor there
MORE_SWEEPS = 3  # of the other users, after a part of them was left out


class Scales(NamedTuple):
    """What all users and items have in common; see the module."""

    noise: float  # variance
    spread: float  # s
    centre: np.ndarray  # (1 + k,)
    precision: np.ndarray  # (1 + k,) of effects and factors: 1 / v


class Sums(NamedTuple):
    """Sums over the users who rated an item, x = (1, vector) and b the bias in spreads."""

    gram: np.ndarray  # (n_items, 1 + k, 1 + k) of x x^T
    bias: np.ndarray  # (n_items, 1 + k) of b x
    rating: np.ndarray  # (n_items, 1 + k) of rating x
    of_bias: tuple  # of rating b and of b^2, over all items


class Factors(NamedTuple):
    """A fitted factor analysis, in standard deviations of the ratings."""

    effect: np.ndarray  # (n_items,)
    factor: np.ndarray  # (n_items, k)
    centre: np.ndarray  # (1 + k,) mean of the users' biases and vectors
    damping: np.ndarray  # (1 + k,) noise over the variance of these: in ratings
    doubt: np.ndarray  # (1 + k,) mean variance of the factors, by which each of a user's ratings adds to the damping
    audience: np.ndarray  # (n_items,) by how much an item pleases those who rate it more than the mean user


def fit(sequences, users, n_items, k, parts=0):
    """The `Factors` of all `users`, and those of the users outside part 0, 1, ...: (`Factors`, list).

    Part p has the users whose number is p modulo `parts`. Factors are orthogonal over the ratings, largest first, each
    with its entry of largest magnitude positive. Items without ratings get zeros.
    """
    user, item, rows = rating_places(sequences, users)
    ratings = sparse.csr_array((sequences.ratings[rows].astype(np.float64), (user, item)), (len(users), n_items))
    is_rated = sparse.csr_array((np.ones(len(rows)), (user, item)), ratings.shape)
    count = np.bincount(item, minlength=n_items)
    effect = ratings.sum(0) / (count + DAMPING)
    items = np.concatenate([effect[:, None], leading_factors(ratings, effect, count, k)], axis=1)
    scales = Scales(0.7, 0.4, np.zeros(1 + k), np.append(10.0, np.full(k, 15.0)))
    state = items, np.zeros((n_items, 1 + k, 1 + k)), scales
    for sweep in range(SWEEPS):
        vectors = user_posterior(ratings, is_rated, *state)
        state = improve(ratings, is_rated, *vectors, *state, learn=sweep > 0)
    turn = principal_axes(state[0][:, 1:], count)
    apart = [without_part(ratings, is_rated, vectors, state, users % parts != part) for part in range(parts)]
    return finish(is_rated, vectors, state, turn), [finish(*found, turn) for found in apart]


def leading_factors(ratings, effect, count, k):
    """Where factors (n_items, k) start: the leading singular vectors of what effects and users' means leave.

    Few ratings of a user or an item shrink what they add. From here a fit ends in a better optimum than from most
    random starts. Where there are fewer singular vectors, the rest starts at 0 and stays there.
    """
    n_rated = np.diff(ratings.indptr)
    user = np.repeat(np.arange(len(n_rated)), n_rated)
    left = ratings.data - effect[ratings.indices]
    left -= (np.bincount(user, left, len(n_rated)) / (n_rated + DAMPING))[user]
    left /= np.sqrt((n_rated[user] + 2 * DAMPING) * (count[ratings.indices] + 2 * DAMPING))
    rank, factor = min(k, min(ratings.shape) - 1), np.zeros((ratings.shape[1], k))
    if rank > 0 and left.any():
        left = sparse.csr_array((left, ratings.indices, ratings.indptr), ratings.shape)
        with contextlib.suppress(ArpackError):  # of few ratings, which need no factors
            _, size, axes = svds(left, rank, v0=np.ones(min(ratings.shape)))
            factor[:, :rank] = LARGEST * np.sqrt(ratings.shape[1]) * (axes * size[:, None] / size.max()).T
    return factor


def without_part(ratings, is_rated, vectors, state, others):
    """What `finish` needs of a fit after a part of the users was left out and the `others` (n_users,) were fitted more.

    What items owe to the part is gone at once, and what the other users' vectors owe to it fades with each sweep. A fit
    from the start forgets all of it and takes eight times as long.
    """
    keep = np.flatnonzero(others)
    ratings, is_rated, vectors = ratings[keep], is_rated[keep], [of_users[keep] for of_users in vectors]
    for sweep in range(1 + MORE_SWEEPS):
        vectors = user_posterior(ratings, is_rated, *state) if sweep else vectors
        state = improve(ratings, is_rated, *vectors, *state, learn=True)
    return is_rated, vectors, state


def finish(is_rated, vectors, state, turn):
    """A fit's state as `Factors`, the factors turned by (k, k)."""
    items, covariance, scales = state
    centre = np.append(scales.spread * scales.centre[0], scales.centre[1:] @ turn)
    damping = np.append(scales.noise / scales.spread**2, np.full(len(turn), scales.noise))
    unsure = np.einsum("ikl,i->kl", covariance[:, 1:, 1:], is_rated.sum(0)) / is_rated.nnz
    doubt = np.append(0.0, np.einsum("kl,km,ml->l", turn, unsure, turn))
    loading = np.concatenate([np.full((len(items), 1), scales.spread), items[:, 1:]], axis=1)
    audience = (loading * lean(is_rated, vectors[0])).sum(1)
    return Factors(items[:, 0], items[:, 1:] @ turn, centre, damping, doubt, audience)


def lean(is_rated, mean):
    """How the users who rate an item differ from all raters, (n_items, 1 + k), from the users' means (n_users, 1 + k).

    People rate what they like, so that an item's raters tell something of a user of whom nothing else is known. Means
    over few users are shrunk by the variance within items over that between items (a random-effects model).
    """
    count, n_ratings, total = is_rated.sum(0), is_rated.nnz, is_rated.T @ mean
    n_rated = np.count_nonzero(count)
    left = total - count[:, None] * (total.sum(0) / n_ratings)
    of_items = (left**2 / np.maximum(count, 1)[:, None]).sum(0)
    squares = is_rated.sum(1) @ (mean - total.sum(0) / n_ratings) ** 2
    within = (squares - of_items) / max(1, n_ratings - n_rated)
    between = (of_items - within * max(0, n_rated - 1)) / (n_ratings - (count @ count) / n_ratings + 1e-9)
    return left / (count[:, None] + within / np.maximum(between, 1e-9) + 1e-9)


def rating_places(sequences, users):
    """Who of these users gave each of their ratings, to which item, from 0, and its place: three arrays (n,)."""
    starts, lengths = sequences.offsets[users], sequences.offsets[users + 1] - sequences.offsets[users]
    place = np.arange(lengths.sum()) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    return np.repeat(np.arange(len(users)), lengths), sequences.items[place] - 1, place


def user_posterior(ratings, is_rated, items, covariance, scales):
    """Mean (n_users, 1 + k) of each user's (b, vector), and the upper half (n_users, (1 + k) (2 + k) / 2) of its second
    moment, see `whole`, from the items' mean (n_items, 1 + k) and covariance (n_items, 1 + k, 1 + k)."""
    size = items.shape[1]
    loading, unsure = items.copy(), covariance.copy()
    loading[:, 0], unsure[:, 0], unsure[:, :, 0] = scales.spread, 0, 0
    information = is_rated @ (products(loading) + half(unsure)) / scales.noise
    spreads = np.linalg.inv(whole(information, size) + np.eye(size))
    residual = ratings.data - items[ratings.indices, 0]
    residual = sparse.csr_array((residual, ratings.indices, ratings.indptr), ratings.shape)
    linear = residual @ loading
    linear[:, 1:] -= is_rated @ covariance[:, 0, 1:]
    mean = np.einsum("uij,uj->ui", spreads, linear / scales.noise + scales.centre)
    return mean, products(mean) + half(spreads)


def improve(ratings, is_rated, mean, moment, items, covariance, scales, learn):
    """The items' mean and covariance, and the scales, from the users' `user_posterior`."""
    sums = item_sums(ratings, is_rated, mean, moment)
    if learn:
        rated = sums.gram[:, 0, 0] > 0
        variance = (items[rated] ** 2 + np.einsum("ikk->ik", covariance[rated])).mean(0)
        scales = scales._replace(precision=1 / (variance + 1e-8), centre=mean.mean(0))
    covariance = np.linalg.inv(sums.gram / scales.noise + np.diag(scales.precision))
    items = np.einsum("ikl,il->ik", covariance, sums.rating - scales.spread * sums.bias) / scales.noise
    rating_bias, bias_bias = sums.of_bias
    spread = max(LEAST, float((rating_bias - np.vdot(items, sums.bias)) / bias_bias))
    left = ratings.data @ ratings.data - 2 * spread * rating_bias + spread**2 * bias_bias
    left -= 2 * np.vdot(items, sums.rating - spread * sums.bias)
    left += np.vdot(items[:, :, None] * items[:, None] + covariance, sums.gram)
    return items, covariance, scales._replace(spread=spread, noise=max(LEAST, float(left) / ratings.nnz))


def item_sums(ratings, is_rated, mean, moment):
    """The `Sums` of users with the posterior `mean` and `moment`."""
    gram, first, rating = whole(is_rated.T @ moment, mean.shape[1]), is_rated.T @ mean, ratings.T @ mean
    of_bias, bias = (float(rating[:, 0].sum()), float(gram[:, 0, 0].sum())), gram[:, 0].copy()
    bias[:, 0], rating[:, 0] = first[:, 0], ratings.sum(0)
    gram[:, 0, 0], gram[:, 0, 1:], gram[:, 1:, 0] = is_rated.sum(0), first[:, 1:], first[:, 1:]
    return Sums(gram, bias, rating, of_bias)


def products(vectors):
    """The upper half of each row's products with itself, (n, m) -> (n, m (m + 1) / 2): what sums of them cost is the
    most of a fit."""
    first, second = np.triu_indices(vectors.shape[1])
    return vectors.take(first, 1) * vectors.take(second, 1)


def half(matrices):
    """The upper half of each matrix (n, m, m), row after row: (n, m (m + 1) / 2)."""
    return matrices[:, *np.triu_indices(matrices.shape[1])]


def whole(half, size):
    """Symmetric matrices (n, m, m) by the upper half of each, row after row (n, m (m + 1) / 2)."""
    place, (first, second) = np.empty((size, size), np.int64), np.triu_indices(size)
    place[first, second] = place[second, first] = np.arange(len(first))
    return half.take(place, 1)


def principal_axes(factor, count):
    """The turn (k, k) after which factors are orthogonal over the ratings, largest first, signs fixed."""
    _, axes = np.linalg.eigh(np.einsum("ik,il,i->kl", factor, factor, count))
    turned = factor @ axes[:, ::-1]
    largest = turned[np.abs(turned).argmax(0), np.arange(turned.shape[1])]
    return axes[:, ::-1] * np.where(largest < 0, -1.0, 1.0)
