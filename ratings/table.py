"""From the rows of a file to `Ratings`: where data sets lie, order, duplicates, filters, ids, scale."""

import bisect
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ratings import files
from ratings.download import EDITIONS, download_edition
from ratings.formats import check_options
from ratings.readers import read_columns
from utils import UserError, say

MOST_LEVELS = 20  # more distinct ratings than this are binned
ARRAYS = ("user_ids", "item_ids", "offsets", "items", "values", "times", "levels")  # of `Ratings`
MANY_ROWS = 1 << 22  # ordering more than this takes seconds

# Where data sets without a download are looked for, and where to get them.
PLACES = {
    "sample": (Path(__file__).parents[1] / "Data/sample/ratings.csv", "it comes with the source code"),
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

    user_ids: np.ndarray  # (n_users,) text, the file's, ascending; as numbers where every id is an integer
    item_ids: np.ndarray  # (n_items,) likewise
    offsets: np.ndarray  # (n_users + 1,) int64; user u's ratings are rows offsets[u]:offsets[u + 1]
    items: np.ndarray  # (n,) int32, places in item_ids
    values: np.ndarray  # (n,) float32, on the file's own scale
    times: np.ndarray  # (n,) int64 or float64, in the file's unit; row numbers where the file has no time
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
    check_options(options)
    edition, (path, source) = EDITIONS.get(options.mode), data_place(options)
    if edition and path.parts[-2:] == (edition.folder, edition.member):
        root = path.parent.parent
        files.remove_leftovers(root)
        if not os.path.exists(path):
            download_edition(options.mode, root, options.data_url)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no file {path}; {source}") from None
    except (OSError, ValueError) as error:
        raise files.cannot_read(path, error) from None
    return path


def load_columns(path, options):
    """(`Columns` by user and time, without duplicates; notes on what was dropped)."""
    scale = parse_scale(options.rating_scale)
    columns, notes = read_columns(path, options, scale)
    if scale is None:
        notes += point_out(columns.ratings)
    if len(columns.users) > MANY_ROWS:
        say(f"{path}: ordering {len(columns.users):,} ratings")
    columns = sort_rows(columns)
    twice = find_duplicates(columns)
    if twice.any():
        notes.append(f"dropped {twice.sum():,} ratings of an item that the same user rated again later")
        columns = take_rows(columns, ~twice)
    return columns, notes


def point_out(ratings):
    """Notes on a lowest or highest rating that stands apart from the others, as marks for "not rated" do."""
    levels = np.sort(pd.unique(ratings)).astype(float)
    if len(levels) < 3:
        return []
    gaps, found, notes = np.diff(levels), [], []
    if levels[0] <= 0 <= levels[1]:
        lonely = gaps[0] > 1.5 * gaps[1:].max() or (levels[0] < 0 and len(levels) > 4)
        counts = [np.count_nonzero(ratings == level) for level in levels[: MOST_LEVELS + 1]]
        if lonely or levels[0] == 0 and counts[0] > 2 * max(counts[1:]):
            found.append((levels[0], levels[1:]))
        elif levels[0] == 0 and 4 < len(levels) <= MOST_LEVELS:
            notes.append("the rating 0 is 'not rated' on most sites; if it is in this file, drop it with --unrated=0")
    if gaps[-1] > 3 * (levels[-2] - levels[0]):
        found.append((levels[-1], levels[:-1]))
    return notes + [
        f"the rating {level:g} stands apart from the others, {others[0]:g} to {others[-1]:g}; if it means 'not rated', "
        f"drop it with --unrated={level:g}"
        for level, others in found
    ]


def sort_rows(columns):
    """Rows by user and time; what is equal keeps its order."""
    first = int(columns.times.min())
    span = int(columns.times.max()) - first + 1
    whole = columns.times.dtype == np.int64
    if whole and span * len(columns.user_ids) < 2**63:  # one key for both, which sorts in a fraction of the time
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
    keep = kept_rows(columns, options.min_item, options.min_sequence)
    if not keep.any():
        raise UserError(nothing_left(columns, options))
    return columns if keep.all() else take_rows(columns, keep)


def kept_rows(columns, min_item, min_sequence):
    """(n,) whether the filters leave each row."""
    keep = np.ones(len(columns.users), bool)
    for codes, least in ((columns.items, min_item), (columns.users, min_sequence)):
        enough = np.bincount(codes[keep], minlength=codes.max() + 1) >= max(least, 1)
        keep &= enough[codes]
    return keep


def nothing_left(columns, options):
    """What to say where the filters leave nothing: the least change that leaves something."""

    def most(low, high, leaves):  # the largest number from low to high that leaves something; below low: none does
        high = min(high, len(columns.users))
        return bisect.bisect_left(range(low, high + 1), True, key=lambda n: not leaves(n)) + low - 1

    def leaves(min_item=options.min_item, min_sequence=options.min_sequence):
        return kept_rows(columns, min_item, min_sequence).any()

    item = most(1, options.min_item, leaves)
    sequence = most(2, options.min_sequence, lambda n: leaves(min_sequence=n))
    if item >= 1:
        advice = f"give --min_item={item}, which leaves something"
    elif sequence >= 2:
        advice = f"give --min_sequence={sequence}, which leaves something"
    else:
        sequence = most(2, options.min_sequence, lambda n: leaves(1, n))
        advice = f"give --min_item=1 --min_sequence={sequence}"
        advice = advice if sequence >= 2 else "no user has two ratings"
    return (
        f"the filters leave nothing: of {len(columns.users):,} ratings of {len(columns.item_ids):,} items by "
        f"{len(columns.user_ids):,} users, none is of an item with {options.min_item} or more and of a user who then "
        f"has {options.min_sequence} or more; {advice}"
    )


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
    for array in arrays.values():
        array.setflags(write=False)  # like those that come from the cache
    ratings = Ratings(**arrays, low=low, high=high, fingerprint="")
    return replace(ratings, fingerprint=fingerprint(ratings))


def fingerprint(ratings):
    """The digest of all arrays and of the scale."""
    digest = hashlib.sha256(f"{ratings.low} {ratings.high}".encode())
    for name in ARRAYS:
        array = getattr(ratings, name)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array)
    return digest.hexdigest()


def is_sound(ratings):
    """Whether ratings that were kept in a file are what `build_ratings` may give, and have their fingerprint."""
    offsets, values, levels, items = ratings.offsets, ratings.values, ratings.levels, ratings.items
    kinds = [getattr(ratings, name).dtype.str[1:] for name in ARRAYS]
    return bool(
        [kind[0] for kind in kinds[:2]] == ["U", "U"]
        and kinds[2:5] + kinds[6:] == ["i8", "i4", "f4", "f4"]
        and kinds[5] in ("i8", "f8")
        and -np.inf < ratings.low < ratings.high < np.inf
        and len(offsets) == len(ratings.user_ids) + 1 > 1
        and offsets[0] == 0
        and (np.diff(offsets) > 0).all()
        and offsets[-1] == len(items) == len(values) == len(ratings.times) > 0
        and 0 <= items.min() <= items.max() < len(ratings.item_ids)
        and ratings.low <= values.min() <= values.max() <= ratings.high
        and ratings.low <= levels.min() <= levels.max() <= ratings.high
        and (np.diff(levels) > 0).all()
        and fingerprint(ratings) == ratings.fingerprint
    )


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
