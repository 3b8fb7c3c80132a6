"""A picture of what adapting does for one user: what each rating counted, and how predictions moved."""

import io
import warnings

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from options import LEARNERS
from utils import shorten

STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "melo"}
COLOURS = ("#0072B2", "#009E73", "#D55E00")  # of Okabe and Ito
WIDEST = 30  # characters of a title
WIDTH = 9  # inches; as wide as a README shows a picture, the text is 9 points high or more
AT_ONCE = 10_000  # items
MOST_LINES = 4  # of a group


def picture(recommender, titles, user, numbers, kind):
    """Bytes of the picture (png, svg or pdf) of a `User` with the items of these catalogue numbers.

    None: with items that show what adapting did.
    """
    if numbers is None:
        groups = telling_items(recommender, user.support, MOST_LINES)
    else:
        groups = {"given": numbers[: 3 * MOST_LINES]}
    found = recommender.explain(user.support, np.array([number for group in groups.values() for number in group]))
    groups = {what: [recommender.item_ids[number - 1] for number in group] for what, group in groups.items()}
    data = io.BytesIO()
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of letters that the font lacks
        run = f"{LEARNERS[recommender.options.model].title}, {recommender.options.mode}"
        figure = draw(found, groups, lambda item: titles.by_item.get(str(item), str(item)), run)
        figure.savefig(data, format=kind, dpi=130)
    return data.getvalue()


def telling_items(recommender, support, n):
    """{what they are: catalogue numbers} of the `n` items with the highest scores, and of those that rose or fell most.

    Rated items are left out. An item is in one group, the first that it belongs to.
    """
    rest = np.delete(np.arange(1, len(recommender.item_ids) + 1), support.items - 1)
    parts = np.array_split(rest, 1 + len(rest) // AT_ONCE)
    predictions = np.concatenate([recommender.explain(support, part).predictions for part in parts])
    rise, groups, seen = predictions[:, -1] - predictions[:, 0], {}, set()
    for what, score in (("best now", predictions[:, -1]), ("rose most", rise), ("fell most", -rise)):
        order = [place for place in np.argsort(-score, kind="stable").tolist() if place not in seen][:n]
        seen.update(order)
        groups[what] = rest[order].tolist()
    return groups


def draw(found, groups, name, run):
    """A figure of one user's `Explanation`, whose predictions are of the items of `groups`, {what they are: items}.

    `name(item)` is what an item is called, `run` what the run is.
    """
    items = [item for group in groups.values() for item in group]
    colours = [colour for colour, group in zip(COLOURS, groups.values(), strict=False) for _ in group]
    with matplotlib.rc_context(STYLE):
        height = max(3.8, 1.5 + 0.23 * max(len(found.items), len(items)))
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
        draw_weights(left, found, name)
        draw_moves(right, found.predictions, [shorten(name(item), WIDEST) for item in items], colours)
        for colour, what in zip(COLOURS, groups, strict=False):
            right.plot([], color=colour, marker="o", markersize=3, label=what)
        if len(groups) > 1:
            figure.legend(loc="outside lower right", ncols=3, frameon=False)
        count = f"{len(found.items)} rating" + "s" * (len(found.items) != 1)
        figure.suptitle(f"What adapting to {count} of a user does ({run})", fontsize=12)
    return figure


def draw_weights(axes, found, name):
    """A cell for each rating and inner step, coloured by the weight; 1 is white."""
    axes.set_title("Rating, and its weight in each step\n(1: as in the squared error)", fontsize=11, loc="right")
    weights = found.weights
    if not weights.size:
        axes.set_axis_off()
        return
    furthest = max(0.1, np.abs(weights - 1).max())
    axes.imshow(weights, aspect="auto", cmap="RdBu_r", norm=Normalize(1 - 1.2 * furthest, 1 + 1.2 * furthest))
    for row, column in np.ndindex(weights.shape):
        colour = "white" if abs(weights[row, column] - 1) > 0.75 * furthest else "#333333"
        axes.text(column, row, f"{weights[row, column]:.1f}", ha="center", va="center", fontsize=9, color=colour)
    axes.set_yticks(range(len(weights)), [f"{r:g}" for r in found.ratings], fontweight="bold")
    for row, item in enumerate(found.items):
        axes.annotate(
            shorten(name(item), WIDEST), (0, row), (-24, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="center", parse_math=False,
        )  # fmt: skip
    axes.set_xticks(range(weights.shape[1]), range(1, weights.shape[1] + 1))
    axes.set_xlabel("inner step")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_moves(axes, predictions, names, colours):
    """A line for each item's scores (n, K + 1), from the unadapted one on, with its name at the end."""
    axes.set_title("How predictions move", fontsize=11)
    last = predictions.shape[1] - 1
    low, high = predictions.min(), predictions.max()
    gap = 1.15 * max(high - low, 0.1) / max(11, len(names))
    heights = keep_apart(predictions[:, -1], gap)
    for line, label, height, colour in zip(predictions, names, heights, colours, strict=True):
        axes.plot(line, color=colour, linewidth=1.4, marker="o", markersize=3)
        axes.annotate(
            f"{line[-1]:.2f}  {label}", (last, line[-1]), (last * 1.09, height), color=colour, fontsize=9, va="center",
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 0},
        )  # fmt: skip
    axes.set_yticks([tick for tick in axes.get_yticks() if low - gap <= tick <= high + gap])
    axes.set_ylim(min(low, heights.min()) - gap, max(high, heights.max()) + gap)
    axes.set_xticks(range(last + 1), ["start", *range(1, last + 1)])
    axes.set(xlabel="inner steps", ylabel="predicted rating before clipping")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def keep_apart(values, gap):
    """Values (n,) moved as little as possible so that neighbours are at least `gap` apart, in the same order."""
    order = np.argsort(values, kind="stable")
    groups = []  # of neighbours that touch: [where the lowest stands, how many there are]
    for value in values[order]:
        groups.append([float(value), 1])
        while len(groups) > 1 and groups[-1][0] < groups[-2][0] + groups[-2][1] * gap:
            (low, below), (high, above) = groups[-2:]
            groups[-2:] = [[(below * low + above * (high - below * gap)) / (below + above), below + above]]
    out = np.empty(len(values))
    out[order] = np.concatenate([low + gap * np.arange(count) for low, count in groups])
    return out
