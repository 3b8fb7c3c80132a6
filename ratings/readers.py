"""Rating files of any layout, plain or compressed -> columns of users, items, ratings and times.

Text is read in blocks of whole lines. Arrow's parser takes a block that is clean; a careful reader takes any
other, and says which row is wrong and why. Both give the same columns for the same rows.
"""

import csv
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
from pyarrow import csv as arrow_csv
from pyarrow import json as arrow_json
from pyarrow import parquet
from tqdm import tqdm

from ratings import fields, files
from ratings.formats import BLANKS, NO_TIME, check_mode, check_options, choose_columns, is_number, parse_json, recognise
from utils import UserError, shorten

CAREFUL_BLOCK = 1 << 16  # bytes that are not worth cutting further
HEAD = 1 << 16  # bytes that the layout is told from
ID_TEXT = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
BAD_SHARE = 0.01  # of the rows that --skip_bad_rows may drop
ONE_USER = "me"  # the user of a file without a column of users
LONE_RETURN = re.compile(b"\r(?!\n)")

UNRATED, OUTSIDE = -1, -2  # rows that --unrated and --drop_outside drop; other problems are places in PROBLEMS
PROBLEMS = (  # what is wrong with a row, and the remedy
    ("", ""),
    ("it does not have the expected columns", "correct it, or check --sep and --columns"),
    ("its user id is empty, too long or not text", "correct it"),
    ("its item id is empty, too long or not text", "correct it"),
    ("its rating is not a number such as 4.5", "correct it, or name the file's marks for 'not rated' with --unrated"),
    (
        "its rating is outside the scale {0:g} to {1:g}",
        "correct it, name marks for 'not rated' with --unrated=VALUE, or drop all such rows with --drop_outside",
    ),
    (
        "its time is neither a number nor a date like those before it",
        "write all times as numbers, or as dates such as 2017-07-15 or 2017-07-15 10:30:00",
    ),
    ("it is not UTF-8", "give the file's --encoding, such as latin-1"),
)
NOT_UTF8 = 7


class Columns(NamedTuple):
    """All rows of a file in its order, ids as places in ascending lists of the distinct ones."""

    users: np.ndarray  # (n,) int32
    items: np.ndarray  # (n,) int32
    ratings: np.ndarray  # (n,) float32
    times: np.ndarray  # (n,) int64 or float64, ascending with time in the file's unit; without times, row numbers
    user_ids: np.ndarray  # (n_users,) text
    item_ids: np.ndarray  # (n_items,) text
    unit: float | None = None  # units of `times` in a second, counted from 1970; None: not known
    titles: dict | None = None  # item id -> title, in the files of one user that have both


class Rules(NamedTuple):
    """Which ratings count."""

    low: float = -np.inf
    high: float = np.inf
    marks: tuple = ()  # numbers that mean "not rated"
    texts: tuple = ()  # all such marks as they are written
    drop_outside: bool = False


class Part(NamedTuple):
    """The rows of one block; ids are pairs (number of each row's text, Arrow array of texts)."""

    users: tuple
    items: tuple
    ratings: np.ndarray  # (n,) float32
    times: np.ndarray | None  # (n,) int64 or float64; None: the file has no time
    problems: np.ndarray  # (n,) what is wrong with each row: 0, UNRATED, OUTSIDE or a place in PROBLEMS
    show: Callable  # the number of a row -> "line 7: its text"
    titles: tuple = ()


def read_columns(path, options, scale=None, one_user=False):
    """A file's rows as (`Columns`, notes on what was dropped or assumed).

    `options` are those of `add_layout_options` and `mode`, where None takes any layout that is recognised; `scale`
    is (low, high) or None. With `one_user`, a file without a column of users is one user's, such as the exports of
    MovieLens, Letterboxd, IMDb, Goodreads and MyAnimeList.

    Raises `UserError` for a file that is not what `mode` says, and for rows that cannot be read, unless
    `skip_bad_rows` and they are few.
    """
    path = Path(path)
    check_options(options)
    rules = row_rules(options, scale)
    try:
        with files.open_file(path) as (raw, file):
            if file is None:
                layout, parts = read_parquet(path, raw, options, rules)
                return gather(path, layout, parts, rules, options.skip_bad_rows)
            size = os.fstat(raw.fileno()).st_size
            with tqdm(total=size, desc=path.name, unit="B", unit_scale=True, delay=2, leave=False, disable=None) as bar:
                blocks = files.blocks(path, file, options.encoding, lambda: bar.update(raw.tell() - bar.n))
                layout, parts = read_text(path, blocks, options, rules, one_user)
                return gather(path, layout, parts, rules, options.skip_bad_rows)
    except MemoryError:
        raise UserError(f"out of memory: {path} needs more than there is; read a part of it") from None


