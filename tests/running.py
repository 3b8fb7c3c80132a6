"""Whole runs at tiny sizes, in processes of their own that start at once, and what they leave behind."""

import contextlib
import io
import itertools
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # which an optimizer would import in each process anew
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
import pretrain
from models import checkpoint
from training import distributed

ROOT = Path(__file__).parents[1]
ITERATIONS = 12
TINY = (
    f"--num_train_iterations={ITERATIONS}", "--log_interval=5", "--checkpoint_interval=2", "--device=cpu",
    "--batch_size=4", "--pretraining_batch_size=4", "--max_seq_len=6", "--num_query_set=2", "--num_inner_steps=2",
    "--bert_hidden_units=8", "--bert_num_heads=2", "--bert_num_blocks=1", "--num_factors=2", "--lstm_hidden=4",
    "--num_test_data=20", "--val_size=20", "--val_targets=1", "--average=0.9", "--warmup=3",
)  # fmt: skip
SCRIPTS = {"main": main, "pretrain": pretrain}
NAMES = {"main": "sample-bert4rec-melo", "pretrain": "sample-bert4rec-basic"}


def command(place, *flags):
    """Arguments of a tiny run on the bundled sample that keeps everything in `place`."""
    folders = f"--log_dir={place}", f"--pretrain_log_dir={place}", f"--cache_dir={place.parent / 'cache'}"
    return ["--mode=sample", f"--data_path={ROOT / 'Data/sample/ratings.csv'}", *folders, *TINY, *flags]


def fork(function, out, err):
    """Fork a process that does what `function` does and writes to the files `out` and `err`; its process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        function()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def start(place, *flags, script="main", before=lambda: None):
    """Fork a process that does `before` and runs the script; its process id. It writes to `place`.out and .err."""

    def run_it():
        before()
        distributed.run_script(lambda: SCRIPTS[script].main(command(place, *flags)))

    place.parent.mkdir(parents=True, exist_ok=True)
    return fork(run_it, place.with_suffix(".out"), place.with_suffix(".err"))


def wait(process, limit=None):
    """The exit status of a process, negative where a signal ended it; it may take `limit` seconds."""
    until = None if limit is None else time.monotonic() + limit
    while True:
        ended, status = os.waitpid(process, 0 if until is None else os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        assert time.monotonic() < until, f"process {process} has not ended after {limit} s"
        time.sleep(0.02)


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


def result(folder):
    """All that a run has made and must not depend on interruptions: newest and best checkpoint, and curves."""
    assert not list(folder.rglob("*.tmp"))
    newest = checkpoint.load_checkpoint(checkpoint.checkpoint_path(folder, max(checkpoint.find_checkpoints(folder))))
    states = [newest]
    if newest["loop"]["best_rmse"] < math.inf:
        states.append(checkpoint.load_checkpoint(folder / "checkpoints" / "best.pt"))
    parts = "step", "last", "system", "optimizer", "loop", "item_ids", "levels", "fingerprint"
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
