"""Where the learner's item tables start: fitted to the training users, once by all of them and once without each part.

A table fitted to a user's own ratings knows them, and a learner trained on such users would trust it too much: a new
user's ratings are in no table. So a training user meets tables that were fitted without their part of the users.
"""

import contextlib

import numpy as np
from scipy import linalg, sparse
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from models import factor_analysis
from models.learner import hidden_size
from utils import UserError

SHRINK = 20.0  # users that are added to an item's, so that rare items lie close to none
LENGTH = 2.0  # of each item's embedding
MOST_DENSE = 10_000  # items whose common users fit a matrix


def fit(sequences, users, n_items, options):
    """Item effects, factors and embeddings from the ratings of `users` alone: {name: (n_items, width)}."""
    effect, factor = factor_analysis.fit(
        sequences, users, n_items, options.num_factors, options.factor_prior, seed=options.model_init_seed
    )
    embedding = embed(sequences, users, n_items, hidden_size(options))
    return {"item_effect": effect[:, None], "item_factor": factor, "item_embedding": embedding}


def fit_apart(sequences, users, n_items, options, whole):
    """What to add to the tables `whole` for a user of part 1, 2, ...: {name: (cross_fit + 1, n_items, width)}.

    Part p has the users whose number is p - 1 modulo `cross_fit`; part 0 has nobody, and zeros. The tables are turned
    so that they lie closest to `whole`.
    """
    shifts = {name: np.zeros((options.cross_fit + 1, *table.shape), np.float32) for name, table in whole.items()}
    for part in range(options.cross_fit):
        others = users[users % options.cross_fit != part]
        if 0 < len(others) < len(users):
            for name, table in fit(sequences, others, n_items, options).items():
                turn, _ = linalg.orthogonal_procrustes(table, whole[name])
                shifts[name][part + 1] = table @ turn - whole[name]
    return shifts


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
        raise UserError(f"too few users rated these {size:,} items to start item tables from: give --init_items=random")
    return np.linalg.eigh((rated.T @ rated).toarray() - np.diag(own))