def row_rules(options, scale):
    """The `Rules` of --unrated and --drop_outside for a scale (low, high) or None."""
    if options.drop_outside and scale is None:
        raise UserError("--drop_outside needs the scale: give --rating_scale=LOW:HIGH")
    texts = () if options.unrated is None else tuple(text.strip() for text in options.unrated.split(","))
    return Rules(*(scale or (-np.inf, np.inf)), numeric_marks(texts), texts, options.drop_outside)


def numeric_marks(texts):
    numbers = fields.parse_numbers(texts).astype(np.float32)
    return tuple(numbers[np.isfinite(numbers)].tolist())


# -----------------------------------------------------------------------------
# Text


def read_text(path, blocks, options, rules, one_user):
    """(`Layout`, the `Part`s of a text file's blocks)."""
    line, block = next(blocks, (1, b""))
    block = block.removeprefix(b"\xef\xbb\xbf")
    blank = len(block) - len(block.lstrip(b"\r\n"))
    line, block = line + block.count(b"\n", 0, blank), block[blank:]
    cut = block.find(b"\n", HEAD) + 1 or len(block)
    head, rest = (lambda part=part: part.decode("utf-8", "surrogateescape") for part in (block[:cut], block[cut:]))
    layout = recognise(path, head(), options, one_user, rest)
    if layout.export:
        rules = site_rules(layout.export, rules)
    if layout.header:
        cut = block.find(b"\n") + 1 or len(block)
        line, block = line + 1, block[cut:]

    def parts():
        yield from parse_block(path, block, line, layout, rules)
        for each_line, each in blocks:
            yield from parse_block(path, each, each_line, layout, rules)

    return layout, parts()


def site_rules(export, rules):
    """The `Rules` of a site's export: its own scale; no rating and 0 mean "not rated"."""
    texts = (*rules.texts, "", "0")
    return rules._replace(low=export.low, high=export.high, texts=texts, marks=numeric_marks(texts))


