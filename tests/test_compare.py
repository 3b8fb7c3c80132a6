"""compare.py and its leak test, on the bundled sample at tiny sizes."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import running
import torch

import compare
import dataloader
import main
import options as option_module
import pretrain
from evaluation import baselines, evaluate, external, figures, metrics, predictions, results, tables
from evaluation.predictions import Cell
from models import checkpoint
from utils import UserError, run_script

SAMPLE = compare.ROOT / "Data" / "sample" / "ratings.csv"
SIZES = ("--mode=sample", "--batch_size=4", "--pretraining_batch_size=4", "--val_size=40")
SHORT = ("--num_train_iterations=12", "--log_interval=4")
ASKED = ("--models=bert4rec", *SIZES, *SHORT)
BASIC, MELO = (Cell("bert4rec", method, False, 0, 222) for method in ("basic", "melo"))
SIMPLE = Cell("simple", "simple", False, 0, 222)
TABLES = ("table.csv", "differences.csv")
PICTURE_OF_USERS = ("train_users.png", "train_users.svg")


# -----------------------------------------------------------------------------
# nothing of the test users reaches training


def part_of_sample():
    """The sample's ratings of a third of its users."""
    table = pd.read_csv(SAMPLE)
    return table[table[table.columns[0]] % 3 == 0]


def fitted(folder, ratings, users):
    """All that is fitted with the ratings of `users` turned upside down, and the data's fingerprint."""
    folder.mkdir()
    table = part_of_sample()
    user, value = table.columns[0], table.columns[2]
    chosen = table[user].astype(str).isin(ratings.user_ids[users])
    table.loc[chosen, value] = ratings.low + ratings.high - table[value]
    table.to_csv(folder / "ratings.csv", index=False)
    given = [
        *SIZES,
        "--num_train_iterations=2",
        "--log_interval=1",
        "--fold=0",
        f"--data_path={folder / 'ratings.csv'}",
    ]
    given += [f"--cache_dir={folder}", f"--log_dir={folder}", f"--pretrain_log_dir={folder}"]
    assert main.main(given) == pretrain.main(given) == 0
    problem = dataloader.load_problem(option_module.parse("", given))
    found = {"chosen": baselines.fit_baselines(problem.ratings, problem.train, problem.validation, 30)[1]}
    found["mean"], found["item effect"] = baselines.fit_effects(problem.ratings, problem.train)
    for path in sorted(folder.glob("*/checkpoints/*.pt")):
        state = checkpoint.load_checkpoint(path)
        found |= {f"{path.parts[-3]} {path.name} {name}": value for name, value in state["system"].items()}
    return found, problem.ratings.fingerprint


def same(one, other):
    """Which entries are equal bit for bit."""
    assert one.keys() == other.keys()
    return {name: np.array_equal(value, other[name]) for name, value in one.items()}


def test_ratings_of_test_users_reach_no_fitted_parameter(tmp_path):
    part_of_sample().to_csv(path := tmp_path / "ratings.csv", index=False)
    problem = dataloader.load_problem(option_module.parse("", [*SIZES, "--fold=0", f"--data_path={path}"]))
    before, fingerprint = fitted(tmp_path / "as it is", problem.ratings, problem.test[:0])
    after, changed = fitted(tmp_path / "test users", problem.ratings, problem.test)
    assert fingerprint != changed
    assert all(same(before, after).values())
    assert sum("best.pt members.0.learner." in name for name in before) > 20
    assert any("loss_network" in name for name in before)
    # the same change to training users is seen
    after, _ = fitted(tmp_path / "training users", problem.ratings, problem.train[:100])
    different = [name for name, equal in same(before, after).items() if not equal]
    assert "item effect" in different and any("melo" in n for n in different) and any("basic" in n for n in different)


# -----------------------------------------------------------------------------
# runs


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of a finished comparison of Basic and MELO."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    assert compare.main([f"--output={folder}", "--methods", "basic", "melo", "--jobs=2", *ASKED]) == 0
    return folder


def no_training(*args, **kwargs):
    raise AssertionError("a finished run was repeated")


class Spawned:
    """What `compare` needs of a Popen of main.py or pretrain.py, in a process that has imported everything."""

    def __init__(self, words, stdout, stderr, env, **_):
        run_it = partial(running.run_main, words[3].stem, words[4:])
        self.process = running.spawn(run_it, stdout.name, stderr.name, env)
        self.returncode, self.stdin, self.terminate = None, io.BytesIO(), self.process.terminate

    def wait(self):
        self.returncode = running.wait(self.process)

    def poll(self):
        self.returncode = self.process.exitcode
        return self.returncode


def popen(function):
    """A stand-in for the module subprocess."""
    return SimpleNamespace(Popen=function, DEVNULL=None, PIPE=None)


def ended(status=0):
    """A process that has ended."""
    process = SimpleNamespace(returncode=status, stdin=io.BytesIO(), poll=lambda: status)
    return SimpleNamespace(**vars(process), wait=lambda: status, terminate=lambda: None)


