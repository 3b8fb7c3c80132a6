"""Speed and memory, as ratios measured in one run: medians over repetitions, same work, same threads.

    python benchmark.py                                    # every section, on synthetic ratings
    python benchmark.py --only learners eval --threads=2   # some sections
    python benchmark.py --only accuracy --data_path=FILE   # time to the damped means' error, on real ratings
    python benchmark.py --only data --many_rows=25000000   # a file of ML-25M's size too: 3 minutes, 1 GB of disk
    python benchmark.py --only processes scaling           # two processes; slopes for docs/SCALING.md
    python benchmark.py --json > figures.json              # for machines

Options of main.py (--bert_hidden_units=64, ...) hold for all sections. --models chooses learners; sections catalogue,
tasks, steps, processes and scaling measure the first. Form "paper" is --paper_form=True: every parameter adapted, 25
windows, 16 tasks; form "default" is what main.py does, but that item tables start at random.
"""

import argparse
import contextlib
import copy
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import socket
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import dataloader
import maml
import options as option_module
from evaluation import baselines, evaluate, metrics
from models import checkpoint, item_tables, kernels
from training import distributed, loop
from training.optimizer import RowAdamW
from utils import choose_device, keep_memory, random_stream, run_script

FORMS = {"paper": ["--paper_form=True"], "default": []}
LEARNERS = ("bert4rec", "sasrec", "narm", "gru4rec")
SCALE = (3.58, 1.12, 1.0, 5.0)  # mean, deviation, lowest and highest of the synthetic ratings


# -----------------------------------------------------------------------------
# what is measured on


def synthetic(n_users=2000, n_items=2500, seed=0):
    """Random `Sequences` with lengths like ML-1M's: at least 20, 100 in the median."""
    rng = random_stream(seed)
    lengths = np.maximum(20, rng.lognormal(4.6, 1.0, n_users)).astype(np.int64)
    offsets = np.concatenate([[0], lengths.cumsum()])
    ratings = np.clip(np.rint(rng.normal(SCALE[0], SCALE[1], offsets[-1])), 1, 5)
    items = rng.integers(1, n_items + 1, offsets[-1])
    return dataloader.Sequences(offsets, items, ((ratings - SCALE[0]) / SCALE[1]).astype(np.float32))


def settings(form, bench, *more):
    """Options of main.py in a form, with those of the command line and `more` on top."""
    return option_module.parse("", [*FORMS[form], "--init_items=random", *bench.rest, *more])


def build(options, bench, n_items=2500):
    """A meta-learner on the device, moved off its initialisation, where many gradients vanish."""
    system = maml.Ensemble(n_items, options, SCALE, torch.ones(n_items))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in system.named_parameters():
            if ".learner.item" not in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return system.to(bench.device)


def stretches(options, count, n_items=2500):
    """Synthetic sequences, and `count` tasks drawn from them: (`Sequences`, `Stretches`)."""
    options, sequences = argparse.Namespace(**{**vars(options), "batch_size": count}), synthetic(n_items=n_items)
    return sequences, dataloader.sample_stretches(sequences, np.arange(len(sequences.offsets) - 1), options, 0)


def draw(options, count, n_items=2500, shared=True):
    """A meta-batch of `count` tasks, as the naive way has it without `shared`: each window laid out."""
    with contextlib.nullcontext() if shared else mock.patch.object(dataloader, "shares_starts", lambda options: False):
        return dataloader.build_tasks(*stretches(options, count, n_items), options)


# -----------------------------------------------------------------------------
# the naive reference


def spread(tasks, width):
    """The same tasks with one window a row of `width` positions, and catalogue numbers in place of table places."""
    length = dataloader.window_lengths(tasks.segment.cpu().numpy())
    numbers, row = np.arange(len(length)), np.broadcast_to(np.arange(length.shape[1]), length.shape).copy()
    laid = dataloader.lay_out(tasks, numbers, length, row, np.zeros_like(row), width, length.shape[1])
    items = laid.table.gather(1, laid.items.flatten(1)).view_as(laid.items)
    return laid._replace(items=items, query_items=tasks.table.gather(1, tasks.query_items))


