"""Where the learner's item tables start: fitted to the training users, once by all of them and once without each fold.

A table fitted to a user's own ratings knows them, and a learner trained on such users would trust it too much: a new
user's ratings are in no table. So a training user meets tables that were fitted without their fold of the users.
"""

import contextlib
from typing import NamedTuple

import numpy as np
import torch
from scipy import linalg, sparse
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from dataloader import FOLDS
from models import factor_analysis
from models.learner import hidden_size
from utils import UserError

SHRINK = 20.0  # users that are added to an item's, so that rare items lie close to none
LENGTH = 2.0  # of each item's embedding
MOST_DENSE = 10_000  # items whose common users fit a matrix


class Fit(NamedTuple):
    whole: dict  # {name: (n_items, width)} fitted to all training users
    shifts: (
        dict  # {name: (FOLDS + 1, n_items + 1, width)} what to add for the users of each fold; rows from catalogue 0
    )
    user: factor_analysis.Factors  # `centre` and `damping` are those of the training users' biases and vectors


def fit(sequences, users, n_items, options, device="cpu"):
    """`Fit` of item effects, factors and embeddings to the ratings of the training `users`.

    Fold f has the users whose number is f - 1 modulo FOLDS; fold 0 has nobody, and zeros.
    """
    folds = FOLDS if len(np.unique(users % FOLDS)) > 1 else 0
    found, apart = factor_analysis.fit(sequences, users, n_items, options.num_factors, folds, device)
    embeddings = embed_apart(sequences, users, n_items, hidden_size(options), folds)
    whole, *without = [
        {
            "item_effect": factors.effect[:, None],
            "item_factor": factors.factor,
            "item_audience": factors.audience,
            "item_embedding": embedding,
        }
        for factors, embedding in zip([found, *apart], embeddings, strict=True)
    ]
    shifts = {name: np.zeros((FOLDS + 1, n_items + 1, table.shape[1]), np.float32) for name, table in whole.items()}
    for fold, tables in enumerate(without):
        for name, table in tables.items():
            shifts[name][fold + 1, 1:] = table - whole[name]
    return Fit(whole, {name: torch.from_numpy(shift) for name, shift in shifts.items()}, found)


def embed_apart(sequences, users, n_items, width, folds):
    """The `embed` of all users, then that of the users outside each fold, turned to lie closest to the first."""
    found = [embed(sequences, users, n_items, width)]
    for fold in range(folds):
        other = embed(sequences, users[users % folds != fold], n_items, width)
        turn, _ = linalg.orthogonal_procrustes(other, found[0])
        found.append(other @ turn)
    return found


def embed(sequences, users, n_items, width):
    """Item embeddings (n_items, width), all of length LENGTH: items that the same users rated lie close together.

    They are the leading eigenvectors of the items' common users n_ij / sqrt((n_i + SHRINK) (n_j + SHRINK)), i != j,
    times the root of their eigenvalues; not the first, which says how popular an item is. Items without ratings get
    zeros.
    """
    user, item, _ = factor_analysis.rating_places(sequences, users)
    count = np.bincount(item, minlength=n_items)
    scale = (count + SHRINK) ** -0.5
    rated = sparse.csr_array((scale[item], (user, item)), (len(users), n_items))
    own = count * scale**2
    values, vectors = leading(rated, own, width)
    best = np.argsort(-values, kind="stable")[1 : width + 1]
    found = vectors[:, best] * np.sqrt(np.maximum(values[best], 0))
    found *= np.where(found[np.abs(found).argmax(0), np.arange(len(best))] < 0, -1.0, 1.0)
    length = np.linalg.norm(found, axis=1, keepdims=True)
    found = np.divide(LENGTH * found, length, out=np.zeros_like(found), where=(length > 1e-9) & (count > 0)[:, None])
    return np.pad(found, ((0, 0), (0, width - len(best))))


def leading(rated, own, width):
    """The width + 1 largest eigenvalues of rated^T rated - diag(own), or all of them, and their vectors as columns."""
    size = len(own)
    if size > 4 * width:
        common = LinearOperator((size, size), lambda v: rated.T @ (rated @ v.ravel()) - own * v.ravel(), dtype=float)
        with contextlib.suppress(ArpackError):  # of few users, whose ratings span too little for Lanczos' method
            return eigsh(common, width + 1, which="LA", v0=np.ones(size))
    if size > MOST_DENSE:
        raise UserError(f"too few users rated these {size:,} items to start item tables from: give --head=plain")
    return np.linalg.eigh((rated.T @ rated).toarray() - np.diag(own))