def test_table_depends_on_neither_order_nor_processes_nor_interruptions(reference, tmp_path, monkeypatch):
    given = [f"--output={tmp_path}", "--jobs=1", "--methods", "melo", "basic", *ASKED]

    def interrupt(bar, running):
        if list(tmp_path.glob("runs/*/*/checkpoints/best.pt")):
            os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(figures, "draw_all", lambda *_: None)
    monkeypatch.setattr(compare, "subprocess", popen(Spawned))
    with monkeypatch.context() as patch:
        patch.setattr(compare, "show_running", interrupt)
        assert compare.main(given) == 130
    assert not (tmp_path / "table.md").exists()
    assert compare.main(given) == 0
    for name in TABLES:
        assert (tmp_path / name).read_bytes() == (reference / name).read_bytes()
    for path in (reference / "predictions").iterdir():
        pd.testing.assert_frame_equal(pd.read_parquet(path), pd.read_parquet(tmp_path / "predictions" / path.name))


def test_a_run_stops_when_what_started_it_is_killed(tmp_path):
    (script := tmp_path / "script.py").write_text("import time\ntime.sleep(60)\n")
    words = [sys.executable, "-c", compare.CHILD, str(script)]
    parent = (
        f"import subprocess, time; p = subprocess.Popen({words!r}, stdin=subprocess.PIPE); print(p.pid, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", f"{parent}; time.sleep(60)"], stdout=subprocess.PIPE)
    child = int(process.stdout.readline())
    os.kill(child, 0)
    process.kill()
    process.wait()
    running.wait_until(lambda: not is_running(child))


def is_running(process):
    """Whether a process is there and no zombie."""
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def test_finished_runs_are_not_repeated(reference, monkeypatch, capsys):
    monkeypatch.setattr(compare.subprocess, "Popen", no_training)
    monkeypatch.setattr(predictions, "score_simple", no_training)
    monkeypatch.setattr(figures, "draw_all", lambda *_: None)
    assert compare.main([f"--output={reference}", "--methods", "basic", "melo", *ASKED]) == 0
    assert "3 of 3 runs are finished" in capsys.readouterr().err


@pytest.mark.parametrize(("cell", "script"), [(BASIC, pretrain), (MELO, main)])
def test_a_run_of_fewer_iterations_starts_again(cell, script, tmp_path, monkeypatch):
    """Iterations are counted where they are not given."""
    ways = []

    def train(options, folder):
        problem = dataloader.load_problem(options)
        options.num_train_iterations = options.num_train_iterations or dataloader.count_iterations(options, problem)
        state = {"options": option_module.as_stored(options), "fingerprint": problem.ratings.fingerprint}
        checkpoint.save_checkpoint(folder, 1, state)
        return 0

    def start(words, stdin, **_):
        assert stdin == "a pipe"
        ways.append(words[-1])
        script.main(words[4:])
        return ended()

    monkeypatch.setattr(main, "train", train)
    monkeypatch.setattr(predictions, "score_run", lambda *_: None)
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(Popen=start, PIPE="a pipe"))
    fewest, more_than_counted = (f"--num_train_iterations={number}" for number in (1, 900_000))
    for more in ([fewest], [], [], [more_than_counted], [more_than_counted]):
        args = compare.parse([f"--output={tmp_path}", *SIZES, *more])
        assert compare.run_all(args, {cell: compare.read_options(args, cell)}) == {}
    assert ways == ["--resume", "--overwrite", "--resume", "--overwrite", "--resume"]


def test_tables_and_pictures_are_made_from_predictions_alone(reference, tmp_path, capsys):
    shutil.copytree(reference / "predictions", tmp_path / "predictions")
    given = ["--report_only", f"--output={tmp_path}", "--models=bert4rec", "--methods", "melo", "basic"]
    assert compare.main(given) == 0
    text = capsys.readouterr().out
    assert "than matrix factorisation" in text or "and matrix factorisation cannot be told apart" in text
    assert "damped means: the item's mean" in text and "MELO: MAML with" in text
    assert "torch" in text and "150 targets" in text and "nan" not in text
    assert max(map(len, text.replace(str(tmp_path), "").split("\n"))) <= 80
    pictures = ("cold_start", "cold_start_learners", "by_rating", "by_balance", "weights", "validation")
    for name in ("table.md", *TABLES, *(f"{name}.svg" for name in pictures)):
        assert (tmp_path / name).read_bytes() == (reference / name).read_bytes()
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in pictures)


def test_rows_are_the_figures_of_main_test(reference):
    """And so Basic, MELO and the simple predictors are scored on the same targets with the same formula."""
    table = pd.read_csv(reference / "table.csv").set_index("method")
    place = reference / "runs" / "fold0-seed222"
    given = [*SIZES, "--fold=0", f"--log_dir={place}", f"--pretrain_log_dir={place}", "--test"]
    for script, method in ((main, "melo"), (pretrain, "basic")):
        assert script.main(given) == 0
        found = json.loads((place / f"sample-bert4rec-{method}" / "test.json").read_text())
        assert set(found["simple_predictors"]) < set(table.index)
        for row, its in {method: found, **found["simple_predictors"]}.items():
            its = its | its["order"]
            names = [column for column in table if column.removesuffix("_se") in (*tables.ERRORS, *metrics.ORDER)]
            assert table.loc[row, names].tolist() == pytest.approx([its[name] for name in names], rel=1e-9)
            assert (table.loc[row, "n"], table.loc[row, "users"]) == (its["n"], its["users"]) == (150, 150)


