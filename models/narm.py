"""NARM (Li et al., CIKM 2017): a global and a local recurrent encoder, the local one with attention."""

import torch
from torch import nn

from models.layers import GRU, LayerNorm, Linear, dot, encode_history, encode_query, history_mask, query_mask


class NARM(nn.Module):
    """An encoder (see `models.learner`): the state at t is norm(B [c_global; c_local]).

    c_global = h_t of one GRU, c_local = sum_j a_tj h_j of another, a_tj = v . sigmoid(A1 h_t + A2 h_j) over the past
    j <= t (equations 6 to 9 of the paper).
    """

    def __init__(self, hidden, heads, layers, length):
        super().__init__()
        self.globals = nn.ModuleList(GRU(hidden, hidden) for _ in range(layers))
        self.locals = nn.ModuleList(GRU(hidden, hidden) for _ in range(layers))
        self.at_target, self.at_past = Linear(hidden, hidden, bias=False), Linear(hidden, hidden, bias=False)
        self.similarity = Linear(hidden, 1, bias=False)
        self.decode = Linear(2 * hidden, hidden, bias=False)
        self.norm = LayerNorm(hidden)

    def encode_history(self, items, tasks):
        (state, last_global), (local, last_local) = encode_history([self.globals, self.locals], items, tasks)
        past = self.at_past(local)
        weights = self.history_weights(self.at_target(local), past, history_mask(tasks, causal=True))
        memory = last_global, last_local, past[:, 0], local[:, 0], query_mask(tasks)[:, None]
        return self.join(state, weights @ local), memory

    def encode_query(self, items, memory):
        last_global, last_local, past, local_past, mask = memory
        state, local = encode_query(self.globals, items, last_global), encode_query(self.locals, items, last_local)
        target = self.at_target(local)
        own = self.similarity(torch.sigmoid(target + self.at_past(local)))
        return self.join(state, (self.weights(target, past) * mask) @ local_past + own * local)

    def weights(self, target, past):
        """a_tj (T, ..., N, M) of targets (T, ..., N, D) on the past (T, ..., M, D)."""
        inside = torch.sigmoid(target[..., :, None, :] + past[..., None, :, :])
        return dot(inside, self.similarity.weight[..., 0, :])

    def history_weights(self, target, past, mask):
        """a_tj (T, R, S, S) of histories where `mask` holds, else 0.

        Most pairs of a row lie in different windows. Computing the others alone takes a quarter less of a step's time,
        but a GPU would have to wait for their number.
        """
        if mask.is_cuda:
            return self.weights(target, past) * mask
        pair = mask.flatten().nonzero()[:, 0]
        task, at = pair // mask[0].numel(), pair // mask.shape[-1]
        of = at - at % mask.shape[-1] + pair % mask.shape[-1]
        inside = torch.sigmoid(target.flatten(0, -2).index_select(0, at) + past.flatten(0, -2).index_select(0, of))
        similarity = self.similarity.weight[..., 0, :].expand(len(mask), -1).index_select(0, task)
        return inside.new_zeros(mask.numel()).index_copy(0, pair, (inside * similarity).sum(-1)).view_as(mask)

    def join(self, state, summed):
        """The states (T, ..., D) of the global encoder's and of the local one's sum."""
        return self.norm(self.decode(torch.cat([state, summed], -1)))
