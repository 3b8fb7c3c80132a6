"""Other papers' protocols: who is trained on, what is asked, and the figures."""

import numpy as np
import pandas as pd
import pytest

import compare
import dataloader
import options as option_module
from evaluation import protocols
from utils import run_script

SIZES = ("--batch_size=4", "--pretraining_batch_size=4", "--val_size=20", "--num_train_iterations=4",
         "--log_interval=2", "--num_factors=2", "--bert_hidden_units=8", "--max_seq_len=12")  # fmt: skip

GENRES = ("Drama", "Drama|War", "Comedy")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A made-up data set: 60 users with 20 to 130 ratings of 150 items, a fifth of them new."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    with open(folder / "movies.dat", "w") as titles:
        for item in range(1, 151):
            titles.write(f"{item}::Title {item} ({1998 if item % 5 == 0 else 1960 + item % 38})::{GENRES[item % 3]}\n")
    with open(folder / "ratings.dat", "w") as ratings:
        for user in range(1, 61):
            items = rng.permutation(150)[: rng.integers(60, 131)] + 1
            for time, item in enumerate(items):
                rating = int(np.clip(round(3.3 + item % 4 / 2 + rng.normal()), 1, 5))
                ratings.write(f"{user}::{item}::{rating}::{time}\n")
    return folder


@pytest.fixture(scope="module")
def draw(data):
    """The file of a draw, as a table."""
    options = option_module.parse("", [f"--data_path={data / 'ratings.dat'}"])
    protocols.prepare(options, data / "draw.csv", 7)
    table = pd.read_csv(data / "draw.csv", dtype={"user": str})
    table["new_item"] = table.item % 5 == 0
    return table


def partition(table, name):
    return table[table.user.str.startswith(f"melu/{name}/")]


def test_partitions_are_of_new_and_existing_users_and_items(draw):
    trained = draw[~draw.user.str.startswith("melu/")]
    people = {name: set(partition(draw, name).user.str.rpartition("/")[2]) for name in protocols.PARTITIONS}
    assert not (people["user-cold"] | people["both cold"]) & (people["warm"] | people["item-cold"])
    assert people["warm"] < set(trained.user) and not trained.new_item.any()
    assert not people["user-cold"] & set(trained.user)
    for name, (_, new_item) in protocols.PARTITIONS.items():
        part = partition(draw, name)
        assert (part.new_item == new_item).all()
        assert part.groupby("user").size().between(13, 100).all()
    assert draw.groupby("user").timestamp.is_monotonic_increasing.all()


def test_warm_queries_are_not_trained_on(draw):
    warm = partition(draw, "warm")
    queries = warm[warm.groupby("user").cumcount(ascending=False) < 10]
    trained = {*zip(draw.user, draw.item, strict=True)}
    assert not trained & {*zip(queries.user.str.rpartition("/")[2], queries.item, strict=True)}
    assert (queries.groupby("user").size() == 10).all()


def test_draws_are_seeded_and_in_no_order_of_time(data, draw):
    options = option_module.parse("", [f"--data_path={data / 'ratings.dat'}"])
    protocols.prepare(options, data / "again.csv", 7)
    protocols.prepare(options, data / "other.csv", 8)
    assert (data / "again.csv").read_bytes() == (data / "draw.csv").read_bytes() != (data / "other.csv").read_bytes()


def test_new_items_are_predicted_from_genres_and_decade(data, draw):
    given = option_module.parse("", protocols.words(data / "draw.csv"))
    problem = dataloader.load_problem(given)
    new, number = dataloader.count_ratings(problem) == 0, problem.ratings.item_ids.astype(int)
    assert new[number % 5 == 0].all() and not new[number % 5 > 0].all()
    values = np.where(number % 3 == 1, 2.0, 0.0)  # that of War
    filled = protocols.item_prior(problem, given)(np.where(new, 9.0, values))
    assert (filled[~new] == values[~new]).all()
    assert filled[new & (number % 3 == 1)].min() > 1 > 0.5 > abs(filled[new & (number % 3 != 1)]).max()


