"""Item tables: embeddings against a dense eigendecomposition, and tables that do not know a part of the users."""

import itertools

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
    with pytest.raises(UserError, match="--head=plain"):
        item_tables.embed(sequences, users, 60, 6)


def test_embeddings_without_a_fold_do_not_know_its_users():
    options, (sequences, _, _) = tiny.options(), simulate(n_users=120)
    users = np.arange(0, 120, 3)
    fit = item_tables.fit(sequences, users, 20, options)
    ratings = -sequences.ratings
    again = item_tables.fit(sequences._replace(ratings=ratings), users, 20, options)
    for name, whole in fit.whole.items():
        shift = fit.shifts[name]
        assert shift.shape == (dataloader.FOLDS + 1, 21, whole.shape[1]) and not shift[0].any()
        assert not shift[:, 0].any()  # of padding
        if name == "item_embedding":  # which ratings there are, not what they are
            np.testing.assert_allclose(whole, again.whole[name], atol=1e-9)
    others = item_tables.embed(sequences, users[users % dataloader.FOLDS != 1], 20, 8)
    apart = fit.shifts["item_embedding"][2, 1:].numpy() + fit.whole["item_embedding"]
    np.testing.assert_allclose(apart @ apart.T, others @ others.T, atol=1e-5)  # up to a turn


def test_folds_that_are_empty_or_everybody_shift_nothing():
    sequences, _, _ = simulate(n_users=8)
    for users in (np.array([1]), np.array([1, 5])):
        assert not any(shift.any() for shift in item_tables.fit(sequences, users, 20, tiny.options()).shifts.values())


def test_a_training_task_meets_the_tables_of_its_users_fold():
    options = tiny.options()
    learner, tasks = Learner(tiny.N_ITEMS, options).double(), tiny.training_tasks(options)
    shifts = {
        name: tiny.random(1 + dataloader.FOLDS, 1 + tiny.N_ITEMS, table.shape[1])
        for name, table in learner.tables().items()
    }
    plain, found = maml.look_up(learner, tasks), maml.look_up(learner, tasks, shifts)
    assert (tasks.fold > 0).all()
    for name, t in itertools.product(plain, range(len(tasks.table))):
        for place, item in enumerate(tasks.table[t].tolist()):
            expected = plain[name][t, place] + shifts[name][tasks.fold[t], item]
            torch.testing.assert_close(found[name][t, place], expected)


@pytest.mark.parametrize("model", ["narm", "bert4rec"])
def test_predictions_with_shifted_tables_are_those_of_a_learner_that_has_them(model):
    options = tiny.options(model=model, adapt="all")
    member, tasks = tiny.system(options), tiny.training_tasks(options)
    shifts = {
        name: tiny.random(1, 1 + tiny.N_ITEMS, table.shape[1]).expand(1 + dataloader.FOLDS, -1, -1)
        for name, table in member.learner.tables().items()
    }
    found = member(tasks, shifts=shifts)
    with torch.no_grad():
        for name, table in member.learner.tables().items():
            table += shifts[name][0]
    torch.testing.assert_close(member(tasks), found)


def test_a_fresh_system_starts_from_the_fit():
    sequences, _, _ = simulate(n_users=40)
    options, users = tiny.options(members=2), np.arange(40)
    problem = tiny.problem(sequences, users, n_items=20)
    system, shifts = maml.build_system(problem, options)
    fit = item_tables.fit(sequences, users, 20, options)
    for member, shift in zip(system.members, shifts, strict=True):
        assert member.learner.head.user_bias.item() == pytest.approx(fit.user.centre[0])
        for name, table in member.learner.tables().items():
            assert not table[0].any()
            np.testing.assert_allclose(table[1:].detach(), fit.whole[name], rtol=1e-5, atol=1e-6)
            assert torch.equal(shift[name], fit.shifts[name])
    plain, none = maml.build_system(problem, tiny.options(head="plain"))
    assert none == [None] and plain.members[0].learner.tables().keys() == {"item_embedding"}
