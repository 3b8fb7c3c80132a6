"""Tables of a comparison: Markdown and CSV files, and what a terminal shows of them."""

import textwrap

import numpy as np
import pandas as pd

import utils
from evaluation import metrics, results
from evaluation.results import UNTRAINED
from options import LEARNERS

METHODS = {"basic": "Basic", "fomaml": "FO-MAML", "maml": "MAML", "metal": "MeTAL", "melo": "MELO"}
FORMS = {False: "", True: ", as published", "code": ", authors' code"}  # behind a learner's name, by --paper_form
ERRORS = ("rmse", "mae", "macro_rmse")
TITLES = {"rmse": "RMSE", "mae": "MAE", "macro_rmse": "macro-RMSE", "pairs": "pairs in order"}
TITLES |= {f"ndcg@{k}": f"nDCG@{k}" for k in metrics.CUTS}
ROWS = {
    "global mean": "every prediction is the mean of all ratings",
    "user mean": "the mean of the user's own ratings",
    "item mean": "the item's mean rating",
    "damped means": "the item's mean, and how far the user usually is above or below",
    "matrix factorisation": "item factors, and the user's fitted to the ratings",
    "Basic": "the sequence model alone, not adapted to the user",
    "FO-MAML": "adapted to each user by gradient steps; trained to first order",
    "MAML": "adapted to each user by gradient steps that were trained for it",
    "MeTAL": "MAML with a loss that a network adds to the squared error",
    "MELO": "MAML with a loss that a network weights for each user",
}
ABOUT = (
    "RMSE (with its standard error), MAE and macro-RMSE (each rating value counts alike) are errors of predicting the "
    "last rating of each of {users} test users, on a scale from {low:g} to {high:g}. Lower is better; * is the lowest "
    "RMSE. nDCG@10 and pairs (the share of pairs in the right order) tell how well their last ten ratings are ordered. "
    "Higher is better."
)
ABOUT_Z = "z is a difference over its standard error. Beyond 2 in size, chance is an unlikely cause."


def write(folder, cells, found):
    """Write table.md, table.csv and differences.csv; what a terminal shows of them, 80 columns wide.

    A cell without predictions was not run.
    """
    figures = {group: results.summary(found, group) for group in results.groups_of(cells, found)}
    differences = [(one, other, results.compare(found, one, other)) for one, other in results.compared(figures)]
    lines = notes(found, cells)
    parts = [f"# {next(iter(found.about.values()))['mode']}", markdown(*figure_table(figures, ERRORS, "n"))]
    if len(inits_of(found)) > 1:
        parts += ["RMSE of each training, by --model_init_seed.", markdown(*training_table(found, figures))]
    parts.append("The order of each user's last ten ratings; higher is better.")
    parts.append(markdown(*figure_table(figures, metrics.ORDER, "users")))
    parts.append("Paired differences on the same targets. An error below 0, an order above 0: the first is better.")
    parts += [markdown(*difference_table(differences)), *lines]
    utils.write_atomic(folder / "table.md", ("\n\n".join(parts) + "\n").encode())
    rows = [dict(zip(("learner", "method", "paper_form"), g, strict=True)) | (r or {}) for g, r in figures.items()]
    utils.write_atomic(folder / "table.csv", as_csv(rows))
    utils.write_atomic(folder / "differences.csv", as_csv(difference_rows(differences)))
    return for_terminal(found, figures, differences, lines)


def learner_name(group):
    """What a row or a panel calls the learner of (learner, method, paper)."""
    learner, _, paper = group
    name = learner if learner in UNTRAINED else LEARNERS[learner].title
    return name + FORMS[paper]


def title(group):
    """A method's name, without its learner's."""
    return METHODS.get(group[1], group[1])


def full_title(group):
    """The names of learner and method."""
    return title(group) if group[0] in UNTRAINED else f"{learner_name(group)} {title(group)}"


def title_beside(one, other):
    """What `other` is called where it is compared with `one`: a learner is named where it is another."""
    return title(other) if one[0] == other[0] else full_title(other)


def with_error(report, name):
    """A figure with its standard error in brackets, where there is one."""
    if report is None or np.isnan(report[name]):
        return "--"
    error = report[f"{name}_se"]
    return metrics.text(report[name]) + ("" if np.isnan(error) else f" ({error:.4f})")


def figure_table(figures, names, count):
    """Header and rows of a table of the figures called `names`, as text, with the number `count` at the end."""
    header = ["learner", "method", *(TITLES[name] for name in names), {"n": "targets"}.get(count, count)]
    rows = []
    for group, report in figures.items():
        values = [with_error(report, name) for name in names]
        rows.append([learner_name(group), title(group), *values, str(report[count]) if report else "--"])
    return header, rows


def training_table(found, figures):
    """Header and rows of a table of the RMSE of each method's trainings, as text."""
    inits, rows = inits_of(found), []
    for group in figures:
        mine = results.at_full_support(results.select(found.last, group))
        if group[0] not in UNTRAINED:
            each = [np.sqrt(mine.squared[mine.init == init].mean()) for init in inits]
            rows.append([learner_name(group), title(group), *map(metrics.text, each)])
    return ["learner", "method", *map(str, inits)], rows


