"""Adapt a trained run to users in a ratings file, and rank items for them or rate given pairs.

    python recommend.py --run=log/ml-1m-bert4rec-melo --ratings=me.csv --top=10 --titles=movies.dat
    python recommend.py --run=... --ratings=users.csv --pairs=to_score.csv --output=scores.csv
    cat ratings.csv | python recommend.py --run=... --ratings=- --top=5 > top.csv
    python recommend.py --run=... --ratings=me.csv --explain --plot=me.png      # what each rating weighed
    python recommend.py --run=... --export=melo.safetensors                     # one file for another machine

The ratings need the columns user, item and rating; a time column orders them, else the file does. The run's folder
may also be an exported file. The training data is not needed.
"""

import argparse
import io
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import options as option_module
import utils
from ratings.titles import read_titles
from serving import export, picture
from serving.recommender import AdaptedUser, Explanation, Recommendation, Recommender, Support
from serving.users import read_pairs, read_users
from utils import UserError, run_script, say

__all__ = ["AdaptedUser", "Explanation", "Recommendation", "Recommender", "Support"]

USERS_AT_ONCE = 32
WIDEST_TITLE, NARROWEST_TITLE = 40, 16  # characters in a table
MOST_LINES = 4  # of a kind, in a picture
ENDINGS = {".csv": "csv", ".json": "json", ".parquet": "parquet"}


def parse(argv):
    """The options of this script; UserError where they do not go together."""
    parser = option_module.Parser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = option_module.group(parser, "trained run")
    add("run", None, str, "a run's folder, or an exported file", required=True)
    add("checkpoint_step", -1, option_module.count(-1), "checkpoint of the run; -1 = the best of validation")
    add("device", "auto", str, "where to compute", choices=["auto", "cpu", "cuda"])
    add = option_module.group(parser, "users")
    add("ratings", None, str, "their ratings, any file that main.py reads; - = standard input")
    add("mode", None, str, "layout of that file; default: found from its first lines")
    option_module.add_layout_options(add)
    add("titles", None, str, "file of item ids and titles: items may be given by title, and are shown with it")
    add = option_module.group(parser, "what to predict")
    add("top", 10, option_module.count(1), "list this many items of each user, not rated yet")
    add("pairs", None, str, "predict the ratings of the user-item pairs in this file instead")
    parser.add_argument(
        "--explain", action="store_true", help="weights of the user's ratings, and predictions by inner step"
    )
    add("plot", None, str, "picture of the explanation for the first user", metavar="FILE.png")
    add = option_module.group(parser, "output")
    add("output", "-", str, "where predictions go, .csv, .json or .parquet; - = standard output")
    add(
        "format",
        None,
        str,
        "default: by the file's ending; a table on a terminal, else csv",
        choices=["table", "csv", "json", "parquet"],
    )
    add(
        "export",
        None,
        str,
        "write learner, rates, loss network and ids to this .safetensors or .pt file, and a model card",
    )
    options = parser.parse_args(argv)
    options.explain = options.explain or bool(options.plot)
    check(options)
    return options


def check(options):
    """Refuse what cannot work before anything is computed, and settle the output's format."""
    if not options.ratings and not options.export:
        raise UserError("--ratings is missing: give the users' ratings, or --export to write the run to one file")
    for name in ("output", "plot", "export"):
        path = getattr(options, name)
        if path and path != "-" and not (Path(path).parent.is_dir() and os.access(Path(path).parent, os.W_OK)):
            raise UserError(f"--{name}={path}: {Path(path).parent} is no folder that can be written to; name another")
    if options.export and Path(options.export).suffix not in (".safetensors", ".pt"):
        raise UserError(f"--export={options.export} must end in .safetensors or .pt")
    if options.plot and Path(options.plot).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot={options.plot} must end in .png, .svg or .pdf")
    ending = Path(options.output).suffix
    if options.format is None and options.output == "-":
        options.format = "table" if sys.stdout.isatty() else "csv"
    options.format = options.format or ENDINGS.get(ending)
    if options.format is None:
        raise UserError(f"--output={options.output} must end in .csv, .json or .parquet, or give --format")


# -----------------------------------------------------------------------------
# predicting


