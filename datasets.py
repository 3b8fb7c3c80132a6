"""Rating files of any layout -> one table of users' ratings in time order.

Every reader leads to the same four columns: user, item, rating, time. Files are read in blocks of whole lines:
pandas' C parser takes a block that is clean, and a careful reader takes one that is not and says which row is wrong.
"""

import csv
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from utils import UserError

BLOCK = 1 << 25  # bytes parsed at a time
LONGEST_ID = 200  # characters
MOST_LEVELS = 20  # more distinct ratings than this are binned
ROLES = ("user", "item", "rating", "time")

# Column names, in lower case, and what they hold; the first of a line that is found counts.
NAMES = {
    "user": ("user", "user_id", "userid", "reviewerid", "uid"),
    "item": ("item", "item_id", "itemid", "movieid", "movie_id", "parent_asin", "asin", "product_id", "business_id"),
    "rating": ("rating", "overall", "stars", "score"),
    "time": ("timestamp", "time", "unixreviewtime", "date"),
}
ITEM_NAME_LAYOUT = {
    "movieid": "ml-latest",
    "parent_asin": "amazon",
    "asin": "amazon",
    "product_id": "amazon",
    "business_id": "yelp",
}
MODE_LAYOUT = {"ml-100k": "ml-100k", "ml-1m": "ml-1m", "ml-10m": "ml-1m", "amazon": "amazon", "yelp": "yelp"}
MODE_LAYOUT |= dict.fromkeys(("ml-20m", "ml-25m", "ml-32m", "ml-latest", "ml-latest-small"), "ml-latest")
MODE_LAYOUT |= {"csv": "csv", "sample": "csv", "parquet": "parquet"}

PROBLEMS = (
    "",
    "the number of columns is wrong",
    "the user id is missing, too long or not text",
    "the item id is missing, too long or not text",
    "the rating is not a number",
    "the rating is outside the scale",
    "the time is neither a number nor a date",
)


@dataclass(frozen=True)
class Ratings:
    """Ratings grouped by user, each user's in time order (equal times keep the order of the file)."""

    user_ids: np.ndarray  # (n_users,) ids of the file, ascending; int64 where every id is an integer, else text
    item_ids: np.ndarray  # (n_items,) likewise
    offsets: np.ndarray  # (n_users + 1,) int64; user u's ratings are rows offsets[u]:offsets[u + 1]
    items: np.ndarray  # (n,) int32, places in item_ids
    values: np.ndarray  # (n,) float32, on the file's own scale
    times: np.ndarray  # (n,) int64, seconds; line numbers where the file has no time
    low: float  # rating scale
    high: float
    levels: np.ndarray  # distinct ratings, ascending; more than 20: the centres of 10 equal bins of the scale
    fingerprint: str  # digest of all of the above


class Table(NamedTuple):
    """All rows of a file in its order, with its own ids."""

    users: np.ndarray
    items: np.ndarray
    ratings: np.ndarray  # float32
    times: np.ndarray  # int64, seconds; line numbers where the file has no time


class Columns(NamedTuple):
    """All rows of a file in its order, ids as places in ascending lists of distinct ids."""

    users: np.ndarray  # (n,) int32
    items: np.ndarray  # (n,) int32
    ratings: np.ndarray  # (n,) float32
    times: np.ndarray  # (n,) int64
    user_ids: np.ndarray
    item_ids: np.ndarray


class Layout(NamedTuple):
    """Where a file keeps its four columns."""

    name: str  # as in MODE_LAYOUT
    columns: tuple  # place (or JSON key) of user, item, rating and time; time None: the file has none
    sep: str = ""  # "": JSON lines
    width: int = 0  # columns in a row
    header: bool = False
    dated: bool = False  # times are dates, not numbers


def load_ratings(options):
    """The `Ratings` that the data options ask for: read, without duplicates, filtered, grouped and sorted."""
    path = Path(options.data_path or "./Data/ml-1m/ratings.dat")
    scale = parse_scale(options.rating_scale)
    columns = read_columns(path, options.mode, options.columns, options.sep, options.skip_bad_rows, scale)
    low, high = scale or (float(columns.ratings.min()), float(columns.ratings.max()))
    return build_ratings(filter_rows(drop_duplicates(sort_rows(columns)), options), low, high)


