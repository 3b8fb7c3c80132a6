"""compare.py and its leak test, on the bundled sample at tiny sizes."""

import json
import os
import queue
import shutil
import signal
import time
from threading import Event, Lock
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
from evaluation import baselines, figures, metrics, predictions, tables
from evaluation.predictions import Cell
from models import checkpoint
from training import loop
from utils import UserError, run_script

SAMPLE = compare.ROOT / "Data" / "sample" / "ratings.csv"
SIZES = ("--mode=sample", "--batch_size=4", "--pretraining_batch_size=4", "--val_size=40", "--val_targets=1")
SHORT = ("--num_train_iterations=12", "--log_interval=4")
ASKED = ("--models=bert4rec", *SIZES, *SHORT)
BASIC, MELO = (Cell("bert4rec", method, False, 0, 222) for method in ("basic", "melo"))
TABLES = ("table.csv", "differences.csv")


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
    chosen = table[user].isin(ratings.user_ids[users])
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


class Forked:
    """What `compare` needs of a Popen of main.py or pretrain.py, by a fork of this process, which imports nothing."""

    def __init__(self, words, stdout, stderr, env, **_):
        script = {"main.py": main, "pretrain.py": pretrain}[words[1].name]

        def run_it():
            os.environ.update(env)
            run_script(lambda: script.main(words[2:]))

        self.process = running.fork(run_it, stdout.name, stderr.name)
        self.terminate = lambda: os.kill(self.process, signal.SIGTERM)
        self.wait = lambda: running.wait(self.process)


def test_table_depends_on_neither_order_nor_processes_nor_interruptions(reference, tmp_path, monkeypatch):
    given = [f"--output={tmp_path}", "--jobs=1", "--methods", "melo", "basic", *ASKED]

    def interrupt(work, futures):
        while not list(tmp_path.glob("runs/*/*/checkpoints/best.pt")) and work.running:
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(figures, "draw_all", lambda *_: None)
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(Popen=Forked, DEVNULL=None))
    with monkeypatch.context() as patch:
        patch.setattr(compare, "watch", interrupt)
        assert compare.main(given) == 130
    assert not (tmp_path / "table.md").exists()
    assert compare.main(given) == 0
    for name in TABLES:
        assert (tmp_path / name).read_bytes() == (reference / name).read_bytes()
    for path in (reference / "predictions").iterdir():
        pd.testing.assert_frame_equal(pd.read_parquet(path), pd.read_parquet(tmp_path / "predictions" / path.name))


def test_finished_runs_are_not_repeated(reference, monkeypatch, capsys):
    monkeypatch.setattr(compare.subprocess, "Popen", no_training)
    monkeypatch.setattr(predictions, "score_simple", no_training)
    monkeypatch.setattr(figures, "draw_all", lambda *_: None)
    assert compare.main([f"--output={reference}", "--methods", "basic", "melo", *ASKED]) == 0
    assert "3 of 3 runs are finished" in capsys.readouterr().err


@pytest.mark.parametrize(("cell", "script"), [(BASIC, pretrain), (MELO, main)])
def test_a_run_of_fewer_iterations_begins_anew(cell, script, tmp_path, monkeypatch):
    """Basic's iterations are counted by pretrain.py where they are not given."""
    ways = []

    def fit(system, problem, options, folder):
        checkpoint.save_checkpoint(folder, 1, {"options": option_module.as_stored(options)})

    def start(words, **_):
        ways.append(words[-1])
        script.main(words[2:])
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(loop, "fit", fit)
    monkeypatch.setattr(predictions, "score_run", lambda *_: None)
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(Popen=start, DEVNULL=None))
    longer = ["--num_train_iterations=900000"]
    for more in ([], [], longer, longer):
        args = compare.parse([f"--output={tmp_path}", *SIZES, "--init_items=random", *more])
        assert compare.run_all(args, {cell: compare.read_options(args, cell)}) == {}
    assert ways == ["--resume", "--resume", "--overwrite", "--resume"]


def test_tables_and_pictures_are_made_from_predictions_alone(reference, tmp_path, capsys):
    shutil.copytree(reference / "predictions", tmp_path / "predictions")
    given = ["--report_only", f"--output={tmp_path}", "--models=bert4rec", "--methods", "melo", "basic"]
    assert compare.main(given) == 0
    text = capsys.readouterr().out
    assert "MELO − matrix" in text and "MELO − user + item effects" in text
    assert "torch" in text and "150 targets" in text
    assert max(map(len, text.replace(str(tmp_path), "").split("\n"))) <= 80
    pictures = ("cold_start", "by_rating", "by_balance", "weights", "validation")
    for name in ("table.md", *TABLES, *(f"{name}.svg" for name in pictures)):
        assert (tmp_path / name).read_bytes() == (reference / name).read_bytes()
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in pictures)


def test_rows_are_the_figures_of_main_test(reference):
    """And so Basic, MELO and the simple predictors are scored on the same targets with the same formula."""
    table = pd.read_csv(reference / "table.csv").set_index("method")
    place = reference / "runs" / "fold0-seed222"
    given = [*SIZES, "--fold=0", f"--log_dir={place}", f"--pretrain_log_dir={place}", "--test"]
    for script, method, more in ((main, "melo", ["--test_baseline"]), (pretrain, "basic", [])):
        assert script.main([*given, *more]) == 0
        found = json.loads((place / f"sample-bert4rec-{method}" / "test.json").read_text())
        for name in ("rmse", "rmse_se", "mae", "mae_se", "macro_rmse", "macro_rmse_se"):
            assert table.loc[method, name] == pytest.approx(found[name], rel=1e-9)
            for simple, its in found.get("simple_predictors", {}).items():
                assert table.loc[simple, name] == pytest.approx(its[name], rel=1e-9)


