"""NARM (Li et al., CIKM 2017): a global and a local recurrent encoder, the local one with attention."""

import torch
from torch import nn

from models.kernels import PairScores
from models.layers import GRU, Linear, Norm, history_mask, query_mask, run_layers


class NARM(nn.Module):
    """State at t = norm(B [c_global; c_local]) with c_global = h_t of one GRU and c_local = sum_j a_tj h_j of another.

    a_tj = v . sigmoid(A1 h_t + A2 h_j) over the past j <= t (equations 6 to 9 of the paper).
    """

    causal = True

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
        return self.similarity(torch.sigmoid(target[..., :, None, :] + past[..., None, :, :]))[..., 0]

    def forward(self, history, query, tasks):
        """history (R, S, D), query (Q, D) -> states of the same shapes."""
        global_h, global_q = run_layers(self.globals, history, query, tasks)
        local_h, local_q = run_layers(self.locals, history, query, tasks)
        past, mask = self.at_past(local_h), history_mask(tasks, causal=True)
        a = PairScores.apply(self.at_target(local_h), past, self.similarity.weight[..., 0, :], mask)
        summed_h = a @ local_h

        target = self.at_target(local_q)
        a = self.weights(target, past.select(-3, 0)) * query_mask(tasks)[..., None, :]
        own = self.similarity(torch.sigmoid(target + self.at_past(local_q)))
        summed_q = a @ local_h.select(-3, 0) + own * local_q
        return (
            self.norm(self.decode(torch.cat([global_h, summed_h], -1))),
            self.norm(self.decode(torch.cat([global_q, summed_q], -1))),
        )
