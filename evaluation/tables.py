"""Tables of a comparison, made from the kept predictions alone.

A row's targets are the last ratings of the test users of its folds and seeds. Where a target was predicted with
several seeds, its errors are averaged over them first.
"""

import csv
import io
import textwrap

import numpy as np
import pandas as pd

import utils
from evaluation import metrics
from ratings import table
from utils import UserError

LEARNERS = {"simple": "simple", "bert4rec": "BERT4Rec", "narm": "NARM", "sasrec": "SASRec", "gru4rec": "GRU4Rec"}
METHODS = {"basic": "Basic", "fomaml": "FO-MAML", "maml": "MAML", "melo": "MELO"}
PAIRS = (("melo", "maml"), ("maml", "fomaml"), ("maml", "basic"))
DAMPED = ("simple", "user + item effects", False)
KEY = ["fold", "seed", "user"]
FIGURES = ("rmse", "mae", "macro_rmse")


def write(folder, cells, rows, about):
    """Write the tables of the cells from what `load` gave; what a terminal shows of them, 80 columns wide.

    A cell without a file was not run.
    """
    groups = groups_of(cells, rows)
    figures = {group: summary(rows, group) for group in groups}
    differences = all_differences(rows, figures)
    text = [f"# {next(iter(about.values()))['mode']}", "", markdown(*figure_table(figures)), ""]
    text += ["Differences of two methods on the same targets; below zero, the first is better.", ""]
    text += [markdown(*difference_table(differences)), "", *notes(rows, about, cells), ""]
    utils.write_atomic(folder / "table.md", "\n".join(text).encode())
    utils.write_atomic(folder / "table.csv", as_csv(*figure_csv(figures)))
    utils.write_atomic(folder / "differences.csv", as_csv(*difference_csv(differences)))
    return for_terminal(figures, differences, notes(rows, about, cells))


# -----------------------------------------------------------------------------
# errors of every prediction


def load(paths):
    """The kept predictions {cell: path}, with errors, and what is known of each run: (table, {cell: ...})."""
    if not paths:
        raise UserError("there are no predictions to make a table of: run the same command without --report_only")
    frames = {cell: pd.read_parquet(path) for cell, path in paths.items()}
    about = {cell: frame.attrs for cell, frame in frames.items()}
    if len({known["fingerprint"] for known in about.values()}) > 1:
        raise UserError("the kept predictions are of different data: give each data set an --output of its own")
    for frame in frames.values():
        frame.attrs = {}
    rows = pd.concat(frames.values(), ignore_index=True)
    known = next(iter(about.values()))
    errors = metrics.prediction_errors(rows.target, rows.prediction, *known["scale"])
    level = table.nearest_level(rows.target, np.array(known["levels"]))
    return rows.assign(squared=errors**2, absolute=abs(errors), level=level), about


def groups_of(cells, rows):
    """The rows of the table, (learner, method, paper): the simple predictors, then the cells', in their order."""
    simple = rows[rows.learner == "simple"].method.unique()
    trained = dict.fromkeys((c.learner, c.method, c.paper) for c in cells if c.learner != "simple")
    return [*(("simple", name, False) for name in simple), *trained]


def select(rows, group):
    """The predictions of one row of the table."""
    learner, method, paper = group
    return rows[(rows.learner == learner) & (rows.method == method) & (rows.paper == paper)]


def at_full_support(rows):
    return rows[rows.shots == rows.shots.max()]


def per_target(rows, columns=("squared", "absolute", "level", "balance")):
    """Means over seeds of the columns for each target, by user."""
    return rows.groupby("user")[list(columns)].mean()


def summary(rows, group):
    """`metrics.summary` at full support; None where there are no predictions."""
    targets = per_target(at_full_support(select(rows, group)))
    if targets.empty:
        return None
    return metrics.summary(targets.squared.to_numpy(), targets.absolute.to_numpy(), targets.level.to_numpy())


# -----------------------------------------------------------------------------
# paired differences


def all_differences(rows, figures):
    """(learner's name, what is compared, comparison of squared errors, of macro-RMSE) of each pair; None: not run."""
    found, simple = [], best(figures, "simple", False)
    for learner, paper in dict.fromkeys((learner, paper) for learner, _, paper in figures if learner != "simple"):
        pairs = [((learner, one, paper), (learner, other, paper)) for one, other in PAIRS]
        pairs = [pair for pair in pairs if set(pair) <= set(figures)]
        if ours := best(figures, learner, paper):
            pairs += [(ours, other) for other in dict.fromkeys((simple, DAMPED)) if figures.get(other)]
        for one, other in pairs:
            names = f"{METHODS[one[1]]} − {METHODS.get(other[1], other[1])}"
            found.append((learner_name(learner, paper), names, *compare(rows, one, other)))
    return found


def best(figures, learner, paper):
    """The learner's row with the least RMSE on the test targets, or None."""
    mine = [g for g in figures if (g[0], g[2]) == (learner, paper) and figures[g]]
    return min(mine, key=lambda group: figures[group]["rmse"], default=None)