def parse_block(path, block, line, layout, rules):
    """The `Part`s of a block that begins in `line`: one, or more to keep the slow reader to the rows that need it."""
    if layout.sep == BLANKS:
        if b'"' in block:
            raise UserError(f"{path} has quotes in columns that are padded with blanks; separate its columns by tabs")
        block = re.sub(rb"(?m)^\t|\t(?=\r?$)", b"", re.sub(rb"[ \t]+", b"\t", block))
        layout = layout._replace(sep="\t")
    part = parse_clean(block, layout, rules)
    half = 0 if part or len(block) < CAREFUL_BLOCK else files.end_of_rows(block[: len(block) // 2])
    if half:
        yield from parse_block(path, block[:half], line, layout, rules)
        yield from parse_block(path, block[half:], line + block.count(b"\n", 0, half), layout, rules)
    else:
        yield part or parse_careful(block, line, layout, rules)


def parse_clean(block, layout, rules):
    """The `Part` of a block whose rows are all as they should be, by Arrow's parsers; None for any other."""
    if layout.places[0] is None:  # the small file of one user
        return None
    for number in ("int64", "float64"):  # of times: exact where they are whole
        try:
            columns = clean_columns(block, layout, rules, number)
            part = columns and parse_batch(columns, 0, layout.dates, rules)
            return part if part and not (part.problems > 0).any() else None
        except pyarrow.ArrowException:
            continue
    return None


def clean_columns(block, layout, rules, number):
    """Arrow columns of a block, numeric times of type `number`; None or `ArrowException` where it needs care."""
    kinds = ["string", "string", "float64", "string" if layout.dates else number]
    if layout.sep:
        return clean_delimited(block, layout, rules, [ID_TEXT if kind == "string" else kind for kind in kinds])
    columns = [(key, kind) for key, kind in zip(layout.places, kinds, strict=True) if key is not None]
    table = arrow_json.read_json(
        pyarrow.BufferReader(block),
        arrow_json.ReadOptions(block_size=len(block)),
        arrow_json.ParseOptions(explicit_schema=pyarrow.schema(columns), unexpected_field_behavior="ignore"),
    )
    if len(table) != block.count(b"\n") + (not block.endswith(b"\n")):
        return None
    return [table[key].combine_chunks() for key, _ in columns]


def clean_delimited(block, layout, rules, kinds):
    """Arrow columns of a block of delimited text; None or `ArrowException` where it needs care."""
    if LONE_RETURN.search(block):
        return None
    step = len(layout.sep)
    names = [str(place) for place in range((layout.width - 1) * step + 1)]
    used = [names[place * step] for place in layout.places if place is not None]
    table = arrow_csv.read_csv(
        pyarrow.BufferReader(block),
        arrow_csv.ReadOptions(column_names=names, block_size=len(block)),
        arrow_csv.ParseOptions(delimiter=layout.sep[0], newlines_in_values=True),
        arrow_csv.ConvertOptions(
            include_columns=used, column_types=dict(zip(used, kinds, strict=False)), null_values=rules.texts
        ),
    )
    if step > 1 and block.count(layout.sep.encode()) != len(table) * (layout.width - 1):
        return None
    return [column.combine_chunks() for column in table.columns]


def parse_careful(block, line, layout, rules):
    """The `Part` of any block, row by row; rows that cannot be read have their problem noted."""
    text = block.decode("utf-8", "surrogateescape")
    rows = list(delimited_rows(text, layout) if layout.sep else json_rows(text, layout))
    starts = np.array([start for start, _ in rows], np.int64)
    cells = [cells or ("",) * 6 for _, cells in rows]
    users, items, ratings, times, titles, years = zip(*cells, strict=True) if cells else ((),) * 6
    if layout.title:
        titles = [f"{title} ({year})" if year else title for title, year in zip(titles, years, strict=True)]
    if layout.places[0] is None:
        users = [ONE_USER] * len(rows)
        items = titles if layout.title and layout.title[0] == layout.places[1] else items
    unrated = np.array([text.strip() in rules.texts for text in ratings], bool)
    with np.errstate(over="ignore"):
        ratings = fields.parse_numbers(ratings).astype(np.float32)
    times = None if layout.places[3] is None else careful_times(times, layout)
    part = make_part(fields.text_ids(users), fields.text_ids(items), ratings, times, unrated, rules)
    part.problems[[bool(fields.NOT_UTF8.search("".join(row))) for row in cells]] = NOT_UTF8
    part.problems[[cells is None for _, cells in rows]] = 1
    lines = text.split("\n")
    show = lambda row: f"line {starts[row] + line}: '{shorten(lines[starts[row]])}'"  # noqa: E731
    return part._replace(show=show, titles=tuple(zip(items, titles, strict=True)) if layout.title else ())


def careful_times(texts, layout):
    """Times of texts, as `fields.parse_times`; ratings without a date in a site's export are the oldest."""
    times, known = fields.parse_times(texts, layout.dates)
    if layout.export and known.any():
        undated = np.array([not text.strip("0-/ ") for text in texts]) & ~known
        times[undated] = times[known].min() - 1
        known |= undated
    return times, known


def delimited_rows(text, layout):
    """(first line from 0, user, item, rating, time, title and year) of each row; None where it is not whole."""
    step = len(layout.sep)
    width = (layout.width - 1) * step + 1
    places = [None if place is None else place * step for place in (*layout.places, *(layout.title or (None, None)))]
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
            yield start, tuple("" if place is None else cells[place] for place in places) if whole else None


def json_rows(text, layout):
    """(line from 0, user, item, rating, time, title and year as text) of each row; None for what lacks them."""
    keys = (*layout.places, *(layout.title or (None, None)))
    for start, line in enumerate(text.split("\n")):
        if line and not line.isspace():
            record, values = parse_json(line), [None]
            if isinstance(record, dict):
                values = ["" if key is None else record.get(key) for key in keys]
                values = ["" if value is None and i in (2, 4, 5) else value for i, value in enumerate(values)]
            yield start, tuple(values) if all(isinstance(value, str) for value in values) else None


def make_part(users, items, ratings, times, unrated, rules):
    """A `Part`, with each row's first problem; `times` is (keys, known) or None."""
    keys, known = times or (None, np.full(len(ratings), True))
    low, high = np.array([rules.low, rules.high], np.float32)
    unrated = unrated | np.isin(ratings, rules.marks) if rules.marks else unrated
    found = [unrated, ~fields.usable(*users), ~fields.usable(*items), ~np.isfinite(ratings)]
    found += [(ratings < low) | (ratings > high), ~known]
    problems = np.select(found, [UNRATED, 2, 3, 4, OUTSIDE if rules.drop_outside else 5, 6])
    return Part(users, items, ratings, keys, problems, show=str)


def parse_batch(columns, first, dates, rules):
    """The `Part` of Arrow columns user, item, rating and perhaps time, whose first row is number `first`."""
    user, item, rating, *time = columns
    with np.errstate(over="ignore"):  # what is too large for float32 is infinite, and refused
        ratings = fields.arrow_numbers(rating).astype(np.float32)
    times = fields.arrow_times(time[0], dates) if time else None
    unrated = rating.is_null().to_numpy(zero_copy_only=False) & bool(rules.texts)
    part = make_part(fields.arrow_ids(user), fields.arrow_ids(item), ratings, times, unrated, rules)
    return part._replace(
        show=lambda row: f"row {first + row}: '{shorten(', '.join(str(column[row]) for column in columns))}'"
    )


# -----------------------------------------------------------------------------
# Parquet


def read_parquet(path, raw, options, rules):
    """(`Layout`, the `Part`s of a Parquet file's batches of rows)."""
    check_mode(path, "parquet", options.mode)
    try:
        file = parquet.ParquetFile(raw)
        schema = file.schema_arrow
        layout = choose_columns(path, schema.names, options.columns, False)
        used = [place for place in layout.places if place is not None]
        names = [schema.names[place] for place in used]
        read = [place for place, name in enumerate(schema.names) if name in names]  # two may have one name
        order = [read.index(place) for place in used]
        unit = fields.arrow_unit(schema.field(used[3]).type) if len(used) > 3 else None
        batches = file.iter_batches(1 << 20, columns=names)
        start = next(batches, None)
        dates = text_dates(path, start.column(order[3])) if start and len(used) > 3 else None
    except (pyarrow.ArrowException, KeyError, *files.DAMAGED) as error:
        raise not_parquet(path, error) from None
    notes = () if len(used) > 3 else (NO_TIME,)

    def parts():
        first, batch = 1, start
        try:
            while batch is not None:
                yield parse_batch(batch.select(order).columns, first, dates, rules)
                first, batch = first + len(batch), next(batches, None)
        except (pyarrow.ArrowException, *files.DAMAGED) as error:
            raise not_parquet(path, error) from None

    return layout._replace(dates=dates, unit=unit, notes=notes), parts()


def not_parquet(path, error):
    reason = shorten(str(error), 200)
    return UserError(f"cannot read {path} as Parquet ({reason}); is it damaged, or a column not of ratings?")


def text_dates(path, column):
    """The format of an Arrow column of dates as text; None for other columns."""
    if "string" not in str(column.type):
        return None
    _, texts = fields.arrow_ids(column)
    texts = [text for text in texts.to_pylist() if text]
    return None if not texts or is_number(texts[0]) else fields.date_format(path, texts) or fields.ISO


# -----------------------------------------------------------------------------
# From parts to columns


def gather(path, layout, parts, rules, skip_bad_rows):
    """All `parts` as one (`Columns`, notes on what was dropped or assumed)."""
    columns = [Growing(dtype) for dtype in (np.int32, np.int32, np.float32, np.int64)]
    ids, titles, examples, n_rows = ([], []), {}, [], 0
    n_bad = n_unrated = n_outside = 0
    scale = layout.export or rules
    for part in parts:
        bad = np.flatnonzero(part.problems > 0)
        examples += [(part.show(row), *PROBLEMS[part.problems[row]]) for row in bad[: 3 - len(examples)]]
        good = part.problems == 0
        if good.any():
            columns[0].append(number(*part.users, good, ids[0]))
            columns[1].append(number(*part.items, good, ids[1]))
            columns[2].append(part.ratings[good])
            columns[3].append(n_rows + np.flatnonzero(good) if part.times is None else part.times[good])
            titles.update((item.strip(), title) for item, title in part.titles)
        n_rows, n_bad = n_rows + len(good), n_bad + len(bad)
        n_unrated += np.count_nonzero(part.problems == UNRATED)
        n_outside += np.count_nonzero(part.problems == OUTSIDE)
        if n_bad > max(100, BAD_SHARE * n_rows) and not skip_bad_rows:
            break
    bad = [f"{place}: {what.format(scale.low, scale.high)}" for place, what, _ in examples]
    if n_bad > BAD_SHARE * n_rows * skip_bad_rows:
        raise UserError(refusal(path, bad, examples[0][2], n_bad, n_rows, skip_bad_rows))
    if not n_rows:
        raise UserError(f"{path} holds no ratings: it is empty, or a header alone")
    dropped = {
        f"that cannot be read: {'; '.join(bad)}": n_bad,
        "that are marked as not rated": n_unrated,
        f"whose rating is outside the scale {scale.low:g} to {scale.high:g}": n_outside,
    }
    notes = [*layout.notes, *(f"dropped {n:,} of {n_rows:,} rows {what}" for what, n in dropped.items() if n)]
    users, items, ratings, times = (column.whole() for column in columns)
    if not len(users):
        raise UserError(f"{path} holds no ratings: {', '.join(notes)}")
    users, user_ids = ascending(users, ids[0])
    items, item_ids = ascending(items, ids[1])
    if layout.places[0] is None:
        check_one_user(path, layout, items)
        ratings, more = fit_scale(ratings, layout.export, rules)
        notes += more
    unit = layout.unit or (fields.SECONDS["ns"] if layout.dates else fields.guess_unit(times))
    unit = None if layout.places[3] is None else unit
    return Columns(users, items, ratings, times, user_ids, item_ids, unit, titles or None), notes


def refusal(path, bad, remedy, n_bad, n_rows, skip_bad_rows):
    """What to say of rows that cannot be read and may not be dropped."""
    if skip_bad_rows:
        return (
            f"{path}: {n_bad:,} of {n_rows:,} rows cannot be read, more than the {BAD_SHARE:.0%} that "
            f"--skip_bad_rows drops; the first: {'; '.join(bad)}; {remedy}"
        )
    skip = ", or drop such rows with --skip_bad_rows" if n_bad <= BAD_SHARE * n_rows else ""
    return f"{path}, {bad[0]}; {remedy}{skip}"


def check_one_user(path, layout, items):
    """Refuse a file without a column of users where an item occurs twice, unless a site wrote it."""
    if not layout.export and len(np.unique(items)) < len(items):
        raise UserError(
            f"{path} rates an item twice, so it may be of several users, but no column of users is known; "
            "name it with --mode=csv --columns=user:NAME,item:NAME,rating:NAME"
        )


def fit_scale(ratings, export, rules):
    """(a site's ratings on the scale of `rules`, notes): a 10 of 10 is a 5 of 5."""
    if not export or not np.isfinite(rules.high):
        return ratings, []
    fitted = ratings * np.float32(rules.high / export.high)
    outside = int(np.count_nonzero(fitted < np.float32(rules.low)))
    notes = [f"its ratings are multiplied by {rules.high / export.high:g}"] * (rules.high != export.high)
    notes += [f"{outside:,} ratings below {rules.low:g} are taken as {rules.low:g}"] * (outside > 0)
    return np.maximum(fitted, np.float32(rules.low)), notes


class Growing:
    """An array that grows in place; joining a list of parts would take the memory twice."""

    def __init__(self, dtype):
        self.data, self.used = np.empty(0, dtype), 0

    def append(self, values):
        if values.dtype == np.float64 and self.data.dtype == np.int64:
            self.data = self.data.astype(np.float64)
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


def ascending(numbers, arrays):
    """(places in the ascending ids, the ascending ids) of places in `arrays`, where ids are repeated."""
    places, ids = fields.ascending_ids(arrays)
    arrays.clear()  # they may take a gigabyte
    return places[numbers], ids
