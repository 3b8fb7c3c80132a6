"""Where the learner's item effects, factors and users start: factor analysis of the training users' ratings.

User u's standardised rating of item i is  effect_i + s b_u + factor_i . p_u + noise  with (b_u, p_u) ~ N(centre, I),
effect_i ~ N(0, v_0) and factor_ik ~ N(0, v_k). All of noise, s, centre, v_0 and v_k are estimated, so nothing is left
to choose: factors that the ratings do not support get a variance v_k near 0 (automatic relevance determination).

Users and items are fitted in turns by variational Bayes: each side counts with how uncertain the other is. Alternating
least squares does not, and so fits items to users as if they were known; a new user with a few ratings is not. A fixed
number of sweeps ends a fit: many more let the factors follow small groups of users. All is in double precision and on
the device of the training.
"""

import contextlib
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from scipy.sparse.linalg import ArpackError, svds

SWEEPS = 20
DAMPING = 5.0  # ratings that shrink the means from which a fit starts
LEAST = 1e-3  # noise and spread of users
LARGEST = 0.15  # root mean square of the first factor there
MORE_SWEEPS = 3  # of the other users, after a part of them was left out
AT_ONCE = 1 << 14  # users or items whose matrices are inverted: what that takes would fill the memory


class Scales(NamedTuple):
    """What all users and items have in common; see the module."""

    noise: float  # variance
    spread: float  # s
    centre: torch.Tensor  # (1 + k,)
    precision: torch.Tensor  # (1 + k,) of effects and factors: 1 / v


class Sums(NamedTuple):
    """Sums over the users who rated an item, x = (1, vector) and b the bias in spreads."""

    gram: torch.Tensor  # (n_items, 1 + k, 1 + k) of x x^T
    bias: torch.Tensor  # (n_items, 1 + k) of b x
    rating: torch.Tensor  # (n_items, 1 + k) of rating x
    of_bias: tuple  # of rating b and of b^2, over all items


class Rated(NamedTuple):
    """Users' n ratings as a matrix (n_users, n_items), by users, and by items: on the device."""

    ratings: torch.Tensor  # (n,)
    items: torch.Tensor  # (n,) of each rating
    users_end: torch.Tensor  # (n_users + 1,) where the ratings of each user begin and end
    of_items: torch.Tensor  # (n,) the ratings sorted by items
    users: torch.Tensor  # (n,) of each rating there
    items_end: torch.Tensor  # (n_items + 1,)

    def by_user(self, values, dense):
        """Sums (n_users, m), over each user's ratings, of `values` (n,) times the items' rows of (n_items, m)."""
        return product(self.users_end, self.items, values, dense)

    def by_item(self, values, dense):
        """Sums (n_items, m), over each item's ratings, of `values` (n,) times the users' rows of (n_users, m)."""
        return product(self.items_end, self.users, values, dense)

    @property
    def ones(self):
        return torch.ones_like(self.ratings)

    def count(self):
        """Numbers of ratings of the users (n_users,) and items (n_items,)."""
        return self.users_end.diff().double(), self.items_end.diff().double()


class Factors(NamedTuple):
    """A fitted factor analysis, in standard deviations of the ratings."""

    effect: np.ndarray  # (n_items,)
    factor: np.ndarray  # (n_items, k)
    centre: np.ndarray  # (1 + k,) mean of the users' biases and vectors
    damping: np.ndarray  # (1 + k,) noise over the variance of these: in ratings
    doubt: np.ndarray  # (1 + k,) mean variance of the factors, by which each of a user's ratings adds to the damping
    audience: np.ndarray  # (n_items, 1 + k) how those who rate an item differ from the mean user in bias and vector


def fit(sequences, users, n_items, k, parts=0, device="cpu"):
    """The `Factors` of all `users`, and those of the users outside part 0, 1, ...: (`Factors`, list).

    Part p has the users whose number is p modulo `parts`. Factors are orthogonal over the ratings, largest first, each
    with its entry of largest magnitude positive. Items without ratings get zeros.
    """
    user, item, rows = rating_places(sequences, users)
    ratings, shape = sequences.ratings[rows].astype(np.float64), (len(users), n_items)
    rated, count = lay_out(user, item, ratings, shape, device), np.bincount(item, minlength=n_items)
    effect = np.bincount(item, ratings, n_items) / (count + DAMPING)
    factors = leading_factors(sparse.csr_array((ratings, (user, item)), shape), effect, count, k)
    items = torch.from_numpy(np.concatenate([effect[:, None], factors], axis=1)).to(device)
    precision = torch.tensor([10.0] + [15.0] * k).to(items)
    state = items, items.new_zeros(n_items, 1 + k, 1 + k), Scales(0.7, 0.4, torch.zeros_like(precision), precision)
    for sweep in range(SWEEPS):
        vectors = user_posterior(rated, *state)
        state = improve(rated, *vectors, *state, learn=sweep > 0)
    turn, apart = principal_axes(state[0][:, 1:], rated.count()[1]), []
    for part in range(parts):
        keep = users % parts != part
        of_rating = keep[user]
        others = np.cumsum(keep)[user[of_rating]] - 1, item[of_rating], ratings[of_rating]
        some = lay_out(*others, (keep.sum(), n_items), device)
        keep = torch.from_numpy(keep).to(device)
        apart.append(without_part(some, [of_users[keep] for of_users in vectors], state))
    return finish(rated, vectors, state, turn), [finish(*found, turn) for found in apart]


