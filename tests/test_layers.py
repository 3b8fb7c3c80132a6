"""The layers equal torch's own modules, whatever the layout of the windows, also with weights for each task."""

import pytest
import torch
import torch.nn.functional as F
from tiny import jitter, lay_out, options, random, training_tasks, windows
from torch import nn
from torch.func import functional_call

from models import bert4rec, layers, sasrec
from models.recurrent import LSTMScan

WIDTH, HEADS, LENGTH = 8, 2, 6


def joint_mask(length, queries, causal):
    """What torch must not read if queries stand behind the window, each alone; True = hidden."""
    n = length + queries
    reads = torch.zeros(n, n, dtype=torch.bool)
    reads[:, :length] = True
    if causal:
        reads = reads.tril()
    return ~(reads | torch.eye(n, dtype=torch.bool))


def copy(parts, target):
    """Copy the weights and biases of our modules to torch's parameters, by position."""
    ours = [tensor for part in parts for tensor in (part.weight, part.bias)]
    with torch.no_grad():
        for mine, theirs in zip(ours, target, strict=True):
            theirs.copy_(mine)


def block_parts(block, torchs, first, second):
    """Hand our block's weights to nn.TransformerEncoderLayer."""
    inside = torchs.self_attn
    weights = [inside.in_proj_weight, inside.in_proj_bias]
    for part in (inside.out_proj, torchs.linear1, torchs.linear2, torchs.norm1, torchs.norm2):
        weights += [part.weight, part.bias]
    copy((block.attention.project_in, block.attention.project_out, first, second, block.norm1, block.norm2), weights)
    return torchs


def attend(attention, history, query, tasks, causal, before=lambda x: x):
    """What an attention gives for histories (T, R, S, D) and queries (T, Q, D), each first handed to `before`."""
    masks = layers.history_mask(tasks, causal), layers.query_mask(tasks)
    hidden, to_history = (layers.hide(mask, history.dtype) for mask in masks)
    of_history, memory = attention(before(history), hidden)
    return of_history, attention.encode_query(before(query), memory, to_history)


def check_attention(ours, theirs, causal):
    """Ours on a window and queries equals torch's on the window with the queries behind it."""
    tasks = lay_out([[LENGTH]], width=LENGTH + 2)
    history, query = random(1, 1, LENGTH + 2, WIDTH), random(1, 3, WIDTH, seed=1)
    of_history, of_query = ours(history, query, tasks)
    expected = theirs(torch.cat([history[0, :, :LENGTH], query], 1), joint_mask(LENGTH, 3, causal))
    torch.testing.assert_close(torch.cat([of_history[0, :, :LENGTH], of_query], 1), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_torch(causal):
    ours = jitter(layers.Attention(WIDTH, HEADS))
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    out = theirs.out_proj
    copy((ours.project_in, ours.project_out), [theirs.in_proj_weight, theirs.in_proj_bias, out.weight, out.bias])
    check_attention(
        lambda *given: attend(ours, *given, causal),
        lambda x, mask: theirs(x, x, x, attn_mask=mask, need_weights=False)[0],
        causal,
    )


def check_block(block, theirs, causal, before=lambda x: x):
    def ours(history, query, tasks):
        attended = attend(block.attention, history, query, tasks, causal, before)
        return [block(x, more) for x, more in zip((history, query), attended, strict=True)]

    check_attention(ours, lambda x, mask: theirs(x, src_mask=mask), causal)


def test_bert_block_equals_torch():
    block = jitter(bert4rec.Block(WIDTH, HEADS))
    theirs = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True).double()
    check_block(block, block_parts(block, theirs, block.widen, block.narrow), causal=False)


def test_sasrec_block_equals_torch():
    block = jitter(sasrec.Block(WIDTH, HEADS))
    theirs = nn.TransformerEncoderLayer(WIDTH, HEADS, WIDTH, 0.0, "relu", batch_first=True, norm_first=True).double()
    check_block(block, block_parts(block, theirs, block.first, block.second), True, block.norm1)