def test_predictions_hold_every_support_size_and_the_run(reference):
    frame = pd.read_parquet(predictions.path_of(reference / "predictions", MELO))
    assert sorted(frame.shots.unique()) == [1, 2, 3, 5, 10, 20, 29]
    assert (frame.support <= frame.shots).all() and (frame.groupby("shots").size() == 150).all()
    ratings = pd.read_csv(SAMPLE)
    ratings.columns = ["user", "item", "target", "time"]
    last = ratings.sort_values("time", kind="stable").groupby("user").tail(1)
    full = frame[frame.shots == 29].merge(last, on=["user", "item", "target"])
    assert len(full) == 150
    curve, weights = frame.attrs["curve"], frame.attrs["weights"]
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
    assert row.count("--") == 3 and "1 of 3 runs are missing" in shown.out


def test_an_unexpected_error_costs_its_own_cell_alone(tmp_path, monkeypatch, capsys):
    def score(path, cell, options, *_):
        if cell is MELO:
            raise torch.OutOfMemoryError("no room")
        if cell is simple:
            raise ValueError("odd\nand more")

    simple, missing = Cell("simple", "simple", False, 0, 222), BASIC._replace(fold=1)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "fold1-seed222").write_text("not a folder")
    monkeypatch.setattr(predictions, "score_simple", score)
    monkeypatch.setattr(predictions, "score_run", score)
    monkeypatch.setattr(
        compare, "subprocess", SimpleNamespace(Popen=lambda *_, **__: SimpleNamespace(wait=lambda: 0), DEVNULL=None)
    )
    args = compare.parse([f"--output={tmp_path}", *ASKED[1:]])
    failed = compare.run_all(args, {c: compare.read_options(args, c) for c in (simple, missing, MELO, BASIC)})
    assert failed.keys() == {simple, missing, MELO}
    assert failed[simple] == "unexpected ValueError: odd" and "ValueError: odd" in capsys.readouterr().err
    assert failed[missing].startswith(f"cannot make {tmp_path}/runs/fold1-seed222/")
    assert failed[MELO].startswith("out of memory: give --task_chunk=")


def test_a_run_that_starts_while_all_are_stopped_is_stopped_too(tmp_path, monkeypatch):
    ended = []

    def start(*_, **__):
        work.stop.set()
        return SimpleNamespace(terminate=lambda: ended.append(True), wait=lambda: 143)

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(Popen=start, DEVNULL=None))
    args = compare.parse([f"--output={tmp_path}", *ASKED])
    work = compare.Work(args, {MELO: compare.read_options(args, MELO)}, queue.Queue(), {}, Lock(), Event())
    work.slots.put({})
    assert compare.run_cell(work, MELO) == "exit status 143" and ended == [True]


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


@pytest.mark.parametrize("method", compare.METHODS)
def test_each_method_is_the_one_its_options_make(method):
    args = compare.parse(["--output=out", "--", "--mode=sample", "--num_inner_steps", "3"])
    options = compare.read_options(args, Cell("narm", method, True, 1, 7))
    assert (options.model, options.fold, options.random_seed, options.paper_form) == ("narm", 1, 7, True)
    assert options.num_inner_steps == (0 if method == "basic" else 3)
    assert options.use_adaptive_loss == (method == "melo") and options.use_second_order == (method in ("maml", "melo"))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--models", "transformer"], "invalid choice"),
        (["--folds", "six"], "not a whole number"),
        (["--folds", "6", "--mode=sample"], "--fold=6 must be below"),
        (["--model=narm"], "use --models"),
        (["--methods", "fomaml", "--use_second_order=True", "--mode=sample"], "turn fomaml into maml"),
        (["--no_such_option=1", "--mode=sample"], "no_such_option"),
        (["--mode=sample", "--data_path=absent.csv"], "absent.csv"),
        (["--report_only"], "no predictions"),
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


def write_cell(folder, method, fold, seed, users, errors):
    """A file of predictions with the given errors at full support; targets are 3."""
    cell = Cell("narm", method, False, fold, seed)
    frame = pd.DataFrame({"user": users, "item": 1, "target": 3.0, "prediction": 3.0 + np.array(errors)})
    frame = frame.assign(shots=29, support=5, balance=0.5, **cell._asdict())
    known = {"fingerprint": "x", "mode": "tiny", "scale": [1, 5], "levels": [1, 3, 5], "num_folds": 6}
    frame.attrs = known | {"commit": "abc", "torch": "2", "hardware": "a computer"}
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
    rows, about = tables.load(files)
    maml, melo = ("narm", "maml", False), ("narm", "melo", False)
    squared = np.array([(1 + 4) / 2, 0.25, 0.125, 2.25])
    expected = metrics.summary(squared, np.array([1.5, 0.5, 0.25, 1.5]), np.ones(4))
    assert tables.summary(rows, maml) == pytest.approx(expected)
    first, second = np.array([0.25, 0.0, 1.0]), np.array([1.0, 0.25, 0.0])
    assert tables.compare(rows, melo, maml)[0] == pytest.approx(metrics.compare(first, second))
    assert max(map(len, tables.write(tmp_path, list(files), rows, about).split("\n"))) <= 80
    text = (tmp_path / "table.md").read_text()
    assert "4 targets" in text and "fold 0, 1 of 6" in text and "seed 1, 2" in text and "Commit abc" in text
    assert list(figures.panels(rows, tables.groups_of(files, rows))) == ["NARM"]


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
        tables.load(files)
