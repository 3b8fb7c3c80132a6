"""Adapt a trained run to users in a ratings file, and rank items for them or predict given pairs.

    python recommend.py --run=log/ml-1m-bert4rec-melo --ratings=me.csv --top=10 --titles=movies.dat
    python recommend.py --run=... --ratings=users.csv --pairs=to_score.csv --output=scores.csv
    cat ratings.csv | python recommend.py --run=... --ratings=- --top=5 > top.csv
    python recommend.py --run=... --ratings=me.csv --explain --plot=me.png      # what each rating weighed
    python recommend.py --run=... --export=melo.safetensors                     # one file for another machine

users.csv has a header and a rating a line; a time column orders a user's ratings, else the file does:

    user,item,rating,timestamp              or, with --titles:      user,item,rating
    ann,260,5,978300760                                             me,Heat (1995),5
    ann,1196,4,978302109                                            me,"Matrix, The",4

pairs.csv has a user and an item a line; lists for --candidates and --exclude have an item a line:

    user,item                                                       260
    ann,1198                                                        1198

A ranking by predicted rating says which items a user will like best among those at hand: a shelf, a watch list, the
--candidates of another program. It does not say which item a user will choose next of the whole catalogue; popular
items are the better guess there (docs/SERVING.md has figures). --min_ratings keeps to items that are known well.

The output has a row for each recommended item or pair. `score` is the prediction, by which items are ranked; `rating`
is the score cut to the rating scale. `adapted` says whether the user had known ratings. `note` says why a pair is not
predicted or a user not adapted to. A run's folder may also be an exported file. The training data is not needed.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import options as option_module
from ratings.titles import read_titles
from serving import export, picture, report
from serving.recommender import AdaptedUser, Explanation, Recommendation, Recommender, Support
from serving.users import read_items, read_pairs, read_users
from utils import UserError, is_closed, run_script, say

__all__ = ["AdaptedUser", "Explanation", "Recommendation", "Recommender", "Support"]

USERS_AT_ONCE = 32
MOST = 1_000_000  # items of a list
LAST_STEP = 10**12
FORMATS = {".csv": "csv", ".json": "json", ".parquet": "parquet"}
WITHOUT_RATINGS = {"run", "checkpoint_step", "device", "export"}  # the options that --export uses
LISTS = {"top", "candidates", "exclude", "min_ratings"}  # those that choose what to list
INPUTS = ("ratings", "titles", "pairs", "candidates", "exclude")


def parse(argv):
    """The options of this script. UserError where they do not go together."""
    parser = option_module.Parser(__doc__)
    path = option_module.path
    add = option_module.group(parser, "trained run")
    add("run", None, path, "a run's folder, or an exported file", required=True)
    add("checkpoint_step", -1, option_module.count(-1, LAST_STEP), "checkpoint of the run; -1 = the best of validation")
    add("device", "auto", str, "where to compute", choices=["auto", "cpu", "cuda"])
    add = option_module.group(parser, "users")
    add("ratings", None, path, "their ratings, any file that main.py reads; - = standard input")
    add("mode", None, str, "layout of that file; default: found from its first lines")
    option_module.add_layout_options(add)
    add("titles", None, path, "file of item ids and titles: items may be given by title, and are shown with it")
    add = option_module.group(parser, "what to predict")
    add("top", 10, option_module.count(1, MOST), "list this many items for each user, not rated yet")
    add("candidates", None, path, "list only the items in this file", metavar="FILE")
    add("exclude", None, path, "do not list the items in this file", metavar="FILE")
    add("min_ratings", 0, option_module.count(0), "list only items with at least this many training ratings")
    add("pairs", None, path, "predict the ratings of the user-item pairs in this file instead", metavar="FILE")
    parser.add_argument("--explain", action="store_true", help="weights of the ratings, and scores after each step")
    add("plot", None, path, "picture of the explanation for the first user", metavar="FILE.png")
    add = option_module.group(parser, "output")
    add("output", "-", path, "where predictions go, .csv, .json or .parquet; - = standard output")
    kinds = ["table", *FORMATS.values()]
    add("format", None, str, "default: by the file's ending; a table on a terminal, else csv", choices=kinds)
    add("export", None, path, "write the run to this .safetensors or .pt file, and a model card beside it")
    options = parser.parse_args(argv)
    options.explain = options.explain or bool(options.plot)
    check(options, option_module.given(argv, parser).keys())
    return options


def check(options, given):
    """Refuse what cannot work, or was given and has no effect, before anything is computed; settle the format."""
    if not options.ratings:
        lacking = [f"--{name}" for name in sorted(given - WITHOUT_RATINGS)]
        if lacking or not options.export:
            wants = f"{lacking[0]} needs it" if lacking else "give the users' ratings, or --export to write one file"
            raise UserError(f"--ratings is missing: {wants}")
    if options.pairs and (found := sorted(given & LISTS)):
        raise UserError(f"--pairs says what to predict: leave out {', '.join(f'--{name}' for name in found)}")
    if options.export and Path(options.export).suffix not in (".safetensors", ".pt"):
        raise UserError(f"--export={options.export} must end in .safetensors or .pt")
    if options.plot and Path(options.plot).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot={options.plot} must end in .png, .svg or .pdf")
    check_format(options)
    check_places(options)


def check_format(options):
    """Settle --format; UserError where standard output cannot take it."""
    if options.ratings and options.output in report.STANDARD_OUTPUT and is_closed(sys.stdout):
        raise UserError("standard output is closed: give --output=FILE")
    terminal = options.output in report.STANDARD_OUTPUT and not is_closed(sys.stdout) and sys.stdout.isatty()
    if options.format is None and options.output in report.STANDARD_OUTPUT:
        options.format = "table" if terminal else "csv"
    options.format = options.format or FORMATS.get(Path(options.output).suffix)
    if options.format is None:
        raise UserError(f"--output={options.output} must end in .csv, .json or .parquet, or give --format")
    if options.format == "parquet" and terminal:
        raise UserError("--format=parquet is not text for a terminal: give --output=FILE")


def check_places(options):
    """UserError where an output cannot be written, or would replace an input or another output."""
    outputs = {f"--{name}": getattr(options, name) for name in ("output", "plot", "export") if getattr(options, name)}
    outputs = {name: path for name, path in outputs.items() if path not in report.STANDARD_OUTPUT}
    if options.explain and "--output" in outputs and options.format in ("csv", "parquet"):
        outputs["the weights beside --output"] = report.weights_path(options.output)
    if options.export:
        export.card_path(options.export)
        outputs["the card of --export"] = f"{options.export}.md"
    taken = {os.path.realpath(path): f"--{name}" for name in INPUTS if (path := getattr(options, name))}
    taken[os.path.realpath(options.run)] = "--run"
    for name, path in outputs.items():
        place = os.path.realpath(path)
        folder = os.path.dirname(place)
        if os.path.isdir(place):
            raise UserError(f"{name}={path} is a folder: give the name of a file in it")
        if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
            raise UserError(f"{name}={path}: {folder} is no folder that can be written to; name another")
        if place in taken and not place.startswith(("/dev/", "/proc/")):
            raise UserError(f"{name}={path} would replace the file of {taken[place]}: name another")
        taken[place] = name


# -----------------------------------------------------------------------------
# predicting


def top_rows(recommender, users, n, allowed, threads):
    """(user, rank, item, catalogue number, score) of each user's top items."""

    def list_part(part):
        return recommender.top([user.support for user in part], n, allowed)

    for part, lists in in_parts(users, list_part, threads):
        for user, found in zip(part, lists, strict=True):
            for rank, (item, _, score) in enumerate(found, 1):
                yield user, rank, str(item), recommender.number(item), score


