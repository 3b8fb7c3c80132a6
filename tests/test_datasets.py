"""Rating files of every layout and fault, filters, scales, cache and the command line.

MELO_FUZZ_EXAMPLES sets how many damaged files of each kind the fuzz test tries (50).
"""

import argparse
import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import datasets
from options import add_data_options
from ratings import cache, files, formats, readers, table
from utils import UserError, printable, run_script

FUZZ_EXAMPLES = int(os.environ.get("MELO_FUZZ_EXAMPLES", 50))
SECOND = 1_400_000_000

# user, item, rating, seconds
NUMBERS = [
    ("3", "20", 4.0, SECOND + 5),
    ("1", "10", 5.0, SECOND),
    ("3", "10", 1.0, SECOND + 2),
    ("-7", str(2**62), 2.0, SECOND + 9),
]
NAMES = [
    ("AWUSERID00001", "B000000001", 4.0, SECOND + 5),
    ("AWUSERID00002", "000X000002", 5.0, SECOND),
    ("AWUSERID00001", "000X000002", 1.0, SECOND + 2),
]


def lines(pattern, rows=NUMBERS, header=""):
    """Rows as text; fields of the pattern: u, i, r, n (whole rating), t, m (milliseconds), d (date)."""
    texts = [header] if header else []
    for u, i, r, t in rows:
        date = str(np.datetime64(t, "s")).replace("T", " ")
        texts.append(pattern.format(u=u, i=i, r=r, n=int(r), t=t, m=1000 * t + 7, d=date))
    return "\n".join(texts) + "\n"


LONG = r'"text": "Says \"great\", {{braces}} \\ \u00e9\n, \"overall\": 9", '
LAYOUTS = {
    "ml-100k": lines("{u}\t{i}\t{n}\t{t}"),
    "ml-1m": lines("{u}::{i}::{n}::{t}"),
    "ml-10m": lines("{u}::{i}::{r}::{t}"),
    "ml-25m": lines("{u},{i},{r},{t}", header="userId,movieId,rating,timestamp"),
    "sample": lines("{u},{i},{n},{t}", header="user_id,item_id,rating,timestamp"),
    "amazon original": lines("{u},{i},{n},{t}", header="reviewerID,product_id,rating,date"),
    "amazon 2014 ratings": lines("{u},{i},{r},{t}", NAMES),
    "amazon 2018 ratings": lines("{i},{u},{r},{t}", NAMES),
    "amazon 2014 reviews": lines(
        '{{"reviewerID": "{u}", "asin": "{i}", ' + LONG + '"overall": {r}, "unixReviewTime": {t}}}', NAMES
    ),
    "amazon 2023 ratings": lines("{u},{i},{r},{m}", NAMES, "user_id,parent_asin,rating,timestamp"),
    "amazon 2023 reviews": lines(
        '{{"rating": {r}, ' + LONG + '"asin": "X", "parent_asin": "{i}", "user_id": "{u}", "timestamp": {m}}}', NAMES
    ),
    "yelp reviews": lines('{{"user_id": "{u}", "business_id": "{i}", "stars": {r}, ' + LONG + '"date": "{d}"}}'),
    "yelp original": lines("{n},{u},{i},{d}", header="stars,user_id,business_id,timestamp"),
}
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return file.getvalue()


def save(folder, content, name="ratings.csv"):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path, mode=None, columns=None, sep=None, skip_bad_rows=False, scale=None, one_user=False, **more):
    """`readers.read_columns` with these options."""
    options = data_options(mode=mode, columns=columns, sep=sep, skip_bad_rows=skip_bad_rows, **more)
    return readers.read_columns(path, options, scale, one_user)


def read_rows(path, *given, **more):
    """[(user, item, rating, seconds)] of a file."""
    read_columns, _ = read(path, *given, **more)
    users, items = read_columns.user_ids[read_columns.users], read_columns.item_ids[read_columns.items]
    times = read_columns.times // (read_columns.unit or 1)
    return list(zip(users.tolist(), items.tolist(), read_columns.ratings.tolist(), times.tolist(), strict=True))


def users_of(path, *given):
    return [row[0] for row in read_rows(path, *given)]


