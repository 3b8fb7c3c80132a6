"""Every figure against a plain loop, a closed form or a simulation."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

import utils
from evaluation import evaluate, metrics
from ratings import table
from serving import export
from utils import UserError

LEVELS = np.array([1.0, 2.0, 3.0, 4.0, 5.0])


def draw(seed, n=400):
    """Targets, and two methods' predictions that share a part of their error."""
    rng = np.random.default_rng(seed)
    target = rng.choice(LEVELS, size=n, p=[0.05, 0.1, 0.2, 0.35, 0.3])
    shared = rng.normal(0, 0.7, n)
    return target, target + shared + rng.normal(0, 0.3, n), target + 0.9 * shared + rng.normal(0.1, 0.3, n)


def score(target, prediction, low, high):
    """`metrics.summary` of predictions."""
    errors = metrics.prediction_errors(target, prediction, low, high)
    return metrics.summary(errors**2, abs(errors), table.nearest_level(target, LEVELS))


def squared_errors(seed, n=400):
    target, first, second = draw(seed, n)
    return target, (first - target) ** 2, (second - target) ** 2


def test_summary_equals_a_plain_loop():
    target, prediction, _ = draw(0)
    total = absolute = 0.0
    for wanted, given in zip(target, prediction, strict=True):
        error = min(max(given, 1.0), 5.0) - wanted
        total, absolute = total + error * error, absolute + abs(error)
    result = score(target, prediction, 1, 5)
    assert result["n"] == 400
    assert result["rmse"] == pytest.approx(math.sqrt(total / 400), abs=1e-12)
    assert result["mae"] == pytest.approx(absolute / 400, abs=1e-12)


def test_pooling_is_not_a_mean_of_batch_means():
    errors = np.array([3.0, 0.0, 0.0, 0.0])
    assert metrics.rmse(errors**2)[0] == 1.5  # two batches of two would average to 1.06
    parts = [metrics.rmse(errors[half] ** 2)[0] for half in (slice(2), slice(2, 4))]
    assert np.mean(parts) != pytest.approx(1.5)


def test_standard_errors_in_closed_form():
    squared = np.array([0.0, 2.0])  # mean 1, deviation sqrt(2), so the mean's standard error is 1
    assert metrics.mean_with_error(squared) == (1.0, pytest.approx(1.0))
    assert metrics.rmse(squared) == (1.0, pytest.approx(0.5))  # d sqrt(m) / dm = 1 / 2
    assert metrics.rmse(np.zeros(3)) == (0.0, 0.0)
    assert math.isnan(metrics.rmse(np.ones(1))[1])


@pytest.mark.parametrize("figure", ["rmse", "mae", "macro_rmse"])
def test_standard_errors_are_the_spread_over_repeated_samples(figure):
    results = [score(*draw(seed)[:2], -99, 99) for seed in range(1, 401)]
    spread = np.std([result[figure] for result in results], ddof=1)
    assert np.mean([result[figure + "_se"] for result in results]) == pytest.approx(spread, rel=0.12)


@pytest.mark.parametrize("name", ["compare_rmse", "compare_means", "compare_macro"])
def test_intervals_of_paired_differences_cover_the_truth(name):
    def compared(seed, n):
        target, first, second = squared_errors(seed, n)
        levels = (table.nearest_level(target, LEVELS),) if name == "compare_macro" else ()
        return getattr(metrics, name)(first, second, *levels)

    truth = compared(1, 2_000_000).difference
    results = [compared(seed, 300) for seed in range(2, 602)]
    covered = np.mean([result.low <= truth <= result.high for result in results])
    assert 0.92 <= covered <= 0.975  # 0.95 with a standard error of .009, less what small levels cost


def test_pairing_gives_a_narrower_interval_than_two_separate_errors():
    _, first, second = squared_errors(0)
    apart = math.hypot(metrics.mean_with_error(first)[1], metrics.mean_with_error(second)[1])
    assert metrics.compare_means(first, second).standard_error < 0.7 * apart


def test_compare_equals_a_plain_loop_and_is_antisymmetric():
    _, first, second = squared_errors(0)
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = sum(differences) / 400
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 399 / 400)
    result = metrics.compare_means(first, second)
    assert result == pytest.approx((mean, error, mean / error, mean - 1.959964 * error, mean + 1.959964 * error))
    for compare in (metrics.compare_means, metrics.compare_rmse):
        there, back = compare(first, second), compare(second, first)
        assert (back.difference, back.z, back.low) == pytest.approx((-there.difference, -there.z, -there.high))
    assert metrics.compare_rmse(first, second).difference == pytest.approx(
        math.sqrt(np.mean(first)) - math.sqrt(np.mean(second))
    )