def compare(rows, one, other):
    """Paired comparison of squared errors, and of macro-RMSE, on the targets that both predicted; or (None, None)."""
    first, second = (at_full_support(select(rows, group)) for group in (one, other))
    both = first.merge(second[[*KEY, "squared"]], on=KEY, suffixes=("", "_other"))
    if both.empty:
        return None, None
    both = per_target(both, ("squared", "squared_other", "level"))
    squared, other, level = (both[name].to_numpy() for name in both)
    return metrics.compare(squared, other), metrics.compare_macro(squared, other, level)


# -----------------------------------------------------------------------------
# as text


def learner_name(learner, paper):
    return f"{LEARNERS[learner]}, as published" if paper else LEARNERS[learner]


def figure_table(figures):
    """Header and rows of the table of errors, as text."""
    header = ["learner", "method", "RMSE", "MAE", "macro-RMSE", "targets"]
    rows = []
    for (learner, method, paper), report in figures.items():
        values = [f"{report[n]:.4f} ({report[f'{n}_se']:.4f})" if report else "--" for n in FIGURES]
        targets = str(report["n"]) if report else "--"
        rows.append([learner_name(learner, paper), METHODS.get(method, method), *values, targets])
    return header, rows


def figure_csv(figures):
    names = [name for figure in FIGURES for name in (figure, f"{figure}_se")]
    rows = [[*group, *([report[n] for n in (*names, "n")] if report else [])] for group, report in figures.items()]
    return ["learner", "method", "paper_form", *names, "targets"], rows


def difference_table(differences):
    """Header and rows of the table of differences, as text."""
    header = ["learner", "difference"]
    header += ["squared error", "z", "95 % interval", "macro-RMSE", "z", "95 % interval"]
    return header, [[name, what, *shown(squared), *shown(macro)] for name, what, squared, macro in differences]


def shown(found):
    if found is None:
        return ["--"] * 3
    return [f"{found.difference:+.4f}", f"{found.z:+.1f}", f"{found.low:+.4f} to {found.high:+.4f}"]


def difference_csv(differences):
    kinds = ("squared_error", "macro_rmse")
    names = [f"{kind}_{field}" for kind in kinds for field in metrics.Comparison._fields]
    blank = ("",) * len(metrics.Comparison._fields)
    return ["learner", "difference", *names], [[a, b, *(c or blank), *(d or blank)] for a, b, c, d in differences]


def as_csv(header, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode()


def markdown(header, rows):
    """A Markdown table with columns as wide as their longest entry."""
    width = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * w for w in width], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, width)) + " |" for line in lines)


def for_terminal(figures, differences, lines):
    """The same tables for a terminal: without targets and intervals, and the notes folded."""
    header, rows = figure_table(figures)
    rows = [[f"{row[0]} {row[1]}".removeprefix("simple "), *row[2:5]] for row in rows]
    parts = [aligned([["", *header[2:5]], *rows])]
    if differences:
        header, rows = difference_table(differences)
        rows = [[f"{row[0]}: {row[1]}", *row[2:4], *row[5:7]] for row in rows]
        parts.append(aligned([["below zero, the first is better", *header[2:4], *header[5:7]], *rows]))
    return "\n\n".join([*parts, *(textwrap.fill(line, 80) for line in lines if line)]) + "\n"


def aligned(rows):
    """Rows of text as lines, the first column to the left, the others to the right."""
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [[row[0].ljust(width[0]), *map(str.rjust, row[1:], width[1:])] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def notes(rows, about, cells):
    """What is known of the noise, and where the numbers come from."""
    folds, seeds = (sorted({getattr(cell, name) for cell in cells}) for name in ("fold", "seed"))
    known = list(about.values())
    trained = [entry["curve"][-1][0] for entry in known if entry.get("curve")]
    of_folds = "drawn at random" if folds == [-1] else f"fold {listed(folds)} of {known[0]['num_folds']}"
    noise = "not in them" if len(seeds) == 1 else "in them only as far as errors are averaged over the seeds"
    lines = [
        f"{rows.user.nunique()} targets, the last ratings of test users ({of_folds}); seed {listed(seeds)}. Standard "
        f"errors (in brackets) and intervals are those of drawing targets; how far two trainings differ is {noise}. "
        "The best of a learner and the best simple predictor are chosen on these targets.",
        f"Commit {listed_of(known, 'commit')}; torch {listed_of(known, 'torch')}; {listed_of(known, 'hardware')}; "
        f"{sum(trained) / 60:.1f} minutes of training in {len(trained)} runs.",
    ]
    simple = at_full_support(rows[rows.learner == "simple"]).set_index(KEY)
    ours, theirs = (simple.prediction[simple.method == name] for name in ("user + item effects", "LensKit bias"))
    if len(theirs):
        lines.append(f"Our damped effects and LensKit's bias model differ by at most {abs(ours - theirs).max():.1g}.")
    if missing := len(cells) - len(about):
        lines.append(f"{missing} of {len(cells)} runs are missing: -- where nothing was run.")
    return "\n\n".join(lines).split("\n")


def listed(values):
    return ", ".join(map(str, values))


def listed_of(known, name):
    return listed(sorted({entry[name] for entry in known}))