def data_options(**values):
    parser = argparse.ArgumentParser()
    add_data_options(parser)
    options = parser.parse_args([])
    vars(options).update({"mode": "csv", "min_item": 1, "min_sequence": 1} | values)
    return options


# -----------------------------------------------------------------------------
# Layouts


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_as_published_gives_the_same_rows(tmp_path, name, suffix):
    path = save(tmp_path, COMPRESS[suffix](LAYOUTS[name].encode()), f"data{suffix}")
    expected = NAMES if name.startswith("amazon 20") else NUMBERS
    for mode in (name.split()[0], None):
        assert read_rows(path, mode) == expected


def test_line_ends_byte_order_mark_and_blank_lines_change_nothing(tmp_path):
    for name, text in LAYOUTS.items():
        changed = b"\xef\xbb\xbf\r\n" + text.replace("\n", "\r\n").encode() + b"\r\n\r\n"
        expected = NAMES if name.startswith("amazon 20") else NUMBERS
        assert read_rows(save(tmp_path, changed), name.split()[0]) == expected
        assert read_rows(save(tmp_path, text.rstrip("\n")), name.split()[0]) == expected


def test_a_zip_is_read_by_its_member_of_a_known_name_or_its_only_one(tmp_path):
    text = LAYOUTS["ml-1m"]
    for archive in (zipped({"ml-1m/ratings.dat": text, "ml-1m/README": "-"}), zipped({"mine": text})):
        assert read_rows(save(tmp_path, archive), "ml-1m") == NUMBERS
    with pytest.raises(UserError, match="holds ml-1m/README, ml-1m/users.dat, not one ratings file"):
        read_rows(save(tmp_path, zipped({"ml-1m/README": "-", "ml-1m/users.dat": "-"})))


def test_parquet_gives_the_same_rows(tmp_path):
    path = tmp_path / "ratings.parquet"
    for rows in (NUMBERS, NAMES):
        frame = pd.DataFrame(rows, columns=["user", "item", "points", "when"])
        seconds = frame["when"]
        for times in (seconds, seconds * 1000, pd.to_datetime(seconds, unit="s"), seconds.astype("float")):
            frame.assign(when=times, more="text").to_parquet(path)
            assert read_rows(path, "parquet", "user:user,item:item,rating:points,time:when") == rows
    with pytest.raises(UserError, match="columns user, item, points, when, more: which is the rating"):
        read_rows(path)


@pytest.mark.parametrize("sep", [",", ";", "\t", "|", " ", "::", "||"])
def test_any_separator_is_found_or_taken_as_given(tmp_path, sep):
    path = save(tmp_path, lines(sep.join(["{t}", "{i}", "x", "{u}", "{r}"])))
    for given_sep in (sep, None) if sep != "||" else (sep,):
        assert read_rows(path, "csv", "user:3,item:1,rating:4,time:0", given_sep) == NUMBERS


def test_columns_by_name_dates_quotes_and_no_time(tmp_path):
    text = 'when,who,"how, much",what\n2020-01-02,"a ""b"", c",1.5,é\n2020-01-01T00:00:10Z,"two\nlines",2,é é\n'
    path = save(tmp_path, text)
    day = 1577836800
    expected = [('a "b", c', "é", 1.5, day + 86400), ("two\nlines", "é é", 2.0, day + 10)]
    assert read_rows(path, "csv", "user:who,item:what,rating:2,time:0") == expected
    columns, notes = read(path, "csv", "user:who,item:what,rating:2")
    assert (
        columns.times.tolist() == [0, 1]
        and "column 0 looks like times; to use it: --mode=csv --columns=user:1,item:3,rating:2,time:0" in notes
    )


def test_ids_are_text_and_equal_only_by_their_characters(tmp_path):
    def ids(*texts):
        rows = "".join(f"{text},1,2,3\n" for text in texts)
        return users_of(save(tmp_path, "user,item,rating,time\n" + rows))

    for given_ids in (["5", "-9", str(2**63)], ["5", "007", "7", "7.0", "07"], ["5", "1_0", "١", "1"]):
        assert ids(*given_ids) == given_ids


# -----------------------------------------------------------------------------
# Blocks and the two parsers


