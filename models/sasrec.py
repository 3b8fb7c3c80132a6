"""SASRec (Kang and McAuley, ICDM 2018): a causal transformer over the user's items."""

import torch.nn.functional as F
from torch import nn

from models.layers import Attention, Linear, Norm, hide, history_mask, look_up, query_mask, spread


class SASRec(nn.Module):
    """Encoder of `bert_num_blocks` pre-norm blocks; a position reads its window up to itself."""

    causal = True
    reads_queries = True

    def __init__(self, options):
        super().__init__()
        self.hidden = options.bert_hidden_units
        self.position = nn.Embedding(options.max_seq_len, self.hidden)  # 0 is the query
        self.blocks = nn.ModuleList(
            SASBlock(self.hidden, options.bert_num_heads) for _ in range(options.bert_num_blocks)
        )
        self.norm = Norm(self.hidden)
        nn.init.normal_(self.position.weight, std=0.02)

    def read(self, history, tasks):
        """Histories (R, S, D) -> (states of the same shape, what `ask` needs of them)."""
        x = history + look_up(self.position.weight, tasks.position)
        hidden, pasts = hide(history_mask(tasks, causal=True), x.dtype), []
        for block in self.blocks:
            attended, past = block.attention(block.norm1(x), hidden)
            x = block(x, attended)
            pasts.append(past)
        return self.norm(x), (tuple(pasts), hide(query_mask(tasks), x.dtype))

    def ask(self, query, memory):
        """Queries (Q, D) -> states of the same shape."""
        x = query + spread(self.position.weight[..., 0, :], query)
        pasts, hidden = memory
        for block, past in zip(self.blocks, pasts, strict=True):
            x = block(x, block.attention.ask(block.norm1(x), past, hidden))
        return self.norm(x)


class SASBlock(nn.Module):
    """Attention and a point-wise ReLU network of width D, each with a norm before and a residual path."""

    def __init__(self, hidden, heads):
        super().__init__()
        self.attention = Attention(hidden, heads)
        self.first, self.second = Linear(hidden, hidden), Linear(hidden, hidden)
        self.norm1, self.norm2 = Norm(hidden), Norm(hidden)

    def forward(self, x, attended):
        """x (..., D) with what its attention gave, of the same shape."""
        x = x + attended
        return x + self.second(F.relu(self.first(self.norm2(x))))