def test_stacked_grus_equal_torch():
    ours = [jitter(layers.GRU(WIDTH, WIDTH), seed) for seed in (0, 1)]
    theirs = nn.GRU(WIDTH, WIDTH, 2, batch_first=True).double()
    order = "weight_ih_l{0} bias_ih_l{0} weight_hh_l{0} bias_hh_l{0}"
    names = " ".join(order.format(layer) for layer in (0, 1)).split()
    copy([part for gru in ours for part in (gru.input, gru.state)], [getattr(theirs, name) for name in names])
    tasks = lay_out([[LENGTH]], width=LENGTH + 2)
    history, query = random(1, 1, LENGTH + 2, WIDTH), random(1, 3, WIDTH, seed=1)
    [(states, last)] = layers.encode_history([ours], history, tasks)
    after = layers.encode_query(ours, query, last)
    torch.testing.assert_close(states[0, :, :LENGTH], theirs(history[0, :, :LENGTH])[0])
    for place in range(3):
        longer = torch.cat([history[0, :, :LENGTH], query[:, place : place + 1]], 1)
        torch.testing.assert_close(after[:, place], theirs(longer)[0][:, -1])


def test_lstm_equals_torch():
    weight, bias, start = random(4 * WIDTH, 3 + WIDTH), random(4 * WIDTH), random(2, WIDTH, seed=1)
    theirs = nn.LSTM(3, WIDTH, batch_first=True).double()
    state = {"weight_ih_l0": weight[:, :3], "weight_hh_l0": weight[:, 3:], "bias_ih_l0": bias}
    theirs.load_state_dict({**state, "bias_hh_l0": torch.zeros_like(bias)})
    inputs = random(1, 1, LENGTH, 3)
    expected = theirs(inputs[0], tuple(start[:, None, None]))[0]
    states = LSTMScan.apply(inputs, layers.continues(lay_out([[LENGTH]])), weight, bias, start)
    torch.testing.assert_close(states[0], expected)


PACKED, ALONE = lay_out([[5], [3, 2], [4, 1]], width=6), lay_out([[5], [4], [3], [2], [1]], width=9)


def by_window(function):
    """What `function(inputs, tasks)` (1, R, S, ...) gives each window, packed and alone; inputs hang on the items."""
    table = random(10, WIDTH, seed=2)
    return [windows(function(F.embedding(tasks.items, table), tasks), tasks) for tasks in (PACKED, ALONE)]


@pytest.mark.parametrize("causal", [True, False])
def test_attention_ignores_layout(causal):
    attention, query = jitter(layers.Attention(WIDTH, HEADS)), random(1, 1, WIDTH)
    torch.testing.assert_close(*by_window(lambda x, tasks: attend(attention, x, query, tasks, causal)[0]))


def test_recurrences_ignore_layout():
    gru, lstm = jitter(layers.GRU(WIDTH, WIDTH)), (random(4 * WIDTH, 2 * WIDTH), random(4 * WIDTH), random(2, WIDTH))
    torch.testing.assert_close(*by_window(gru))
    torch.testing.assert_close(*by_window(lambda x, tasks: LSTMScan.apply(x, layers.continues(tasks), *lstm)))


def test_windows_of_one_row_do_not_continue_each_other():
    assert layers.continues(lay_out([[2, 3, 1]])).tolist() == [[[0, 1, 0, 1, 1, 0]]]


def test_query_without_history_is_a_first_step():
    gru, query = jitter(layers.GRU(WIDTH, WIDTH)), random(1, 2, WIDTH)
    tasks = lay_out([[LENGTH]])._replace(n_support=torch.tensor([0]))
    after = layers.encode_query([gru], query, layers.encode_history([[gru]], random(1, 1, LENGTH, WIDTH), tasks)[0][1])
    torch.testing.assert_close(after, gru.step(query, torch.zeros(1, 1, WIDTH, dtype=torch.float64)))


# -----------------------------------------------------------------------------
# weights for each task


class Step(layers.GRU):
    forward = layers.GRU.step