def test_predictions_hold_every_support_size_and_the_run(reference):
    whole = predictions.read(predictions.path_of(reference / "predictions", MELO))
    order, frame = (whole[whole.task == task] for task in ("order", "last"))
    assert sorted(frame.shots.unique()) == [0, 1, 2, 3, 5, 10, 20, 29]
    assert (frame.support <= frame.shots).all() and (frame.groupby("shots").size() == 150).all()
    assert (order.groupby("user").size() <= 10).all() and order.user.nunique() == 150 and (order.shots == 29).all()
    ratings = pd.read_csv(SAMPLE)
    ratings.columns = ["user", "item", "target", "time"]
    ratings = ratings.astype({"user": str, "item": str})
    last = ratings.sort_values("time", kind="stable").groupby("user").tail(1)
    full = frame[frame.shots == 29].merge(last, on=["user", "item", "target"])
    assert len(full) == 150
    curve, weights = whole.attrs["curve"], whole.attrs["weights"]
    assert len(curve) == 4 and all(seconds >= 0 and 0 < rmse < 3 for seconds, rmse in curve)
    assert all(weight is None or 0.5 < weight < 2 for values in weights.values() for weight in values)


def test_a_failed_run_is_reported_and_the_rest_goes_on(reference, tmp_path, monkeypatch, capsys):
    shutil.copytree(reference / "predictions", tmp_path / "predictions")
    predictions.path_of(tmp_path / "predictions", BASIC).unlink()
    (tmp_path / "pretrain.py").write_text("import sys; print('warning', file=sys.stderr); sys.exit('error: no luck')")
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "draw_all", lambda *_: None)
    assert compare.main([f"--output={tmp_path}", "--methods", "basic", "melo", *ASKED]) == 1
    shown = capsys.readouterr()
    assert shown.err.endswith("failed: bert4rec basic fold 0 seed 222: no luck\n")
    row = next(line for line in shown.out.split("\n") if "Basic" in line)
    assert row.count("--") == 6 and "1 of 3 runs are missing" in shown.out


def test_an_unexpected_error_costs_its_own_cell_alone(tmp_path, monkeypatch, capsys):
    def score(path, cell, options, *_):
        if cell is MELO:
            raise torch.OutOfMemoryError("no room")
        if cell is simple:
            raise ValueError("odd\nand more")

    simple, missing = SIMPLE, BASIC._replace(fold=1)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "fold1-seed222").write_text("not a folder")
    monkeypatch.setattr(predictions, "score_simple", score)
    monkeypatch.setattr(predictions, "score_run", score)
    monkeypatch.setattr(compare, "subprocess", popen(lambda *_, **__: ended()))
    args = compare.parse([f"--output={tmp_path}", *ASKED[1:]])
    failed = compare.run_all(args, {c: compare.read_options(args, c) for c in (simple, missing, MELO, BASIC)})
    assert failed.keys() == {simple, missing, MELO}
    assert failed[simple] == "unexpected ValueError: odd" and "ValueError: odd" in capsys.readouterr().err
    assert failed[missing].startswith(f"cannot write {tmp_path}/runs/fold1-seed222/")
    assert failed[MELO].startswith("out of memory: give --task_chunk=")


def test_no_run_is_left_at_work(tmp_path, monkeypatch):
    alive = []

    def start(*_, **__):
        number = len(alive)
        alive.append(True)
        stop = {"terminate": lambda: alive.__setitem__(number, False), "wait": lambda: None, "poll": lambda: None}
        return SimpleNamespace(**stop)

    def stop(bar, running):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "subprocess", popen(start))
    monkeypatch.setattr(compare, "show_running", stop)
    args = compare.parse([f"--output={tmp_path}", "--jobs=2", *ASKED])
    with pytest.raises(KeyboardInterrupt):
        compare.run_all(args, {cell: compare.read_options(args, cell) for cell in (MELO, BASIC)})
    assert alive == [False, False]


# -----------------------------------------------------------------------------
# damaged files


def damage(frame, name):
    """The predictions `frame`, damaged."""
    attrs = frame.attrs
    changes = {
        "no column": lambda: frame.drop(columns="target"),
        "missing": lambda: frame.assign(user=None),
        "doubled": lambda: pd.concat([frame, frame.head(1)]),
        "infinite": lambda: frame.assign(prediction=np.inf),
        "text": lambda: frame.assign(prediction="x"),
        "empty": lambda: frame.head(0),
        "escape": lambda: frame.assign(method="\x1b[2J"),
        "task": lambda: frame.assign(task="x"),
    }
    about = {
        "levels": {"levels": "12345"}, "scale": {"scale": [5, 1]}, "curve": {"curve": [[1], [2, 3]]},
        "weights": {"weights": {"balanced": [1]}}, "commit": {"commit": "\x1b[2J"}, "options": {"options": []},
        "nothing": {"fingerprint": None},
    }  # fmt: skip
    found = changes[name]() if name in changes else frame.copy()
    found.attrs = attrs | about.get(name, {})
    return found