texts = st.text(st.characters(codec="utf-8", exclude_characters='\0\r\n",:'), min_size=1, max_size=8)
ids = st.one_of(st.integers(-(2**63), 2**63 - 1).map(str), texts.filter(str.strip))
numbers = st.floats(-1e6, 1e6).map(repr)
rows = st.lists(st.tuples(ids, ids, numbers, st.integers(0, 2**33).map(str)), min_size=1, max_size=20)


@given(rows, st.sampled_from([",", "::", "\t", ""]))
@settings(max_examples=100, deadline=None)
def test_both_parsers_agree_on_clean_rows(rows, sep):
    if sep:
        rows = [row for row in rows if sep not in "".join(row)]
        block = "".join(sep.join(row) + "\n" for row in rows).encode()
        layout = formats.Layout("csv", (0, 1, 2, 3), sep, 4)
    else:
        records = [{"u": u, "i": i, "r": float(r), "t": int(t)} for u, i, r, t in rows]
        block = "\n".join(map(json.dumps, records)).encode()
        layout = formats.Layout("csv", ("u", "i", "r", "t"))
    clean, careful = (
        readers.parse_clean(block, layout, readers.Rules()),
        readers.parse_careful(block, 1, layout, readers.Rules()),
    )
    assert not careful.problems.any()
    if rows:
        assert_same_part(clean, careful)
        assert id_texts(clean.users) == [row[0].strip() for row in rows]
        assert id_texts(clean.items) == [row[1].strip() for row in rows]


def id_texts(ids):
    codes, texts = ids
    return [texts[int(code)].as_py() for code in codes]


def assert_same_part(first, second):
    assert id_texts(first.users) == id_texts(second.users) and id_texts(first.items) == id_texts(second.items)
    np.testing.assert_array_equal(first.ratings, second.ratings)
    np.testing.assert_array_equal(first.times, second.times)


odd = ["a", '"a"', '"a,b"', '"a""b"', 'a"b', '"a"b', '"', '""', '"a\nb"', '" a"', ' "a"', '"a" ', "1", " ", "é", "\0"]
odd_rows = st.tuples(*(st.sampled_from(odd + more) for more in ([], [], ['"5"', "5 "], ["7", '"7"']))).map(",".join)


@given(st.lists(odd_rows, max_size=4), st.sampled_from(["\n", "\r\n", "\n\n"]))
@settings(max_examples=200, deadline=None)
def test_what_the_fast_parser_takes_the_careful_one_reads_alike(rows, end):
    block = (end.join(rows) + end).encode()
    layout = formats.Layout("csv", (0, 1, 2, 3), ",", 4)
    clean, careful = (
        readers.parse_clean(block, layout, readers.Rules()),
        readers.parse_careful(block, 1, layout, readers.Rules()),
    )
    if clean:
        assert not careful.problems.any()
        assert_same_part(clean, careful)


@given(st.lists(st.sampled_from(['a"b', '"', "x,1", "\n", '"q\nq"', "\r\n"]), max_size=30), st.integers(1, 9))
def test_blocks_are_the_file_cut_at_line_ends(pieces, size):
    content = "".join(pieces).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK", size)
        try:
            found = list(files.blocks("file", io.BytesIO(content)))
        except UserError:
            return  # a line longer than a block
    assert b"".join(block for _, block in found) == content
    assert all(block.endswith(b"\n") for _, block in found[:-1])
    assert [line for line, _ in found] == [
        1 + content[: sum(len(block) for _, block in found[:i])].count(b"\n") for i in range(len(found))
    ]


@pytest.mark.parametrize("name", LAYOUTS)
def test_small_blocks_give_the_same_rows_and_line_numbers(tmp_path, monkeypatch, name):
    head, tail = LAYOUTS[name], LAYOUTS[name].splitlines(keepends=True)[-1]
    path = save(tmp_path, head + 50 * tail)
    whole = read_rows(path)
    monkeypatch.setattr(files, "BLOCK", 2 * max(map(len, head.splitlines())))
    monkeypatch.setattr(readers, "CAREFUL_BLOCK", 40)
    assert read_rows(path) == whole
    n_lines = head.count("\n") + 50
    with pytest.raises(UserError, match=f"line {n_lines + 1}: 'broken'"):
        read_rows(save(tmp_path, head + 50 * tail + "broken\n" + tail))


