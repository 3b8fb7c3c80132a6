"""What is left of a user's earlier errors: attention over them, by age and by likeness of the items."""

import torch
from torch import nn

from models.layers import broadcast_parameter, hide, history_mask, look_up, query_mask

HEADS = 2


class ErrorAttention(nn.Module):
    """Weights a_ij with which a prediction i adds the errors rating_j - prediction_j of earlier positions j:

        a_ij = sum_h gain_h softmax_j(age_h[i - j] + x_i . L_h x_j),   x: an item's embedding and factors, L_h diagonal

    The softmax has one more place, with a learned logit and no error, so that a few unlike errors weigh little. Even
    heads begin with the ages alone, odd heads with the likeness of embeddings.
    """

    def __init__(self, hidden, factors, length):
        super().__init__()
        ages = -torch.arange(length + 1.0).log1p()[:, None].repeat(1, HEADS)
        likeness = torch.zeros(HEADS, hidden + factors)
        ages[:, 1::2], likeness[1::2, :hidden] = 0.0, 1.0
        self.by_age, self.likeness = nn.Parameter(ages), nn.Parameter(likeness)
        self.rest = nn.Parameter(torch.zeros(HEADS))
        self.gain = nn.Parameter(torch.full((HEADS,), 0.1))

    def encode_history(self, rows, tasks):
        """From the items' rows: (weights of the errors in each position's row (T, R, S, S), memory of row 0)."""
        x, place = features(rows), torch.arange(tasks.items.shape[-1], device=tasks.items.device)
        age = (place[:, None] - place)[None, None]
        earlier = history_mask(tasks, causal=True).tril(-1)
        offset = self.offset(tasks.position[:, 0, None], query_mask(tasks)[:, None])
        return self.weigh(x, x, self.offset(age, earlier)), (x[:, 0], offset)

    def encode_query(self, rows, memory):
        """Weights (T, Q, S) of the errors in row 0 for queries, from their items' rows."""
        past, offset = memory
        return self.weigh(features(rows), past, offset)

    def offset(self, age, mask):
        """What is added to likeness (T, ..., H, N, M), for ages and a mask (T, ..., N, M)."""
        by_age = look_up(self.by_age, age.clamp(0, self.by_age.shape[-2] - 1)).movedim(-1, -3)
        return by_age + hide(mask, by_age.dtype)[..., None, :, :]

    def weigh(self, x, past, offset):
        """Weights (T, ..., N, M) from features x (T, ..., N, F) and past (T, ..., M, F), offset (T, ..., H, N, M)."""
        scaled = past[..., None, :, :] * broadcast_parameter(self.likeness[..., None, :], past[..., None, :, :], 3)
        logits = x[..., None, :, :] @ scaled.mT + offset
        rest = broadcast_parameter(self.rest[..., None, None], logits, 3).expand(*logits.shape[:-1], 1)
        shares = torch.cat([logits, rest], -1).softmax(-1)[..., :-1]
        return (shares * broadcast_parameter(self.gain[..., None, None], shares, 3)).sum(-3)


def features(rows):
    """What likeness compares, embeddings and factors of items with rows {name: (..., width)}: (..., F)"""
    return torch.cat([rows["item_embedding"], rows["item_factor"]], -1)
