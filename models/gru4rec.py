"""GRU4Rec (Hidasi et al., ICLR 2016): stacked gated recurrent units over the user's items."""

from torch import nn

from models.layers import GRU, Norm, run_layers


class GRU4Rec(nn.Module):
    """Encoder of `gru4rec_n_layers` GRU layers and a norm; the state at a position has seen the items up to it."""

    causal = True

    def __init__(self, options):
        super().__init__()
        self.hidden = options.gru4rec_hidden_size
        self.layers = nn.ModuleList(GRU(self.hidden, self.hidden) for _ in range(options.gru4rec_n_layers))
        self.norm = Norm(self.hidden)

    def forward(self, history, query, tasks):
        """history (R, S, D), query (Q, D) -> states of the same shapes."""
        history, query = run_layers(self.layers, history, query, tasks)
        return self.norm(history), self.norm(query)