def test_a_block_ends_outside_of_quotes(tmp_path, monkeypatch):
    text = "user,item,rating\n" + "".join(f'"u\n{i}",i,{i}\n' for i in range(40))
    monkeypatch.setattr(files, "BLOCK", 20)
    assert users_of(save(tmp_path, text)) == [f"u\n{i}" for i in range(40)]


# -----------------------------------------------------------------------------
# Bad input

ML, CSV = "1::2::3::4\n", "user,item,rating,time\n1,2,3,4\n"
FAULTS = {  # content, mode, what is said
    "a word for a rating": (ML + "1::2::x::4\n", "ml-1m", "line 2: '1::2::x::4': its rating is not a number"),
    "no number": (ML + "1::2::nan::4\n", "ml-1m", "line 2: .* its rating is not a number"),
    "an infinite rating": (CSV + "1,2,inf,4\n", "csv", "line 3: .* its rating is not a number"),
    "a rating beyond float32": (CSV + "1,2,1e39,4\n", "csv", "line 3: .* its rating is not a number"),
    "a column too few": (CSV + "\n1,2,3\n", "csv", "line 4: '1,2,3': it does not have the expected columns"),
    "a column too many": (CSV + "1,2,3,4,5\n", "csv", "line 3: .* expected columns"),
    "a column moved": (ML + "1:9:2::3::4\n", "ml-1m", "line 2: .* expected columns"),
    "no user": (CSV + " ,2,3,4\n", "csv", "line 3: .* its user id is empty"),
    "a whole text for an item": (CSV + f"1,{'x' * 999},3,4\n", "csv", "line 3: .* its item id is empty, too long"),
    "an item that is not UTF-8": (
        CSV.encode() + b"1,\xff,3,4\n",
        "csv",
        "line 3: .* not UTF-8; give the file's --encoding",
    ),
    "a user with a zero byte": (CSV + "1\0,2,3,4\n", "csv", "line 3: .* or not text"),
    "a word for a time": (CSV + "1,2,3,now\n", "csv", "line 3: .* its time is neither"),
    "a time without end": (CSV + "1,2,3,1e30\n", "csv", "line 3: .* its time is neither"),
    "a quote without end": (CSV + '"1,2,3,4\n' + "1,2,3,4\n", "csv", "line 3: '\"1,2,3,4'"),
    "a lone carriage return": (CSV + "1,2,3\r,4\n", "csv", "line 3"),
    "JSON cut off": (LAYOUTS["yelp reviews"] + '{"user_id": "a', "yelp", "line 5: .* expected columns"),
    "JSON without a key": (LAYOUTS["yelp reviews"] + "{}\n", "yelp", "line 5: '{}': it does not have"),
    "JSON of true and false": (
        LAYOUTS["yelp reviews"] + LAYOUTS["yelp reviews"].split("\n")[0].replace("4.0", "true"),
        "yelp",
        "line 5: .* expected columns",
    ),
    "JSON that is not UTF-8": (
        LAYOUTS["yelp reviews"].encode() + b'{"user_id": "\x80", "business_id": "1", "stars": 1, "date": "2020-01-01"}',
        "yelp",
        "line 5: .* not UTF-8",
    ),
    "JSON keys that are not UTF-8": (b'{"\x80": 1}', "yelp", "line 1: .* is not a JSON object in UTF-8"),
    "deep JSON": (LAYOUTS["yelp reviews"] + "[" * 100_000, "yelp", "line 5: '\\[\\["),
    "a JSON array": ("[{}]", "yelp", "is one JSON array"),
    "other JSON": ('{"a": 1}\n', "yelp", "has the columns a: which is the user and the item and the rating"),
    "an empty file": ("", "csv", "is empty"),
    "an empty gzip": (gzip.compress(b""), "csv", "is empty"),
    "a header only": ("userId,movieId,rating,timestamp\n", "ml-25m", "a header alone"),
    "a web page": ("<!DOCTYPE html><html>404", "ml-1m", "is a web page"),
    "a gzip cut off": (gzip.compress(ML.encode() * 99)[:-9], "ml-1m", "is damaged or was not copied completely"),
    "a damaged xz": (lzma.compress(ML.encode())[:20], "ml-1m", "is damaged"),
    "a damaged bzip2": (b"BZh9" + bytes(30), "ml-1m", "is damaged"),
    "a damaged zip": (zipped({"ratings.dat": ML})[:-9], "ml-1m", "is damaged"),
    "a damaged Parquet": (b"PAR1" + bytes(50), "parquet", "as Parquet"),
    "UTF-16": (CSV.encode("utf-16"), "csv", "is not text in UTF-8"),
    "a program": (b"\x7fELF\0\0\0", "csv", "is not text in UTF-8"),
    "old Mac line ends": (CSV.replace("\n", "\r"), "csv", "bare carriage return"),
    "prose": ("Dear all\n", "csv", "has 2 columns.* 'Dear all'"),
    "another layout": (LAYOUTS["ml-100k"], "ml-1m", "but four columns separated by tabs; use --mode=ml-100k"),
    "another data set": (LAYOUTS["amazon original"], "yelp", "but Amazon reviews; use --mode=amazon"),
    "another format": (CSV, "parquet", "use --mode=csv"),
    "columns of other names": (
        "a,b,rating\n1,2,3\n",
        "ml-25m",
        "the columns a, b, rating: which is the user and the item",
    ),
    "columns without names": ("1,2,3,4\n", "amazon", "no header; say which are which"),
    "an unknown mode": (CSV, "ml-2m", "--mode=ml-2m is not known; it is one of ml-100k, "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_in_one_sentence(tmp_path, fault):
    content, mode, said = FAULTS[fault]
    with pytest.raises(UserError, match=said) as error:
        read_rows(save(tmp_path, content), mode)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("columns", "sep", "said"),
    [
        ("user:a,item:item,rating:rating", None, "has no column 'a'; it has user, item, rating, time"),
        ("user:0,item:1,rating:4", None, "has no column '4'"),
        ("user:0,item:1", None, "is not user:U,item:I,rating:R"),
        ("user:0,item:0,rating:2", None, "names a column twice"),
        (None, ";", "has 1 column.* its separator seems to be ','"),
        (None, "ab", "--sep=ab is no separator"),
        (None, "", "is no separator"),
    ],
)
def test_a_wrong_option_is_told_in_one_sentence(tmp_path, columns, sep, said):
    with pytest.raises(UserError, match=said):
        read_rows(save(tmp_path, CSV), "csv", columns, sep)


def test_bad_rows_are_dropped_up_to_one_in_a_hundred(tmp_path):
    good = "".join(f"{user},1,2,3\n" for user in range(396))
    path = save(tmp_path, CSV + "1,2,bad,4\n" + good + 3 * "bad\n" + "5,5,5,5\n")
    columns, notes = read(path, "csv", skip_bad_rows=True)
    assert len(columns.users) == 398 and "bad" not in columns.user_ids
    assert "dropped 4 of 402 rows" in notes[0]
    assert all(f"line {line}: " in notes[0] for line in (3, 400, 401)) and "line 402" not in notes[0]
    with pytest.raises(UserError, match="5 of 403 rows cannot be read, more than the 1%"):
        read_rows(save(tmp_path, path.read_text() + "bad\n"), skip_bad_rows=True)


def test_a_given_scale_is_kept_to(tmp_path):
    path = save(tmp_path, lines("{u}::{i}::{n}::{t}"))
    assert len(read(path, scale=(1, 5))[0].users) == 4
    with pytest.raises(UserError, match="line 3: .*outside the scale 1.5 to 5; .*--drop_outside"):
        read(path, scale=(1.5, 5))


def damage(content, edits):
    """Content with some bytes written over, cut out or put in."""
    for place, cut, put in edits:
        place %= len(content) + 1
        content = content[:place] + put + content[place + cut :]
    return content


bits = st.one_of(
    st.binary(max_size=6),
    st.sampled_from([b"\n", b'"', b"::", b",", b"\t", b"{", b"\r", b"9" * 40, b"nan", b"\xff\xfe", b"  ", b"/", b"-1"]),
)
edits = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 40), bits), max_size=4)
wholes = [text.encode() for text in LAYOUTS.values()]
packers = itertools.cycle([gzip.compress, bz2.compress, lzma.compress, lambda text: zipped({"a": text})])
PERSONAL = [
    "Date,Name,Year,Letterboxd URI,Rating\n2024-01-03,The Matrix,1999,https://boxd.it/a,4\n",
    "Const,Your Rating,Date Rated,Title,Year\ntt0133093,8,2024-01-03,The Matrix,1999\n",
    "Book Id,Title,My Rating,Date Added\n1,Dune,4,2024/01/03\n2,Emma,0,2024/01/02\n",
    "movie_id,rating,title\n2571,4.0,Matrix\n260,3.5,Star Wars\n",
]
OTHERS = [
    "1   10  3\n2   10  4\n",
    "1\t\t10\t\t3\n2\t\t10\t\t4\n",
    "user_id:token\titem_id:token\trating:float\n1\t10\t3\n",
    "user,item,rating,time\n1,10,3,07/15/2017\n1,11,-1,07/16/2017\n",
]
FUZZ = {  # kind of file -> whole ones
    "text and JSON": wholes,
    "archives": [pack(whole) for whole, pack in zip(wholes, packers, strict=False)],
    "Parquet": [
        pd.DataFrame(rows, columns=["user", "item", "rating", "time"]).to_parquet() for rows in (NUMBERS, NAMES)
    ],
    "exports of one person": [text.encode() for text in PERSONAL],
    "padded, RecBole, dates": [text.encode() for text in OTHERS],
    "other encodings": [text.encode(code) for text in PERSONAL + OTHERS for code in ("utf-16", "latin-1", "utf-32")],
    "any bytes": [b""],
}
fuzzed_options = st.fixed_dictionaries(
    {},
    optional={
        "mode": st.sampled_from([*formats.MODE_LAYOUT]),
        "columns": st.sampled_from(
            ["user:0,item:1,rating:2", "item:0,rating:1", "user:user,item:item,rating:rating,time:3"]
        ),
        "sep": st.sampled_from([",", "::", r"\s+", "\t\t", " "]),
        "encoding": st.sampled_from(["latin-1", "utf-16", "utf-7", "idna"]),
        "unrated": st.sampled_from(["", "-1,NA", "0", "nan"]),
        "skip_bad_rows": st.just(True),
        "drop_outside": st.just(True),
        "scale": st.just((1.0, 5.0)),
        "one_user": st.just(True),
    },
)


