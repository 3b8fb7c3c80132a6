"""Where the learner's item effects and factors start: factor analysis of the training users' ratings.

A user u's standardised rating of item i is  effect_i + s b_u + factor_i . p_u + noise  with (b_u, p_u) ~ N(0, I).
Items are fitted by expectation maximisation, which counts with how uncertain each user's vector is. Alternating
least squares does not, and so fits items to users as if they were known; a new user with a few ratings is not.
"""

import numpy as np
from scipy import sparse

from utils import random_stream

EFFECT_DAMPING = 5.0


def fit(sequences, users, n_items, k, prior, sweeps=15, seed=0):
    """Item effects (n_items,) and factors (n_items, k) in standard deviations, from the ratings of `users` alone.

    `prior` is the number of pseudo-ratings that pull each factor to 0. Items without ratings get zeros. The
    factors are orthogonal over the ratings, largest first, each with its entry of largest magnitude positive.
    """
    user, item, rows = rating_places(sequences, users)
    ratings = sparse.csr_array((sequences.ratings[rows].astype(np.float64), (user, item)), (len(users), n_items))
    of_item, is_rated = ratings.T.tocsr(), sparse.csr_array((np.ones(len(rows)), (user, item)), ratings.shape)
    count, total, squares = np.bincount(item, minlength=n_items), of_item.sum(1), ratings.data @ ratings.data

    effect = total / (count + EFFECT_DAMPING)
    loading = random_stream(seed).normal(0, 0.1, (n_items, k + 1))  # the first carries the user's bias
    loading[:, 0], noise = 0.4, 0.7
    for _ in range(sweeps):
        mean, moment = user_posterior(ratings, is_rated, effect, loading, noise)
        first, second, cross = is_rated.T @ mean, whole(is_rated.T @ moment, k + 1), of_item @ mean
        effect, loading = fit_items(total, count, first, second, cross, loading[0, 0], prior)
        explained = cross - effect[:, None] * first
        bias_products = explained[:, 0].sum() - np.einsum("ik,ik->", loading[:, 1:], second[:, 0, 1:])
        loading[:, 0] = bias_products / second[:, 0, 0].sum()
        left = squares - 2 * effect @ total + count @ effect**2
        fitted = 2 * np.einsum("ik,ik->", loading, explained) - np.einsum("ij,ijk,ik->", loading, second, loading)
        noise = float((left - fitted) / len(rows))
    return effect, principal_axes(loading[:, 1:], count)


def rating_places(sequences, users):
    """Who of these users gave each of their ratings, to which item, from 0, and its place: three arrays (n,)."""
    starts, lengths = sequences.offsets[users], sequences.offsets[users + 1] - sequences.offsets[users]
    place = np.arange(lengths.sum()) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    return np.repeat(np.arange(len(users)), lengths), sequences.items[place] - 1, place


def user_posterior(ratings, is_rated, effect, loading, noise):
    """Expectation: mean (n_users, k + 1) of each user's vector and the upper half (n_users, (k + 1) (k + 2) / 2) of its
    second moment, see `whole`."""
    size = loading.shape[1]
    covariance = np.linalg.inv(whole(is_rated @ products(loading), size) / noise + np.eye(size))
    residual = ratings.data - is_rated.data * effect[ratings.indices]
    residual = sparse.csr_array((residual, ratings.indices, ratings.indptr), ratings.shape)
    mean = np.einsum("uij,uj->ui", covariance, residual @ loading / noise)
    upper = np.flatnonzero(np.triu(np.ones((size, size))))
    return mean, products(mean) + covariance.reshape(len(mean), -1).take(upper, 1)


def products(vectors):
    """The upper half of each row's products with itself, (n, m) -> (n, m (m + 1) / 2): what sums of them cost is the
    most of a fit."""
    first, second = np.triu_indices(vectors.shape[1])
    return vectors.take(first, 1) * vectors.take(second, 1)


def whole(half, size):
    """Symmetric matrices (n, m, m) by the upper half of each, row after row (n, m (m + 1) / 2)."""
    place, (first, second) = np.empty((size, size), np.int64), np.triu_indices(size)
    place[first, second] = place[second, first] = np.arange(len(first))
    return half.take(place, 1)


def fit_items(total, count, first, second, cross, spread, prior):
    """Maximisation: each item's effect (n_items,) and loadings (n_items, k + 1), the first of which is `spread`.

    A regression on the moments of the users who rated the item, `first` and `second`, and `cross` with its ratings, of
    which there are `count` with the sum `total`.
    """
    size = second.shape[1]
    gram = second.copy()
    gram[:, 0, 0], gram[:, 0, 1:], gram[:, 1:, 0] = count, first[:, 1:], first[:, 1:]
    gram += np.diag([EFFECT_DAMPING] + [prior] * (size - 1))
    target = cross - spread * second[:, 0]
    target[:, 0] = total - spread * first[:, 0]
    solved = np.linalg.solve(gram, target[..., None])[..., 0]
    return solved[:, 0], np.concatenate([np.full((len(solved), 1), spread), solved[:, 1:]], axis=1)


def principal_axes(factor, count):
    """The factors turned so that they are orthogonal over the ratings, largest first, signs fixed."""
    _, axes = np.linalg.eigh(np.einsum("ik,il,i->kl", factor, factor, count))
    turned = np.einsum("ik,kl->il", factor, axes[:, ::-1])
    largest = turned[np.abs(turned).argmax(0), np.arange(turned.shape[1])]
    return turned * np.where(largest < 0, -1.0, 1.0)
