"""GRU4Rec (Hidasi et al., ICLR 2016): stacked gated recurrent units over the user's items."""

from torch import nn

from models.layers import GRU, LayerNorm, encode_history, encode_query


class GRU4Rec(nn.Module):
    """An encoder (see `models.learner`) of GRU layers and a norm; a state has seen the items up to its position."""

    def __init__(self, hidden, heads, layers, length):
        super().__init__()
        self.layers = nn.ModuleList(GRU(hidden, hidden) for _ in range(layers))
        self.norm = LayerNorm(hidden)

    def encode_history(self, items, tasks):
        [(states, last)] = encode_history([self.layers], items, tasks)
        return self.norm(states), last

    def encode_query(self, items, memory):
        return self.norm(encode_query(self.layers, items, memory))
