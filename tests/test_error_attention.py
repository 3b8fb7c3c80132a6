"""Attention over earlier errors: against a plain loop, its start, and each task's own weights."""

import math

import pytest
import tiny
import torch
from torch.func import functional_call

from models.error_attention import ErrorAttention, add_errors, errors
from models.layers import look_up_all
from models.learner import Learner

WIDTH = 8


def build(heads=3):
    """(jittered attention, options, item tables in double precision)"""
    options = tiny.options(error_heads=heads)
    generator = torch.Generator().manual_seed(2)
    tables = {
        name: torch.randn(10, width, generator=generator, dtype=torch.float64)
        for name, width in (("item_embedding", WIDTH), ("item_factor", options.num_factors))
    }
    return tiny.jitter(ErrorAttention(options, WIDTH)), options, tables


@torch.no_grad()
def by_hand(attention, item, earlier, tables):
    """Weights of earlier items, a list of (item, how long ago), for one item."""
    row = torch.cat(list(tables.values()), -1)
    total = [0.0] * len(earlier)
    for head, gain in enumerate(attention.gain.tolist()):
        sizes = [
            math.exp(attention.by_age[age, head] + (row[item] * attention.likeness[head] * row[other]).sum())
            for other, age in earlier
        ]
        whole = sum(sizes) + math.exp(attention.rest[head])
        total = [weight + gain * size / whole for weight, size in zip(total, sizes, strict=True)]
    return total


class Both(torch.nn.Module):
    """Weights of positions and of queries."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, tasks, tables):
        of_row, past = self.attention(tasks, look_up_all(tables, tasks.items))
        return of_row, self.attention.ask(look_up_all(tables, tasks.query_items), past)


def test_weights_equal_a_loop_over_pairs():
    attention, _, tables = build()
    tasks = tiny.lay_out([[5], [3, 2]], width=6, query_items=(3, 9))
    of_row, of_query = Both(attention)(tasks, tables)
    expected = torch.zeros_like(of_row)
    for r, segments in enumerate(tasks.segment.tolist()):
        for i, segment in enumerate(segments):
            places = [j for j in range(i) if segments[j] == segment and segment]
            earlier = [(int(tasks.items[r, j]), i - j) for j in places]
            weights = by_hand(attention, int(tasks.items[r, i]), earlier, tables)
            expected[r, i, places] = torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(of_row, expected)
    whole = [(int(item), 5 - j) for j, item in enumerate(tasks.items[0, :5])]
    for item, found in zip(tasks.query_items.tolist(), of_query, strict=True):
        expected = torch.tensor(by_hand(attention, item, whole, tables), dtype=torch.float64)
        torch.testing.assert_close(found[:5], expected)
        assert not found[5:].any()


def test_known_errors_alone_are_added():
    tasks = tiny.lay_out([[4]], query_items=(3,))
    tasks = tasks._replace(known=torch.tensor([[True, True, False, True]]))
    history, query = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, dtype=torch.float64)
    weights = torch.rand(1, 4, 4, dtype=torch.float64).tril(-1), torch.rand(1, 4, dtype=torch.float64)
    error = (tasks.ratings - history)[0] * torch.tensor([1, 1, 0, 1])
    found = errors(history, tasks)
    found = add_errors(history, weights[0], found), add_errors(query, weights[1], found[0])
    torch.testing.assert_close(found[0][0], history[0] + weights[0][0] @ error)
    torch.testing.assert_close(found[1], query + weights[1] @ error)


def test_a_batch_with_weights_of_each_task_equals_the_tasks_alone():
    attention, options, _ = build()
    attention = Both(attention)
    tasks = tiny.training_tasks(options)
    tables = Learner(40, options).double()
    rows = {name: tables.rows(name, tasks) for name in ("item_embedding", "item_factor")}
    own = {
        name: torch.stack([value + 0.1 * t for t in range(len(tasks.table))])
        for name, value in attention.named_parameters()
    }
    together = functional_call(attention, own, (tasks, rows))
    for t, task in enumerate(zip(*tasks, strict=True)):
        given = {name: value[t] for name, value in own.items()}
        alone = functional_call(attention, given, (type(tasks)(*task), {name: row[t] for name, row in rows.items()}))
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[t], part)


@pytest.mark.parametrize("model", tiny.LEARNERS)
def test_a_learner_reads_earlier_ratings_through_errors_alone(model):
    tasks = tiny.lay_out([[6]], query_items=(3,))
    for heads in (0, 2):
        options = tiny.options(model=model, error_heads=heads)
        learner = tiny.jitter(Learner(9, options))
        rows = {name: learner.get_parameter(name) for name in learner.table_names()}

        def history(ratings, learner=learner, rows=rows):
            return learner.predict(tasks._replace(ratings=ratings), rows)[0][0]

        reads = torch.autograd.functional.jacobian(history, tasks.ratings)[:, 0].abs() > 1e-12
        assert torch.equal(reads, torch.full((6, 6), heads > 0).tril(-1))