def pair_rows(recommender, pairs, threads):
    """(user, None, item, catalogue number, score) of each pair, in order; the score of an unknown item is nan."""
    by_user = {}
    for place, pair in enumerate(pairs):
        if pair.number:
            by_user.setdefault(pair.user.id, (pair.user, []))[1].append(place)

    def predict_part(part):
        numbers = [np.array([pairs[place].number for place in places]) for _, places in part]
        return recommender.scores([user.support for user, _ in part], numbers)

    scores = np.full(len(pairs), np.nan)
    for part, found in in_parts(list(by_user.values()), predict_part, threads):
        for (_, places), values in zip(part, found, strict=True):
            scores[places] = values
    for pair, score in zip(pairs, scores.tolist(), strict=True):
        yield pair.user, None, pair.item, pair.number, score


def in_parts(users, work, threads):
    """(part, work(part)) for a few users at a time, several such in parallel, with progress on a terminal."""
    parts = [users[first : first + USERS_AT_ONCE] for first in range(0, len(users), USERS_AT_ONCE)]
    bar = tqdm(total=len(users), unit=" users", delay=2, leave=False, disable=None)
    with bar, ThreadPoolExecutor(threads) as pool:
        for part, found in zip(parts, pool.map(work, parts), strict=True):
            yield part, found
            bar.update(len(part))


