"""The layers equal torch's own modules, whatever the layout of the windows."""

import pytest
import torch
import torch.nn.functional as F
from tiny import jitter, lay_out, windows
from torch import nn
from torch.func import functional_call

from models import bert4rec, layers, sasrec
from models.kernels import LSTMScan

WIDTH, HEADS, LENGTH = 8, 2, 6


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def joint_mask(length, queries, causal):
    """What torch must not read if queries stand behind the window, each alone; True = hidden."""
    n = length + queries
    reads = torch.zeros(n, n, dtype=torch.bool)
    reads[:, :length] = True
    if causal:
        reads = reads.tril()
    return ~(reads | torch.eye(n, dtype=torch.bool))


def copy(source, target):
    """Copy weights and biases by position: our module's parameters (listed) to torch's."""
    with torch.no_grad():
        for ours, theirs in zip(source, target, strict=True):
            theirs.copy_(ours)


def block_parts(block, torchs, first, second):
    """Hand our block's weights to nn.TransformerEncoderLayer."""
    parts = (block.attention.project_in, block.attention.project_out, first, second, block.norm1, block.norm2)
    inside = torchs.self_attn
    weights = [inside.in_proj_weight, inside.in_proj_bias]
    for part in (inside.out_proj, torchs.linear1, torchs.linear2, torchs.norm1, torchs.norm2):
        weights += [part.weight, part.bias]
    copy([tensor for part in parts for tensor in (part.weight, part.bias)], weights)
    return torchs


def streams(attention, history, query, tasks, causal, before=lambda x: x):
    """What an attention gives for histories (R, S, D) and queries (Q, D), each first handed to `before`."""
    masks = layers.history_mask(tasks, causal), layers.query_mask(tasks)
    hidden, to_history = (layers.hide(mask, history.dtype) for mask in masks)
    of_history, past = attention(before(history), hidden)
    return of_history, attention.ask(before(query), past, to_history)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_torch(causal):
    ours = jitter(layers.Attention(WIDTH, HEADS))
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    mine = [ours.project_in.weight, ours.project_in.bias, ours.project_out.weight, ours.project_out.bias]
    copy(mine, [theirs.in_proj_weight, theirs.in_proj_bias, theirs.out_proj.weight, theirs.out_proj.bias])
    tasks = lay_out([[LENGTH]], width=LENGTH + 2)
    history, query = random(1, LENGTH + 2, WIDTH), random(3, WIDTH, seed=1)
    out_h, out_q = streams(ours, history, query, tasks, causal)
    both = torch.cat([history[:, :LENGTH], query[None]], 1)
    expected = theirs(both, both, both, attn_mask=joint_mask(LENGTH, 3, causal), need_weights=False)[0][0]
    torch.testing.assert_close(out_h[0, :LENGTH], expected[:LENGTH])
    torch.testing.assert_close(out_q, expected[LENGTH:])


def check_block(block, expected, causal, before=lambda x: x):
    """Our block on a window and queries equals torch's layer on the window with the queries behind it."""
    tasks = lay_out([[LENGTH]], width=LENGTH + 1)
    history, query = random(1, LENGTH + 1, WIDTH), random(2, WIDTH, seed=1)
    attended = streams(block.attention, history, query, tasks, causal, before)
    out_h, out_q = (block(x, more) for x, more in zip((history, query), attended, strict=True))
    both = expected(torch.cat([history[:, :LENGTH], query[None]], 1), src_mask=joint_mask(LENGTH, 2, causal))[0]
    torch.testing.assert_close(torch.cat([out_h[0, :LENGTH], out_q]), both)


def test_bert_block_equals_torch():
    block = jitter(bert4rec.BERTBlock(WIDTH, HEADS))
    theirs = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True).double()
    check_block(block, block_parts(block, theirs, block.widen, block.narrow), causal=False)


def test_sasrec_block_equals_torch():
    block = jitter(sasrec.SASBlock(WIDTH, HEADS))
    theirs = nn.TransformerEncoderLayer(WIDTH, HEADS, WIDTH, 0.0, "relu", batch_first=True, norm_first=True).double()
    check_block(block, block_parts(block, theirs, block.first, block.second), True, block.norm1)