DAMAGES = ("no column", "missing", "doubled", "infinite", "text", "empty", "escape", "task", "levels", "scale", "curve",
           "weights", "commit", "options", "nothing")  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_predictions_are_one_sentence_and_not_finished(name, reference, tmp_path):
    frame = predictions.read(predictions.path_of(reference / "predictions", MELO))
    damage(frame, name).to_parquet(path := tmp_path / "p.parquet")
    with pytest.raises(UserError, match="p.parquet does not hold predictions") as refusal:
        results.load({MELO: path})
    assert str(refusal.value).isprintable()
    assert not predictions.is_finished(path, MELO, None, "")


def test_truncated_predictions_are_one_sentence(reference, tmp_path):
    whole = predictions.path_of(reference / "predictions", MELO).read_bytes()
    for length in (0, 1, 4, 100, len(whole) // 2, len(whole) - 1):
        (path := tmp_path / "p.parquet").write_bytes(whole[:length])
        with pytest.raises(UserError, match="does not hold predictions"):
            predictions.read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="does not hold predictions"):
        predictions.read(path)


# -----------------------------------------------------------------------------
# the tasks that are scored


def test_last_ten_are_predicted_from_what_is_before_them_and_nothing_from_nothing(reference):
    place = reference / "runs" / "fold0-seed222"
    options = option_module.parse("", [*SIZES, "--fold=0"])
    path = checkpoint.checkpoint_path(place / "sample-bert4rec-melo")
    system, _, problem, _ = evaluate.load_system(path, options)
    found = evaluate.evaluate_order(system, problem, problem.test)
    user, support, target = baselines.order_support(problem.ratings, problem.test, 29)
    assert np.array_equal(found.user, user) and np.array_equal(found.target, target)
    assert np.array_equal(found.item, support.target_item)
    assert np.array_equal(found.support, (support.items >= 0).sum(1))
    length = np.diff(problem.ratings.offsets)[problem.test]
    long = problem.test[length > 10]
    alone = evaluate.evaluate(system, problem, long, num_targets=10)
    assert alone.prediction[-len(long) :] == pytest.approx(
        np.clip([found.prediction[user == u][0] for u in long], 1, 5), abs=1e-5
    )
    nothing = evaluate.evaluate(system, problem, problem.test, shots=0)
    assert (nothing.support == 0).all() and nothing.prediction == pytest.approx(nothing.unadapted)


# -----------------------------------------------------------------------------
# what is asked for


def test_cells_do_not_depend_on_the_order_of_the_command_line():
    one = [
        "--models",
        "narm",
        "sasrec",
        "narm",
        "--methods",
        "melo",
        "basic",
        "--folds",
        "2",
        "0",
        "--paper_models",
        "narm",
    ]
    other = ["--paper_models", "narm", "--folds", "0", "2", "--methods", "basic", "melo", "--models", "sasrec", "narm"]
    cells = compare.list_cells(compare.parse(one))
    assert cells == compare.list_cells(compare.parse(other))
    assert len(cells) == len(set(cells)) == 2 * (1 + 2 * 2 + 3)


