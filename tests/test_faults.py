"""Faults that really happen to a run: what it says, the exit status, and that it goes on to the same bits."""

import os
import resource
import shutil
import signal
import socket

import numpy as np
import pytest
import torch
from running import ITERATIONS, NAMES, command, has_saved, read_events, result, run, same, start, wait, wait_until

import dataloader
import main
import options as option_module
import utils
from models import checkpoint
from training import loop, progress
from utils import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing happened to."""
    log = tmp_path_factory.mktemp("faults") / "log"
    assert main.main(command(log)) == 0
    return log / NAMES["main"]


@pytest.fixture
def log(whole, tmp_path):
    """The --log_dir of a run yet to be made."""
    return tmp_path / "log"


def do_before(function, number, action, owner=loop):
    """From now on, `action` is done before the n-th call of a function of `owner`."""
    original, left = getattr(owner, function), [number]

    def replaced(*arguments, **more):
        left[0] -= 1
        if not left[0]:
            action()
        return original(*arguments, **more)

    setattr(owner, function, replaced)


def assert_goes_on(whole, log, *flags):
    assert run(log, "--resume", *flags) == (0, "")
    assert same(result(log / whole.name), result(whole))


# -----------------------------------------------------------------------------
# stopped


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("function", ["train_iteration", "save", "start"])
def test_a_signal_stops_after_the_iteration(whole, log, function, number, status):
    stop = lambda: os.kill(os.getpid(), number)  # noqa: E731
    code, errors = run(log, before=lambda: do_before(function, 1 if function == "start" else 3, stop))
    assert code == status
    assert "stopped after iteration" in errors and errors.endswith("the same command with --resume goes on\n")
    assert_goes_on(whole, log)


def test_ctrl_c_before_training_is_one_line(log):
    interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    assert run(log, before=lambda: do_before("load_problem", 1, interrupt, dataloader)) == (130, "interrupted\n")
    assert not log.exists()


# -----------------------------------------------------------------------------
# folders and disks


def test_log_folder_removed_during_the_run(log):
    for number in (2, 9):
        code, errors = run(log, before=lambda n=number: do_before("train_iteration", n, lambda: shutil.rmtree(log)))
        assert code == 2 and "its folder was removed" in errors and "--log_dir" in errors
        assert not log.exists()


def test_a_second_run_is_refused_and_the_first_unharmed(whole, log):
    pause = lambda: os.kill(os.getpid(), signal.SIGSTOP)  # noqa: E731
    process = start(log, before=lambda: do_before("train_iteration", 7, pause))
    folder = log / whole.name
    wait_until(has_saved(folder, 6))
    for flag in ("--resume", "--overwrite", "--log_interval=5"):
        with pytest.raises(UserError, match=f"in use by process {process} on host {socket.gethostname()}"):
            main.main(command(log, flag))
    wait_until(lambda: os.waitpid(process, os.WUNTRACED | os.WNOHANG)[0])
    os.kill(process, signal.SIGCONT)
    assert wait(process) == 0
    assert same(result(folder), result(whole))


def test_a_finished_run_is_not_overwritten_by_accident(whole, monkeypatch):
    before = result(whole)
    monkeypatch.setattr(dataloader, "load_problem", None)  # which is not waited for
    with pytest.raises(UserError, match="holds a run already: go on with --resume"):
        main.main(command(whole.parent))
    assert same(result(whole), before)


@pytest.mark.parametrize(
    ("function", "owner", "size", "file"),
    [
        ("save_checkpoint", checkpoint, 50_000, "checkpoints/step-"),
        ("flush", progress.EventLog, 1000, "events.out.tfevents"),
    ],
)
def test_file_size_limit(whole, log, function, owner, size, file):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
    code, errors = run(log, before=lambda: do_before(function, 3, limit, owner))
    assert code == 2 and file in errors and "what was saved before is whole: raise the file-size limit" in errors
    assert_goes_on(whole, log)


def test_other_options_are_refused_by_name(whole):
    code, errors = run(whole.parent, "--resume", "--outer_lr=0.001", "--batch_size=5")
    assert code == 2
    assert "--batch_size was 4 and is now 5, --outer_lr was 0.003 and is now 0.001:" in errors


# -----------------------------------------------------------------------------
# not finite


@pytest.mark.parametrize(
    ("flag", "script", "words"),
    [
        (
            "--outer_lr=1e30",
            "main",
            ["iteration 1: the query loss is ", "norm of the meta-gradient", "a lower --outer_lr"],
        ),
        ("--inner_lr=1e30", "main", ["iteration 0: the RMSE of validation is ", "a lower --inner_lr"]),
        ("--pretraining_lr=1e30", "pretrain", ["iteration 1: the query loss is ", "a lower --pretraining_lr"]),
    ],
)
def test_divergence_names_iteration_figure_and_option(log, flag, script, words):
    code, errors = run(log, flag, script=script)
    assert code == 3 and all(word in errors for word in words), errors
    state = checkpoint.load_newest(log / NAMES[script])
    assert all(value.isfinite().all() for value in state["last"].values())


def test_parameters_that_are_not_finite_are_not_saved(log):
    code, errors = run(log, "--outer_lr=1e30", "--weight_decay=1e10", "--warmup=1", "--checkpoint_interval=1")
    assert code == 3 and "iteration 1: the last step made parameters that are not finite" in errors
    assert checkpoint.load_newest(log / NAMES["main"])["step"] == 0


def poison(iterations):
    """From now on, the tasks of these iterations have a rating that is not a number."""
    draw = loop.draw_batch

    def poisoned(sequences, users, options, iteration):
        batch = draw(sequences, users, options, iteration)
        if iteration in iterations:
            batch.groups[0].query_ratings[0, 0] = np.nan
        return batch

    loop.draw_batch = poisoned


def test_a_bad_iteration_ends_the_run_with_the_state_before_it(whole, log):
    code, errors = run(log, before=lambda: poison([7]))
    assert code == 3 and "error: iteration 7: the query loss is nan" in errors and "--skip_nonfinite" in errors
    assert checkpoint.load_newest(log / whole.name)["step"] == 7
    assert_goes_on(whole, log)


def test_skipped_iterations_leave_everything_as_it_was(log):
    flags = "--skip_nonfinite", "--checkpoint_interval=1", "--keep_checkpoints=100"
    code, errors = run(log, *flags, before=lambda: poison([0, 7]))
    assert code == 0 and errors == "left out 2 iterations that were not finite\n"
    made = result(folder := log / NAMES["main"])
    states = {step: checkpoint.load_checkpoint(path) for step, path in checkpoint.find_checkpoints(folder).items()}
    for part in ("system", "last", "optimizer"):
        assert same(states[7][part], states[8][part]) and not same(states[8][part], states[9][part])
    assert same(states[1]["system"], states[1]["last"])  # nothing was averaged yet
    assert made["curves"]["train/skipped_iterations"][-1] == (ITERATIONS, 2.0)
    for step in (1, 9):  # going on from there gives the same bits
        other = log.parent / f"from{step}"
        process = start(other, *flags, before=lambda n=step: (poison([0, 7]), die_after_save(n)))
        assert wait(process) == -signal.SIGKILL
        assert run(other, *flags, "--resume", before=lambda: poison([0, 7]))[0] == 0
        assert same(result(other / folder.name), made)


def die_after_save(number):
    do_before("save_checkpoint", number + 1, lambda: os.kill(os.getpid(), signal.SIGKILL), checkpoint)


# -----------------------------------------------------------------------------
# out of memory


def limit_memory(more):
    """Allow this process `more` bytes beyond what it has."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (["--batch_size=100000000"], "lower --batch_size, which is 100000000"),
        (["--batch_size=30000", "--task_chunk=20000", "--bert_hidden_units=128"], "give --task_chunk=10000"),
    ],
)
def test_out_of_memory_names_what_to_lower(log, flags, remedy):
    code, errors = run(log, *flags, before=lambda: do_before("draw_tasks", 1, lambda: limit_memory(200_000_000)))
    assert code == 2 and "error: out of memory: " in errors and remedy in errors


