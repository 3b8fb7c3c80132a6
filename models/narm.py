"""NARM (Li et al., CIKM 2017): a global and a local recurrent encoder, the local one with attention."""

import torch
from torch import nn

from models.kernels import PairScores
from models.layers import GRU, Linear, Norm, ask_layers, history_mask, query_mask, read_layers


class NARM(nn.Module):
    """State at t = norm(B [c_global; c_local]) with c_global = h_t of one GRU and c_local = sum_j a_tj h_j of another.

    a_tj = v . sigmoid(A1 h_t + A2 h_j) over the past j <= t (equations 6 to 9 of the paper).
    """

    causal = True
    reads_queries = False

    def __init__(self, options):
        super().__init__()
        self.hidden = hidden = options.narm_hidden_size
        self.globals = nn.ModuleList(GRU(hidden, hidden) for _ in range(options.narm_n_layers))
        self.locals = nn.ModuleList(GRU(hidden, hidden) for _ in range(options.narm_n_layers))
        self.at_target, self.at_past = Linear(hidden, hidden, bias=False), Linear(hidden, hidden, bias=False)
        self.similarity = Linear(hidden, 1, bias=False)
        self.decode = Linear(2 * hidden, hidden, bias=False)
        self.norm = Norm(hidden)

    def weights(self, target, past):
        """a_tj of targets (..., N, D) on the past (..., M, D): (..., N, M)"""
        return self.similarity((target[..., :, None, :] + past[..., None, :, :]).sigmoid_())[..., 0]

    def read(self, history, tasks):
        """Histories (R, S, D) -> (states of the same shape, what `ask` needs of them)."""
        states, last_global = read_layers(self.globals, history, tasks)
        local, last_local = read_layers(self.locals, history, tasks)
        past, mask = self.at_past(local), history_mask(tasks, causal=True)
        a = PairScores.apply(self.at_target(local), past, self.similarity.weight[..., 0, :], mask)
        memory = last_global, last_local, past.select(-3, 0), local.select(-3, 0), query_mask(tasks)[..., None, :]
        return self.join(states, a @ local), memory

    def ask(self, query, memory):
        """Queries (Q, D) -> states of the same shape."""
        last_global, last_local, past, local_past, mask = memory
        state, local = ask_layers(self.globals, query, last_global), ask_layers(self.locals, query, last_local)
        target = self.at_target(local)
        a = self.weights(target, past) * mask
        own = self.similarity(torch.sigmoid(target + self.at_past(local)))
        return self.join(state, a @ local_past + own * local)

    def join(self, state, summed):
        """The states (..., D) of the global encoder's and the local one's sum."""
        return self.norm(self.decode(torch.cat([state, summed], -1)))
