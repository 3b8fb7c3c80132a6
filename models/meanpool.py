"""Mean pooling: what the user rated before, without its order. The ablation of order."""

from torch import nn

from models.layers import LayerNorm, Linear, history_mask, query_mask


class MeanPool(nn.Module):
    """An encoder (see `models.learner`): an MLP of an item and of the mean of the items before it."""

    def __init__(self, hidden, heads, layers, length):
        super().__init__()
        self.own, self.past = Linear(hidden, hidden), Linear(hidden, hidden, bias=False)
        units = [unit for _ in range(layers) for unit in (nn.GELU(), Linear(hidden, hidden))]
        self.mlp = nn.Sequential(*units, LayerNorm(hidden))

    def encode_history(self, items, tasks):
        before, whole = history_mask(tasks, causal=True).tril(-1), query_mask(tasks)[:, None]  # (T, R, S, S), (T, 1, S)
        return self.encode_query(items, [mean(before, items)]), (mean(whole, items[:, 0]),)

    def encode_query(self, items, memory):
        return self.mlp(self.own(items) + self.past(memory[0]))


def mean(mask, items):
    """Means (T, ..., N, D) of items (T, ..., M, D) under a mask (T, ..., N, M); zeros where it is empty."""
    mask = mask.to(items.dtype)
    return mask @ items / mask.sum(-1, keepdim=True).clamp_min(1)
