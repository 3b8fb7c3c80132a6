"""The files that recommend.py reads: users' ratings, titles, pairs to predict. Items may be given by id or title."""

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ratings import formats, readers
from ratings.titles import listed, read_rows, two_columns
from serving.recommender import Support
from utils import UserError, say


class User(NamedTuple):
    id: int | str
    support: Support


class Pair(NamedTuple):
    user: User
    number: int  # catalogue number of the item


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
    rows = list(two_columns(path, read_rows(path, what), (formats.NAMES["user"], formats.NAMES["item"]), what))
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
