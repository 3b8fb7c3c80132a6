"""The figures of a comparison, made from the kept predictions alone.

A method's targets are those of the test users of its folds and seeds. Where a target was predicted with several
seeds, its errors are averaged over them first.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from evaluation import external, metrics, predictions
from ratings import table
from utils import UserError

PAIRS = (("melo", "maml"), ("melo", "metal"), ("maml", "fomaml"), ("maml", "basic"))
DAMPED = ("simple", "damped means", False)
UNTRAINED = ("simple", "external")  # in place of a learner's name
PLACE = ["fold", "seed", "user"]


class Results(NamedTuple):
    """What tables and pictures are made of."""

    last: pd.DataFrame  # a row for each prediction of a last rating, with its errors
    order: pd.DataFrame  # a row for each user and method, with the figures of `metrics.order_by_user`
    about: dict  # what is known of each cell's run


def load(paths, others=()):
    """The `Results` of the kept predictions {cell: path} and of other programs' predictions {name: path}."""
    frames = {cell: predictions.read(path) for cell, path in paths.items()}
    about = {cell: frame.attrs for cell, frame in frames.items()}
    known = next(iter(about.values()))
    if any(run[name] != known[name] for run in about.values() for name in ("fingerprint", "scale", "levels")):
        raise UserError("the kept predictions are of different data: give each data set an --output of its own")
    for cell, frame in frames.items():
        frame.attrs = {}
        frames[cell] = frame.assign(**cell._asdict() | {"method": frame.method, "init": cell.init or -1})
    rows = pd.concat(frames.values(), ignore_index=True)
    given = [external.read(name, path, rows) for name, path in dict(others).items()]
    rows = pd.concat([rows, *given], ignore_index=True)
    last = rows[rows.task == "last"]
    errors = metrics.prediction_errors(last.target, last.prediction, *known["scale"])
    level = table.nearest_level(last.target, np.array(known["levels"]))
    last = last.assign(squared=errors**2, absolute=abs(errors), level=level)
    return Results(last, order_of(rows[rows.task == "order"], known["scale"][0]), about)


def order_of(rows, low):
    """The figures of `metrics.order_by_user` for each user and method."""
    columns = ["learner", "method", "paper", "init", *PLACE]
    number = rows.groupby(columns, sort=False).ngroup().to_numpy()
    if len(rows) == 0:
        return pd.DataFrame(columns=[*columns, *metrics.ORDER])
    _, figures = metrics.order_by_user(number, rows.target, rows.prediction, low)
    return rows.groupby(columns, sort=False).head(1)[columns].assign(**figures)


def groups_of(cells, results):
    """The rows of the table, (learner, method, paper): simple predictors, others' predictions, trained methods."""
    found = []
    for kind in UNTRAINED:
        found += [(kind, name, False) for name in results.last[results.last.learner == kind].method.unique()]
    return [*found, *dict.fromkeys((c.learner, c.method, c.paper) for c in cells if c.learner != "simple")]


def select(rows, group):
    """The rows of one method."""
    learner, method, paper = group
    return rows[(rows.learner == learner) & (rows.method == method) & (rows.paper == paper)]


def at_full_support(rows):
    return rows[rows.shots == rows.shots.max()]


def per_target(rows, columns=("squared", "absolute", "level", "balance")):
    """Means over seeds of the columns for each target, by user."""
    return rows.groupby("user")[list(columns)].mean()


def summary(results, group):
    """All figures of a method at full support, with standard errors; None where there are no predictions."""
    targets = per_target(at_full_support(select(results.last, group)))
    if targets.empty:
        return None
    order = per_target(select(results.order, group), metrics.ORDER)
    order = {name: order[name].to_numpy(np.float64) for name in metrics.ORDER}
    squared, absolute, level, _ = (targets[name].to_numpy() for name in targets)
    return metrics.summary(squared, absolute, level) | metrics.order_summary(order)


# -----------------------------------------------------------------------------
# paired differences


def compared(figures):
    """The pairs of groups that are compared: each method with the one it extends, each learner's best with that of the
    order-blind learner, the best simple predictor, the damped means and other programs' predictions, and these with the
    simple predictors."""
    pairs, simple = [], best(figures, "simple", False)
    external = [group for group in figures if group[0] == "external"]
    for learner, paper in dict.fromkeys((group[0], group[2]) for group in figures if group[0] not in UNTRAINED):
        steps = [((learner, one, paper), (learner, other, paper)) for one, other in PAIRS]
        pairs += [pair for pair in steps if set(pair) <= set(figures)]
        others = [best(figures, "meanpool", paper)] * (learner != "meanpool") + [simple, DAMPED, *external]
        pairs += [(best(figures, learner, paper), other) for other in others]
    pairs += [(one, other) for one in external for other in (simple, DAMPED)]
    return [(one, other) for one, other in dict.fromkeys(pairs) if one and other in figures]


def best(figures, learner, paper):
    """The learner's method with the least RMSE on the test targets, or None."""
    mine = [g for g in figures if (g[0], g[2]) == (learner, paper) and figures[g]]
    return min(mine, key=lambda group: figures[group]["rmse"], default=None)


def compare(results, one, other):
    """`Comparison` of each figure, {name: ...}, on the targets that both methods predicted; empty without any."""
    first, second = (at_full_support(select(results.last, group)) for group in (one, other))
    both = first.merge(second[[*PLACE, "squared", "absolute"]], on=PLACE, suffixes=("", "_other"))
    if both.empty:
        return {}
    both = per_target(both, ("squared", "squared_other", "absolute", "absolute_other", "level"))
    squared, squared_other, absolute, absolute_other, level = (both[name].to_numpy() for name in both)
    found = {
        "rmse": metrics.compare_rmse(squared, squared_other),
        "mae": metrics.compare_means(absolute, absolute_other),
        "macro_rmse": metrics.compare_macro(squared, squared_other, level),
    }
    first, second = (select(results.order, group)[[*PLACE, *metrics.ORDER]] for group in (one, other))
    both = first.merge(second, on=PLACE, suffixes=("", "_other"))
    if both.empty:
        return found
    both = per_target(both, [name for name in both if name not in PLACE]).astype(np.float64)
    pairs = {name: (both[name].to_numpy(), both[f"{name}_other"].to_numpy()) for name in metrics.ORDER}
    return found | {name: metrics.compare_means(*pair) for name, pair in pairs.items()}
