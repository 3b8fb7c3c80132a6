"""Building blocks that the learners share. Everything has second derivatives.

Learners see two streams: histories (R, S, D), rows of one task's support windows, and queries (Q, D), candidate
next items. A query reads the history in row 0 and itself; nothing reads a query. So a prediction depends neither
on the other queries nor on their number: histories are read once, and then a whole catalogue may ask, part by part.

All this holds for one task or, with a dimension T in front of every shape, for T tasks at once, each with parameters
of its own (T, ...) where it has been adapted: the inner loop of all tasks is one computation. Queries that are the
same for all tasks may lack the dimension T; what does not depend on the history is then computed once for all.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models import kernels
from models.kernels import Affine, Attend, GRUScan, SplitHeads


def history_mask(tasks, causal):
    """Which position (columns) each position (rows) may read: itself and the ratings of its own window, if causal
    those before it. (R, S, S)"""
    same = tasks.segment[..., :, None] == tasks.segment[..., None, :]
    mask = same & (tasks.position > 0)[..., None, :]
    itself = torch.eye(same.shape[-1], dtype=torch.bool, device=same.device) & (tasks.segment > 0)[..., None]
    return (mask.tril() if causal else mask) | itself


def query_mask(tasks):
    """Which positions of row 0 the queries may read. (S,)"""
    return torch.arange(tasks.items.shape[-1], device=tasks.items.device) <= tasks.query_last[..., None]


def append_queries(tasks):
    """Tasks of one row with their queries as further positions of it, which read its first window and themselves."""
    first = torch.ones_like(tasks.query_items)
    more = {"items": tasks.query_items, "segment": first, "position": first - 1}
    longer = {name: torch.cat([getattr(tasks, name), values[..., None, :]], -1) for name, values in more.items()}
    return tasks._replace(**longer)


def hide(mask, dtype):
    """0 where `mask` holds, else the lowest number: what is added to scores to leave a place out."""
    return (~mask).to(dtype) * torch.finfo(dtype).min


def spread(parameter, like, dims=1):
    """A parameter of `dims` dimensions, or one for each task, so that it broadcasts against `like`."""
    if parameter.dim() == dims:
        return parameter
    return parameter.reshape(len(parameter), *(1,) * (like.dim() - dims - 1), *parameter.shape[1:])


def look_up(table, places):
    """Rows (..., D) of a table (U, D) or of one for each task (T, U, D) at places of the shape (...) or (T, ...)."""
    return look_up_all({"": table}, places)[""]


def look_up_all(tables, places):
    """`look_up` in tables {name: (U, D) or (T, U, D)} that have the same rows: {name: (..., D)}."""
    first = next(iter(tables.values()))
    if first.dim() == 3:
        start = torch.arange(len(first), device=places.device) * first.shape[1]
        places = places + spread(start, places, 0)
    shape, places = places.shape, places.flatten()
    # The derivative of index_select takes a quarter of an embedding's time.
    return {name: table.flatten(0, -2).index_select(0, places).view(*shape, -1) for name, table in tables.items()}


def of_blocks(values, tasks):
    """Values (T, ...) of the tasks for each of their blocks: (B, ...)."""
    return values if has_one_block(tasks) else values.index_select(0, tasks.task)


def of_tasks(values, tasks):
    """The sums of values (B, ...) over the blocks of each task: (T, ...)."""
    if has_one_block(tasks):
        return values
    return values.new_zeros(len(tasks.table), *values.shape[1:]).index_add(0, tasks.task, values)


def over_task(values, tasks, dims=(-2, -1)):
    """Sums over all positions of a task, for each of its blocks: values (B, R, S), say, -> (B, 1, 1)."""
    return of_blocks(of_tasks(values.sum(dims, keepdim=True), tasks), tasks)


def has_one_block(tasks):
    """Whether no task has more than one block."""
    return tasks.task.dim() == 0 or len(tasks.task) == len(tasks.table)


class Linear(nn.Linear):
    """A linear layer whose weights may be each task's own."""

    def forward(self, x):
        if self.weight.dim() == 2:
            return super().forward(x)
        return Affine.apply(x, self.weight, self.bias, False)

    def across(self, x):
        """The same with positions last and without the bias: x (..., N, I) -> (..., O, N)."""
        lead = self.weight.dim() - 2
        out = Affine.apply(x, self.weight, None, True) if lead else self.weight @ x.flatten(0, -2).T
        return out.unflatten(-1, x.shape[lead:-1]).movedim(lead, -2)


