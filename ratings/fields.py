"""The one place that parses ids, ratings and times, of text and of Arrow columns.

An id is text: two ids are equal if they have the same characters, apart from blanks around them, so 7, 007 and
7.0 are three ids. An integer column in Parquet stands for its decimal digits. Times keep the file's own unit and
resolution; dates are nanoseconds since 1970 (UTC).
"""

import itertools
import re
from datetime import datetime

import numpy as np
import pandas as pd
import pyarrow
from pyarrow import compute, types

from utils import UserError

NOT_UTF8 = re.compile("[\ud800-\udfff]")  # what bytes that are not UTF-8 are decoded to
LONGEST_ID = 128  # characters
ISO = "ISO8601"  # 2017-07-15 with a time or without, and 2017/07/15
CLOCKS = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p")
DAYS = [sep.join(order) for order in ("mdY", "dmY", "mdy", "dmy", "ymd") for sep in "/.-"]
DAYS = ["".join(f"%{letter}" if letter.isalpha() else letter for letter in day) for day in DAYS]
DAYS += ["%d %b %Y", "%d-%b-%Y", "%d/%b/%Y", "%b %d, %Y", "%d %B %Y", "%B %d, %Y", "%m %d, %Y"]
DATE_FORMATS = [day + clock for day, clock in itertools.product(DAYS, CLOCKS)]
DATE_FORMATS += ["%a, %d %b %Y %H:%M:%S %Z", "%a, %d %b %Y %H:%M:%S %z", "%d/%b/%Y:%H:%M:%S %z"]
DATE_FORMATS += ["%a %b %d %H:%M:%S %Y", "%a %b %d %H:%M:%S %z %Y"]  # of C, and Goodreads
DATE_FORMATS += ["%Y-%m-%d %H:%M:%S UTC", "%Y-%m-%d %H:%M:%S.%f UTC"]
SECONDS = {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}  # units in a second
EPOCH = 7e8, 2.2e9  # seconds that are taken for times: 1992 to 2039


# -----------------------------------------------------------------------------
# Ids: (number of each row's text or -1, Arrow array of texts)


def text_ids(texts):
    """Ids of a sequence of texts; what is not UTF-8 is no id."""
    return arrow_ids(pyarrow.array(["" if NOT_UTF8.search(text) else text for text in texts], "large_string"))


def arrow_ids(column):
    """Ids of an Arrow column of text or integers; `ArrowInvalid` for other columns and for what is not UTF-8."""
    column = column if types.is_dictionary(column.type) else column.dictionary_encode()
    kind = column.type.value_type
    if not (types.is_integer(kind) or types.is_null(kind) or "string" in str(kind) or "binary" in str(kind)):
        raise pyarrow.ArrowInvalid(f"ids of type {kind}: make them integers or text")
    texts = column.dictionary.cast("large_string").fill_null("")
    texts.validate(full=True)  # Arrow's JSON parser lets pass what is not UTF-8
    return column.indices.cast("int32").fill_null(-1).to_numpy(), compute.utf8_trim_whitespace(texts)


def usable(codes, texts):
    """(n,) whether each row's id is text of a sensible length."""
    lengths = compute.utf8_length(texts).to_numpy()
    good = (lengths > 0) & (lengths <= LONGEST_ID)
    good &= ~compute.match_substring(texts, "\0").to_numpy(zero_copy_only=False)
    return np.append(good, False)[codes]  # code -1: no id at all


def ascending_ids(arrays):
    """(places of all texts of `arrays` in the ascending ids, the distinct ids as text, ascending).

    Ids that are all integers as one writes them ascend as numbers.
    """
    coded = pyarrow.concat_arrays(arrays).dictionary_encode()
    keys = values = coded.dictionary
    try:
        numbers = values.cast("int64")
        if numbers.cast("large_string").equals(values):
            keys = numbers
    except pyarrow.ArrowInvalid:
        pass
    order = compute.array_sort_indices(keys).to_numpy()
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order))
    return rank[coded.indices.to_numpy()], np.array(values.take(order).to_pylist(), dtype=str)


# -----------------------------------------------------------------------------
# Ratings