def read_table(path, mode=None, columns=None, sep=None, skip_bad_rows=False):
    """A file's rows as they are, as a `Table`; `mode=None` takes any layout that is recognised."""
    read = read_columns(Path(path), mode, columns, sep, skip_bad_rows)
    return Table(read.user_ids[read.users], read.item_ids[read.items], read.ratings, read.times)


def parse_scale(text):
    """`LOW:HIGH` as two numbers; None stays None."""
    if text is None:
        return None
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        low = high = np.nan
    if not low < high:
        raise UserError(f"--rating_scale={text} is not LOW:HIGH, two numbers, the lower one first")
    return low, high


# ---------------------------------------------------------------------------------------------------------------------
# From rows to ratings


def sort_rows(columns):
    """Rows ordered by user and time; what is equal keeps its order."""
    order = np.lexsort((columns.times, columns.users))
    return take_rows(columns, order)


def take_rows(columns, rows):
    return columns._replace(**{name: getattr(columns, name)[rows] for name in ("users", "items", "ratings", "times")})


def drop_duplicates(columns):
    """Of the rows of a user with the same item, the last alone."""
    pairs = columns.users.astype(np.int64) * len(columns.item_ids) + columns.items
    twice = pd.Series(pairs).duplicated(keep="last").to_numpy()
    return take_rows(columns, ~twice) if twice.any() else columns


def filter_rows(columns, options):
    """Items with `min_item` ratings or more, then users with `min_sequence` or more, one pass."""
    for name, least in (("items", options.min_item), ("users", options.min_sequence)):
        codes = getattr(columns, name)
        keep = np.bincount(codes)[codes] >= least
        if not keep.all():
            columns = take_rows(columns, keep)
    return columns


def build_ratings(columns, low, high):
    """`Ratings` of rows that are sorted; ids without rows are left out."""
    lengths = np.bincount(columns.users, minlength=len(columns.user_ids))
    used = np.bincount(columns.items, minlength=len(columns.item_ids)) > 0
    arrays = {
        "user_ids": columns.user_ids[lengths > 0],
        "item_ids": columns.item_ids[used],
        "offsets": np.concatenate([[0], np.cumsum(lengths[lengths > 0])]),
        "items": (np.cumsum(used, dtype=np.int32) - 1)[columns.items],
        "values": columns.ratings,
        "times": columns.times,
        "levels": rating_levels(columns.ratings, low, high),
    }
    for array in arrays.values():
        array.setflags(write=False)
    digest = hashlib.sha256(repr((low, high)).encode())
    for array in arrays.values():
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return Ratings(**arrays, low=low, high=high, fingerprint=digest.hexdigest())


def rating_levels(ratings, low, high):
    """Distinct ratings, ascending, or the centres of ten equal bins of the scale where they are many."""
    levels = np.sort(pd.unique(ratings))
    if len(levels) <= MOST_LEVELS:
        return levels
    return (low + (high - low) * (np.arange(10) + 0.5) / 10).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Recognising a file


def recognise(path, head, mode, columns=None, sep=None):
    """The `Layout` of a file that begins with the text `head`, checked against `mode`."""
    first = head.split("\n", 1)[0].rstrip("\r")
    sep = find_sep(first) if sep is None else sep
    fields = first.split(sep)
    header = not any(is_number(field) for field in fields)
    names = [field.strip().strip('"') for field in fields]
    if header:
        places, name = named_columns(path, names)
    elif sep == "::" and len(fields) == 4:
        places, name = (0, 1, 2, 3), "ml-1m"
    elif sep == "\t" and len(fields) == 4:
        places, name = (0, 1, 2, 3), "ml-100k"
    else:
        places, name = (0, 1, 2, 3), "amazon"
    if mode and MODE_LAYOUT[mode] not in (name, "csv"):
        raise UserError(f"{path} is not laid out as --mode={mode} but as --mode={name}; give that mode")
    return Layout(name, places, sep, len(fields), header)


