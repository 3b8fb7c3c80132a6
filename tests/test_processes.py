"""Several processes train what one trains, and end together. They share an address and files, not working folders."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import running
import tiny
import torch
from running import NAMES, ROOT, command, has_saved, result, same, start, wait, wait_until
from test_faults import do_before, poison
from torch.distributed import run as torchrun

import dataloader
import main
import utils
from models import checkpoint
from training import distributed, loop
from training.optimizer import RowAdamW

# A learner and a loss all of whose parameters have an effect. Others have a few biases that a softmax cancels: these
# move by rounding errors, which Adam enlarges, and which depend on the number of processes.
LEARNER = "--model=gru4rec", "--use_adaptive_loss=False"
NAME = "sample-gru4rec-maml"
MAIN = str(ROOT / "main.py")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def surroundings(rank, count, port):
    """The environment of one of several processes."""
    return {"RANK": f"{rank}", "WORLD_SIZE": f"{count}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}


def start_all(place, *flags, count=2, before=lambda rank: None, **more):
    """Fork processes that train together, each with folders of its own in `place`; their ids."""
    port = free_port()

    def prepare(rank):
        os.environ.update(surroundings(rank, count, port))
        before(rank)

    return [start(log_of(place, rank), *flags, before=lambda r=rank: prepare(r), **more) for rank in range(count)]


def log_of(place, rank):
    return place / f"machine{rank}" / "log"


def errors_of(place, count=2):
    """What all processes have written to standard error."""
    return "".join(log_of(place, rank).with_suffix(".err").read_text() for rank in range(count))


def run_all(place, *flags, count=2, **more):
    """Run processes to the end: (their exit statuses, what all wrote to standard error), one sentence in a failure."""
    statuses = [wait(process) for process in start_all(place, *flags, count=count, **more)]
    errors = errors_of(place, count)
    if any(status in (1, 2, 3) for status in statuses):
        assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    return statuses, errors


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run of one process."""
    log = tmp_path_factory.mktemp("alone") / "log"
    assert main.main(command(log, *LEARNER)) == 0
    return log / NAME


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder of a run of two processes that nothing happened to."""
    place = tmp_path_factory.mktemp("both")
    assert run_all(place, *LEARNER) == ([0, 0], "")
    return log_of(place, 0) / NAME


def is_same_run(place, folder):
    """Whether processes in `place` have made the bits of the run in `folder`, and nothing elsewhere."""
    assert not log_of(place, 1).exists()
    return same(result(log_of(place, 0) / NAME), result(folder))


def assert_close(folder, other):
    """Two runs have the same parameters, in newest and best checkpoint, and curves, to what rounding makes of them.

    In single precision Adam enlarges rounding where a gradient nearly vanishes; `test_uneven_and_empty_shares` is exact
    """
    made, expected = result(folder), result(other)
    for state, wanted in zip(made["states"], expected["states"], strict=True):
        assert state["step"] == wanted["step"]
        for part in ("last", "system"):
            torch.testing.assert_close(state[part], wanted[part], rtol=0, atol=1e-5)
    torch.testing.assert_close(made["curves"], expected["curves"], rtol=1e-4, atol=1e-5)


# -----------------------------------------------------------------------------
# the same result


@pytest.mark.parametrize("script", NAMES)
@pytest.mark.parametrize("sparse", [False, True])
def test_two_processes_make_what_one_makes(tmp_path, script, sparse):
    """Checkpoints, the best one and all curves."""
    flags, name = (*LEARNER, f"--sparse_items={sparse}"), NAME if script == "main" else "sample-gru4rec-basic"
    assert running.run(tmp_path / "one" / "log", *flags, script=script) == (0, "")
    assert run_all(tmp_path, *flags, script=script) == ([0, 0], "")
    assert_close(log_of(tmp_path, 0) / name, tmp_path / "one" / "log" / name)
    assert not log_of(tmp_path, 1).exists()
    printed = [log_of(tmp_path, rank).with_suffix(".out").read_text() for rank in (0, 1)]
    assert printed[0].count("\niteration ") == 4 and printed[1] == ""


def test_batch_that_no_process_divides(tmp_path):
    flags = *LEARNER, "--batch_size=2"
    assert running.run(tmp_path / "one" / "log", *flags) == (0, "")
    assert run_all(tmp_path, *flags, count=3) == ([0, 0, 0], "")
    assert_close(log_of(tmp_path, 0) / NAME, tmp_path / "one" / "log" / NAME)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("given", [{}, {"task_chunk": 2}, {"loss_network": "lstm"}, {"batch_size": 2}])
def test_processes_are_dealt_each_task_once_and_as_many_ratings(monkeypatch, count, given):
    options = tiny.options(**{"model": "gru4rec", "batch_size": 9, "sparse_items": True, **given})
    sequences, users, found, ratings = tiny.sequences(), np.arange(6), [], []
    every = tiny.sample_tasks(sequences, users, options, 4)
    for rank in range(count):
        monkeypatch.setattr(distributed, "place", distributed.Place(rank, count))
        batch = loop.draw_batch(sequences, users, options, 4)
        found += [task for tasks in batch.groups for task in contents(tasks)]
        ratings.append(sum(int((tasks.segment > 0).sum()) for tasks in batch.groups))
        assert batch.count == len(every.table)
        assert count == 1 or torch.equal(batch.rows, every.table.unique())
    assert sorted(found) == sorted(contents(every))
    groups = -(-9 // (2 * count)) if "task_chunk" in given else 1  # of each process
    assert max(ratings) - min(ratings) <= groups * int((every.segment > 0).sum((1, 2)).max())


def contents(tasks):
    """Of each task the items and ratings of its support windows and queries, its part, and what its positions count."""
    found = []
    for t, table in enumerate(tasks.table):
        items = table[tasks.items[t]][tasks.segment[t] > 0].tolist()
        asked = table[tasks.query_items[t]][tasks.query[t]].tolist()
        counted = tasks.times[t][tasks.segment[t] > 0].tolist()
        ratings = tasks.ratings[t][tasks.segment[t] > 0].tolist()
        found.append((items, asked, counted, ratings, int(tasks.part[t]), int(tasks.query_last[t])))
    return found


def train(path, options, dtype=torch.float64, count=20):
    """Take outer steps and save parameters and figures in `path`."""
    distributed.connect(torch.device("cpu"))
    system = tiny.ensemble(options).to(dtype)
    optimizer = RowAdamW(loop.parameter_groups(system, options))
    sequences = tiny.sequences()
    users = np.arange(len(sequences.offsets) - 1)
    figures = []
    for iteration in range(count):
        batch = loop.draw_batch(sequences, users, options, iteration)
        batch = tiny.double_batch(batch) if dtype == torch.float64 else batch
        figures.append(loop.train_step(system, optimizer, batch, options, iteration))
    torch.save([system.state_dict(), optimizer.state_dict()["state"], torch.tensor(figures)], path)
    return 0


def train_together(folder, options, count, dtype=torch.float64):
    """What `train` saved in each of several processes."""
    port, forked = free_port(), []
    for rank in range(count):
        forked.append(os.fork())
        if not forked[-1]:
            os.environ.update(surroundings(rank, count, port))
            os._exit(distributed.run_together(lambda r=rank: train(folder / f"{r}.pt", options, dtype)))
    assert [wait(process) for process in forked] == [0] * count
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


@pytest.mark.parametrize("form", ["default", "paper"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("batch", "count"), [(5, 2), (2, 3)])
def test_uneven_and_empty_shares(tmp_path, form, sparse, batch, count):
    """20 iterations give the same parameters, moments and figures, in all processes alike."""
    more = {"adapt": "all", "loss_network": "lstm"} if form == "paper" else {}
    options = tiny.options(
        batch_size=batch, sparse_items=sparse, init_items="random", model="gru4rec", clip_norm=0.5, warmup=1, **more
    )
    train(tmp_path / "alone", options)
    expected = torch.load(tmp_path / "alone")
    together = train_together(tmp_path, options, count)
    assert all(same(other, together[0]) for other in together)
    torch.testing.assert_close(together[0], expected, rtol=0, atol=1e-6)
    assert expected[2][:, 3].max() > 0.5  # some steps were clipped


@pytest.mark.parametrize("loss", ["mlp", "lstm"])
def test_single_precision_differs_by_rounding(tmp_path, loss):
    """No parameter follows a gradient that is rounding alone."""
    options = tiny.options(batch_size=12, init_items="random", model="bert4rec", loss_network=loss)
    train(tmp_path / "alone", options, torch.float32)
    together = train_together(tmp_path, options, 2, torch.float32)
    torch.testing.assert_close(together[0][0], torch.load(tmp_path / "alone")[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("adapt", ["head", "all"])
def test_same_parts_give_the_same_bits(tmp_path, adapt):
    options = tiny.options(
        batch_size=7, task_chunk=4, init_items="random", loss_network="lstm", lstm_lr=0.1, adapt=adapt
    )
    train(tmp_path / "alone", options, torch.float32)
    assert same(train_together(tmp_path, options, 2, torch.float32)[0][0], torch.load(tmp_path / "alone")[0])


def test_validation_users_are_shared_out(tmp_path, both):
    divide = lambda rank: setattr(loop, "LEAST_SHARE", 7)  # noqa: E731
    assert run_all(tmp_path, *LEARNER, before=divide) == ([0, 0], "")
    made, expected = (result(folder) for folder in (log_of(tmp_path, 0) / NAME, both))
    assert same(made["states"][0]["last"], expected["states"][0]["last"])
    torch.testing.assert_close(made["curves"], expected["curves"], rtol=1e-6, atol=1e-6)


def test_going_on_with_another_number_of_processes(tmp_path, alone):
    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    place = log_of(tmp_path, 0)
    assert running.run(place, *LEARNER, before=lambda: do_before("train_iteration", 5, stop))[0] == 143
    second = lambda rank: rank or do_before("train_iteration", 4, stop)  # noqa: E731
    statuses, errors = run_all(tmp_path, *LEARNER, "--resume", before=second)
    assert statuses == [143, 143] and "stopped after iteration 9; " in errors
    assert "threads 1 -> 1 in each of 2 processes" in errors
    assert running.run(place, *LEARNER, "--resume")[0] == 0
    assert_close(place / NAME, alone)


# -----------------------------------------------------------------------------
# not finite


def test_a_bad_task_of_one_process_stops_all(tmp_path, both):
    statuses, errors = run_all(tmp_path, *LEARNER, before=lambda rank: poison([7]))
    assert statuses == [3, 3] and "iteration 7: the query loss is nan" in errors
    assert run_all(tmp_path, *LEARNER, "--resume") == ([0, 0], "")
    assert is_same_run(tmp_path, both)


def test_all_leave_out_the_same_iterations(tmp_path):
    flags = *LEARNER, "--skip_nonfinite"
    bad = lambda *_: poison([0, 7])  # noqa: E731
    assert running.run(tmp_path / "one" / "log", *flags, before=bad)[0] == 0
    statuses, errors = run_all(tmp_path, *flags, before=bad)
    assert statuses == [0, 0] and errors == "left out 2 iterations that were not finite\n"
    assert_close(log_of(tmp_path, 0) / NAME, tmp_path / "one" / "log" / NAME)


# -----------------------------------------------------------------------------
# signals, deaths, mistakes


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("who", [0, 1])
def test_a_signal_to_one_stops_all_after_the_same_iteration(tmp_path, both, number, status, who):
    stop = lambda: os.kill(os.getpid(), number)  # noqa: E731
    only = lambda rank: rank == who and do_before("train_iteration", 4, stop)  # noqa: E731
    statuses, errors = run_all(tmp_path, *LEARNER, before=only)
    assert statuses == [status, status] and "stopped after iteration 4; " in errors
    assert run_all(tmp_path, *LEARNER, "--resume") == ([0, 0], "")
    assert is_same_run(tmp_path, both)


@pytest.mark.parametrize("who", [0, 1])
def test_a_killed_process_ends_the_other(tmp_path, both, who):
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    began = time.monotonic()
    only = lambda rank: rank == who and do_before("train_iteration", 8, die)  # noqa: E731
    statuses, errors = run_all(tmp_path, *LEARNER, before=only)
    assert sorted(statuses) == [-signal.SIGKILL, 1] and time.monotonic() - began < 60
    assert "another process has ended without a word" in errors and "with --resume" in errors
    assert run_all(tmp_path, *LEARNER, "--resume") == ([0, 0], "")
    assert is_same_run(tmp_path, both)


def test_a_silent_process_ends_the_other(tmp_path):
    """Whether the other is computing or still reading; a process whose machine is lost looks like a stopped one."""

    def start_pair(function, who):
        def prepare(rank):
            distributed.SILENCE = 3
            owner = dataloader if function == "load_problem" else loop
            if rank == who:
                do_before(function, 1, lambda: os.kill(os.getpid(), signal.SIGSTOP), owner)
            elif function == "load_problem":
                do_before(function, 1, lambda: time.sleep(60), owner)

        return start_all(tmp_path / f"{function}{who}", before=prepare)

    cases = list(itertools.product(("train_iteration", "load_problem"), (0, 1)))
    pairs = list(itertools.starmap(start_pair, cases))  # side by side, for what takes long is waiting
    for (function, who), both in zip(cases, pairs, strict=True):
        assert wait(both[1 - who]) == 1
        os.kill(both[who], signal.SIGKILL)
        assert wait(both[who]) == -signal.SIGKILL
        errors = errors_of(tmp_path / f"{function}{who}")
        assert errors.count("\n") == 1
        assert errors.startswith(f"error: process {who} of 2 has been silent for 3 s; ")


def test_a_mistake_of_one_is_said_once(tmp_path):
    assert run_all(tmp_path, "--fold=9") == ([2, 2], "error: --fold=9 must be below --num_folds=6\n")
    assert run_all(tmp_path, "--checkpoint_interval=1") == ([0, 0], "")
    statuses, errors = run_all(tmp_path)  # process 0 alone looks into the folder
    assert statuses == [2, 2] and "holds a run already" in errors

    def lose_data(rank):
        distributed.LAST_WORDS = 1  # process 0 waits and has nothing to write
        if rank:
            running.ROOT = tmp_path / "nowhere"

    statuses, errors = run_all(tmp_path, "--overwrite", before=lose_data)
    assert statuses == [2, 2] and "there is no file" in errors and "nowhere" in errors


def test_full_disk_of_the_first_ends_all(tmp_path, both):
    def no_room():
        raise utils.cannot_write("x", OSError(28, ""))

    only = lambda rank: rank or do_before("save_checkpoint", 3, no_room, checkpoint)  # noqa: E731
    statuses, errors = run_all(tmp_path, *LEARNER, before=only)
    assert statuses == [2, 2] and "make room on the disk" in errors
    assert run_all(tmp_path, *LEARNER, "--resume") == ([0, 0], "")
    assert is_same_run(tmp_path, both)


def test_an_unforeseen_error_is_shown_once(tmp_path):
    def fail():
        raise ZeroDivisionError("of one")

    both = start_all(tmp_path, before=lambda rank: rank and do_before("train_iteration", 2, fail))
    assert [wait(process) for process in both] == [1, 1]
    errors = errors_of(tmp_path)
    assert errors.count("Traceback") == 1 and errors.endswith("ZeroDivisionError: of one\n")


def test_other_options_are_refused(tmp_path):
    command_of = running.command

    def other(rank):
        if rank:
            running.command = lambda *words: [*command_of(*words), "--batch_size=6"]

    statuses, errors = run_all(tmp_path, before=other)
    assert statuses == [2, 2] and "process 1 and process 0 differ in --batch_size: start all alike" in errors


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(utils.UserError, match="WORLD_SIZE is set, but RANK is not"):
        distributed.join()


def test_each_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert utils.choose_device("auto") == torch.device("cuda", 1) and utils.choose_device("cpu").type == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(utils.UserError, match="process 3 of this machine finds 2 GPUs"):
        utils.choose_device("auto")


# -----------------------------------------------------------------------------
# torchrun itself

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
STANDALONE = "--standalone", "--nproc_per_node=2"
FORKED = "--start_method=fork", "--run_path"  # torch is not imported for each process


def start_torchrun(place, *words):
    """Fork a launcher with the options `words`; its process id."""

    def launch():
        os.setsid()
        os.chdir(place.parent)
        os.environ.update(ENVIRONMENT)
        if FORKED[0] not in words:
            os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *words])
        torchrun.main(words)

    place.parent.mkdir(exist_ok=True)
    return running.fork(launch, place.with_suffix(".out"), place.with_suffix(".err"))


@pytest.mark.parametrize(("sparse", "how"), [(False, ()), (True, FORKED)], ids=["new interpreters", "sparse"])
def test_torchrun(tmp_path, sparse, how):
    flags = *LEARNER, f"--sparse_items={sparse}", "--num_train_iterations=20"
    log, one = tmp_path / "two" / "log", tmp_path / "one" / "log"
    assert wait(start_torchrun(log, *STANDALONE, *how, MAIN, *command(log, *flags))) == 0
    assert "Traceback" not in log.with_suffix(".err").read_text()
    assert log.with_suffix(".out").read_text().count("iteration     20") == 1
    assert main.main(command(one, *flags)) == 0
    assert_close(log / NAME, one / NAME)


def test_torchrun_on_two_machines(tmp_path, both):
    """Two launches with an address in common, in folders of their own; the second stops both by its signal."""
    port = free_port()

    def launch(rank, *flags):
        place = log_of(tmp_path, rank)
        where = ["--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
        return start_torchrun(place, *where, f"--master_port={port}", *FORKED, MAIN, *command(place, *flags))

    long = "--num_train_iterations=100000", "--log_interval=100000"
    launched = [launch(rank, *LEARNER, *long) for rank in (0, 1)]
    wait_until(has_saved(log_of(tmp_path, 0) / NAME, 4))
    os.kill(launched[1], signal.SIGTERM)
    assert [wait(process, 60) for process in launched] == [1, 1]
    assert log_of(tmp_path, 0).with_suffix(".err").read_text().count("stopped after iteration") == 1
    assert (log_of(tmp_path, 0) / NAME / "lock").read_text() == ""
    launched = [launch(rank, *LEARNER, "--overwrite") for rank in (0, 1)]
    assert [wait(process, 60) for process in launched] == [0, 0]
    assert is_same_run(tmp_path, both)


def test_torchrun_starts_all_again(tmp_path):
    """With --max_restarts and --resume, a killed process costs what was not saved."""
    log = tmp_path / "log"
    flags = "--resume", "--num_train_iterations=60", "--log_interval=60", "--checkpoint_interval=1"
    launcher = start_torchrun(log, *STANDALONE, "--max_restarts=1", *FORKED, MAIN, *command(log, *flags))
    wait_until(has_saved(log / NAMES["main"], 4))
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    assert wait(launcher, 100) == 0
    assert max(checkpoint.find_checkpoints(log / NAMES["main"])) == 60
