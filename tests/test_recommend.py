"""recommend.py and the Recommender: the same predictions as main.py --test, from files of every kind."""

import csv
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import running
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import LEARNERS, options

import dataloader
import main
import maml
import recommend
import utils
from evaluation import evaluate
from models import checkpoint
from ratings import files
from ratings.titles import Titles
from recommend import Recommender, Support
from serving import export, picture, report
from utils import UserError, run_script

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "Data/sample/ratings.csv"
TINY = ("--num_train_iterations=3", "--log_interval=3", "--num_test_data=40", "--device=cpu", "--batch_size=8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, tested; the data that it was trained on is gone."""
    place = tmp_path_factory.mktemp("run")
    data = shutil.copy(SAMPLE, place / "ratings.csv")
    command = ["--mode=sample", f"--data_path={data}", f"--log_dir={place / 'log'}", *TINY]
    assert main.main(command) == 0
    assert main.main([*command, "--test"]) == 0
    data.unlink()
    return place / "log" / "sample-bert4rec-melo"


@pytest.fixture(scope="module")
def trained(run):
    return Recommender.load(run)


@pytest.fixture(scope="module")
def problem():
    return dataloader.load_problem(options(mode="sample", data_path=SAMPLE, num_test_data=60))


def stirred(problem, **given):
    """(system away from its initialisation, `Recommender` around it)."""
    opts = options(mode="sample", **given)
    scale = (problem.mean, problem.std, problem.ratings.low, problem.ratings.high)
    system = maml.Ensemble(len(problem.ratings.item_ids), opts, scale)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in system.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    state = {
        "options": vars(opts),
        "system": system.state_dict(),
        "item_ids": problem.ratings.item_ids.tolist(),
        "levels": problem.ratings.levels.tolist(),
        "fingerprint": problem.ratings.fingerprint,
        "step": 0,
    }
    return system, Recommender(state, "a test")


def support_of(ratings, user):
    """A user's ratings but the last, as a `Support`."""
    part = slice(ratings.offsets[user], ratings.offsets[user + 1] - 1)
    return Support(ratings.items[part].astype(np.int64) + 1, ratings.values[part])


@pytest.mark.parametrize("model", LEARNERS)
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"adapt": "all", "loss_network": "lstm", "head": "plain", "members": 2},
        {"loss_network": "metal", "members": 2},
    ],
    ids=["head", "all", "metal"],
)
def test_predictions_equal_those_of_evaluation(problem, model, given):
    system, recommender = stirred(problem, model=model, **given)
    scored = evaluate.evaluate(system, problem, problem.test)
    supports = [support_of(problem.ratings, user) for user in scored.user]
    predicted = recommender.scores(supports, [np.array([item + 1]) for item in scored.item])
    assert np.ptp(scored.prediction) > 0.1
    np.testing.assert_allclose(recommender.cut(np.concatenate(predicted)), scored.prediction, rtol=0, atol=1e-6)

    everything = recommender.top(supports, 10**6)
    targets = problem.ratings.item_ids[scored.item].tolist()
    of_target = [{i: rating for i, rating, _ in found}[item] for found, item in zip(everything, targets, strict=True)]
    np.testing.assert_allclose(of_target, scored.prediction, rtol=0, atol=1e-6)


def test_ranks_of_last_items_are_their_places_in_the_lists(problem):
    system, recommender = stirred(problem)
    users, ratings = problem.test[:20], problem.ratings
    lists = recommender.top([support_of(ratings, user) for user in users], 10**6)
    targets = ratings.item_ids[ratings.items[ratings.offsets[users + 1] - 1]].tolist()
    places = [[item for item, _, _ in found].index(target) + 1 for found, target in zip(lists, targets, strict=True)]
    ranks = evaluate.rank_targets(system, problem, users)
    assert ranks["prediction"].tolist() == places
    count = np.bincount(ratings.items[np.isin(np.repeat(np.arange(len(ratings.user_ids)), np.diff(ratings.offsets)),
                        problem.train)], minlength=len(ratings.item_ids))  # fmt: skip
    for user, rank in zip(users, ranks["popularity"], strict=True):
        *rated, target = ratings.items[ratings.offsets[user] : ratings.offsets[user + 1]]
        others = np.delete(count, [*rated, target])
        assert (others > count[target]).sum() < rank <= 1 + (others >= count[target]).sum()


def test_top_is_the_sorted_catalogue_without_what_was_rated(problem):
    _, recommender = stirred(problem)
    ratings = [
        (item, rating) for item, rating in zip(recommender.item_ids[:9], [5, 1, 3, 4, 2, 5, 5, 1, 3], strict=True)
    ]
    user = recommender.adapt(ratings)
    rest = recommender.item_ids[9:]
    predicted = dict(zip(rest, user.predict(rest), strict=True))
    assert len(user.top(10**6)) == len(rest)
    for n in (1, 7, 10**6):
        found = user.top(n)
        assert [best.item for best in found] == [best.item for best in user.top(10**6)][:n]
        assert [best.rating for best in found] == pytest.approx(sorted(predicted.values(), reverse=True)[:n], abs=1e-6)
        assert [best.score for best in found] == sorted((best.score for best in found), reverse=True)
        assert all(best.rating == pytest.approx(predicted[best.item], abs=1e-6) for best in found)


