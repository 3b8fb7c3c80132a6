"""Figures of rating predictions, with standard errors, on flat arrays: one entry for each target.

Errors are summed over all targets and divided once, never averaged by batch. Targets of several folds are
concatenated. Where a target was predicted with several seeds, average its errors over the seeds first:
repeated entries are not independent and would make the standard errors too small.
"""

from typing import NamedTuple

import numpy as np

from ratings import table
from utils import UserError

CUTS = (1, 3, 5, 10)  # of nDCG
ORDER = (*(f"ndcg@{k}" for k in CUTS), "pairs")  # the figures of `order_by_user`
ORDER_TARGETS = 10  # last ratings of a user that are to be ordered
NORMAL_95 = 1.959964  # two-sided 95 % point of the normal distribution


class Comparison(NamedTuple):
    """A paired difference of two methods, first minus second. Errors are better low, figures of order high."""

    difference: float
    standard_error: float
    z: float
    low: float  # 95 % interval
    high: float


def prediction_errors(target, prediction, low, high):
    """Prediction, clipped to the scale [low, high], minus target: (n,). A missing prediction is an error."""
    target, prediction = np.asarray(target, np.float64), np.asarray(prediction, np.float64)
    if target.shape != prediction.shape or target.ndim != 1 or len(target) == 0:
        raise UserError(f"{prediction.size} predictions for {target.size} targets; every target needs one")
    for name, values in (("target", target), ("prediction", prediction)):
        if not np.isfinite(values).all():
            number = int(np.flatnonzero(~np.isfinite(values))[0]) + 1
            raise UserError(f"{name} {number} of {len(values)} is not a finite number; score the targets again")
    return np.clip(prediction, low, high) - target


def mean_with_error(values):
    """Mean and its standard error; the latter is nan for a single value."""
    deviation = values.std(ddof=1) if len(values) > 1 else np.nan
    return float(values.mean()), float(deviation / np.sqrt(len(values)))


def rmse_shares(squared):
    """Values (n,) whose mean is the RMSE and whose standard error is the RMSE's by the delta method.

    The root is linear around the mean m: a squared error e has the share sqrt(m) + (e - m) / (2 sqrt(m)).
    """
    root = np.sqrt(squared.mean())
    return (root + squared / root) / 2 if root > 0 else np.zeros(len(squared))


def rmse(squared):
    """Pooled RMSE of squared errors (n,), and its standard error."""
    return float(np.sqrt(squared.mean())), mean_with_error(rmse_shares(squared))[1]


def rmse_by_group(squared, group, n_groups):
    """RMSE, standard error and number of targets of each group 0..n_groups - 1; nan where there are none."""
    parts = [squared[group == number] for number in range(n_groups)]
    pairs = [rmse(part) if len(part) else (np.nan, np.nan) for part in parts]
    values, errors = np.array(pairs).reshape(-1, 2).T
    return values, errors, np.array([len(part) for part in parts])


def macro_rmse(squared, level):
    """Mean of the RMSEs of the rating levels (n,) that have targets, and its standard error."""
    return stratified_mean(squared, level, rmse_shares)


def stratified_mean(values, level, shares):
    """Mean over levels of the mean of `shares(values of the level)`, and its standard error."""
    pairs = [mean_with_error(shares(values[level == number])) for number in np.unique(level)]
    means, errors = np.array(pairs).T
    return float(means.mean()), float(np.sqrt(np.sum(errors**2)) / len(means))


def balance(histogram):
    """Entropy of rating histograms (..., n_levels) over its maximum, ln(n_levels): (...).

    0: all ratings are at one level (or there is no rating, or one level only); 1: every level equally often.
    """
    share = histogram / np.maximum(histogram.sum(-1, keepdims=True), 1)
    entropy = abs(np.sum(share * np.log(np.where(share > 0, share, 1)), axis=-1))  # the sum is -0 where it is none
    return np.clip(entropy / np.log(max(histogram.shape[-1], 2)), 0, 1)


def balance_score(values, mask, levels):
    """`balance` of each user's ratings: (T,) from (T, S)."""
    at_level = (table.nearest_level(values, levels)[..., None] == np.arange(len(levels))) & mask[..., None]
    return balance(at_level.sum(1))


def summary(squared, absolute, level):
    """Number of targets, and RMSE, MAE and macro-RMSE with standard errors (`_se`), of errors (n,)."""
    figures = {"rmse": rmse(squared), "mae": mean_with_error(absolute), "macro_rmse": macro_rmse(squared, level)}
    return {"n": len(squared)} | with_errors(figures)


def with_errors(figures):
    """{name: (value, standard error)} as {name: value, name_se: standard error}."""
    return {f"{name}{end}": v for name, pair in figures.items() for end, v in zip(("", "_se"), pair, strict=True)}


