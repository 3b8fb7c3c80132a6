"""What a ratings file is, told from its name and its first lines: layout, separator, columns."""

import csv
import json
import re
from typing import NamedTuple

from utils import UserError

NOT_UTF8 = re.compile("[\ud800-\udfff]")  # what bytes that are not UTF-8 are decoded to
ROLES = ("user", "item", "rating", "time")

# Column names, in lower case, and what they hold; the first of a line that a file has counts.
NAMES = {
    "user": ("user", "user_id", "userid", "reviewerid"),
    "item": ("item", "item_id", "itemid", "movieid", "movie_id", "parent_asin", "asin", "product_id", "business_id"),
    "rating": ("rating", "overall", "stars"),
    "time": ("timestamp", "time", "unixreviewtime", "date"),
}
ITEM_LAYOUT = {"movieid": "ml-latest", "business_id": "yelp"}
ITEM_LAYOUT |= dict.fromkeys(("parent_asin", "asin", "product_id"), "amazon")

# The layout that each --mode stands for; a layout's name is also the mode to recommend for it.
MODE_LAYOUT = {"ml-100k": "ml-100k", "ml-1m": "ml-1m", "ml-10m": "ml-1m"}
MODE_LAYOUT |= dict.fromkeys(("ml-20m", "ml-25m", "ml-32m", "ml-latest", "ml-latest-small"), "ml-latest")
MODE_LAYOUT |= {"amazon": "amazon", "yelp": "yelp", "csv": "csv", "parquet": "parquet", "sample": "csv"}
LAYOUT_TEXT = {
    "ml-100k": "four columns separated by tabs",
    "ml-1m": "four columns separated by '::'",
    "ml-latest": "CSV with the header of MovieLens",
    "amazon": "Amazon reviews",
    "yelp": "Yelp reviews",
    "csv": "delimited text of its own kind",
    "parquet": "Parquet",
}


class Layout(NamedTuple):
    """Where a text file keeps its four columns."""

    name: str  # as in LAYOUT_TEXT
    places: tuple  # column (or JSON key) of user, item, rating and time; time None: the file has none
    sep: str = ""  # "": JSON lines
    width: int = 0  # columns in a row
    header: bool = False
    dated: bool = False  # times are dates, not numbers


def recognise(path, head, mode, columns, sep):
    """The `Layout` of a file that begins with the lines `head`; `UserError` where it does not fit `mode`."""
    refuse_others(path, head)
    if head.startswith("{"):
        layout = json_layout(path, head.split("\n", 1)[0], columns)
    else:
        layout = delimited_layout(path, head, columns, sep)
    check_mode(path, layout.name, mode)
    return layout


def refuse_others(path, head):
    """Raise `UserError` for what is often mistaken for a ratings file."""
    if not head.strip():
        raise UserError(f"{path} is empty")
    if head.lstrip()[:9].lower().startswith(("<!doctype", "<html", "<?xml")):
        raise UserError(f"{path} is a web page, not ratings, as a failed download leaves; fetch it again")
    if head.startswith("["):
        raise UserError(f"{path} is one JSON array; write one JSON object a line")
    if head[257:262] == "ustar":
        raise UserError(f"{path} is a tar archive; unpack it and name the ratings file in it")
    if "\0" in head.split("\n", 1)[0] or head.startswith("\udcff\udcfe"):
        raise UserError(f"{path} is not text in UTF-8 (nor gzip, bzip2, xz, zip or Parquet); convert it")
    if "\r" in head and "\n" not in head:
        raise UserError(f"{path} ends its lines with a bare carriage return; convert it to line feeds")


def check_options(mode, columns, sep):
    """Raise `UserError` where these options do not go together."""
    if mode is not None and mode not in MODE_LAYOUT:
        raise UserError(f"--mode={mode} is not known; it is one of {', '.join(MODE_LAYOUT)}")
    if mode not in (None, "csv", "parquet") and (columns or sep):
        raise UserError(f"--columns and --sep go with --mode=csv or parquet, not with --mode={mode}")


def check_mode(path, name, mode):
    """Raise `UserError` where a file of the layout `name` cannot be `mode`'s."""
    wanted = MODE_LAYOUT.get(mode, name)
    if wanted != name and (wanted != "csv" or name == "parquet"):
        raise UserError(
            f"{path} is not what --mode={mode} stands for ({LAYOUT_TEXT[wanted]}) but {LAYOUT_TEXT[name]}; "
            f"use --mode={name}"
        )


def json_layout(path, line, columns):
    """The `Layout` of JSON lines by the keys of the first one."""
    record = parse_json(line)
    if not isinstance(record, dict) or NOT_UTF8.search("".join(record)):
        raise UserError(f"{path}, line 1: '{shown(line)}' is not a JSON object in UTF-8")
    keys = list(record)
    places, name = choose_columns(path, keys, columns)
    keys = tuple(None if place is None else keys[place] for place in places)
    return Layout(name, keys, dated=isinstance(record.get(keys[3]), str))


