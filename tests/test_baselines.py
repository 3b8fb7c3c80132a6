"""The simple predictors against closed forms, plain loops and LensKit."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from evaluation import baselines
from ratings.table import Ratings
from utils import random_stream


def make_ratings(users, n_items, low=1.0, high=5.0):
    """`Ratings` of users given as lists of (item, value) in time order."""
    rows = [row for user in users for row in user]
    return Ratings(
        user_ids=np.arange(len(users)),
        item_ids=np.arange(n_items),
        offsets=np.cumsum([0] + [len(user) for user in users]),
        items=np.array([item for item, _ in rows], np.int32),
        values=np.array([value for _, value in rows], np.float32),
        times=np.arange(len(rows)),
        low=low,
        high=high,
        levels=np.arange(low, high + 1),
        fingerprint="",
    )


def low_rank_ratings(n_users, n_items, share, noise, seed=0):
    """Ratings from item effects, user effects and two factors; a user rated a random `share` of the items."""
    rng = np.random.default_rng(seed)
    item, user = 0.4 * rng.normal(size=(n_items, 2)), rng.normal(size=(n_users, 2))
    table = 3 + 0.4 * rng.normal(size=n_items) + 0.3 * rng.normal(size=(n_users, 1)) + user @ item.T
    table += noise * rng.normal(size=table.shape)
    order = [rng.permutation(n_items)[: rng.binomial(n_items, share)] for _ in range(n_users)]
    return make_ratings([[(i, table[u, i]) for i in items] for u, items in enumerate(order)], n_items, -9, 9)


# users 0 and 1 train; user 2 is new; nobody who trains rated item 3
TINY = make_ratings([[(0, 5), (1, 3)], [(0, 4), (2, 1), (1, 2)], [(2, 2), (3, 4), (0, 5), (1, 1)]], 4)
TRAIN = np.array([0, 1])
MEAN = Fraction(5 + 3 + 4 + 1 + 2, 5)
EFFECT = [(9 - 2 * MEAN) / 4, (5 - 2 * MEAN) / 4, (1 - MEAN) / 3, Fraction(0)]  # damping 2
NEW, TARGET = baselines.last_support(TINY, np.array([2]), 29)


def test_last_support_equals_a_plain_loop():
    ratings = low_rank_ratings(20, 12, 0.4, 0.1)
    users = np.array([3, 0, 7, 19, 12])
    for longest, back in ((29, 0), (3, 0), (3, 2), (1, 4), (0, 0)):
        support, target = baselines.last_support(ratings, users, longest, back)
        row = 0
        for user in users:
            start, end = ratings.offsets[user], ratings.offsets[user + 1] - 1 - back
            if end < start:
                continue
            first = max(start, end - longest)
            n = end - first
            assert support.items[row, :n].tolist() == ratings.items[first:end].tolist()
            assert support.values[row, :n].tolist() == ratings.values[first:end].tolist()
            assert (support.items[row, n:] == -1).all() and (support.values[row, n:] == 0).all()
            assert (support.target_item[row], target[row]) == (ratings.items[end], ratings.values[end])
            row += 1
        assert row == len(target)
    assert baselines.last_support(ratings, users, 3, 99)[1].shape == (0,)


def test_effects_in_closed_form():
    mean, effect = baselines.fit_effects(TINY, TRAIN, damping=2.0)
    assert mean == pytest.approx(float(MEAN))
    assert effect == pytest.approx([float(e) for e in EFFECT])


def test_predictions_in_closed_form():
    fitted = baselines.fit_effects(TINY, TRAIN, damping=2.0)
    rest = (2 - MEAN - EFFECT[2]) + (4 - MEAN - EFFECT[3]) + (5 - MEAN - EFFECT[0])
    assert baselines.predict_effects(fitted[0], 0 * fitted[1], np.inf, NEW) == pytest.approx([float(MEAN)])
    assert baselines.predict_effects(fitted[0], 0 * fitted[1], 0.0, NEW) == pytest.approx([11 / 3])
    assert baselines.predict_effects(*fitted, np.inf, NEW) == pytest.approx([float(MEAN + EFFECT[1])])
    assert baselines.predict_effects(*fitted, 5.0, NEW) == pytest.approx([float(MEAN + EFFECT[1] + rest / 8)])
    assert TARGET == [1.0]


def test_without_support_what_is_known_of_the_item_remains():
    empty, _ = baselines.last_support(TINY, np.array([2]), 0)
    fitted = baselines.fit_effects(TINY, TRAIN, damping=2.0)
    item = baselines.predict_effects(*fitted, np.inf, empty)
    assert baselines.predict_effects(fitted[0], 0 * fitted[1], 0.0, empty) == pytest.approx([float(MEAN)])
    assert baselines.predict_effects(*fitted, 5.0, empty) == pytest.approx(item)
    assert baselines.predict_factors(*fitted, np.ones((4, 2)), 1.0, 5.0, empty) == pytest.approx(item)


def test_ridge_rows_equal_one_regression_a_row(monkeypatch):
    monkeypatch.setattr(baselines, "BLOCK", 4)
    rng = np.random.default_rng(0)
    known = rng.random((11, 9)) < 0.5
    known[3] = False
    values = np.round(rng.normal(size=(11, 9)))  # some known values are 0
    factor = rng.normal(size=(9, 3))
    row, column = np.nonzero(known)
    matrix = baselines.sparse.csr_array((values[known], (row, column)), shape=known.shape)
    got = baselines.ridge_rows(matrix, factor, 0.7)
    for number in range(11):
        design = np.vstack([factor[known[number]], np.sqrt(0.7) * np.eye(3)])
        wanted = np.linalg.lstsq(design, np.append(values[number, known[number]], np.zeros(3)), rcond=None)[0]
        assert got[number] == pytest.approx(wanted, abs=1e-12)


def test_principal_axes_keep_the_products():
    rng = np.random.default_rng(0)
    user, item = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 4)), rng.normal(size=(9, 4))
    turned = baselines.principal_axes(user, item)
    gram = turned.T @ turned
    assert gram == pytest.approx(np.diag(np.diag(gram)), abs=1e-10)
    assert (np.diff(np.diag(gram)) < 0).all()
    assert (turned.max(0) == abs(turned).max(0)).all()
    new_user = user @ item.T @ np.linalg.pinv(turned.T)
    assert new_user @ turned.T == pytest.approx(user @ item.T)
    assert new_user.T @ new_user / 50 == pytest.approx(np.eye(4), abs=1e-10)


def test_factorise_recovers_a_low_rank_table():
    ratings = low_rank_ratings(200, 40, 0.6, 0.0)
    # 4, not 2: what the split-off effects took from the two factors, or left, is another item and user effect
    fitted = baselines.factorise(ratings, np.arange(150), 4, 1e-4, sweeps=60, damping=(0.0, 0.0))
    support, target = baselines.last_support(ratings, np.arange(150, 200), 39)
    assert baselines.predict_factors(*fitted, 1e-6, 1e-6, support) == pytest.approx(target, abs=0.01)


def plain_ridge(values, known, factor, penalty):
    """One ridge regression for each row of a table."""
    rows = []
    for row, mask in zip(values, known, strict=True):
        design = factor[mask]
        rows.append(np.linalg.solve(design.T @ design + penalty * np.eye(factor.shape[1]), design.T @ row[mask]))
    return np.array(rows)


def test_factorise_equals_plain_loops_over_a_table():
    ratings = low_rank_ratings(25, 14, 0.5, 0.3)
    user = np.repeat(np.arange(25), np.diff(ratings.offsets))
    table, known = np.zeros((25, 14)), np.zeros((25, 14), bool)
    table[user, ratings.items], known[user, ratings.items] = ratings.values, True
    overall, of_user = table[known].mean(), np.zeros(25)
    for _ in range(5):
        of_item = [np.sum((table[:, i] - overall - of_user)[known[:, i]]) / (known[:, i].sum() + 2) for i in range(14)]
        of_user = [np.sum((table[u] - overall - of_item)[known[u]]) / (known[u].sum() + 3) for u in range(25)]
    rest = table - overall - np.array(of_item) - np.array(of_user)[:, None]
    item_vector = random_stream(7).normal(0, 0.1, (14, 3))
    for _ in range(4):
        user_vector = plain_ridge(rest, known, item_vector, 0.5)
        item_vector = plain_ridge(rest.T, known.T, user_vector, 0.5)

    mean, effect, factor = baselines.factorise(ratings, np.arange(25), 3, 0.5, 4, seed=7, damping=(2.0, 3.0))
    assert mean == pytest.approx(overall + np.mean(of_user))
    assert effect == pytest.approx(of_item + item_vector @ user_vector.mean(0))
    covariance = np.cov(user_vector.T, bias=True)
    assert factor @ factor.T == pytest.approx(item_vector @ covariance @ item_vector.T)


def test_more_factors_than_the_data_has_are_zero():
    ratings = low_rank_ratings(30, 5, 0.9, 0.1)
    _, _, factor = baselines.factorise(ratings, np.arange(30), 12, 1.0)
    assert np.isfinite(factor).all() and abs(factor[:, 5:]).max() < 1e-6


def test_an_item_without_training_ratings_has_zeros():
    _, effect, factor = baselines.factorise(TINY, TRAIN, 2, 1.0)
    assert effect[3] == 0 and not factor[3].any()
    assert effect[:3].all()


def test_predict_factors_equals_one_regression_a_user():
    ratings = low_rank_ratings(60, 20, 0.5, 0.2)
    mean, effect, factor = baselines.factorise(ratings, np.arange(40), 3, 2.0)
    support, _ = baselines.last_support(ratings, np.arange(40, 60), 7)
    got = baselines.predict_factors(mean, effect, factor, 0.5, 3.0, support)
    for items, values, target, prediction in zip(*support, got, strict=True):
        known = items >= 0
        design = np.column_stack([factor[items[known]], np.ones(known.sum())])
        design = np.vstack([design, np.diag(np.sqrt([0.5, 0.5, 0.5, 3.0]))])
        rest = np.append(values[known] - mean - effect[items[known]], np.zeros(4))
        user = np.linalg.lstsq(design, rest, rcond=None)[0]
        assert prediction == pytest.approx(mean + effect[target] + factor[target] @ user[:3] + user[3])
    stiff = baselines.predict_factors(mean, effect, factor, 1e12, 3.0, support)
    assert stiff == pytest.approx(baselines.predict_effects(mean, effect, 3.0, support))


def test_factors_come_from_training_users_alone_bit_for_bit():
    ratings = low_rank_ratings(50, 20, 0.6, 0.3)
    train = np.arange(0, 50, 2)
    others = np.repeat(np.arange(50) % 2 == 1, np.diff(ratings.offsets))
    changed = replace(
        ratings,
        values=np.where(others, np.float32(-5), ratings.values),
        items=np.where(others, 19 - ratings.items, ratings.items),
    )
    np.random.seed(1)
    first = baselines.factorise(ratings, train, 4, 2.0, seed=3)
    np.random.seed(2)
    second = baselines.factorise(changed, train, 4, 2.0, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    for fit in (baselines.fit_effects(ratings, train), baselines.fit_effects(changed, train)):
        assert np.array_equal(fit[1], baselines.fit_effects(ratings, train)[1])


def test_the_number_of_threads_does_not_change_a_bit():
    ratings = low_rank_ratings(1000, 200, 0.2, 0.5)
    support, _ = baselines.last_support(ratings, np.arange(900, 1000), 29)
    found = []
    for threads in (1, 4):
        with threadpool_limits(threads):
            assert {pool["num_threads"] for pool in threadpool_info()} == {threads}
            fitted = baselines.factorise(ratings, np.arange(900), 16, 4.0, sweeps=2)
            found.append((*fitted, baselines.predict_factors(*fitted, 0.5, 5.0, support)))
    assert all(np.asarray(one).tobytes() == np.asarray(four).tobytes() for one, four in zip(*found, strict=True))


@pytest.fixture(scope="module")
def fitted():
    """Noisy low-rank ratings, the users' split, and the chosen predictors."""
    ratings = low_rank_ratings(400, 60, 0.4, 0.4)
    split = np.arange(280), np.arange(280, 330), np.arange(330, 400)
    return ratings, split, baselines.fit_baselines(ratings, *split[:2], 30)