def top_rows(recommender, users, n, threads):
    """(user, rank, catalogue number, predicted rating) of each user's top items."""
    for part, lists in in_parts(users, lambda part: recommender.top([user.support for user in part], n), threads):
        for user, found in zip(part, lists, strict=True):
            for rank, (item, rating) in enumerate(found, 1):
                yield user, rank, recommender.number(item), rating


def pair_rows(recommender, pairs, threads):
    """(user, None, catalogue number, predicted rating) of each pair, in order."""
    by_user = {}
    for place, pair in enumerate(pairs):
        by_user.setdefault(pair.user.id, (pair.user, []))[1].append(place)

    def predict_part(part):
        numbers = [np.array([pairs[place].number for place in places]) for _, places in part]
        return recommender.predict([user.support for user, _ in part], numbers)

    ratings = np.empty(len(pairs))
    for part, found in in_parts(list(by_user.values()), predict_part, threads):
        for (_, places), values in zip(part, found, strict=True):
            ratings[places] = values
    for (user, number), rating in zip(pairs, ratings.tolist(), strict=True):
        yield user, None, number, rating


def in_parts(users, work, threads):
    """(part, work(part)) for a few users at a time, several such in parallel, with progress on a terminal."""
    parts = [users[first : first + USERS_AT_ONCE] for first in range(0, len(users), USERS_AT_ONCE)]
    bar = tqdm(total=len(users), unit=" users", delay=2, leave=False, disable=not sys.stderr.isatty())
    with bar, ThreadPoolExecutor(threads) as pool:
        for part, found in zip(parts, pool.map(work, parts), strict=True):
            yield part, found
            bar.update(len(part))


def tabulate(recommender, titles, rows, ranked):
    """Rows of `top_rows` or `pair_rows` as a DataFrame."""
    columns = {"user": [], "rank": [], "item": [], "title": [], "rating": [], "adapted": []}
    for user, rank, number, rating in rows:
        item = recommender.item_ids[number - 1]
        values = user.id, rank, item, titles.by_item.get(str(item), ""), rating, len(user.support.items) > 0
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    used = {"rank": ranked, "title": bool(titles.by_item)}
    frame = {name: values for name, values in columns.items() if used.get(name, True)}
    if len({type(value) for value in frame["user"]}) > 1:
        frame["user"] = list(map(str, frame["user"]))
    return pd.DataFrame(frame)


def explain(recommender, titles, rows, frame):
    """(`frame` with the prediction after each number of inner steps, weights of the users' ratings)."""
    moves, weights = np.empty((len(rows), recommender.options.num_inner_steps + 1)), []
    by_user = {}
    for place, (user, _, number, _) in enumerate(rows):
        by_user.setdefault(user.id, (user, [], []))
        by_user[user.id][1].append(place)
        by_user[user.id][2].append(number)
    for user, places, numbers in by_user.values():
        found = recommender.explain(user.support, np.array(numbers))
        moves[places] = found.predictions
        for item, rating, weight in zip(found.items, found.ratings, found.weights, strict=True):
            named = {"title": titles.by_item.get(str(item), "")} if titles.by_item else {}
            steps = {f"weight_{step}": value for step, value in enumerate(weight.tolist(), 1)}
            weights.append({"user": user.id, "item": item, **named, "rating": rating, **steps})
    after = pd.DataFrame(moves, columns=[f"after_{step}" for step in range(moves.shape[1])])
    return pd.concat([frame, after], axis=1), pd.DataFrame(weights, columns=None if weights else ["user", "item"])


# -----------------------------------------------------------------------------
# writing


def write(options, frame, weights):
    """Write the predictions and, if there are any, the weights."""
    if options.format == "json":
        parts = {"predictions": frame, "weights": weights}
        records = {name: part.to_dict("records") for name, part in parts.items() if part is not None}
        data = json.dumps(records if weights is not None else records["predictions"], ensure_ascii=False, indent=1)
        return put(options.output, (data + "\n").encode())
    if options.format == "table":
        tables = as_table(frame) if weights is None else explanation_tables(frame, weights)
        return put(options.output, tables.encode())
    put(options.output, encode(frame, options.format))
    if weights is None:
        return None
    if options.output != "-":
        path = Path(options.output)
        return put(path.with_name(f"{path.stem}-weights{path.suffix}"), encode(weights, options.format))
    # Standard output holds one table that programs can read.
    return print(explanation_tables(frame, weights), file=sys.stderr, end="")