def test_each_number_of_training_users_has_tables_of_its_own_and_all_have_a_picture(tmp_path, capsys):
    given = [f"--output={tmp_path}", "--train_users", "60", "20", "--methods", "maml"]
    assert compare.main([*given, "--models=sasrec", *SIZES, "--num_train_iterations=2"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20-users", "60-users", *PICTURE_OF_USERS]
    for number in (20, 60):
        state = checkpoint.load_newest(next(tmp_path.glob(f"{number}-users/runs/*/*")))
        assert state["options"]["num_train_users"] == number
        assert (tmp_path / f"{number}-users" / "table.md").exists()
    capsys.readouterr()
    before = (tmp_path / "train_users.png").read_bytes()
    assert compare.main([*given, "--models=sasrec", "--report_only"]) == 0
    assert (tmp_path / "train_users.png").read_bytes() == before
    assert "train_users.png" in capsys.readouterr().out
    with pytest.raises(UserError, match="40-users holds no predictions"):
        compare.main([*given, "--models=sasrec", "--report_only", "--train_users", "20", "40"])


def test_too_many_training_users_are_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "make_predictions", no_training)
    with pytest.raises(UserError, match="--num_train_users=9000 is more than the 638 training users"):
        compare.main([f"--output={tmp_path}", "--models=sasrec", "--train_users", "9000", "20", "--", *SIZES])
    assert not list(tmp_path.iterdir())


def test_a_comparison_without_any_run_says_why(tmp_path):
    words = "--models=sasrec", "--methods=maml", *SIZES, "--num_train_users=9000"
    with pytest.raises(UserError, match="no run succeeded; simple predictors.* more than the 638"):
        compare.main([f"--output={tmp_path}", *words])


def test_numbers_of_training_users_do_not_wait_for_each_other(tmp_path, monkeypatch):
    (tmp_path / "20-users").mkdir()
    (tmp_path / "20-users" / "runs").write_text("in the way")
    given = "--models=sasrec", "--methods", "maml", *SIZES, "--num_train_iterations=2"
    assert compare.main([f"--output={tmp_path}", *given, "--train_users", "20", "30"]) == 1
    assert (tmp_path / "train_users.png").exists()


@pytest.mark.parametrize("method", compare.METHODS)
def test_each_method_is_the_one_its_options_make(method):
    args = compare.parse(["--output=out", "--", "--mode=sample", "--num_inner_steps", "3"])
    options = compare.read_options(args, Cell("narm", method, True, 1, 7))
    assert (options.model, options.fold, options.random_seed, options.paper_form) == ("narm", 1, 7, True)
    assert options.num_inner_steps == (0 if method == "basic" else 3)
    assert options.use_adaptive_loss == (method in ("metal", "melo"))
    assert options.use_second_order == (method in ("maml", "metal", "melo"))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--models", "transformer"], "invalid choice"),
        (["--folds", "six"], "not a whole number"),
        (["--folds", "6", "--mode=sample"], "--fold=6 must be below"),
        (["--model=narm"], "use --models"),
        (["--test"], "--test is for compare.py to set"),
        (["--paper_form=False"], "give True or code"),
        (["--cache_dir=test", "--min_item", "many", "--mode=sample"], "--min_item"),
        (["test", "--mode=sample"], "unrecognized arguments: test"),
        (["--methods", "fomaml", "--use_second_order=True", "--mode=sample"], "turn fomaml into maml"),
        (["--no_such_option=1", "--mode=sample"], "no_such_option"),
        (["--mode=sample", "--data_path=absent.csv"], "absent.csv"),
        (["--report_only"], "no predictions"),
        (["--report_only", "--nonsense=1"], "nonsense"),
        (["--report_only", "--data_path=absent.csv", "--jobs=2"], "leave out --data_path, --jobs"),
        (["--external", "mine"], "not NAME=FILE"),
        (["--external", "MELO=x.csv"], "MELO is a row already"),
        (["--external", "a=x.csv", "a=y.csv"], "two files of one name"),
        (["--export_targets=x", "--external", "a=x.csv"], "makes no table"),
        (["--export_targets=x", "--models=narm", "--jobs=2"], "leave out --jobs, --models"),
        (["--export_targets=x", "--train_users", "5"], "leave out --train_users"),
        (["--train_users", "5", "--num_train_users=6", "--demo"], "leave out --demo, --num_train_users"),
        (["--train_users", "5", "--models"], "give --models and --methods"),
        (["--train_users"], "expected at least one argument"),
        (["--export_targets=x", "--mode=sample", "--num_inner_steps=2"], "leave out --num_inner_steps"),
        (["--paper_methods=melo", "--mode=sample"], "--paper_models is not given: leave out --paper_methods"),
        (["--mode=sample", "--ranking"], "does not go without --test"),
        (["--mode=sample", "--test_prefix=x"], "--test_prefix is for compare.py to set"),
        (["--seeds", str(10**20)], "out of range"),
    ],
)
def test_bad_input_is_one_sentence(words, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: compare.main(words))
    shown = capsys.readouterr().err
    assert stopped.value.code == 2
    assert shown.startswith("error: ") and shown.count("\n") == 1 and part in shown
    assert not list(tmp_path.iterdir())


def cells_of(*words):
    """The trained cells of a command line, and the arguments."""
    args = compare.parse(list(words))
    return [cell for cell in compare.list_cells(args) if cell.learner != "simple"], args


def test_the_published_preset_runs_the_authors_commands_from_pretrained_embeddings():
    cells, args = cells_of("--preset=published")
    assert len(cells) == len(set(cells)) == 4 * 5 * 2 and all(cell.paper and cell.fold == -1 for cell in cells)
    assert str(args.output) == str(args.report) == "results/published"
    folders, scripts = set(), {compare.command(args, cell)[0] for cell in cells if cell.method == "basic"}
    for cell in cells:
        options = compare.read_options(args, cell)
        assert (options.model_init_seed, options.num_test_data, options.random_seed) == (cell.init, 1000, 222)
        basic = compare.read_options(args, cell._replace(method="basic"))
        assert (options.item_lr, basic.item_lr) == ((1e-3 if options == basic else 1e-4), 1e-3)
        assert options.pretrain_log_dir == basic.log_dir and not basic.load_pretrained_embedding
        assert options.load_pretrained_embedding == (cell.method != "basic")
        assert (options.lstm_hidden, options.lstm_input_size) == (128, 8)
        if cell.method != "basic":
            assert (options.num_train_iterations, options.num_samples, options.log_interval) == (400, 25, 50)
        folders.add(checkpoint.run_folder(options.log_dir, options.mode, cell.learner, cell.method))
    assert len(folders) == len(cells) and scripts == {"pretrain.py"}


def test_the_tables_of_the_preset_are_those_of_the_mode():
    words = "--preset=published", "--report_only"
    assert {cell.fold for cell in cells_of(*words)[0]} == {-1}
    assert {cell.fold for cell in cells_of(*words, "--mode=amazon")[0]} == {0}


