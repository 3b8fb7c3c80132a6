"""A data set -> one table of users' ratings in time order: download, filters, ids, scale, cache.

What is in a data set, before and after the filters; then a file of your own, with a picture:

    python datasets.py --mode=ml-1m
    python datasets.py --mode=csv --data_path=my.csv --columns=user:0,item:1,rating:2 --plot=my.png
"""

import argparse
import contextlib
import errno
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

import metrics
from download import EDITIONS, download_edition
from layouts import check_options
from options import add_data_options
from readers import open_raw, read_columns, read_table
from utils import UserError, run_script

__all__ = ["Ratings", "load_ratings", "read_table"]

MOST_LEVELS = 20  # more distinct ratings than this are binned
CACHE_FROM = 1 << 20  # bytes; smaller files are read as fast as their cache would be
CACHE_VERSION = 1  # changes with what is cached
MANY_ROWS = 1 << 22  # ordering more than this takes seconds

# Where data sets without a download are looked for, and where to get them.
PLACES = {
    "sample": ("Data/sample/ratings.csv", "it comes with the source code"),
    "amazon": (
        "Data/amazon/ratings.csv",
        "get one from https://amazon-reviews-2023.github.io, https://nijianmo.github.io/amazon (2018) or "
        "https://jmcauley.ucsd.edu/data/amazon (2014)",
    ),
    "yelp": ("Data/yelp/yelp_academic_dataset_review.json", "get it from https://www.yelp.com/dataset"),
}


@dataclass(frozen=True)
class Ratings:
    """Ratings grouped by user, each user's in time order, ties in the file's order. Arrays are read-only."""

    user_ids: np.ndarray  # (n_users,) the file's, ascending; int64 where every id is an integer, else text
    item_ids: np.ndarray  # (n_items,) likewise
    offsets: np.ndarray  # (n_users + 1,) int64; user u's ratings are rows offsets[u]:offsets[u + 1]
    items: np.ndarray  # (n,) int32, places in item_ids
    values: np.ndarray  # (n,) float32, on the file's own scale
    times: np.ndarray  # (n,) int64, seconds; row numbers where the file has no time
    low: float  # rating scale
    high: float
    levels: np.ndarray  # distinct ratings, ascending; more than 20: the centres of 10 equal bins of the scale
    fingerprint: str  # digest of all of the above


def load_ratings(options):
    """The `Ratings` that the data options ask for, from the cache where it holds just these."""
    path = find_data(options)
    is_small = path.stat().st_size < CACHE_FROM
    ratings, notes = parse_ratings(path, options) if is_small else cached_ratings(path, options)
    for note in notes:
        say(f"{path}: {note}")
    return ratings


def parse_ratings(path, options):
    """(`Ratings` of a file, notes on what was dropped or assumed)."""
    columns, notes = load_columns(path, options)
    return build_ratings(columns, filter_rows(columns, options), options), notes


def data_place(options):
    """(where the ratings file is to be, by --data_path or as the data set's own place; how to get one)."""
    edition = EDITIONS.get(options.mode)
    usual, source = PLACES.get(options.mode, (None, "give the ratings file with --data_path"))
    if edition:
        usual, source = Path("Data", edition.folder, edition.member), "leave out --data_path to download it"
    if not (options.data_path or usual):
        raise UserError(f"--mode={options.mode} needs --data_path, the ratings file")
    return Path(options.data_path or usual), source


def find_data(options):
    """The ratings file; MovieLens is downloaded to its own place."""
    check_options(options.mode, options.columns, options.sep)
    edition, (path, source) = EDITIONS.get(options.mode), data_place(options)
    if edition and not path.exists() and path.parts[-2:] == (edition.folder, edition.member):
        download_edition(options.mode, path.parent.parent, options.data_url)
    if not path.exists():
        raise UserError(f"there is no file {path}; {source}")
    return path


def say(text):
    tqdm.write(text, file=sys.stderr)


# -----------------------------------------------------------------------------
# From rows to ratings


def load_columns(path, options):
    """(`Columns` by user and time, without duplicates; notes on what was dropped)."""
    scale = parse_scale(options.rating_scale)
    columns, notes = read_columns(path, options.mode, options.columns, options.sep, options.skip_bad_rows, scale)
    if len(columns.users) > MANY_ROWS:
        say(f"{path}: ordering {len(columns.users):,} ratings")
    columns = sort_rows(columns)
    twice = find_duplicates(columns)
    if twice.any():
        notes.append(f"dropped {twice.sum():,} ratings of an item that the same user rated again later")
        columns = take_rows(columns, ~twice)
    return columns, notes