@pytest.mark.parametrize("kind", FUZZ)
def test_any_bytes_are_a_table_or_one_sentence(tmp_path, kind):
    @given(st.builds(damage, st.sampled_from(FUZZ[kind]), edits), fuzzed_options)
    @settings(max_examples=FUZZ_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    def check(content, options):
        try:
            columns, notes = read(save(tmp_path, content), **options)
        except UserError as error:
            assert printable(str(error)) == str(error)
            return
        assert len({len(column) for column in columns[:4]}) == 1 and len(columns.users) > 0
        assert np.isfinite(columns.ratings).all() and np.isfinite(columns.times).all()
        assert all(columns.user_ids) and all(columns.item_ids) and all(printable(note) == note for note in notes)

    check()


# -----------------------------------------------------------------------------
# From rows to ratings


def plain_ratings(rows, min_item, min_sequence):
    """The definition, in plain Python: (user, item, rating, time)s -> {user: [(item, rating, time), ...]}."""
    last = {}
    for place, (user, item, rating, time) in enumerate(rows):
        if (user, item) not in last or time >= last[user, item][0]:
            last[user, item] = (time, place, rating)
    ordered = sorted((user, time, place, item, rating) for (user, item), (time, place, rating) in last.items())
    for key, least in ((3, min_item), (0, min_sequence)):
        count = [row[key] for row in ordered]
        ordered = [row for row in ordered if count.count(row[key]) >= least]
    users = {}
    for user, time, _, item, rating in ordered:
        users.setdefault(user, []).append((item, rating, time))
    return users


@given(
    st.lists(
        st.tuples(st.integers(-3, 3), st.integers(0, 4), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=40
    ),
    st.integers(1, 4),
    st.integers(1, 4),
)
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_ratings_are_those_of_the_definition(tmp_path, rows, min_item, min_sequence):
    text = "user,item,rating,time\n" + "".join("{},{},{},{}\n".format(*row) for row in rows)
    options = data_options(
        data_path=save(tmp_path, text), min_item=min_item, min_sequence=min_sequence, rating_scale="0:3"
    )
    expected = plain_ratings(rows, min_item, min_sequence)
    if not expected:
        with pytest.raises(UserError, match="the filters leave nothing: .*(give --min_|no user has two)"):
            cache.load_ratings(options)
        return
    ratings = cache.load_ratings(options)
    found = {}
    for number, user in enumerate(ratings.user_ids.tolist()):
        part = slice(ratings.offsets[number], ratings.offsets[number + 1])
        items = ratings.item_ids[ratings.items[part]].tolist()
        found[int(user)] = list(
            zip(map(int, items), ratings.values[part].tolist(), ratings.times[part].tolist(), strict=True)
        )
    assert found == expected and list(found) == sorted(found)
    assert list(map(int, ratings.item_ids)) == sorted({item for user in expected.values() for item, _, _ in user})
    assert ratings.levels.tolist() == sorted(
        {row[2] for row in rows} & {value for user in plain_ratings(rows, 0, 0).values() for _, value, _ in user}
    )


@pytest.mark.parametrize(
    ("values", "low", "high", "n_levels"),
    [
        ([1, 5, 3], 1, 5, 3),
        ([0.5, 5, 4.5], 0.5, 5, 3),
        (range(11), 0, 10, 11),
        (np.linspace(-10, 10, 101), -10, 10, 10),
    ],
)
def test_the_scale_is_that_of_the_data(values, low, high, n_levels):
    found_low, found_high, levels = table.rating_scale(np.array(values, np.float32))
    assert (found_low, found_high, len(levels)) == (low, high, n_levels)
    assert (np.diff(levels) > 0).all() and low <= levels[0] and levels[-1] <= high
    assert table.rating_scale(np.array(values, np.float32), (-20.0, 20.0))[:2] == (-20, 20)


def test_one_rating_alone_needs_a_scale():
    with pytest.raises(UserError, match="every rating is 4; give the scale"):
        table.rating_scale(np.full(3, 4, np.float32))
    for text in ("5", "5:1", "a:b", "1:nan", "1:inf", "1:1"):
        with pytest.raises(UserError, match="is not LOW:HIGH"):
            table.parse_scale(text)


def test_times_that_are_far_apart_are_sorted_too():
    times = np.array([8e18, -8e18, 0, 8e18], np.int64)
    users = np.array([1, 1, 0, 1], np.int32)
    columns = readers.Columns(users, np.arange(4, dtype=np.int32), times, times, np.arange(2), np.arange(4))
    assert table.sort_rows(columns).items.tolist() == [2, 1, 0, 3]


def test_the_fingerprint_tells_data_apart(tmp_path):
    def fingerprint(text, **values):
        return cache.load_ratings(data_options(data_path=save(tmp_path, text), **values)).fingerprint

    text = "user,item,rating,time\n1,1,3,1\n1,2,4,2\n2,1,5,3\n"
    same = "user,item,rating,time\n2,1,5,3\n1,1,3,1\n1,2,4,2\n"
    assert fingerprint(text) == fingerprint(same)
    others = [
        text.replace(*pair) for pair in (("2,1,5,3", "2,1,5,4"), ("2,1,5", "2,1,6"), ("2,1,5", "2,2,5"), ("\n2", "\n3"))
    ]
    found = [fingerprint(text), *map(fingerprint, others), fingerprint(text, rating_scale="1:9")]
    assert len(set(found)) == len(found)


# -----------------------------------------------------------------------------
# Cache


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Options of a data file that is cached, and the list of files that were parsed."""
    monkeypatch.setattr(cache, "CACHE_FROM", 0)
    parsed = []
    original = table.read_columns
    monkeypatch.setattr(table, "read_columns", lambda *given: parsed.append(given) or original(*given))
    path = save(tmp_path, lines("{u},{i},{r},{t}", NAMES + NAMES, header="user,item,rating,time"))
    return data_options(data_path=str(path)), parsed


def assert_same(first, second):
    for name, value in vars(first).items():
        np.testing.assert_array_equal(value, getattr(second, name))
        assert np.asarray(value).dtype == np.asarray(getattr(second, name)).dtype


def test_the_cache_gives_what_was_parsed_and_says_it_again(cached, capsys):
    options, parsed = cached
    first, said = cache.load_ratings(options), capsys.readouterr().err
    second, again = cache.load_ratings(options), capsys.readouterr().err
    assert len(parsed) == 1 and said == again and "dropped 3 ratings" in said
    assert_same(first, second)
    for ratings in (first, second):
        with pytest.raises(ValueError, match="read-only"):
            ratings.values[0] = 1


def test_other_content_or_options_are_parsed_anew(cached, tmp_path):
    options, parsed = cached
    first = cache.load_ratings(options)
    options.min_sequence = 2
    assert cache.load_ratings(options).user_ids.tolist() == ["AWUSERID00001"]
    options.min_sequence = 1
    path = Path(options.data_path)
    before = path.stat()
    path.write_text(path.read_text().replace(",4.0,", ",3.0,"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.load_ratings(options).fingerprint != first.fingerprint
    assert len(parsed) == 3
    assert len(list(tmp_path.glob("*.cache"))) == 2 and len(list(tmp_path.iterdir())) == 3


def test_a_damaged_cache_is_not_trusted(cached, tmp_path):
    options, parsed = cached
    first = cache.load_ratings(options)
    (file,) = tmp_path.glob("*.cache")
    whole = file.read_bytes()
    for place in range(0, len(whole), len(whole) // 20):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]):
            file.write_bytes(damaged)
            count = len(parsed)
            assert_same(cache.load_ratings(options), first)
            assert len(parsed) == count + 1 and file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(cached, tmp_path, capsys):
    options, parsed = cached
    options.cache_dir = str(save(tmp_path, "", "file"))
    assert_same(cache.load_ratings(options), cache.load_ratings(options))
    assert len(parsed) == 2 and "--cache_dir gives another place" in capsys.readouterr().err
    options.cache_dir = str(tmp_path / "new" / "folder")
    assert_same(cache.load_ratings(options), cache.load_ratings(options))
    assert len(parsed) == 3 and len(list(Path(options.cache_dir).iterdir())) == 1


# -----------------------------------------------------------------------------
# The data table


def test_the_command_prints_the_data_table_and_a_picture(tmp_path, monkeypatch, capfd):
    text = "user,item,rating,time\n" + "1,a,1,0\n1,b,2,0\n1,c,2,86400\n2,a,1,5\n2,a,2,9\n3,c,2,7\n"
    path = save(tmp_path, text)
    options = [
        "--mode=csv",
        f"--data_path={path}",
        "--min_item=2",
        "--min_sequence=2",
        "--max_seq_len=2",
        f"--plot={tmp_path}/p.png",
    ]
    monkeypatch.setattr(sys, "argv", ["datasets.py", *options])
    datasets.main()
    done = capfd.readouterr().out
    table = [line.split() for line in done.splitlines()]
    for expected in (
        ["users", "3", "1"],
        ["items", "3", "2"],
        ["ratings", "5", "2"],
        ["mean", "length", "1.667", "2.000"],
        ["mean", "length,", "last", "2", "1.333", "2.000"],
        ["balance", "score", "0.722", "1.000"],
        ["share", "of", "ties", "0.400", "0.000"],
        ["scale", "from", "1", "to", "2,", "levels", "1", "2"],
    ):
        assert expected in table
    assert "dropped 1 ratings of an item that the same user rated again later" in done
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mode=yelp"], "there is no file Data/yelp/.* get it from https://www.yelp.com/dataset"),
        (["--mode=ml-1m", "--data_path=my.dat"], "there is no file my.dat; leave out --data_path to download it"),
        (["--mode=csv"], "--mode=csv needs --data_path"),
        (["--mode=ml-2m"], "--mode=ml-2m is not known; it is one of ml-100k, "),
        (["--data_path=."], "is a folder; name the ratings file in it"),
        (["--data_path=u.data"], "use --mode=ml-100k"),
        (
            ["--mode=ml-100k", "--data_path=u.data", "--min_item=1", "--plot=no/p.png"],
            "--plot=no/p.png: there is no folder no",
        ),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    save(tmp_path, LAYOUTS["ml-100k"].replace("-7", "3"), "u.data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["datasets.py", *arguments, "--min_sequence=2"])
    with pytest.raises(SystemExit) as stop:
        run_script(datasets.main)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1 and re.search(f"^error: .*{said}", printed)
