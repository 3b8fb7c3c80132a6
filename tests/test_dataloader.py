"""Splits, tasks, windows, packing and item tables, against plain loops over users, windows and positions."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

import dataloader
import utils


@pytest.fixture
def options():
    return tiny.options()


# -----------------------------------------------------------------------------
# split


def test_test_users_are_those_of_numpys_choice():
    options = tiny.options(num_test_data=1000)
    _, _, test = dataloader.split_users(6040, options)
    assert np.array_equal(test, np.sort(np.random.RandomState(222).choice(6040, 1000, replace=False)))


@pytest.mark.parametrize("given", [{"num_test_data": 7}, {"fold": 2, "num_folds": 5}, {"num_test_data": 38}])
def test_split_is_disjoint_and_complete(given):
    parts = dataloader.split_users(40, tiny.options(**given))
    assert all(len(part) and (np.diff(part) > 0).all() for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(40))
    again = dataloader.split_users(40, tiny.options(**given))
    assert all(map(np.array_equal, parts, again))


def test_folds_make_every_user_a_test_user_once():
    tests = [dataloader.split_users(41, tiny.options(fold=fold))[2] for fold in range(6)]
    assert sorted(np.concatenate(tests)) == list(range(41))
    assert {len(test) for test in tests} == {6, 7}


def test_fifteen_percent_validate():
    train, validation, _ = dataloader.split_users(1100, tiny.options(num_test_data=100))
    assert (len(train), len(validation)) == (850, 150)


@pytest.mark.parametrize("given", [{"num_test_data": 39}, {"fold": 0, "num_folds": 41}])
def test_impossible_split_is_refused(given):
    with pytest.raises(utils.UserError, match="lower it"):
        dataloader.split_users(40, tiny.options(**given))


def test_standardised_by_training_ratings_alone():
    values = np.array([1, 5, 2, 4, 3, 3], np.float32)
    ratings = SimpleNamespace(
        user_ids=np.arange(3),
        offsets=np.array([0, 2, 4, 6]),
        values=values,
        items=np.zeros(6, np.int32),
        levels=np.arange(1.0, 6),
    )
    sequences, mean, std = dataloader.standardise(ratings, np.array([1, 2]))
    assert (mean, std) == (pytest.approx(3), pytest.approx(values[2:].std()))
    assert sequences.ratings == pytest.approx((values - mean) / std)
    assert (sequences.items == 1).all()
    assert (sequences.weights == 1).all()


def test_rare_ratings_weigh_more_by_the_power_of_their_rarity():
    values = np.array([5, 5, 1, 5, 5, 2, 2, 2], np.float32)  # the second user trains: 2 is three of five ratings
    ratings = SimpleNamespace(
        user_ids=np.arange(2),
        offsets=np.array([0, 3, 8]),
        values=values,
        items=np.arange(8, dtype=np.int32),
        levels=np.array([1.0, 2, 5]),
    )
    sequences, mean, std = dataloader.standardise(ratings, np.array([1]), balance=0.5)
    assert sequences.levels * std + mean == pytest.approx([1, 2, 5])
    unseen, rare, often = sequences.weights
    assert rare / often == pytest.approx((3 / 2) ** -0.5)
    assert 0.6 * rare + 0.4 * often == pytest.approx(1)
    tasks = dataloader.last_tasks(sequences, np.array([0, 1]), tiny.options())
    assert tasks.query_weight[:, 0].tolist() == pytest.approx([unseen, rare])


def test_rare_levels_of_a_fine_scale_weigh_more():
    """Ratings of many values have levels that are centres of bins; each is weighed by the level nearest to it."""
    values, levels = np.repeat([0.1, 1.9, 2.1, 9.9], [6, 3, 2, 1]).astype(np.float32), np.arange(0.5, 10)
    given = {"user_ids": np.arange(1), "offsets": np.array([0, 12]), "items": np.arange(12, dtype=np.int32)}
    ratings = SimpleNamespace(**given, values=values, levels=levels)
    weights = dataloader.standardise(ratings, np.array([0]), balance=1.0)[0].weights
    assert len(weights) == 10 and weights[[0, 1, 2, 9]] * [6, 3, 2, 1] == pytest.approx([3] * 4)


# -----------------------------------------------------------------------------
# windows, packing, tables


def drawn(n_support, options, seed=None):
    """The windows of each support as a list of (start, length)."""
    rng = None if seed is None else np.random.default_rng(seed)
    starts, lengths = dataloader.support_windows(np.array(n_support), options, rng)
    return [[(s, n) for s, n in zip(*pair, strict=True) if n] for pair in zip(starts, lengths, strict=True)]


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize(("samples", "shortest"), [(1, 2), (6, 2), (25, 1), (25, 4)])
def test_windows_are_distinct_parts_of_the_support(samples, shortest, seed):
    options = tiny.options(num_samples=samples, min_sub_window_size=shortest)
    supports = [1, 2, 3, 4, 6, 29, 29, 29]
    for n, found in zip(supports, drawn(supports, options, seed), strict=True):
        least = min(shortest, n)
        possible = {(s, length) for length in range(least, n + 1) for s in range(n - length + 1)}
        assert found[0] == (0, n)
        assert len(set(found)) == len(found) == min(samples, len(possible))
        assert set(found) <= possible


def test_windows_without_a_generator_are_always_the_same():
    options = tiny.options(num_samples=6)
    assert drawn([29, 7], options) == drawn([29, 7], options)
    assert drawn([29, 7], options, 0) == drawn([29, 7], options, 0) != drawn([29, 7], options, 1)


def test_random_windows_cover_all_windows_alike():
    options = tiny.options(num_samples=4, min_sub_window_size=2)
    counts = {}
    for found in drawn([5] * 3000, options, 0):
        for window in found[1:]:
            counts[window] = counts.get(window, 0) + 1
    assert len(counts) == 4 + 3 + 2
    assert min(counts.values()) > 0.9 * 1000 and max(counts.values()) < 1.1 * 1000


def test_windows_of_a_support_of_none():
    assert drawn([0, 3], tiny.options(num_samples=3))[0] == []


def test_packing_never_overlaps_or_runs_over():
    rng, width = np.random.RandomState(0), 12
    length = rng.randint(0, width + 1, (50, 9))
    length[:, 0] = width
    rows, columns = dataloader.pack(length, np.full(len(length), width))
    for lengths, row, column in zip(length, rows, columns, strict=True):
        taken = np.zeros((9, width), int)
        for window in np.flatnonzero(lengths):
            end = column[window] + lengths[window]
            assert end <= width
            taken[row[window], column[window] : end] += 1
        assert taken.max() == 1 and taken.sum() == lengths.sum()
        # First fit: no two used rows could have been one.
        used = taken.sum(1)[: row[lengths > 0].max() + 1]
        assert len(used) == 1 or np.sort(used)[:2].sum() > width


def test_query_history_is_alone_at_the_start_of_row_zero():
    length = np.array([[4, 3, 3, 1], [0, 0, 0, 0], [6, 2, 2, 2]])
    row, column = dataloader.pack(length, np.full(len(length), 6))
    assert not row[:, 0].any() and not column[:, 0].any()


def test_tables_name_each_item_once():
    items = np.random.RandomState(0).randint(0, 8, (20, 11))
    table, places = dataloader.task_tables(items)
    for row, place, given in zip(table, places, items, strict=True):
        assert np.array_equal(row[place], given)
        distinct = np.unique(np.append(given, 0))
        assert np.array_equal(row[: len(distinct)], distinct)
        assert not row[len(distinct) :].any()


# -----------------------------------------------------------------------------
# tasks


def unpack(tasks, t):
    """Task t as {segment: [(item, rating, position), ...]} and its queries [(item, rating), ...]."""
    table, found = tasks.table[t], {}
    for b, r, s in (tasks.segment * (tasks.task == t)[:, None, None]).nonzero().tolist():
        position = int(tasks.position[b, r, s])
        entry = int(table[tasks.items[b, r, s]]), float(tasks.ratings[b, r, s]), position
        found.setdefault(int(tasks.segment[b, r, s]), []).append(entry)
    queries = zip(table[tasks.query_items[t]].tolist(), tasks.query_ratings[t].tolist(), strict=True)
    real = tasks.query[t].tolist()
    return found, [pair for pair, counts in zip(queries, real, strict=True) if counts]


@pytest.mark.parametrize("given", [{}, {"use_rating_input": True}, {"num_samples": 1}, {"full_support": 1}])
def test_training_tasks_are_stretches_of_sequences(given):
    options = tiny.options(batch_size=40, **given)
    sequences = tiny.sequences()
    tasks = tiny.sample_tasks(sequences, np.arange(6), options, 0)
    ratings = list(zip(sequences.items.tolist(), sequences.ratings.tolist(), strict=True))
    users = [ratings[a:b] for a, b in zip(sequences.offsets, sequences.offsets[1:], strict=False)]
    for t in range(40):
        found, queries = unpack(tasks, t)
        support = [entry[:2] for entry in found[1]]
        stretch = support + queries
        assert 1 <= len(queries) <= options.num_query_set
        assert 1 <= len(support) == int(tasks.query_last[t]) + 1 < options.max_seq_len
        assert any(stretch == user[i : i + len(stretch)] for user in users for i in range(len(user)))
        for window in found.values():
            part, positions = [entry[:2] for entry in window], [entry[2] for entry in window]
            assert any(part == support[i : i + len(part)] for i in range(len(support)))
            assert positions == list(range(len(part), 0, -1))


def test_positions_of_shared_starts_count_as_often_as_windows_hold_them():
    start, length = np.array([[0, 0, 2, 0, 2, 0]]), np.array([[5, 2, 3, 4, 2, 0]])
    kept, times = dataloader.share_starts(start, length, True)
    assert kept.tolist() == [[5, 0, 3, 0, 0, 0]]
    assert times[0, 0].tolist() == [3, 3, 2, 2, 1] and times[0, 2].tolist() == [2, 2, 1, 0, 0]
    every, once = dataloader.share_starts(start, length, False)
    assert every is length and (once == 1).all() and once.shape == times.shape


def test_sampling_is_a_function_of_seed_and_stream(options):
    sequences, users = tiny.sequences(), np.arange(6)
    first = tiny.sample_tasks(sequences, users, options, 3)
    np.random.seed(9)
    torch.manual_seed(9)
    again = tiny.sample_tasks(sequences, users, options, 3)
    assert all(map(torch.equal, first, again))
    other = tiny.sample_tasks(sequences, users, options, 4)
    options.random_seed += 1
    seeded = tiny.sample_tasks(sequences, users, options, 3)
    assert not same(first, other) and not same(first, seeded)


def same(tasks, others):
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(tasks, others, strict=True))


@pytest.mark.parametrize("back", [0, 1])
@pytest.mark.parametrize("shots", [None, 1, 3])
def test_evaluation_asks_for_the_last_rating(options, shots, back):
    sequences, users = tiny.sequences(), np.array([0, 2, 3, 4, 5])
    tasks = dataloader.last_tasks(sequences, users, options, shots, back)
    for t, user in enumerate(users):
        end = sequences.offsets[user + 1] - 1 - back
        first = max(sequences.offsets[user], end - (options.max_seq_len - 1 if shots is None else shots))
        found, queries = unpack(tasks, t)
        assert queries == [(sequences.items[end], sequences.ratings[end])]
        assert [entry[0] for entry in found[1]] == sequences.items[first:end].tolist()
        assert [entry[1] for entry in found[1]] == sequences.ratings[first:end].tolist()
    again = dataloader.last_tasks(sequences, users, options, shots, back)
    assert same(tasks, again)


def test_users_without_support_are_left_out():
    sequences = tiny.sequences(lengths=(1, 2, 3, 9))
    assert dataloader.usable_users(sequences, np.arange(4)).tolist() == [1, 2, 3]
    assert dataloader.usable_users(sequences, np.arange(4), min_support=2).tolist() == [2, 3]


def test_a_task_does_not_hang_on_its_neighbours(options):
    sequences, users = tiny.sequences(), np.array([0, 2, 5])
    together = dataloader.last_tasks(sequences, users, options)
    for t, user in enumerate(users):
        alone = dataloader.last_tasks(sequences, users[t : t + 1], options)
        assert unpack(alone, 0) == unpack(together, t), user


def test_every_rating_of_a_cloze_is_hidden_once_per_window_and_never_in_the_history():
    options = tiny.options(use_rating_input=True, num_masks=3, num_samples=4)
    tasks = dataloader.last_tasks(tiny.sequences(), np.array([0, 2, 5]), options)
    assert torch.equal(tasks.support, ~tasks.known & (tasks.segment > 0))
    for t in range(3):
        first = tasks.segment[t] == 1
        assert tasks.known[t][first].all()
        windows, _ = unpack(tasks, t)
        items = {n: [entry[0] for entry in window] for n, window in windows.items() if n > 1}
        times = {}
        for n, window in items.items():
            hidden = tasks.support[t][tasks.segment[t] == n].tolist()
            for item, counts in zip(window, hidden, strict=True):
                times.setdefault(tuple(window), {}).setdefault(item, []).append(counts)
        assert all(sum(hidden) == 1 and len(hidden) == 3 for w in times.values() for hidden in w.values())


def test_items_alone_are_all_support(options):
    tasks = dataloader.last_tasks(tiny.sequences(), np.array([0, 2]), options)
    assert torch.equal(tasks.support, tasks.segment > 0)
    assert torch.equal(tasks.known, tasks.segment > 0)


def test_rows_are_no_wider_than_the_longest_support(options):
    tasks = tiny.sample_tasks(tiny.sequences(), np.arange(6), options, 0)
    assert tasks.items.shape[2] == int(tasks.query_last.max()) + 1
    assert int(tasks.items.max()) < tasks.table.shape[1]


# -----------------------------------------------------------------------------
# parts of a meta-batch


@pytest.mark.parametrize("given", [{}, {"chunk": 1}, {"chunk": 3}, {"on_gpu": True}])
def test_parts_hold_every_task_once_and_unchanged(options, given):
    options.batch_size = 20
    tasks, seen = tiny.sample_tasks(tiny.sequences(), np.arange(6), options, 0), []
    for numbers, part in dataloader.by_size(tasks, **given):
        assert len(numbers) == len(part.table) <= given.get("chunk", 20)
        for place, t in enumerate(numbers):
            assert unpack(part, place) == unpack(tasks, t)
            assert part.query_last[place] == tasks.query_last[t]
            assert part.segment[place, 0, 0] == 1
        seen += list(numbers)
        real = part.segment > 0
        assert real.any(0).any(0).all() and real.any(0).any(1).all() and part.query.any(0).all()
    assert sorted(seen) == list(range(20))


def cost_in_blocks(rows, width):
    """Positions, empty ones included, of the blocks of tasks with that many rows each, and the copies of weights."""
    heights = min(dataloader.BLOCK, rows.max()), rows.max()
    return min((sum(-(-rows // height)) * (height * width + dataloader.WEIGHTS)) for height in heights)


def test_parts_cost_least_of_all_ways_to_cut(monkeypatch):
    rng = np.random.default_rng(0)
    for part, cache in ((0, 10**6), (300, 10**6), (300, 600), (300, 1), (10**6, 10**6)):
        monkeypatch.setattr(dataloader, "PART", part)
        used, width = rng.integers(1, 200, 8), np.sort(rng.integers(1, 30, 8))[::-1]
        costs = {}
        for ends in itertools.product((False, True), repeat=7):
            parts = np.split(np.arange(8), np.flatnonzero(ends) + 1)
            widest = [width[tasks].max() for tasks in parts]
            sizes = [cost_in_blocks(-(-used[t] // w), w) for t, w in zip(parts, widest, strict=True)]
            if all(size <= cache or len(tasks) == 1 for size, tasks in zip(sizes, parts, strict=True)):
                costs[tuple(map(len, parts))] = sum(sizes) + part * len(parts)
        assert costs[tuple(dataloader.part_lengths(used, width, cache))] == min(costs.values())