def allowed_items(options, recommender, titles):
    """(n_items,) whether --candidates, --exclude and --min_ratings let each item be listed; None without them."""
    if not (options.candidates or options.exclude or options.min_ratings):
        return None
    allowed = np.full(len(recommender.item_ids), not options.candidates)
    for path, value in ((options.candidates, True), (options.exclude, False)):
        if path:
            allowed[np.array(read_items(path, recommender, titles), np.int64) - 1] = value
    if options.min_ratings:
        if (counts := recommender.item_counts) is None:
            raise UserError(f"--min_ratings: {options.run} does not say how often items were rated: train it again")
        allowed &= counts >= options.min_ratings
    if not allowed.any():
        raise UserError("--candidates, --exclude and --min_ratings leave no item that the run knows: ask for less")
    return allowed


def main(argv=None):
    options = parse(argv)
    # Each core adapts to other users; the small operations of one user would not gain from several cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    clock = time.monotonic()
    recommender = Recommender.load(options.run, options.checkpoint_step, options.device)
    say(f"loaded {recommender.source} in {time.monotonic() - clock:.2f} s")
    if options.export:
        card = export.export(recommender, options.export, options.run)
        say(f"written: {options.export}, and its model card {card}")
    if options.ratings:
        predict(options, recommender, threads if recommender.device.type == "cpu" else 1)
    return 0


def predict(options, recommender, threads):
    """Read the users, predict on that many cores, and write the predictions."""
    titles = read_titles(options.titles)
    allowed = allowed_items(options, recommender, titles)
    users = read_users(options, recommender, titles)
    clock = time.monotonic()
    if options.pairs:
        rows = list(pair_rows(recommender, read_pairs(options.pairs, users, recommender, titles), threads))
    else:
        rows = list(top_rows(recommender, users, options.top, allowed, threads))
    seconds = time.monotonic() - clock
    say(f"predicted {counted(len(rows), 'rating')} of {counted(len(users), 'user')} in {seconds:.2f} s")
    frame, weights = report.tabulate(recommender, titles, rows), None
    if options.explain:
        frame, weights = report.explain(recommender, titles, rows, frame)
    report.write(options, frame, weights)
    if options.plot:
        draw(options, recommender, titles, rows)


def draw(options, recommender, titles, rows):
    """Write the picture of the first user, with the items of --pairs, or with items that show what adapting did."""
    rows = [row for row in rows if row[3]]
    if not rows:
        return say(f"nothing is predicted, so {options.plot} is not written")
    user = rows[0][0]
    numbers = [number for who, _, _, number, _ in rows if who.id == user.id] if options.pairs else None
    data = picture.picture(recommender, titles, user, numbers, Path(options.plot).suffix[1:])
    return report.put(options.plot, data)


def counted(number, noun):
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    run_script(main)
