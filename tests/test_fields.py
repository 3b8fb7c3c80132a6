"""Ids, ratings and times: exact, ordered as the file orders them, right or refused in every Parquet type."""

import datetime
import decimal
import json

import numpy as np
import pandas as pd
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from test_datasets import data_options, read, save

from ratings import cache, fields, readers, table
from utils import UserError

fast = settings(deadline=None, suppress_health_check=list(HealthCheck))


def loaded(path, **options):
    """{user: [(item, rating)] in order of time}, after duplicates are dropped."""
    ratings = cache.load_ratings(data_options(data_path=str(path), rating_scale="0:100", **options))
    items, ends = ratings.item_ids[ratings.items].tolist(), ratings.offsets
    pairs = list(zip(items, ratings.values.tolist(), strict=True))
    return {user: pairs[ends[i] : ends[i + 1]] for i, user in enumerate(ratings.user_ids.tolist())}


# -----------------------------------------------------------------------------
# Times

UNITS = {
    "seconds": "{}",
    "milliseconds": "1700000000{:03}",
    "nanoseconds": "1700000000000000{:03}",
    "fractions of a second": "1700000000.{:03}",
    "fractions of a day": "19000.{:03}",
    "years": "2{:03}",
    "zero to one": "0.{:03}",
    "negative numbers": "-0.{:03}",
    "ISO dates": "2023-11-14T22:13:20.{:03}Z",
    "dates with a clock": "11/14/2023 22:13:{:02}",
}


@pytest.mark.parametrize("layout", ["csv", "json", "parquet"])
@pytest.mark.parametrize("unit", UNITS)
def test_times_order_at_the_files_own_resolution(tmp_path, unit, layout):
    marks = [9, 1, 5, 30, 2, 31]
    times = [UNITS[unit].format(mark) for mark in marks]
    rows = [(1, item, item % 5, time) for item, time in zip((4, 1, 2, 3, 1, 2), times, strict=True)]
    frame = pd.DataFrame(rows, columns=["user", "item", "rating", "time"])
    path = tmp_path / "ratings"
    numeric = unit not in ("ISO dates", "dates with a clock")
    if layout == "csv":
        frame.to_csv(path, index=False)
    elif layout == "json":
        records = (
            [
                {
                    **record,
                    "time": json.loads(record["time"]) if numeric and "." not in record["time"] else record["time"],
                }
                for record in frame.to_dict("records")
            ]
            if unit != "years"
            else frame.to_dict("records")
        )
        path.write_text("\n".join(map(json.dumps, records)))
    else:
        frame.assign(time=pd.to_numeric(frame["time"]) if numeric else frame["time"]).to_parquet(path)
    ordered = sorted(range(6), key=lambda row: -marks[row] if unit == "negative numbers" else marks[row])
    items = [rows[row][1] for row in ordered]
    expected = [str(item) for place, item in enumerate(items) if item not in items[place + 1 :]]
    found = loaded(path, mode="parquet" if layout == "parquet" else "csv")
    assert [item for item, _ in found["1"]] == expected


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=30))
@fast
def test_whole_times_keep_every_digit(tmp_path, times):
    path = save(tmp_path, "user,item,rating,time\n" + "".join(f"1,{i},2,{time}\n" for i, time in enumerate(times)))
    assert read(path)[0].times.tolist() == times
    careful = save(tmp_path, path.read_text() + "1,1,bad,5\n" + "1,9,2,5\n" * 200)
    assert read(careful, skip_bad_rows=True)[0].times[: len(times)].tolist() == times


@given(
    st.lists(st.datetimes(datetime.datetime(1990, 1, 1), datetime.datetime(2030, 1, 1)), min_size=1, max_size=20),
    st.sampled_from(fields.DATE_FORMATS),
)
@fast
def test_dates_are_read_rightly_or_refused(tmp_path, dates, form):
    texts = [date.replace(tzinfo=datetime.UTC).strftime(form.replace("%Z", "GMT")) for date in dates]
    content = "user,item,rating,time\n" + "".join(f'1,{i},2,"{text}"\n' for i, text in enumerate(texts))
    try:
        columns, _ = read(save(tmp_path, content))
    except UserError as error:
        assert "in two ways" in str(error)
        return
    form = form.replace("%Z", "GMT")
    expected = [datetime.datetime.strptime(text, form).replace(tzinfo=datetime.UTC) for text in texts]
    assert [pd.Timestamp(time, unit="ns", tz="UTC") for time in columns.times.tolist()] == expected