def delimited_layout(path, head, columns, sep):
    """The `Layout` of delimited text by its first lines."""
    lines = [line for line in head.split("\n")[:1000] if line.strip()]
    sep, cells = split_first(path, lines[0], sep)
    header = not any(is_number(cell) for cell in cells)
    if header or columns:
        places, name = choose_columns(path, cells if header else [""] * len(cells), columns)
    else:
        places, name = unnamed_columns(path, [split(line, sep) for line in lines], sep)
    rows = [split(line, sep) for line in lines[header : header + 1]]
    dated = bool(rows) and places[3] is not None and places[3] < len(rows[0]) and not is_number(rows[0][places[3]])
    return Layout(name, places, sep, len(cells), header, dated)


def split_first(path, line, sep):
    """(separator, cells of the first line); without `sep`, the separator that gives three columns or more."""
    sep = {"\\t": "\t", "tab": "\t"}.get(sep, sep)
    if sep is not None and (len(set(sep)) != 1 or sep[0].isalnum() or not " " <= sep[0] <= "~" and sep[0] != "\t"):
        raise UserError(f"--sep={sep} is not a separator; give one character, or the same one repeated")
    likely = next(
        (each for each in ("::", "\t", ",", ";", "|", " ") if each in line and len(split(line, each)) > 2), None
    )
    cells = split(line, sep or likely or ",")
    if len(cells) > 2:
        return sep or likely, cells
    hint = f"its separator seems to be '{likely}'" if likely else "user, item and rating are needed; is --sep missing?"
    raise UserError(f"{path} has {len(cells)} column(s) in its first line, '{shown(line)}': {hint}")


def split(line, sep):
    """A line's cells, without quotes and spaces around them."""
    try:
        cells = next(csv.reader([line.rstrip("\r\n")], delimiter=sep[0]), [])
    except csv.Error:
        return []
    return [cell.strip() for cell in cells[:: len(sep)]]


def choose_columns(path, names, columns):
    """(places of user, item, rating and time, layout name) by --columns or by what the names usually mean."""
    if columns:
        return places_of(path, names, columns), "csv"
    lower = [name.lower() for name in names]
    found = [next((name for name in NAMES[role] if name in lower), None) for role in ROLES]
    if None in found[:3]:
        lacking = [role for role, name in zip(ROLES[:3], found[:3], strict=True) if name is None]
        raise UserError(
            f"{path} has the columns {shown(', '.join(names), 200)}: which is the {' and the '.join(lacking)}? "
            "Say so with --mode=csv --columns=user:NAME,item:NAME,rating:NAME,time:NAME"
        )
    return tuple(name and lower.index(name) for name in found), ITEM_LAYOUT.get(found[1], "csv")


def places_of(path, names, columns):
    """Places of user, item, rating and time (or None) as --columns says, by name or 0-based position."""
    given = dict(part.partition(":")[::2] for part in columns.split(","))
    if not {"user", "item", "rating"} <= given.keys() <= set(ROLES):
        raise UserError(f"--columns={columns} is not user:U,item:I,rating:R,time:T (time may be left out)")
    places = []
    for role in ROLES[: 3 + ("time" in given)]:
        name = given[role]
        if name not in names and not (name.isdecimal() and int(name) < len(names)):
            found = shown(", ".join(names), 200) if any(names) else f"{len(names)} columns without names"
            raise UserError(f"--columns={columns}: {path} has no column '{name}'; it has {found}")
        places.append(names.index(name) if name in names else int(name))
    if len(set(places)) < len(places):
        raise UserError(f"--columns={columns} names a column twice")
    return tuple(places + [None])[:4]


def unnamed_columns(path, rows, sep):
    """(places, layout name) of a file without a header, from its first rows."""
    if len(rows[0]) == 4 and sep in ("::", "\t"):
        return (0, 1, 2, 3), "ml-1m" if sep == "::" else "ml-100k"
    if len(rows[0]) == 4 and sep == ",":
        # Amazon's item ids have ten characters, its user ids mostly more. 2014: user first; 2018: item first.
        ten = [all(len(row) == 4 and len(row[place]) == 10 for row in rows) for place in (0, 1)]
        if ten[0] != ten[1]:
            return ((0, 1, 2, 3) if ten[1] else (1, 0, 2, 3)), "amazon"
        if path.name.startswith("ratings_"):
            return (0, 1, 2, 3), "amazon"
    raise UserError(
        f"{path} has {len(rows[0])} columns separated by '{sep}' and no header; say which are which, as in "
        "--mode=csv --columns=user:0,item:1,rating:2,time:3"
    )


def shown(text, most=80):
    """Text of a file as it can stand in a message: not too long, on one line, printable."""
    text = text.strip()
    text = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse_json(line):
    """A line's JSON value, or None."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
