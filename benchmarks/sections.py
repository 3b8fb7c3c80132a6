"""What benchmark.py measures: one function for each section, from its options to rows of figures."""

import argparse
import copy
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dataloader
import main as script
import maml
from benchmarks import measure, naive
from evaluation import baselines, evaluate, metrics
from models import item_tables
from training import distributed
from training import run as runs
from utils import random_stream

CPU = torch.device("cpu")


def change(bench, **more):
    """The options of this script with others in place of some."""
    return argparse.Namespace(**{**vars(bench), **more})


def cases(bench):
    """(name, options, arguments of `measure.outer_steps`) of each learner in each form."""
    for form in measure.FORMS:
        for model in bench.models:
            of_model = change(bench, models=[model])
            options = measure.settings(form, of_model)
            yield f"{model}, {form}", options, (of_model, form, options.batch_size)


def learners(bench):
    """Meta-gradients of all tasks at once against the naive loop over tasks and windows."""
    rows, sequences, on_gpu = [], measure.synthetic(), bench.device.type == "cuda"
    for name, options, _ in cases(bench):
        system, tasks = measure.build(options, bench), measure.draw(options, sequences, bench.tasks)
        slow, laid_out = naive.naive_copy(system), [task.to(bench.device) for task in naive.lay_out_windows(tasks)]
        both = partial(measure.meta_gradient, system, tasks), partial(naive.meta_gradient, slow, laid_out)
        ours, theirs = measure.medians(bench, *both)
        target = 50 if on_gpu else {"bert4rec": 7, "sasrec": 8}.get(options.model, 14)
        difference = gradient_difference(system, tasks.take(slice(4)))
        rows.append((f"{name}: gradients differ by", difference, "", "at most 1e-8"))
        rows.append((f"{name}: {bench.tasks} tasks", 1e3 * ours, "ms", ""))
        rows.append((f"{name}: naive", 1e3 * theirs, "ms", ""))
        rows.append((f"{name}: ratio", theirs / ours, "x", f"at least {target}" if options.paper_form else ""))
    return rows


def gradient_difference(system, tasks):
    """The largest difference from the naive meta-gradient in double precision, over that one's largest entry."""
    tasks = tasks._replace(**{name: getattr(tasks, name).double() for name in ("ratings", "query_ratings", "times")})
    tasks, system = tasks.to(system.scale.device), copy.deepcopy(system).double()
    system.zero_grad()
    slow = naive.naive_copy(system)
    measure.meta_gradient(system, tasks)
    naive.meta_gradient(slow, naive.lay_out_windows(tasks))
    pairs = [(p.grad, q.grad) for p, q in zip(system.parameters(), slow.parameters(), strict=True)]
    used = [(ours, theirs) for ours, theirs in pairs if ours is not None or theirs is not None]
    return float(max((p - q).abs().max() for p, q in used) / max(q.abs().max() for _, q in used))


