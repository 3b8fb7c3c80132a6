"""Files of item ids and titles, and other small tables of text."""

import csv
import io

from ratings import formats
from utils import UserError, read_regular

SHOWN = 5  # examples in a message


class Titles:
    """Titles by item id, and items by title; empty without a file."""

    def __init__(self, by_item):
        self.by_item = by_item
        self.items = {}
        for item, title in by_item.items():
            self.items.setdefault(title.casefold(), []).append(item)

    def find(self, text):
        """The ids of the items with this title or, if there is none, of those whose titles begin with it."""
        text = text.casefold()
        return self.items.get(text) or [
            i for title, items in self.items.items() if title.startswith(text) for i in items
        ]


def read_rows(path, what):
    """(separator, [(line, cells)]) of a delimited text file in UTF-8 or Latin-1; the separator is the first line's."""
    data = read_regular(path, what)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # MovieLens up to 10M
    first = text.split("\n", 1)[0]
    found = [sep for sep in ("::", "\t", "|", ",", ";") if sep in first]
    if not found:
        raise UserError(f"{path}, line 1: '{first[:80].strip()}' has one column; give {what}")
    sep = min(found, key=first.index)
    if sep in ("::", "|"):
        rows = [(line, row.split(sep)) for line, row in enumerate(text.splitlines(), 1) if row.strip()]
    else:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=sep)
        rows = [(reader.line_num, row) for row in reader if row]
    return [(line, [cell.strip() for cell in row]) for line, row in rows]


def two_columns(path, rows, names, what):
    """(line, cell, cell) of each row: the columns whose header is among `names` (two tuples), else the first two."""
    header = [cell.lower() for cell in rows[0][1]]
    places = [next((header.index(name) for name in each if name in header), None) for each in names]
    if None not in places:
        rows = rows[1:]
    else:
        places = [0, 1]
    for line, cells in rows:
        if len(cells) <= max(places) or not all(cells[place] for place in places):
            raise UserError(f"{path}, line {line}: '{' '.join(cells)[:80]}' lacks a column; give {what}")
        yield line, cells[places[0]], cells[places[1]]


def read_titles(path):
    """`Titles` of a file of item ids and titles, such as MovieLens' movies.dat, movies.csv or u.item."""
    if path is None:
        return Titles({})
    what = "a file of item ids and titles"
    rows = read_rows(path, what)
    names = (formats.NAMES["item"], ("title", "name"))
    return Titles({item: title for _, item, title in two_columns(path, rows, names, what)})


def listed(values, joint=", "):
    """The first few values as text, and how many more there are."""
    more = len(values) - SHOWN
    return joint.join(map(str, values[:SHOWN])) + (f" and {more} more" if more > 0 else "")
