"""SASRec (Kang and McAuley, ICDM 2018): a causal transformer over the user's items."""

import torch.nn.functional as F
from torch import nn

from models.layers import Attention, Linear, Norm, hide, history_mask, join, look_up, part, query_mask, spread


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
        x = join(history, query)
        hidden = hide(history_mask(tasks, causal=True), x.dtype), hide(query_mask(tasks), x.dtype)
        for block in self.blocks:
            x = block(x, *hidden)
        return part(self.norm(x), tasks.items)


class SASBlock(nn.Module):
    """Attention and a point-wise ReLU network of width D, each with a norm before and a residual path."""

    def __init__(self, hidden, heads):
        super().__init__()
        self.attention = Attention(hidden, heads)
        self.first, self.second = Linear(hidden, hidden), Linear(hidden, hidden)
        self.norm1, self.norm2 = Norm(hidden), Norm(hidden)

    def forward(self, x, *hidden):
        x = x + self.attention(self.norm1(x), *hidden)
        return x + self.second(F.relu(self.first(self.norm2(x))))
