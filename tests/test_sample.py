"""The bundled sample: made again byte for byte, small, and such that adapting to a user pays."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ratings.titles import read_titles

SAMPLE = Path(__file__).parents[1] / "Data" / "sample"


@pytest.fixture(scope="module")
def table():
    return pd.read_csv(SAMPLE / "ratings.csv")


def test_same_bytes_again(tmp_path):
    again = tmp_path / "again.csv"
    subprocess.run([sys.executable, SAMPLE / "make_sample.py", f"--output={again}"], check=True, cwd=tmp_path)
    assert again.read_bytes() == (SAMPLE / "ratings.csv").read_bytes()
    assert (tmp_path / "titles.csv").read_bytes() == (SAMPLE / "titles.csv").read_bytes()


def test_other_seed_gives_other_ratings(tmp_path):
    again = tmp_path / "again.csv"
    command = [sys.executable, SAMPLE / "make_sample.py", f"--output={again}", "--seed=1", "--users=9"]
    subprocess.run(command, check=True)
    assert pd.read_csv(again).user_id.nunique() == 9
    assert not (SAMPLE / "ratings.csv").read_bytes().startswith(again.read_bytes()[:200])


def test_size_and_ranges(table):
    assert (SAMPLE / "ratings.csv").stat().st_size <= 1_000_000
    assert list(table.columns) == ["user_id", "item_id", "rating", "timestamp"]
    assert sorted(table.rating.unique()) == [1, 2, 3, 4, 5]
    assert table.groupby("user_id").size().between(10, 80).all()
    assert table.groupby("item_id").size().min() >= 50
    assert not table.duplicated(["user_id", "item_id"]).any()
    assert table.timestamp.is_monotonic_increasing


def test_every_item_has_a_title(table):
    titles = read_titles(SAMPLE / "titles.csv")
    assert set(titles.by_item) == set(table.item_id.astype(str))
    assert titles.find("film 17") == (["17"], False) and titles.find(titles.by_item["17"]) == (["17"], True)


def test_ratings_are_imbalanced(table):
    shares = table.rating.value_counts(normalize=True)
    assert 0.57 < -(shares * np.log(shares)).sum() / np.log(5) < 0.90
    high = (table.rating >= 4).groupby(table.user_id).mean()
    assert (high >= 0.9).mean() > 0.3


def squared_errors(table):
    """(item means, damped means, low rank): squared errors, each (users,), on the last ratings of a third."""
    table = table.assign(last=table.groupby("user_id").cumcount(ascending=False))
    held_out = table.user_id % 3 == 0
    known, new = table[~held_out], table[held_out]
    mean = known.rating.mean()
    user_effect = (known.rating - mean).groupby(known.user_id).mean()
    left = known.rating - mean - known.user_id.map(user_effect)
    item_effect = left.groupby(known.item_id).sum() / (left.groupby(known.item_id).size() + 10)
    left = (left - known.item_id.map(item_effect)).rename("left")
    matrix = known.assign(left=left).pivot(index="user_id", columns="item_id", values="left").fillna(0)
    squared_sizes, factors = np.linalg.eigh(matrix.T @ matrix)
    factors = factors[:, -3:] * np.sqrt(squared_sizes[-3:]) / 10

    factors = factors[np.searchsorted(matrix.columns, table.item_id)]
    base = (mean + table.item_id.map(item_effect)).to_numpy()
    ratings, last = table.rating.to_numpy(), table["last"].to_numpy()
    errors = []
    for rows in new.groupby("user_id").indices.values():
        rows = new.index.to_numpy()[rows]
        target, support = rows[-1], rows[(last[rows] > 0) & (last[rows] < 30)]
        residual = ratings[support] - base[support]
        damped = residual.sum() / (len(residual) + 5)
        x = np.column_stack([np.ones(len(support)), factors[support]])
        taste = np.linalg.solve(x.T @ x + np.diag([3, 8, 8, 8]), x.T @ residual)
        low_rank = taste @ [1, *factors[target]]
        predictions = np.clip(base[target] + [0, damped, low_rank], 1, 5)
        errors.append((predictions - ratings[target]) ** 2)
    return np.array(errors).T


def test_adapting_to_a_user_pays(table):
    item, damped, low_rank = squared_errors(table)
    for worse, better in ((item, damped), (damped, low_rank)):
        gain = worse - better
        assert gain.mean() / (gain.std() / np.sqrt(len(gain))) > 3