def parse_numbers(texts):
    """(n,) float64 of texts, or int64 where all are whole; NaN for what is not a number."""
    numbers = pd.to_numeric(pd.Series(texts, dtype=object), errors="coerce").to_numpy()
    return numbers if numbers.dtype == np.int64 else numbers.astype(np.float64)


def arrow_numbers(column):
    """(n,) float64 of an Arrow column of numbers; NaN where there is none."""
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_boolean(column.type) or types.is_temporal(column.type):
        raise pyarrow.ArrowInvalid(f"{column.type} where numbers are expected")
    return column.cast("float64", safe=False).to_numpy(zero_copy_only=False)


# -----------------------------------------------------------------------------
# Times: (int64 or float64 keys that ascend with time, whether each row has one)


def parse_times(texts, form=None):
    """Times of texts: numbers, or dates of the format `form`."""
    if form is None:
        numbers = parse_numbers(texts)
        known = np.isfinite(numbers)
        exact = parse_numbers(np.array(texts, object)[known])  # int64 if it can be
        times = np.zeros(len(numbers), exact.dtype)
        times[known] = exact
    else:
        # pandas takes "now" and "today" for ISO dates, too.
        cells = [text if form != ISO or text.strip()[:1].isdigit() else "" for text in texts]
        dates = pd.to_datetime(pd.Series(cells, dtype=object).str.strip(), format=form, utc=True, errors="coerce")
        known = dates.notna().to_numpy()
        times = dates.dt.tz_localize(None).to_numpy().astype("datetime64[ns]").view(np.int64)
    return times, known & (np.abs(times.astype(np.float64)) < 9e18)


def arrow_times(column, form=None):
    """Times of an Arrow column of numbers, timestamps, dates or text."""
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if "string" in str(kind):
        codes, texts = arrow_ids(column)
        times, known = parse_times(texts.to_pylist(), form)
        return np.append(times, 0)[codes], np.append(known, False)[codes]
    if types.is_date32(kind):
        column = column.cast("int32")
    if types.is_temporal(kind) or types.is_integer(kind):
        return column.cast("int64").fill_null(0).to_numpy(), column.is_valid().to_numpy(zero_copy_only=False)
    times = arrow_numbers(column)
    return times, np.abs(times) < 9e18


def arrow_unit(kind):
    """Units of an Arrow column's times in a second; None where the column does not say."""
    if types.is_timestamp(kind):
        return SECONDS[kind.unit]
    return {"date32[day]": 1 / 86400, "date64[ms]": 1e3}.get(str(kind))


def guess_unit(times):
    """Units of numeric times in a second: 1, 1e3, 1e6 or 1e9; None for what is no time of the calendar."""
    typical = np.median(np.abs(times[:: max(1, len(times) // 1000)]))
    return next((unit for unit in SECONDS.values() if EPOCH[0] * 0.1 < typical / unit < EPOCH[1] * 10), None)


def date_format(path, texts):
    """The format in which the first of these dates and most others can be read; None where there is none.

    UserError where they can be read in two ways.
    """
    if parse_times(texts[:1], ISO)[1].all():
        return ISO
    found = {}
    for form in DATE_FORMATS:
        if fits(texts[0].strip(), form):
            times, known = parse_times(texts, form)
            found.setdefault((known.sum(), times[known].tobytes()), form)
    best = [form for (number, _), form in found.items() if number == max(found)[0]]
    if len(best) > 1:
        raise UserError(f"{path}: dates such as '{texts[0]}' can be read in two ways; write them as 2017-07-15")
    return best[0] if best else None


def fits(text, form):
    try:
        return bool(datetime.strptime(text, form))
    except ValueError:
        return False


def looks_like_times(path, texts):
    """Whether all of a column's texts are numbers of the calendar's size, or dates."""
    try:
        numbers = np.abs(parse_numbers(texts).astype(np.float64))
        if np.isfinite(numbers).any():
            return any(((EPOCH[0] < numbers / unit) & (numbers / unit < EPOCH[1])).all() for unit in SECONDS.values())
        form = date_format(path, texts)
        return form is not None and parse_times(texts, form)[1].all()
    except UserError:
        return True  # dates, though ambiguous