def root_mean(ratings, users, predict):
    pairs = [baselines.last_support(ratings, users, 29, back) for back in range(5)]
    squared = [(np.clip(predict(s), ratings.low, ratings.high) - t) ** 2 for s, t in pairs]
    return np.sqrt(np.mean(np.concatenate(squared)))


def test_the_constants_are_the_best_on_validation_users(fitted):
    ratings, (train, validation, _), (predictors, chosen) = fitted
    for name, constants, predict in baselines.candidates(ratings, train):
        difference = root_mean(ratings, validation, predict) - root_mean(ratings, validation, predictors[name])
        assert difference > -1e-12
        assert difference < 1e-12 or constants != chosen[name]


def test_each_predictor_uses_what_the_one_before_leaves(fitted):
    ratings, (_, _, test), (predictors, _) = fitted
    figures = {name: root_mean(ratings, test, predict) for name, predict in predictors.items()}
    names = ["global mean", "item mean", "damped means", "matrix factorisation"]
    assert sorted(figures, key=figures.get, reverse=True)[-3:] == names[1:]
    assert figures["matrix factorisation"] < 0.55 < figures["damped means"]  # noise alone: 0.4


def test_predictions_do_not_depend_on_how_many_are_made_at_a_time(fitted, monkeypatch):
    ratings, (_, _, test), (predictors, _) = fitted
    support, _ = baselines.last_support(ratings, test, 29)
    monkeypatch.setattr(baselines, "BLOCK", 7)
    for predictor in predictors.values():
        assert baselines.predict(predictor, support) == pytest.approx(predictor(support), abs=1e-12)


