"""What is left of a user's earlier errors: attention over them, by age and by likeness of the items."""

import torch
from torch import nn

from models.layers import hide, history_mask, look_up, query_mask, spread


class ErrorAttention(nn.Module):
    """Weights a_ij with which a prediction i adds the errors rating_j - prediction_j of earlier positions j:

        a_ij = sum_h gain_h softmax_j(age_h[i - j] + x_i . L_h x_j),   x: an item's embedding and factors, L_h diagonal

    The softmax has one more place, of a learned logit and no error, so that a few unlike errors weigh little. Even
    heads begin with the ages alone, odd heads with the likeness of embeddings.
    """

    def __init__(self, options, width):
        """`width` is that of the item embeddings."""
        super().__init__()
        heads, longest = options.error_heads, options.max_seq_len
        ages = -torch.arange(longest + 1.0).log1p()[:, None].repeat(1, heads)
        likeness = torch.zeros(heads, width + options.num_factors)
        ages[:, 1::2], likeness[1::2, :width] = 0.0, 1.0
        self.by_age, self.likeness = nn.Parameter(ages), nn.Parameter(likeness)
        self.rest = nn.Parameter(torch.zeros(heads))
        self.gain = nn.Parameter(torch.full((heads,), 0.1))

    def forward(self, tasks, tables):
        """(weights of the errors in each position's row (R, S, S), of those in row 0 for each query (Q, S))."""
        history, query = (
            torch.cat([look_up(tables[name], items) for name in ("item_embedding", "item_factor")], -1)
            for items in (tasks.items, tasks.query_items)
        )
        position = tasks.position
        apart = position[..., None, :] - position[..., :, None]
        earlier = history_mask(tasks, causal=True).tril(-1)
        of_row = self.weigh(history, history, apart, earlier)
        first = position.select(-2, 0)[..., None, :]
        return of_row, self.weigh(query, history.select(-3, 0), first, query_mask(tasks)[..., None, :])

    def weigh(self, x, past, ages, mask):
        """x (..., N, F), past (..., M, F), ages and mask (..., N or 1, M) -> weights (..., N, M)"""
        past = past[..., None, :, :]  # scaled rather than x, which may be a whole catalogue
        likeness = x[..., None, :, :] @ (past * spread(self.likeness[..., None, :], past, 3)).transpose(-1, -2)
        logits = likeness + look_up(self.by_age, ages.clamp(0, self.by_age.shape[-2] - 1)).movedim(-1, -3)
        logits = logits + hide(mask, logits.dtype)[..., None, :, :]
        rest = spread(self.rest[..., None, None], logits, 3).expand(*logits.shape[:-1], 1)
        shares = torch.cat([logits, rest], -1).softmax(-1)[..., :-1]
        return (shares * spread(self.gain[..., None, None], shares, 3)).sum(-3)


def add_errors(predictions, weights, tasks):
    """Predictions of positions (R, S) and queries (Q,), with the weighted errors of earlier known ratings added."""
    (history, query), (of_row, of_query) = predictions, weights
    error = ((tasks.ratings - history) * tasks.known)[..., None]
    return history + (of_row @ error)[..., 0], query + (of_query @ error.select(-3, 0))[..., 0]