def test_out_of_memory_on_a_gpu_and_other_errors():
    options = option_module.parse("", ["--task_chunk=1", "--num_samples=9"])
    with pytest.raises(UserError, match="lower --num_samples, which is 9"), utils.naming_what_to_lower(options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    options.task_chunk = 0
    with pytest.raises(UserError, match="give --task_chunk=8"), utils.naming_what_to_lower(options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    with pytest.raises(RuntimeError, match="shapes"), utils.naming_what_to_lower(options):
        raise RuntimeError("shapes do not fit")


# -----------------------------------------------------------------------------
# TensorBoard's file


def test_a_later_file_replaces_the_points_it_says(tmp_path):
    for number, (purge_step, steps) in enumerate([(None, range(5)), (3, range(3, 7)), (5, range(5, 8))]):
        log = progress.EventLog(tmp_path, purge_step)  # all within one second
        for step in steps:
            log.add_scalar("x", 10 * number + step, step)
        log.flush()
    points = [(event.step, event.value) for event in read_events(tmp_path).Scalars("x")]
    assert points == [(0, 0), (1, 1), (2, 2), (3, 13), (4, 14), (5, 25), (6, 26), (7, 27)]


def test_a_file_that_breaks_off_is_read_up_to_there(tmp_path):
    log = progress.EventLog(tmp_path)
    for step in range(3):
        log.add_scalar("x", step, step)
    log.flush()
    os.truncate(log.path, log.path.stat().st_size - 5)
    log = progress.EventLog(tmp_path, purge_step=2)
    log.add_scalar("x", 7, 2)
    log.flush()
    assert [event.value for event in read_events(tmp_path).Scalars("x")] == [0, 1, 7]