def test_only_allowed_items_are_listed(problem):
    _, recommender = stirred(problem)
    support, _ = recommender.support([(recommender.item_ids[0], 5)])
    allowed = np.zeros(len(recommender.item_ids), bool)
    allowed[:4] = True
    (found,), (everything,) = recommender.top([support], 10, allowed), recommender.top([support], 10**6)
    assert found == [best for best in everything if best.item in recommender.item_ids[1:4]]


def test_scores_are_ranked_where_the_scale_cuts_them(problem):
    """A user whose predictions are beyond the scale does not get five times 5.00."""
    _, recommender = stirred(problem)
    recommender._system.scale[0] += 9
    found = recommender.adapt([]).top(5)
    assert {best.rating for best in found} == {5.0} and len({best.score for best in found}) == 5


def test_items_beyond_the_longest_support_are_not_recommended(problem):
    _, recommender = stirred(problem)
    rated = recommender.item_ids[: 3 * recommender.options.max_seq_len]
    found = recommender.adapt([(item, 3) for item in rated]).top(10**6)
    assert not set(rated) & {best.item for best in found}


@pytest.mark.parametrize("adapt", ["head", "all"])
def test_without_known_ratings_the_prediction_is_the_unadapted_one(problem, adapt):
    system, recommender = stirred(problem, adapt=adapt)
    user = recommender.adapt([("nobody saw this", 5)])
    assert not user.adapted and user.unknown == ["nobody saw this"]
    nothing = np.zeros(1, np.int64)
    windows = dataloader.support_windows(nothing, system.options)
    asked = np.array([[4]]), np.zeros((1, 1)), np.ones((1, 1), bool)
    tasks = dataloader.assemble(problem.sequences, nothing, nothing, windows, asked, system.options)
    with torch.no_grad():
        before = system.to_rating(system(tasks)[0, 0]).tolist()
    assert user.predict([recommender.item_ids[3], "unknown"]) == pytest.approx([*before, np.nan], abs=1e-6, nan_ok=True)
    assert user.explain([recommender.item_ids[3]]).predictions[0] == pytest.approx(before * 3, abs=1e-6)


def test_later_rating_of_an_item_counts_and_ids_may_be_text(problem):
    _, recommender = stirred(problem)
    a, b = recommender.item_ids[:2]
    again = recommender.adapt([(a, 1), (b, 4), (str(a), 5)])
    assert again.top(5) == recommender.adapt([(b, 4), (a, 5)]).top(5)


@pytest.mark.parametrize("rating", [0, 5.5, float("nan"), float("inf")])
def test_ratings_outside_the_scale_are_refused(problem, rating):
    with pytest.raises(UserError, match="from 1 to 5"):
        stirred(problem)[1].adapt([(1, rating)])


def test_threads_do_not_disturb_each_other(problem):
    _, recommender = stirred(problem)
    supports = [support_of(problem.ratings, user) for user in problem.test[:40]]
    alone = [recommender.top([support], 5)[0] for support in supports]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda support: recommender.top([support], 5)[0], supports * 3))
    assert together == alone * 3


@pytest.mark.parametrize("given", [{}, {"num_samples": 1}, {"num_samples": 3}], ids=["windows", "one", "three"])
def test_explanation_is_of_the_ratings_that_were_used(problem, given):
    _, recommender = stirred(problem, normalize_loss=True, **given)
    ratings = [(item, 1 + int(item) % 5) for item in recommender.item_ids[:12]]
    used = ratings[-(recommender.options.max_seq_len - 1) :]
    user = recommender.adapt(ratings)
    asked = recommender.item_ids[20:23]
    found = user.explain(asked)
    assert list(zip(found.items, found.ratings, strict=True)) == used
    assert found.weights.shape == (len(used), recommender.options.num_inner_steps)
    np.testing.assert_allclose(found.weights.mean(0), 1, atol=1e-5)
    assert np.ptp(found.weights) > 1e-3
    np.testing.assert_allclose(recommender.cut(found.predictions[:, -1]), user.predict(asked), atol=1e-6)
    assert np.ptp(found.predictions, axis=1).min() > 1e-3


def test_every_rating_weighs_the_same_under_squared_error(problem):
    _, recommender = stirred(problem, use_adaptive_loss=False, num_samples=1)
    found = recommender.adapt([(item, 4) for item in recommender.item_ids[:4]]).explain([recommender.item_ids[9]])
    np.testing.assert_allclose(found.weights, 1)


# -----------------------------------------------------------------------------
# exported files


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_exported_file_predicts_the_same_and_names_no_place(run, trained, tmp_path, ending, capfd):
    path = tmp_path / f"melo.{ending}"
    assert recommend.main([f"--run={run}", f"--export={path}"]) == 0
    again = Recommender.load(path)
    ratings = [(item, 5) for item in trained.item_ids[4:9]]
    assert again.adapt(ratings).top(20) == trained.adapt(ratings).top(20)
    assert str(run.parent).encode() not in path.read_bytes()
    card = Path(f"{path}.md").read_text()
    figures = json.loads((run / "test.json").read_text())
    assert f"{figures['rmse']:.4f}" in card and trained.state["fingerprint"] in card
    assert str(run.parent) not in card


