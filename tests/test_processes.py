"""Several ranks train what one trains, and end together. They share an address and files, not working folders."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from unittest import mock

import pytest
import running
import tiny
import torch
import torch.distributed as dist
from running import (
    EVERY,
    NAMES,
    ROOT,
    at_call,
    at_iteration,
    command,
    has_saved,
    kill,
    poison,
    result,
    same,
    set_value,
    spawn,
    start,
    wait,
    wait_until,
)  # fmt: skip
from torch.distributed import run as torchrun

import dataloader
import main
import maml
import utils
from models import checkpoint
from training import distributed

# A learner and a loss all of whose parameters have an effect. Others have a few biases that a softmax cancels: these
# move by rounding errors, which Adam enlarges, and which depend on the number of ranks.
LEARNER = "--model=gru4rec", "--use_adaptive_loss=False"
NAME = "sample-gru4rec-maml"
MAIN = str(ROOT / "main.py")
LONG = "--num_train_iterations=100000", "--log_interval=100000"


def meet(count):
    """(The store of `count` ranks, which they reach as torchrun's, the environment of each)."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": f"{count}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{store.port}"}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return store, [shared | {"RANK": f"{rank}"} for rank in range(count)]


def start_all(place, *flags, count=2, before=(), own=(), **more):
    """Processes that train together, each with folders of its own in `place`.

    before, own: {rank: what it does first}, {rank: flags of its own}; `before` may be of all alike.
    """
    store, places = meet(count)
    before = dict(before) if not callable(before) else dict.fromkeys(range(count), before)
    own, found = dict(own), []
    for rank, environment in enumerate(places):
        given = {"before": before.get(rank), "environment": environment, **more}
        found.append(start(log_of(place, rank), *flags, *own.get(rank, ()), **given))
        found[-1].store = store  # which ends when nobody holds it
    return found


def log_of(place, rank):
    return place / f"machine{rank}" / "log"


def errors_of(place, count=2):
    """What all ranks have written to standard error."""
    return "".join(log_of(place, rank).with_suffix(".err").read_text() for rank in range(count))


def run_all(place, *flags, count=2, **more):
    """Run ranks to the end: (their exit statuses, what all wrote to standard error), one sentence in a failure."""
    statuses = [wait(process) for process in start_all(place, *flags, count=count, **more)]
    errors = errors_of(place, count)
    if any(status in (1, 2, 3) for status in statuses):
        assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    return statuses, errors


at_sum = partial(partial, at_call, "training.distributed.sum_gradients")  # of the n-th iteration, in several ranks


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run of one process."""
    log = tmp_path_factory.mktemp("alone") / "log"
    assert main.main(command(log, *LEARNER)) == 0
    return log / NAME


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder of a run of two ranks that nothing happened to."""
    place = tmp_path_factory.mktemp("both")
    assert run_all(place, *LEARNER) == ([0, 0], "")
    return log_of(place, 0) / NAME


def is_same_run(place, folder):
    """Whether ranks in `place` have made the bits of the run in `folder`, and nothing elsewhere."""
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


def train(path, options, dtype=torch.float64, count=20):
    """Take outer steps and save parameters, moments and figures in `path`."""
    run, figures = tiny.run(options, dtype), []
    sample, weights = dataloader.sample_tasks, maml.objective_weights
    tasks = mock.patch.object(dataloader, "sample_tasks", lambda *given: cast(sample(*given), dtype))
    with tasks, mock.patch.object(maml, "objective_weights", lambda *given: weights(*given).to(dtype)):
        for _ in range(count):
            figures.append(tiny.step(run))
    moments = [optimizer.state_dict()["state"] for optimizer in run.optimizers]
    torch.save([run.system.state_dict(), moments, torch.tensor(figures)], path)
    return 0


def cast(tasks, dtype):
    return type(tasks)(*(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tasks))


def train_together(folder, options, count, dtype=torch.float64):
    """What `train` saved in each of several ranks."""
    store, places = meet(count)
    started = [
        spawn(
            partial(train_rank, folder / f"{rank}.pt", options, dtype), os.devnull, folder / f"{rank}.err", environment
        )
        for rank, environment in enumerate(places)
    ]
    assert [wait(process) for process in started] == [0] * count
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def train_rank(path, options, dtype):
    sys.exit(distributed.run_rank(partial(train, path, options, dtype)))


@pytest.mark.parametrize("form", ["default", "paper"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("batch", "count"), [(5, 2), (2, 3)])
def test_uneven_and_empty_shares(tmp_path, form, sparse, batch, count):
    """20 iterations give the same parameters, moments and figures, in all processes alike."""
    more = {"adapt": "all", "loss_network": "lstm"} if form == "paper" else {}
    options = tiny.options(batch_size=batch, sparse_items=sparse, model="gru4rec", **more)
    train(tmp_path / "alone", options)
    expected = torch.load(tmp_path / "alone")
    together = train_together(tmp_path, options, count)
    assert all(same(other, together[0]) for other in together)
    torch.testing.assert_close(together[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", ["mlp", "lstm"])
def test_single_precision_differs_by_rounding(tmp_path, loss):
    """But for the biases of keys, which a softmax cancels: their gradient is rounding alone, which Adam enlarges."""
    options = tiny.options(batch_size=12, model="bert4rec", loss_network=loss)
    train(tmp_path / "alone", options, torch.float32)
    made = train_together(tmp_path, options, 2, torch.float32)[0][0], torch.load(tmp_path / "alone")[0]
    for state in made:
        for name in [name for name in state if name.endswith("project_in.bias")]:
            state[name].view(3, -1)[1] = 0
    torch.testing.assert_close(*made, rtol=0, atol=1e-6)


@pytest.mark.parametrize("adapt", ["head", "all"])
def test_same_parts_give_the_same_bits(tmp_path, adapt):
    options = tiny.options(batch_size=7, task_chunk=4, loss_network="lstm", lstm_lr=0.1, adapt=adapt)
    train(tmp_path / "alone", options, torch.float32)
    assert same(train_together(tmp_path, options, 2, torch.float32)[0][0], torch.load(tmp_path / "alone")[0])


def test_validation_users_are_shared_out(tmp_path, both):
    assert run_all(tmp_path, *LEARNER, before=partial(set_value, "training.run.LEAST_SHARE", 7)) == ([0, 0], "")
    made, expected = (result(folder) for folder in (log_of(tmp_path, 0) / NAME, both))
    assert same(made["states"][0]["last"], expected["states"][0]["last"])
    torch.testing.assert_close(made["curves"], expected["curves"], rtol=1e-6, atol=1e-6)


def test_going_on_with_another_number_of_ranks(tmp_path, alone):
    stop, place = partial(kill, signal.SIGTERM), log_of(tmp_path, 0)
    assert running.run(place, *LEARNER, before=at_iteration(5, stop))[0] == 143
    statuses, errors = run_all(tmp_path, *LEARNER, "--resume", before={0: at_sum(4, stop)})
    assert statuses == [143, 143] and "stopped after iteration " in errors
    assert "threads 1 -> 1 in each of 2 ranks" in errors
    assert running.run(place, *LEARNER, "--resume")[0] == 0
    assert_close(place / NAME, alone)


# -----------------------------------------------------------------------------
# not finite


def test_a_bad_task_of_one_rank_stops_all(tmp_path, both):
    statuses, errors = run_all(tmp_path, *LEARNER, before={1: partial(poison, 7)})
    assert statuses == [3, 3] and "iteration 7: " in errors
    assert run_all(tmp_path, *LEARNER, "--resume") == ([0, 0], "")
    assert is_same_run(tmp_path, both)


def test_all_leave_out_the_same_iterations(tmp_path):
    flags, bad = (*LEARNER, "--skip_nonfinite"), partial(poison, 0, 7)
    assert running.run(tmp_path / "one" / "log", *flags, before=bad)[0] == 0
    statuses, errors = run_all(tmp_path, *flags, before={1: bad})
    assert statuses == [0, 0] and errors == "left out 2 iterations that were not finite\n"
    assert_close(log_of(tmp_path, 0) / NAME, tmp_path / "one" / "log" / NAME)


# -----------------------------------------------------------------------------
# signals, deaths, mistakes


@pytest.mark.parametrize(("number", "status", "who"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 0)])
def test_a_signal_to_one_stops_all_after_the_same_iteration(tmp_path, both, number, status, who):
    statuses, errors = run_all(tmp_path, *LEARNER, before={who: at_sum(4, partial(kill, number))})
    assert statuses == [status, status] and "stopped after iteration 4; " in errors
    assert run_all(tmp_path, *LEARNER, "--resume") == ([0, 0], "")
    assert is_same_run(tmp_path, both)


@pytest.mark.parametrize("who", [0, 1])
def test_a_killed_rank_ends_the_other(tmp_path, both, who):
    began = time.monotonic()
    statuses, errors = run_all(tmp_path, *LEARNER, before={who: at_sum(8, partial(kill, signal.SIGKILL))})
    assert sorted(statuses) == [-signal.SIGKILL, 1] and time.monotonic() - began < 60
    assert "another rank was killed, ran out of memory or hangs" in errors and "with --resume" in errors
    assert run_all(tmp_path, *LEARNER, "--resume") == ([0, 0], "")
    assert is_same_run(tmp_path, both)


def test_a_rank_that_hangs_ends_the_other(tmp_path):
    """One whose machine is lost looks like a stopped one."""
    limit = partial(set_value, "training.distributed.TIMEOUT", timedelta(seconds=4))
    stop = at_sum(3, partial(kill, signal.SIGSTOP))
    both = start_all(tmp_path, before={0: limit, 1: partial(do_both, limit, stop)})
    try:
        assert wait(both[0], 60) == 1
    finally:
        both[1].kill()
    errors = errors_of(tmp_path)
    assert errors.startswith("error: another rank was killed, ran out of memory or hangs") and errors.count("\n") == 1


def do_both(first, second):
    first()
    second()


def test_a_run_that_is_stopped_as_a_whole_goes_on(tmp_path, both):
    """As when a laptop is closed."""
    started = start_all(tmp_path, *LEARNER)
    wait_until(has_saved(log_of(tmp_path, 0) / NAME, 2))
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in started:
            os.kill(process.pid, number)
        time.sleep(3 * (number == signal.SIGSTOP))
    assert [wait(process) for process in started] == [0, 0]
    assert is_same_run(tmp_path, both)


def test_a_mistake_is_said_once(tmp_path):
    assert run_all(tmp_path, "--fold=9") == ([2, 2], "error: --fold=9 must be below --num_folds=6\n")
    statuses, errors = run_all(tmp_path, own={1: [f"--data_path={tmp_path / 'nowhere'}"]})
    assert statuses == [2, 2] and "there is no file" in errors and "nowhere" in errors
    statuses, errors = run_all(tmp_path, own={1: ["--batch_size=6"]})
    assert statuses == [2, 2] and "rank 1 and rank 0 differ in --batch_size: start all alike" in errors
    assert run_all(tmp_path) == ([0, 0], "")
    statuses, errors = run_all(tmp_path)  # rank 0 alone looks into the folder
    assert statuses == [2, 2] and "holds a run already" in errors


def no_room():
    raise utils.cannot_write("x", OSError(28, ""))


def test_full_disk_of_the_first_ends_all(tmp_path, both):
    full = partial(at_call, "models.checkpoint.save_checkpoint", 3, no_room)
    statuses, errors = run_all(tmp_path, *LEARNER, before={0: full})
    assert statuses == [2, 2] and "make room on the disk" in errors
    assert run_all(tmp_path, *LEARNER, "--resume") == ([0, 0], "")
    assert is_same_run(tmp_path, both)


def fail():
    raise ZeroDivisionError("of one")


def test_an_unforeseen_error_is_shown_once(tmp_path):
    both = start_all(tmp_path, before={1: at_sum(2, fail)})
    assert [wait(process) for process in both] == [1, 1]
    errors = errors_of(tmp_path)
    assert errors.count("Traceback") == 1 and errors.endswith("ZeroDivisionError: of one\n")


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(utils.UserError, match="WORLD_SIZE is set, .*RANK expected.*start with torchrun"):
        distributed.join()


def test_a_process_has_one_thread_unless_told(monkeypatch):
    monkeypatch.setattr(utils, "run_script", lambda *_, **__: None)
    for told, threads in (("2", 2), (None, 1)):
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", told) if told else monkeypatch.delenv("OMP_NUM_THREADS")
        distributed.run_script(None)
        assert torch.get_num_threads() == threads


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

STANDALONE = "--standalone", "--nproc_per_node=2"
FORKED = "--start_method=fork", "--run_path"  # torch is not imported for each rank


def start_torchrun(place, *words):
    """A launcher with the options `words`."""
    place.parent.mkdir(exist_ok=True)
    launcher = partial(launch, place.parent, words)
    return spawn(launcher, place.with_suffix(".out"), place.with_suffix(".err"), {"OMP_NUM_THREADS": "1"})


def launch(folder, words):
    os.setsid()
    os.chdir(folder)
    if FORKED[0] not in words:
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *words])
    torchrun.main(words)


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
    port = meet(1)[0].port  # free again at once

    def launch(rank, *flags):
        place = log_of(tmp_path, rank)
        where = ["--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
        return start_torchrun(place, *where, f"--master_port={port}", *FORKED, MAIN, *command(place, *flags))

    launched = [launch(rank, *LEARNER, *LONG) for rank in (0, 1)]
    wait_until(has_saved(log_of(tmp_path, 0) / NAME, 4))
    os.kill(launched[1].pid, signal.SIGTERM)
    assert [wait(process, 60) for process in launched] == [1, 1]
    assert log_of(tmp_path, 0).with_suffix(".err").read_text().count("stopped after iteration") == 1
    launched = [launch(rank, *LEARNER, "--overwrite") for rank in (0, 1)]
    assert [wait(process, 60) for process in launched] == [0, 0]
    assert is_same_run(tmp_path, both)


def test_torchrun_starts_all_again(tmp_path):
    """With --max_restarts and --resume, a killed process costs what was not saved."""
    log = tmp_path / "log"
    flags = "--resume", "--num_train_iterations=60", "--log_interval=60", *EVERY
    launcher = start_torchrun(log, *STANDALONE, "--max_restarts=1", *FORKED, MAIN, *command(log, *flags))
    wait_until(has_saved(log / NAMES["main"], 4))
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    assert wait(launcher, 100) == 0
    assert max(checkpoint.find_checkpoints(log / NAMES["main"])) == 60
