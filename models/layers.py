"""Building blocks that the encoders share. Everything has second derivatives.

An encoder sees two streams: histories (T, R, S, D), the items of the support's windows, and queries (T, Q, D), items to
rate next. A query reads the history in row 0 and itself; nothing reads a query. So a prediction depends on no other
query, and a whole catalogue can be scored part by part after the history was encoded once.

Each parameter is either shared by all tasks or, where it has been adapted, has a task dimension T in front: the inner
loop of all tasks is one computation. Queries (1, Q, D) stand for the same items in every task.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from models.recurrent import GRUScan

# -----------------------------------------------------------------------------
# masks


def history_mask(tasks, causal):
    """Which positions (columns) each position (rows) reads: those of its own window, if causal up to itself.

    (T, R, S, S); padding reads itself, because a softmax over nothing is not defined.
    """
    same = tasks.segment[..., :, None] == tasks.segment[..., None, :]
    mask = same & (tasks.segment > 0)[..., None, :]
    itself = torch.eye(same.shape[-1], dtype=torch.bool, device=same.device)
    return (mask.tril() if causal else mask) | itself


def query_mask(tasks):
    """Which positions of row 0 the queries read. (T, S)"""
    return torch.arange(tasks.items.shape[-1], device=tasks.items.device) < tasks.n_support[:, None]


def hide(mask, dtype):
    """0 where `mask` holds, else the lowest number: added to scores, it takes a place out of their softmax."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def continues(tasks):
    """1 where a position continues the window of the position before it, else 0. (T, R, S)"""
    same = tasks.segment[..., 1:] == tasks.segment[..., :-1]
    return F.pad(same.to(tasks.ratings.dtype), (1, 0))


# -----------------------------------------------------------------------------
# parameters that may have a task dimension


def broadcast_parameter(parameter, like, dims=1):
    """A parameter of `dims` dimensions, or one for each task (T, ...), shaped to broadcast against `like` (T, ...)."""
    if parameter.dim() == dims:
        return parameter
    return parameter.view(len(parameter), *(1,) * (like.dim() - dims - 1), *parameter.shape[1:])


MULTIPLIED = 256  # most rows of a table that a GPU looks up by a product


def is_multiplied(table):
    """Whether rows of a table are looked up by a product with one-hot vectors.

    On a GPU the derivative of `F.embedding` sorts the places, which takes ten times as long as two products.
    """
    return table.is_cuda and table.shape[-2] <= MULTIPLIED


def look_up(table, places):
    """Rows (T, ..., D) of a table (U, D), or of each task's own (T, U, D), at places (T, ...)."""
    if is_multiplied(table):
        one_hot = (places[..., None] == torch.arange(table.shape[-2], device=table.device)).to(table.dtype)
        if table.dim() == 2:
            return one_hot @ table
        return (one_hot.flatten(1, -2) @ table).view(len(table), *places.shape[1:], -1)
    if table.dim() == 2:
        return F.embedding(places, table)
    first = torch.arange(len(table), device=table.device) * table.shape[1]
    return F.embedding(places + first.view(-1, *(1,) * (places.dim() - 1)), table.flatten(0, 1))


def dot(x, weight):
    """Inner products (T, ...) of x (T, ..., D) with a weight (D,) or each task's own (T, D)."""
    if weight.dim() == 1:
        return x @ weight
    return torch.bmm(weight[:, None], x.flatten(1, -2).mT).view(x.shape[:-1])