def test_card_shows_no_figures_of_another_checkpoint(run, tmp_path):
    """Nor those of a report that does not say of which, as earlier versions wrote it."""
    report = json.loads((run / "test.json").read_text())
    assert f"{report['rmse']:.4f}" in export.figures(run, step := report.pop("step"))
    assert "was not run" in export.figures(run, step + 1)
    (tmp_path / "test.json").write_text(json.dumps(report))
    assert "was not run" in export.figures(tmp_path, step)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_damaged_and_foreign_files_are_refused(trained, tmp_path, ending):
    path = tmp_path / f"melo.{ending}"
    export.write(trained, path)
    whole = path.read_bytes()
    middle = len(whole) * 3 // 4
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for data in (whole[:-1], whole[:100], b"", flipped, b"something else"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=str(path)):
            Recommender.load(path)


def test_other_versions_are_refused(trained, tmp_path, monkeypatch):
    path = tmp_path / "melo.safetensors"
    monkeypatch.setattr(export, "VERSION", 7)
    export.write(trained, path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="version '7'.*version 1"):
        Recommender.load(path)
    old = dict(trained.state, options={**trained.state["options"], "never_was": 1})
    with pytest.raises(UserError, match="another version.*--never_was=1"):
        Recommender(old, "old.pt")


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    import safetensors.torch

    path = tmp_path / "other.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(2)}))
    with pytest.raises(UserError, match="not written by recommend.py"):
        Recommender.load(path)


ODD = {
    "item_ids": ([], [1, 1], [1, "a"], [1, 2], [True, False], ["\ud800", "b"], ["", "b"], ["x" * 999], [1 << 70], {}),
    "system": ({}, {"members.0.scale": 1}, {"members.0.scale": torch.zeros(4)}, []),
    "levels": ([], ["a"], [float("nan")], [None], {}),
    "fingerprint": ("", 5, "\x1b[2J"),
    "step": (-1, 1 << 70, "1", True),
    "options": ([], {}, {"members": 10**6}, {"members": "1"}, {"bert_hidden_units": -4}),
}


@pytest.mark.parametrize("entry, value", [(entry, value) for entry, values in ODD.items() for value in values])
def test_entries_that_do_not_fit_are_refused(trained, entry, value):
    if entry == "options" and value:
        value = {**trained.state["options"], **value}
    with pytest.raises(UserError, match="a file"):
        Recommender(trained.state | {entry: value}, "a file")


METADATA = {
    "no metadata": lambda metadata: None,
    "a list": lambda metadata: [],
    "numbers": lambda metadata: {**metadata, "format": 1},
    "no JSON": lambda metadata: {**metadata, "item_ids": "["},
    "nested": lambda metadata: {**metadata, "levels": "[" * 100_000},
    "another kind": lambda metadata: {**metadata, "step": '"400"'},
    "surrogates": lambda metadata: {**metadata, "item_ids": '["\\ud800"]'},
    "a large number": lambda metadata: {**metadata, "step": "9" * 5000},
    "lacking": lambda metadata: {name: text for name, text in metadata.items() if name != "options"},
    "escapes": lambda metadata: {**metadata, "format_version": "\x1b[2J"},
}


@pytest.mark.parametrize("change", METADATA.values(), ids=METADATA)
def test_crafted_metadata_with_a_right_checksum_is_refused(trained, tmp_path, change):
    path = tmp_path / "melo.safetensors"
    export.write(trained, path)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = change(header["__metadata__"])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    with pytest.raises(UserError, match=str(path)) as error:
        Recommender.load(path)
    assert str(error.value).isprintable()


def test_a_card_is_named_after_the_whole_export_and_replaces_no_other_text(run, tmp_path):
    for name in ("README.md", "README.pt.md"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="README.pt.md.*no model card"):
        recommend.main([f"--run={run}", f"--export={tmp_path / 'README.pt'}"])
    assert not (tmp_path / "README.pt").exists() and (tmp_path / "README.pt.md").read_text() == "mine"
    (tmp_path / "README.pt.md").unlink()
    for _ in range(2):  # its own card may be replaced
        assert recommend.main([f"--run={run}", f"--export={tmp_path / 'README.pt'}"]) == 0
    assert (tmp_path / "README.md").read_text() == "mine" and "A meta-learned" in (
        tmp_path / "README.pt.md"
    ).read_text()


def test_a_step_of_an_exported_file_is_not_ignored(trained, tmp_path):
    export.write(trained, tmp_path / "melo.pt")
    with pytest.raises(UserError, match="checkpoint_step=99.*leave the option out"):
        Recommender.load(tmp_path / "melo.pt", 99)
    Recommender.load(tmp_path / "melo.pt", trained.state["step"])


def test_a_file_says_nothing_of_places_here(trained):
    places = {"cache_dir": "/nowhere/cache", "data_path": "/nowhere/ratings", "data_url": "http://nowhere.invalid"}
    found = Recommender(trained.state | {"options": {**trained.state["options"], **places}}, "a file")
    assert not any(getattr(found.options, name) for name in places)


def test_values_that_are_not_finite_are_refused(trained):
    system = {**trained.state["system"], "members.0.learner.head.user_bias": torch.tensor(torch.nan)}
    with pytest.raises(UserError, match="does not fit"):
        Recommender(trained.state | {"system": system}, "a file")


# -----------------------------------------------------------------------------
# the command