class CountOperations(TorchDispatchMode):
    """Counts the operations that are called while it is entered, views left out."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(bench):
    """Operations of an outer step of one part, about as many as a GPU launches; counted on the CPU."""
    rows = []
    for name, options, arguments in cases(change(bench, device=CPU)):
        take = measure.outer_steps(*arguments)
        with mock.patch.dict(dataloader.AT_ONCE, adapt=dataloader.ON_GPU):
            take()  # the optimizer makes its moments
            with CountOperations() as counted:
                take()
        rows.append((f"{name}, {options.batch_size} tasks", counted.calls, "", ""))
    return rows


def users_a_second(bench):
    """Adapting to users and predicting their last ratings, tasks built in the time."""
    n_users = bench.users * (16 if bench.device.type == "cuda" else 1)
    rows, sequences, users = [], measure.synthetic(n_users), np.arange(n_users)
    for name, options, _ in cases(bench):
        system, least = measure.build(options, bench), 20_000 if bench.device.type == "cuda" else 300
        seconds = measure.medians(
            bench, lambda s=system, o=options: evaluate.predict(s, dataloader.last_tasks(sequences, users, o))
        )
        target = f"at least {least}" if options.model == "bert4rec" else ""
        rows.append((name, n_users / seconds[0], "users/s", target))
    return rows


def parts(bench):
    """Time of each part of an outer step, its matrix products and their rate."""
    size = 8192 if bench.device.type == "cuda" else 1024
    square, sequences = torch.randn(size, size, device=bench.device), measure.synthetic()
    rate = 2 * size**3 / measure.medians(bench, partial(torch.mm, square, square))[0]
    rows = [("a large matrix product", rate / 1e9, "GFLOP/s", "")]
    for name, options, arguments in cases(bench):
        system, tasks = measure.build(options, bench), measure.draw(options, sequences, options.batch_size)
        with FlopCounterMode(display=False) as counted:
            measure.meta_gradient(system, tasks)
        sample, inner, gradient = measure.medians(
            bench,
            partial(measure.draw, options, sequences, options.batch_size),
            partial(measure.meta_gradient, system, tasks, backward=False),
            partial(measure.meta_gradient, system, tasks),
        )
        whole = measure.step_times(bench, measure.outer_steps(*arguments))[0]
        shares = {"sampling": sample, "inner loop": inner, "meta-gradient": gradient - inner}
        rows.append((f"{name}: outer step of {options.batch_size} tasks", 1e3 * whole, "ms", ""))
        rows += [(f"{name}: {part}", 100 * seconds / whole, "%", "") for part, seconds in shares.items()]
        rows.append((f"{name}: matrix products", counted.get_total_flops() / 1e9, "GFLOP", ""))
        rows.append((f"{name}: their rate", 100 * counted.get_total_flops() / gradient / rate, "%", ""))
    return rows


def catalogue(bench):
    """Outer steps with few items and with many, dense and with --sparse_items; at most 1.5 x and 2 GB more."""
    kinds = {"2,500 items": (2500, [])}
    kinds |= {f"many items, sparse {x}": (bench.many_items, [f"--sparse_items={x}"]) for x in (True, False)}
    return compare(bench, kinds)


def meta_batches(bench):
    """Outer steps as the meta-batch grows, whole and in chunks."""
    pairs = [(count, chunk) for count in (1, 4, 16) for chunk in (0, bench.tasks)]
    words = [[f"--batch_size={count * bench.tasks}", f"--task_chunk={chunk}"] for count, chunk in pairs]
    return compare(bench, {" ".join(each): (2500, each) for each in words})


def inner_steps(bench):
    """Outer steps with more inner steps; at most 2.5 x the memory."""
    return compare(bench, {f"{k} inner steps": (2500, [f"--num_inner_steps={k}"]) for k in (3, 10)})


def compare(bench, kinds):
    """Time a task and memory of outer steps: {name: (number of items, options)}."""
    rows = []
    for form in measure.FORMS:
        counts = [measure.settings(form, bench, *more).batch_size for _, more in kinds.values()]
        given = [(form, count, *kind) for count, kind in zip(counts, kinds.values(), strict=True)]
        seconds = measure.step_times(bench, *(measure.outer_steps(bench, *each) for each in given))
        for name, arguments, count, took in zip(kinds, given, counts, seconds, strict=True):
            if bench.device.type == "cuda":
                memory = measure.memory_of_steps(bench, *arguments)
            else:  # the most that a process has held does not fall
                memory = measure.together(1, measure.memory_of_steps, bench, *arguments)[0]
            rows.append((f"{form}, {name}: time a task", 1e3 * took / count, "ms", ""))
            rows.append((f"{form}, {name}: memory", memory, "MB", ""))
    return rows


def processes(bench):
    """Outer steps of one process and of two, on the CPU with --threads each."""
    rows = []
    for form in measure.FORMS:
        for count in (bench.tasks, 8 * bench.tasks, 32 * bench.tasks):
            first, second = measure.together(2, take_turns, change(bench, device=CPU), form, count)
            rows.append((f"{form}, {count} tasks: one process", count / first[1], "tasks/s", ""))
            ratio = first[1] / max(first[2], second[2])
            rows.append((f"{form}, {count} tasks: two over one", ratio, "x", "at least 1.6"))
    return rows


def take_turns(bench, form, n_tasks):
    """Median seconds of an outer step that rank 0 takes alone, and that both ranks take together, in each rank."""
    take, times = measure.outer_steps(bench, form, n_tasks), {1: [], 2: []}
    for _ in range(1 + 10 * bench.reps):
        for ranks in times:  # in turns, so that what else the machine does slows both alike
            distributed.barrier()
            if ranks == 2 or distributed.is_first():
                begin = time.perf_counter()
                with mock.patch.object(distributed, "store", distributed.store if ranks == 2 else None):
                    take()
                times[ranks].append(time.perf_counter() - begin)
    return {ranks: float(np.median(found[1:])) for ranks, found in times.items() if found}


def data(bench):
    """Time from a file to ready splits, and of sampling and packing tasks."""
    rows, bench = [], change(bench, device=CPU)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("ratings.dat" if bench.rows <= 5_000_000 else "ratings.csv")
        write_ratings(path, bench.rows)
        for how, target in ("first", f"at most {bench.rows / 1e6:g}"), ("from the cache", ""):
            took, cpu, memory, start = measure.together(1, read, bench, path)[0]
            rows.append((f"{bench.rows:,} rows of {path.name}, {how}", took, "s", target))
            rows.append((f"the same, {how}, processor time", cpu, "s", ""))
            rows.append((f"the same, {how}, memory", memory, "MB", "at most 3000"))
    rows.append(("start of the item tables, processor time", start, "s", ""))
    for form in measure.FORMS:
        draw = partial(measure.draw, measure.settings(form, bench), measure.synthetic(), 16)
        rows.append((f"{form}: sampling, packing 16 tasks", 1e3 * measure.medians(bench, draw)[0], "ms", "at most 2"))
    return rows


def write_ratings(path, n_rows):
    """Write synthetic ratings, 160 a user, in the layout of ML-1M (.dat) or of ML-25M (.csv)."""
    sep, header = ("::", "") if path.suffix == ".dat" else (",", "userId,movieId,rating,timestamp")
    number, rng, n_items = np.arange(n_rows), random_stream(1), min(60_000, max(50, n_rows // 270))
    items = 1 + (rng.random(n_rows) ** 2 * n_items).astype(np.int64)
    table = np.stack([1 + number // 160, items, rng.integers(1, 6, n_rows), rng.permutation(number)], 1)
    np.savetxt(path, table, "%d", sep, header=header, comments="")


def read(bench, path):
    """Seconds, processor seconds and MB from a file to ready splits; processor seconds of the item tables' start."""
    mode = "ml-1m" if path.suffix == ".dat" else "ml-25m"
    options = measure.settings("default", bench, f"--data_path={path}", f"--mode={mode}", f"--cache_dir={path.parent}")
    before, begin, cpu = measure.peak_memory(bench), time.perf_counter(), time.process_time()
    problem = dataloader.load_problem(options)
    took, cpu = time.perf_counter() - begin, time.process_time() - cpu
    memory, start = measure.peak_memory(bench) - before, time.process_time()
    item_tables.fit(problem.sequences, problem.train, len(problem.ratings.item_ids), options)
    return took, cpu, memory, time.process_time() - start


