"""BERT4Rec (Sun et al., CIKM 2019): a bidirectional transformer over the user's items."""

import torch.nn.functional as F
from torch import nn

from models.layers import Attention, LayerNorm, Linear, broadcast_parameter, hide, history_mask, look_up, query_mask


class BERT4Rec(nn.Module):
    """An encoder (see `models.learner`) of post-norm blocks; every position reads its whole window."""

    def __init__(self, hidden, heads, layers, length):
        super().__init__()
        self.position = nn.Embedding(length, hidden)  # row 0 is the query's
        self.norm = LayerNorm(hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        nn.init.normal_(self.position.weight, std=0.02)

    def encode_history(self, items, tasks):
        x = self.norm(items + look_up(self.position.weight, tasks.position))
        hidden, memories = hide(history_mask(tasks, causal=False), x.dtype), []
        for block in self.blocks:
            attended, memory = block.attention(x, hidden)
            x = block(x, attended)
            memories.append(memory)
        return x, (tuple(memories), hide(query_mask(tasks), x.dtype))

    def encode_query(self, items, memory):
        memories, hidden = memory
        x = self.norm(items + broadcast_parameter(self.position.weight[..., 0, :], items))
        for block, of_block in zip(self.blocks, memories, strict=True):
            x = block(x, block.attention.encode_query(x, of_block, hidden))
        return x


class Block(nn.Module):
    """Attention and a GELU network of width 4 D, each with a residual path and a norm after it."""

    def __init__(self, hidden, heads):
        super().__init__()
        self.attention = Attention(hidden, heads)
        self.widen, self.narrow = Linear(hidden, 4 * hidden), Linear(4 * hidden, hidden)
        self.norm1, self.norm2 = LayerNorm(hidden), LayerNorm(hidden)

    def forward(self, x, attended):
        """x (T, ..., D) and what attention gave for it, of the same shape."""
        x = self.norm1(x + attended)
        return self.norm2(x + self.narrow(F.gelu(self.widen(x))))
