"""Rating files of any layout, plain or compressed -> columns of users, items, ratings and times.

Text is read in blocks of whole lines. Arrow's parser takes a block that is clean; a careful reader takes any
other, and says which row is wrong and why. Both give the same columns for the same rows.
"""

import bz2
import csv
import gzip
import io
import lzma
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow
from pyarrow import compute, parquet
from pyarrow import csv as arrow_csv
from pyarrow import json as arrow_json
from tqdm import tqdm

from ratings.formats import NOT_UTF8, check_mode, check_options, choose_columns, parse_json, recognise, shown
from utils import UserError

BLOCK = 1 << 25  # bytes of text parsed at a time
CAREFUL_BLOCK = 1 << 16  # bytes that are not worth cutting further
ID_TEXT = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
LONGEST_ID = 128  # characters
BAD_SHARE = 0.01  # of the rows that --skip_bad_rows may drop
PROBLEMS = (
    "",
    "it does not have the expected columns",
    "its user id is empty, too long or not text",
    "its item id is empty, too long or not text",
    "its rating is not a number",
    "its rating is outside --rating_scale",
    "its time is neither a number nor a date",
)
LONE_RETURN = re.compile(b"\r(?!\n)")

OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
ZIP_MEMBERS = ("ratings.dat", "ratings.csv", "u.data", "yelp_academic_dataset_review.json")
DAMAGED = (
    *(EOFError, OSError, RuntimeError, ValueError, struct.error),
    *(zlib.error, lzma.LZMAError, zipfile.BadZipFile),
)


class Table(NamedTuple):
    """All rows of a file in its order, with its own ids."""

    users: np.ndarray  # (n,) int64 where every id is an integer, else text
    items: np.ndarray  # (n,) likewise
    ratings: np.ndarray  # (n,) float32
    times: np.ndarray  # (n,) int64, seconds; row numbers where the file has no time


class Columns(NamedTuple):
    """All rows of a file in its order, ids as places in ascending lists of the distinct ones."""

    users: np.ndarray  # (n,) int32
    items: np.ndarray  # (n,) int32
    ratings: np.ndarray  # (n,) float32
    times: np.ndarray  # (n,) int64
    user_ids: np.ndarray  # (n_users,)
    item_ids: np.ndarray  # (n_items,)


class Part(NamedTuple):
    """The rows of one block; ids are pairs (number of each row's text, Arrow array of texts)."""

    users: tuple
    items: tuple
    ratings: np.ndarray  # (n,) float32
    times: np.ndarray | None  # (n,) float64; None: the file has no time
    problems: np.ndarray  # (n,) what is wrong with each row, a place in PROBLEMS
    show: Callable  # the number of a row -> "line 7: its text"


def read_table(path, mode=None, columns=None, sep=None, skip_bad_rows=False):
    """A file's rows as they are, as a `Table`; `mode=None` takes any layout that is recognised."""
    read, _ = read_columns(path, mode, columns, sep, skip_bad_rows)
    return Table(read.user_ids[read.users], read.item_ids[read.items], read.ratings, read.times)


def read_columns(path, mode=None, columns=None, sep=None, skip_bad_rows=False, scale=None):
    """A file's rows as (`Columns`, notes on what was dropped or assumed); `scale` is (low, high) or None.

    Raises `UserError` for a file that is not what `mode` says, and for rows that cannot be read, unless
    `skip_bad_rows` and they are few.
    """
    path = Path(path)
    check_options(mode, columns, sep)
    with open_file(path) as (raw, file):
        if raw.peek(4).startswith(b"PAR1"):
            check_mode(path, "parquet", mode)
            return gather(path, parquet_parts(path, columns, scale), skip_bad_rows)
        size = path.stat().st_size
        with tqdm(total=size, desc=path.name, unit="B", unit_scale=True, delay=2, leave=False, disable=None) as bar:
            pieces = blocks(path, file, lambda: bar.update(raw.tell() - bar.n))
            return gather(path, text_parts(path, pieces, mode, columns, sep, scale), skip_bad_rows)


