"""recommend.py and the Recommender: the same predictions as main.py --test, from files of every kind."""

import csv
import io
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import LEARNERS, options

import dataloader
import main
import maml
import recommend
from evaluation import evaluate
from models import checkpoint
from recommend import Recommender, Support
from serving import export, picture, recommender
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
        {"use_rating_input": True, "loss_network": "metal", "members": 2},
    ],
    ids=["head", "all", "rating-input"],
)
def test_predictions_equal_those_of_evaluation(problem, model, given):
    system, recommender = stirred(problem, model=model, **given)
    scored = evaluate.evaluate(system, problem, problem.test)
    supports = [support_of(problem.ratings, user) for user in scored.user]
    predicted = recommender.predict(supports, [np.array([item + 1]) for item in scored.item])
    assert np.ptp(scored.prediction) > 0.1
    np.testing.assert_allclose(np.concatenate(predicted), scored.prediction, rtol=0, atol=1e-6)

    everything = recommender.top(supports, 10**6)
    targets = problem.ratings.item_ids[scored.item].tolist()
    of_target = [dict(found)[item] for found, item in zip(everything, targets, strict=True)]
    np.testing.assert_allclose(of_target, scored.prediction, rtol=0, atol=1e-6)


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
        assert [item for item, _ in found] == [item for item, _ in user.top(10**6)][:n]
        assert [rating for _, rating in found] == pytest.approx(sorted(predicted.values(), reverse=True)[:n], abs=1e-6)
        assert all(rating == pytest.approx(predicted[item], abs=1e-6) for item, rating in found)


def test_items_beyond_the_longest_support_are_not_recommended(problem):
    _, recommender = stirred(problem)
    rated = recommender.item_ids[: 3 * recommender.options.max_seq_len]
    found = recommender.adapt([(item, 3) for item in rated]).top(10**6)
    assert not set(rated) & {item for item, _ in found}


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


@pytest.mark.parametrize("given", [{}, {"num_samples": 1}, {"use_rating_input": True}], ids=["windows", "one", "cloze"])
def test_explanation_is_of_the_ratings_that_were_used(problem, given):
    _, recommender = stirred(problem, normalize_loss=True, **given)
    ratings = [(item, 1 + item % 5) for item in recommender.item_ids[:12]]
    used = ratings[-(recommender.options.max_seq_len - 1) :]
    user = recommender.adapt(ratings)
    asked = recommender.item_ids[20:23]
    found = user.explain(asked)
    assert list(zip(found.items, found.ratings, strict=True)) == used
    assert found.weights.shape == (len(used), recommender.options.num_inner_steps)
    np.testing.assert_allclose(found.weights.mean(0), 1, atol=1e-5)
    assert np.ptp(found.weights) > 1e-3
    np.testing.assert_allclose(found.predictions[:, -1], user.predict(asked), atol=1e-6)
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
    card = path.with_suffix(".md").read_text()
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
    trained.export(path)
    whole = path.read_bytes()
    middle = len(whole) * 3 // 4
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for data in (whole[:-1], whole[:100], b"", flipped, b"something else"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=str(path)):
            Recommender.load(path)


def test_other_versions_are_refused(trained, tmp_path, monkeypatch):
    path, other = tmp_path / "melo.safetensors", tmp_path / "melo.pt"
    monkeypatch.setattr(recommender, "EXPORT_VERSION", 7)
    monkeypatch.setattr(checkpoint, "CHECKPOINT_VERSION", 7)
    trained.export(path)
    trained.export(other)
    monkeypatch.undo()
    for file in (path, other):
        with pytest.raises(UserError, match="version 7.*version 1"):
            Recommender.load(file)
    old = dict(trained.state, options={n: v for n, v in trained.state["options"].items() if n != "num_factors"})
    with pytest.raises(UserError, match="another version .num_factors"):
        Recommender(old, "old.pt")


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    import safetensors.torch

    path = tmp_path / "other.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(2)}))
    with pytest.raises(UserError, match="not written by recommend.py"):
        Recommender.load(path)


@pytest.mark.parametrize(
    "entry, value",
    [("item_ids", []), ("item_ids", [1, 1]), ("item_ids", [1, "a"]), ("item_ids", [1, 2]), ("system", {})],
)
def test_entries_that_do_not_fit_are_refused(trained, entry, value):
    with pytest.raises(UserError, match="a file"):
        Recommender(trained.state | {entry: value}, "a file")


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
    assert np.sqrt((error**2).mean()) == pytest.approx(report["rmse"], abs=1e-6)