def lay_out(user, item, ratings, shape, device):
    """The `Rated` of ratings (n,) by users, in ascending order, and items (n,)."""
    order = np.argsort(item, kind="stable")
    ends = [
        np.append(0, np.bincount(of, minlength=size).cumsum()) for of, size in zip((user, item), shape, strict=True)
    ]
    arrays = ratings, item, ends[0], ratings[order], user[order], ends[1]
    return Rated(*(torch.from_numpy(array).to(device) for array in arrays))


def product(ends, columns, values, dense):
    """A sparse matrix, by rows, times a dense one (c, m): (r, m)."""
    with warnings.catch_warnings(action="ignore"):  # torch calls its sparse matrices a beta
        matrix = torch.sparse_csr_tensor(ends, columns, values, (len(ends) - 1, len(dense)), check_invariants=False)
    return matrix @ dense


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


def without_part(rated, vectors, state):
    """What `finish` needs of a fit after a part of the users was left out and the others, given here, were fitted more.

    What items owe to the part is gone at once, and what the other users' vectors owe to it fades with each sweep. A fit
    from the start forgets all of it and takes eight times as long.
    """
    for sweep in range(1 + MORE_SWEEPS):
        vectors = user_posterior(rated, *state) if sweep else vectors
        state = improve(rated, *vectors, *state, learn=True)
    return rated, vectors, state


def finish(rated, vectors, state, turn):
    """A fit's state as `Factors`, the factors turned by (k, k)."""
    items, covariance, scales = state
    _, count = rated.count()
    centre = torch.cat([scales.spread * scales.centre[:1], scales.centre[1:] @ turn])
    damping = torch.full_like(centre, scales.noise)
    damping[0] /= scales.spread**2
    unsure = torch.einsum("ikl,i->kl", covariance[:, 1:, 1:], count) / count.sum()
    doubt = F.pad((turn * (unsure @ turn)).sum(0), (1, 0))
    audience = lean(rated, vectors[0])
    audience = torch.cat([scales.spread * audience[:, :1], audience[:, 1:] @ turn], 1)
    return Factors(*(v.cpu().numpy() for v in (items[:, 0], items[:, 1:] @ turn, centre, damping, doubt, audience)))


def lean(rated, mean):
    """How the users who rate an item differ from all raters, (n_items, 1 + k), from the users' means (n_users, 1 + k).

    People rate what they like, so that an item's raters tell something of a user of whom nothing else is known. Means
    over few users are shrunk by the variance within items over that between items (a random-effects model).
    """
    of_user, count = rated.count()
    n_ratings, n_rated, total = len(rated.ratings), int(count.count_nonzero()), rated.by_item(rated.ones, mean)
    left = total - count[:, None] * (total.sum(0) / n_ratings)
    of_items = (left**2 / count.clamp_min(1)[:, None]).sum(0)
    squares = of_user @ (mean - total.sum(0) / n_ratings) ** 2
    within = (squares - of_items) / max(1, n_ratings - n_rated)
    between = (of_items - within * max(0, n_rated - 1)) / (n_ratings - (count @ count) / n_ratings + 1e-9)
    return left / (count[:, None] + within / between.clamp_min(1e-9) + 1e-9)


def rating_places(sequences, users):
    """Who of these users gave each of their ratings, to which item, from 0, and its place: three arrays (n,)."""
    starts, lengths = sequences.offsets[users], sequences.offsets[users + 1] - sequences.offsets[users]
    place = np.arange(lengths.sum()) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    return np.repeat(np.arange(len(users)), lengths), sequences.items[place] - 1, place