@pytest.fixture
def command(run, tmp_path, capfd, monkeypatch):
    """Runs recommend.py on the text of --ratings: (standard output, standard error)."""

    def execute(ratings, *flags):
        path = tmp_path / "ratings.csv"
        path.write_text(ratings)
        assert recommend.main([f"--run={run}", f"--ratings={path}", "--device=cpu", *flags]) == 0
        return capfd.readouterr()

    return execute


def table(text):
    return list(csv.DictReader(io.StringIO(text)))


def listed(rows):
    return [(row["item"], float(row["rating"]), float(row["score"])) for row in rows]


def expected(recommender, ratings, n):
    return [(str(item), round(rating, 4), round(score, 4)) for item, rating, score in recommender.adapt(ratings).top(n)]


HEAD = "user,item,rating\n"


def test_pairs_give_the_rmse_of_main_test(run, command, tmp_path):
    rows = pd.read_csv(SAMPLE).sort_values(["user_id", "timestamp"], kind="stable")
    report = json.loads((run / "test.json").read_text())
    users = np.sort(rows.user_id.unique())
    stored = checkpoint.load_checkpoint(checkpoint.checkpoint_path(run))["options"]
    drawn = np.random.RandomState(stored["random_seed"]).choice(len(users), stored["num_test_data"], replace=False)
    rows = rows[rows.user_id.isin(users[drawn])]
    target = rows.groupby("user_id").tail(1).sample(frac=1, random_state=1)
    target[["user_id", "item_id"]].to_csv(tmp_path / "pairs.csv", index=False)
    out, _ = command(rows.drop(target.index).to_csv(index=False), f"--pairs={tmp_path / 'pairs.csv'}")
    found = pd.read_csv(io.StringIO(out))
    assert found.user.tolist() == target.user_id.tolist() and found.item.tolist() == target.item_id.tolist()
    error = found.rating.to_numpy() - target.rating.to_numpy()
    assert np.sqrt((error**2).mean()) == pytest.approx(report["rmse"], abs=1e-4)  # ratings have four digits


def test_users_keep_their_ids_and_the_order_of_the_file(command, trained):
    out, err = command(HEAD + "zoe,1,5\n7,2,4\nAnn,3,1\nzoe,4,2\nnobody,xyz,3\n", "--top=2")
    rows = table(out)
    assert [row["user"] for row in rows] == ["zoe", "zoe", "7", "7", "Ann", "Ann", "nobody", "nobody"]
    assert [row["rank"] for row in rows] == ["1", "2"] * 4
    assert [row["adapted"] for row in rows] == ["True"] * 6 + ["False"] * 2
    assert "xyz" in err and "xyz" not in out
    assert listed(rows[:2]) == expected(trained, [(1, 5), (4, 2)], 2)


def test_times_order_the_ratings(command, trained):
    ratings = [(1, 5.0), (2, 1.0), (3, 4.0), (4, 4.0)]
    lines = [f"u,{item},{rating},{time}\n" for time, (item, rating) in enumerate(ratings)]
    out, _ = command("user,item,rating,timestamp\n" + "".join(reversed(lines)), "--top=5")
    assert listed(table(out)) == expected(trained, ratings, 5)


def test_pairs_keep_their_order_and_say_what_is_not_predicted(command, tmp_path):
    (tmp_path / "pairs.csv").write_text("b,9\nstranger,3\na,8\na,nothing\nb,8\nnone,3\n")
    out, err = command(HEAD + "a,1,5\nb,2,2\nnone,x,3\n", f"--pairs={tmp_path / 'pairs.csv'}", "--explain")
    rows = table(out)
    found = [(row["user"], row["item"], row["adapted"]) for row in rows]
    assert found == [("b", "9", "True"), ("stranger", "3", "False"), ("a", "8", "True"), ("a", "nothing", "True"),
                     ("b", "8", "True"), ("none", "3", "False")]  # fmt: skip
    notes = [row["note"] for row in rows]
    assert notes[0] == notes[2] == notes[4] == "" and "no such user" in notes[1]
    assert notes[3].startswith("not predicted") and "none of the user's items" in notes[5]
    assert rows[3]["rating"] == rows[3]["score"] == rows[3]["after_0"] == ""
    assert rows[1]["rating"] == rows[5]["rating"] != ""
    assert "nothing" in err and "stranger" in err
    out, _ = command(HEAD + "a,1,5\n", f"--pairs={tmp_path / 'pairs.csv'}", "--format=json")
    assert [row["rating"] is None for row in json.loads(out)] == [False, False, False, True, False, False]


def test_ids_are_text(command, tmp_path):
    """7 and 007 are two users, and two items."""
    (tmp_path / "pairs.csv").write_text("user,item\n007,130\n7,130\n\u0667,130\n7,0130\n")
    out, _ = command(HEAD + "7,17,5\n7,42,1\n", f"--pairs={tmp_path / 'pairs.csv'}")
    rows = table(out)
    assert [row["user"] for row in rows] == ["007", "7", "\u0667", "7"]
    assert [row["adapted"] for row in rows] == ["False", "True", "False", "True"]
    assert rows[0]["rating"] == rows[2]["rating"] != rows[1]["rating"] and rows[3]["rating"] == ""


