"""What a ratings file is, told from its first lines: layout, separator, columns, dates, whose export."""

import csv
import json
import re
from typing import NamedTuple

from ratings import fields
from utils import UserError, shorten

ROLES = ("user", "item", "rating", "time")

# Column names, as `plain_name` gives them, and what they hold; the first of a line that a file has counts.
NAMES = {
    "user": ("user", "user_id", "userid", "reviewerid", "username", "profilename", "uid"),
    "item": (
        *("item", "item_id", "itemid", "movieid", "movie_id", "parent_asin", "asin", "product_id", "productid"),
        *("business_id", "bookid", "book_id", "isbn", "animeid", "anime_id", "mangaid", "gameid", "songid", "trackid"),
        *("artistid", "filmid", "recipeid", "jokeid", "gmapid", "movie", "film", "book", "product"),
    ),
    "rating": (
        *("rating", "overall", "stars", "bookrating", "userrating"),
        *("ratingval", "score", "reviewscore", "myscore"),
    ),
    "time": ("timestamp", "time", "unixreviewtime", "reviewtime", "date", "datetime", "createdat", "updatedat", "ts"),
}
ITEM_LAYOUT = {"movieid": "ml-latest", "businessid": "yelp"}
ITEM_LAYOUT |= dict.fromkeys(("parentasin", "asin", "productid"), "amazon")

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
NO_TIME = "there is no time column, so each user's ratings keep the order of the file"
BLANKS = r"\s+"  # the separator of columns that are padded with blanks or tabs


class Export(NamedTuple):
    """One person's ratings as a site gives them: the site's scale, and its column names as `plain_name` gives them."""

    site: str
    low: float
    high: float
    rating: str
    sign: str  # a column that tells this export from other files
    item: str | None = None  # None: the title is the id
    title: str | None = None
    year: str | None = None
    time: str | None = None


EXPORTS = (
    Export("Letterboxd", 0.5, 5, "rating", "letterboxduri", title="name", year="year", time="date"),
    Export("IMDb", 1, 10, "yourrating", "const", "const", "title", "year", "daterated"),
    Export("Goodreads", 1, 5, "myrating", "bookid", "bookid", "title", time="dateadded"),
    Export("MyAnimeList", 1, 10, "myscore", "seriesanimedbid", "seriesanimedbid", "seriestitle"),
    Export("MyAnimeList", 1, 10, "myscore", "mangamangadbid", "mangamangadbid", "mangatitle"),
    Export("MovieLens", 0.5, 5, "rating", "tmdbid", "movieid", "title", time="timestamp"),
)


class Layout(NamedTuple):
    """Where a file keeps its columns; a place is a column's number or a JSON key, None where there is none."""

    name: str  # as in LAYOUT_TEXT
    places: tuple  # of user, item, rating and time; no user: all ratings are one user's
    sep: str = ""  # "": JSON lines; BLANKS
    width: int = 0  # columns in a row
    header: bool = False
    dates: str | None = None  # format of the times; None: they are numbers
    title: tuple = ()  # places of the title and of the year, for the files of one user
    export: Export | None = None
    unit: float | None = None  # units of Parquet's times in a second
    notes: tuple = ()  # what was assumed


def recognise(path, head, options, one_user=False, rest=str):
    """The `Layout` of a file that begins with the lines `head`; `UserError` where it does not fit `--mode`.

    `rest()` gives more lines, which are looked at where dates in `head` can be read in two ways.
    """
    refuse_others(path, head)
    find = json_layout if head.startswith("{") else delimited_layout
    layout, cells = find(path, head, options, one_user)
    check_mode(path, layout.name, options.mode)
    times = layout.places[3]
    if times is None:
        return layout._replace(notes=(*layout.notes, *offer_time(path, layout, cells)))
    texts = [row[times].strip() for row in cells if times in row and row[times].strip()]
    if not texts or is_number(texts[0]):
        return layout
    try:
        form = fields.date_format(path, texts)
    except UserError:
        _, cells = find(path, head + rest(), options, one_user)
        form = fields.date_format(path, [row[times].strip() for row in cells if row.get(times, "").strip()])
    return layout._replace(dates=form or fields.ISO)


