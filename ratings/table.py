"""From the rows of a file to `Ratings`: where data sets lie, order, duplicates, filters, ids, scale."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ratings.download import EDITIONS, download_edition
from ratings.formats import check_options
from ratings.readers import read_columns
from utils import UserError, say

MOST_LEVELS = 20  # more distinct ratings than this are binned


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


def nearest_level(values, levels):
    """Index of the rating level nearest to each of `values`, of any shape; the lower one in a tie."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, values)