def test_candidates_and_excluded_items(command, tmp_path, trained):
    (tmp_path / "few.csv").write_text("1\n2\n3\n4\n5\nno such\n")
    (tmp_path / "not.csv").write_text("name,item\nx,4\n")
    flags = f"--candidates={tmp_path / 'few.csv'}", f"--exclude={tmp_path / 'not.csv'}"
    out, err = command(HEAD + "a,1,5\n", *flags)
    assert listed(table(out)) == [row for row in expected(trained, [(1, 5)], 10**6) if row[0] in ("2", "3", "5")]
    assert "no such" in err
    counts = dict(zip(map(str, trained.item_ids), trained.item_counts, strict=True))
    most = sorted(counts.values())[-8]
    out, _ = command(HEAD + "a,1,5\n", f"--min_ratings={most}", "--top=99")
    assert {row["item"] for row in table(out)} == {item for item, n in counts.items() if n >= most and item != "1"}
    with pytest.raises(UserError, match="leave no item"):
        command(HEAD + "a,1,5\n", f"--candidates={tmp_path / 'not.csv'}", f"--exclude={tmp_path / 'not.csv'}")


# -----------------------------------------------------------------------------
# titles

FILMS = {
    "1": "Brave One, The (1956)", "2": "Braveheart (1995)", "3": "Sabrina (1954)", "4": "Sabrina (1995)",
    "5": "Alien (1979)", "6": "Aliens (1986)", "7": "300 (2007)", "8": "Seven (a.k.a. Se7en) (1995)",
    "9": "Amélie (2001)", "10": "Matrix, The (1999)", "300": "Heat (1995)", "11": "Up at the Villa (2000)",
}  # fmt: skip


@pytest.mark.parametrize("text, items, whole", [
    ("Alien", ["5"], True), ("alien (1979)", ["5"], True), ("Alien (1986)", ["6"], False), ("Brave", ["1", "2"], False),
    ("Braveh", ["2"], False), ("Sabrina", ["3", "4"], True), ("Sabrina (1995)", ["4"], True),
    ("Heat (1996)", [], False),
    ("The Matrix", ["10"], True), ("Matrix, the (1999)", ["10"], True), ("Matrix", ["10"], False),
    ("AMELIE", ["9"], True), ("Se7en", ["8"], False), ("seven", ["8"], False), ("nothing", [], False),
    ("(1995)", [], True),
])  # fmt: skip
def test_titles_whole_first_then_other_names_then_beginnings(text, items, whole):
    assert Titles(FILMS).find(text) == (items, whole)


@pytest.fixture
def films(tmp_path):
    path = tmp_path / "films.csv"
    pd.DataFrame({"item": FILMS.keys(), "title": FILMS.values()}).to_csv(path, index=False)
    return f"--titles={path}"


def test_a_beginning_is_taken_with_a_word(command, films, trained):
    out, err = command(HEAD + "u,Amél,5\nu,Aliens,1\nu,2,3\n", films, "--top=1000")
    assert listed(table(out)) == expected(trained, [(9, 5), (6, 1), (2, 3)], 1000)
    assert "'Amél' as 'Amélie (2001)' (9)" in err and "Aliens" not in err
    out, err = command(HEAD + "u,400,5\n", films, "--top=1000")
    assert {row["item"]: row["title"] for row in table(out)}["9"] == "Amélie (2001)"


def test_ambiguous_titles_are_listed_at_once(command, films):
    with pytest.raises(UserError) as error:
        command(HEAD + "u,Sabrina,5\nu,Alien,4\nu,Brave,4\nu,300,1\n", films)
    for part in ("line 2: 'Sabrina'", "'Sabrina (1954)' (3)", "line 4: 'Brave'", "line 5: '300'", "(300)", "(7)"):
        assert part in str(error.value)
    assert "'Alien'" not in str(error.value)


def test_numbers_are_ids_in_a_file_of_ids(command, films, trained):
    out, err = command(HEAD + "u,300,5\nu,2,1\nu,1984,3\n", films, "--top=5")
    assert listed(table(out)) == expected(trained, [(300, 5), (2, 1)] if trained.number(300) else [(2, 1)], 5)
    assert "1984" in err


def test_titles_of_every_layout(tmp_path):
    layouts = {
        "a.csv": 'movieId,title,genres\n1,"American President, The (1995)",Drama|War\n2,Heat,Crime\n',
        "b.csv": "title;item_id\nAmerican President, The (1995);1\nHeat;2\n",
        "u.item": "1|American President, The (1995)|01-Jan-1995\n2|Heat|01-Jan-1995\n",
        "t.tsv": "1\tAmerican President, The (1995)\n2\tHeat\n",
    }
    for name, text in layouts.items():
        (tmp_path / name).write_text(text)
        read = recommend.read_titles(tmp_path / name)
        assert read.by_item == {"1": "American President, The (1995)", "2": "Heat"}, name