def refuse_others(path, head):
    """Raise `UserError` for what is often mistaken for a ratings file."""
    start = head.lstrip()[:200].lower()
    if not start:
        raise UserError(f"{path} is empty; give a file with ratings")
    if start.startswith(("<!doctype html", "<html")):
        raise UserError(f"{path} is a web page, not ratings, as a failed download leaves; fetch it again")
    if start.startswith("<"):
        if "<myanimelist" in head:
            kind, columns = "MyAnimeList's export in XML", "series_animedb_id,series_title,my_score"
        else:
            kind, columns = "XML", "user,item,rating,time"
        raise UserError(f"{path} is {kind}, not a table; convert it to CSV with the header {columns}")
    if head.startswith("["):
        raise UserError(f"{path} is one JSON array; write one JSON object a line")
    if head[257:262] == "ustar":
        raise UserError(f"{path} is a tar archive; unpack it and name the ratings file in it")
    if "\0" in head.split("\n", 1)[0] or head.startswith("\udcff\udcfe"):
        raise UserError(
            f"{path} is not text in UTF-8 (nor gzip, bzip2, xz, zip or Parquet); if it is text, give its --encoding, "
            "such as utf-16"
        )
    if "\r" in head and "\n" not in head:
        raise UserError(f"{path} ends its lines with a bare carriage return; convert it to line feeds")


def check_options(options):
    """Raise `UserError` where the options of a file's layout do not go together."""
    mode = options.mode
    if mode is not None and mode not in MODE_LAYOUT:
        raise UserError(f"--mode={mode} is not known; it is one of {', '.join(MODE_LAYOUT)}")
    if mode not in (None, "csv", "parquet") and (options.columns or options.sep):
        raise UserError(f"--columns and --sep go with --mode=csv or parquet, not with --mode={mode}")


def check_mode(path, name, mode):
    """Raise `UserError` where a file of the layout `name` cannot be `mode`'s."""
    wanted = MODE_LAYOUT.get(mode, name)
    if wanted != name and (wanted != "csv" or name == "parquet"):
        what = f"not what --mode={mode} stands for ({LAYOUT_TEXT[wanted]}) but {LAYOUT_TEXT[name]}"
        raise UserError(f"{path} is {what}; use --mode={name}")


def json_layout(path, head, options, one_user):
    """(`Layout` of JSON lines by the keys of the first one, [{key: text}])."""
    lines = [line for line in head.split("\n")[:1000] if line.strip()]
    record = parse_json(lines[0])
    if not isinstance(record, dict) or fields.NOT_UTF8.search("".join(record)):
        raise UserError(f"{path}, line 1: '{shorten(lines[0])}' is not a JSON object in UTF-8")
    keys = list(record)
    layout = choose_columns(path, keys, options.columns, one_user)
    places, title = (
        tuple(None if place is None else keys[place] for place in each) for each in (layout.places, layout.title)
    )
    records = [record for record in map(parse_json, lines) if isinstance(record, dict)]
    cells = [{key: value for key, value in record.items() if isinstance(value, str)} for record in records]
    return layout._replace(places=places, title=title), cells


def delimited_layout(path, head, options, one_user):
    """(`Layout` of delimited text by its first lines, [{place: cell}])."""
    lines = [line for line in head.split("\n") if line.strip()]
    sep = find_separator(path, lines[:1000], options.sep, 2 if one_user else 3)
    rows = [split(line, sep) for line in lines]
    header = not any(is_number(cell) for cell in rows[0])
    if header or options.columns:
        layout = choose_columns(path, rows[0] if header else [""] * len(rows[0]), options.columns, one_user)
    else:
        layout = unnamed_columns(path, [row for row in rows[:1000] if len(row) == len(rows[0])], sep, one_user)
    cells = [dict(enumerate(row)) for row in rows[header:] if len(row) == len(rows[0])]
    return layout._replace(sep=sep, width=len(rows[0]), header=header), cells


