"""Errors of rating predictions, with standard errors, on flat arrays: one entry for each target.

Errors are summed over all targets and divided once, never averaged by batch. Targets of several folds are
concatenated. Where a target was predicted with several seeds, average its errors over the seeds first:
repeated entries are not independent and would make the standard errors too small.
"""

from typing import NamedTuple

import numpy as np

from ratings import table
from utils import UserError

NORMAL_95 = 1.959964  # two-sided 95 % point of the normal distribution


class Comparison(NamedTuple):
    """A paired difference of two methods, first minus second: below zero means that the first is better."""

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
    spread = values.std(ddof=1) if len(values) > 1 else np.nan
    return float(values.mean()), float(spread / np.sqrt(len(values)))


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


def balance_group(score, n_groups=5):
    """The group 0..n_groups - 1 of each balance score, in bins of equal width over [0, 1]."""
    return np.minimum((np.asarray(score) * n_groups).astype(np.int64), n_groups - 1)


def score(target, prediction, low, high, levels):
    """`summary` of one method's predictions (n,) of the targets (n,) on the scale [low, high]."""
    errors = prediction_errors(target, prediction, low, high)
    return summary(errors**2, abs(errors), table.nearest_level(target, levels))


def summary(squared, absolute, level):
    """Number of targets, and RMSE, MAE and macro-RMSE with standard errors (`_se`), of errors (n,)."""
    figures = {"rmse": rmse(squared), "mae": mean_with_error(absolute), "macro_rmse": macro_rmse(squared, level)}
    result = {"n": len(squared)}
    for name, (value, error) in figures.items():
        result |= {name: value, f"{name}_se": error}
    return result


def text(value):
    """A figure with four decimals, or -- where there is none."""
    return "--" if value is None else f"{value:.4f}"


def compare(squared, other):
    """`Comparison` of two methods' squared errors (n,) on the same targets: their mean difference."""
    return comparison(*mean_with_error(squared - other))


def compare_macro(squared, other, level):
    """`Comparison` of two methods' macro-RMSE on the same targets, paired within each rating level (n,)."""

    def shares(pair):
        return rmse_shares(pair[:, 0]) - rmse_shares(pair[:, 1])

    return comparison(*stratified_mean(np.stack([squared, other], axis=1), level, shares))


def comparison(difference, standard_error):
    """`Comparison` from a difference and its standard error; z is 0 where there is no difference at all."""
    with np.errstate(divide="ignore"):
        z = float(np.float64(difference) / standard_error) if difference else 0.0
    margin = NORMAL_95 * standard_error
    return Comparison(difference, standard_error, z, difference - margin, difference + margin)