BROKEN = {
    "an open quote": '1,"Heat\n2,Alien\n',
    "a quote within": '1,"He"at"\n',
    "a long field": f"1,{'x' * 200_000}\n",
    "one column": "Heat\n",
    "a half header": "item,length\n1,Heat\n",
    "nothing": "\n\n",
    "UTF-16": "1,Heat\n".encode("utf-16"),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("option", ["titles", "pairs"])
def test_broken_tables_are_named_with_their_line(command, tmp_path, text, option):
    path = tmp_path / "broken.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if option == "pairs":
        path.write_bytes(path.read_bytes().replace(b"item,length", b"user,length"))
    with pytest.raises(UserError, match="broken.csv.*(line 1|empty|not a text file)"):
        command(HEAD + "a,1,5\n", f"--{option}={path}")


def test_quotes_in_columns_between_tabs_are_letters(tmp_path):
    (tmp_path / "titles.tsv").write_text('1\t"Heat" or so\n2\tAlien\n')
    assert recommend.read_titles(tmp_path / "titles.tsv").by_item == {"1": '"Heat" or so', "2": "Alien"}
    (tmp_path / "titles.tsv").write_text('1\t"A ""Great"" one"\n')
    assert recommend.read_titles(tmp_path / "titles.tsv").by_item == {"1": 'A "Great" one'}


def test_terminal_escapes_are_printed_safely(command, tmp_path, trained):
    (tmp_path / "titles.csv").write_text(
        "item,title\n" + "".join(f"{i},\x1b[31mred\x9b0m {i}\n" for i in trained.item_ids)
    )
    for kind in ("table", "csv", "json"):
        text = HEAD + "\x1b]0;own\x07,1,5\na,\x1b[2J,4\n"
        out, err = command(text, f"--titles={tmp_path / 'titles.csv'}", "--top=2", f"--format={kind}")
        assert "\x1b" not in err and "\x9b" not in out and "red" in out
        assert "\x1b" not in out or kind == "csv"  # a file keeps ids as they are


def test_formats_hold_the_same(command, tmp_path):
    text = HEAD + "a,1,5\nb,2,1\n"
    kinds = {"dtype": {"user": str, "item": str, "note": str}, "keep_default_na": False}
    rows = pd.read_csv(io.StringIO(command(text, "--top=3")[0]), **kinds)
    assert all(len(str(value).split(".")[1]) <= 4 for value in (*rows.rating, *rows.score))
    command(text, "--top=3", f"--output={tmp_path / 'top.json'}")
    command(text, "--top=3", f"--output={tmp_path / 'top.parquet'}")
    command(text, "--top=3", f"--output={tmp_path / 'top.csv'}")
    assert json.loads((tmp_path / "top.json").read_text()) == rows.to_dict("records")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "top.parquet"), rows)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "top.csv", **kinds), rows)
    lines = command(text, "--top=3", "--format=table")[0].splitlines()
    assert lines[0].split() == ["user", "rank", "item", "rating", "score"] and len(lines) == 7
    assert lines[1].split()[3:] == [f"{rows.rating[0]:.2f}", f"{rows.score[0]:.2f}"]


def test_explanation_in_every_format(command, tmp_path):
    text = HEAD + "a,1,5\na,2,1\nb,5,3\n"
    found = json.loads(command(text, "--top=2", "--explain", "--format=json")[0])
    assert [row["after_3"] for row in found["predictions"]] == pytest.approx(
        [row["score"] for row in found["predictions"]], abs=2e-4
    )
    assert [(row["user"], row["item"], row["rating"]) for row in found["weights"]] == [
        ("a", "1", 5),
        ("a", "2", 1),
        ("b", "5", 3),
    ]
    out, err = command(text, "--top=2", "--explain")
    assert len(table(out)) == 4 and "weight of each rating" in err
    assert "weight of each rating" in command(text, "--top=2", "--explain", "--format=table")[0]
    command(text, "--top=2", "--explain", f"--output={tmp_path / 'top.csv'}", f"--plot={tmp_path / 'me.png'}")
    assert len(pd.read_csv(tmp_path / "top-weights.csv")) == 3
    assert (tmp_path / "me.png").read_bytes().startswith(b"\x89PNG")


def test_explaining_a_user_without_known_ratings(command, tmp_path):
    out, _ = command(HEAD + "a,none,5\n", "--top=2", "--explain", f"--plot={tmp_path / 'me.png'}")
    rows = table(out)
    assert [row["after_0"] for row in rows] == [row["after_3"] for row in rows]
    assert (tmp_path / "me.png").exists()


def test_tables_fit_a_terminal_of_80_columns(command, tmp_path, monkeypatch):
    (tmp_path / "titles.csv").write_text(
        "item,title\n" + "".join(f"{i},{'Very long title ' * 5}{i}\n" for i in range(300))
    )
    monkeypatch.setenv("COLUMNS", "80")
    flags = f"--titles={tmp_path / 'titles.csv'}", "--format=table", "--top=3"
    for more in ((), ("--explain",)):
        out, err = command(HEAD + "somebody,1,5\nsomebody,2,1\n", *flags, *more)
        assert max(map(len, out.splitlines())) <= 80 and "..." in out
        assert err.count("\r") == 0


def test_items_of_a_picture_are_told_apart(problem):
    _, recommender = stirred(problem)
    support, _ = recommender.support([(item, 1 + int(item) % 5) for item in recommender.item_ids[:9]])
    groups = picture.telling_items(recommender, support, 4)
    numbers = [number for group in groups.values() for number in group]
    assert len(numbers) == 12 and len(set(numbers)) == 12 and not set(numbers) & set(support.items.tolist())
    best = [best.item for best in recommender.top([support], 4)[0]]
    assert [recommender.item_ids[n - 1] for n in groups["best now"]] == best
    found = recommender.explain(support, np.array(numbers))
    rise = found.predictions[:, -1] - found.predictions[:, 0]
    assert rise[4:8].min() > rise[8:].max()


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=15), st.floats(0.01, 1))
def test_labels_are_apart_in_order_and_near(values, gap):
    values = np.array(values)
    places = picture.keep_apart(values, gap)
    order = np.argsort(values, kind="stable")
    assert np.all(np.diff(places[order]) >= gap - 1e-9)
    assert np.abs(places - values).max() <= gap * len(values) + 1e-9
    if len(values) < 2 or np.diff(values[order]).min() >= gap:
        np.testing.assert_allclose(places, values)


