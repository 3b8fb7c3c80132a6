"""The naive reference does the same work as the vectorised path, and the script runs. Nothing is timed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import benchmark
import maml
import utils

ROOT = Path(__file__).parents[1]
TINY = [f"--{name}={value}" for name, value in tiny.SIZES.items() if name != "batch_size"]


@pytest.mark.parametrize("form", benchmark.FORMS)
@pytest.mark.parametrize("model", tiny.LEARNERS)
def test_naive_reference_gives_the_same_gradients(model, form):
    bench = benchmark.parse(["--device=cpu", "--items=50", f"--model={model}", *TINY])
    options = benchmark.settings(form, bench)
    system = benchmark.build(options, bench, 50)
    tasks, every = (benchmark.draw(options, 4, 50, shared=shared) for shared in (True, False))
    assert (tasks.times.max() > 1) == (form == "paper" and model in ("narm", "gru4rec"))
    assert benchmark.gradient_difference(system, tasks, benchmark.spread(every, options.max_seq_len - 1)) < 1e-7


def test_naive_reference_of_first_order():
    options = tiny.options(use_multi_step=False, use_adaptive_loss=False, adapt="all", init_items="random")
    assert not options.use_second_order
    system, tasks = tiny.ensemble(options), tiny.training_tasks(options)
    assert benchmark.gradient_difference(system, tasks, benchmark.spread(tasks, options.max_seq_len - 1)) < 1e-7


def test_spread_tasks_hold_the_same_windows_one_a_row():
    options = tiny.options(adapt="all")
    tasks = tiny.training_tasks(options)
    spread = benchmark.spread(tasks, options.max_seq_len - 1)
    assert spread.items.shape[1:] == (int(tasks.segment.max()), options.max_seq_len - 1)
    for t in range(len(tasks.table)):
        for window, row in enumerate(spread.segment[t], 1):
            packed, alone = tasks.segment[t] == window, row > 0
            assert set(row.tolist()) <= {0, window} and alone.sum() == packed.sum()
            assert alone[: alone.sum()].all()
            assert torch.equal(tasks.table[t][tasks.items[t][packed]], spread.items[t, window - 1][alone])
            assert torch.equal(tasks.ratings[t][packed], spread.ratings[t, window - 1][alone])


def test_all_sections_print_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "apart", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(benchmark, "together", lambda count, function, *given: [function(*given)] * count)
    small = [
        "--users=8",
        "--tasks=4",
        "--items=50",
        "--many_items=90",
        "--rows=30000",
        "--many_rows=20000",
        "--min_item=2",
        "--steps=2",
    ]
    data = [f"--data_path={ROOT}/Data/sample/ratings.csv", "--mode=sample", f"--cache_dir={tmp_path}"]
    outer = ["--every=1", "--num_train_iterations=2", "--batch_size=4", "--num_test_data=50"]
    common = ["--json", "--reps=1", "--device=cpu", "--models", "gru4rec"]
    assert benchmark.main([*common, *small, *data, *outer, *TINY]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["sections"]) == list(benchmark.SECTIONS)
    for rows in report["sections"].values():
        assert rows and all(isinstance(row["value"], (int, float)) for row in rows)
        for row in rows:
            assert (row["met"] is None) == (row["at_least"] is None and row["at_most"] is None)


def test_sections_are_chosen_and_printed_as_a_table():
    chosen = ["--only", "eval", "--models", "sasrec", "--users=4", "--reps=1", "--device=cpu"]
    command = [sys.executable, ROOT / "benchmark.py", *chosen, *TINY]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "sasrec, paper" in done.stdout and "users/s" in done.stdout and "narm" not in done.stdout


def test_two_processes_have_the_parameters_of_one():
    bench = benchmark.parse(["--device=cpu", "--models", "gru4rec", *TINY])
    alone = benchmark.measure_parameters(bench, "default", 20, 5, True)
    both = benchmark.together(2, benchmark.measure_parameters, bench, "default", 20, 5, True)
    assert len(both) == 2 and (both[0] == both[1]).all()
    assert abs(both[0] - alone).max() < 1e-6


def test_apart_runs_in_another_process_with_memory_of_its_own():
    assert benchmark.apart(os.getpid) != os.getpid()
    held, bench = np.ones(10**8), benchmark.parse(["--device=cpu"])
    assert benchmark.apart(benchmark.peak_memory, bench) < held.nbytes / 1e6 < benchmark.peak_memory(bench)


@pytest.mark.parametrize("wrong", [["--only", "cooking"], ["--model=lstm"], ["--reps=0"], ["--fold=9"]])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(utils.UserError):
        benchmark.parse(wrong)


def test_rows_know_whether_they_meet_their_target():
    assert benchmark.row("", 6, "x", at_least=6)["met"] and not benchmark.row("", 5, "x", at_least=6)["met"]
    assert benchmark.row("", 1, "x", at_most=1.5)["met"] and not benchmark.row("", 2, "x", at_most=1.5)["met"]
    assert benchmark.row("", 1, "x")["met"] is None


def test_objective_weights_match_the_form():
    bench = benchmark.parse(["--device=cpu"])
    assert len(maml.objective_weights(benchmark.settings("paper", bench), 1)) == 4
