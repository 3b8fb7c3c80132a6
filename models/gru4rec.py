"""GRU4Rec (Hidasi et al., ICLR 2016): stacked gated recurrent units over the user's items."""

from torch import nn

from models.layers import GRU, Norm, ask_layers, read_layers


class GRU4Rec(nn.Module):
    """Encoder of `gru4rec_n_layers` GRU layers and a norm; the state at a position has seen the items up to it."""

    causal = True
    reads_queries = False

    def __init__(self, options):
        super().__init__()
        self.hidden = options.gru4rec_hidden_size
        self.layers = nn.ModuleList(GRU(self.hidden, self.hidden) for _ in range(options.gru4rec_n_layers))
        self.norm = Norm(self.hidden)

    def read(self, history, tasks):
        """Histories (R, S, D) -> (states of the same shape, what `ask` needs of them)."""
        states, last = read_layers(self.layers, history, tasks)
        return self.norm(states), last

    def ask(self, query, last):
        """Queries (Q, D) -> states of the same shape."""
        return self.norm(ask_layers(self.layers, query, last))
