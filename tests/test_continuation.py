"""A run that was interrupted and goes on ends in the same bits as one that was not.

MELO_RUN_KILLS sets how many runs of main.py are killed at a random moment (4), and a quarter as many of pretrain.py.
"""

import contextlib
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import (
    EVERY,
    ITERATIONS,
    NAMES,
    ROOT,
    at_write,
    command,
    curves,
    has_saved,
    result,
    run,
    same,
    start,
    wait,
    wait_until,
)  # fmt: skip

import dataloader
import main
import maml
import options as option_module
import pretrain
from models import checkpoint
from training import optimizer, run_folder
from training import run as runs
from utils import UserError

KILLS = int(os.environ.get("MELO_RUN_KILLS", 4))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("continuation")


@pytest.fixture(scope="module")
def every(place):
    """The folder of a run of main.py that was never interrupted and kept a checkpoint of every iteration."""
    log = place / "every" / "log"
    assert main.main(command(log, *EVERY)) == 0
    return log / NAMES["main"]


@pytest.fixture(scope="module")
def pretrained(place):
    """The folder of a run of pretrain.py that was never interrupted."""
    log = place / "pretrained" / "log"
    assert pretrain.main(command(log)) == 0
    return log / NAMES["pretrain"]


@pytest.mark.parametrize("script", NAMES)
def test_curves_are_complete(every, pretrained, script):
    made = curves({"main": every, "pretrain": pretrained}[script])
    assert [step for step, _ in made["validation/rmse"]] == [0, 5, 10, 12]
    assert [step for step, _ in made["train/rmse"]] == [5, 10, 12]