def naive_losses(system, task):
    """Query losses (K + 1,) of one spread task by the book: whole item tables, everything anew at every step."""
    member, options = system.members[0], system.options
    learner, network = member.learner, member.loss_network
    names, fast, losses = maml.adapted_names(learner, options), dict(learner.named_parameters()), []
    count = task.query_last + 1
    share = task.support * (count / task.support.sum())
    for step in range(options.num_inner_steps + 1):
        tables = {name: fast[name] for name in learner.table_names()}
        history, query = functional_call(learner, fast, ("predict", task, tables))
        losses.append(((query - task.query_ratings) * task.query).square().sum() / task.query.sum())
        if step == options.num_inner_steps:
            return torch.stack(losses)
        slope = history - task.ratings
        if network is not None:
            slope = network(network.prepare(task), step, history, task)
        parameters = [fast[name] for name in names]
        gradients = torch.autograd.grad(
            history, parameters, slope * share, True, create_graph=options.use_second_order, allow_unused=True
        )
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                fast[name] = fast[name] - member.rates(name, step, count) * gradient


def naive_gru(inputs, goes_on, weight, bias):
    """`kernels.GRUScan` as a loop over steps: inputs (..., R, S, 3 D) -> states (..., R, S, D)."""
    state, states = inputs.new_zeros(*inputs.shape[:-2], weight.shape[-1]), []
    for x, on in zip(inputs.unbind(-2), goes_on[..., None].unbind(-2), strict=True):
        before = on * state
        (x_r, x_z, x_n), gates = x.chunk(3, -1), before @ weight.transpose(-1, -2) + bias[..., None, :]
        h_r, h_z, h_n = gates.chunk(3, -1)
        update, new = torch.sigmoid(x_z + h_z), torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
        state = new + update * (before - new)
        states.append(state)
    return torch.stack(states, -2)


def naive_lstm(inputs, goes_on, weight, bias, start):
    """`kernels.LSTMScan` as a loop over steps: inputs (..., R, S, I) -> states (..., R, S, H)."""
    state, memory = (row.expand(inputs.shape[:-2] + row.shape) for row in start)
    states = []
    for values, on in zip(inputs.unbind(-2), goes_on[..., None].unbind(-2), strict=True):
        state, memory = start[0] + on * (state - start[0]), start[1] + on * (memory - start[1])
        enter, forget, new, leave = F.linear(torch.cat([values, state], -1), weight, bias).chunk(4, -1)
        memory = torch.sigmoid(forget) * memory + torch.sigmoid(enter) * torch.tanh(new)
        state = torch.sigmoid(leave) * torch.tanh(memory)
        states.append(state)
    return torch.stack(states, -2)


def naive_norm(x, weight, bias, eps):
    """`kernels.Norm` as torch's layer norm without weights, and these."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * kernels.of_each(weight, x) + kernels.of_each(bias, x)


def naive_attention(q, k, v, hide):
    """`kernels.Attend` step by step: queries, keys and values (N, d, S), `hide` (..., S, S) -> (N, d, S)."""
    scores, hide = q.mT @ k * q.shape[1] ** -0.5, hide.flatten(0, -3)
    return ((scores + hide.repeat_interleave(len(q) // len(hide), 0)).softmax(-1) @ v.mT).mT


def naive_heads(x, bias, heads):
    """`kernels.SplitHeads` as a sum and views."""
    parts = (x + kernels.of_each(bias, x).mT).unflatten(-2, (3, heads, -1)).unbind(-4)
    return tuple(part.flatten(0, -3) for part in parts)


def naive_pairs(q, k, v, mask):
    """`kernels.PairScores` for all pairs: q and k (..., R, S, D), v (..., D), mask (..., R, S, S) as the scores are."""
    inside = torch.sigmoid(q[..., :, None, :] + k[..., None, :, :])
    return (inside * v[..., None, None, None, :]).sum(-1) * mask


NAIVE = {
    kernels.PairScores: naive_pairs,
    kernels.GRUScan: naive_gru,
    kernels.LSTMScan: naive_lstm,
    kernels.Norm: naive_norm,
    kernels.Gelu: F.gelu,
    kernels.Attend: naive_attention,
    kernels.SplitHeads: naive_heads,
}


@contextlib.contextmanager
def autograd_alone():
    """The pieces of `models/kernels.py` as torch's own operations, whose derivatives are autograd's."""
    with contextlib.ExitStack() as stack:
        for kernel, plain in NAIVE.items():
            stack.enter_context(mock.patch.object(kernel, "apply", plain))
        yield


def naive_backward(system, tasks, weights):
    """Add the meta-gradient of spread tasks to the parameters, task after task.

    This is what one writes with torch at hand and no thought of speed: autograd through a functional form of the
    learner, the steps of recurrences in a loop. It shares the learners' equations, but none of the tricks: no packing,
    no task-local tables, no tasks at once, no derivative written by hand.
    """
    system.zero_grad()
    with autograd_alone():
        for task in zip(*tasks, strict=True):
            ((naive_losses(system, type(tasks)(*task)) * weights).sum() / len(tasks.table)).backward()


def backward(system, tasks, weights):
    """Add the meta-gradient of tasks to the parameters, as training does."""
    system.zero_grad()
    for _, part in dataloader.by_size(tasks, system.options.task_chunk, system.scale.is_cuda):
        part = part.to(system.scale.device)
        losses = maml.query_losses(system(part, system.options.use_second_order), part).sum(0) / len(tasks.table)
        (losses * weights).sum().backward()


def gradient_difference(system, tasks, spread_tasks):
    """Largest difference of the two ways' meta-gradients in double precision, over the largest gradient."""
    system, found = copy.deepcopy(system).double(), []
    for way, given in ((backward, tasks), (naive_backward, spread_tasks)):
        given = given._replace(ratings=given.ratings.double(), query_ratings=given.query_ratings.double())
        way(system, given, maml.objective_weights(system.options, 1).to(system.scale))
        zero = (torch.zeros_like(p) if p.grad is None else p.grad for p in system.parameters())
        found.append(torch.cat([gradient.flatten() for gradient in zero]))
    return float((found[0] - found[1]).abs().max() / found[1].abs().max())


