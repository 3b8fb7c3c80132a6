"""SASRec (Kang and McAuley, ICDM 2018): a causal transformer over the user's items."""

import torch.nn.functional as F
from torch import nn

from models.layers import Attention, Linear, Norm, history_mask, look_up, query_mask, spread


class SASRec(nn.Module):
    """Encoder of `bert_num_blocks` pre-norm blocks; a position reads its window up to itself."""

    causal = True

    def __init__(self, options):
        super().__init__()
        self.hidden = options.bert_hidden_units
        self.position = nn.Embedding(options.max_seq_len, self.hidden)  # 0 is the query
        self.blocks = nn.ModuleList(
            SASBlock(self.hidden, options.bert_num_heads) for _ in range(options.bert_num_blocks)
        )
        self.norm = Norm(self.hidden)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, history, query, tasks):
        """history (R, S, D), query (Q, D) -> states of the same shapes."""
        history = history + look_up(self.position.weight, tasks.position)
        query = query + spread(self.position.weight[..., 0, :], query)
        masks = history_mask(tasks, causal=True), query_mask(tasks)
        for block in self.blocks:
            history, query = block(history, query, *masks)
        return self.norm(history), self.norm(query)


class SASBlock(nn.Module):
    """Attention and a point-wise ReLU network of width D, each with a norm before and a residual path."""

    def __init__(self, hidden, heads):
        super().__init__()
        self.attention = Attention(hidden, heads)
        self.first, self.second = Linear(hidden, hidden), Linear(hidden, hidden)
        self.norm1, self.norm2 = Norm(hidden), Norm(hidden)

    def feed(self, x, attended):
        x = x + attended
        return x + self.second(F.relu(self.first(self.norm2(x))))

    def forward(self, history, query, mask, to_history):
        to_h, to_q = self.attention(self.norm1(history), self.norm1(query), mask, to_history)
        return self.feed(history, to_h), self.feed(query, to_q)