@pytest.mark.parametrize("number", range(KILLS + (KILLS + 3) // 4))
def test_killed_at_a_random_moment(every, pretrained, place, number):
    """After a random checkpoint, or before the first, and gone on with."""
    script, moment = "main" if number < KILLS else "pretrain", random.Random(number)
    log, step = place / f"killed{number}" / "log", moment.randrange(-1, ITERATIONS)
    process = start(log, *EVERY, script=script)
    if step >= 0:
        wait_until(has_saved(log / NAMES[script], step))
    time.sleep(moment.uniform(0, 0.3 if step < 0 else 0.03))
    process.kill()
    assert wait(process) in (-signal.SIGKILL, 0)
    assert run(log, "--resume", script=script) == (0, "")
    assert same(result(log / NAMES[script]), result(every if script == "main" else pretrained))


def test_sparse_items_killed_and_gone_on_with(place):
    """Rows of item tables have their own optimizer state."""
    flags = "--sparse_items=True", *EVERY
    whole, killed = place / "sparse" / "log", place / "sparse-killed" / "log"
    assert main.main(command(whole, *flags)) == 0
    assert wait(start(killed, *flags, before=at_write(9))) == -signal.SIGKILL
    assert run(killed, *flags, "--resume") == (0, "")
    assert same(result(killed / NAMES["main"]), result(whole / NAMES["main"]))


def test_killed_at_every_write(every, place):
    """Each process goes on from what the one before it saved, writes a few files, and dies at the next."""
    log, statuses = place / "writes", []
    while len(statuses) < 30 and statuses[-1:] != [0]:
        statuses.append(wait(start(log, "--resume", before=at_write(6))))
    assert len(statuses) > 3 and set(statuses[:-1]) == {-signal.SIGKILL}
    assert same(result(log / every.name), result(every))


@pytest.mark.parametrize("step", [1, 4, 5, 11])
def test_going_on_from_any_checkpoint(every, place, step):
    expected, log = result(every), place / f"from{step}"
    folder = copy_until(every, log, step)
    status, errors = run(log, "--resume")
    assert status == 0 and "best checkpoint" in errors and errors.count("\n") == 1
    made = result(folder)
    assert same(made["curves"], expected["curves"])
    for part in ("last", "system", "optimizers"):
        assert same(made["states"][0][part], expected["states"][0][part])


def copy_until(every, log, step):
    """Copy a run's folder to `log` as if it had no checkpoint after `step`."""
    folder = log / every.name
    shutil.copytree(every, folder)
    for number, path in checkpoint.find_checkpoints(folder).items():
        if number > step:
            path.unlink()
    (folder / "checkpoints" / "best.pt").unlink()
    return folder


def test_damaged_checkpoints_are_passed_over(every, place):
    log = place / "damaged"
    folder = log / every.name
    shutil.copytree(every, folder)
    for path in list((folder / "checkpoints").iterdir()):
        if path.name not in ("best.pt", "step-00000003.pt"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    status, errors = run(log, "--resume", "--keep_checkpoints=100")
    assert status == 0 and "its checksum does not fit" in errors
    assert same(result(folder), result(every))


def test_a_finished_run_stays_as_it_is(every, place):
    log = place / "finished"
    shutil.copytree(every, log / every.name)
    for _ in range(2):
        assert run(log, "--resume") == (0, "")
    assert same(result(log / every.name), result(every))
    assert len(run_folder.read_config(log / every.name)["continued"]) == 2


def test_a_finished_run_goes_on_to_more_iterations(every, place):
    """Along the longer cosine, in the same bits whatever the interruptions; never to fewer."""
    longer = "--resume", f"--num_train_iterations={ITERATIONS + 6}"
    results = []
    for name in ("longer", "longer-killed"):
        log = place / name
        shutil.copytree(every, log / every.name)
        if name == "longer-killed":
            assert wait(start(log, *longer, before=at_write(4))) == -signal.SIGKILL
        assert run(log, *longer) == (0, "")
        results.append(result(log / every.name))
    assert same(*results)
    before, after = curves(every), results[0]["curves"]
    assert all(points[: len(before[tag])] == before[tag] for tag, points in after.items())
    assert [step for step, _ in after["validation/rmse"]] == [0, 5, 10, 12, 15, 18]
    opts = option_module.parse("", command(log, *longer))
    done = (ITERATIONS + 5) / (ITERATIONS + 6)
    cosine = (1 + math.cos(math.pi * done)) / 2
    expected = (opts.min_outer_lr + (opts.outer_lr - opts.min_outer_lr) * cosine) * (ITERATIONS + 6) / optimizer.WARMUP
    assert after["charts/learning_rate"][-1][1] == pytest.approx(expected, rel=1e-6)
    status, errors = run(log, "--resume")
    assert status == 2 and f"--num_train_iterations was {ITERATIONS + 6} and is now {ITERATIONS}" in errors


def test_other_intervals_give_the_same_weights_and_no_double_points(every, place):
    log = place / "intervals"
    folder = copy_until(every, log, 7)
    flags = "--resume", "--log_interval=7", *EVERY
    assert wait(start(log, *flags, before=at_write(2))) == -signal.SIGKILL
    assert run(log, *flags)[0] == 0
    made, expected = result(folder), result(every)
    assert same(made["states"][0]["last"], expected["states"][0]["last"])
    assert [step for step, _ in made["curves"]["validation/rmse"]] == [0, 5, 7, 12]


# -----------------------------------------------------------------------------
# the same bits everywhere


def test_same_bits_in_other_surroundings(every, place):
    """A process of its own, with another hash seed, working directory and time zone, and --deterministic."""
    log = place / "elsewhere" / "log"
    log.mkdir(parents=True)
    changed = {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "OMP_NUM_THREADS": "1", "LC_ALL": "C"}
    words = [sys.executable, ROOT / "main.py", *command(log, "--deterministic", *EVERY)]
    subprocess.run(words, cwd=log.parent, env={**os.environ, **changed}, check=True, capture_output=True)
    assert same(result(log / every.name), result(every))


# -----------------------------------------------------------------------------
# checkpoints that somebody made


@pytest.fixture(scope="module")
def resume(every, place):
    """A function that goes on from the one checkpoint that it is given the state of."""
    log = place / "crafted"
    opts = option_module.parse("", command(log, "--resume"))
    problem = dataloader.load_problem(opts)
    system = maml.build_system(problem, opts)
    folder = copy_until(every, log, 0)

    def go_on(state):
        checkpoint.save_checkpoint(folder, ITERATIONS, {**state, "step": ITERATIONS}, keep=1)
        runs.begin(runs.new_run(*system, problem, opts, folder))

    return go_on


odd = st.none() | st.integers(-5, 5) | st.floats() | st.text(max_size=3) | st.just([]) | st.just({}) | st.just((1, 2))
odd |= st.sampled_from([(), (3,), (2, 2)]).map(torch.zeros) | st.just({"step": 1}) | st.just({(1, 2): 3})


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_crafted_state_gives_one_sentence(every, resume, data):
    state = checkpoint.load_checkpoint(every / "checkpoints" / "best.pt")
    holder = state
    while True:
        key = data.draw(st.sampled_from(range(len(holder)) if isinstance(holder, list) else sorted(holder, key=str)))
        if not isinstance(holder[key], dict | list) or not holder[key] or data.draw(st.booleans()):
            break
        holder = holder[key]
    if data.draw(st.booleans()):
        holder[key] = data.draw(odd)
    else:
        del holder[key]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(UserError):
        resume(state)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (("loop",), {}, "loop state .* is damaged"),
        (("loop", "sums"), [1.0, 2.0], "loop state .* is damaged"),
        (("loop", "iteration"), 3, "loop state .* is damaged"),
        (("last", "rates.log_rate.head/user_bias"), torch.zeros(7), "does not fit its own options"),
        (("optimizers", 0, 0, "exp_avg"), torch.zeros(7), "optimizer state .* is damaged"),
        (("optimizers", 0, 999), {}, "optimizer state .* is damaged"),
        (("options", "batch_size"), 5, "--batch_size was 5 and is now 4"),
        (("options",), {(1, 2): 3}, "options .* are damaged"),
        (("fingerprint",), "abc", "belongs to other data"),
        (("levels",), None, "no checkpoint in .* can be used"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(every, resume, part, value, message):
    state = checkpoint.load_checkpoint(every / "checkpoints" / "best.pt")
    holder = state
    for key in part[:-1]:
        holder = holder[key]
    holder[part[-1]] = value
    with pytest.raises(UserError, match=message) as error:
        resume(state)
    assert "\n" not in str(error.value)


def test_resume_without_a_run_begins_one(every, place):
    assert main.main(command(place / "none", "--resume", *EVERY)) == 0
    assert same(result(place / "none" / every.name), result(every))


def test_each_validation_can_be_tested(every, place):
    log = place / "each"
    shutil.copytree(every, log / every.name)
    steps = [step for step, _ in curves(every)["validation/rmse"]]
    for number, path in checkpoint.find_checkpoints(log / every.name).items():
        if number < ITERATIONS:
            path.unlink()
    assert list(checkpoint.find_checkpoints(log / every.name, "weights")) == steps
    for step in steps:
        assert main.main(command(log, "--test", f"--checkpoint_step={step}")) == 0
        assert json.loads((log / every.name / "test.json").read_text())["step"] == step


def test_of_a_large_catalogue_few_validated_models_are_kept(every, place, monkeypatch):
    path = checkpoint.find_checkpoints(every, "weights")[ITERATIONS]
    state, folder = checkpoint.load_checkpoint(path), place / "large"
    folder.mkdir(parents=True)
    for room, kept in ((2.5, [4, 5]), (3.5, [5, 6, 7]), (0.1, [6, 7])):
        monkeypatch.setattr(checkpoint, "MOST_BYTES", int(room * path.stat().st_size))
        step = kept[-1]
        for number in range(step - 2, step + 1):
            checkpoint.save_weights(folder, number, state)
        assert list(checkpoint.find_checkpoints(folder, "weights")) == kept
    with pytest.raises(UserError, match="can be 6, 7 or -1"):
        checkpoint.checkpoint_path(folder, 3)


def test_as_many_validated_models_are_kept_as_asked_for(place):
    assert main.main(command(place / "few", "--log_interval=2", "--keep_models=2", "--overwrite")) == 0
    folder = place / "few" / NAMES["main"]
    assert list(checkpoint.find_checkpoints(folder, "weights")) == [10, 12]
    assert main.main(command(place / "few", "--test", "--checkpoint_step=10")) == 0
