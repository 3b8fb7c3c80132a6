"""Splits, tasks, windows, packing and item tables, against plain loops over users, windows and positions."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

import dataloader
import utils

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


def test_fewer_training_users_are_some_of_more():
    options = [tiny.options(num_test_data=10, num_train_users=n) for n in (0, 12, 5)]
    (every, *rest), (twelve, *same), (five, *others) = (dataloader.split_users(40, each) for each in options)
    assert (len(every), len(twelve), len(five)) == (26, 12, 5)
    assert set(five) < set(twelve) < set(every)
    assert all(map(np.array_equal, rest * 2, same + others))


@pytest.mark.parametrize("given", [{"num_test_data": 39}, {"fold": 0, "num_folds": 41}, {"num_train_users": 35}])
def test_impossible_split_is_refused(given):
    with pytest.raises(utils.UserError, match="lower it"):
        dataloader.split_users(40, tiny.options(**given))


def test_users_can_be_named_by_the_beginning_of_their_ids():
    ratings = SimpleNamespace(user_ids=np.array(["a1", "b1", "b2", "c", "d"]))
    test = dataloader.named_users(ratings, "b")
    assert test.tolist() == [1, 2]
    train, validation, found = dataloader.split_users(5, tiny.options(test_prefix="b"), test)
    assert found.tolist() == [1, 2] and sorted([*train, *validation]) == [0, 3, 4]
    assert dataloader.named_users(ratings, "") is None
    with pytest.raises(utils.UserError, match="beginning of 0 of 5"):
        dataloader.named_users(ratings, "x")
    with pytest.raises(utils.UserError, match="leave out --fold"):
        tiny.options(test_prefix="b", fold=1)


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
    starts, lengths, layout = dataloader.support_windows(np.array(n_support), options, rng)
    starts, lengths = starts[layout], lengths[layout]
    return [[(s, n) for s, n in zip(*pair, strict=True) if n] for pair in zip(starts, lengths, strict=True)]


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize(("samples", "shortest"), [(1, 2), (6, 2), (25, 1), (25, 4)])
def test_windows_are_distinct_parts_of_the_support(samples, shortest, seed):
    options = tiny.options(num_samples=samples, min_sub_window_size=shortest)
    supports = [0, 1, 2, 3, 4, 6, 29, 29, 29]
    no_support, *found = drawn(supports, options, seed)
    assert no_support == []
    for n, windows in zip(supports[1:], found, strict=True):
        possible = {(s, length) for length in range(min(shortest, n), n + 1) for s in range(n - length + 1)}
        assert windows[0] == (0, n)
        assert len(set(windows)) == len(windows) == min(samples, len(possible))
        assert set(windows) <= possible


def test_windows_without_a_generator_are_always_the_same():
    options = tiny.options(num_samples=6)
    assert drawn([29, 7], options) == drawn([29, 7], options)
    assert drawn([29, 7], options, 0) == drawn([29, 7], options, 0) != drawn([29, 7], options, 1)


def test_random_windows_cover_all_windows_alike():
    options = tiny.options(num_samples=4, min_sub_window_size=2)
    counts = Counter(window for found in drawn([5] * 3000, options, 0) for window in found[1:])
    assert len(counts) == 4 + 3 + 2
    assert min(counts.values()) > 0.9 * 1000 and max(counts.values()) < 1.1 * 1000


@pytest.mark.parametrize("model", tiny.LEARNERS)
@pytest.mark.parametrize("loss", ["lstm", "mlp"])
def test_windows_share_positions_only_where_no_prediction_or_weight_reads_their_end(model, loss):
    options = tiny.options(model=model, loss_network=loss, normalize_loss=False)
    assert dataloader.keeps_longest(options) == (model in ("narm", "gru4rec", "meanpool") and loss == "lstm")


def test_positions_of_shared_starts_count_as_often_as_windows_hold_them():
    start, length = np.array([[0, 0, 2, 0, 2, 0]]), np.array([[5, 2, 3, 4, 2, 0]])
    kept, times = dataloader.keep_longest(start, length, True)
    assert kept.tolist() == [[5, 0, 3, 0, 0, 0]]
    assert times[0, 0].tolist() == [3, 3, 2, 2, 1] and times[0, 2].tolist() == [2, 2, 1, 0, 0]
    every, once = dataloader.keep_longest(start, length, False)
    assert every is length and (once == 1).all() and once.shape == times.shape


def test_packing_never_overlaps_or_runs_over():
    rng, width = np.random.RandomState(0), 12
    length = rng.randint(0, width + 1, (50, 9))
    length[:25, 0] = width
    rows, columns = dataloader.pack(length, width)
    assert not rows[:, 0].any() and not columns[:, 0].any()  # what the queries read begins row 0
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


def test_tables_name_each_item_once():
    items = np.random.RandomState(0).randint(0, 8, (20, 11))
    table, places = dataloader.task_tables(items, 12)
    assert table.shape == (20, 12)
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
    for r, s in tasks.segment[t].nonzero().tolist():
        entry = int(table[tasks.items[t, r, s]]), float(tasks.ratings[t, r, s]), int(tasks.position[t, r, s])
        found.setdefault(int(tasks.segment[t, r, s]), []).append(entry)
    queries = zip(table[tasks.query_items[t]].tolist(), tasks.query_ratings[t].tolist(), strict=True)
    return found, [pair for pair, counts in zip(queries, tasks.query[t].tolist(), strict=True) if counts]


def drawn_tasks(options, *stream):
    return dataloader.sample_tasks(tiny.sequences(), np.arange(6), options, *stream)


def same(tasks, others):
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(tasks, others, strict=True))


@pytest.mark.parametrize("given", [{}, {"model": "gru4rec"}, {"num_samples": 1}, {"full_support": 1}])
def test_training_tasks_are_parts_of_sequences(given):
    options, sequences = tiny.options(batch_size=40, **given), tiny.sequences()
    tasks = drawn_tasks(options, 0)
    ratings = list(zip(sequences.items.tolist(), sequences.ratings.tolist(), strict=True))
    users = [ratings[a:b] for a, b in zip(sequences.offsets, sequences.offsets[1:], strict=False)]
    for t in range(40):
        found, queries = unpack(tasks, t)
        support = [entry[:2] for entry in found.get(1, ())]
        whole = support + queries
        assert 1 <= len(queries) <= options.num_query_set
        assert len(support) == int(tasks.n_support[t]) < options.max_seq_len
        of_task = {
            number for number, user in enumerate(users) for i in range(len(user)) if whole == user[i : i + len(whole)]
        }
        assert int(tasks.fold[t]) - 1 in {user % dataloader.FOLDS for user in of_task}  # one query may be of several
        if given.get("full_support") == 1:
            [user] = of_task
            assert len(support) == min(6, len(users[user]) - len(queries))
        for window in found.values():
            part, positions = [entry[:2] for entry in window], [entry[2] for entry in window]
            assert any(part == support[i : i + len(part)] for i in range(len(support)))
            assert positions == list(range(len(part), 0, -1))
        assert not tasks.times[t][tasks.segment[t] == 0].any()


def test_support_lengths_are_uniform_in_the_logarithm():
    options = tiny.options(batch_size=20_000, full_support=0, num_query_set=1, max_seq_len=15)
    found = dataloader.sample_tasks(tiny.sequences([40]), np.array([0]), options, 0).n_support.numpy()
    for n in range(15):
        assert np.mean(found == n) == pytest.approx(np.log((n + 2) / (n + 1)) / np.log(16), abs=0.01)


@pytest.mark.parametrize("model", ["bert4rec", "gru4rec"])
def test_query_windows_end_at_the_query_and_stand_for_no_support_rating(model):
    options = tiny.options(batch_size=40, query_windows=True, num_query_set=3, model=model)
    tasks = drawn_tasks(options, 0)
    assert tasks.query.shape == (40, 1) and tasks.query.all() and not tasks.times[tasks.in_query].any()
    lengths = set()
    for t in range(40):
        found, [query] = unpack(tasks, t)
        whole = [entry[:2] for entry in found.get(1, ())] + [query]
        for number in (2, 3, 4):
            window = found[number]
            lengths.add(len(window))
            assert [entry[:2] for entry in window] == whole[-len(window) :]
            assert [entry[2] for entry in window] == list(range(len(window) - 1, -1, -1))
            assert tasks.in_query[t, number - 1, : len(window)].all()
            assert (tasks.segment[t][tasks.in_query[t]] == number).sum() == len(window)
        assert [entry[2] for entry in found.get(1, ())] == list(range(len(whole) - 1, 0, -1))
    assert lengths == set(range(1, 7)) and not tasks.n_support.all()
    assert (dataloader.sizes(tasks)[0] >= 4).all()  # rows 1 to 3 hold them, whether or not there is a support in row 0
    others = drawn_tasks(tiny.options(batch_size=40, num_query_set=1, model=model), 0)
    assert torch.equal(tasks.times.sum((1, 2)), others.times.sum((1, 2)))  # of the same supports and windows


def test_sampling_is_a_function_of_seed_and_stream():
    options = tiny.options()
    first = drawn_tasks(options, 3)
    np.random.seed(9)
    torch.manual_seed(9)
    assert same(first, drawn_tasks(options, 3)) and not same(first, drawn_tasks(options, 4))
    options.random_seed += 1
    assert not same(first, drawn_tasks(options, 3))


@pytest.mark.parametrize("back", [0, 1])
@pytest.mark.parametrize("shots", [None, 1, 3])
def test_evaluation_has_the_last_rating_as_target(shots, back):
    options, sequences, users = tiny.options(), tiny.sequences(), np.array([0, 2, 3, 4, 5])
    tasks = dataloader.last_tasks(sequences, users, options, shots, back)
    assert not tasks.fold.any()
    for t, user in enumerate(users):
        end = sequences.offsets[user + 1] - 1 - back
        first = max(sequences.offsets[user], end - (options.max_seq_len - 1 if shots is None else shots))
        found, queries = unpack(tasks, t)
        assert queries == [(sequences.items[end], sequences.ratings[end])]
        assert [entry[0] for entry in found[1]] == sequences.items[first:end].tolist()
        assert [entry[1] for entry in found[1]] == sequences.ratings[first:end].tolist()
        alone = dataloader.last_tasks(sequences, users[t : t + 1], options, shots, back)
        assert unpack(alone, 0) == unpack(tasks, t)
    assert same(tasks, dataloader.last_tasks(sequences, users, options, shots, back))


def test_users_without_support_are_left_out():
    sequences = tiny.sequences(lengths=(1, 2, 3, 9))
    assert dataloader.usable_users(sequences, np.arange(4)).tolist() == [1, 2, 3]


@pytest.mark.parametrize("lengths", [(2, 2), (3, 5), (9, 30)])
def test_shapes_hang_on_the_options_alone(lengths):
    """So that a GPU can do a whole step again and again; the number of rows alone follows from the windows."""
    options = tiny.options(batch_size=5)
    sequences, users = tiny.sequences(lengths), np.arange(2)
    tasks = dataloader.sample_tasks(sequences, users, options, 0)
    positions, queries = options.max_seq_len - 1, options.num_query_set
    assert tasks.items.shape[::2] == (5, positions) and tasks.query.shape == (5, queries)
    assert tasks.table.shape == (5, 1 + positions + queries)
    last = dataloader.last_tasks(sequences, users, options, shots=1)
    assert last.items.shape[::2] == (2, positions) and last.table.shape == (2, 2 + positions)


# -----------------------------------------------------------------------------
# parts of a meta-batch


@pytest.mark.parametrize("purpose", ["adapt", "predict"])
@pytest.mark.parametrize(("budget", "chunk"), [(10**6, 0), (10**6, 1), (10**6, 3), (60, 0), (60, 2), (1, 0)])
def test_parts_hold_every_task_once_and_unchanged_within_the_budget(budget, chunk, purpose, monkeypatch):
    monkeypatch.setitem(dataloader.AT_ONCE, purpose, budget)
    tasks, seen, positions = drawn_tasks(tiny.options(batch_size=20), 0), [], []
    for numbers, part in dataloader.parts(tasks, torch.device("cpu"), purpose, chunk):
        assert len(numbers) == len(part.table) <= (chunk or 20)
        assert len(numbers) == 1 or part.items.numel() <= budget
        positions.append(part.items[0].numel())
        for place, t in enumerate(numbers):
            assert unpack(part, place) == unpack(tasks, t)
            assert part.n_support[place] == tasks.n_support[t]
            assert part.segment[place, 0, 0] == min(1, tasks.n_support[t])
        seen += numbers.tolist()
        real = part.segment > 0
        assert not real.any() or (
            real.any(0).any(0).all() and real.any(0).any(1).all()
        )  # no row or column is empty in all tasks
    assert sorted(seen) == list(range(20))
    assert positions == sorted(positions, reverse=True)


@pytest.mark.parametrize("chunk", [0, 3, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_tasks_evenly(world_size, chunk):
    tasks = drawn_tasks(tiny.options(batch_size=29), 0)
    shares = [dataloader.share(tasks, chunk, rank, world_size) for rank in range(world_size)]
    every = [number for groups in shares for group in groups for number in group]
    assert sorted(every) == list(range(29))
    assert all(len(group) <= (chunk or 29) for groups in shares for group in groups)
    _, _, size = dataloader.sizes(tasks)
    work = [sum(int(size[group].sum()) for group in groups) for groups in shares]
    assert max(work) - min(work) <= 2 * int(size.max())


def test_groups_are_the_same_for_any_number_of_ranks():
    tasks = drawn_tasks(tiny.options(batch_size=24), 0)
    groups = [
        sorted(group.tolist() for rank in range(size) for group in dataloader.share(tasks, 3, rank, size))
        for size in (1, 2, 4)
    ]
    assert groups[0] == groups[1] == groups[2] and len(groups[0]) == 8