def find_sep(line):
    return next((sep for sep in ("::", "\t", ",", ";", "|") if sep in line), ",")


def named_columns(path, names):
    """(places of user, item, rating and time, layout name) by the names of a header."""
    lower = [name.lower() for name in names]
    found = [next((name for name in NAMES[role] if name in lower), None) for role in ROLES]
    if None in found[:3]:
        raise UserError(f"{path} has the columns {', '.join(names)}; say with --columns which are user, item, rating")
    places = tuple(None if name is None else lower.index(name) for name in found)
    return places, ITEM_NAME_LAYOUT.get(found[1], "csv")


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Reading a file


def read_columns(path, mode, columns=None, sep=None, skip_bad_rows=False, scale=None):
    """The file's rows as `Columns`."""
    if mode is not None and mode not in MODE_LAYOUT:
        raise UserError(f"--mode={mode} is not known; it is one of {', '.join(MODE_LAYOUT)}")
    if not path.is_file():
        raise UserError(f"there is no file {path}; give the ratings file with --data_path")
    layout, ids, parts = None, ({}, {}), []
    with path.open("rb") as file:
        for line, block in blocks(file):
            if layout is None:
                block = block.removeprefix(b"\xef\xbb\xbf")
                layout = recognise(path, block[:1 << 16].decode(errors="replace"), mode, columns, sep)
                if layout.header:
                    line, block = line + 1, block[block.find(b"\n") + 1 :]
            part = parse_block(block, layout)
            if part is None:
                raise UserError(f"{path} has rows that cannot be read after line {line}")
            users, items, ratings, times = part
            parts.append((number(users, ids[0]), number(items, ids[1]), ratings, times))
    if not sum(len(part[2]) for part in parts):
        raise UserError(f"{path} holds no ratings")
    users, items, ratings, times = (np.concatenate(column) for column in zip(*parts, strict=True))
    users, user_ids = ascending(users, ids[0])
    items, item_ids = ascending(items, ids[1])
    return Columns(users, items, ratings, times.astype(np.int64), user_ids, item_ids)


def blocks(file):
    """Pieces of whole lines of a binary file, each with the number of its first line, from 1."""
    line, rest = 1, b""
    while piece := file.read(BLOCK):
        rest += piece
        end = rest.rfind(b"\n") + 1
        if end:
            yield line, rest[:end]
            line, rest = line + rest.count(b"\n", 0, end), rest[end:]
    if rest:
        yield line, rest


def parse_block(block, layout):
    """A clean block's users, items (categorical), ratings and times; None where a row is not as it should be."""
    step = len(layout.sep)
    user, item, rating, time = (place * step for place in layout.columns)
    try:
        frame = pd.read_csv(
            io.BytesIO(block),
            sep=layout.sep[0],
            header=None,
            usecols=[user, item, rating, time],
            dtype={user: "category", item: "category", rating: "float32", time: "float64"},
            na_filter=False,
            quoting=csv.QUOTE_NONE,
            float_precision="round_trip",
            low_memory=False,
        )
    except (ValueError, OverflowError):
        return None
    return frame[user].array, frame[item].array, frame[rating].to_numpy(), frame[time].to_numpy()


def number(texts, ids):
    """Numbers (int32) of categorical ids; `ids` maps each id to its number and grows."""
    numbers = [ids.setdefault(text.strip(), len(ids)) for text in texts.categories]
    return np.array(numbers, dtype=np.int32)[texts.codes]


def ascending(numbers, ids):
    """(places in the ascending ids, the ascending ids) of numbers given by `number`."""
    texts = np.array(list(ids), dtype=str)
    try:
        integers = texts.astype(np.int64)
        values = integers if (integers.astype(str) == texts).all() else texts
    except (ValueError, OverflowError):
        values = texts
    order = np.argsort(values)
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order))
    return rank[numbers], values[order]
