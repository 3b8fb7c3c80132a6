"""Factor analysis: its expectation against plain algebra, its fit against the model that made the data."""

import numpy as np
import pytest
import torch
from scipy import sparse

from dataloader import Sequences
from models import factor_analysis
from models.factor_analysis import Scales


def simulate(n_users=1500, n_items=20, k=2, per_user=12, seed=0, noise=0.5):
    """Sequences drawn from the model itself, and its true effects (n_items,) and loadings (n_items, 1 + k)."""
    rng = np.random.default_rng(seed)
    loading = np.concatenate([np.full((n_items, 1), 0.5), rng.normal(0, 0.6, (n_items, k))], axis=1)
    effect = rng.normal(0, 0.3, n_items)
    vectors = rng.normal(size=(n_users, k + 1))
    items = np.argsort(rng.random((n_users, n_items)), axis=1)[:, :per_user]
    ratings = effect[items] + np.einsum("uk,uik->ui", vectors, loading[items]) + rng.normal(0, noise, items.shape)
    offsets = np.arange(n_users + 1) * per_user
    return Sequences(offsets, items.ravel() + 1, ratings.ravel().astype(np.float32)), effect, loading


def test_recovers_the_model_that_made_the_ratings_and_its_rank():
    sequences, effect, loading = simulate()
    found, apart = factor_analysis.fit(sequences, np.arange(1500), 20, k=5)
    truth = loading[:, 1:] @ loading[:, 1:].T
    assert apart == []
    assert np.abs(found.factor @ found.factor.T - truth).max() < 0.3
    assert np.corrcoef((found.factor @ found.factor.T).ravel(), truth.ravel())[0, 1] > 0.98
    assert np.abs(found.factor[:, 2:]).max() < 0.15 * np.abs(found.factor[:, :2]).max()  # the others vanish
    assert np.abs(found.effect - effect).max() < 0.2
    np.testing.assert_allclose(found.damping, [0.25 / 0.25, *[0.25] * 5], rtol=0.15)


def test_a_few_users_and_items_at_once_give_the_same_bits(monkeypatch):
    sequences, _, _ = simulate(n_users=50)
    whole, apart = factor_analysis.fit(sequences, np.arange(50), 20, 3, parts=2)
    monkeypatch.setattr(factor_analysis, "AT_ONCE", 7)
    again, others = factor_analysis.fit(sequences, np.arange(50), 20, 3, parts=2)
    for one, other in zip([whole, *apart], [again, *others], strict=True):
        assert all(map(np.array_equal, one, other))


def test_posterior_is_the_ridge_regression_of_each_user():
    rng = np.random.default_rng(1)
    is_rated = sparse.csr_array(rng.random((4, 6)) < 0.5).astype(float)
    residual = is_rated * rng.normal(size=(4, 6))
    items, root = rng.normal(size=(6, 3)), rng.normal(0, 0.3, (6, 3, 3))
    scales = Scales(0.7, 0.4, rng.normal(size=3), np.ones(3))
    unsure = root @ root.transpose(0, 2, 1)
    user, item = is_rated.nonzero()
    ratings = (residual.toarray() + items[:, 0])[user, item]
    rated, given = factor_analysis.lay_out(user, item, ratings, (4, 6), "cpu"), map(torch.from_numpy, (items, unsure))
    tensors = scales._replace(centre=torch.from_numpy(scales.centre))
    mean, moment = factor_analysis.user_posterior(rated, *given, tensors)
    mean, moment = mean.numpy(), factor_analysis.whole(moment, 3).numpy()
    loading = np.concatenate([np.full((6, 1), scales.spread), items[:, 1:]], axis=1)
    for user in range(4):
        rated = is_rated.toarray()[user] > 0
        rows, values, doubt = loading[rated], residual.toarray()[user][rated], unsure[rated]
        information, linear = rows.T @ rows / scales.noise + np.eye(3), rows.T @ values / scales.noise + scales.centre
        information[1:, 1:] += doubt[:, 1:, 1:].sum(0) / scales.noise
        linear[1:] -= doubt[:, 0, 1:].sum(0) / scales.noise
        covariance = np.linalg.inv(information)
        np.testing.assert_allclose(mean[user], covariance @ linear, atol=1e-12)
        np.testing.assert_allclose(moment[user], covariance + np.outer(mean[user], mean[user]), atol=1e-12)


def test_other_users_and_unrated_items_do_not_enter():
    sequences, _, _ = simulate(n_users=60)
    train = np.arange(0, 60, 2)
    changed = sequences.ratings.copy()
    changed[np.repeat(np.arange(60) % 2 == 1, 12)] *= -1
    one, _ = factor_analysis.fit(sequences, train, 25, k=2)
    other, _ = factor_analysis.fit(sequences._replace(ratings=changed), train, 25, k=2)
    for ours, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not one.effect[20:].any() and not one.factor[20:].any()


def fold_in_error(sequences, users, factors):
    """Mean squared error of each user's last rating, predicted from those before it."""
    errors = []
    for user in users:
        at = slice(sequences.offsets[user], sequences.offsets[user + 1])
        items, ratings = sequences.items[at] - 1, sequences.ratings[at] - factors.effect[sequences.items[at] - 1]
        design = np.concatenate([np.ones((len(items), 1)), factors.factor[items]], axis=1)
        past, left = design[:-1], ratings[:-1] - design[:-1] @ factors.centre
        vector = factors.centre + np.linalg.solve(past.T @ past + np.diag(factors.damping), past.T @ left)
        errors.append((ratings[-1] - design[-1] @ vector) ** 2)
    return np.mean(errors)