def text(value):
    """A figure with four decimals, or -- where there is none (None or nan)."""
    return "--" if value is None or np.isnan(value) else f"{value:.4f}"


def aligned(rows):
    """Rows of text as lines, the first column to the left, the others to the right."""
    width = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[row[0].ljust(width[0]), *map(str.rjust, row[1:], width[1:])] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


# -----------------------------------------------------------------------------
# order


def order_by_user(user, target, prediction, low):
    """How well predictions order each user's targets, given as flat arrays (n,): users (U,), {name: (U,)}.

    `ndcg@k` has the rating as gain (shifted where the scale begins at `low` < 0) and the discount log2(1 + rank);
    `pairs` is the share of pairs of unequal targets that are in the right order, nan where a user has none. Equal
    predictions count as if they were put in random order.
    """
    users, row = np.unique(user, return_inverse=True)
    order, count = np.argsort(row, kind="stable"), np.bincount(row)
    column = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    known = np.arange(count.max()) < count[:, None]
    gain, score = np.zeros(known.shape), np.zeros(known.shape)
    gain[row[order], column] = np.asarray(target, np.float64)[order] - min(low, 0)
    score[row[order], column] = np.asarray(prediction, np.float64)[order]
    both = known[:, :, None] & known[:, None]
    above = (score[:, :, None] > score[:, None]) & both  # (U, Q, Q): whether the first has the higher prediction
    equal = (score[:, :, None] == score[:, None]) & both
    found = {f"ndcg@{k}": ndcg(gain, above.sum(1), equal.sum(1), k) for k in CUTS}
    higher = (gain[:, :, None] > gain[:, None]) & both
    pairs = higher.sum((1, 2))
    right = (higher * (above + equal / 2)).sum((1, 2))
    return users, found | {"pairs": np.where(pairs > 0, right / np.maximum(pairs, 1), np.nan)}


def ndcg(gain, better, equal, k):
    """nDCG@k (U,) of gains (U, Q).

    `better` (U, Q) counts the items with a higher prediction than each, `equal` those with the same one, itself too.
    """
    n = gain.shape[1]
    discount = np.where(np.arange(n) < k, 1 / np.log2(2 + np.arange(n)), 0)
    total = np.append(0, np.cumsum(discount))
    mean_discount = (total[better + equal] - total[better]) / np.maximum(equal, 1)
    best = -np.sort(-gain, 1) @ discount
    return np.where(best > 0, (gain * mean_discount).sum(1) / np.where(best > 0, best, 1), 1.0)


def order_summary(figures):
    """Number of users and mean of each of `order_by_user`'s figures {name: (U,)} with its standard error by user."""
    known = {name: values[np.isfinite(values)] for name, values in figures.items()}
    means = {name: mean_with_error(values) if len(values) else (np.nan, np.nan) for name, values in known.items()}
    return {"users": len(next(iter(figures.values())))} | with_errors(means)


def ranking_summary(rank):
    """HR@10, nDCG@10 and MRR, with standard errors, of the targets' ranks (n,), from 1, among all items."""
    hit = rank <= 10
    shares = {"hr@10": hit.astype(float), "ndcg@10": np.where(hit, 1 / np.log2(1 + rank), 0), "mrr": 1 / rank}
    return {"users": len(rank)} | with_errors({name: mean_with_error(values) for name, values in shares.items()})


# -----------------------------------------------------------------------------
# paired comparisons


def compare_rmse(squared, other):
    """`Comparison` of two methods' RMSE from their squared errors (n,) on the same targets."""
    return comparison(*mean_with_error(rmse_shares(squared) - rmse_shares(other)))


def compare_means(values, other):
    """`Comparison` of two methods' means of what they reach (n,) on the same targets or users; nan is left out."""
    difference = values - other
    difference = difference[np.isfinite(difference)]
    return comparison(*(mean_with_error(difference) if len(difference) else (np.nan, np.nan)))


def compare_macro(squared, other, level):
    """`Comparison` of two methods' macro-RMSE on the same targets, paired within each rating level (n,)."""
    pairs = np.stack([squared, other], axis=1)
    return comparison(*stratified_mean(pairs, level, lambda pair: rmse_shares(pair[:, 0]) - rmse_shares(pair[:, 1])))


def comparison(difference, standard_error):
    """`Comparison` from a difference and its standard error; z is 0 where there is no difference at all."""
    with np.errstate(divide="ignore"):
        z = float(np.float64(difference) / standard_error) if difference else 0.0
    margin = NORMAL_95 * standard_error
    return Comparison(difference, standard_error, z, difference - margin, difference + margin)