class Norm(nn.LayerNorm):
    """torch's layer norm; by hand where its weights are each task's own."""

    def forward(self, x):
        if self.weight.dim() == 1:
            return super().forward(x)
        return kernels.Norm.apply(x, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Multi-head attention of histories on their windows and of queries on row 0 and themselves.

    Written out, because the fused kernels have no second derivative.
    """

    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        self.project_in = Linear(hidden, 3 * hidden)
        self.project_out = Linear(hidden, hidden)
        self.project_in.bias.register_hook(without_keys)

    def forward(self, x, hidden):
        """Histories x (R, S, D) under the mask `hidden` (R, S, S) -> (the same shape, what `ask` reads of row 0)."""
        q, k, v = self.project(x)
        out = self.by_row(Attend.apply(q, k, v, hidden), x).movedim(-1, -3).flatten(-2)
        past = tuple(self.by_row(part, x).select(-4, 0) for part in (k, v))
        return self.project_out(out.contiguous()), past  # copied once, not in each product

    def ask(self, x, past, hidden):
        """Queries x (Q, D) on the keys and values `past` (H, d, S) under the mask `hidden` (S,) and on themselves."""
        (q, own_k, own_v), (k, v) = (self.by_row(part, x) for part in self.project(x)), past  # (H, d, Q)
        scale = q.shape[-2] ** -0.5
        scores = (k * scale).transpose(-1, -2) @ q
        own = ((q * own_k).sum(-2, keepdim=True) * scale).expand(*scores.shape[:-2], 1, -1)
        scores = torch.cat([scores, own], -2).add_(F.pad(hidden, (0, 1))[..., None, :, None])
        weights = scores.softmax(-2)
        out = torch.addcmul(v @ weights[..., :-1, :], weights[..., -1:, :], own_v)
        return self.project_out(out.flatten(-3, -2).transpose(-1, -2))

    def project(self, x):
        """Queries, keys and values (... H, d, N) of x (..., N, D); for why positions come last see `Attend`."""
        return SplitHeads.apply(self.project_in.across(x), self.project_in.bias, self.heads)

    def by_row(self, part, x):
        """What `project` or `Attend` gives for x (..., N, D), by row and head: (..., H, d, N)."""
        return part.view(*x.shape[:-2], self.heads, *part.shape[1:])


def without_keys(slope):
    """The gradient (3 D,) of the bias of queries, keys and values, 0 for the keys.

    The softmax cancels what all keys have in common, so theirs would be rounding errors, which Adam makes large.
    """
    query, key, value = slope.chunk(3)
    return torch.cat([query, torch.zeros_like(key), value])


class GRU(nn.Module):
    """A gated recurrent unit over packed rows, with torch's equations and parameter layout.

    Not `nn.GRU`: its weights cannot be each task's own, and cuDNN's has no second derivative. The input
    projection is done for all steps at once; the state is reset where a window starts.
    """

    def __init__(self, inputs, hidden):
        super().__init__()
        self.input = Linear(inputs, 3 * hidden)
        self.state = Linear(hidden, 3 * hidden)
        bound = hidden**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def step(self, gates, state):
        """One step from projected inputs (..., 3 D) and the state before it (..., D)."""
        both, new_x = gates.split([2 * state.shape[-1], state.shape[-1]], -1)
        both_h, new_h = self.state(state).split([2 * state.shape[-1], state.shape[-1]], -1)
        reset, update = torch.sigmoid(both + both_h).chunk(2, -1)
        new = torch.tanh(new_x + reset * new_h)
        return new + update * (state - new)

    def forward(self, x, tasks):
        """Histories x (R, S, I) -> states (R, S, D)."""
        gates, goes_on = self.input(x), continues(tasks)
        if self.state.weight.dim() == 2:  # one set of weights: the rows of all tasks are rows alike
            gates, goes_on = gates.flatten(0, -3), goes_on.flatten(0, -2)
        return GRUScan.apply(gates, goes_on, self.state.weight, self.state.bias).view(*x.shape[:-1], -1)


def read_layers(layers, x, tasks):
    """Histories through a stack of recurrent layers: (states (R, S, D), what `ask_layers` needs, each layer's last)."""
    last = []
    for layer in layers:
        x = layer(x, tasks)
        last.append(last_state(x, tasks)[..., None, :])
    return x, tuple(last)


def ask_layers(layers, x, last):
    """Queries through the stack, each one step after row 0's history: states (Q, D)."""
    for layer, state in zip(layers, last, strict=True):
        x = layer.step(layer.input(x), state)
    return x


def continues(tasks):
    """1 where a position continues the window of the position before it, else 0. (R, S)"""
    same = tasks.segment[..., 1:] == tasks.segment[..., :-1]
    return F.pad(same.to(tasks.ratings.dtype), (1, 0))


def last_state(states, tasks):
    """The state (D,) at the end of the queries' history, zero where there is none. states (R, S, D)"""
    at_last = torch.arange(states.shape[-2], device=states.device) == tasks.query_last[..., None]
    return (states.select(-3, 0) * at_last[..., None]).sum(-2)