@pytest.mark.parametrize("seed", range(5))
def test_boundaries_have_the_least_absolute_error(seed):
    rng, levels = np.random.default_rng(seed), np.arange(1.0, 4)
    prediction = rng.integers(0, 8, 30) / 2  # with ties
    target = rng.integers(1, 4, 30).astype(float)
    cuts = protocols.boundaries(prediction, target, levels)
    assert cuts[0] <= cuts[1]
    places = np.append(np.unique(prediction) - 0.25, 9)
    errors = [
        abs(levels[np.searchsorted((a, b), prediction)] - target).mean() for a in places for b in places if a <= b
    ]
    assert abs(levels[np.searchsorted(cuts, prediction)] - target).mean() == min(errors)


def test_figures_by_hand():
    """Two users with two targets each; the first is ordered right, the second wrong."""
    rows = pd.DataFrame({"user": ["melu/user-cold/1"] * 2 + ["melu/user-cold/2"] * 2, "target": [5.0, 3, 5, 3]})
    rows = rows.assign(prediction=[7.0, 3.5, 3, 4], task="order", method="melo")
    known = rows.assign(task="validation", user=["v", "v", "w", "w"], prediction=rows.target)
    rows = pd.concat([rows.replace({"user-cold": name}, regex=True) for name in protocols.PARTITIONS] + [known])
    found = protocols.figures(rows, [1, 5], np.arange(1.0, 6))["user-cold"]
    assert found["users"] == 2
    assert found["mae"] == pytest.approx((0.25 + 1.5) / 2)
    assert found["ndcg@1"] == pytest.approx((1 + 3 / 5) / 2)
    assert found["exp_ndcg@1"] == pytest.approx((1 + 7 / 31) / 2)


def test_a_comparison_by_its_command_line(data, tmp_path, capsys):
    given = [f"--output={tmp_path}", "--protocol=melu", "--models=meanpool", "--methods=melo", "--seeds", "1", "2"]
    assert compare.main([*given, f"--data_path={data / 'ratings.dat'}", *SIZES]) == 0
    text = (tmp_path / "melu/table.md").read_text()
    assert "Mean pooling | MELO" in text and "MeLU, 5 steps" in text and "nan" not in text
    table = pd.read_csv(tmp_path / "melu/table.csv")
    assert set(table.seed) == {1, 2} and set(table.partition) == set(protocols.PARTITIONS)
    chance = table[table.method.isin(["global mean", "user mean"])]
    assert chance.groupby(["partition", "seed"])["ndcg@1"].nunique().eq(1).all()  # random order
    assert table[table.method == "popularity"][["mae", "mae_median"]].isna().all(axis=None)
    capsys.readouterr()
    assert compare.main([*given, "--report_only"]) == 0
    assert text in capsys.readouterr().out


def refusal(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: compare.main(words))
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and shown.startswith("error: ") and shown.count("\n") == 1
    return shown


def test_what_a_protocol_cannot_use_is_one_sentence(data, tmp_path, capsys):
    (tmp_path / "ratings.dat").write_bytes((data / "ratings.dat").read_bytes())
    given = [f"--output={tmp_path / 'out'}", "--protocol=melu", f"--data_path={tmp_path / 'ratings.dat'}"]
    assert "titles with years" in refusal(given, capsys)
    (tmp_path / "movies.dat").write_text((data / "movies.dat").read_text().replace("Title 7 (1967)", "Title 7"))
    assert "no year" in refusal(given, capsys)
    (tmp_path / "movies.dat").write_text((data / "movies.dat").read_text().replace("(1998)", "(1990)"))
    assert "larger data" in refusal(given, capsys)
    for more in (
        ["--folds", "0"],
        ["--min_item=5"],
        ["--columns=user:0"],
        ["--external", "a=b"],
        ["--export_targets=x"],
    ):
        assert more[0].partition("=")[0] in refusal([*given, *more], capsys)