def test_forms_have_rows_and_folders_of_their_own():
    words = "--models=narm", "--methods=melo", "--paper_models=narm", "--paper_methods=melo", "--mode=sample"
    (plain, paper), args = cells_of(*words)
    (_, code), args_of_code = cells_of(*words, "--paper_form=code")
    cells = (args, plain), (args, paper), (args_of_code, code)
    options = [compare.read_options(*pair) for pair in cells]
    assert [o.paper_form for o in options] == [False, True, "code"] == [cell.paper for _, cell in cells]
    assert [o.query_windows for o in options] == [False, False, True]
    assert len({o.log_dir for o in options}) == len({compare.path_of(*pair) for pair in cells}) == 3
    assert len({tables.learner_name(cell[:3]) for _, cell in cells}) == 3


def test_options_replace_those_of_the_preset():
    words = "--preset=published", "--mode=sample", "--paper_models", "narm", "--paper_methods", "metal", "melo"
    cells, args = cells_of(*words, "--init_seeds=7", "--num_train_iterations=9", "--output=x")
    assert [(cell.learner, cell.method, cell.init, cell.fold) for cell in cells] == [
        ("narm", "metal", 7, 0), ("narm", "melo", 7, 0)
    ]  # fmt: skip
    assert [compare.read_options(args, cell).num_train_iterations for cell in cells] == [9, 9]
    assert str(args.output) == "x"


def test_the_run_that_the_demo_offers_to_serve_is_one_of_its_own():
    args = compare.parse(["--demo"])
    cell = next(cell for cell in compare.list_cells(args) if cell.method == "melo")
    options = compare.read_options(args, cell)
    folder = checkpoint.run_folder(options.log_dir, options.mode, cell.learner, cell.method)
    assert f"--run={folder} " in compare.NEXT


def test_an_option_may_have_the_name_of_another_as_value():
    assert str(compare.parse(["--demo", "--cache_dir", "test"]).output) == "log/demo"
    assert compare.parse(["--cache_dir", "test", "--columns", "user:model"]).rest[:2] == ["--cache_dir", "test"]


def test_jobs_get_a_gpu_each(monkeypatch):
    args = SimpleNamespace(jobs=3, threads=1)
    assert compare.places(args, "cpu") == [{}, {}, {}]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    gpus = [{"CUDA_VISIBLE_DEVICES": name} for name in ("4", "7", "4")]
    assert compare.places(args, "auto") == gpus
    args.jobs = None
    assert compare.places(args, "auto") == gpus[:2]


# -----------------------------------------------------------------------------
# tables


KNOWN = {"fingerprint": "x", "mode": "tiny", "scale": [1, 5], "levels": [1, 3, 5], "num_folds": 6, "options": {}}
KNOWN |= {"commit": "abc", "torch": "2", "hardware": "a computer"}


def write_cell(folder, method, fold, seed, users, errors, init=None):
    """A file of predictions with the given errors at full support; targets are 3."""
    cell = Cell("narm", method, False, fold, seed, init)
    frame = pd.DataFrame({"user": users, "item": 1, "target": 3.0, "prediction": 3.0 + np.array(errors)})
    frame = frame.assign(shots=29, support=5, balance=0.5, task="last", method=method)
    frame.attrs = KNOWN
    frame.to_parquet(predictions.path_of(folder, cell))
    return cell, predictions.path_of(folder, cell)


def test_errors_are_averaged_over_seeds_and_pairs_share_fold_seed_and_user(tmp_path):
    files = dict(
        [
            write_cell(tmp_path, "maml", 0, 1, [10, 11, 12], [1.0, 0.5, 0.0]),
            write_cell(tmp_path, "maml", 0, 2, [12, 11, 10], [0.5, 0.5, 2.0]),
            write_cell(tmp_path, "melo", 0, 1, [11, 12, 10], [0.0, 1.0, 0.5]),
            write_cell(tmp_path, "maml", 1, 1, [13], [1.5]),
        ]
    )
    found = results.load(files)
    maml, melo = ("narm", "maml", False), ("narm", "melo", False)
    squared = np.array([(1 + 4) / 2, 0.25, 0.125, 2.25])
    expected = metrics.summary(squared, np.array([1.5, 0.5, 0.25, 1.5]), np.ones(4))
    summary = results.summary(found, maml)
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    assert summary["users"] == 0 and np.isnan(summary["pairs"])
    first, second = np.array([0.25, 0.0, 1.0]), np.array([1.0, 0.25, 0.0])
    assert results.compare(found, melo, maml)["rmse"] == pytest.approx(metrics.compare_rmse(first, second))
    shown = tables.write(tmp_path, list(files), found)
    assert (
        max(map(len, shown.split("\n"))) <= 80
        and "NARM MELO and MAML cannot be told apart" in shown
        and "nan" not in shown
    )
    text = (tmp_path / "table.md").read_text()
    assert "4 targets" in text and "fold 0, 1 of 6" in text and "seed 1, 2" in text and "Commit abc" in text
    assert "nan" not in text
    assert list(figures.panels_of(results.groups_of(files, found))) == ["NARM"]


