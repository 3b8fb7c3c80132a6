"""Faults that really happen to a run: what it says, the exit status, and that it goes on to the same bits."""

import os
import shutil
import signal
import socket
from functools import partial

import pytest
import tiny
import torch
from running import (
    EVERY,
    ITERATIONS,
    NAMES,
    at_call,
    at_iteration,
    at_write,
    command,
    has_saved,
    kill,
    poison,
    read_events,
    result,
    run,
    same,
    start,
    wait_until,
)  # fmt: skip

import dataloader
import main
import options as option_module
import utils
from models import checkpoint
from training import run as runs
from training import tensorboard
from utils import UserError

resource = pytest.importorskip("resource")  # limits of a process
STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


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


def assert_goes_on(whole, log, *flags):
    assert run(log, "--resume", *flags) == (0, "")
    assert same(result(log / whole.name), result(whole))


# -----------------------------------------------------------------------------
# stopped


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("when", [at_iteration, at_write], ids=["iteration", "save"])
def test_a_signal_stops_after_the_iteration(whole, log, when, number):
    code, errors = run(log, before=when(3, partial(kill, number)))
    assert code == STOPS[number]
    assert "stopped after iteration" in errors and errors.endswith("the same command with --resume goes on\n")
    assert_goes_on(whole, log)


def test_ctrl_c_before_training_is_one_line(log):
    interrupt = partial(at_call, "dataloader.load_problem", 1, partial(kill, signal.SIGINT))
    assert run(log, before=interrupt) == (130, "interrupted\n")
    assert not log.exists()


# -----------------------------------------------------------------------------
# folders and disks


@pytest.mark.parametrize("number", [2, 9])
def test_log_folder_removed_during_the_run(log, number):
    code, errors = run(log, before=at_iteration(number, partial(shutil.rmtree, log)))
    assert code == 2 and "its folder is missing or was removed" in errors
    assert not log.exists()


def test_a_second_run_is_refused_and_the_first_unharmed(whole, log):
    process = start(log, before=at_iteration(8, partial(kill, signal.SIGSTOP)))
    folder = log / whole.name
    wait_until(has_saved(folder, 6))
    for flag in ("--resume", "--overwrite", "--log_interval=5"):
        with pytest.raises(UserError, match=f"in use by process {process.pid} on host {socket.gethostname()}"):
            main.main(command(log, flag))
    while process.exitcode is None:  # it may not have stopped yet
        os.kill(process.pid, signal.SIGCONT)
        process.join(0.1)
    assert process.exitcode == 0
    assert same(result(folder), result(whole))


def test_a_finished_run_is_not_overwritten_by_accident(whole, monkeypatch):
    before = result(whole)
    monkeypatch.setattr(dataloader, "load_problem", None)  # which is not waited for
    with pytest.raises(UserError, match="holds a run already: go on with --resume"):
        main.main(command(whole.parent))
    assert same(result(whole), before)


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("function", "size", "file"),
    [
        ("models.checkpoint.save_checkpoint", 50_000, "checkpoints/step-"),
        ("training.progress.log_validation", 1000, "events.out.tfevents"),
    ],
)
def test_file_size_limit(whole, log, function, size, file):
    code, errors = run(log, before=partial(at_call, function, 3, partial(limit_files, size)))
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


def test_parameters_that_are_not_finite_are_not_saved():
    training = tiny.run(tiny.options())
    [*training.system.parameters()][-1].data.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="iteration 0: the last step made parameters that are not finite"):
        runs.save(training)


def test_a_bad_iteration_ends_the_run_with_the_state_before_it(whole, log):
    code, errors = run(log, before=partial(poison, 7))
    assert code == 3 and "norm of the meta-gradient nan" in errors and "--skip_nonfinite" in errors
    assert errors.startswith("error: iteration 7: ")
    assert checkpoint.load_newest(log / whole.name)["step"] == 7
    assert_goes_on(whole, log)


def test_skipped_iterations_leave_everything_as_it_was(log):
    flags = "--skip_nonfinite", *EVERY
    code, errors = run(log, *flags, before=partial(poison, 0, 7))
    assert code == 0 and errors == "left out 2 iterations that were not finite\n"
    made = result(folder := log / NAMES["main"])
    states = {step: checkpoint.load_checkpoint(path) for step, path in checkpoint.find_checkpoints(folder).items()}
    for part in ("system", "last", "optimizers"):
        assert same(states[7][part], states[8][part]) and not same(states[8][part], states[9][part])
    assert same(states[1]["system"], states[1]["last"])  # nothing was averaged yet
    assert made["curves"]["train/skipped_iterations"][-1] == (ITERATIONS, 2.0)
    for step, left in ((1, [7 - 1]), (9, [])):  # going on from there gives the same bits
        other = log.parent / f"from{step}" / "log"
        shutil.copytree(folder, other / folder.name)
        for number, path in checkpoint.find_checkpoints(other / folder.name).items():
            if number > step:
                path.unlink()
        (other / folder.name / "checkpoints" / "best.pt").unlink()
        assert run(other, *flags, "--resume", before=partial(poison, *left))[0] == 0
        assert same(result(other / folder.name)["states"][0]["last"], made["states"][0]["last"])
        assert same(result(other / folder.name)["curves"], made["curves"])


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
        (["--batch_size=65536", "--num_query_set=50"], "lower --batch_size, which is 65536"),
        (["--batch_size=30000", "--task_chunk=20000", "--bert_hidden_units=128"], "give --task_chunk=10000"),
    ],
)
def test_out_of_memory_names_what_to_lower(log, flags, remedy):
    limit = partial(at_call, "training.progress.log_validation", 1, partial(limit_memory, 200_000_000))
    code, errors = run(log, *flags, before=limit)
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
# TensorBoard's files


def write_points(folder, purge_step, points):
    with tensorboard.open_writer(folder, purge_step) as writer:
        for step, value in points:
            writer.add_scalar("x", value, step)


def test_a_later_file_replaces_the_points_it_says(tmp_path):
    """Also where one begins in the same second as the one before, and where a file breaks off."""
    for number, (purge_step, steps) in enumerate([(None, range(5)), (3, range(3, 7)), (5, range(5, 8))]):
        write_points(tmp_path, purge_step, [(step, 10 * number + step) for step in steps])
    points = [(event.step, event.value) for event in read_events(tmp_path).Scalars("x")]
    assert points == [(0, 0), (1, 1), (2, 2), (3, 13), (4, 14), (5, 25), (6, 26), (7, 27)]
    newest = max(tmp_path.iterdir())
    os.truncate(newest, newest.stat().st_size - 5)
    write_points(tmp_path, 7, [(7, 7)])
    assert [event.value for event in read_events(tmp_path).Scalars("x")][-2:] == [26, 7]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(tmp_path, capfd):
    writer = tensorboard.open_writer(tmp_path)
    path = next(tmp_path.iterdir())
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left on device.*make room"), tensorboard.writing_events(tmp_path):
        for step in range(100):
            writer.add_scalar("x", step, step)
        writer.flush()
    assert capfd.readouterr() == ("", "")