def test_tables_without_a_part_do_not_know_its_ratings():
    """Tables of all users predict a rating better that they were fitted to; without the part the gain is gone."""
    sequences, users = simulate(n_users=400, n_items=40, per_user=8, noise=1.0)[0], np.arange(400)
    whole, apart = factor_analysis.fit(sequences, users, 40, 3, parts=4)
    known, left_out, strange = np.mean(
        [
            [
                fold_in_error(sequences, users[users % 4 == part], factors)
                for factors in (whole, apart[part], factor_analysis.fit(sequences, users[users % 4 != part], 40, 3)[0])
            ]
            for part in range(4)
        ],
        axis=0,
    )
    assert known < 0.97 * strange and left_out > strange - 0.2 * (strange - known)


def test_factors_are_orthogonal_over_the_ratings_and_fall_in_size():
    sequences, _, _ = simulate()
    found, _ = factor_analysis.fit(sequences, np.arange(1500), 20, k=3)
    gram = np.einsum("ik,il,i->kl", found.factor, found.factor, np.bincount(sequences.items - 1))
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-6 * gram.max())
    assert (np.diff(np.diag(gram)) <= 0).all()


@pytest.mark.parametrize(("n_users", "n_items", "per_user"), [(1, 3, 2), (2, 2, 1), (5, 1, 1), (30, 4, 3)])
def test_few_ratings_and_constant_ones_give_finite_values(n_users, n_items, per_user):
    sequences, _, _ = simulate(n_users=n_users, n_items=n_items, per_user=per_user)
    for ratings in (sequences.ratings, np.zeros_like(sequences.ratings)):
        found, _ = factor_analysis.fit(sequences._replace(ratings=ratings), np.arange(n_users), n_items, k=4)
        assert all(np.isfinite(values).all() for values in found) and (found.damping > 0).all()


def test_each_sweep_raises_the_evidence(monkeypatch):
    """The variational bound on the ratings' likelihood: fit and doubt of the ratings, less what users and items tell
    apart from their priors."""
    sequences, bounds, improve = simulate(n_users=200, k=3)[0], [], factor_analysis.improve

    def watch(rated, mean, moment, *state, learn):
        items, covariance, scales = improve(rated, mean, moment, *state, learn=learn)
        spreads = factor_analysis.whole(moment, mean.shape[1]) - mean[:, :, None] * mean[:, None]
        told = divergence(*(v.numpy() for v in (mean, spreads, scales.centre)), np.ones(mean.shape[1]))
        told += divergence(items.numpy(), covariance.numpy(), 0, scales.precision.numpy())
        bounds.append(-0.5 * len(rated.ratings) * (np.log(scales.noise) + 1) - told)
        return items, covariance, scales

    monkeypatch.setattr(factor_analysis, "improve", watch)
    factor_analysis.fit(sequences, np.arange(200), 20, k=3)
    assert len(bounds) == factor_analysis.SWEEPS and (np.diff(bounds) > -1e-6).all()


def divergence(mean, covariance, centre, precision):
    """Sum of the Kullback-Leibler divergences of N(mean, covariance) (n, m) from N(centre, 1 / precision)."""
    first = (np.einsum("nii->ni", covariance) + (mean - centre) ** 2) @ precision
    return 0.5 * (first - mean.shape[1] - np.linalg.slogdet(covariance)[1] - np.log(precision).sum()).sum()


@pytest.mark.parametrize("chosen", [True, False])
def test_an_audience_is_told_where_users_choose_what_they_like(chosen):
    """By how much those who rate an item like it more than the mean user, as far as that is more than chance."""
    rng, n_users, n_items = np.random.default_rng(2), 2000, 30
    taste, factor = rng.normal(size=(n_users, 1)), rng.normal(size=(n_items, 1))
    liking = taste @ factor.T
    shown = np.argsort(rng.gumbel(size=liking.shape) + chosen * liking, axis=1)[:, -10:]
    values = np.take_along_axis(liking, shown, 1) + rng.normal(0, 0.3, shown.shape)
    sequences = Sequences(np.arange(n_users + 1) * 10, shown.ravel() + 1, values.ravel().astype(np.float32))
    found, _ = factor_analysis.fit(sequences, np.arange(n_users), n_items, k=2)
    truth = np.array([liking[(shown == item).any(1), item].mean() for item in range(n_items)]) - liking.mean(0)
    liked = found.audience[:, 0] + (found.factor * found.audience[:, 1:]).sum(1)
    if chosen:
        assert np.corrcoef(liked, truth)[0, 1] > 0.95 and 0.7 < liked.std() / truth.std() < 1.3
    else:
        assert liked.std() < 0.02


def test_few_users_leave_factors_in_doubt():
    doubts = [factor_analysis.fit(simulate(n)[0], np.arange(n), 20, k=2)[0].doubt for n in (50, 400)]
    assert all(doubt[0] == 0 and (doubt[1:] > 0).all() for doubt in doubts)
    assert (doubts[0][1:] > 4 * doubts[1][1:]).all()