def find_separator(path, lines, sep, least):
    """The separator of lines, as given or the first that makes `least` columns of the first line."""
    sep = {"\\t": "\t", "tab": "\t", "\\t\\t": "\t\t", "\\t+": BLANKS, " +": BLANKS}.get(sep, sep)
    odd = sep is not None and (len(set(sep)) != 1 or sep[0].isalnum() or not " " <= sep[0] <= "~" and sep[0] != "\t")
    if odd and sep != BLANKS:
        raise UserError(rf"--sep={sep} is no separator; give one character, the same one repeated, or \s+ for blanks")
    likely = likely_separator(lines, least)
    cells = split(lines[0], sep or likely)
    if len(cells) >= least:
        return sep or likely
    first = f"{path} has {len(cells)} column{'s' * (len(cells) != 1)} in its first line, '{shorten(lines[0])}'"
    if len(split(lines[0], likely)) >= least:
        raise UserError(f"{first}: its separator seems to be '{tab_shown(likely)}'; leave out --sep")
    raise UserError(f"{first}: user, item and rating are needed" + "; is --sep missing?" * (len(cells) < 2))


def likely_separator(lines, least):
    """The first separator that makes `least` columns of the first line, or the one that makes most."""
    widths = {sep: len(split(lines[0], sep)) for sep in ("::", "\t", ",", ";", "|", " ") if sep in lines[0]}
    sep = next((sep for sep in widths if widths[sep] >= least), max(widths, key=widths.get, default=","))
    return BLANKS if sep in ("\t", " ") and is_padded(lines, sep) else sep


def is_padded(lines, sep):
    """Whether the columns are separated by several blanks or tabs: every line then has as many words."""
    words = {len(line.split()) for line in lines}
    between = [split(line, sep)[1::2] for line in lines]
    doubled = any(between) and not any(cell for row in between for cell in row)
    padded = sep == " " and any("  " in line.strip() or line[0] == " " for line in lines)
    return len(words) == 1 and words != {1} and '"' not in "".join(lines) and (doubled or padded)


def split(line, sep):
    """A line's cells, without quotes and spaces around them."""
    if sep == BLANKS:
        return line.split()
    try:
        cells = next(csv.reader([line.rstrip("\r\n")], delimiter=sep[0]), [])
    except csv.Error:
        return []
    return [cell.strip() for cell in cells[:: len(sep)]]


def plain_name(name):
    """A column's name in lower case, letters and digits alone, without the type that RecBole appends."""
    return re.sub("[^a-z0-9]", "", name.lower().partition(":")[0])


def choose_columns(path, names, columns, one_user):
    """The `Layout` of columns of these names, by --columns or by what the names usually mean."""
    if columns:
        return Layout("csv", places_of(path, names, columns, one_user))
    plain = [plain_name(name) for name in names]
    found = [next((n for n in map(plain_name, NAMES[role]) if n in plain), None) for role in ROLES]
    export = None
    if one_user and found[0] is None:
        needed = [(each, {each.rating, each.sign, each.item or each.title}) for each in EXPORTS]
        export = next((each for each, names in needed if names <= {*plain}), None)
        if export:
            found = [None, export.item or export.title, export.rating, export.time]
        if found[1] is None:
            found[1] = next((name for name in ("title", "name") if name in plain), None)
        found[0] = ""  # not a column, and not needed
    if None in found[:3]:
        raise UserError(unclear(path, names, found))
    for name in found:
        if name and plain.count(name) > 1:
            raise UserError(f"{path} has two columns that may be '{name}'; say which with --columns, by position")
    places = tuple(plain.index(name) if name and name in plain else None for name in found)
    if found[0] != "":
        return Layout(ITEM_LAYOUT.get(found[1], "csv"), places)
    title = (export.title, export.year) if export else ("title", None)
    title = tuple(plain.index(name) if name in plain else None for name in title)
    kind = f"{export.site}'s export" if export else "a file without a column of users"
    return Layout("csv", places, title=title, export=export, notes=(f"{kind}: its ratings are taken as one user's",))


