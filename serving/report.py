"""Predictions as tables, and where they are written: CSV, JSON, Parquet, a table for people, files, pipes, devices."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import utils
from utils import printable, say, shorten

DIGITS = 4  # decimals of ratings and weights
WIDEST_TITLE, NARROWEST_TITLE = 40, 16  # characters in a table
STANDARD_OUTPUT = "-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"


# -----------------------------------------------------------------------------
# tables


def tabulate(recommender, titles, rows):
    """Rows (user, rank or None, item, catalogue number, score or nan) as a DataFrame; ids are text."""
    columns = {name: [] for name in ("user", "rank", "item", "title", "rating", "score", "adapted", "note")}
    for user, rank, item, number, score in rows:
        rating = round(float(recommender.cut(score)), DIGITS)
        note = user.note if number else "not predicted: training did not see the item"
        known = str(recommender.item_ids[number - 1]) if number else item
        values = user.id, rank, known, titles.by_item.get(known, ""), rating, round(score, DIGITS)
        for column, value in zip(columns.values(), (*values, len(user.support.items) > 0, note), strict=True):
            column.append(value)
    used = {"rank": any(columns["rank"]), "title": bool(titles.by_item)}
    return pd.DataFrame({name: values for name, values in columns.items() if used.get(name, True)})


def explain(recommender, titles, rows, frame):
    """(`frame` with the score after each number of inner steps, weights of the users' ratings)."""
    moves, weights = np.full((len(rows), recommender.options.num_inner_steps + 1), np.nan), []
    by_user = {}
    for place, (user, _, _, number, _) in enumerate(rows):
        places = by_user.setdefault(user.id, (user, []))[1]
        places += [place] * (number > 0)
    for user, places in by_user.values():
        found = recommender.explain(user.support, np.array([rows[place][3] for place in places], np.int64))
        moves[places] = found.predictions
        for item, rating, weight in zip(found.items, found.ratings, found.weights, strict=True):
            named = {"title": titles.by_item.get(str(item), "")} if titles.by_item else {}
            steps = {f"weight_{step}": value for step, value in enumerate(weight.round(DIGITS).tolist(), 1)}
            weights.append({"user": user.id, "item": str(item), **named, "rating": round(rating, DIGITS), **steps})
    after = pd.DataFrame(moves.round(DIGITS), columns=[f"after_{step}" for step in range(moves.shape[1])])
    return pd.concat([frame, after], axis=1), pd.DataFrame(weights, columns=None if weights else ["user", "item"])


def for_people(frame, weights=None):
    """Predictions as lines of aligned columns, and below them what `explain` gave."""
    steps = [name for name in frame.columns if name.startswith("after_")]
    dull = [name for name, usual in (("adapted", True), ("note", "")) if (frame[name] == usual).all()]
    text = as_table(frame.drop(columns=steps + dull))
    if weights is None:
        return text
    item = [name for name in ("user", "item", "title") if name in frame.columns]
    moves = frame[item + steps].rename(columns=lambda name: name.removeprefix("after_"))
    weights = weights.rename(columns=lambda name: name.removeprefix("weight_"))
    return (
        f"{text}\nscores before adapting (0) and after each inner step\n{as_table(moves)}\n"
        f"weight of each rating in each inner step; 1: its weight in the squared error\n{as_table(weights)}"
    )


def as_table(frame):
    """A DataFrame as lines of aligned columns, numbers to the right; titles are cut to the terminal's width."""
    columns, room = {}, shutil.get_terminal_size((80, 24)).columns
    for name in frame.columns:
        values = frame[name].tolist()
        number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        cells = [str(name), *map(as_cell, values)]
        width = max(map(len, cells))
        room -= width + 2
        columns[name] = [cell.rjust(width) if number else cell.ljust(width) for cell in cells]
    if "title" in columns and room < -2:
        width = max(NARROWEST_TITLE, len(columns["title"][0]) + room + 2)
        columns["title"] = [shorten(cell.rstrip(), width).ljust(width) for cell in columns["title"]]
    return "".join("  ".join(row).rstrip() + "\n" for row in zip(*columns.values(), strict=True))


def as_cell(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "--" if np.isnan(value) else f"{value:.2f}"
    return shorten(value, WIDEST_TITLE)


# -----------------------------------------------------------------------------
# writing


def weights_path(output):
    """Where the weights go that belong to a CSV or Parquet file."""
    return str(Path(output).with_name(f"{Path(output).stem}-weights{Path(output).suffix}"))


def write(options, frame, weights):
    """Write the predictions and, if there are any, the weights."""
    if options.format == "json":
        parts = {"predictions": frame, "weights": weights}
        records = {name: as_records(part) for name, part in parts.items() if part is not None}
        records = records if weights is not None else records["predictions"]
        text = json.dumps(records, ensure_ascii=False, indent=1, allow_nan=False)
        put(options.output, (text + "\n").encode())
    elif options.format == "table":
        put(options.output, for_people(frame, weights).encode())
    else:
        put(options.output, encode(frame, options.format))
        if weights is not None and options.output in STANDARD_OUTPUT:
            for line in for_people(frame, weights).splitlines():  # standard output holds one table, for programs
                say(line)
        elif weights is not None:
            put(weights_path(options.output), encode(weights, options.format))


def as_records(frame):
    """A DataFrame's rows as dictionaries, with None for nan."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def encode(frame, kind):
    """A DataFrame as bytes of a CSV or Parquet file."""
    return frame.to_parquet(index=False) if kind == "parquet" else frame.to_csv(index=False).encode()


def put(path, data):
    """Write bytes to standard output, through a link, into a device or pipe, or to a file whole or not at all.

    UserError where they cannot be written. A reader of standard output may stop early.
    """
    if path not in STANDARD_OUTPUT:
        return utils.write_output(path, data)
    if sys.stdout.isatty():
        data = "\n".join(map(printable, data.decode().split("\n"))).encode()
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        return sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # what is left in the buffer would be reported when the program ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return None
        raise utils.cannot_write("standard output", error) from error
