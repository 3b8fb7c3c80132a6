"""Pictures of a comparison, PNG and SVG, told apart by colour, marker and line: for print and colour-blind readers.

Each picture has a panel for each learner. Where a target was predicted with several seeds, errors are averaged first.
"""

import io

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import utils
from evaluation import metrics
from evaluation.tables import METHODS, at_full_support, groups_of, learner_name, per_target, select

# colours of Okabe and Ito
LOOK = {
    "basic": {"color": "#E69F00", "marker": "s", "linestyle": "--"},
    "fomaml": {"color": "#56B4E9", "marker": "^", "linestyle": "-."},
    "maml": {"color": "#009E73", "marker": "D", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    "melo": {"color": "#D55E00", "marker": "o", "linestyle": "-"},
}
SIMPLE_LOOK = (
    {"color": "#000000", "marker": "x", "linestyle": ":"},
    {"color": "#777777", "marker": "+", "linestyle": ":"},
)
USERS_LOOK = {
    "balanced": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "imbalanced": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
}
STYLE = {"svg.hashsalt": "melo", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
PANELS_A_ROW = 3


def draw_all(folder, cells, rows, about):
    """Draw every picture of the cells' predictions `rows`, and of what is known of their runs, into the folder."""
    groups = groups_of(cells, rows)
    levels = np.array(next(iter(about.values()))["levels"])
    shots = sorted(rows.shots.unique())

    def by_support(group):
        mine = select(rows, group)
        targets = (per_target(mine[mine.shots == n], ["squared"]).squared for n in shots)
        return np.array([metrics.rmse(t) for t in targets]).T

    def by_level(group):
        targets = per_target(at_full_support(select(rows, group)))
        return metrics.rmse_by_group(targets.squared, targets.level, len(levels))[:2]

    def by_balance(group):
        targets = per_target(at_full_support(select(rows, group)))
        return metrics.rmse_by_group(targets.squared, metrics.balance_group(targets.balance), 5)[:2]

    bins = [f"{i / 5:g}–{(i + 1) / 5:g}" for i in range(5)]
    compared = panels(rows, groups)
    pictures = {
        "cold_start": (shots, by_support, "support ratings (at most)"),
        "by_rating": ([f"{level:g}" for level in levels], by_level, "rating of the target"),
        "by_balance": (bins, by_balance, "balance of the user's ratings (0: all alike)"),
    }
    with matplotlib.rc_context(STYLE):
        for name, (ticks, values, label) in pictures.items():
            curves = {panel: [(*line[:2], *values(line[2])) for line in lines] for panel, lines in compared.items()}
            save(folder, name, draw_categories(curves, ticks, label, "RMSE"))
        save(folder, "weights", draw_weights(about, levels))
        save(folder, "validation", draw_validation(about))


def panels(rows, groups):
    """{learner's name: [(label, look, group), ...]}: its methods, and the two best simple predictors."""
    groups = [group for group in groups if len(select(rows, group))]
    simple = [g for g in groups if g[0] == "simple" and select(rows, g).shots.nunique() == rows.shots.nunique()]
    simple.sort(key=lambda group: at_full_support(select(rows, group)).squared.mean())
    shown = [(group[1], look, group) for group, look in zip(simple, SIMPLE_LOOK, strict=False)]
    found = {}
    for learner, method, paper in groups:
        if learner != "simple":
            line = METHODS[method], LOOK[method], (learner, method, paper)
            found.setdefault(learner_name(learner, paper), []).append(line)
    return {name: lines + shown for name, lines in found.items()} or {"": shown}


def save(folder, name, figure):
    """Write a picture in both formats; nothing for None. The same figures give the same bytes."""
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        if figure is not None:
            data = io.BytesIO()
            figure.savefig(data, format=kind, dpi=200, metadata=metadata, bbox_inches="tight")
            utils.write_atomic(folder / f"{name}.{kind}", data.getvalue())


def grid(names, x_label, y_label):
    """A figure with a panel for each name: (figure, axes)."""
    columns = min(PANELS_A_ROW, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(max(3.1 * columns, 4.5), 2.6 * lines + 0.7), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for i, (name, panel) in enumerate(zip(names, axes, strict=False)):
        panel.set_title(name, fontsize=10)
        panel.set_xlabel(x_label if i + columns >= len(names) else "")
        panel.set_ylabel(y_label if i % columns == 0 else "")
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    for panel in axes[len(names) :]:
        panel.remove()
    return figure, axes[: len(names)]


def add_legend(figure, axes):
    """One legend for all panels, below them."""
    lines = {}
    for panel in axes:
        for line, label in zip(*panel.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, line)
    columns = min(len(lines), 2 if figure.get_figwidth() < 6 else 3)
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=columns, frameon=False, handlelength=3.2
    )


def draw_categories(curves, ticks, x_label, y_label):
    """{panel: [(label, look, values, standard errors), ...]} over equally spaced ticks; bars of one standard error."""
    figure, axes = grid(curves, x_label, y_label)
    places = np.arange(len(ticks))
    for panel, lines in zip(axes, curves.values(), strict=True):
        for i, (label, look, values, errors) in enumerate(lines):
            shift = 0.06 * (i - (len(lines) - 1) / 2)
            panel.errorbar(
                places + shift, values, errors, label=label, **look, markersize=4, linewidth=1.2, elinewidth=0.6
            )
        panel.set_xticks(places, ticks)
    add_legend(figure, axes)
    return figure


def draw_weights(about, levels):
    """The weight of each rating level in the learned loss, by balanced and imbalanced users; None without MELO."""
    found = {}
    for cell, known in about.items():
        if "weights" in known:
            found.setdefault(learner_name(cell.learner, cell.paper), []).append(known["weights"])
    if not found:
        return None
    figure, axes = grid(found, "rating in the support", "weight in the loss")
    for panel, runs_of_panel in zip(axes, found.values(), strict=True):
        for users, look in USERS_LOOK.items():
            weights = np.array([run[users] for run in runs_of_panel], np.float64)
            known = np.isfinite(weights)
            mean = np.where(known, weights, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)
            panel.plot(mean, label=f"{users} users (a third of all)", **look, markersize=4)
        panel.axhline(1, color="#999999", linewidth=0.6)
        panel.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
    add_legend(figure, axes)
    return figure


def draw_validation(about):
    """Validation RMSE against minutes of training, one line for each run; None where nothing was trained."""
    found = {}
    for cell, known in about.items():
        if len(known.get("curve", ())) > 1:
            found.setdefault(learner_name(cell.learner, cell.paper), []).append((cell.method, known["curve"]))
    if not found:
        return None
    figure, axes = grid(found, "minutes of training", "validation RMSE")
    for panel, lines in zip(axes, found.values(), strict=True):
        panel.xaxis.set_major_locator(MaxNLocator(5))
        for method, curve in lines:
            seconds, rmse = np.array(curve).T
            panel.plot(seconds / 60, rmse, label=METHODS[method], **LOOK[method], markersize=3, linewidth=1)
    add_legend(figure, axes)
    return figure