# -----------------------------------------------------------------------------
# Files and blocks


def open_raw(path):
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the ratings file in it")
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"cannot open {path}: {error.strerror}") from None


@contextmanager
def open_file(path):
    """(the file itself, its bytes decompressed), as its first bytes say."""
    with open_raw(path) as raw:
        magic = raw.peek(6)
        if magic.startswith((b"PK\3\4", b"PK\5\6")):
            yield raw, open_zip(path, raw)
        else:
            opener = next((OPENERS[start] for start in OPENERS if magic.startswith(start)), None)
            yield raw, opener(raw) if opener else raw


def open_zip(path, raw):
    """The ratings in a zip archive: the member of a known name, or the only one."""
    try:
        archive = zipfile.ZipFile(raw)
        members = [name for name in archive.namelist() if not name.endswith("/")]
        known = [name for name in members if name.rsplit("/", 1)[-1] in ZIP_MEMBERS] or members
        if len(known) == 1:
            return archive.open(known[0])
    except DAMAGED as error:
        raise damaged(path, error) from None
    listed = ", ".join(members[:5]) + (", ..." if len(members) > 5 else "")
    raise UserError(
        f"{path} holds {shown(listed, 200) or 'nothing'}, not one ratings file; unpack it and name the file"
    )


def damaged(path, error):
    reason = shown(str(error), 200) or type(error).__name__
    return UserError(f"{path} is damaged or was not copied completely ({reason}); fetch it again")


def blocks(path, file, progress):
    """Pieces of whole lines of a binary file, each with the number of its first line, from 1."""
    line, rest = 1, b""
    while True:
        try:
            piece = file.read(BLOCK)
        except DAMAGED as error:
            raise damaged(path, error) from None
        progress()
        rest += piece
        end = end_of_rows(rest) if piece else len(rest)
        if end:
            yield line, rest[:end]
            line, rest = line + rest.count(b"\n", 0, end), rest[end:]
        if not piece:
            return
        if len(rest) > BLOCK:
            raise UserError(f"{path}, line {line}: no line end in {len(rest):,} bytes; is this a text file?")


def end_of_rows(block):
    """Where the last whole row ends: at a line end outside of quotes, if there is one."""
    last = end = block.rfind(b"\n") + 1
    inside = block.count(b'"', 0, end) % 2
    while inside and end:
        start = block.rfind(b"\n", 0, block.rfind(b'"', 0, end)) + 1
        inside ^= block.count(b'"', start, end) % 2
        end = start
    return end or last


# -----------------------------------------------------------------------------
# Parsing blocks


def text_parts(path, pieces, mode, columns, sep, scale):
    """The `Part`s of a text file's blocks."""
    layout = None
    for line, block in pieces:
        if layout is None:
            block = block.removeprefix(b"\xef\xbb\xbf")
            blank = len(block) - len(block.lstrip(b"\r\n"))
            line, block = line + block.count(b"\n", 0, blank), block[blank:]
            head = block[: block.find(b"\n", 1 << 16) + 1 or len(block)].decode("utf-8", "surrogateescape")
            layout = recognise(path, head, mode, columns, sep)
            if layout.header:
                end = block.find(b"\n") + 1 or len(block)
                line, block = line + 1, block[end:]
        yield from parse_block(block, line, layout, scale)


