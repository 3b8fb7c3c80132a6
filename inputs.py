"""The files that recommend.py reads: users' ratings, titles, pairs to predict. Items may be given by id or title."""

import contextlib
import csv
import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

import layouts
import readers
import runs
from recommender import Support
from utils import UserError

SHOWN = 5  # examples in a message


class User(NamedTuple):
    id: int | str
    support: Support


class Pair(NamedTuple):
    user: User
    number: int  # catalogue number of the item


def say(text):
    tqdm.write(text, file=sys.stderr)


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
    data = runs.read_regular(path, what)
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
    names = (layouts.NAMES["item"], ("title", "name"))
    return Titles({item: title for _, item, title in two_columns(path, rows, names, what)})


def resolve(texts, recommender, titles, where):
    """Catalogue numbers (n,) of items given by id or title, 0 for what training did not see.

    UserError for a title that several items begin with; `where(text)` says where it stands.
    """
    numbers = np.array([recommender.number(text) for text in texts], np.int64)
    for place in np.flatnonzero(numbers == 0):
        text = str(texts[place])
        if text in titles.by_item:
            continue
        found = titles.find(text)
        if len(found) > 1:
            candidates = [f"'{titles.by_item[item]}' ({item})" for item in found]
            raise UserError(
                f"{where(text)}: the title '{text}' can be {listed(candidates, ' or ')}; "
                "write more of it, or the item's id"
            )
        numbers[place] = recommender.number(found[0]) if found else 0
    return numbers


def listed(values, joint=", "):
    """The first few values as text, and how many more there are."""
    more = len(values) - SHOWN
    return joint.join(map(str, values[:SHOWN])) + (f" and {more} more" if more > 0 else "")


@contextlib.contextmanager
def readable(name):
    """The path of --ratings; standard input is kept in a file for the time."""
    if name != "-":
        yield Path(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "standard input")
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        try:
            yield path
        except UserError as error:
            raise UserError(str(error).replace(f"{folder}/", "")) from None


def line_of(path, text):
    """`path, line n` for the first line of a text file that holds `text`; the path alone where none does."""
    with path.open(encoding="utf-8", errors="replace") as file:
        line = next((number for number, row in enumerate(file, 1) if text in row), None)
    return f"{path}, line {line}" if line else str(path)


def read_users(options, recommender, titles):
    """The `User`s of --ratings, in the order in which the file first names them; unknown items are left out."""
    scale = recommender.low, recommender.high
    with readable(options.ratings) as path:
        try:
            rows, notes = readers.read_columns(
                path, options.mode, options.columns, options.sep, options.skip_bad_rows, scale
            )
        except UserError as error:
            scale = f"{scale[0]:g} to {scale[1]:g}, the scale of the run's data"
            raise UserError(str(error).replace("--rating_scale", scale)) from None
        numbers = resolve(rows.item_ids.tolist(), recommender, titles, lambda text: line_of(path, text))
    for note in notes:
        say(note)
    report_unknown(rows.item_ids[numbers == 0].tolist(), int((numbers == 0)[rows.items].sum()), titles)
    return group_users(rows, numbers)


def report_unknown(items, n_rows, titles):
    """Say on standard error which items are left out."""
    if items:
        hint = "" if titles.by_item else "; titles need --titles"
        rows = f"items: {len(items):,}, rows: {n_rows:,}{hint}"
        say(f"items that training did not see are left out ({rows}): {listed(items)}")


def group_users(rows, numbers):
    """`User`s of `readers.Columns` whose items have these catalogue numbers (0: unknown)."""
    order = np.lexsort((rows.times, rows.users))
    users, items = rows.users[order], numbers[rows.items][order]
    again = pd.Series(users * np.int64(len(numbers) + numbers.max() + 1) + items).duplicated(keep="last")
    keep = (items > 0) & ~again.to_numpy()
    users, items, ratings = users[keep], items[keep], rows.ratings[order][keep]
    _, first = np.unique(rows.users, return_index=True)
    found = []
    for user in rows.users[np.sort(first)]:
        part = slice(*np.searchsorted(users, [user, user + 1]))
        found.append(User(rows.user_ids[user].item(), Support(items[part], ratings[part])))
    return found


def read_pairs(path, users, recommender, titles):
    """The `Pair`s of a file in its order; pairs of unknown items are reported and left out."""
    what = "a file of users and items, one pair a line"
    rows = list(two_columns(path, read_rows(path, what), (layouts.NAMES["user"], layouts.NAMES["item"]), what))
    by_id = {str(user.id): user for user in users}
    whole = all(isinstance(user.id, int) for user in users)
    line = {text: number for number, _, text in reversed(rows)}
    texts = list(line)
    numbers = dict(zip(texts, resolve(texts, recommender, titles, lambda t: f"{path}, line {line[t]}"), strict=True))
    unknown = [text for text in reversed(texts) if not numbers[text]]
    report_unknown(unknown, sum(not numbers[text] for _, _, text in rows), titles)
    nobody = Support(np.zeros(0, np.int64), np.zeros(0, np.float32))
    strangers = sorted({user for _, user, _ in rows} - by_id.keys())
    if strangers:
        say(
            f"users of {path} without ratings get the unadapted prediction "
            f"(users: {len(strangers):,}): {listed(strangers)}"
        )
    for stranger in strangers:
        by_id[stranger] = User(int(stranger) if whole and stranger.isdecimal() else stranger, nobody)
    return [Pair(by_id[user], int(numbers[item])) for _, user, item in rows if numbers[item]]
