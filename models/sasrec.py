"""SASRec (Kang and McAuley, ICDM 2018): a causal transformer over the user's items."""

import torch.nn.functional as F
from torch import nn

from models.layers import Attention, LayerNorm, Linear, broadcast_parameter, hide, history_mask, look_up, query_mask


class SASRec(nn.Module):
    """An encoder (see `models.learner`) of pre-norm blocks; a position reads its window up to itself."""

    def __init__(self, hidden, heads, layers, length):
        super().__init__()
        self.position = nn.Embedding(length, hidden)  # row 0 is the query's
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.norm = LayerNorm(hidden)
        nn.init.normal_(self.position.weight, std=0.02)

    def encode_history(self, items, tasks):
        x = items + look_up(self.position.weight, tasks.position)
        hidden, memories = hide(history_mask(tasks, causal=True), x.dtype), []
        for block in self.blocks:
            attended, memory = block.attention(block.norm1(x), hidden)
            x = block(x, attended)
            memories.append(memory)
        return self.norm(x), (tuple(memories), hide(query_mask(tasks), x.dtype))

    def encode_query(self, items, memory):
        memories, hidden = memory
        x = items + broadcast_parameter(self.position.weight[..., 0, :], items)
        for block, of_block in zip(self.blocks, memories, strict=True):
            x = block(x, block.attention.encode_query(block.norm1(x), of_block, hidden))
        return self.norm(x)


class Block(nn.Module):
    """Attention and a point-wise ReLU network of width D, each with a norm before it and a residual path."""

    def __init__(self, hidden, heads):
        super().__init__()
        self.attention = Attention(hidden, heads)
        self.first, self.second = Linear(hidden, hidden), Linear(hidden, hidden)
        self.norm1, self.norm2 = LayerNorm(hidden), LayerNorm(hidden)

    def forward(self, x, attended):
        """x (T, ..., D) and what attention gave for it, of the same shape."""
        x = x + attended
        return x + self.second(F.relu(self.first(self.norm2(x))))