def test_comparison_of_a_method_with_itself_is_zero():
    target, first, _ = squared_errors(0)
    level = table.nearest_level(target, LEVELS)
    for result in (metrics.compare_rmse(first, first), metrics.compare_macro(first, first, level)):
        assert tuple(result) == (0, 0, 0, 0, 0)
    assert metrics.compare_means(first + 1.0, first).z > 1e6


def test_macro_rmse_equals_a_plain_loop_over_levels():
    target, first, second = squared_errors(3)
    roots, variances, gaps, gap_variances = [], [], [], []
    for value in LEVELS:
        rows = [i for i in range(400) if target[i] == value]
        a, b = math.sqrt(np.mean(first[rows])), math.sqrt(np.mean(second[rows]))
        roots.append(a)
        variances.append(np.var(first[rows], ddof=1) / len(rows) / (4 * a * a))
        gaps.append(a - b)
        gap_variances.append(np.var(first[rows] / (2 * a) - second[rows] / (2 * b), ddof=1) / len(rows))
    level = table.nearest_level(target, LEVELS)
    assert metrics.macro_rmse(first, level) == pytest.approx((np.mean(roots), math.sqrt(sum(variances)) / 5))
    result = metrics.compare_macro(first, second, level)
    assert result[:2] == pytest.approx((np.mean(gaps), math.sqrt(sum(gap_variances)) / 5))
    values, errors, counts = metrics.rmse_by_group(first, level, 5)
    assert values == pytest.approx(roots) and errors**2 == pytest.approx(variances) and counts.sum() == 400


def test_levels_without_targets_do_not_count_in_the_mean():
    squared, level = np.array([1.0, 1.0, 9.0, 9.0]), np.array([0, 0, 4, 4])
    assert metrics.macro_rmse(squared, level)[0] == 2.0
    values, errors, counts = metrics.rmse_by_group(squared, level, 5)
    assert np.isnan(values[1:4]).all() and np.isnan(errors[1:4]).all() and counts.tolist() == [2, 0, 0, 0, 2]
    assert (values[0], values[4]) == (1.0, 3.0)


@pytest.mark.parametrize("target", [[1.0, 5.0, 5.0], [5.0]])
def test_figures_that_few_targets_do_not_have_are_null(target, tmp_path, capsys):
    """The macro-RMSE has no standard error where a level has one target, the RMSE none where there is one in all."""
    target = np.array(target)
    ratings = SimpleNamespace(low=1.0, high=5.0, levels=LEVELS)
    report = evaluate.figures(target, target - 1, ratings)
    report["order"] = evaluate.order_figures(np.zeros(len(target)), target, target, ratings)
    assert report["macro_rmse_se"] is None and (report["rmse_se"] is None) == (len(target) == 1)
    assert report["order"]["ndcg@1"] == 1 and report["order"]["pairs"] == (None if len(target) == 1 else 1)
    utils.write_json(tmp_path / "test.json", report | {"step": 1})
    assert json.loads((tmp_path / "test.json").read_text()) == report | {"step": 1}
    nobody = {**report, "order": evaluate.order_figures(target[:0], target[:0], target[:0], ratings)}
    evaluate.print_figures("ours", report | {"simple_predictors": {"theirs": nobody}})
    shown = capsys.readouterr().out
    assert " --" in shown and f"{report['mae']:.4f}" in shown and "nan" not in shown
    assert "| -- |" in export.figures(tmp_path, 1)
    with pytest.raises(ValueError, match="JSON"):
        utils.write_json(tmp_path / "test.json", {"rmse": math.nan})


# -----------------------------------------------------------------------------
# order


def plain_ndcg(target, prediction, k):
    """nDCG@k of one user, without ties."""
    ranked = sorted(range(len(target)), key=lambda i: -prediction[i])
    found = sum(target[i] / math.log2(2 + rank) for rank, i in enumerate(ranked[:k]))
    return found / sum(t / math.log2(2 + rank) for rank, t in enumerate(sorted(target, reverse=True)[:k]))


