"""Whole runs at tiny sizes, in processes of their own that start at once, and what they leave behind.

The processes are forked from a server that has imported everything, which works where forking this one would not.
"""

import atexit
import contextlib
import io
import itertools
import math
import multiprocessing
import os
import pkgutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # which an optimizer would import in each process anew
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
import pretrain
from models import checkpoint
from training import distributed

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
ITERATIONS = 12
EVERY = ("--keep_checkpoints=100",)  # the checkpoints of all iterations, each of which has one
TINY = (
    f"--num_train_iterations={ITERATIONS}", "--log_interval=5", "--checkpoint_minutes=0", "--device=cpu",
    "--batch_size=4", "--pretraining_batch_size=4", "--max_seq_len=6", "--num_query_set=2", "--num_inner_steps=2",
    "--bert_hidden_units=8", "--bert_num_heads=2", "--bert_num_blocks=1", "--num_factors=2", "--lstm_hidden=4",
    "--num_test_data=20", "--val_size=20",
)  # fmt: skip
SCRIPTS = {"main": main, "pretrain": pretrain}
NAMES = {"main": "sample-bert4rec-melo", "pretrain": "sample-bert4rec-basic"}
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))  # of the server
SERVER = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else None)
SERVER.set_forkserver_preload(["running", "hypothesis", "pytest"])
atexit.register(lambda: [process.kill() for process in multiprocessing.active_children()])


def command(place, *flags):
    """Arguments of a tiny run on the bundled sample that keeps everything in `place`."""
    folders = f"--log_dir={place}", f"--pretrain_log_dir={place}", f"--cache_dir={place.parent / 'cache'}"
    return ["--mode=sample", f"--data_path={ROOT / 'Data/sample/ratings.csv'}", *folders, *TINY, *flags]


# -----------------------------------------------------------------------------
# processes


def spawn(function, out, err, environment=None):
    """A process that does what `function`, which pickles, does, and writes to the files `out` and `err`."""
    process = SERVER.Process(target=redirected, args=(function, out, err, environment or {}))
    process.start()
    return process


def redirected(function, out, err, environment):
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    function()


def run_main(script, words, before=None):
    """Do `before` and run a script as its own process would."""
    if before:
        before()
    distributed.run_script(partial(SCRIPTS[script].main, words))


def start(place, *flags, script="main", before=None, environment=None):
    """A process that does `before`, which pickles, and a tiny run in `place`; it writes to `place`.out and .err."""
    place.parent.mkdir(parents=True, exist_ok=True)
    run_it = partial(run_main, script, command(place, *flags), before)
    return spawn(run_it, place.with_suffix(".out"), place.with_suffix(".err"), environment)


def wait(process, limit=300):
    """The exit status of a process, negative where a signal ended it; it may take `limit` seconds."""
    process.join(limit)
    assert process.exitcode is not None, f"process {process.pid} has not ended after {limit} s"
    return process.exitcode


def run(place, *flags, **more):
    """Run to the end: (exit status, standard error), which is one sentence where the status is 2 or 3."""
    status = wait(start(place, *flags, **more))
    errors = place.with_suffix(".err").read_text()
    assert "Traceback" not in errors
    if status in (2, 3):
        sentences = [line for line in errors.splitlines() if not line.startswith("warning: ")]
        assert len(sentences) == 1 and sentences[0].startswith("error: "), errors
    return status, errors


def wait_until(condition):
    for _ in range(60_000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("what was waited for did not come")


def has_saved(folder, step):
    """A condition: a checkpoint of `step` or later is there."""
    return lambda: max(checkpoint.find_checkpoints(folder), default=-1) >= step


# -----------------------------------------------------------------------------
# what may happen in a process, given as its `before`


def at_call(name, number, action):
    """From now on, `action` is done before the n-th call of a function, such as "os.replace"."""
    owner, _, function = name.rpartition(".")
    owner, left = pkgutil.resolve_name(owner), [number]
    original = getattr(owner, function)

    def replaced(*arguments, **more):
        left[0] -= 1
        if not left[0]:
            action()
        return original(*arguments, **more)

    setattr(owner, function, replaced)


def kill(number):
    """Send this process a signal."""
    os.kill(os.getpid(), number)


def at_write(number, action=None):
    """Die, or do something else, when a written file is about to get its name for the n-th time."""
    return partial(at_call, "os.replace", number, action or partial(kill, signal.SIGKILL))


def at_iteration(number, action):
    """Do something before the n-th iteration."""
    return partial(at_call, "training.distributed.max_over_ranks", number, action)


def poison(*numbers):
    """From now on, the meta-gradients with these numbers, from 0, are not finite."""
    original, calls = torch.Tensor.backward, itertools.count()

    def backward(loss, *arguments, **more):
        original(loss * math.nan if next(calls) in numbers else loss, *arguments, **more)

    torch.Tensor.backward = backward


def set_value(name, value):
    """Give a module's constant, such as "training.run.LEAST_SHARE", another value."""
    owner, _, name = name.rpartition(".")
    setattr(pkgutil.resolve_name(owner), name, value)


# -----------------------------------------------------------------------------
# results


def result(folder):
    """All that a run has made and must not depend on interruptions: newest and best checkpoint, and curves."""
    assert not list(folder.rglob("*.tmp"))
    newest = checkpoint.load_checkpoint(checkpoint.checkpoint_path(folder, max(checkpoint.find_checkpoints(folder))))
    states = [newest]
    if newest["loop"]["best_rmse"] < math.inf:
        states.append(checkpoint.load_checkpoint(checkpoint.best_path(folder)))
    parts = "step", "last", "system", "optimizers", "loop", "item_ids", "levels", "fingerprint"
    states = [{name: state[name] for name in parts} for state in states]
    for state in states:
        state["loop"] = {name: value for name, value in state["loop"].items() if name != "seconds"}
    return {"states": states, "curves": curves(folder)}


def curves(folder):
    """{tag: [(step, value)]} as TensorBoard shows them; of speeds, the steps alone."""
    events = read_events(folder)
    found = {tag: [(p.step, p.value) for p in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    speed = "charts/iterations_per_second"
    return {**found, speed: [step for step, _ in found[speed]]}


def read_events(folder):
    """The events of a folder as TensorBoard reads them."""
    with contextlib.redirect_stderr(io.StringIO()):
        return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def same(a, b):
    """Whether nested values are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(itertools.starmap(same, zip(a, b, strict=True)))
    return type(a) is type(b) and a == b
