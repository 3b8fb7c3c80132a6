"""Attention over earlier errors: against a plain loop, and with weights for each task."""

import math

import tiny
import torch
from torch.func import functional_call

from models.error_attention import HEADS, ErrorAttention
from models.learner import Learner, apply, length, look_up_all, trust

WIDTH, FACTORS = 8, 3


def item_tables(*lead):
    return {"item_embedding": tiny.random(*lead, 10, WIDTH), "item_factor": tiny.random(*lead, 10, FACTORS, seed=1)}


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
    return torch.tensor(total, dtype=torch.float64)


class Both(ErrorAttention):
    """Weights of positions (T, R, S, S) and of queries (T, Q, S)."""

    def forward(self, tasks, tables):
        of_support, memory = self.encode_history(look_up_all(tables, tasks.items), tasks)
        return of_support, self.encode_query(look_up_all(tables, tasks.query_items), memory)


def test_weights_equal_a_loop_over_pairs():
    attention, tables = tiny.jitter(Both(WIDTH, FACTORS, 7)), item_tables()
    tasks = tiny.lay_out([[5], [3, 2]], width=6, query_items=(3, 9))
    of_support, of_query = attention(tasks, tables)
    expected = torch.zeros_like(of_support)
    for r, segments in enumerate(tasks.segment[0].tolist()):
        for i, segment in enumerate(segments):
            places = [j for j in range(i) if segments[j] == segment and segment]
            earlier = [(int(tasks.items[0, r, j]), i - j) for j in places]
            expected[0, r, i, places] = by_hand(attention, int(tasks.items[0, r, i]), earlier, tables)
    torch.testing.assert_close(of_support, expected)
    whole = [(int(item), 5 - j) for j, item in enumerate(tasks.items[0, 0, :5])]
    for item, found in zip(tasks.query_items[0].tolist(), of_query[0], strict=True):
        torch.testing.assert_close(found[:5], by_hand(attention, item, whole, tables))
        assert not found[5:].any()


def test_an_age_beyond_all_windows_is_the_oldest():
    attention = tiny.jitter(Both(WIDTH, FACTORS, 3))
    assert attention.offset(torch.tensor([[3, 9]]), torch.tensor([[True, True]])).diff().abs().max() == 0


def test_the_errors_of_the_predictions_without_them_are_added():
    learner = tiny.jitter(Learner(9, tiny.options(model="sasrec")))
    tasks, tables = tiny.lay_out([[4], [2, 1]], query_items=(3, 5)), learner.tables()
    rows, query_rows = look_up_all(tables, tasks.items), look_up_all(tables, tasks.query_items)
    states, memory = learner.encoder.encode_history(rows["item_embedding"], tasks)
    choices = learner.head.choices(tasks, rows)
    support = learner.head(states, rows, choices[:, None, None])
    states = trust(learner.encoder.encode_query(query_rows["item_embedding"], memory), length(tasks))
    shift = choices[:, None] + learner.head.lean(length(tasks), query_rows)
    query = learner.head(states, query_rows, shift)
    weights, of_errors = learner.errors.encode_history(rows, tasks)
    error = torch.where(tasks.segment > 0, tasks.ratings - support, 0.0)
    found = learner.predict(tasks, tables)
    torch.testing.assert_close(found[0], support + torch.einsum("trij,trj->tri", weights, error))
    of_query = learner.errors.encode_query(query_rows, of_errors)
    torch.testing.assert_close(found[1], query + torch.einsum("tqj,tj->tq", of_query, error[:, 0]))
    torch.testing.assert_close(apply(of_query, error[:, 0]), found[1] - query)


def test_weights_for_each_task_equal_a_loop_over_tasks():
    attention, tasks = tiny.jitter(Both(WIDTH, FACTORS, 7)), tiny.training_tasks(tiny.options())
    n, tables = len(tasks.table), item_tables(len(tasks.table))
    own = {name: tiny.random(n, *value.shape, seed=1) for name, value in attention.named_parameters()}
    assert own["gain"].shape == (n, HEADS)
    together = functional_call(attention, own, (tasks, tables))
    for t, task in enumerate(tiny.single(tasks)):
        weights, rows = ({name: value[t] for name, value in values.items()} for values in (own, tables))
        alone = functional_call(attention, weights, (task, rows))
        torch.testing.assert_close([whole[t] for whole in together], [one[0] for one in alone])