def user_posterior(rated, items, covariance, scales):
    """Mean (n_users, 1 + k) of each user's (b, vector), and the upper half (n_users, (1 + k) (2 + k) / 2) of its second
    moment, see `whole`, from the items' mean (n_items, 1 + k) and covariance (n_items, 1 + k, 1 + k)."""
    size = items.shape[1]
    loading, unsure = items.clone(), covariance.clone()
    loading[:, 0], unsure[:, 0], unsure[:, :, 0] = scales.spread, 0, 0
    information = rated.by_user(rated.ones, products(loading) + half(unsure)).div_(scales.noise)
    linear = rated.by_user(rated.ratings - items[:, 0][rated.items], loading)
    linear[:, 1:] -= rated.by_user(rated.ones, covariance[:, 0, 1:].contiguous())
    linear = linear.div_(scales.noise).add_(scales.centre)
    for mean, moment in zip(linear.split(AT_ONCE), information.split(AT_ONCE), strict=True):  # views, written over
        spreads = invert(whole(moment, size) + torch.eye(size).to(items))
        mean.copy_((spreads @ mean[..., None])[..., 0])
        moment.copy_(products(mean) + half(spreads))
    return linear, information


def improve(rated, mean, moment, items, covariance, scales, learn):
    """The items' mean and covariance, and the scales, from the users' `user_posterior`."""
    sums = item_sums(rated, mean, moment)
    if learn:
        some = sums.gram[:, 0, 0] > 0
        variance = (items[some] ** 2 + covariance[some].diagonal(dim1=1, dim2=2)).mean(0)
        scales = scales._replace(precision=1 / (variance + 1e-8), centre=mean.mean(0))
    parts = sums.gram.split(AT_ONCE)
    covariance = torch.cat([invert(part / scales.noise + scales.precision.diag()) for part in parts])
    items = (covariance @ (sums.rating - scales.spread * sums.bias)[..., None])[..., 0] / scales.noise
    rating_bias, bias_bias = sums.of_bias
    spread = max(LEAST, float((rating_bias - (items * sums.bias).sum()) / bias_bias))
    left = rated.ratings @ rated.ratings - 2 * spread * rating_bias + spread**2 * bias_bias
    left -= 2 * (items * (sums.rating - spread * sums.bias)).sum()
    left += (items[:, :, None] * items[:, None]).add_(covariance).mul_(sums.gram).sum()
    return items, covariance, scales._replace(spread=spread, noise=max(LEAST, float(left) / len(rated.ratings)))


def item_sums(rated, mean, moment):
    """The `Sums` of users with the posterior `mean` and `moment`."""
    gram, first = whole(rated.by_item(rated.ones, moment), mean.shape[1]), rated.by_item(rated.ones, mean)
    rating = rated.by_item(rated.of_items, mean)
    of_bias, bias = (float(rating[:, 0].sum()), float(gram[:, 0, 0].sum())), gram[:, 0].clone()
    bias[:, 0], rating[:, :1] = first[:, 0], rated.by_item(rated.of_items, torch.ones_like(mean[:, :1]))
    gram[:, 0, 0], gram[:, 0, 1:], gram[:, 1:, 0] = rated.count()[1], first[:, 1:], first[:, 1:]
    return Sums(gram, bias, rating, of_bias)


def invert(matrices):
    """Inverses of positive definite matrices (n, m, m), by operations that wait for no GPU."""
    root = torch.linalg.cholesky_ex(matrices)[0]
    one = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device).expand_as(matrices)
    inverse = torch.linalg.solve_triangular(root, one, upper=False)  # of the root
    return inverse.mT @ inverse


def products(vectors):
    """The upper half of each row's products with itself, (n, m) -> (n, m (m + 1) / 2). Sums of them are most of what a
    fit costs."""
    first, second = upper_half(vectors)
    return vectors.index_select(1, first) * vectors.index_select(1, second)


def half(matrices):
    """The upper half of each matrix (n, m, m), row after row: (n, m (m + 1) / 2)."""
    first, second = upper_half(matrices)
    return matrices.flatten(1).index_select(1, first * matrices.shape[2] + second)


def whole(half, size):
    """Symmetric matrices (n, m, m) by the upper half of each, row after row (n, m (m + 1) / 2)."""
    first, second = torch.triu_indices(size, size, device=half.device)
    place = torch.empty(size, size, dtype=torch.long, device=half.device)
    place[first, second] = place[second, first] = torch.arange(len(first), device=half.device)
    return half.index_select(1, place.flatten()).view(-1, size, size)


def upper_half(values):
    return torch.triu_indices(values.shape[1], values.shape[1], device=values.device)


def principal_axes(factor, count):
    """The turn (k, k) after which factors are orthogonal over the ratings, largest first, signs fixed."""
    _, axes = torch.linalg.eigh(factor.T @ (factor * count[:, None]))
    axes = axes.flip(1)
    turned = factor @ axes
    largest = turned.gather(0, turned.abs().argmax(0, keepdim=True))[0]
    return axes * torch.where(largest < 0, -1.0, 1.0)