BAD = {
    "rating outside the scale": ("a,1,5\na,2,9\n", (), "line 3.*1 to 5"),
    "no number": ("a,1,good\n", (), "line 2"),
    "empty item": ("a,1,5\nb,,3\n", (), "line 3"),
    "lacking title": ("a,1,5\n", ("--titles={}/broken.csv",), "broken.csv, line 2"),
    "no titles": ("a,1,5\n", ("--titles={}/none.csv",), "none.csv does not exist"),
    "lacking item": ("a,1,5\n", ("--pairs={}/pairs.csv",), "pairs.csv, line 2"),
    "no list": ("a,1,5\n", ("--candidates={}/none.csv",), "none.csv does not exist"),
    "a number with pairs": ("a,1,5\n", ("--pairs={}/pairs.csv", "--top=3"), "leave out --top"),
    "a list with pairs": ("a,1,5\n", ("--pairs={}/pairs.csv", "--exclude={}/pairs.csv"), "leave out --exclude"),
    "output folder": ("a,1,5\n", ("--output={}/none/a.csv",), "name another"),
    "output ending": ("a,1,5\n", ("--output={}/a.xls",), "must end in"),
    "output is a folder": ("a,1,5\n", ("--output={}/folder.csv",), "--output=.* is a folder"),
    "plot is a folder": ("a,1,5\n", ("--plot={}/folder.png",), "--plot=.* is a folder"),
    "export is a folder": ("a,1,5\n", ("--export={}/folder.pt",), "--export=.* is a folder"),
    "a long name": ("a,1,5\n", ("--output={}/" + "a" * 300 + ".csv",), "File name too long"),
    "a full device": ("a,1,5\n", ("--output=/dev/full", "--format=csv"), "cannot write /dev/full .No space"),
    "output over the ratings": ("a,1,5\n", ("--output={}/ratings.csv",), "replace the file of --ratings"),
    "output over the titles": ("a,1,5\n", ("--titles={}/titles.csv", "--output={}/titles.csv"), "file of --titles"),
    "weights over the titles": (
        "a,1,5\n",
        ("--titles={}/titles.csv", "--output={}/a.csv", "--explain"),
        "the weights beside --output=.* file of --titles",
    ),
    "two outputs in one": ("a,1,5\n", ("--output={}/a.csv", "--export={}/a.csv"), "must end in"),
    "export ending": ("a,1,5\n", ("--export={}/a.onnx",), "must end in"),
    "plot ending": ("a,1,5\n", ("--plot={}/a.txt",), "must end in"),
    "no run": ("a,1,5\n", ("--run={}/nowhere",), "nowhere does not exist"),
    "an empty run": ("a,1,5\n", ("--run={}",), "holds no checkpoint"),
    "a step": ("a,1,5\n", ("--checkpoint_step=77",), "no checkpoint of step 77"),
    "no top": ("a,1,5\n", ("--top=0",), "--top"),
    "a huge top": ("a,1,5\n", ("--top=" + "9" * 400,), "--top"),
    "a huge step": ("a,1,5\n", ("--checkpoint_step=" + "9" * 20,), "--checkpoint_step"),
    "a silent pipe": ("a,1,5\n", ("--ratings={}/pipe",), "pipe is a pipe that no program writes to"),
    "a device": ("a,1,5\n", ("--ratings=/dev/zero",), "/dev/zero is a device"),
    "an unread pipe": ("a,1,5\n", ("--output={}/pipe", "--format=csv"), "pipe .*that no program reads"),
}


@pytest.mark.parametrize("ratings, flags, message", BAD.values(), ids=BAD)
def test_bad_input_is_named_in_one_sentence(command, tmp_path, capfd, monkeypatch, ratings, flags, message):
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    monkeypatch.setattr(utils, "PATIENCE", 0.1)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "titles.csv").write_text("item,title\n1,Alien (1979)\n2,Aliens (1986)\n")
    (tmp_path / "a-weights.csv").symlink_to(tmp_path / "titles.csv")
    (tmp_path / "broken.csv").write_text("1,Heat\n2\n")
    (tmp_path / "pairs.csv").write_text("a,2\nb\n")
    for name in ("folder.csv", "folder.png", "folder.pt"):
        (tmp_path / name).mkdir()
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as error:
        command(HEAD + ratings, *(flag.replace("{}", str(tmp_path)) for flag in flags))
    assert "\n" not in str(error.value) and capfd.readouterr().out == ""
    assert set(tmp_path.iterdir()) <= before | {tmp_path / "ratings.csv"}