def sort_rows(columns):
    """Rows by user and time; what is equal keeps its order."""
    first = int(columns.times.min())
    span = int(columns.times.max()) - first + 1
    if span * len(columns.user_ids) < 2**63:  # one key for both, which sorts in a fraction of the time
        order = np.argsort(columns.users * np.int64(span) + (columns.times - first), kind="stable")
    else:
        order = np.lexsort((columns.times, columns.users))
    return take_rows(columns, order)


def take_rows(columns, rows):
    names = ("users", "items", "ratings", "times")
    return columns._replace(**{name: getattr(columns, name)[rows] for name in names})


def find_duplicates(columns):
    """(n,) whether the same user rates the same item in a later row."""
    pairs = columns.users * np.int64(len(columns.item_ids)) + columns.items
    ranked = np.sort(pairs)  # many times as fast as argsort, and mostly enough
    twice = np.zeros(len(pairs), bool)
    if (ranked[1:] == ranked[:-1]).any():
        order = np.argsort(pairs, kind="stable")
        ranked = pairs[order]
        twice[order[:-1]] = ranked[1:] == ranked[:-1]
    return twice


def filter_rows(columns, options):
    """Items with `min_item` ratings or more, then users with `min_sequence` or more, one pass."""
    users, items = len(columns.user_ids), len(columns.item_ids)
    steps = [f"the file has {len(columns.users):,} ratings of {items:,} items by {users:,} users"]
    keep = np.ones(len(columns.users), bool)
    for name, option in (("items", "min_item"), ("users", "min_sequence")):
        codes, least = getattr(columns, name), getattr(options, option)
        enough = np.bincount(codes[keep], minlength=codes.max() + 1) >= max(least, 1)
        keep &= enough[codes]
        steps.append(f"--{option}={least} leaves {keep.sum():,} ratings of {enough.sum():,} {name}")
        if not keep.any():
            raise UserError(f"the filters leave nothing: {', '.join(steps)}; lower --{option}")
    return columns if keep.all() else take_rows(columns, keep)


def build_ratings(columns, kept, options):
    """`Ratings` of the rows `kept` of `columns`: on the scale of all rows, and with the ids of those kept."""
    low, high, levels = rating_scale(columns.ratings, parse_scale(options.rating_scale))
    lengths = np.bincount(kept.users, minlength=len(kept.user_ids))
    used = np.bincount(kept.items, minlength=len(kept.item_ids)) > 0
    arrays = {
        "user_ids": kept.user_ids[lengths > 0],
        "item_ids": kept.item_ids[used],
        "offsets": np.concatenate([[0], np.cumsum(lengths[lengths > 0])]),
        "items": (np.cumsum(used, dtype=np.int32) - 1)[kept.items],
        "values": kept.ratings,
        "times": kept.times,
        "levels": levels,
    }
    digest = hashlib.sha256(f"{low} {high}".encode())
    for array in arrays.values():
        array.setflags(write=False)  # as they are when they come from the cache
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array)
    return Ratings(**arrays, low=low, high=high, fingerprint=digest.hexdigest())


def parse_scale(text):
    """`LOW:HIGH` as two numbers; None stays None."""
    if text is None:
        return None
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        low = high = np.nan
    if not -np.inf < low < high < np.inf:
        raise UserError(f"--rating_scale={text} is not LOW:HIGH, two numbers, the lower one first")
    return low, high


def rating_scale(ratings, scale=None):
    """(lowest, highest, levels) of the ratings, whose scale may be given."""
    levels = np.sort(pd.unique(ratings))
    low, high = scale or (float(levels[0]), float(levels[-1]))
    if low == high:
        raise UserError(f"every rating is {low:g}; give the scale they are on with --rating_scale=LOW:HIGH")
    if len(levels) > MOST_LEVELS:
        levels = (low + (high - low) * (np.arange(10) + 0.5) / 10).astype(np.float32)
    return low, high, levels


# -----------------------------------------------------------------------------
# Cache: a line with the checksum of the rest, a line of JSON, then the arrays


def cached_ratings(path, options):
    """What `parse_ratings` gives, parsed once for the same content and options."""
    place = cache_place(path, options)
    with open_raw(path) as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    found = read_cache(place, content)
    if found is None:
        found = parse_ratings(path, options)
        write_cache(place, content, *found)
    return found


def cache_place(path, options):
    """The cache file for a data file and these options."""
    names = ("mode", "columns", "sep", "skip_bad_rows", "rating_scale", "min_item", "min_sequence")
    asked = [CACHE_VERSION, str(path.resolve()), *(getattr(options, name) for name in names)]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    return Path(options.cache_dir or path.parent) / f"{path.name}.{digest[:16]}.cache"