def test_large_data_have_one_factorisation(fitted, monkeypatch):
    ratings, (train, *_), _ = fitted
    monkeypatch.setattr(baselines, "MOST_FACTORISED", 10)
    chosen = [constants for name, constants, _ in baselines.candidates(ratings, train) if "factor" in name]
    assert {(c["k"], c["regularisation"]) for c in chosen} == {baselines.USUAL}


def test_order_support_equals_a_plain_loop():
    lengths = (15, 1, 12, 11, 5, 2, 3, 40)
    ratings = make_ratings([[(i, 1 + (i * u) % 5) for i in range(length)] for u, length in enumerate(lengths)], 40)
    users = np.arange(len(lengths))
    expected = []
    for user in users:
        rows = list(range(ratings.offsets[user], ratings.offsets[user + 1]))
        n = min(10, len(rows) - 1)
        if n >= 2:
            expected += [(user, rows[:-n][-5:], target) for target in rows[-n:]]
    found, support, target = baselines.order_support(ratings, users, 5)
    assert found.tolist() == [user for user, _, _ in expected]
    for row, (_, known, place) in enumerate(expected):
        assert support.items[row, : len(known)].tolist() == ratings.items[known].tolist()
        assert (support.items[row, len(known) :] == -1).all()
        assert (support.target_item[row], target[row]) == (ratings.items[place], ratings.values[place])
