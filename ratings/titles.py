"""Small tables of text (titles, pairs, lists of items), and items looked up by their title."""

import bisect
import csv
import io
import re
import unicodedata
from pathlib import Path

from ratings import files, formats
from utils import UserError, printable, read_regular, shorten

SHOWN = 5  # examples in a message
SEPARATORS = "::", "\t", "|", ",", ";"
YEAR = re.compile(r"\s*\((\d{4})(?:[-\u2013]\d{0,4})?\)\s*$")
ARTICLE = re.compile(r"(.+), (the|an?|l[aeo]s?|el|il|gli|der|die|das|l')$")
LEADING_ARTICLE = re.compile(r"(?:(?:the|an?|l[aeo]s?|el|il|gli|der|die|das) |l')(?=.)")


class Titles:
    """Titles by item id, and items by title; empty without a file."""

    def __init__(self, by_item):
        self.by_item = by_item
        self._exact, self._whole, self._other, self._year = {}, {}, {}, {}
        for item, title in by_item.items():
            base, self._year[item] = split_year(title)
            self._exact.setdefault(title, []).append(item)
            self._whole.setdefault(base, []).append(item)
            for name in other_names(base):
                self._other.setdefault(name, []).append(item)
        self._sorted = sorted(self._whole.keys() | self._other.keys())

    def find(self, text):
        """(ids of the items that `text` can name, whether it is their whole title).

        The whole title, with or without its year, comes before other names in parentheses, these before titles that
        begin with `text`. A year in `text` must be the title's.
        """
        base, year = split_year(text)
        if text in self._exact or not base:
            return self._exact.get(text, []), True
        for names, whole in (self._whole, True), (self._other, False):
            if found := self._of_year(names.get(base, []), year):
                return found, whole
        first = bisect.bisect_left(self._sorted, base)
        last = bisect.bisect_right(self._sorted, base + "\U0010ffff")
        begin = [item for name in self._sorted[first:last] for names in (self._whole, self._other)
                 for item in names.get(name, [])]  # fmt: skip
        return self._of_year(begin, year), False

    def _of_year(self, items, year):
        """The items whose year is `year`, or unknown, each once."""
        return [item for item in dict.fromkeys(items) if year is None or self._year[item] in (year, None)]


def split_year(title):
    """(title in a form that can be compared, its year as text or None)."""
    year = YEAR.search(title)
    text = unicodedata.normalize("NFKD", title[: year.start()] if year else title).casefold()
    text = " ".join("".join(letter for letter in text if not unicodedata.combining(letter)).split())
    if article := ARTICLE.match(text):
        text = f"{article[2]}{'' if article[2].endswith(chr(39)) else ' '}{article[1]}"
    return text, year and year[1]


def other_names(base):
    """What an item may be called beside its whole title: without its article, or as it says in parentheses."""
    inside = [name.strip().removeprefix("a.k.a. ") for name in re.findall(r"\(([^()]+)\)", base)]
    names = [re.sub(r"\s*\([^()]*\)", "", base), *inside]
    names = [split_year(name)[0] for name in names]
    return {*names, *(LEADING_ARTICLE.sub("", name, count=1) for name in (*names, base))} - {base, ""}


# -----------------------------------------------------------------------------
# reading


def read_rows(path, what, columns=2):
    """[(line, cells)] of a delimited text file in UTF-8 or Latin-1; the first line says the separator."""
    data = read_pipe(path) if Path(path).is_fifo() else read_regular(path, what)
    if b"\0" in data[:4096]:
        raise UserError(f"{path} is not a text file in UTF-8: give {what}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # MovieLens up to 10M
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    first = text.lstrip("\n").split("\n", 1)[0]
    if not first.strip():
        raise UserError(f"{path} is empty: give {what}")
    found = [sep for sep in SEPARATORS if sep in first]
    header = {cell.strip() for cell in re.split("::|[\t|,;]", first.lower().replace('"', ""))}
    if columns == 1 and not header & {*formats.NAMES["item"]}:
        return [(line, [row.strip()]) for line, row in enumerate(text.split("\n"), 1) if row.strip()]
    if not found and columns > 1:
        raise UserError(f"{path}, line 1: '{shorten(first)}' has one column; give {what}")
    sep = min(found, key=first.index, default=",")
    rows = [] if sep in ("::", "|") else quoted_rows(path, text, sep)
    rows = rows or [(line, row.split(sep)) for line, row in enumerate(text.split("\n"), 1) if row.strip()]
    return [(line, [cell.strip() for cell in row]) for line, row in rows]


def read_pipe(path):
    with files.open_raw(path) as pipe:
        return pipe.read()


def quoted_rows(path, text, sep):
    """[(line, cells)] of text with quoted cells; empty where tabs separate it and quotation marks are plain letters."""
    reader, rows, line = csv.reader(io.StringIO(text, newline=""), delimiter=sep, strict=True), [], 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        if sep == "\t":
            return []
        raise UserError(
            f"{path}, line {line}: its quotation marks do not pair up, or a field is longer than 131,072 characters "
            f"({error}); correct the line, or double the quotation marks that belong to the text"
        ) from None
    return rows


def pick_columns(path, rows, names, what):
    """(line, cell, ...) of each row: the columns whose header is among `names` (tuples), else the first ones."""
    header = [cell.lower() for cell in rows[0][1]]
    places = [next((header.index(name) for name in each if name in header), None) for each in names]
    if None not in places:
        rows = rows[1:]
    elif places != [None] * len(places):
        lacking = names[places.index(None)][0]
        raise UserError(f"{path}, line {rows[0][0]}: the header names no column '{lacking}'; give {what}")
    else:
        places = list(range(len(names)))
    for line, cells in rows:
        if len(cells) <= max(places) or not all(cells[place] for place in places):
            raise UserError(f"{path}, line {line}: '{shorten(' '.join(cells))}' lacks a column; give {what}")
        yield line, *(cells[place] for place in places)


def read_titles(path):
    """`Titles` of a file of item ids and titles, such as MovieLens' movies.dat, movies.csv or u.item."""
    if path is None:
        return Titles({})
    what = "a file of item ids and titles"
    columns = pick_columns(path, read_rows(path, what), (formats.NAMES["item"], ("title", "name")), what)
    return Titles({item: printable(title) for _, item, title in columns})


def listed(values, joint=", ", most=SHOWN):
    """The first few values as printable text, and how many more there are."""
    more = len(values) - most
    return joint.join(printable(value) for value in values[:most]) + (f" and {more:,} more" if more > 0 else "")
