"""Small inputs for the tests of the numerical core: options, sequences, tasks and systems, in double precision."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import dataloader
import main
import maml
import options as option_module
from training import run as runs

SIZES = {
    "bert_hidden_units": 8,
    "bert_num_heads": 2,
    "narm_hidden_size": 8,
    "gru4rec_hidden_size": 8,
    "num_factors": 3,
    "lstm_hidden": 4,
    "max_seq_len": 7,
    "batch_size": 3,
    "num_samples": 5,
    "num_query_set": 2,
    "num_inner_steps": 2,
    "num_train_iterations": 400,
    "item_lr": 3e-4,
}
LEARNERS = tuple(option_module.LEARNERS)
SCALE = (3.6, 1.1, 1.0, 5.0)
N_ITEMS = 40


def options(**given):
    """Options of main.py at tiny sizes."""
    return option_module.parse("", [f"--{name}={value}" for name, value in {**SIZES, **given}.items()])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sequences(lengths=(9, 2, 12, 5, 3, 30), seed=0):
    """Users with that many ratings each; nobody rates an item twice."""
    rng = np.random.RandomState(seed)
    items = np.concatenate([rng.permutation(N_ITEMS)[:length] + 1 for length in lengths])
    ratings = (rng.randint(1, 6, len(items)) - SCALE[0]) / SCALE[1]
    return dataloader.Sequences(np.cumsum([0, *lengths]), items, ratings.astype(np.float32))


def double(tasks):
    """The same tasks in double precision."""
    return type(tasks)(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in tasks))


def training_tasks(options, stream=0, **given):
    """A meta-batch of random tasks of `sequences(**given)`."""
    data = sequences(**given)
    return double(dataloader.sample_tasks(data, np.arange(len(data.offsets) - 1), options, stream))


def single(tasks):
    """The tasks of a meta-batch one by one, each a meta-batch of one."""
    return [tasks.take(slice(t, t + 1)) for t in range(len(tasks.table))]


def jitter(module, seed=0, std=0.3):
    """The module in double precision, with noise on all parameters, so that none is at a special point."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def system(options):
    """A meta-learner away from its initialisation."""
    return jitter(maml.MetaLearner(N_ITEMS, options, SCALE))


def rows(learner, tasks):
    """Each task's rows of the item tables."""
    return {name: F.embedding(tasks.table, table) for name, table in learner.tables().items()}


def problem(sequences, users, n_items=N_ITEMS):
    """Sequences as a `Problem` whose `users` train, validate and test."""
    ratings = SimpleNamespace(fingerprint="", item_ids=np.arange(n_items), low=SCALE[2], high=SCALE[3])
    return dataloader.Problem(ratings, sequences, users, users, users, *SCALE[:2])


def run(options, dtype=torch.float32, device="cpu"):
    """A training run of a fresh `Ensemble` on `sequences()`."""
    ensemble = maml.Ensemble(N_ITEMS, options, SCALE).to(device, dtype)
    return runs.new_run(ensemble, [None] * options.members, problem(sequences(), np.arange(6)), options, None)


def step(run):
    """Take an outer step; its figures."""
    main.outer_step(run)
    run.loop["iteration"] += 1
    run.loop["sums"] = [0.0] * 4
    runs.settle(run)
    return run.loop["sums"]


def lay_out(rows, width=None, query_items=(1,), seed=0):
    """One task, T = 1, whose row r packs windows of lengths rows[r]; the ratings are random.

    The items of a window are drawn from 1..9 by its length and place among the windows of that length, so that the
    same windows laid out in other ways hold the same items and ratings.
    """
    width = width or max(map(sum, rows))
    arrays = {name: np.zeros((len(rows), width)) for name in ("items", "ratings", "segment", "position")}
    seen = {}
    for r, lengths in enumerate(rows):
        column = 0
        for number, length in enumerate(lengths):
            seen[length] = seen.get(length, 0) + 1
            rng = np.random.RandomState([seed, length, seen[length]])
            at = (r, slice(column, column + length))
            arrays["items"][at] = rng.permutation(9)[:length] + 1
            arrays["ratings"][at] = rng.randn(length)
            arrays["segment"][at] = number + 1
            arrays["position"][at] = np.arange(length, 0, -1)
            column += length
    whole = {name: torch.from_numpy(value)[None] for name, value in arrays.items()}
    query = torch.tensor([query_items])
    return dataloader.Tasks(
        table=torch.arange(10)[None],
        ratings=whole.pop("ratings"),
        times=(whole["segment"] > 0).double(),
        n_support=torch.tensor([rows[0][0] if rows[0] else 0]),
        query_items=query,
        query_ratings=torch.zeros(query.shape, dtype=torch.float64),
        query=torch.ones(query.shape, dtype=torch.bool),
        query_weight=torch.ones(query.shape, dtype=torch.float64),
        in_query=torch.zeros_like(whole["segment"], dtype=torch.bool),
        fold=torch.tensor([0]),
        **{name: value.long() for name, value in whole.items()},
    )


def windows(values, tasks):
    """The parts of `values` (1, R, S, ...) that belong to each window, in order of length and place."""
    found = []
    for row, segment in zip(values[0], tasks.segment[0], strict=True):
        found += [row[segment == number] for number in range(1, int(segment.max()) + 1)]
    return sorted(found, key=len)