def write_cache(place, content, ratings, notes):
    """Keep `ratings` in `place`, under a temporary name until it is whole."""
    header = vars(ratings) | {"content": content, "notes": notes}
    arrays = {name: value for name, value in header.items() if isinstance(value, np.ndarray)}
    header["arrays"] = [[name, array.dtype.str, len(array)] for name, array in arrays.items()]
    header = {name: value for name, value in header.items() if name not in arrays}
    part = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.parent.stat().st_mode & 0o200:
            raise PermissionError(errno.EACCES, "the folder is read-only")  # for root too
        with part.open("w+b") as file:
            file.write(bytes(64) + b"\n" + json.dumps(header).encode() + b"\n")
            for array in arrays.values():
                file.write(bytes(-file.tell() % 64))
                file.write(array)
            file.seek(65)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            file.write(digest.encode())
        os.replace(part, place)
    except OSError as error:
        say(f"parsed data is not kept in {place.parent} ({error.strerror}); --cache_dir gives another place")
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def read_cache(place, content):
    """(`Ratings` mapped into memory, notes) kept in `place`; None where damaged or of other content."""
    try:
        with place.open("rb") as file:
            digest = file.read(65).decode().strip()
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return None
            file.seek(65)
            header = json.loads(file.readline())
            position = file.tell()
            data = np.memmap(file, np.uint8, "r").view(np.ndarray)
    except (OSError, ValueError):
        return None
    if header.pop("content") != content:
        return None
    notes, arrays = header.pop("notes"), header.pop("arrays")
    for name, dtype, length in arrays:
        position += -position % 64
        end = position + length * np.dtype(dtype).itemsize
        header[name] = data[position:end].view(dtype)
        position = end
    return Ratings(**header), notes


# -----------------------------------------------------------------------------
# The data table


def describe(columns, levels, longest):
    """What the data table says of rows by user and time: a dict of name -> number or text."""
    lengths = np.bincount(columns.users)
    lengths = lengths[lengths > 0]
    tied = (np.diff(columns.users) == 0) & (np.diff(columns.times) == 0)
    ties = np.append(tied, False) | np.append(False, tied)
    days = [str(np.datetime64(int(time), "s"))[:10] for time in (columns.times.min(), columns.times.max())]
    histogram = np.bincount(metrics.nearest_level(columns.ratings, levels), minlength=len(levels))
    return {
        "users": len(lengths),
        "items": len(np.unique(columns.items)),
        "ratings": len(columns.ratings),
        "mean length": lengths.mean(),
        f"mean length, last {longest}": np.minimum(lengths, longest).mean(),
        "balance score": metrics.balance(histogram),
        "share of ties": ties.mean(),
        "first day": days[0],
        "last day": days[1],
    }


def print_table(path, before, after, ratings, notes):
    """The data table, before and after the filters."""
    print(f"{path}\n\n{'':<24}{'file':>14}{'filtered':>14}")
    for name, value in before.items():
        texts = [
            cell if isinstance(cell, str) else f"{cell:,}" if isinstance(cell, int) else f"{cell:.3f}"
            for cell in (value, after[name])
        ]
        print(f"{name:<24}{texts[0]:>14}{texts[1]:>14}")
    listed = " ".join(f"{level:g}" for level in ratings.levels)
    print(f"{'scale':<24}{ratings.low:g} to {ratings.high:g}, levels {listed}")
    for note in notes or ["no row was dropped"]:
        print(note)


def plot(file, ratings):
    """Save a picture of the filtered ratings: their histogram, users' lengths and users' balance."""
    from matplotlib.figure import Figure  # takes a second to import

    level = metrics.nearest_level(ratings.values, ratings.levels)
    lengths, n_levels = np.diff(ratings.offsets), len(ratings.levels)
    of_user = np.repeat(np.arange(len(lengths)), lengths)
    histograms = np.bincount(of_user * n_levels + level, minlength=len(lengths) * n_levels).reshape(-1, n_levels)
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.bar([f"{each:g}" for each in ratings.levels], histograms.sum(0))
    left.set(xlabel="rating", ylabel="ratings")
    middle.hist(lengths, bins=np.geomspace(lengths.min(), lengths.max() + 1, 40))
    middle.set(xlabel="ratings of a user", ylabel="users", xscale="log")
    right.hist(metrics.balance(histograms), bins=40, range=(0, 1))
    right.set(xlabel="balance score of a user", ylabel="users")
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot={file} cannot be written: {error}") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_options(parser)
    parser.add_argument("--max_seq_len", type=int, default=30, help="cut for the mean length (default: %(default)s)")
    parser.add_argument("--plot", nargs="?", const="ratings.png", metavar="FILE", help="save a picture too")
    options = parser.parse_args()
    path = find_data(options)
    columns, notes = load_columns(path, options)
    kept = filter_rows(columns, options)
    ratings = build_ratings(columns, kept, options)
    tables = [describe(rows, ratings.levels, options.max_seq_len) for rows in (columns, kept)]
    print_table(path, *tables, ratings, notes)
    if options.plot:
        plot(options.plot, ratings)


if __name__ == "__main__":
    run_script(main)