def inits_of(found):
    """The values of --model_init_seed of the runs, where they were given."""
    return sorted(set(found.last.init[found.last.init >= 0]))


def difference_table(differences):
    """Header and rows of the table of differences, as text."""
    shown = ("rmse", "macro_rmse", "ndcg@10", "pairs")
    header = ["learner", "difference", "RMSE", "95 % interval", "z"]
    header += [text for name in shown[1:] for text in (TITLES[name], "z")]
    rows = []
    for one, other, comparisons in differences:
        values = []
        for name in shown:
            c = comparisons.get(name)
            interval = [f"{c.low:+.4f} to {c.high:+.4f}" if c else "--"] if name == "rmse" else []
            values += [f"{c.difference:+.4f}" if c else "--", *interval, f"{c.z:+.1f}" if c else "--"]
        rows.append([learner_name(one), f"{title(one)} − {title_beside(one, other)}", *values])
    return header, rows


def difference_rows(differences):
    """The rows of differences.csv."""
    rows = []
    for one, other, comparisons in differences:
        values = {f"{name}_{field}": v for name, c in comparisons.items() for field, v in c._asdict().items()}
        difference = f"{title(one)} − {title_beside(one, other)}"
        rows.append({"learner": learner_name(one), "difference": difference, **values})
    return rows


def as_csv(rows):
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n").encode()


def markdown(header, rows):
    """A Markdown table with columns as wide as their longest entry."""
    width = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * w for w in width], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, width)) + " |" for line in lines)


def notes(found, cells):
    """How sure the figures are, and where they come from."""
    folds, seeds = (sorted({getattr(cell, name) for cell in cells}) for name in ("fold", "seed"))
    known = list(found.about.values())
    trained = [entry["curve"][-1][0] for entry in known if entry.get("curve")]
    of_folds = "drawn at random" if folds == [-1] else f"fold {listed(folds)} of {known[0]['num_folds']}"
    repeated = len(seeds) > 1 or len(inits_of(found)) > 1
    noise = "is not in them" if not repeated else "is in them as far as errors are averaged over trainings"
    trained_on = next((entry["options"].get("num_train_users") for entry in known), 0)
    few = f" Trained on {trained_on:,} users." if trained_on else ""
    lines = [
        f"{found.last.user.nunique()} targets, the last ratings of test users ({of_folds}); seed {listed(seeds)}. "
        "Standard errors (in brackets) and intervals are those of drawing other test users; how much two trainings "
        f"differ {noise}. The best of a learner and the best simple predictor are chosen on these targets.{few}",
        f"Commit {listed_of(known, 'commit')}; torch {listed_of(known, 'torch')}; {listed_of(known, 'hardware')}; "
        f"{sum(trained) / 60:.1f} minutes of training in {len(trained)} runs.",
    ]
    if missing := len(cells) - len(found.about):
        lines.append(f"{missing} of {len(cells)} runs are missing: -- where nothing was run.")
    return lines


def listed(values):
    return ", ".join(map(str, values))


def listed_of(known, name):
    return listed(sorted({entry[name] for entry in known}))


# -----------------------------------------------------------------------------
# for a terminal


def for_terminal(found, figures, differences, lines):
    """The figures, what the rows are, the differences in words, and notes, 80 columns wide."""
    low, high = next(iter(found.about.values()))["scale"]
    about = ABOUT.format(users=found.last.user.nunique(), low=low, high=high)
    shown = [title(group) for group in figures]
    rows = [f"  {name}: {text}" for name, text in ROWS.items() if name in shown]
    words = [textwrap.fill(in_words(*difference), 80) for difference in differences if difference[2]]
    parts = [metrics.aligned(terminal_rows(figures)), textwrap.fill(about, 80), "\n".join(rows)]
    parts += ["\n".join([*words, textwrap.fill(ABOUT_Z, 80)])] if words else []
    return "\n\n".join([*parts, *(textwrap.fill(line, 80) for line in lines)]) + "\n"


def terminal_rows(figures):
    """Header and rows of the table, the row with the lowest RMSE marked."""
    least = min((report["rmse"] for report in figures.values() if report), default=None)
    names = ("rmse", "rmse_se", "mae", "macro_rmse", "ndcg@10", "pairs")
    rows = [["", "RMSE", "+-", "MAE", "macro", "nDCG@10", "pairs"]]
    for group, report in figures.items():
        mark = "* " if report and report["rmse"] == least else "  "
        rows.append([mark + full_title(group), *(metrics.text(report and report[name]) for name in names)])
    return rows


def in_words(one, other, comparisons):
    """What the difference of two methods means, in a sentence."""
    c, name, against = comparisons["rmse"], full_title(one), title_beside(one, other)
    if not abs(c.z) >= 1.96:
        return f"{name} and {against} cannot be told apart: RMSE differs by {c.difference:+.4f} (z={c.z:+.1f})."
    better, lower = ("better", "lower") if c.difference < 0 else ("worse", "higher")
    return f"{name} is {better} than {against}: RMSE is {abs(c.difference):.4f} {lower} (z={c.z:+.1f})."