def test_dates_are_settled_by_the_whole_file(tmp_path):
    rows = "".join(f"{u},{i},3,0{1 + i % 9}/0{1 + u % 9}/2017\n" for u in range(60) for i in range(90))
    assert len(rows) > readers.HEAD
    content = "user,item,rating,time\n" + rows
    with pytest.raises(UserError, match="can be read in two ways"):
        read(save(tmp_path, content))
    columns, _ = read(save(tmp_path, content + "99,1,3,07/15/2017\n"))
    assert pd.Timestamp(int(columns.times[1]), unit="ns").month == 2
    columns, _ = read(save(tmp_path, content + "99,1,3,15/07/2017\n"))
    assert pd.Timestamp(int(columns.times[1]), unit="ns").day == 2


# -----------------------------------------------------------------------------
# Parquet

N = 6000
DAY = datetime.date(2020, 1, 1)
GOOD = [str(number % 3000) for number in range(N)]
IDS = {
    "text": pyarrow.array(GOOD),
    "large text": pyarrow.array(GOOD, "large_string"),
    "binary text": pyarrow.array([text.encode() for text in GOOD]),
    "int16": pyarrow.array(map(int, GOOD), "int16"),
    "uint64": pyarrow.array(map(int, GOOD), "uint64"),
    "categories of texts": pyarrow.array(GOOD).dictionary_encode(),
    "categories of integers": pyarrow.array(map(int, GOOD), "int32").dictionary_encode(),
    "int16 codes": pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([i % 3000 for i in range(N)], "int16"), [str(i) for i in range(3000)]
    ),
    "uint32 codes": pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([i % 3000 for i in range(N)], "uint32"), [str(i) for i in range(3000)]
    ),
}
REFUSED = {
    "float64": pyarrow.array([float(i) for i in range(N)]),
    "decimals": pyarrow.array([decimal.Decimal(i) for i in range(N)]),
    "dates": pyarrow.array([DAY] * N),
    "truth values": pyarrow.array([True] * N),
    "nested": pyarrow.array([{"a": i} for i in range(N)]),
    "lists": pyarrow.array([[i] for i in range(N)]),
    "bytes that are not UTF-8": pyarrow.array([b"\xff"] * N),
    "no value": pyarrow.array([None] * N, "string"),
    "nothing": pyarrow.nulls(N),
}


def parquet_file(folder, **columns):
    base = {"user": GOOD, "item": [str(i) for i in range(N)], "rating": [3.5] * N, "time": list(range(N))}
    path = folder / "ratings.parquet"
    parquet.write_table(pyarrow.table({**base, **columns}), path, row_group_size=700)
    return path


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """As a file of many rows is read: in several batches."""
    original = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda self, _, **more: original(self, 500, **more))


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("role", ["user", "item"])
def test_ids_of_every_parquet_type_are_their_texts(tmp_path, kind, role):
    columns, _ = read(parquet_file(tmp_path, **{role: IDS[kind]}))
    assert getattr(columns, f"{role}_ids")[getattr(columns, f"{role}s")].tolist() == GOOD


