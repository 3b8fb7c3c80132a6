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

    def forward(self, tasks, rows):
        """From the items' rows: (weights of the errors in each position's row (R, S, S), what `ask` needs of row 0)."""
        x, position = features(rows), tasks.position
        place = torch.arange(position.shape[-1], device=position.device)
        apart = (place - place[:, None]).expand(*(1,) * (position.dim() - 1), -1, -1)  # within a window
        earlier = history_mask(tasks, causal=True).tril(-1).transpose(-1, -2)
        first, all_of_it = position.select(-2, 0)[..., None], query_mask(tasks)[..., None]
        return self.weigh(x, *self.read(x, apart, earlier)), self.read(x.select(-3, 0), first, all_of_it)

    def ask(self, rows, past):
        """Weights (Q, S) of the errors in row 0 for queries, from their items' rows."""
        return self.weigh(features(rows), *past)

    def read(self, past, ages, mask):
        """past (M, F), ages and mask (M, N or 1) -> (past of each head (H, M, F), what is added (H, M, N or 1))"""
        past = past[..., None, :, :]  # scaled rather than what is compared with it, which may be a whole catalogue
        past = past * spread(self.likeness[..., None, :], past, 3)
        offsets = look_up(self.by_age, ages.clamp(0, self.by_age.shape[-2] - 1)).movedim(-1, -3)
        return past, offsets + hide(mask, past.dtype)[..., None, :, :]

    def weigh(self, x, past, offsets):
        """x (N, F) and what `read` gives -> weights (N, M)"""
        likeness = past.flatten(-3, -2) @ x.transpose(-1, -2)
        logits = likeness.unflatten(-2, past.shape[-3:-1]) + offsets  # (H, M, N)
        rest = spread(self.rest[..., None, None], logits, 3).expand(*logits.shape[:-2], 1, logits.shape[-1])
        shares = torch.cat([logits, rest], -2).softmax(-2)[..., :-1, :]
        return (shares * spread(self.gain[..., None, None], shares, 3)).sum(-3).transpose(-1, -2)


def features(rows):
    """What likeness compares, embeddings and factors of items with rows {name: (..., width)}: (..., F)"""
    return torch.cat([rows["item_embedding"], rows["item_factor"]], -1)


def errors(predictions, tasks):
    """The errors of positions (R, S), 0 where the rating is not known."""
    return (tasks.ratings - predictions) * tasks.known


def add_errors(predictions, weights, errors):
    """Predictions (..., N) with errors (..., M) added by weights (..., N, M)."""
    return predictions + (errors[..., None, :] @ weights.transpose(-1, -2))[..., 0, :]
