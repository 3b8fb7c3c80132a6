"""What benchmark.py measures on, and how: synthetic ratings, outer steps, time, memory, other processes."""

import argparse
import math
import multiprocessing
import os
import re
import socket
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

import dataloader
import main as script
import maml
import options as option_module
from training import distributed
from training import run as runs
from utils import random_stream

FORMS = {"paper": ["--paper_form=True"], "default": []}
SCALE = (3.58, 1.12, 1.0, 5.0)  # mean, deviation, lowest and highest of the synthetic ratings
ITERATIONS = 400  # over which learning rates fall, where none are given


def synthetic(n_users=2000, n_items=2500):
    """Random `Sequences` with lengths like ML-1M's: at least 20, 100 in the median."""
    rng = random_stream(0)
    lengths = np.maximum(20, rng.lognormal(4.6, 1.0, n_users)).astype(np.int64)
    offsets = np.concatenate([[0], lengths.cumsum()])
    ratings = np.clip(np.rint(rng.normal(SCALE[0], SCALE[1], offsets[-1])), 1, 5)
    items = rng.integers(1, n_items + 1, offsets[-1])
    return dataloader.Sequences(offsets, items, ((ratings - SCALE[0]) / SCALE[1]).astype(np.float32))


def settings(form, bench, *more):
    """Options of main.py in a form and with the first learner; the command line and `more` override them."""
    options = option_module.parse("", [*FORMS[form], f"--model={bench.models[0]}", *bench.rest, *more])
    options.num_train_iterations = options.num_train_iterations or ITERATIONS
    return options


def build(options, bench, n_items=2500):
    """A system on the device, moved off its initialisation, where many gradients vanish."""
    system = maml.Ensemble(n_items, options, SCALE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in system.named_parameters():
            if ".learner.item" not in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return system.to(bench.device)


def draw(options, sequences, count):
    """A meta-batch of `count` tasks of all users."""
    options = argparse.Namespace(**{**vars(options), "batch_size": count})
    return dataloader.sample_tasks(sequences, np.arange(len(sequences.offsets) - 1), options, 0)


def meta_gradient(system, tasks, backward=True):
    """Add the meta-gradient of tasks to the parameters, as `main.outer_step` does, or stop at the meta-loss."""
    for _, part in dataloader.parts(tasks, system.scale.device, "adapt", system.options.task_chunk):
        shifts, weights = [None] * len(system.members), objective_weights(system)
        loss, _ = maml.meta_loss(system, part.to(system.scale.device), weights, shifts, len(tasks.table))
        if backward:
            loss.backward()


def objective_weights(system):
    """Weights (K + 1,) of the query losses, in the device and precision of the system."""
    return maml.objective_weights(system.options, 1).to(system.members[0].learner.item_embedding)


def outer_steps(bench, form, n_tasks, n_items=2500, more=()):
    """A function that takes an outer step of `n_tasks` tasks each time it is called, sampling included.

    The options are those of `settings`, for the first learner.
    """
    options = settings(form, bench, *more, f"--batch_size={n_tasks}")
    sequences = synthetic(n_items=n_items)
    users = np.arange(len(sequences.offsets) - 1)
    problem = dataloader.Problem(None, sequences, users, users, users, *SCALE[:2])
    run = runs.new_run(build(options, bench, n_items), [None] * options.members, problem, options, None)

    def take():
        script.outer_step(run)
        run.loop["iteration"] += 1

    if run.graphs:
        for _ in range(12):  # so that the usual shapes have their graphs
            take()
    return take


def step_times(bench, *takes):
    """Median seconds of an outer step of each function; on a GPU, of steps in a row, whose drawing overlaps."""
    count = 20 if bench.device.type == "cuda" else 1
    rows = [lambda take=take: [take() for _ in range(count)] for take in takes]
    return [seconds / count for seconds in medians(bench, *rows)]


def medians(bench, *functions):
    """Median seconds of each function; they take turns, so that a busy moment hits all alike."""
    for function in functions:
        function()
    times = [[clock(function, bench) for function in functions] for _ in range(bench.reps)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def clock(function, bench):
    """Seconds of one call; with one CPU thread those of the processor, which other processes hardly change."""
    on_gpu = bench.device.type == "cuda"
    now = time.perf_counter if on_gpu or bench.threads > 1 else time.process_time
    wait = torch.cuda.synchronize if on_gpu else int
    wait()
    begin = now()
    function()
    wait()
    return now() - begin


def peak_memory(bench):
    """Most memory that this process has held, in MB; nan where there is no /proc and no GPU."""
    if bench.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")  # getrusage would give a new process the peak of its parent
    return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1e3 if status.exists() else math.nan


def memory_of_steps(bench, *arguments):
    """MB that `outer_steps` add to this process, or to what it holds of a GPU."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, take = peak_memory(bench), outer_steps(bench, *arguments)
    take()
    take()  # now with all that the optimizer holds
    return peak_memory(bench) - before


def together(count, function, bench, *arguments):
    """What a function gives in each of `count` fresh processes, which are ranks where there are several."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        done = [pool.submit(be_rank, rank, count, port, function, bench, *arguments) for rank in range(count)]
        return [each.result() for each in done]


def be_rank(rank, count, port, function, bench, *arguments):
    torch.set_num_threads(bench.threads)
    if count == 1:
        return function(bench, *arguments)
    os.environ.update(RANK=f"{rank}", WORLD_SIZE=f"{count}", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    distributed.join()
    found = function(bench, *arguments)
    torch.distributed.destroy_process_group()  # else the process does not end
    return found