@pytest.mark.parametrize("kind", REFUSED)
def test_other_parquet_types_are_refused_as_ids(tmp_path, kind):
    with pytest.raises(UserError) as error:
        read(parquet_file(tmp_path, user=REFUSED[kind]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["int8", "uint8", "float32", "float16", "decimal128(5, 2)", "string", "dictionary"])
def test_ratings_of_every_parquet_type(tmp_path, kind):
    values = pyarrow.array([decimal.Decimal(i % 5) for i in range(N)])
    if kind == "dictionary":
        values = values.cast("float32").dictionary_encode()
    elif kind == "string":
        values = pyarrow.array([str(i % 5) for i in range(N)])
    else:
        values = (
            pyarrow.array(np.arange(N) % 5).cast(pyarrow.decimal128(22, 2)).cast(pyarrow.decimal128(5, 2))
            if "dec" in kind
            else pyarrow.array((np.arange(N) % 5).astype(kind))
        )
    assert read(parquet_file(tmp_path, rating=values))[0].ratings.tolist() == [i % 5 for i in range(N)]


@pytest.mark.parametrize(
    "kind",
    [
        "timestamp[s]",
        "timestamp[ms]",
        "timestamp[us]",
        "timestamp[ns]",
        "timestamp[us, tz=Asia/Tokyo]",
        "date32[day]",
        "date64[ms]",
    ],
)
def test_times_of_every_parquet_type(tmp_path, kind):
    moments = pyarrow.array([datetime.datetime(2020, 1, 1) + datetime.timedelta(days=i) for i in range(N)])
    types = {
        str(each): each
        for each in (
            *map(pyarrow.timestamp, ("s", "ms", "us", "ns")),
            pyarrow.timestamp("us", "Asia/Tokyo"),
            pyarrow.date32(),
            pyarrow.date64(),
        )
    }
    columns, _ = read(parquet_file(tmp_path, time=moments.cast(types[kind])))
    days = columns.times / columns.unit / 86400
    assert days.tolist() == [18262 + i for i in range(N)]


@pytest.mark.parametrize("role", ["rating", "time"])
@pytest.mark.parametrize("kind", ["nested", "lists", "truth values", "nothing", "text"])
def test_other_parquet_types_are_refused_as_numbers(tmp_path, role, kind):
    with pytest.raises(UserError) as error:
        read(parquet_file(tmp_path, **{role: REFUSED.get(kind, pyarrow.array(["x"] * N))}))
    assert "\n" not in str(error.value)


def test_two_columns_of_one_name_are_told_apart_by_position_alone(tmp_path):
    path = tmp_path / "twice.parquet"
    columns = [pyarrow.array(texts) for texts in (["1", "2"], ["3", "4"], ["5", "6"])] + [pyarrow.array([1, 2])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["user", "user", "item", "rating"]), path)
    for columns in (None, "user:user,item:item,rating:rating"):
        with pytest.raises(UserError, match="two columns"):
            read(path, columns=columns)
    for place, ids in ((0, ["1", "2"]), (1, ["3", "4"])):
        assert read(path, columns=f"user:{place},item:2,rating:3")[0].user_ids.tolist() == ids
    with pytest.raises(UserError, match="two columns"):
        read(save(tmp_path, "user,item,rating,rating\n1,2,3,4\n"))
    assert read(save(tmp_path, "user,item,rating,rating\n1,2,3,4\n"), columns="user:0,item:1,rating:3")[
        0
    ].ratings.tolist() == [4]


def test_categories_of_many_users_keep_their_rows(tmp_path):
    users = pd.Categorical([f"u{i % 900}" for i in range(N)])
    path = parquet_file(tmp_path, user=pyarrow.array(users))
    columns, _ = read(path)
    assert columns.user_ids[columns.users].tolist() == list(users)


# -----------------------------------------------------------------------------
# Marks, scale, filters


