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
        x = features(rows)
        weights = self.weigh(x, self.scale(x), self.within_rows(tasks))
        return weights, (self.scale(x.select(-3, 0)), self.from_behind(tasks))

    def ask(self, rows, past):
        """Weights (Q, S) of the errors in row 0 for queries, from their items' rows."""
        return self.weigh(features(rows), *past)

    def of_one_row(self, tasks, rows):
        """Weights (1, S + Q, S) for the positions and then the queries of a task of one row, from the rows of both."""
        x, within, behind = features(rows), self.within_rows(tasks), self.from_behind(tasks)[..., None, :, :, :]
        queries = x.shape[-2] - within.shape[-1]
        offsets = torch.cat([within, behind.expand(*within.shape[:-1], queries)], -1)
        return self.weigh(x, self.scale(x[..., :-queries, :]), offsets)

    def within_rows(self, tasks):
        """What is added to the likeness of positions (down) to positions (across): (R, H, S, S)"""
        place = torch.arange(tasks.position.shape[-1], device=tasks.position.device)
        apart = (place - place[:, None]).expand(*(1,) * (tasks.position.dim() - 1), -1, -1)  # within a window
        return self.offsets(apart, history_mask(tasks, causal=True).tril(-1).transpose(-1, -2))

    def from_behind(self, tasks):
        """The same for queries, which are all one place behind row 0's history: (H, S, 1)"""
        return self.offsets(tasks.position.select(-2, 0)[..., None], query_mask(tasks)[..., None])

    def offsets(self, ages, mask):
        """ages and mask (M, N or 1) -> what is added to likeness (H, M, N or 1)"""
        offsets = look_up(self.by_age, ages.clamp(0, self.by_age.shape[-2] - 1)).movedim(-1, -3)
        return offsets + hide(mask, offsets.dtype)[..., None, :, :]

    def scale(self, past):
        """past (M, F) for each head (H, M, F), and not what is compared with it, which may be a whole catalogue."""
        past = past[..., None, :, :]
        return past * spread(self.likeness[..., None, :], past, 3)

    def weigh(self, x, past, offsets):
        """x (N, F), past (H, M, F) and offsets (H, M, N or 1) -> weights (N, M)"""
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