def accuracy(bench):
    """Time from ratings in memory to the validation RMSE of the damped means; needs --data_path."""
    options, rmse = measure.settings("default", bench), float("inf")
    problem = dataloader.load_problem(options)
    users, begin = (problem.train, problem.validation), time.perf_counter()
    goal = baselines.reference_rmse(problem.ratings, *users, [options.max_seq_len - 1], 1)["damped means"]
    system, shifts = maml.build_system(problem, options)
    run = runs.new_run(system.to(bench.device), shifts, problem, options, None)
    while rmse > goal and run.loop["iteration"] < options.num_train_iterations:
        if run.loop["iteration"] % 10 == 0:
            scored = evaluate.evaluate(run.average, problem, problem.validation)
            rmse = metrics.rmse((scored.prediction - scored.target) ** 2)[0]
        script.outer_step(run)
        run.loop["iteration"] += 1
    rows = [("RMSE", rmse, "", f"at most {goal:.4f}"), ("iterations", run.loop["iteration"], "", "")]
    return [*rows, ("time", time.perf_counter() - begin, "s", "")]


SECTIONS = {
    "learners": learners, "operations": operations, "eval": users_a_second, "parts": parts, "catalogue": catalogue,
    "tasks": meta_batches, "steps": inner_steps, "processes": processes, "data": data, "accuracy": accuracy,
}  # fmt: skip