# -----------------------------------------------------------------------------
# measuring


def clock(function, bench):
    """Seconds that one call takes; with one CPU thread those of the processor, which other processes hardly change."""
    on_gpu = bench.device.type == "cuda"
    now = time.perf_counter if on_gpu or bench.threads > 1 else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    begin = now()
    function()
    if on_gpu:
        torch.cuda.synchronize()
    return now() - begin


def medians(bench, *functions):
    """Median seconds of each function; they take turns, so that a busy moment hits all alike."""
    for function in functions:
        function()
    times = [[clock(function, bench) for function in functions] for _ in range(bench.reps)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def peak_memory(bench):
    """Most memory this process has held, in MB."""
    if bench.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text()  # getrusage would give a new process the peak of its parent
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1e3


def apart(function, *arguments):
    """What a function gives in a fresh process, whose peak memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def outer_steps(bench, form, count, n_items, more, steps=1):
    """A function that takes so many outer steps, each of `count` tasks."""
    options = settings(form, bench, f"--model={bench.models[0]}", *more)
    system, (sequences, drawn) = build(options, bench, n_items), stretches(options, count * steps, n_items)
    parts = (dataloader.take(drawn, numbers) for numbers in np.split(np.arange(count * steps), steps))
    batches = [loop.own_share(sequences, part, options) for part in parts]
    run = loop.new_run(system, None, options, None)

    def take():
        for each in batches:
            loop.train_step(system, run.optimizer, each, options, 1)

    return take


def measure_memory(bench, *given):
    """In a fresh process: MB that outer steps add to it."""
    set_up(bench)
    before, take = peak_memory(bench), outer_steps(bench, *given)
    take()
    take()  # now with all that the optimizer holds
    return peak_memory(bench) - before


def time_and_memory(bench, form, cases):
    """[(seconds, MB)] of the outer steps of each case; the cases take turns, and have memory of their own."""
    seconds = medians(bench, *(outer_steps(bench, form, *case) for case in cases))
    return list(zip(seconds, [apart(measure_memory, bench, form, *case) for case in cases], strict=True))


def set_up(bench):
    """Threads of this process, and its memory as the scripts have it."""
    keep_memory()
    torch.set_num_threads(bench.threads)


def row(name, value, unit, at_least=None, at_most=None):
    """One figure, with its target where it has one."""
    met = None if at_least is at_most is None else bool(at_least <= value if at_most is None else value <= at_most)
    return {"name": name, "value": value, "unit": unit, "at_least": at_least, "at_most": at_most, "met": met}


# -----------------------------------------------------------------------------
# sections


def bench_learners(bench):
    """Meta-gradients of all tasks at once against the naive loop."""
    rows = []
    on_gpu = bench.device.type == "cuda"
    for form in FORMS:
        for model in bench.models:
            options = settings(form, bench, f"--model={model}")
            system, tasks = build(options, bench), draw(options, bench.tasks)
            width, name = options.max_seq_len - 1, f"{model}, {form}"
            weights = maml.objective_weights(options, 1).to(bench.device)
            slow = spread(draw(options, bench.tasks, shared=False), width).to(bench.device)
            few = (type(tasks)(*(tensor[:4] for tensor in its)) for its in (tasks, slow))
            rows.append(row(f"{name}: gradients differ by", gradient_difference(system, *few), "", at_most=1e-5))
            fast, naive = medians(
                bench,
                lambda s=system, t=tasks, w=weights: backward(s, t, w),
                lambda s=system, t=slow, w=weights: naive_backward(s, t, w),
            )
            target = (50 if on_gpu else 6 if model in ("bert4rec", "sasrec") else 10) if form == "paper" else None
            rows.append(row(f"{name}: {bench.tasks} tasks", 1e3 * fast, "ms"))
            rows.append(row(f"{name}: naive", 1e3 * naive, "ms"))
            rows.append(row(f"{name}: ratio", naive / fast, "x", at_least=target))
    return rows


def bench_eval(bench):
    """Adapting to users and predicting their targets, tasks built in the time."""
    rows = []
    sequences = synthetic(bench.users)
    users = np.arange(bench.users)
    for form in FORMS:
        for model in bench.models:
            options = settings(form, bench, f"--model={model}")
            system = build(options, bench)
            seconds = medians(
                bench, lambda s=system, o=options: evaluate.predict(s, dataloader.last_tasks(sequences, users, o))
            )[0]
            target = (20000 if bench.device.type == "cuda" else 300) if model == "bert4rec" else None
            rows.append(row(f"{model}, {form}", bench.users / seconds, "users/s", at_least=target))
    return rows


def bench_catalogue(bench):
    """An outer step with few and with many items, these with --sparse_items."""
    rows = []
    for form in FORMS:
        count, kinds = settings(form, bench).batch_size, {"sparse": True, "dense": False}
        cases = [(count, bench.many_items, (f"--sparse_items={sparse}",)) for sparse in kinds.values()]
        (few, small), *many = time_and_memory(bench, form, [(count, bench.items, ()), *cases])
        rows.append(row(f"{form}: {bench.items:,} items", 1e3 * few, "ms"))
        for (kind, sparse), (seconds, memory) in zip(kinds.items(), many, strict=True):
            name = f"{form}: {bench.many_items:,} items, {kind}"
            rows.append(row(f"{name}: time", 1e3 * seconds, "ms"))
            rows.append(row(f"{name}: ratio", seconds / few, "x", at_most=1.5 if sparse else None))
            rows.append(row(f"{name}: more memory", memory - small, "MB", at_most=2000 if sparse else None))
    return rows


def bench_tasks(bench):
    """Time per task and memory as the meta-batch grows, whole and in chunks; the tasks are the same."""
    rows, least, most = [], bench.tasks, 16 * bench.tasks
    pairs = [(count, chunk) for count in (least, 4 * least, most) for chunk in (0, least) if chunk != count]
    for form in FORMS:
        cases = [(count, bench.items, (f"--task_chunk={chunk}",), most // count) for count, chunk in pairs]
        for (count, chunk), (seconds, memory) in zip(pairs, time_and_memory(bench, form, cases), strict=True):
            name = f"{form}: {count} tasks" + (f", {chunk} at once" if chunk else "")
            rows.append(row(f"{name}: time a task", 1e3 * seconds / most, "ms"))
            rows.append(row(f"{name}: memory", memory, "MB"))
    return rows


def bench_steps(bench):
    """Memory and time with more inner steps."""
    rows = []
    for form in FORMS:
        count = settings(form, bench).batch_size
        cases = [(count, bench.items, (f"--num_inner_steps={k}",)) for k in (3, 10)]
        (short, small), (long, large) = time_and_memory(bench, form, cases)
        rows.append(row(f"{form}: memory of 3 steps", small, "MB"))
        rows.append(row(f"{form}: memory of 10 over 3", large / max(small, 1), "x", at_most=2.5))
        rows.append(row(f"{form}: time of 10 over 3", long / short, "x"))
    return rows


def write_ratings(path, n_rows, mode, chunk=1_000_000):
    """Write a synthetic ratings file in the layout of ML-1M ('::') or ML-25M (CSV with a header)."""
    sep, header = ("::", "") if mode == "ml-1m" else (",", "userId,movieId,rating,timestamp\n")
    rng, n_items = random_stream(1), min(60_000, max(50, n_rows // 270))
    with open(path, "w") as file:
        file.write(header)
        for first in range(0, n_rows, chunk):
            number = np.arange(first, min(first + chunk, n_rows))
            n = len(number)
            item = 1 + (rng.random(n) ** 2 * n_items).astype(np.int64)
            columns = 1 + number // 160, item, rng.integers(1, 6, n), 10**9 + rng.integers(0, 10**8, n)
            lines = zip(*(column.tolist() for column in columns), strict=True)
            file.writelines(f"{sep.join(map(str, line))}\n" for line in lines)


def measure_reading(bench, path, mode):
    """In a fresh process: (seconds from a file to ready splits, those of processors, MB that took)."""
    options = settings("default", bench, f"--data_path={path}", f"--mode={mode}", f"--cache_dir={path.parent}")
    before, begin, cpu = peak_memory(bench), time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        dataloader.load_problem(options)
    return time.perf_counter() - begin, time.process_time() - cpu, peak_memory(bench) - before


def bench_data(bench):
    """From a file to ready splits, and sampling and packing of tasks."""
    rows = []
    sizes = [("ml-1m", bench.rows, 1.0, None)]
    if bench.many_rows:
        sizes.append(("ml-25m", bench.many_rows, 25.0, 3000))
    for mode, n_rows, seconds, memory in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ("ratings.dat" if mode == "ml-1m" else "ratings.csv")
            write_ratings(path, n_rows, mode)
            first, work, used = apart(measure_reading, bench, path, mode)
            again, _, _ = apart(measure_reading, bench, path, mode)
        rows.append(row(f"{n_rows:,} rows of {mode}: first reading", first, "s", at_most=seconds))
        rows.append(row(f"{n_rows:,} rows of {mode}: the same, processor time", work, "s"))
        rows.append(row(f"{n_rows:,} rows of {mode}: from the cache", again, "s"))
        rows.append(row(f"{n_rows:,} rows of {mode}: memory", used, "MB", at_most=memory))
    sequences = synthetic()
    users = np.arange(len(sequences.offsets) - 1)
    for form in FORMS:
        options = settings(form, bench, "--batch_size=16")
        seconds = medians(bench, lambda o=options: [loop.draw_batch(sequences, users, o, i) for i in range(20)])
        rows.append(row(f"{form}: sampling and packing 16 tasks", 1e3 * seconds[0] / 20, "ms", at_most=2))
    return rows


def matmul_rate(bench):
    """Floating-point operations a second of a large matrix product."""
    n = 8192 if bench.device.type == "cuda" else 1024
    a = torch.randn(n, n, device=bench.device)
    return 2 * n**3 / medians(bench, lambda: a @ a)[0]


def product_flops(out, left, right, **_):
    """Floating-point operations of a product of matrices (..., N, M) and (..., M, K), by their shapes."""
    return 2 * math.prod(left) * right[-1]


# Products that torch's counter does not know.
IN_PLACE = {torch.ops.aten.baddbmm_: product_flops, torch.ops.aten.addmm_: product_flops}


def forward_alone(system, parts, second_order):
    """What `system` does with parts of a meta-batch, but for the gradients of inner steps through the encoder."""
    with mock.patch.object(torch.autograd, "grad", lambda history, flat, *_, **__: [torch.zeros_like(flat)]):
        return [system(part, second_order) for part in parts]


def bench_parts(bench):
    """Time per part of an outer step, its floating-point operations and their rate."""
    rate, on_gpu = matmul_rate(bench), bench.device.type == "cuda"
    rows = [row("matrix product", rate / 1e9, "GFLOP/s")]
    sequences = synthetic()
    users = np.arange(len(sequences.offsets) - 1)
    for form in FORMS:
        for model in bench.models:
            options = settings(form, bench, f"--model={model}", f"--batch_size={bench.tasks}")
            system, tasks = build(options, bench), draw(options, bench.tasks)
            optimizer = RowAdamW(loop.parameter_groups(system, options))
            weights = maml.objective_weights(options, 1).to(bench.device)
            second, parts = options.use_second_order, dataloader.by_size(tasks, 0, on_gpu)
            parts = [part.to(bench.device) for _, part in parts]
            with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counted:
                backward(system, tasks, weights)
            sample, forward, inner, whole, step = medians(
                bench,
                lambda o=options: loop.draw_batch(sequences, users, o, 0),
                lambda s=system, t=parts, o=second: forward_alone(s, t, o),
                lambda s=system, t=parts, o=second: [s(part, o) for part in t],
                lambda s=system, t=tasks, w=weights: backward(s, t, w),
                optimizer.step,
            )
            total, name = sample + whole + step, f"{model}, {form}"
            rows.append(row(f"{name}: whole step", 1e3 * total, "ms"))
            parts = {"sampling": sample, "forward": forward, "inner gradients": max(0.0, inner - forward)}
            parts |= {"meta backward": whole - inner, "optimizer": step}
            rows += [row(f"{name}: {part}", 100 * seconds / total, "%") for part, seconds in parts.items()]
            flops = counted.get_total_flops()
            rows.append(row(f"{name}: operations", flops / 1e9, "GFLOP"))
            rows.append(row(f"{name}: of the matrix product's rate", 100 * flops / whole / rate, "%"))
    return rows


def bench_accuracy(bench):
    """Wall time until the validation error first equals that of the damped means; needs --data_path."""
    if not any(argument.startswith("--data_path") for argument in bench.rest):
        return []
    rows = []
    for model in bench.models:
        options = option_module.parse("", [*bench.rest, f"--model={model}"])
        with contextlib.redirect_stdout(sys.stderr):
            problem = dataloader.load_problem(options)
        goal = damped_error(problem, options)
        rows.append(row(f"{model}: goal, RMSE of the damped means", goal, ""))
        rows += [row(f"{model}: {name}", *figure) for name, figure in train_to(goal, problem, options, bench).items()]
    return rows


def damped_error(problem, options):
    """RMSE of the best damped user and item means on the validation users' last ratings."""
    ratings, errors = problem.ratings, []
    support, target = baselines.last_support(ratings, problem.validation, options.max_seq_len - 1)
    for item_damping in baselines.ITEM_DAMPING:
        effects = baselines.fit_effects(ratings, problem.train, item_damping)
        for user_damping in baselines.USER_DAMPING:
            prediction = baselines.predict_effects(*effects, user_damping, support)
            errors.append(metrics.rmse((prediction.clip(ratings.low, ratings.high) - target) ** 2)[0])
    return min(errors)


def validation_error(system, problem):
    """RMSE of the validation users' last ratings."""
    scored = evaluate.evaluate(system, problem, problem.validation)
    return metrics.rmse((scored.prediction - scored.target) ** 2)[0]


def train_to(goal, problem, options, bench):
    """Train until the validation RMSE is at most `goal`: {figure: (value, unit)}."""
    begin, cpu = time.perf_counter(), time.process_time()
    system = maml.build_system(problem, options).to(bench.device)
    optimizer = RowAdamW(loop.parameter_groups(system, options))
    iteration, error = 0, validation_error(system, problem)
    while error > goal and iteration < options.num_train_iterations:
        loop.set_rates(optimizer, options, iteration)
        batch = loop.draw_batch(problem.sequences, problem.train, options, iteration)
        loop.train_step(system, optimizer, batch, options, iteration)
        iteration += 1
        if iteration % bench.every == 0:
            error = validation_error(system, problem)
    reached = "time" if error <= goal else "time, goal not reached"
    return {
        reached: (time.perf_counter() - begin, "s"),
        "processor time": (time.process_time() - cpu, "s"),
        "iterations": (iteration, ""),
        "RMSE reached": (error, ""),
    }


# -----------------------------------------------------------------------------
# several processes


def together(count, function, *arguments):
    """What a function gives in each of `count` fresh processes at the same time, in their order; they are connected."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        done = [pool.submit(as_process, rank, count, port, function, *arguments) for rank in range(count)]
        return [each.result() for each in done]


def as_process(rank, count, port, function, *arguments):
    """Be process `rank` of `count`, and do the work."""
    if count > 1:
        os.environ.update(RANK=f"{rank}", WORLD_SIZE=f"{count}", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
        distributed.join()
        distributed.connect(torch.device("cpu"))
    return function(*arguments)


def take_turns(bench, form, batch):
    """In each of two processes: what an outer step of `batch` tasks takes process 0 alone, both together, and each
    with tasks of its own, {way: median (wall, processor) seconds}.

    The ways take turns, step by step, so that what else the machine does slows all alike.
    """
    set_up(bench)
    options = settings(form, bench, f"--model={bench.models[0]}", f"--batch_size={batch}")
    system, sequences = build(options, bench), synthetic()
    optimizer = RowAdamW(loop.parameter_groups(system, options))
    users, drawn, alone = np.arange(len(sequences.offsets) - 1), {}, distributed.Place()
    ways = {"one": alone if distributed.is_first() else None, "two": distributed.place, "own": alone}
    times = {way: [] for way, place in ways.items() if place}

    def step(way, turn):
        def draw(number=turn + 1):
            drawn[way] = loop.draw_batch(sequences, users, options, number)

        with mock.patch.object(distributed, "place", ways[way]):
            if not turn:
                draw(0)
            begin, cpu = time.perf_counter(), time.process_time()
            loop.train_step(system, optimizer, drawn[way], options, turn, draw)
            return time.perf_counter() - begin, time.process_time() - cpu

    for turn in range(1 + bench.reps * bench.steps):
        for way in ways:
            distributed.barrier()
            if way in times:
                times[way].append(step(way, turn))
    return {way: tuple(map(statistics.median, zip(*found[1:], strict=True))) for way, found in times.items()}


def measure_parameters(bench, form, count, batch, double=False, chunk=0):
    """All parameters (n,) after `count` outer steps of `batch` tasks on the CPU."""
    set_up(bench)
    more = f"--model={bench.models[0]}", f"--batch_size={batch}", f"--task_chunk={chunk}"
    options = settings(form, bench, *more)
    system, sequences = build(options, bench), synthetic()
    system = system.double() if double else system
    optimizer, users = RowAdamW(loop.parameter_groups(system, options)), np.arange(len(sequences.offsets) - 1)
    for iteration in range(count):
        share = loop.draw_batch(sequences, users, options, iteration)
        loop.train_step(system, optimizer, in_double(share) if double else share, options, iteration)
    return torch.cat([p.detach().flatten() for p in system.parameters()]).numpy()


def in_double(batch):
    """A batch with ratings in double precision."""
    names = "ratings", "query_ratings"
    groups = [tasks._replace(**{name: getattr(tasks, name).double() for name in names}) for tasks in batch.groups]
    return batch._replace(groups=groups)


def bench_processes(bench):
    """Outer steps of one process and of two, on the CPU with --threads each, sampling included."""
    bench, rows = argparse.Namespace(**{**vars(bench), "device": torch.device("cpu")}), []
    for form in FORMS:
        batch = settings(form, bench).batch_size
        rows += speed_of_processes(bench, form, batch) + speed_of_processes(bench, form, 4 * batch)
        precisions = {"double": (True, 0), "single": (False, 0), "single, --task_chunk": (False, batch // 2)}
        for name, how in precisions.items():
            one, two = (together(count, measure_parameters, bench, form, 20, batch, *how)[0] for count in (1, 2))
            rows.append(row(f"{form}: parameters differ by, {name}", float(abs(one - two).max()), "", at_most=1e-6))
    return rows


def speed_of_processes(bench, form, batch):
    """Figures of one process, of two that share a meta-batch of so many tasks, and of two with one each."""
    both, what = together(2, take_turns, bench, form, batch), f"{form}, {batch} tasks"
    (one, work), two = both[0]["one"], both[0]["two"][0]
    busier, alone = max(each["two"][1] for each in both), max(each["own"][0] for each in both)
    return [
        row(f"{what}: one process", batch / one, "tasks/s"),
        row(f"{what}: two processes", batch / two, "tasks/s"),
        row(f"{what}: two over one", one / two, "x", at_least=1.6),
        row(f"{what}: the same, by processor time", work / busier, "x"),
        row(f"{what}: two with batches of their own, over one", 2 * one / alone, "x"),
    ]


# -----------------------------------------------------------------------------
# slopes for docs/SCALING.md


def resident():
    """Memory that this process holds now, in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def measure_ratings(bench, n_rows):
    """In a fresh process: what reading a file of ratings and starting from it takes, {figure: (value, unit)}."""
    set_up(bench)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ratings.csv"
        write_ratings(path, n_rows, "ml-25m")
        options = settings("default", bench, f"--data_path={path}", "--mode=ml-25m", f"--cache_dir={folder}")
        before, begin = resident(), time.process_time()
        with contextlib.redirect_stdout(sys.stderr):
            ratings, sequences, train, *_ = dataloader.load_problem(options)
        read, peak = time.process_time() - begin, peak_memory(bench) - before
        sizes = [sum(each.stat().st_size for each in Path(folder).glob(name)) / 1e6 for name in ("*.csv", "*.cache")]
        begin = time.process_time()
        item_tables.fit(sequences, train, len(ratings.item_ids), options)
        start = time.process_time() - begin
    return {
        "reading": (read, "s"),
        "file": (sizes[0], "MB"),
        "cache, mapped by all processes": (sizes[1], "MB"),
        "memory of each process": (sum(array.nbytes for array in sequences) / 1e6, "MB"),
        "most memory in reading": (peak, "MB"),
        "start of item tables, of which --cross_fit makes as many more": (start, "s"),
        "most memory in that start": (peak_memory(bench) - before, "MB"),
    }


def measure_items(bench, n_items):
    """In a fresh process: what training with that many items takes, and a checkpoint, {figure: (value, unit)}."""
    set_up(bench)
    options = settings("default", bench, "--sparse_items=True", f"--model={bench.models[0]}")
    before = resident()
    system = build(options, bench, n_items)
    batch = loop.own_share(*stretches(options, options.batch_size, n_items), options)
    run = loop.new_run(system, None, options, None)
    seconds = medians(bench, lambda: loop.train_step(system, run.optimizer, batch, options, 1))[0]
    mean = medians(bench, run.optimizer.catch_up)[0]
    held, begin = peak_memory(bench) - before, time.process_time()
    state = {"system": loop.average_state(run), "last": system.state_dict()}
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save_checkpoint(folder, 1, {**state, "optimizer": run.optimizer.state_dict()["state"]})
        size = path.stat().st_size / 1e6
    return {
        "memory of each process": (held, "MB"),
        "outer step": (1e3 * seconds, "ms"),
        "mean of the weights, before a validation": (1e3 * mean, "ms"),
        "checkpoint": (size, "MB"),
        "saving": (time.process_time() - begin, "s"),
        "most memory in saving": (peak_memory(bench) - before, "MB"),
    }


def bench_scaling(bench):
    """What a million more ratings (of 160 a user) or items take, in processor time, and a thousand more users."""
    rows = []
    counted = {"ratings": (measure_ratings, 2 * bench.rows), "items": (measure_items, bench.many_items)}
    for name, (measure, few) in counted.items():
        small, large = apart(measure, bench, few), apart(measure, bench, 4 * few)
        for figure, (value, unit) in small.items():
            rows.append(row(f"a million {name}: {figure}", (large[figure][0] - value) / (3e-6 * few), unit))
    sequences, users = synthetic(bench.users), np.arange(bench.users)
    for form in FORMS:
        options = settings(form, bench, f"--model={bench.models[0]}")
        system, batch = build(options, bench), loop.own_share(*stretches(options, options.batch_size), options)
        optimizer = RowAdamW(loop.parameter_groups(system, options))
        adapt, step = medians(
            bench,
            lambda s=system, o=options: evaluate.predict(s, dataloader.last_tasks(sequences, users, o)),
            lambda s=system, o=options, p=optimizer, b=batch: loop.train_step(s, p, b, o, 1),
        )
        rows.append(row(f"{form}: a thousand users adapted to", 1e3 * adapt / bench.users, "s"))
        rows.append(row(f"{form}: a thousand tasks trained on", 1e3 * step / options.batch_size, "s"))
    return rows


SECTIONS = {
    "learners": bench_learners,
    "eval": bench_eval,
    "catalogue": bench_catalogue,
    "tasks": bench_tasks,
    "steps": bench_steps,
    "data": bench_data,
    "processes": bench_processes,
    "scaling": bench_scaling,
    "parts": bench_parts,
    "accuracy": bench_accuracy,
}


# -----------------------------------------------------------------------------
# the script


def parse(argv=None):
    """The options of this script; the rest of the command line, which main.py's options take, in `rest`."""
    parser = option_module.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def add(name, default, kind, text, **more):
        parser.add_argument(f"--{name}", default=default, type=kind, help=f"{text} (default: %(default)s)", **more)

    count = option_module.count
    add("only", list(SECTIONS), str, "sections to run", nargs="+", choices=SECTIONS)
    add("models", list(LEARNERS), str, "learners to measure", nargs="+", choices=LEARNERS)
    add("reps", 3, count(), "repetitions, whose median counts")
    add("threads", 1, count(), "CPU threads")
    add("device", "auto", str, "where to compute", choices=["auto", "cpu", "cuda"])
    add("tasks", 16, count(4), "tasks in a meta-batch")
    add("users", 512, count(), "users to adapt to in eval")
    add("items", 2500, count(50), "items of the small catalogue")
    add("many_items", 1_000_000, count(50), "items of the large one")
    add("rows", 1_000_000, count(5000), "rows of the file in ML-1M's layout")
    add("many_rows", 0, count(0), "rows of one in ML-25M's layout, 25000000 say; 0 = none")
    add("steps", 20, count(), "outer steps of each measurement in processes")
    add("every", 10, count(), "iterations between validations in accuracy")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    bench, bench.rest = parser.parse_known_args(argv)
    bench.device = choose_device(bench.device)
    settings("default", bench)
    return bench


def machine(bench):
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "threads": bench.threads, "torch": torch.__version__, "python": platform.python_version()}


def print_rows(section, rows):
    """Print a section's figures and whether they meet their targets."""
    print(f"\n{section}: {(SECTIONS[section].__doc__).splitlines()[0]}")
    for r in rows:
        target = met = ""
        if r["met"] is not None:
            target = f"at least {r['at_least']:g}" if r["at_most"] is None else f"at most {r['at_most']:g}"
            met = "met" if r["met"] else "MISSED"
        print(f"  {r['name']:<58}{r['value']:>12.4g} {r['unit']:<9}{target:<16}{met}", flush=True)


def main(argv=None):
    bench = parse(argv)
    set_up(bench)
    about = machine(bench)
    if not bench.json:
        print(", ".join(f"{name} {value}" for name, value in about.items()))
    report = {"machine": about, "reps": bench.reps, "sections": {}}
    for section in bench.only:
        report["sections"][section] = rows = SECTIONS[section](bench)
        if not bench.json:
            print_rows(section, rows)
    if bench.json:
        print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    run_script(main)