def test_order_equals_plain_loops_and_does_not_depend_on_the_rows_order():
    rng = np.random.default_rng(0)
    user = np.repeat([3, 7, 8, 20], [10, 2, 10, 5])
    target, prediction = rng.integers(1, 6, len(user)).astype(float), rng.normal(size=len(user))
    mixed = rng.permutation(len(user))
    users, found = metrics.order_by_user(user[mixed], target[mixed], prediction[mixed], 1.0)
    assert users.tolist() == [3, 7, 8, 20] and tuple(found) == metrics.ORDER
    for row, number in enumerate(users):
        t, p = target[user == number], prediction[user == number]
        for k in metrics.CUTS:
            assert found[f"ndcg@{k}"][row] == pytest.approx(plain_ndcg(t, p, k))
        pairs = [p[i] > p[j] for i in range(len(t)) for j in range(len(t)) if t[i] > t[j]]
        assert found["pairs"][row] == pytest.approx(np.mean(pairs) if pairs else np.nan, nan_ok=True)


def test_equal_predictions_count_as_the_mean_over_their_orders():
    target, prediction = [5.0, 1.0, 3.0, 4.0], np.array([2.0, 2.0, 1.0, 2.0])
    _, found = metrics.order_by_user(np.zeros(4), target, prediction, 1.0)
    orders = [prediction + 1e-3 * np.array(noise) for noise in itertools.permutations(range(4))]
    for k in metrics.CUTS:
        assert found[f"ndcg@{k}"][0] == pytest.approx(np.mean([plain_ndcg(target, p, k) for p in orders]))
    assert found["pairs"][0] == pytest.approx((0.5 * 3 + 2 + 0) / 6)  # 5>1, 5>4, 4>1 level; 5>3, 4>3 right; 3>1 wrong
    _, level = metrics.order_by_user(np.zeros(4), target, np.zeros(4), 1.0)
    assert level["pairs"][0] == 0.5


def test_order_of_ratings_that_are_all_alike_or_below_zero():
    _, found = metrics.order_by_user(np.array([0, 0, 1, 1]), [0.0, 0, 3, 3], [1.0, 2, 1, 2], 0.0)
    assert found["ndcg@10"].tolist() == [1, 1] and np.isnan(found["pairs"]).all()
    _, worst = metrics.order_by_user(np.zeros(2), [-10.0, 10.0], [1.0, 0.0], -10.0)
    _, best = metrics.order_by_user(np.zeros(2), [-10.0, 10.0], [0.0, 1.0], -10.0)
    assert worst["ndcg@1"] == 0 and best["ndcg@1"] == 1
    report = metrics.order_summary({"pairs": np.array([0.5, np.nan, 1.0])})
    assert report == {"users": 3, "pairs": 0.75, "pairs_se": pytest.approx(0.25)}


def test_nearest_level_bins_a_fine_scale():
    centres = np.arange(5.0, 100, 10)  # ten bins of [0, 100]
    values = np.random.default_rng(0).uniform(0, 100, (7, 30))
    assert np.array_equal(table.nearest_level(values, centres), (values // 10).astype(int))
    assert table.nearest_level([0.5, 3.5], np.arange(0.5, 5.5, 0.5)).tolist() == [0, 6]


def test_balance_of_histograms():
    found = metrics.balance(np.array([[4, 0, 0], [2, 2, 2], [2, 2, 0]]))
    assert found == pytest.approx([0, 1, np.log(2) / np.log(3)])
    one_level = metrics.balance(np.array([[5], [1]]))
    assert [f"{value:g}" for value in (found[0], *one_level)] == ["0", "0", "0"]


def test_balance_score_in_closed_form():
    values = np.array([[5, 5, 5, 5, 5], [1, 2, 3, 4, 5], [4, 5, 4, 5, 1], [0, 0, 0, 0, 0]], float)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]], bool)
    expected = [0, 1, math.log(2) / math.log(5), 0]
    assert metrics.balance_score(values, mask, LEVELS) == pytest.approx(expected)
    assert metrics.balance_score(values, mask, np.array([3.0])).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("target", "prediction"),
    [([1, 2], [1, np.nan]), ([1, 2], [np.inf, 1]), ([1, np.nan], [1, 1]), ([1, 2], [1]), ([], []), ([[1]], [[1]])],
)
def test_a_missing_prediction_is_an_error(target, prediction):
    with pytest.raises(UserError):
        score(target, prediction, 1, 5)