def encode(frame, kind):
    """A DataFrame as bytes of a CSV or Parquet file."""
    return frame.to_parquet(index=False) if kind == "parquet" else frame.to_csv(index=False).encode()


def explanation_tables(frame, weights):
    """What `explain` gave as text: three narrow tables."""
    steps = [name for name in frame.columns if name.startswith("after_")]
    item = [name for name in ("user", "item", "title") if name in frame.columns]
    moves = frame[item + steps].rename(columns={name: name.removeprefix("after_") for name in steps})
    weights = weights.rename(columns=lambda name: name.removeprefix("weight_"))
    return (
        f"{as_table(frame.drop(columns=steps))}\n"
        f"predicted ratings, unadapted (0) and after each inner step\n{as_table(moves)}\n"
        f"weight of each rating in the inner steps; 1: that of the squared error\n{as_table(weights)}"
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
        columns["title"] = [shorten(cell, width).ljust(width) for cell in columns["title"]]
    return "".join("  ".join(row).rstrip() + "\n" for row in zip(*columns.values(), strict=True))


def as_cell(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2f}" if isinstance(value, float) else shorten(str(value), WIDEST_TITLE)


def shorten(text, width):
    """Text of at most `width` characters."""
    text = text.rstrip()
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."


def put(output, data):
    """Write bytes to a file, whole or not at all, or to standard output, whose reader may stop early."""
    if output == "-":
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif Path(output).exists() and not Path(output).is_file():
        Path(output).write_bytes(data)  # a pipe or device must not be replaced by a file
    else:
        utils.write_atomic(output, data)


# -----------------------------------------------------------------------------


def main(argv=None):
    options = parse(argv)
    # Users are spread over the cores; small operations would gain nothing from them.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    clock = time.monotonic()
    recommender = Recommender.load(options.run, options.checkpoint_step, options.device)
    say(f"loaded {recommender.source} in {time.monotonic() - clock:.2f} s")
    if options.export:
        export.export(recommender, options.export, options.run)
        say(f"written: {options.export}, and its model card {Path(options.export).with_suffix('.md')}")
    if options.ratings:
        predict(options, recommender, threads if recommender.device.type == "cpu" else 1)
    return 0


def predict(options, recommender, threads):
    """Read the users, predict on that many cores, and write what was asked for."""
    titles = read_titles(options.titles)
    users = read_users(options, recommender, titles)
    clock = time.monotonic()
    if options.pairs:
        pairs = read_pairs(options.pairs, users, recommender, titles)
        rows = list(pair_rows(recommender, pairs, threads))
    else:
        rows = list(top_rows(recommender, users, options.top, threads))
    seconds = time.monotonic() - clock
    say(f"predicted {counted(len(rows), 'rating')} of {counted(len(users), 'user')} in {seconds:.2f} s")
    frame, weights = tabulate(recommender, titles, rows, ranked=not options.pairs), None
    if options.explain:
        frame, weights = explain(recommender, titles, rows, frame)
    if options.plot and rows:
        draw(options, recommender, titles, rows)
    write(options, frame, weights)


def draw(options, recommender, titles, rows):
    """Write the picture of the first user, with the pairs asked for, or with items that show what adapting did."""
    # takes a second to import

    user = rows[0][0]
    if options.pairs:
        groups = {"asked for": [number for who, _, number, _ in rows if who.id == user.id][: 3 * MOST_LINES]}
    else:
        groups = picture.telling_items(recommender, user.support, MOST_LINES)
    found = recommender.explain(user.support, np.array([number for group in groups.values() for number in group]))
    groups = {what: [recommender.item_ids[number - 1] for number in group] for what, group in groups.items()}
    figure = picture.draw(found, groups, lambda item: titles.by_item.get(str(item), str(item)))
    data = io.BytesIO()
    figure.savefig(data, format=Path(options.plot).suffix[1:], dpi=130)
    put(options.plot, data.getvalue())


def counted(number, noun):
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    run_script(main)