def unclear(path, names, found):
    """What to say where `found`, the names of the columns by role, lacks one that is needed."""
    lacking = [role for role, name in zip(ROLES[:3], found[:3], strict=True) if name is None]
    roles = ROLES if len(names) > 3 else ROLES[:3]
    places = [*map(plain_name, names)]
    known = [(role, name) for role, name in zip(roles, found, strict=False) if name != ""]
    hint = ",".join(f"{role}:{names[places.index(name)] if name else 'NAME'}" for role, name in known)
    hint = f"say so with --mode=csv --columns={shorten(hint, 150)}"
    hint = hint if len(names) > 2 or found[0] == "" else "user, item and rating are needed"
    return f"{path} has the columns {shorten(', '.join(names), 200)}: which is the {' and the '.join(lacking)}? {hint}"


def places_of(path, names, columns, one_user):
    """Places of user, item, rating and time (or None) as --columns says, by name or 0-based position."""
    parts = [part.partition(":")[::2] for part in columns.split(",")]
    given = dict(parts)
    needed = {"item", "rating"} if one_user else {"user", "item", "rating"}
    if not needed <= given.keys() <= set(ROLES) or len(given) < len(parts):
        raise UserError(f"--columns={columns} is not user:U,item:I,rating:R,time:T (time may be left out)")
    places = dict.fromkeys(ROLES)
    for role, name in given.items():
        if names.count(name) > 1:
            raise UserError(f"--columns={columns}: {path} has two columns '{name}'; give a 0-based position instead")
        if name not in names and not (name.isdecimal() and len(name) < 9 and int(name) < len(names)):
            found = shorten(", ".join(names), 200) if any(names) else f"{len(names)} columns without names"
            raise UserError(f"--columns={columns}: {path} has no column '{name}'; it has {found}")
        places[role] = names.index(name) if name in names else int(name)
    if len({*places.values()} - {None}) < len(given):
        raise UserError(f"--columns={columns} names a column twice")
    return tuple(places.values())


def unnamed_columns(path, rows, sep, one_user):
    """The `Layout` of a file without a header, from its first rows."""
    width = len(rows[0])
    if width == 4 and sep in ("::", "\t"):
        return Layout("ml-1m" if sep == "::" else "ml-100k", (0, 1, 2, 3))
    if width == 4 and sep == ",":
        # Amazon's item ids have ten characters, its user ids mostly more. 2014: user first; 2018: item first.
        ten = [all(len(row[place]) == 10 for row in rows) for place in (0, 1)]
        if ten[0] != ten[1]:
            return Layout("amazon", (0, 1, 2, 3) if ten[1] else (1, 0, 2, 3))
        if path.name.startswith("ratings_"):
            return Layout("amazon", (0, 1, 2, 3))
    rating = fields.parse_numbers([row[min(width, 3) - 1] for row in rows])
    small = bool((abs(rating) <= 100).all())
    if width == 2 and one_user and small:
        return Layout("csv", (None, 0, 1, None), notes=("no header: taken as item and rating of one user",))
    if width == 3 and small or width == 4 and small and fields.looks_like_times(path, [row[3] for row in rows]):
        taken = "user, item, rating" + ", time" * (width == 4)
        note = f"no header: the columns are taken as {taken}; if they are others, say so with --mode=csv --columns"
        return Layout("csv", (0, 1, 2, 3 if width == 4 else None), notes=(note,))
    example = "user:0,item:1,rating:2" + ",time:3" * (width > 3)
    raise UserError(
        f"{path} has {width} columns separated by '{tab_shown(sep)}' and no header; say which are which, as in "
        f"--mode=csv --columns={example}"
    )


def offer_time(path, layout, cells):
    """What to say of a file without a column of times: that there is none, and which column looks like one."""
    taken = ",".join(f"{role}:{place}" for role, place in zip(ROLES, layout.places, strict=True) if place is not None)
    for place in cells[0] if cells else ():
        if place not in layout.places + layout.title and fields.looks_like_times(
            path, [row.get(place, "") for row in cells]
        ):
            yield f"column {place} looks like times; to use it: --mode=csv --columns={taken},time:{place}"
    yield NO_TIME


def tab_shown(sep):
    return sep.replace("\t", "\\t")


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse_json(line):
    """A line's JSON value, numbers as they are written; None for what is not JSON."""
    try:
        return json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        return None