def test_a_run_without_counts_of_ratings_can_be_used_but_not_by_them(run, trained, tmp_path):
    state = checkpoint.load_checkpoint(checkpoint.best_path(run))
    counts = state.pop("item_counts")
    assert trained.item_counts.tolist() == counts and min(counts) >= 0
    older = Recommender(state, "a test")
    assert older.item_counts is None
    for name in ("older.pt", "older.safetensors"):
        export.write(older, tmp_path / name)
        assert Recommender.load(tmp_path / name).item_counts is None
    (tmp_path / "users.csv").write_text(HEAD + "a,1,5\n")
    with pytest.raises(UserError, match="does not say how often"):
        recommend.main([f"--run={tmp_path / name}", f"--ratings={tmp_path / 'users.csv'}", "--min_ratings=2"])
    for wrong in (counts[1:], ["1", *counts[1:]], [-1, *counts[1:]]):
        with pytest.raises(UserError, match="one number of ratings"):
            Recommender({**state, "item_counts": wrong}, "a test")


def test_what_needs_ratings_is_not_ignored_without_them(run, tmp_path):
    with pytest.raises(UserError, match="--ratings is missing: --top needs it"):
        recommend.main([f"--run={run}", f"--export={tmp_path / 'a.pt'}", "--top=3"])
    with pytest.raises(UserError, match="--ratings is missing: --plot needs it"):
        recommend.main([f"--run={run}", f"--export={tmp_path / 'a.pt'}", f"--plot={tmp_path / 'a.png'}"])
    with pytest.raises(UserError, match="--ratings is missing"):
        recommend.main([f"--run={run}"])


def test_a_plot_without_rows_is_said(command, tmp_path):
    (tmp_path / "pairs.csv").write_text("a,unknown\n")
    _, err = command(HEAD + "a,1,5\n", f"--pairs={tmp_path / 'pairs.csv'}", f"--plot={tmp_path / 'me.png'}")
    assert "me.png is not written" in err and not (tmp_path / "me.png").exists()


# -----------------------------------------------------------------------------
# pipes, links and devices


def test_a_pipe_in_and_a_reader_that_stops_early(run, trained, tmp_path):
    """The real command, in a shell."""
    (tmp_path / "me.csv").write_text(HEAD + "me,1,5\nme,2,1\n")
    given = f"{shlex.quote(sys.executable)} recommend.py --device=cpu --run={run} --top=4"
    line = f"set -o pipefail; {given} --ratings=<(cat {tmp_path / 'me.csv'}) | head -2"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and listed(table(done.stdout)) == expected(trained, [(1, 5), (2, 1)], 1)
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr


@pytest.mark.parametrize("stream, message", [("stdin", "standard input is closed"), ("stdout", "output is closed")])
def test_closed_streams_are_said(run, tmp_path, monkeypatch, stream, message):
    (tmp_path / "me.csv").write_text(HEAD + "me,1,5\n")
    monkeypatch.setattr(sys, stream, None)
    with pytest.raises(UserError, match=message):
        recommend.main(
            [f"--run={run}", "--device=cpu", "--ratings=" + ("-" if stream == "stdin" else f"{tmp_path}/me.csv")]
        )


def test_standard_output_on_a_full_device_is_one_sentence(run, tmp_path):
    (tmp_path / "me.csv").write_text(HEAD + "me,1,5\n")
    command = [f"--run={run}", f"--ratings={tmp_path / 'me.csv'}", "--device=cpu"]
    process = running.spawn(partial(run_script, partial(recommend.main, command)), "/dev/full", tmp_path / "err")
    assert running.wait(process, 60) == 2
    assert (tmp_path / "err").read_text().splitlines()[-1].startswith("error: cannot write")


def test_an_error_in_standard_input_is_one_line_and_status_2(run, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((HEAD + "me,1,5\nme,2,11\n").encode())))
    with pytest.raises(SystemExit) as end:
        run_script(lambda: recommend.main([f"--run={run}", "--ratings=-"]))
    out, err = capfd.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.splitlines()[-1].startswith("error: standard input, line 3: ")


def test_devices_and_links_stay_what_they_are(command, tmp_path):
    command(HEAD + "a,1,5\n", "--output=/dev/null", "--format=csv")
    assert not Path("/dev/null").is_file()
    for place in ("old.csv", "new.csv"):  # the second does not exist yet
        (tmp_path / "old.csv").write_text("old")
        (tmp_path / "link.csv").unlink(missing_ok=True)
        (tmp_path / "link.csv").symlink_to(tmp_path / place)
        command(HEAD + "a,1,5\n", f"--output={tmp_path / 'link.csv'}")
        assert (tmp_path / "link.csv").is_symlink() and (tmp_path / place).read_text().startswith("user,")


def test_a_named_pipe_is_written_to(command, tmp_path):
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(pipe.read_text)
        command(HEAD + "a,1,5\n", f"--output={pipe}", "--top=3")
        assert len(table(found.result())) == 3 and pipe.is_fifo()


def test_a_terminal_gets_no_escapes(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO())
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    report.put("-", b"a\x1b[2Jb\nc\n")
    assert terminal.buffer.getvalue() == b"a\\x1b[2Jb\nc\n"


@pytest.mark.parametrize(
    "given", [{"bert_hidden_units": 8192}, {"loss_network": "lstm", "lstm_hidden": 8192, "lstm_num_layers": 64}]
)
def test_a_file_that_asks_for_a_huge_model_is_refused_before_it_is_built(trained, given):
    state = trained.state
    started = time.monotonic()
    with pytest.raises(UserError, match="does not fit its own options"):
        Recommender({**state, "options": {**state["options"], **given}}, "file")
    assert time.monotonic() - started < 20