class Linear(nn.Linear):
    """`nn.Linear`, whose weights may be each task's own."""

    def forward(self, x):
        if self.weight.dim() == 2:
            return super().forward(x)
        flat, weight = x.flatten(1, -2), self.weight.mT
        out = flat @ weight if self.bias is None else torch.baddbmm(self.bias[:, None], flat, weight)
        return out.view(*x.shape[:-1], -1)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`, whose weights may be each task's own."""

    def forward(self, x):
        if self.weight.dim() == 1:
            return super().forward(x)
        plain = Normalise.apply(x, self.eps)
        return torch.addcmul(broadcast_parameter(self.bias, x), plain, broadcast_parameter(self.weight, x))


class Normalise(Function):
    """`F.layer_norm` over the last dimension, without weights.

    Its second derivative is by hand: autograd's takes 46 operations, a fifth of all in a step of the published form.
    """

    @staticmethod
    def forward(ctx, x, eps):
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(x, y, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, gradient):
        return NormaliseBackward.apply(gradient, *ctx.saved_tensors), None


class NormaliseBackward(Function):
    """The derivative h = r (g - m(g) - y m(g y)) of y = r (x - m(x)), with means m over the last dimension."""

    @staticmethod
    def forward(ctx, gradient, x, y, mean, rstd):
        out = to_input(gradient, x, mean, rstd)
        ctx.save_for_backward(gradient, x, y, mean, rstd, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, v):
        gradient, x, y, mean, rstd, out = ctx.saved_tensors
        of_gradient, of_v, of_out = ((a * b).mean(-1, keepdim=True) for a, b in ((gradient, y), (v, y), (v, out)))
        to_y = (v * of_gradient).addcmul_(gradient, of_v).mul_(-rstd)
        to_x = to_input(to_y, x, mean, rstd).addcmul_(y, of_out * rstd, value=-1)  # by way of y, and by way of r
        return to_input(v, x, mean, rstd), to_x, None, None, None


def to_input(gradient, x, mean, rstd):
    """The derivative of `Normalise` times a gradient, both (..., D)."""
    wanted = True, False, False
    return torch.ops.aten.native_layer_norm_backward(gradient, x, x.shape[-1:], mean, rstd, None, None, wanted)[0]


# -----------------------------------------------------------------------------
# attention and recurrence


class Attention(nn.Module):
    """Multi-head attention of histories on their windows, and of queries on row 0 and themselves.

    It is written out because the fused kernels have no second derivative.
    """

    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        self.project_in = Linear(hidden, 3 * hidden)
        self.project_out = Linear(hidden, hidden)

    def project(self, x):
        """Queries, scaled keys and values (T, ..., H, N, d) of x (T, ..., N, D)."""
        q, k, v = self.project_in(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        return q, k * k.shape[-1] ** -0.5, v

    def forward(self, x, hidden):
        """Histories x (T, R, S, D) under the mask `hidden` (T, R, S, S): (the same shape, row 0's keys and values)."""
        q, k, v = self.project(x)  # (T, R, H, S, d)
        weights = (q @ k.mT + hidden[:, :, None]).softmax(-1)
        out = (weights @ v).transpose(-3, -2).flatten(-2)
        return self.project_out(out), (k[:, 0], v[:, 0])

    def encode_query(self, x, memory, hidden):
        """Queries x (T, Q, D) on the keys and values of row 0 under the mask `hidden` (T, S), and on themselves."""
        (q, own_k, own_v), (k, v) = self.project(x), memory  # (T, H, Q, d) and (T, H, S, d)
        scores = q @ k.mT + hidden[:, None, None]
        own = (q * own_k).sum(-1, keepdim=True).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, own], -1).softmax(-1)
        out = weights[..., :-1] @ v + weights[..., -1:] * own_v
        return self.project_out(out.transpose(-3, -2).flatten(-2))


class GRU(nn.Module):
    """A gated recurrent unit over packed rows, with torch's equations and parameter layout.

    `nn.GRU` has no weights for each task, and cuDNN's has no second derivative. The inputs are projected for all steps
    at once. The state is reset where a window starts.
    """

    def __init__(self, inputs, hidden):
        super().__init__()
        self.input = Linear(inputs, 3 * hidden)
        self.state = Linear(hidden, 3 * hidden)
        bound = hidden**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x, tasks):
        """Histories x (T, R, S, I) -> states (T, R, S, D)."""
        return scan([self], [x], tasks)[0]

    def step(self, x, state):
        """One step of queries x (T, Q, I) from the state (T, 1, D) before it: (T, Q, D)."""
        first, new_x = self.input(x).tensor_split([2 * state.shape[-1]], -1)
        gates, new_h = self.state(state).tensor_split([2 * state.shape[-1]], -1)
        reset, update = torch.sigmoid(first + gates).chunk(2, -1)
        new = torch.tanh(new_x + reset * new_h)
        return new + update * (state - new)


def scan(grus, inputs, tasks):
    """Histories (T, R, S, I) through `GRU`s of one size, each with an input of its own: states (T, R, S, D) of each.

    All are one recurrence, because the number of operations is what it costs.
    """
    gates, goes_on = [gru.input(x) for gru, x in zip(grus, inputs, strict=True)], continues(tasks)
    shape, dim = gates[0].shape, 1
    if grus[0].state.weight.dim() == 2:  # rows of all tasks are alike
        gates, goes_on, dim = [gate.flatten(0, 1) for gate in gates], goes_on.flatten(0, 1), 0
    weights = [[gru.state.weight for gru in grus], [gru.state.bias for gru in grus]]
    if len(grus) == 1:
        states = [GRUScan.apply(gates[0], goes_on, *(each[0] for each in weights))]
    else:
        gates, weight, bias = (torch.stack(each, dim) for each in (gates, *weights))
        states = GRUScan.apply(gates, goes_on.unsqueeze(dim), weight, bias).unbind(dim)
    return [state.view(*shape[:-1], -1) for state in states]


def encode_history(stacks, x, tasks):
    """Histories x (T, R, S, D) through stacks of `GRU`s, all of as many layers.

    For each stack: (states, each layer's state after row 0's history).
    """
    at_last = torch.arange(x.shape[2], device=x.device) == tasks.n_support[:, None] - 1  # nowhere without a history
    states, last = [x] * len(stacks), []
    for layers in zip(*stacks, strict=True):
        states = scan(layers, states, tasks)
        last.append([(state[:, 0] * at_last[..., None]).sum(1, keepdim=True) for state in states])
    return list(zip(states, zip(*last, strict=True), strict=True))


def encode_query(layers, x, last):
    """Queries x (T, Q, D) through a stack of `GRU`s, each one step after row 0's history: states (T, Q, D)."""
    for layer, state in zip(layers, last, strict=True):
        x = layer.step(x, state)
    return x