def test_users_keep_their_ids_and_the_order_of_the_file(command, trained):
    out, err = command(HEAD + "zoe,1,5\n7,2,4\nAnn,3,1\nzoe,4,2\nnobody,xyz,3\n", "--top=2")
    rows = table(out)
    assert [row["user"] for row in rows] == ["zoe", "zoe", "7", "7", "Ann", "Ann", "nobody", "nobody"]
    assert [row["rank"] for row in rows] == ["1", "2"] * 4
    assert [row["adapted"] for row in rows] == ["True"] * 6 + ["False"] * 2
    assert "xyz" in err and "xyz" not in out
    assert [int(row["item"]) for row in rows[:2]] == [item for item, _ in trained.adapt([(1, 5), (4, 2)]).top(2)]


def test_times_order_the_ratings(command, trained):
    ratings = [(1, 5.0), (2, 1.0), (3, 4.0), (4, 4.0)]
    lines = [f"u,{item},{rating},{time}\n" for time, (item, rating) in enumerate(ratings)]
    out, _ = command("user,item,rating,timestamp\n" + "".join(reversed(lines)), "--top=5")
    found = [(int(row["item"]), float(row["rating"])) for row in table(out)]
    assert found == trained.adapt(ratings).top(5)


def test_pairs_keep_their_order_and_leave_unknown_items_out(command, tmp_path):
    (tmp_path / "pairs.csv").write_text("b,9\nstranger,3\na,8\na,nothing\nb,8\n")
    out, err = command(HEAD + "a,1,5\nb,2,2\n", f"--pairs={tmp_path / 'pairs.csv'}")
    rows = [(row["user"], row["item"], row["adapted"]) for row in table(out)]
    assert rows == [("b", "9", "True"), ("stranger", "3", "False"), ("a", "8", "True"), ("b", "8", "True")]
    assert "nothing" in err and "stranger" in err


def test_titles_by_name_prefix_and_id(command, tmp_path, trained):
    titles = tmp_path / "movies.dat"
    titles.write_bytes(
        "1::Amélie (2001)::Comedy\n2::Alien (1979)::Horror\n3::Aliens (1986)::Action\n".encode("latin-1")
    )
    out, _ = command(HEAD + "u,amél,5\nu,Aliens,1\nu,2,3\n", f"--titles={titles}", "--top=1000")
    rows = table(out)
    assert [(int(row["item"]), float(row["rating"])) for row in rows] == trained.adapt([(1, 5), (3, 1), (2, 3)]).top(
        1000
    )
    out, _ = command(HEAD + "u,9,5\n", f"--titles={titles}", "--top=1000")
    assert {row["item"]: row["title"] for row in table(out)}["1"] == "Amélie (2001)"


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


def test_formats_hold_the_same(command, tmp_path):
    text = HEAD + "a,1,5\nb,2,1\n"
    rows = pd.read_csv(io.StringIO(command(text, "--top=3")[0]), float_precision="round_trip")
    command(text, "--top=3", f"--output={tmp_path / 'top.json'}")
    command(text, "--top=3", f"--output={tmp_path / 'top.parquet'}")
    command(text, "--top=3", f"--output={tmp_path / 'top.csv'}")
    assert json.loads((tmp_path / "top.json").read_text()) == rows.to_dict("records")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "top.parquet"), rows)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "top.csv", float_precision="round_trip"), rows)
    lines = command(text, "--top=3", "--format=table")[0].splitlines()
    assert lines[0].split() == ["user", "rank", "item", "rating", "adapted"] and len(lines) == 7
    assert lines[1].split()[3] == f"{rows.rating[0]:.2f}"