def test_errors_are_averaged_over_initialisations_and_the_rmse_of_each_is_shown(tmp_path):
    files = dict(
        [
            write_cell(tmp_path, "maml", 0, 1, [10, 11], [1.0, 0.5], init=5),
            write_cell(tmp_path, "maml", 0, 1, [10, 11], [0.0, 1.5], init=6),
            write_cell(tmp_path, "melo", 0, 1, [10, 11], [0.5, 0.5], init=5),
            write_cell(tmp_path, "melo", 0, 1, [10, 11], [1.0, 2.0], init=6),
        ]
    )
    assert len(set(files.values())) == 4
    found = results.load(files)
    maml, melo = (np.array(squared) / 2 for squared in ([1.0, 2.5], [1.25, 4.25]))
    assert results.summary(found, ("narm", "maml", False))["rmse"] == pytest.approx(np.sqrt(maml.mean()))
    difference = results.compare(found, ("narm", "melo", False), ("narm", "maml", False))["rmse"]
    assert difference == pytest.approx(metrics.compare_rmse(melo, maml))
    tables.write(tmp_path, list(files), found)
    text = (tmp_path / "table.md").read_text()
    each = [[np.sqrt((a**2 + b**2) / 2) for a, b in pairs] for pairs in (((1, 0.5), (0, 1.5)), ((0.5, 0.5), (1, 2)))]
    for title, (first, second) in zip(("MAML", "MELO"), each, strict=True):
        assert re.search(rf"\| {title} +\| {first:.4f} +\| {second:.4f} +\|", text)


def test_what_order_is_worth_is_a_difference_of_its_own():
    groups = ("simple", "item mean", False), ("sasrec", "melo", False), ("sasrec", "maml", False)
    found = {group: {"rmse": rmse} for group, rmse in zip(groups, (1.0, 0.9, 0.95), strict=True)}
    pairs = results.compared(found | {(blind := ("meanpool", "melo", False)): {"rmse": 0.92}})
    assert (groups[1], blind) in pairs and (blind, groups[0]) in pairs and (blind, blind) not in pairs
    assert tables.title_beside(groups[1], blind) == "Mean pooling MELO"
    assert tables.title_beside(*groups[1:]) == "MAML" and tables.title_beside(*groups[:2]) == "SASRec MELO"


