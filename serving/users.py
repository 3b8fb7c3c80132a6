"""The files that recommend.py reads: users' ratings, pairs to predict, lists of items. Items are ids or titles."""

import contextlib
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ratings import files, formats, readers
from ratings.titles import listed, pick_columns, read_rows
from serving.recommender import Support
from utils import UserError, say

MOST_LISTED = 100  # titles of a file in a message
NOBODY = Support(np.zeros(0, np.int64), np.zeros(0, np.float32))


class User(NamedTuple):
    id: str
    support: Support
    note: str = ""  # why there is nothing to adapt to


class Pair(NamedTuple):
    user: User
    item: str  # as given, by id or title
    number: int  # catalogue number; 0: training did not see it


def resolve(texts, recommender, titles, where):
    """Catalogue numbers (n,) of items given by id or title; 0 for what training did not see.

    `where(text)` says where a text stands. A title that is not given as a whole is taken with a line on standard
    error. One UserError lists all titles that several items have.
    """
    numbers, guessed, unclear = [], [], []
    texts = [str(text) for text in texts]
    is_id = {text: recommender.number(text) > 0 or text in titles.by_item for text in texts}
    by_title = any(not is_id[text] and not text.isdecimal() and titles.find(text)[0] for text in texts)
    for text in texts:
        items, whole = titles.find(text) if by_title else ([], False)
        if is_id[text] or text.isdecimal():  # films are called 300 and 1984, too
            items = [text] * is_id[text] + [item for item in items if whole and item != text]
        if len(items) > 1:
            named = [f"'{titles.by_item.get(item, item)}' ({item})" for item in items]
            unclear.append(f"{where(text)}: '{text}' can be {listed(named, ' or ')}")
        elif items and not whole and not is_id[text]:
            guessed.append(f"'{text}' as '{titles.by_item[items[0]]}' ({items[0]})")
        numbers.append(recommender.number(items[0] if items else text))
    if unclear:
        raise UserError(f"{listed(unclear, '; ', MOST_LISTED)}; write the whole title with its year, or the item's id")
    if guessed:
        say(f"titles that are not given as a whole are taken so: {listed(guessed, '; ', MOST_LISTED)}")
    return np.array(numbers, np.int64)


# -----------------------------------------------------------------------------
# ratings


@contextlib.contextmanager
def readable(name):
    """The path of --ratings; standard input and pipes are first copied to a temporary file."""
    if name == "-" and sys.stdin is None:
        raise UserError("--ratings=-: standard input is closed; give a file")
    if name != "-" and (not os.path.exists(name) or os.path.isfile(name) or os.path.isdir(name)):
        yield Path(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "standard input" if name == "-" else os.path.basename(name))
        try:
            opened = contextlib.nullcontext(sys.stdin.buffer) if name == "-" else files.open_raw(name)
            with opened as source, path.open("wb") as file:
                shutil.copyfileobj(source, file)
            yield path
        except UserError as error:
            raise UserError(str(error).replace(str(path), path.name if name == "-" else name)) from None
        except OSError as error:
            raise UserError(f"cannot read {path.name} ({error.strerror}): give a file") from error


def line_of(path, text):
    """`path, line n` of the first line of a text file with this cell; the path alone where there is none."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, row in enumerate(file, 1):
            if text in row and (f'"{text}"' in row or text in map(str.strip, re.split("::|[\t|,;]", row))):
                return f"{path}, line {number}"
    return str(path)


def read_users(options, recommender, titles):
    """The `User`s of --ratings, in the order in which the file first names them. Unknown items are left out."""
    scale = recommender.low, recommender.high
    with readable(options.ratings) as path:
        try:
            rows, notes = readers.read_columns(path, options, scale, one_user=True)
        except UserError as error:
            raise UserError(str(error).replace("the scale ", "the scale of the run's data, ")) from None
        texts = [text_of(item, rows.titles, titles) for item in rows.item_ids.tolist()]
        numbers = resolve(texts, recommender, titles, lambda text: line_of(path, text))
    for note in notes:
        say(note)
    report_unknown(rows.item_ids[numbers == 0].tolist(), int((numbers == 0)[rows.items].sum()), titles)
    return group_users(rows, numbers)


def text_of(item, own_titles, titles):
    """What to look an item up by: its title where a site's export gives it, whose ids may differ from the run's."""
    title = (own_titles or {}).get(item)
    return item if not title or not titles.by_item or titles.by_item.get(item) == title else title


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
        note = "" if part.stop > part.start else "not adapted: training saw none of the user's items"
        found.append(User(str(rows.user_ids[user]), Support(items[part], ratings[part]), note))
    return found


# -----------------------------------------------------------------------------
# pairs and lists of items


def read_pairs(path, users, recommender, titles):
    """The `Pair`s of a file in its order."""
    what = "a file of users and items, one pair a line"
    names = formats.NAMES["user"], formats.NAMES["item"]
    rows = list(pick_columns(path, read_rows(path, what), names, what))
    numbers = numbers_of(path, [(line, item) for line, _, item in rows], recommender, titles)
    by_id = {user.id: user for user in users}
    strangers = dict.fromkeys(user for _, user, _ in rows if user not in by_id)
    by_id |= {user: User(user, NOBODY, "not adapted: --ratings has no such user") for user in strangers}
    pairs = [Pair(by_id[user], item, numbers[item]) for _, user, item in rows]
    if unknown := [pair.item for pair in pairs if not pair.number]:
        hint = "" if titles.by_item else "; titles need --titles"
        items = listed(list(dict.fromkeys(unknown)))
        say(f"items that training did not see are not predicted (rows: {len(unknown):,}{hint}): {items}")
    if strangers:
        say(f"users of {path} without ratings get the unadapted prediction: {listed(list(strangers))}")
    return pairs


def read_items(path, recommender, titles):
    """Catalogue numbers of the items in a list, one a line, or in a file with an item column."""
    what = "a list of items, one a line"
    rows = list(pick_columns(path, read_rows(path, what, columns=1), (formats.NAMES["item"],), what))
    numbers = numbers_of(path, rows, recommender, titles)
    report_unknown([item for item, number in numbers.items() if not number],
                   sum(not numbers[item] for _, item in rows), titles)  # fmt: skip
    return sorted({number for number in numbers.values() if number})


def numbers_of(path, rows, recommender, titles):
    """{text: catalogue number} of (line, text) rows."""
    line = {text: number for number, text in reversed(rows)}
    texts = list(dict.fromkeys(text for _, text in rows))
    numbers = resolve(texts, recommender, titles, lambda text: f"{path}, line {line[text]}")
    return dict(zip(texts, numbers.tolist(), strict=True))
