"""Pictures of a comparison, PNG and SVG, told apart by colour, marker and line: for print and colour-blind readers.

Methods that lie close together are drawn as paired differences from the damped means, which leaves out what makes some
users harder than others for all methods. Bands are 95 % intervals over test users.
"""

import io
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import utils
from evaluation import metrics, results
from evaluation.results import DAMPED, PLACE, at_full_support, per_target, select
from evaluation.tables import full_title, learner_name, title

# colours of Okabe and Ito, each for one series in all pictures
LOOK = {
    "Basic": {"color": "#E69F00", "marker": "s", "linestyle": "--"},
    "FO-MAML": {"color": "#56B4E9", "marker": "^", "linestyle": "-."},
    "MAML": {"color": "#009E73", "marker": "D", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    "MeTAL": {"color": "#0072B2", "marker": "v", "linestyle": (0, (3, 1, 1, 1))},
    "MELO": {"color": "#D55E00", "marker": "o", "linestyle": "-"},
    "matrix factorisation": {"color": "#000000", "marker": "x", "linestyle": ":"},
    "damped means": {"color": "#777777", "marker": "+", "linestyle": "--"},
    "item mean": {"color": "#CC79A7", "marker": "v", "linestyle": ":"},
    "balanced": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "imbalanced": {"color": "#A6A000", "marker": "s", "linestyle": "--"},
}
OTHERS = (  # other programs
    {"color": "#7B3FA0", "marker": "P", "linestyle": "-."},
    {"color": "#8B2500", "marker": "*", "linestyle": "--"},
    {"color": "#5F6B00", "marker": "<", "linestyle": ":"},
)
SIMPLE = ("item mean", "damped means", "matrix factorisation")  # of the first picture
STYLE = {"svg.hashsalt": "melo", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
WIDTH = 8.3  # inches; as wide as a README shows a picture, the text is 11 points high
NAMES = {"amazon": "Amazon", "yelp": "Yelp", "sample": "the bundled sample", "ml-latest": "MovieLens-latest"}


def draw_all(folder, cells, found):
    """Draw every picture of the `results.Results` into the folder."""
    groups = [group for group in results.groups_of(cells, found) if len(select(found.last, group))]
    known = next(iter(found.about.values()))
    levels, shots = np.array(known["levels"]), sorted(found.last.shots.unique())
    where = f"{name_of(found.about)}, {found.last.user.nunique():,} test users, the last rating of each"
    full = at_full_support(found.last)
    balance = np.minimum(5 * full.balance.to_numpy(), 4).astype(np.int64)  # five bins of equal width over [0, 1]
    panels = panels_of(groups)
    pictures = {
        "cold_start_learners": (found.last, found.last.shots.to_numpy(), shots, shots, "ratings known of the user"),
        "by_rating": (full, full.level.to_numpy(), range(len(levels)), [f"{v:g}" for v in levels], "rating to predict"),
        "by_balance": (full, balance, range(5), (".1", ".3", ".5", ".7", ".9"), "balance (0: ratings all alike)"),
    }
    with matplotlib.rc_context(STYLE):
        if DAMPED in groups:
            save(folder, "cold_start", draw_cold_start(found, groups, shots, where))
        if DAMPED in groups and panels:
            for name, (rows, part, parts, ticks, label) in pictures.items():
                save(folder, name, draw_panels(rows.assign(part=part), panels, parts, ticks, label, where))
        save(folder, "weights", draw_weights(found.about, levels, where))
        save(folder, "validation", draw_validation(found.about, name_of(found.about)))


def draw_train_users(folder, cells, found):
    """Draw the differences from the damped means by number of training users, {number: `results.Results`}."""
    first = next(iter(found.values()))
    groups = list(dict.fromkeys(group for each in found.values() for group in results.groups_of(cells, each)))
    rows = pd.concat([at_full_support(each.last).assign(part=number) for number, each in found.items()])
    where = f"{name_of(first.about)}, {first.last.user.nunique():,} test users, the last rating of each"
    parts, ticks = list(found), [f"{number:,}" for number in found]
    with matplotlib.rc_context(STYLE):
        figure = draw_panels(rows, panels_of(groups), parts, ticks, "users that trained", where)
        save(folder, "train_users", figure)


def name_of(about):
    """A data set's name for a title; own files have the end of their path."""
    mode = next(iter(about.values()))["mode"]
    if mode in ("csv", "parquet"):
        paths = [known["options"].get("data_path") for known in about.values()]
        return next(("/".join(Path(path).parts[-2:]) for path in paths if path), "own data")
    return NAMES.get(mode) or mode.upper().replace("ML-", "MovieLens-")


def panels_of(groups):
    """{learner's name: the groups that its panel shows}: the learner's methods and the matrix factorisation."""
    factors = [group for group in groups if group[1] == "matrix factorisation"]
    found = {}
    for group in groups:
        if group[0] not in results.UNTRAINED:
            found.setdefault(learner_name(group), []).append(group)
    return {name: [*methods, *factors] for name, methods in found.items()}


def draw_cold_start(found, groups, shots, where):
    """RMSE against the number of known ratings, and its difference from the damped means', beside what people use.

    Of several learners, the one with the lowest validation RMSE is shown; without MELO, another method.
    """

    def validated(group):
        curves = [known["curve"] for cell, known in found.about.items() if cell[:3] == group and known.get("curve")]
        return np.mean([min(rmse for _, rmse in curve) for curve in curves]) if curves else np.inf

    trained = [group for group in groups if group[0] not in results.UNTRAINED]
    usual = [("simple", name, False) for name in SIMPLE] + [group for group in groups if group[0] == "external"]
    shown = usual + sorted(trained, key=lambda group: (group[1] != "melo", validated(group)))[:1]
    figure, (left, right) = grid(["RMSE", "RMSE − damped means'"], "ratings known of the user", "", sharey=False)
    rows = found.last.assign(part=found.last.shots)
    for group in shown:
        mine = select(rows, group)
        means = [per_target(mine[mine.part == n]).squared.mean() for n in shots]  # nan: not predicted
        left.plot(np.sqrt(means), label=full_title(group), **style(group, shown))
    left.set_xticks(range(len(shots)), shots)
    compared = [group for group in shown if group[1] != "item mean"]
    draw_differences(right, rows, compared, shown[-1], shots, shots, full_title)
    add_legend(figure, [left, right])
    band = f"(lower is better; band: paired 95 % interval of {full_title(shown[-1])})"
    figure.suptitle(f"Error with few ratings: {where}\n{band}", fontsize=12)
    return figure


def style(group, shown):
    """How a method's line looks; other programs get the colours in OTHERS in their order."""
    others = [each for each in shown if each[0] == "external"]
    look = OTHERS[others.index(group) % len(OTHERS)] if group in others else LOOK[title(group)]
    return look | {"markersize": 5, "linewidth": 2.4 if title(group) == "MELO" else 1.5}


def draw_panels(rows, panels, parts, ticks, label, where):
    """A panel of differences for each learner of `panels_of`."""
    figure, axes = grid(panels, label, "RMSE − damped means'")
    for panel, groups in zip(axes, panels.values(), strict=True):
        last = [group for group in groups if group[0] != "simple"][-1]
        draw_differences(panel, rows, groups, last, parts, ticks)
    add_legend(figure, axes)
    note = f"(below zero: better than the damped means; band: paired 95 % interval of {title(last)})"
    figure.suptitle(f"{where[0].upper()}{where[1:]}\n{note}", fontsize=12)
    return figure


def draw_differences(panel, rows, groups, banded, parts, ticks, name=title):
    """Each method's RMSE minus that of the damped means in each of the `parts` of the rows; a band for one method."""
    damped = select(rows, DAMPED)
    panel.axhline(0, color=LOOK["damped means"]["color"], linewidth=1.2)
    for group in groups:
        found = [paired(select(rows, group), damped, part) for part in parts]
        middle, low, high = np.array([(c.difference, c.low, c.high) for c in found]).T
        look = style(group, groups)
        if group != DAMPED:
            panel.plot(middle, label=name(group), **look)
        if group == banded:
            panel.fill_between(range(len(parts)), low, high, color=look["color"], alpha=0.18, linewidth=0)
    panel.set_xticks(range(len(ticks)), ticks)


def paired(rows, damped, part):
    """`Comparison` of the RMSE of two methods on the targets of one part; nan where there are fewer than two."""
    place = [*PLACE, "shots"]
    other = damped[damped.part == part][[*place, "squared"]]
    both = rows[rows.part == part].merge(other, on=place, suffixes=("", "_other"))
    both = per_target(both, ("squared", "squared_other"))
    if len(both) < 2:
        return metrics.Comparison(*[np.nan] * 5)
    return metrics.compare_rmse(both.squared.to_numpy(), both.squared_other.to_numpy())


def draw_weights(about, levels, where):
    """The weight of each rating level in the learned loss, by balanced and imbalanced users; None without MELO."""
    found = {}
    for cell, known in about.items():
        if "weights" in known:
            found.setdefault(learner_name(cell[:3]), []).append(known["weights"])
    if not found:
        return None
    figure, axes = grid(found, "rating known of the user", "weight in the loss")
    for panel, runs_of_panel in zip(axes, found.values(), strict=True):
        for users in ("balanced", "imbalanced"):
            weights = np.array([run[users] for run in runs_of_panel], np.float64)
            known = np.isfinite(weights)
            mean = np.where(known, weights, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)
            panel.plot(mean, label=f"most {users}\nthird of users", markersize=5, **LOOK[users])
        panel.axhline(1, color="#999999", linewidth=0.8)
        panel.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
    add_legend(figure, axes)
    where = where.removesuffix(", the last rating of each") + "\n(1: as in the squared error; mean over runs)"
    figure.suptitle(f"What a rating counts when MELO adapts: {where}", fontsize=12)
    return figure


def draw_validation(about, where):
    """Validation RMSE against minutes of training: mean of a method's runs, and a band from the lowest to the highest
    of them; None where nothing was trained."""
    found = {}
    for cell, known in about.items():
        if len(known.get("curve", ())) > 1:
            found.setdefault(learner_name(cell[:3]), {}).setdefault(title(cell[:3]), []).append(known["curve"])
    if not found:
        return None
    figure, axes = grid(found, "minutes of training", "validation RMSE")
    for panel, methods in zip(axes, found.values(), strict=True):
        panel.xaxis.set_major_locator(MaxNLocator(5))
        for method, curves in methods.items():
            length = min(map(len, curves))
            seconds, rmse = np.moveaxis(np.array([curve[:length] for curve in curves]), -1, 0)
            minutes = seconds.mean(0) / 60
            panel.plot(minutes, rmse.mean(0), label=method, markersize=4, linewidth=1.4, **LOOK[method])
            if len(curves) > 1:
                band = {"color": LOOK[method]["color"], "alpha": 0.15, "linewidth": 0}
                panel.fill_between(minutes, rmse.min(0), rmse.max(0), **band)
    add_legend(figure, axes)
    runs = max(len(curves) for methods in found.values() for curves in methods.values())
    band = f"\n(mean and range of {runs} folds or seeds)" if runs > 1 else ""
    figure.suptitle(f"Error on validation users while training: {where}{band}", fontsize=12)
    return figure


def grid(names, x_label, y_label, sharey=True):
    """A figure with a panel for each name, in two columns or three: (figure, axes)."""
    columns = len(names) if len(names) < 4 else 2 if len(names) == 4 else 3
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(WIDTH, 2.9 * lines + 1.6), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=sharey).ravel()
    for i, (name, panel) in enumerate(zip(names, axes, strict=False)):
        panel.set_title(name, fontsize=11)
        panel.set_xlabel(x_label if i + columns >= len(names) else "")
        panel.set_ylabel(y_label if i % columns == 0 else "")
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    for panel in axes[len(names) :]:
        panel.set_axis_off()
    return figure, axes[: len(names)]


def add_legend(figure, axes):
    """One legend for all panels, in a place of the grid that is left or below them."""
    lines, left = {}, figure.axes[len(axes) :]
    for panel in axes:
        for line, label in zip(*panel.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, line)
    place = {"loc": "center"} if left else {"loc": "outside lower center", "ncols": min(len(lines), 3)}
    (left[0] if left else figure).legend(lines.values(), lines.keys(), frameon=False, handlelength=3.2, **place)


def save(folder, name, figure):
    """Write a picture in both formats; nothing for None. The same figures give the same bytes."""
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        if figure is not None:
            data = io.BytesIO()
            figure.savefig(data, format=kind, dpi=200, metadata=metadata, bbox_inches="tight")
            utils.write_atomic(folder / f"{name}.{kind}", data.getvalue())
