"""Factor analysis: its expectation against plain algebra, its fit against the model that made the data."""

import numpy as np
from scipy import sparse

from dataloader import Sequences
from models import factor_analysis


def simulate(n_users=1500, n_items=20, k=2, per_user=12, seed=0):
    """Sequences drawn from the model itself, and its true loadings (n_items, 1 + k)."""
    rng = np.random.default_rng(seed)
    loading = np.concatenate([np.full((n_items, 1), 0.5), rng.normal(0, 0.6, (n_items, k))], axis=1)
    effect = rng.normal(0, 0.3, n_items)
    vectors = rng.normal(size=(n_users, k + 1))
    items = np.argsort(rng.random((n_users, n_items)), axis=1)[:, :per_user]
    ratings = effect[items] + np.einsum("uk,uik->ui", vectors, loading[items]) + rng.normal(0, 0.5, items.shape)
    offsets = np.arange(n_users + 1) * per_user
    return Sequences(offsets, items.ravel() + 1, ratings.ravel().astype(np.float32)), effect, loading


def test_recovers_the_covariance_that_made_the_ratings():
    sequences, effect, loading = simulate()
    found, factor = factor_analysis.fit(sequences, np.arange(1500), 20, k=2, prior=0.1, sweeps=40)
    truth = loading[:, 1:] @ loading[:, 1:].T
    assert np.abs(factor @ factor.T - truth).max() < 0.2
    assert np.corrcoef((factor @ factor.T).ravel(), truth.ravel())[0, 1] > 0.98
    assert np.abs(found - effect).max() < 0.2


def test_posterior_is_the_ridge_regression_of_each_user():
    rng = np.random.default_rng(1)
    is_rated = sparse.csr_array(rng.random((4, 6)) < 0.5).astype(float)
    residual = is_rated * rng.normal(size=(4, 6))
    loading, noise = rng.normal(size=(6, 3)), 0.7
    effect = rng.normal(size=6)
    ratings = sparse.csr_array(residual + is_rated * effect)
    mean, moment = factor_analysis.user_posterior(ratings, is_rated, effect, loading, noise)
    moment = factor_analysis.whole(moment, 3)
    for user in range(4):
        rows = loading[is_rated.toarray()[user] > 0]
        values = residual.toarray()[user][is_rated.toarray()[user] > 0]
        covariance = np.linalg.inv(rows.T @ rows / noise + np.eye(3))
        expected = covariance @ rows.T @ values / noise
        np.testing.assert_allclose(mean[user], expected, atol=1e-12)
        np.testing.assert_allclose(moment[user], covariance + np.outer(expected, expected), atol=1e-12)


def test_other_users_and_unrated_items_do_not_enter():
    sequences, _, _ = simulate(n_users=60)
    train = np.arange(0, 60, 2)
    changed = sequences.ratings.copy()
    changed[np.repeat(np.arange(60) % 2 == 1, 12)] *= -1
    effect, factor = factor_analysis.fit(sequences, train, 25, k=2, prior=5.0)
    again, same = factor_analysis.fit(sequences._replace(ratings=changed), train, 25, k=2, prior=5.0)
    assert (effect == again).all() and (factor == same).all()
    assert not effect[20:].any() and not factor[20:].any()


def test_factors_are_orthogonal_over_the_ratings_and_fall_in_size():
    sequences, _, _ = simulate()
    _, factor = factor_analysis.fit(sequences, np.arange(1500), 20, k=3, prior=1.0)
    gram = np.einsum("ik,il,i->kl", factor, factor, np.bincount(sequences.items - 1))
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-6 * gram.max())
    assert (np.diff(np.diag(gram)) <= 0).all()
