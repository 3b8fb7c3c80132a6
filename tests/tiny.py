"""Small inputs for the tests of the numerical core: options, sequences, tasks and systems in double precision."""

import numpy as np
import torch

import dataloader
import maml
import options as option_module
from training import loop

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
    "num_masks": 2,
}
LEARNERS = ("bert4rec", "sasrec", "narm", "gru4rec")
SCALE = (3.6, 1.1, 1.0, 5.0)


def options(**given):
    """Options of main.py at tiny sizes."""
    return option_module.parse("", [f"--{name}={value}" for name, value in {**SIZES, **given}.items()])


def sequences(lengths=(9, 2, 12, 5, 3, 30), n_items=40, seed=0):
    """Users with that many ratings each; nobody rates an item twice."""
    rng = np.random.RandomState(seed)
    items = np.concatenate([rng.permutation(n_items)[:length] + 1 for length in lengths])
    ratings = (rng.randint(1, 6, len(items)) - SCALE[0]) / SCALE[1]
    return dataloader.Sequences(np.cumsum([0, *lengths]), items, ratings.astype(np.float32))


def sample_tasks(data, users, options, *stream):
    """The tasks of `training.draw_batch` for all processes, in their order."""
    return dataloader.build_tasks(data, dataloader.sample_stretches(data, users, options, *stream), options)


def double(tasks):
    """The same tasks with ratings in double precision."""
    return tasks._replace(ratings=tasks.ratings.double(), query_ratings=tasks.query_ratings.double())


def training_batch(options, stream=0, **given):
    """The same tasks as `training.train_step` takes them."""
    data = sequences(**given)
    return double_batch(loop.draw_batch(data, np.arange(len(data.offsets) - 1), options, stream))


def double_batch(batch):
    """The same batch with ratings in double precision."""
    return batch._replace(groups=[double(tasks) for tasks in batch.groups])


def training_tasks(options, stream=0, **given):
    """A batch of random tasks of `sequences(**given)`, in double precision."""
    data = sequences(**given)
    users = np.arange(len(data.offsets) - 1)
    return double(sample_tasks(data, users, options, stream))


def jitter(module, seed=0, std=0.3):
    """The module in double precision, with noise on all parameters, so that none is at a special point."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def system(options, n_items=40, seed=0):
    """A meta-learner away from its initialisation."""
    return ensemble(options, n_items, seed).members[0]


def ensemble(options, n_items=40, seed=0):
    """`options.members` of them."""
    return jitter(maml.Ensemble(n_items, options, SCALE), seed)


def lay_out(rows, width=None, query_items=(1,), seed=0):
    """One task (no batch dimension) whose row r packs windows of lengths rows[r]; the ratings are random.

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
    whole = {name: torch.from_numpy(value).long() for name, value in arrays.items() if name != "ratings"}
    real = whole["segment"] > 0
    query = torch.tensor(query_items)
    return dataloader.Tasks(
        table=torch.arange(10),
        ratings=torch.from_numpy(arrays["ratings"]),
        known=real,
        support=real,
        times=real.long(),
        query_items=query,
        query_ratings=torch.zeros(len(query), dtype=torch.float64),
        query=torch.ones(len(query), dtype=torch.bool),
        query_weight=torch.ones(len(query)),
        part=torch.tensor(0),
        query_last=torch.tensor(rows[0][0] - 1 if rows[0] else -1),
        task=torch.tensor(0),
        **whole,
    )


def windows(values, tasks):
    """The parts of `values` (R, S, ...) that belong to each window, in order of length and place."""
    found = []
    for row, segment in zip(values, tasks.segment, strict=True):
        found += [row[segment == number] for number in range(1, int(segment.max()) + 1)]
    return sorted(found, key=len)