def parse_block(block, line, layout, scale):
    """The `Part`s of a block that begins in `line`: one, or more to keep the slow reader to the rows that need it."""
    part = parse_clean(block, layout, scale)
    half = 0 if part or len(block) < CAREFUL_BLOCK else end_of_rows(block[: len(block) // 2])
    if half:
        yield from parse_block(block[:half], line, layout, scale)
        yield from parse_block(block[half:], line + block.count(b"\n", 0, half), layout, scale)
    else:
        yield part or parse_careful(block, line, layout, scale)


def parse_clean(block, layout, scale):
    """The `Part` of a block whose rows are all as they should be, by Arrow's parsers; None for any other."""
    try:
        columns = clean_delimited(block, layout) if layout.sep else clean_json(block, layout)
        part = columns and parse_batch(columns, 0, scale)
    except pyarrow.ArrowException:
        return None
    return part if part and not part.problems.any() else None


def clean_delimited(block, layout):
    """Arrow columns of a block of delimited text; None or `ArrowException` where it needs care."""
    if LONE_RETURN.search(block):
        return None
    step = len(layout.sep)
    names = [str(place) for place in range((layout.width - 1) * step + 1)]
    used = [names[place * step] for place in layout.places if place is not None]
    kinds = [ID_TEXT, ID_TEXT, "float64", ID_TEXT if layout.dated else "float64"]
    table = arrow_csv.read_csv(
        pyarrow.BufferReader(block),
        arrow_csv.ReadOptions(column_names=names, block_size=len(block)),
        arrow_csv.ParseOptions(delimiter=layout.sep[0], newlines_in_values=True),
        arrow_csv.ConvertOptions(
            include_columns=used, column_types=dict(zip(used, kinds, strict=False)), null_values=[]
        ),
    )
    if step > 1 and block.count(layout.sep.encode()) != len(table) * (layout.width - 1):
        return None
    return [column.combine_chunks() for column in table.columns]


def clean_json(block, layout):
    """Arrow columns of a block of JSON lines; None or `ArrowException` where it needs care."""
    kinds = ["string", "string", "float64", "string" if layout.dated else "float64"]
    fields = [(key, kind) for key, kind in zip(layout.places, kinds, strict=True) if key is not None]
    table = arrow_json.read_json(
        pyarrow.BufferReader(block),
        arrow_json.ReadOptions(block_size=len(block)),
        arrow_json.ParseOptions(explicit_schema=pyarrow.schema(fields), unexpected_field_behavior="ignore"),
    )
    if len(table) != block.count(b"\n") + (not block.endswith(b"\n")):
        return None
    return [table[key].combine_chunks() for key, _ in fields]


def parse_careful(block, line, layout, scale):
    """The `Part` of any block, row by row; rows that cannot be read have their problem noted."""
    text = block.decode("utf-8", "surrogateescape")
    rows = list(delimited_rows(text, layout) if layout.sep else json_rows(text, layout))
    starts = np.array([start for start, _ in rows], np.int64)
    cells = [cells or ("",) * 4 for _, cells in rows]
    users, items, ratings, times = zip(*cells, strict=True) if cells else ((),) * 4
    with np.errstate(over="ignore"):
        ratings = parse_numbers(ratings).astype(np.float32)
    times = None if layout.places[3] is None else parse_times(times)
    part = make_part(text_ids(users), text_ids(items), ratings, times, scale)
    part.problems[[cells is None for _, cells in rows]] = 1
    lines = text.split("\n")
    return part._replace(show=lambda row: f"line {starts[row] + line}: '{shown(lines[starts[row]])}'")


def delimited_rows(text, layout):
    """(first line from 0, cells of user, item, rating and time) of each row; None where it is not whole."""
    step = len(layout.sep)
    width = (layout.width - 1) * step + 1
    places = [0 if place is None else place * step for place in layout.places]
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=layout.sep[0])
    while True:
        start = reader.line_num
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            cells = ["unreadable"]
        if len(cells) > 1 or "".join(cells).strip():
            whole = len(cells) == width and not any(cells[i] for i in range(width) if i % step)
            yield start, tuple(cells[place] for place in places) if whole else None


def json_rows(text, layout):
    """(line from 0, user, item, rating and time as text) of each row; None for what does not have them."""
    keys = [layout.places[0] if key is None else key for key in layout.places]
    for start, line in enumerate(text.split("\n")):
        if line and not line.isspace():
            record = parse_json(line)
            values = [record.get(key) for key in keys] if isinstance(record, dict) else [None]
            plain = all(type(value) in (str, int, float) for value in values)
            yield start, tuple(map(str, values)) if plain else None


def make_part(users, items, ratings, times, scale):
    """A `Part`, with each row's first problem."""
    low, high = np.array(scale or (-np.inf, np.inf), np.float32)
    fine = (
        usable(*users),
        usable(*items),
        np.isfinite(ratings),
        (ratings >= low) & (ratings <= high),
        np.full(len(ratings), True) if times is None else np.abs(times) < 9e18,  # as int64 holds; NaN is not less
    )
    problems = np.select([~good for good in fine], range(2, len(PROBLEMS)))
    return Part(users, items, ratings, times, problems, show=str)


def usable(codes, texts):
    """(n,) whether each row's id is text of a sensible length."""
    lengths = compute.utf8_length(texts).to_numpy()
    good = (lengths > 0) & (lengths <= LONGEST_ID)
    good &= ~compute.match_substring(texts, "\0").to_numpy(zero_copy_only=False)
    return np.append(good, False)[codes]  # code -1: no id at all


def text_ids(texts):
    """(codes, texts) of a sequence of texts; what is not UTF-8 is none."""
    return arrow_ids(pyarrow.array(["" if NOT_UTF8.search(text) else text for text in texts], "large_string"))


def parse_numbers(texts):
    """(n,) float64 of texts; NaN for what is not a number."""
    return pd.to_numeric(pd.Series(texts, dtype=object), errors="coerce").to_numpy(np.float64)


def parse_times(texts):
    """(n,) float64 of texts: numbers as they are, ISO dates in seconds (UTC), NaN for what is neither."""
    times = parse_numbers(texts)
    dated = np.flatnonzero(np.isnan(times))
    if len(dated):
        # Only what begins with a digit: pandas takes "now" and "today" for dates too.
        dates = [texts[i] if texts[i].strip()[:1].isdigit() else "" for i in dated]
        dates = pd.to_datetime(pd.Series(dates), format="ISO8601", utc=True, errors="coerce")
        times[dated] = (dates - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
    return times


# -----------------------------------------------------------------------------
# Parquet


def parquet_parts(path, columns, scale):
    """The `Part`s of a Parquet file's batches of rows."""
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        places, _ = choose_columns(path, names, columns)
        names = [names[place] for place in places if place is not None]
        first = 1
        for batch in file.iter_batches(1 << 20, columns=names):
            yield parse_batch(batch.select(names).columns, first, scale)
            first += len(batch)
    except (pyarrow.ArrowException, *DAMAGED) as error:
        raise UserError(
            f"cannot read {path} as Parquet ({shown(str(error), 200)}); is it damaged, or a column not of ratings?"
        ) from None


def parse_batch(columns, first, scale):
    """The `Part` of Arrow columns user, item, rating and perhaps time, whose first row is number `first`."""
    user, item, rating, *time = columns
    with np.errstate(over="ignore"):  # what is too large for float32 is infinite, and refused
        ratings = arrow_numbers(rating).astype(np.float32)
    times = arrow_times(time[0]) if time else None
    part = make_part(arrow_ids(user), arrow_ids(item), ratings, times, scale)
    return part._replace(
        show=lambda row: f"row {first + row}: '{shown(', '.join(str(column[row]) for column in columns))}'"
    )


def arrow_ids(column):
    """(codes, texts) of an Arrow column of ids; code -1 where there is none, `ArrowInvalid` if not UTF-8."""
    column = column.dictionary_encode()
    texts = column.dictionary.cast("large_string").fill_null("")
    texts.validate(full=True)  # Arrow's JSON parser lets pass what is not UTF-8
    return column.indices.fill_null(-1).to_numpy(), compute.utf8_trim_whitespace(texts)


def arrow_numbers(column):
    """An Arrow column of numbers as float64; NaN where there is none."""
    return column.cast("float64", safe=False).to_numpy(zero_copy_only=False)


def arrow_times(column):
    """Seconds (float64) of an Arrow column of times, dates, text or numbers."""
    kind = str(column.type)
    if "string" in kind:
        codes, texts = arrow_ids(column)
        return np.append(parse_times(texts.to_pylist()), np.nan)[codes]
    if kind.startswith(("timestamp", "date")):
        return arrow_numbers(column.cast("timestamp[ms]", safe=False).cast("int64")) / 1000
    return arrow_numbers(column)


# -----------------------------------------------------------------------------
# From parts to columns


def gather(path, parts, skip_bad_rows):
    """All `parts` as one (`Columns`, notes on what was dropped or assumed)."""
    columns = [Growing(dtype) for dtype in (np.int32, np.int32, np.float32, np.int64)]
    ids, unit, timed, n_rows, n_bad, shown = ([], []), None, True, 0, 0, []
    for part in parts:
        bad = np.flatnonzero(part.problems)
        shown += [f"{part.show(row)}: {PROBLEMS[part.problems[row]]}" for row in bad[: 3 - len(shown)]]
        if shown and not skip_bad_rows:
            raise UserError(f"{path}, {shown[0]}; correct it, or drop such rows with --skip_bad_rows")
        good = part.problems == 0
        if good.any():
            timed = part.times is not None
            times = part.times[good] if timed else n_rows + np.flatnonzero(good)
            unit = unit or (time_unit(times) if timed else 1)
            columns[0].append(number(*part.users, good, ids[0]))
            columns[1].append(number(*part.items, good, ids[1]))
            columns[2].append(part.ratings[good])
            columns[3].append(np.floor(times / unit))
        n_rows, n_bad = n_rows + len(good), n_bad + len(bad)
    if n_bad > BAD_SHARE * n_rows:
        raise UserError(
            f"{path}: {n_bad:,} of {n_rows:,} rows cannot be read, more than the {BAD_SHARE:.0%} that "
            f"--skip_bad_rows drops; the first: {'; '.join(shown)}"
        )
    if not n_rows:
        raise UserError(f"{path} holds no ratings: it is empty, or a header alone")
    notes = [f"dropped {n_bad:,} of {n_rows:,} rows that cannot be read: {'; '.join(shown)}"] * (n_bad > 0)
    notes += ["there is no time column, so each user's ratings keep the order of the file"] * (not timed)
    users, items, ratings, times = (column.whole() for column in columns)
    users, user_ids = ascending(users, ids[0])
    items, item_ids = ascending(items, ids[1])
    return Columns(users, items, ratings, times, user_ids, item_ids), notes


class Growing:
    """An array that grows in its place: a list of parts, joined in the end, would take the memory twice."""

    def __init__(self, dtype):
        self.data, self.used = np.empty(0, dtype), 0

    def append(self, values):
        end = self.used + len(values)
        if end > len(self.data):
            self.data.resize(end + end // 8, refcheck=False)
        self.data[self.used : end] = values
        self.used = end

    def whole(self):
        self.data.resize(self.used, refcheck=False)
        return self.data


def number(codes, texts, good, ids):
    """Places of the `good` rows' texts in the arrays `ids` together, to which this block's are added."""
    first = sum(map(len, ids))
    if not good.all():  # the other rows' texts are no ids
        used, codes = np.unique(codes[good], return_inverse=True)
        texts = texts.take(used)
    ids.append(texts)
    return codes + first


def time_unit(times):
    """How many of the times' units make a second: they are seconds, or milli-, micro- or nanoseconds."""
    typical = np.median(np.abs(times))
    return next((unit for unit in (1, 1e3, 1e6) if typical < 1e11 * unit), 1e9)


def ascending(numbers, ids):
    """(places in the ascending ids, the ascending ids) of places in the arrays `ids`, where ids are repeated."""
    texts = pyarrow.concat_arrays(ids)
    ids.clear()  # they may take a gigabyte
    coded = texts.dictionary_encode()
    values = coded.dictionary
    try:
        integers = values.cast("int64")
        if integers.cast("large_string").equals(values):  # not 007, which is not 7
            values = integers
    except pyarrow.ArrowInvalid:
        pass
    order = compute.array_sort_indices(values).to_numpy()
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order))
    values = values.take(order)
    distinct = values.to_numpy() if values.type == "int64" else np.array(values.to_pylist(), dtype=str)
    return rank[coded.indices.to_numpy()][numbers], distinct