def test_commit_says_whether_the_code_differs_and_not_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "__file__", str(tmp_path / "predictions.py"))
    assert predictions.commit() == "unknown"
    code, table = tmp_path / "predictions.py", tmp_path / "results" / "table.md"
    table.parent.mkdir()
    code.write_text("1\n")
    table.write_text("1\n")
    predictions.git("init", "--quiet")
    predictions.git("add", ".")
    predictions.git("-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "--no-gpg-sign", "--message=m")
    name = predictions.git("rev-parse", "--short", "HEAD")
    table.write_text("2\n")
    assert predictions.commit() == name
    code.write_text("2\n")
    assert predictions.commit() == f"{name}-dirty"


def test_predictions_of_different_data_do_not_mix(tmp_path):
    files = dict([write_cell(tmp_path, "maml", 0, 1, [1], [0.0]), write_cell(tmp_path, "melo", 0, 1, [1], [0.0])])
    frame = pd.read_parquet(path := list(files.values())[0])
    frame.attrs["fingerprint"] = "y"
    frame.to_parquet(path)
    with pytest.raises(UserError, match="different data"):
        results.load(files)


# -----------------------------------------------------------------------------
# other programs' predictions

EXTERNAL = """
import sys
import numpy as np

def read(name):
    return np.genfromtxt(f"{sys.argv[1]}/{name}.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")

mean = read("training")["rating"].mean()
targets, known, lines = read("targets"), read("support"), ["user,item,task,prediction"]
for row in targets:
    mine = known["rating"][(known["user"] == row["user"]) & (known["task"] == row["task"])]
    lines.append(f"{row['user']},{row['item']},{row['task']},{mine.mean() if len(mine) else mean}")
open(sys.argv[2], "w").write("\\n".join(lines))
"""


@pytest.fixture(scope="module")
def users_means(tmp_path_factory):
    """A file of another program's predictions: means of the users' ratings."""
    folder = tmp_path_factory.mktemp("external")
    (folder / "script.py").write_text(EXTERNAL)
    assert not compare.main([f"--export_targets={folder}", SIZES[0], SIZES[-1]])
    words = [sys.executable, folder / "script.py", folder / "fold0-seed222", folder / "mine.csv"]
    subprocess.run(words, check=True)
    return folder / "mine.csv"


def test_predictions_of_another_program_are_a_row(reference, users_means, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "draw_all", lambda *_: None)
    shutil.copytree(reference / "predictions", tmp_path / "predictions")
    given = ["--report_only", f"--output={tmp_path}", "--models=bert4rec", "--methods", "melo", "basic"]
    assert compare.main([*given, "--external", f"mine={users_means}"]) == 0
    table = pd.read_csv(tmp_path / "table.csv").set_index("method")
    columns = [name for name in table if name not in ("learner", "paper_form")]
    assert table.loc["mine", columns].tolist() == pytest.approx(table.loc["user mean", columns].tolist(), rel=1e-6)
    shown = capsys.readouterr().out
    assert "mine cannot be told apart" in shown or "than mine: RMSE is" in shown
    assert "mine is worse than matrix factorisation: RMSE is" in shown
    differences = pd.read_csv(tmp_path / "differences.csv").set_index("difference")
    assert {"MELO − mine", "mine − damped means"} <= set(differences.index)
    assert np.isfinite(differences.loc["MELO − mine", ["rmse_z", "ndcg@10_z", "pairs_z", "mae_z"]].astype(float)).all()


def test_lenskit_from_outside_gives_our_damped_means(reference, users_means, tmp_path):
    """An independent implementation of the simple predictors, by way of the exported files."""
    lenskit_rows = pytest.importorskip("examples.lenskit_rows")
    constants = predictions.read(predictions.path_of(reference / "predictions", SIMPLE)).attrs["constants"]
    given = [f"--{name}={value}" for name, value in constants["damped means"].items()]
    lenskit_rows.main([str(users_means.parent), *given])
    paths = {cell: predictions.path_of(reference / "predictions", cell) for cell in (SIMPLE, MELO)}
    found = results.load(paths, {name: users_means.parent / f"{name}.csv" for name in ("bias", "als")})
    figures = {group: results.summary(found, group) for group in results.groups_of([MELO], found)}
    names = {group[1]: report for group, report in figures.items()}
    assert names["bias"] == pytest.approx(names["damped means"], abs=1e-3)
    for one, other in (("bias", "damped means"), ("als", "matrix factorisation")):
        difference = results.compare(found, ("external", one, False), ("simple", other, False))["rmse"].difference
        assert abs(difference) < (1e-6 if one == "bias" else 0.05)
    table = found.last.pivot(index=["user", "shots"], columns="method", values="prediction")
    assert set(table.bias.dropna().index.get_level_values("shots")) == {*predictions.SHOTS}
    assert (table.bias - table["damped means"]).abs().max() < 1e-4


def test_ids_in_exported_files_keep_their_zeros(tmp_path):
    lenskit_rows = pytest.importorskip("examples.lenskit_rows")
    (tmp_path / "support.csv").write_text("user,item,rating\n007,0012,3\n")
    assert lenskit_rows.read(tmp_path / "support.csv").iloc[0].tolist() == ["007", "0012", 3]


def test_exported_files_hold_no_test_user_in_training_and_nothing_after_a_support(users_means):
    parts = {path.stem: pd.read_csv(path) for path in (users_means.parent / "fold0-seed222").glob("*.csv")}
    assert not set(parts["targets"].user) & (set(parts["training"].user) | set(parts["validation"].user))
    assert not set(parts["training"].user) & set(parts["validation"].user)
    everything = pd.read_csv(SAMPLE).set_axis(["user", "item", "rating", "time"], axis=1)
    for task, targets in parts["targets"].merge(everything, on=["user", "item", "rating"]).groupby("task"):
        support = parts["support"][parts["support"].task == task].merge(everything, on=["user", "item", "rating"])
        assert (support.groupby("user").time.max() <= targets.groupby("user").time.min()).all()
        assert support.groupby("user").size().max() == 29 and targets.groupby("user").size().max() in (1, 10)


def without_tasks(table):
    return table[table.task == "last"].drop(columns="task")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: t.head(20), "no prediction of a target"),
        (lambda t: pd.concat([t, t.head(1)]), "more than once"),
        (lambda t: pd.concat([t, t.head(5).assign(user=-1)]), "not a target (user '-1'"),
        (lambda t: t.drop(columns="item"), "lacks the column item"),
        (lambda t: t.assign(prediction="nan"), "not a finite number"),
        (lambda t: t.assign(prediction="much"), "not a finite number"),
        (lambda t: t.assign(task="\x1b[2J"), "not a target"),
        (without_tasks, None),
    ],
)
def test_missing_doubled_and_foreign_predictions_are_one_sentence(change, part, reference, users_means, tmp_path):
    frame = predictions.read(predictions.path_of(reference / "predictions", MELO))
    rows = frame.assign(learner="bert4rec", paper=False, fold=0, seed=222)
    change(pd.read_csv(users_means)).to_csv(path := tmp_path / "mine.csv", index=False)
    if part is None:
        assert len(external.read("mine", path, rows)) == 150
        return
    with pytest.raises(UserError, match=re.escape(part)) as refusal:
        external.read("mine", path, rows)
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 500


def test_folds_need_a_column(reference, users_means, tmp_path):
    frame = predictions.read(predictions.path_of(reference / "predictions", MELO))
    rows = pd.concat([frame.assign(learner="bert4rec", paper=False, fold=fold, seed=222) for fold in (0, 1)])
    with pytest.raises(UserError, match="lacks the column fold"):
        external.read("mine", users_means, rows)
    table = pd.read_csv(users_means)
    pd.concat([table.assign(fold=fold) for fold in (0, 1)]).to_csv(path := tmp_path / "mine.csv", index=False)
    assert external.read("mine", path, rows).groupby("fold").size().nunique() == 1


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"user,item\n1,2,3\n4,5,6,7,8\n"])
def test_what_is_no_csv_file_is_one_sentence(content, tmp_path):
    (path := tmp_path / "mine.csv").write_bytes(content)
    with pytest.raises(UserError, match="mine.csv"):
        external.read("mine", path, pd.DataFrame({"fold": [0], "seed": [0]}))