class Attended(layers.Attention):
    """Histories and queries at once."""

    def forward(self, history, query, hidden, to_history):
        of_history, memory = super().forward(history, hidden)
        return torch.cat([of_history.flatten(1, 2), self.encode_query(query, memory, to_history)], 1)


def own_weights():
    """(module, its arguments, each with a task dimension, torch's module or None)"""
    tasks = training_tasks(options())
    n, rows, width = tasks.items.shape
    x, query = random(n, rows, width, WIDTH), random(n, 4, WIDTH)
    yield layers.Linear(WIDTH, 6), (x,), nn.Linear(WIDTH, 6)
    yield layers.Linear(WIDTH, 6, bias=False), (x,), nn.Linear(WIDTH, 6, bias=False)
    yield layers.LayerNorm(WIDTH), (x,), nn.LayerNorm(WIDTH)
    yield layers.GRU(WIDTH, WIDTH), (x, tasks), None
    yield Step(WIDTH, WIDTH), (query, random(n, 1, WIDTH)), None
    hidden = layers.hide(layers.history_mask(tasks, True), x.dtype), layers.hide(layers.query_mask(tasks), x.dtype)
    yield Attended(WIDTH, HEADS), (x, query, *hidden), None


@pytest.mark.parametrize(("module", "given", "torchs"), list(own_weights()))
def test_weights_for_each_task_equal_a_loop_over_tasks(module, given, torchs):
    own = {name: random(len(given[0]), *value.shape, seed=1) for name, value in module.named_parameters()}
    together = functional_call(module, own, given)
    for t in range(len(given[0])):
        part = slice(t, t + 1)
        arguments = tuple(value[part] if isinstance(value, torch.Tensor) else value.take(part) for value in given)
        weights = {name: value[t] for name, value in own.items()}
        torch.testing.assert_close(together[part], functional_call(module, weights, arguments))
        if torchs is not None:
            torch.testing.assert_close(together[part], functional_call(torchs, weights, arguments))


@pytest.mark.parametrize("on_gpu", [True, False])
def test_dots_and_rows_take_weights_for_each_task(on_gpu, monkeypatch):
    monkeypatch.setattr(layers, "is_multiplied", lambda table: on_gpu)
    x, weights = random(3, 4, 5, WIDTH), random(3, WIDTH, seed=1)
    torch.testing.assert_close(layers.dot(x, weights), torch.einsum("trsd,td->trs", x, weights))
    torch.testing.assert_close(layers.dot(x, weights[0]), x @ weights[0])
    tables, places = random(3, 7, WIDTH), torch.randint(7, (3, 4, 5), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([F.embedding(*pair) for pair in zip(places, tables, strict=True)])
    assert torch.equal(layers.look_up(tables, places), expected)
    assert torch.equal(layers.look_up(tables, places[:1]), layers.look_up(tables, places[:1].expand(3, -1, -1)))
    assert torch.equal(layers.look_up(tables[0], places), F.embedding(places, tables[0]))


@pytest.mark.parametrize("shape", [(5, WIDTH), (4, 5, WIDTH)])
def test_parameters_broadcast_against_any_shape(shape):
    own = random(3, WIDTH)
    expected = torch.stack([torch.zeros(shape, dtype=torch.float64) + value for value in own])
    torch.testing.assert_close(layers.broadcast_parameter(own, expected) + torch.zeros_like(expected), expected)


def test_normalising_has_the_first_and_second_derivatives_of_torchs():
    x, gradient, v = (random(3, 4, WIDTH, seed=seed).requires_grad_() for seed in range(3))
    found = []
    for function in (lambda x: layers.Normalise.apply(x, 1e-5), lambda x: F.layer_norm(x, (WIDTH,))):
        y = function(x)
        [first] = torch.autograd.grad(y, x, gradient, create_graph=True)
        found.append([y, first, *torch.autograd.grad(first.square(), (x, gradient), v)])
    torch.testing.assert_close(*found)
    torch.autograd.gradgradcheck(lambda x: layers.Normalise.apply(x, 1e-5), x)
