"""Building blocks that the learners share. Everything has second derivatives.

Learners see two streams: histories (R, S, D), rows of one task's support windows, and queries (Q, D), candidate
next items. A query reads the history in row 0 and itself; nothing reads a query. So a prediction depends neither
on the other queries nor on their number, and a whole catalogue is scored in one pass.

All this holds for one task or, with a dimension T in front of every shape, for T tasks at once, each with parameters
of its own (T, ...) where it has been adapted: the inner loop of all tasks is one computation.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.kernels import Affine, Attend, GRUScan, Standardise


def history_mask(tasks, causal):
    """Which position (columns) each position (rows) may read: its own window, up to itself if causal. (R, S, S)"""
    same = tasks.segment[..., :, None] == tasks.segment[..., None, :]
    mask = same & (tasks.segment > 0)[..., None, :]
    return mask.tril() if causal else mask


def query_mask(tasks):
    """Which positions of row 0 the queries may read. (S,)"""
    return torch.arange(tasks.items.shape[-1], device=tasks.items.device) <= tasks.query_last[..., None]


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
    if table.dim() == 2:
        return F.embedding(places, table)
    first = torch.arange(len(table), device=places.device) * table.shape[1]
    return F.embedding(places + spread(first, places, 0), table.flatten(0, 1))


class Linear(nn.Linear):
    """A linear layer whose weights may be each task's own."""

    def forward(self, x):
        if self.weight.dim() == 2:
            return super().forward(x)
        return Affine.apply(x.flatten(1, -2), self.weight, self.bias).view(*x.shape[:-1], -1)


class Norm(nn.LayerNorm):
    """torch's layer norm, its weights perhaps each task's own."""

    def forward(self, x):
        return Standardise.apply(x, self.eps) * spread(self.weight, x) + spread(self.bias, x)


class Attention(nn.Module):
    """Multi-head attention of histories on their windows and of queries on row 0 and themselves.

    Written out, because the fused kernels have no second derivative.
    """

    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        self.project_in = Linear(hidden, 3 * hidden)
        self.project_out = Linear(hidden, hidden)

    def forward(self, x, hidden, to_history):
        """x (R S + Q, D) are the histories' positions and the queries, `hidden` (R, S, S) and `to_history` (S,) masks;
        the same shape as x."""
        rows, length = hidden.shape[-3:-1]
        n = rows * length
        projected = self.project_in(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0)  # (3, N, H, d)
        q, k, v = projected[..., :n, :, :].unflatten(-3, (rows, length)).movedim(-3, -1).contiguous().unbind()
        history = Attend.apply(q, k, v, hidden[..., None, :, :])  # (R, H, d, S)

        own_q, own_k, own_v = projected[..., n:, :, :].transpose(-2, -3).unbind()  # (H, Q, d)
        k, v, size = k.select(-4, 0), v.select(-4, 0), k.shape[-2]
        scores = torch.cat([own_q @ k, (own_q * own_k).sum(-1, keepdim=True)], -1) * size**-0.5
        weights = (scores + F.pad(to_history, (0, 1))[..., None, None, :]).softmax(-1)
        query = weights[..., :-1] @ v.transpose(-1, -2) + weights[..., -1:] * own_v
        history = history.movedim(-1, -3).flatten(-4, -3).flatten(-2)
        return self.project_out(torch.cat([history, query.transpose(-2, -3).flatten(-2)], -2))


def join(history, query):
    """Both streams, (R, S, D) and (Q, D), as one (R S + Q, D)."""
    return torch.cat([history.flatten(-3, -2), query], -2)


def part(x, like):
    """The two streams of `join`; `like` (R, S, ...) gives the rows."""
    n = like.shape[-2] * like.shape[-1]
    return x[..., :n, :].unflatten(-2, like.shape[-2:]), x[..., n:, :]


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

    def forward(self, history, query, tasks):
        """history (R, S, I), query (Q, I) -> states (R, S, D) and (Q, D); a query is one step after row 0's history."""
        gates, goes_on = self.input(history), continues(tasks)
        if self.state.weight.dim() == 2:  # one set of weights: the rows of all tasks are rows alike
            gates, goes_on = gates.flatten(0, -3), goes_on.flatten(0, -2)
        states = GRUScan.apply(gates, goes_on, self.state.weight, self.state.bias)
        states = states.view(*history.shape[:-1], -1)
        last = last_state(states, tasks)[..., None, :].expand(*query.shape[:-1], -1)
        return states, self.step(self.input(query), last)


def run_layers(layers, history, query, tasks):
    """Both streams through a stack of recurrent layers."""
    for layer in layers:
        history, query = layer(history, query, tasks)
    return history, query


def continues(tasks):
    """1 where a position continues the window of the position before it, else 0. (R, S)"""
    same = tasks.segment[..., 1:] == tasks.segment[..., :-1]
    return F.pad(same.to(tasks.ratings.dtype), (1, 0))


def last_state(states, tasks):
    """The state (D,) at the end of the queries' history, zero where there is none. states (R, S, D)"""
    at_last = torch.arange(states.shape[-2], device=states.device) == tasks.query_last[..., None]
    return (states.select(-3, 0) * at_last[..., None]).sum(-2)
