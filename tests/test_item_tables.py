"""Item tables: embeddings against a dense eigendecomposition, and tables that do not know a part of the users."""

import numpy as np
import pytest
import tiny
import torch
from scipy.sparse.linalg import ArpackError
from test_factor_analysis import simulate

import dataloader
import maml
from dataloader import Sequences
from models import item_tables
from models.learner import Learner
from training import loop
from utils import UserError


def common_users(sequences, users, n_items):
    """The matrix whose eigenvectors embed the items, entry by entry."""
    raters = [set() for _ in range(n_items)]
    for user in users:
        for item in sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]]:
            raters[item - 1].add(user)
    size = np.array([len(found) for found in raters]) + item_tables.SHRINK
    common = np.array([[len(a & b) if a is not b else 0 for a in raters] for b in raters])
    return common / np.sqrt(size[:, None] * size)


def grouped(n_users, n_items, groups=10, per_user=3):
    """Sequences of users who each rate items of one group, and few besides."""
    rng = np.random.default_rng(0)
    likes = rng.integers(groups, size=n_users)
    mine = likes[:, None] == np.arange(n_items) % groups
    items = np.argsort(rng.random(mine.shape) + 0.3 * ~mine, axis=1)[:, :per_user]
    ratings = rng.normal(size=items.size).astype(np.float32)
    return Sequences(np.arange(n_users + 1) * per_user, items.ravel() + 1, ratings)


@pytest.mark.parametrize("n_items", [20, 60])  # dense, and by Lanczos' method
def test_embeddings_are_the_leading_eigenvectors(n_items):
    sequences, width, users = grouped(300, n_items), 6, np.arange(0, 300, 2)
    found = item_tables.embed(sequences, users, n_items + 2, width)
    values, vectors = np.linalg.eigh(common_users(sequences, users, n_items))
    best = slice(-width - 1, -1)
    assert values[best].min() > 1e-3
    expected = vectors[:, best] * np.sqrt(values[best])
    expected *= item_tables.LENGTH / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found[:n_items] @ found[:n_items].T, expected @ expected.T, atol=1e-8)
    assert not found[n_items:].any()
    np.testing.assert_array_equal(found, item_tables.embed(sequences, users, n_items + 2, width))


def test_few_items_give_narrow_embeddings():
    sequences, _, _ = simulate(n_users=30, n_items=4, per_user=3)
    found = item_tables.embed(sequences, np.arange(30), 4, 8)
    assert found.shape == (4, 8) and np.isfinite(found).all() and not found[:, 4:].any()


def test_where_lanczos_fails_the_dense_method_takes_over(monkeypatch):
    def fail(*_, **__):
        raise ArpackError(3)

    sequences, users = grouped(300, 60), np.arange(300)
    expected = item_tables.embed(sequences, users, 60, 6)
    monkeypatch.setattr(item_tables, "eigsh", fail)
    np.testing.assert_allclose(item_tables.embed(sequences, users, 60, 6), expected, atol=1e-8)
    monkeypatch.setattr(item_tables, "MOST_DENSE", 50)
    with pytest.raises(UserError, match="--init_items=random"):
        item_tables.embed(sequences, users, 60, 6)


def test_tables_of_a_part_do_not_know_its_users():
    options = tiny.options(cross_fit=3, factor_prior=2.0)
    sequences, _, _ = simulate(n_users=120)
    users = np.arange(0, 120, 2)
    whole = item_tables.fit(sequences, users, 20, options)
    shifts = item_tables.fit_apart(sequences, users, 20, options, whole)
    ratings = sequences.ratings.copy()
    ratings[np.repeat(np.arange(120) % 3 == 1, 12)] *= -1
    again = item_tables.fit_apart(sequences._replace(ratings=ratings), users, 20, options, whole)
    for name in whole:
        assert shifts[name].shape == (4, *whole[name].shape) and not shifts[name][0].any()
        np.testing.assert_array_equal(shifts[name][2], again[name][2])
        if name != "item_embedding":  # which ratings there are, not what they are
            assert np.abs(shifts[name][1] - again[name][1]).max() > 0.01
    apart = item_tables.fit(sequences, users[users % 3 != 2], 20, options)["item_factor"]
    turned = shifts["item_factor"][3] + whole["item_factor"]
    np.testing.assert_allclose(turned @ turned.T, apart @ apart.T, atol=1e-5)


def test_parts_that_are_empty_or_everybody_shift_nothing():
    options = tiny.options(cross_fit=4)
    sequences, _, _ = simulate(n_users=8)
    for users in (np.array([1]), np.array([1, 5])):
        whole = item_tables.fit(sequences, users, 20, options)
        assert not any(shift.any() for shift in item_tables.fit_apart(sequences, users, 20, options, whole).values())


def test_training_tasks_alone_meet_shifted_tables():
    options = tiny.options(cross_fit=2)
    learner, tasks = Learner(40, options), tiny.training_tasks(options)
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(3, 40, options.num_factors, generator=generator)
    shift[0] = 0
    plain = learner.rows("item_factor", tasks)
    learner.shift_items({name: torch.zeros(3, 40, 8) for name in learner.table_names()} | {"item_factor": shift})
    assert not any(name.endswith("shift") for name in learner.state_dict())
    found = learner.rows("item_factor", tasks)
    for t, part in enumerate(tasks.part.tolist()):
        assert part in (1, 2)
        for place, item in enumerate(tasks.table[t].tolist()):
            expected = plain[t, place] + (shift[part, item - 1] if item else 0)
            torch.testing.assert_close(found[t, place], expected)
    seen = dataloader.last_tasks(tiny.sequences(), np.arange(6), options)
    assert not seen.part.any()


def test_the_mean_of_the_weights_shares_the_shifts():
    options = tiny.options(cross_fit=2, model="narm")
    system = maml.Ensemble(40, options, tiny.SCALE)
    learner = system.members[0].learner
    learner.shift_items({name: torch.ones(3, 40, table.shape[1]) for name, table in learner.tables().items()})
    run = loop.new_run(system, None, options, None)
    for name in learner.table_names():
        mine, its = (getattr(one, f"{name}_shift") for one in (learner, run.average.members[0].learner))
        assert mine.data_ptr() == its.data_ptr() and (mine[:, 1:] == 1).all()