def test_gru_equals_torch():
    ours, theirs = jitter(layers.GRU(WIDTH, WIDTH)), nn.GRU(WIDTH, WIDTH, batch_first=True).double()
    mine = [ours.input.weight, ours.state.weight, ours.input.bias, ours.state.bias]
    copy(mine, [theirs.weight_ih_l0, theirs.weight_hh_l0, theirs.bias_ih_l0, theirs.bias_hh_l0])
    tasks = lay_out([[LENGTH]], width=LENGTH + 2)
    history, query = random(1, LENGTH + 2, WIDTH), random(3, WIDTH, seed=1)
    states, last = layers.read_layers([ours], history, tasks)
    after = layers.ask_layers([ours], query, last)
    torch.testing.assert_close(states[:, :LENGTH], theirs(history[:, :LENGTH])[0])
    for one, got in zip(query, after, strict=True):
        longer = torch.cat([history[0, :LENGTH], one[None]])
        torch.testing.assert_close(got, theirs(longer)[0][-1])


def test_lstm_equals_torch():
    cell, start = jitter(nn.Linear(3 + WIDTH, 4 * WIDTH)), random(2, WIDTH, seed=1)
    theirs = nn.LSTM(3, WIDTH, batch_first=True).double()
    copy(
        [cell.weight[:, :3], cell.weight[:, 3:], cell.bias, torch.zeros_like(cell.bias)],
        [theirs.weight_ih_l0, theirs.weight_hh_l0, theirs.bias_ih_l0, theirs.bias_hh_l0],
    )
    inputs = random(1, LENGTH, 3)
    expected = theirs(inputs, (start[0].expand(1, 1, -1).contiguous(), start[1].expand(1, 1, -1).contiguous()))[0]
    states = LSTMScan.apply(inputs, layers.continues(lay_out([[LENGTH]])), cell.weight, cell.bias, start)
    torch.testing.assert_close(states, expected)


PACKED, ALONE = lay_out([[5], [3, 2], [4, 1]], width=6), lay_out([[5], [4], [3], [2], [1]], width=9)


def by_window(function):
    """What `function(inputs, tasks)` (R, S, ...) gives each window, packed and alone; inputs hang on item and place."""
    table = random(10, WIDTH, seed=2)
    return [windows(function(F.embedding(tasks.items, table), tasks), tasks) for tasks in (PACKED, ALONE)]


@pytest.mark.parametrize("causal", [True, False])
def test_attention_ignores_layout(causal):
    attention = jitter(layers.Attention(WIDTH, HEADS))
    query = random(1, WIDTH)

    def run(inputs, tasks):
        return streams(attention, inputs, query, tasks, causal)[0]

    torch.testing.assert_close(*by_window(run))


def test_recurrences_ignore_layout():
    gru, cell, start = (jitter(layers.GRU(WIDTH, WIDTH)), jitter(nn.Linear(2 * WIDTH, 4 * WIDTH)), random(2, WIDTH))
    torch.testing.assert_close(*by_window(lambda inputs, tasks: gru(inputs, tasks)))
    parameters = cell.weight, cell.bias, start
    torch.testing.assert_close(*by_window(lambda x, tasks: LSTMScan.apply(x, layers.continues(tasks), *parameters)))


def test_query_without_history_is_a_first_step():
    gru, query = jitter(layers.GRU(WIDTH, WIDTH)), random(2, WIDTH)
    tasks = lay_out([[LENGTH]])._replace(query_last=torch.tensor(-1))
    after = layers.ask_layers([gru], query, layers.read_layers([gru], random(1, LENGTH, WIDTH), tasks)[1])
    torch.testing.assert_close(after, gru.step(gru.input(query), torch.zeros_like(query)))


def test_linear_and_norm_take_weights_for_each_task():
    x, linear, norm = random(3, 4, 5, WIDTH), layers.Linear(WIDTH, 6).double(), layers.Norm(WIDTH).double()
    for module, plain in ((linear, nn.Linear(WIDTH, 6).double()), (norm, nn.LayerNorm(WIDTH).double())):
        own = {name: random(3, *value.shape, seed=1) for name, value in module.named_parameters()}
        together = functional_call(module, own, x)
        for t in range(3):
            alone = functional_call(plain, {name: value[t] for name, value in own.items()}, x[t])
            torch.testing.assert_close(together[t], alone)


def test_look_up_takes_a_table_for_each_task():
    tables, places = random(3, 7, WIDTH), torch.randint(7, (3, 4, 5), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([F.embedding(*pair) for pair in zip(places, tables, strict=True)])
    assert torch.equal(layers.look_up(tables, places), expected)
    assert torch.equal(layers.look_up(tables[0], places), F.embedding(places, tables[0]))