def test_explanation_in_every_format(command, tmp_path):
    text = HEAD + "a,1,5\na,2,1\nb,5,3\n"
    found = json.loads(command(text, "--top=2", "--explain", "--format=json")[0])
    assert [row["after_5"] for row in found["predictions"]] == pytest.approx(
        [row["rating"] for row in found["predictions"]], abs=1e-6
    )
    assert [(row["user"], row["item"], row["rating"]) for row in found["weights"]] == [
        ("a", 1, 5),
        ("a", 2, 1),
        ("b", 5, 3),
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
    assert [row["after_0"] for row in rows] == [row["after_5"] for row in rows]
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
    support, _ = recommender.support([(item, 1 + item % 5) for item in recommender.item_ids[:9]])
    groups = picture.telling_items(recommender, support, 4)
    numbers = [number for group in groups.values() for number in group]
    assert len(numbers) == 12 and len(set(numbers)) == 12 and not set(numbers) & set(support.items.tolist())
    assert [recommender.item_ids[n - 1] for n in groups["best now"]] == [
        item for item, _ in recommender.top([support], 4)[0]
    ]
    found = recommender.explain(support, np.array(numbers))
    rise = found.predictions[:, -1] - found.predictions[:, 0]
    assert rise[4:8].min() > rise[8:].max()


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=15), st.floats(0.01, 1))
def test_labels_are_apart_in_order_and_near(values, gap):
    values = np.array(values)
    places = picture.spread(values, gap)
    order = np.argsort(values, kind="stable")
    assert np.all(np.diff(places[order]) >= gap - 1e-9)
    assert np.abs(places - values).max() <= gap * len(values) + 1e-9
    if len(values) < 2 or np.diff(values[order]).min() >= gap:
        np.testing.assert_allclose(places, values)


BAD = {
    "rating outside the scale": ("a,1,5\na,2,9\n", (), "line 3.*1 to 5"),
    "no number": ("a,1,good\n", (), "line 2"),
    "empty item": ("a,1,5\nb,,3\n", (), "line 3"),
    "ambiguous title": (
        "a,1,5\na,Alien,3\n",
        ("--titles={}/titles.csv",),
        "line 3.*Alien .1979.*Aliens .1986.*write more",
    ),
    "lacking title": ("a,1,5\n", ("--titles={}/broken.csv",), "broken.csv, line 2"),
    "no titles": ("a,1,5\n", ("--titles={}/none.csv",), "none.csv does not exist"),
    "lacking item": ("a,1,5\n", ("--pairs={}/pairs.csv",), "pairs.csv, line 2"),
    "output folder": ("a,1,5\n", ("--output={}/none/a.csv",), "name another"),
    "output ending": ("a,1,5\n", ("--output={}/a.xls",), "must end in"),
    "export ending": ("a,1,5\n", ("--export={}/a.onnx",), "must end in"),
    "plot ending": ("a,1,5\n", ("--plot={}/a.txt",), "must end in"),
    "no run": ("a,1,5\n", ("--run={}/nowhere",), "nowhere does not exist"),
    "an empty run": ("a,1,5\n", ("--run={}",), "holds no checkpoint"),
    "a step": ("a,1,5\n", ("--checkpoint_step=77",), "no checkpoint of step 77"),
    "top": ("a,1,5\n", ("--top=0",), "--top"),
}


@pytest.mark.parametrize("ratings, flags, message", BAD.values(), ids=BAD)
def test_bad_input_is_named_in_one_sentence(command, tmp_path, capfd, ratings, flags, message):
    (tmp_path / "titles.csv").write_text("item,title\n1,Alien (1979)\n2,Aliens (1986)\n")
    (tmp_path / "broken.csv").write_text("1,Heat\n2\n")
    (tmp_path / "pairs.csv").write_text("a,2\nb\n")
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as error:
        command(HEAD + ratings, *(flag.format(tmp_path) for flag in flags))
    assert "\n" not in str(error.value) and capfd.readouterr().out == ""
    assert set(tmp_path.iterdir()) <= before | {tmp_path / "ratings.csv"}


def test_piping_in_and_out(run, trained):
    """The real command: standard input to standard output, progress on standard error alone."""
    command = [sys.executable, "recommend.py", f"--run={run}", "--ratings=-", "--device=cpu", "--top=4"]
    done = subprocess.run(command, input=HEAD + "me,1,5\nme,2,1\n", capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    found = [(int(row["item"]), float(row["rating"])) for row in table(done.stdout)]
    assert found == trained.adapt([(1, 5), (2, 1)]).top(4)


def test_an_error_in_standard_input_is_one_line_and_status_2(run, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((HEAD + "me,1,5\nme,2,11\n").encode())))
    with pytest.raises(SystemExit) as end:
        run_script(lambda: recommend.main([f"--run={run}", "--ratings=-"]))
    out, err = capfd.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.splitlines()[-1].startswith("error: standard input, line 3: ")


def test_a_device_is_not_replaced_by_a_file(command):
    command(HEAD + "a,1,5\n", "--output=/dev/null", "--format=csv")
    assert not Path("/dev/null").is_file()