@pytest.mark.parametrize(
    ("marks", "ratings", "left"),
    [
        ("-1", ["8", "-1", "10", "-1.0"], ["8", "10"]),
        ("0,99", ["8", "0", "99", "10"], ["8", "10"]),
        ("NA", ["8", "NA", "10", "NA"], ["8", "10"]),
        ("", ["8", "", "10", " "], ["8", "10"]),
        (",-1,NA", ["8", "", "-1", "NA", "10"], ["8", "10"]),
        ("-1", ["8", "10", "7"], ["8", "10", "7"]),
    ],
)
@pytest.mark.parametrize("layout", ["csv", "json", "parquet"])
def test_marks_are_dropped_and_counted(tmp_path, marks, ratings, left, layout):
    rows = [("1", str(i), rating, i) for i, rating in enumerate(ratings)]
    path = tmp_path / "ratings"
    if layout == "csv":
        path.write_text("user,item,rating,time\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    elif layout == "json":
        records = [dict(zip(("user", "item", "rating", "time"), row, strict=True)) for row in rows]
        path.write_text("".join(json.dumps({**each, "rating": each["rating"] or None}) + "\n" for each in records))
    else:
        frame = pd.DataFrame(rows, columns=["user", "item", "rating", "time"])
        frame.assign(rating=pd.to_numeric(frame["rating"], errors="coerce")).to_parquet(path)
    columns, notes = read(path, unrated=marks)
    assert columns.ratings.tolist() == list(map(float, left))
    dropped = len(ratings) - len(left)
    assert notes == [f"dropped {dropped} of {len(ratings)} rows that are marked as not rated"] * (dropped > 0)


def test_a_mark_that_is_not_named_is_an_error(tmp_path):
    for mark in ("NA", "", "null"):
        with pytest.raises(UserError, match="line 3: .* rating is not a number .*; .* --unrated"):
            read(save(tmp_path, f"user,item,rating\n1,2,3\n1,3,{mark}\n"))
    with pytest.raises(UserError, match="holds no ratings: .* dropped 1 of 1 rows"):
        read(save(tmp_path, "user,item,rating\n1,2,0\n"), unrated="0")


def test_rows_outside_the_scale_are_dropped_if_asked(tmp_path):
    path = save(tmp_path, "user,item,rating\nme,2571,5\nme,260,4\nme,1198,0\n")
    with pytest.raises(UserError, match="line 4: .* outside the scale 1 to 5; .*--drop_outside"):
        read(path, scale=(1, 5))
    columns, notes = read(path, scale=(1, 5), drop_outside=True)
    assert (
        columns.ratings.tolist() == [5, 4] and "dropped 1 of 3 rows whose rating is outside the scale 1 to 5" in notes
    )
    with pytest.raises(UserError, match="--drop_outside needs the scale"):
        read(path, drop_outside=True)


@pytest.mark.parametrize(
    ("ratings", "apart"),
    [
        ([-1, 8, 10], ["-1"]),
        ([-1, *range(1, 11)], ["-1"]),
        ([-1, *range(6)], ["-1"]),
        ([0] * 9 + list(range(1, 11)), ["0"]),
        ([0, 4, 5], ["0"]),
        ([*np.linspace(-10, 10, 101), 99], ["99"]),
        ([1, 2, 3, 4, 5, 99], ["99"]),
        (range(11), ["0"]),
        (range(6), ["0"]),
        (np.arange(11) / 2, ["0"]),
        ([0.5, 1, 4, 5], []),
        ([1, 4, 5], []),
        ([0, 1], []),
        ([-1, 0, 1], []),
        (np.linspace(-10, 10, 101), []),
        (np.arange(1, 11) / 2, []),
    ],
)
def test_a_rating_that_stands_apart_is_pointed_out(ratings, apart):
    notes = table.point_out(np.array(ratings, np.float32))
    assert [note.rpartition("--unrated=")[2] for note in notes] == apart


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), min_size=1, max_size=60, unique=True),
    st.integers(1, 9),
    st.integers(2, 9),
)
@fast
def test_the_filters_advice_leaves_something(tmp_path, pairs, min_item, min_sequence):
    path = save(tmp_path, "user,item,rating\n" + "".join(f"{u},{i},{(u + i) % 5}\n" for u, i in pairs))
    options = {"min_item": min_item, "min_sequence": min_sequence}
    columns, _ = read(path)
    try:
        table.filter_rows(columns, data_options(**options))
    except UserError as error:
        advised = {name: int(value) for name, value in fields.re.findall(r"--(\w+)=(\d+)", str(error))}
        assert advised or "no user has two" in str(error)
        if advised:
            table.filter_rows(columns, data_options(**{**options, **advised}))
        for name, value in advised.items():
            if len(advised) == 1:
                with pytest.raises(UserError):
                    table.filter_rows(columns, data_options(**{**options, name: value + 1}))
