"""From a table of ratings to batches of tasks: user splits, support windows, packing, task-local item tables.

Everything works on flat arrays, for all tasks of a meta-batch at once. Shapes: T tasks, R rows of support, S positions
in a row, W windows of a support, Q queries, U places in a task's item table.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from options import LEARNERS
from ratings.cache import load_ratings
from ratings.table import Ratings, nearest_level
from utils import UserError, random_stream, shorten

AT_ONCE = {"adapt": 5000, "predict": 27_000}  # positions of a part whose arrays a processor's cache holds
ON_GPU = 1 << 20  # positions of a part on a GPU, where the number of operations is what counts
ROWS = 4  # of a part that a GPU adapts to, or a multiple of it
EPOCHS, LEAST_ITERATIONS = 18, 250  # of a training whose --num_train_iterations is not given
FOLDS = 4  # of the training users; each meets item tables that were fitted without it


class Tasks(NamedTuple):
    """A meta-batch as tensors.

    A row holds several windows of the user's support, one after the other, which the segment tells apart. Row 0 begins
    with the whole support: it is what the queries read. A query is an item to rate as the next one after it.
    """

    table: torch.Tensor  # (T, U) catalogue numbers, from 1, of the items that the task uses; 0 is padding
    items: torch.Tensor  # (T, R, S) places in the task's table
    ratings: torch.Tensor  # (T, R, S) standardised ratings
    segment: torch.Tensor  # (T, R, S) number of the window, from 1; 0 is padding
    position: torch.Tensor  # (T, R, S) counted from the window's end, which is 1 or, see `query_windows`, 0
    times: torch.Tensor  # (T, R, S) number of windows that the position stands for; see `keep_longest`
    n_support: torch.Tensor  # (T,) number of support ratings
    query_items: torch.Tensor  # (T, Q) places in the task's table
    query_ratings: torch.Tensor  # (T, Q) standardised targets
    query: torch.Tensor  # (T, Q) whether there is a query
    query_weight: torch.Tensor  # (T, Q) what its error counts in the meta-objective
    in_query: torch.Tensor  # (T, R, S) whether the position is in a query window; see `query_windows`
    fold: torch.Tensor  # (T,) fold of the training users, from 1, that the user is in; 0 is none; see `item_tables`

    def to(self, device):
        """The same tasks on a device."""
        return Tasks(*(tensor.to(device, non_blocking=True) for tensor in self))

    def take(self, tasks, rows=None, width=None):
        """The tasks of these numbers or slice, with their first `rows` rows of `width` positions."""
        part = Tasks(*(tensor[tasks] for tensor in self))
        return part._replace(**{name: getattr(part, name)[:, :rows, :width] for name in IN_ROWS})


IN_ROWS = ("items", "ratings", "segment", "position", "times", "in_query")  # those of shape (T, R, S)


class Sequences(NamedTuple):
    """Users' ratings in time order on flat arrays; user u's are offsets[u]:offsets[u + 1]."""

    offsets: np.ndarray  # (n_users + 1,)
    items: np.ndarray  # (n,) catalogue numbers, from 1
    ratings: np.ndarray  # (n,) standardised
    levels: np.ndarray = np.zeros(1)  # (n_levels,) standardised rating levels
    weights: np.ndarray = np.ones(1)  # (n_levels,) what an error in a rating of each level counts in training


class Problem(NamedTuple):
    """The ratings, who is trained, validated and tested on, and the training ratings' mean and deviation."""

    ratings: Ratings
    sequences: Sequences
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    mean: float
    std: float


# -----------------------------------------------------------------------------
# users


def load_problem(options):
    """Read the ratings and split their users; users without any support rating are left out."""
    ratings = load_ratings(options)
    train, validation, test = split_users(len(ratings.user_ids), options, named_users(ratings, options.test_prefix))
    sequences, mean, std = standardise(ratings, train, options.balance)
    usable = [usable_users(sequences, users) for users in (train, validation, test)]
    if not all(len(users) for users in usable):
        raise UserError("the split leaves no users to train, validate or test on; lower --num_test_data or the filters")
    return Problem(ratings, sequences, *usable, mean, std)


def named_users(ratings, prefix):
    """The users whose ids begin with `prefix`, None without one; UserError where these are none or too many."""
    if not prefix:
        return None
    found = np.flatnonzero(np.char.startswith(ratings.user_ids, prefix))
    if not 0 < len(found) <= len(ratings.user_ids) - 2:
        raise UserError(
            f"--test_prefix={shorten(prefix)} is the beginning of {len(found)} of {len(ratings.user_ids)} users' ids: "
            "give a prefix that leaves some to test on and two to train and validate on"
        )
    return found


def split_users(n_users, options, test=None):
    """Split users, never ratings, into (train, validation, test), each an ascending array of user numbers.

    Test users are `test` where it is given, else drawn by `random_seed`, or fold `fold` of `num_folds`; 15 % of the
    rest validate. Where `num_train_users` is not 0, that many of the others train; a larger number adds users.
    """
    rng = np.random.RandomState(options.random_seed)
    if options.fold >= 0:
        if options.num_folds > n_users:
            raise UserError(f"--num_folds={options.num_folds} is more than the {n_users} users; lower it")
        test = np.array_split(rng.permutation(n_users), options.num_folds)[options.fold]
    elif test is None:
        n_test = options.num_test_data or min(1000, max(1, n_users // 6))
        if n_test > n_users - 2:
            raise UserError(
                f"--num_test_data={n_test} leaves too few of the {n_users} users to train and validate on; lower it"
            )
        test = rng.choice(n_users, n_test, replace=False)
    rest = np.setdiff1d(np.arange(n_users), test)
    rest = np.random.RandomState([options.random_seed, 1]).permutation(rest)
    n_train = min(max(1, round(0.85 * len(rest))), len(rest) - 1)
    if options.num_train_users > n_train:
        raise UserError(
            f"--num_train_users={options.num_train_users} is more than the {n_train} training users; lower it"
        )
    return np.sort(rest[: options.num_train_users or n_train]), np.sort(rest[n_train:]), np.sort(test)


def standardise(ratings, train, balance=0.0):
    """`Ratings` as `Sequences`, with the mean and deviation of the training users' ratings: (sequences, mean, std).

    A level with the share s of these ratings has a weight in proportion to s^-balance; their mean over ratings is 1.
    """
    of_train = np.repeat(np.isin(np.arange(len(ratings.user_ids)), train), np.diff(ratings.offsets))
    values = ratings.values[of_train].astype(np.float64)
    mean, std = float(values.mean()), float(values.std()) or 1.0
    standard = ((ratings.values - mean) / std).astype(np.float32)
    level = nearest_level(values, ratings.levels)  # where ratings have many values, levels stand for several
    share = np.bincount(level, minlength=len(ratings.levels)) / len(values)
    weights = np.where(share > 0, share, 1.0) ** -balance
    weights /= weights @ share
    levels = (ratings.levels - mean) / std
    return Sequences(ratings.offsets, ratings.items.astype(np.int64) + 1, standard, levels, weights), mean, std


def count_ratings(problem):
    """Number of ratings (n_items,) that the training users gave each item."""
    offsets, items = problem.sequences.offsets, problem.sequences.items
    of_train = np.repeat(np.isin(np.arange(len(offsets) - 1), problem.train), np.diff(offsets))
    return np.bincount(items[of_train] - 1, minlength=len(problem.ratings.item_ids))


def count_iterations(options, problem):
    """The iterations where --num_train_iterations is not given: tasks enough for EPOCHS or --pretrain_epochs."""
    epochs = EPOCHS if options.num_inner_steps else options.pretrain_epochs
    return max(LEAST_ITERATIONS, math.ceil(epochs * len(problem.train) / options.batch_size))


def usable_users(sequences, users):
    """Those of `users` with a target and at least one rating before it."""
    return users[np.diff(sequences.offsets)[users] > 1]


# -----------------------------------------------------------------------------
# tasks


def sample_tasks(sequences, users, options, *stream):
    """Draw `batch_size` training tasks; the same (random_seed, stream) draws the same tasks.

    A task is a random part of a random user's sequence. The support has all the ratings that fit in a share of
    `full_support` of the tasks. In the others it has a random number of them, from none on and short ones more often,
    as new users have. The one to `num_query_set` ratings that follow are the queries; each is to be rated as the next
    one after the support. With --query_windows there is one, and the windows that end at it are laid out beside those
    of the support.
    """
    rng = random_stream(options.random_seed, *stream)
    count, longest = options.batch_size, options.max_seq_len - 1
    user = users[rng.integers(len(users), size=count)]
    length = sequences.offsets[user + 1] - sequences.offsets[user]
    most_queries = 1 if options.query_windows else options.num_query_set
    n_query = np.minimum(rng.integers(1, most_queries + 1, size=count), length - 1)
    most = np.minimum(longest, length - n_query)
    cut = ((most + 2) ** rng.random(count)).astype(np.int64) - 1  # 0 to `most`, uniform in the logarithm of cut + 1
    n_support = np.where(rng.random(count) < options.full_support, most, cut)
    start = sequences.offsets[user] + rng.integers(0, length - n_support - n_query + 1)
    windows = support_windows(n_support, options, rng)
    ends = query_windows(n_support, options, rng) if options.query_windows else None
    tasks = build_tasks(sequences, start, n_support, n_query, most_queries, windows, options, ends)
    return tasks._replace(fold=torch.from_numpy(user % FOLDS + 1))


def last_tasks(sequences, users, options, shots=None, back=0, count=1):
    """The evaluation tasks: each user's last `count` ratings, a number or (T,), are queries, those before the support.

    `shots` keeps only that many of the most recent support ratings (the cold-start curve). `back` leaves out that
    many of the user's last ratings first.
    """
    end = sequences.offsets[users + 1] - count - back
    longest = options.max_seq_len - 1 if shots is None else shots
    n_support, n_query = np.minimum(end - sequences.offsets[users], longest), np.broadcast_to(count, len(users))
    windows = support_windows(n_support, options)
    return build_tasks(sequences, end - n_support, n_support, n_query, n_query.max(initial=1), windows, options)


def build_tasks(sequences, start, n_support, n_query, most_queries, windows, options, ends=None):
    """`Tasks` of `n_support` (T,) ratings from row `start` (T,) of the sequences on, with `n_query` (T,) queries."""
    place = start[:, None] + n_support[:, None] + np.arange(most_queries)
    query = np.arange(most_queries) < n_query[:, None]
    place = np.where(query, place, start[:, None])
    queries = sequences.items[place] * query, sequences.ratings[place] * query, query
    return assemble(sequences, start, n_support, windows, queries, options, ends)


def assemble(sequences, start, n_support, windows, queries, options, ends=None):
    """`Tasks` from supports of `n_support` (T,) ratings from row `start` (T,) of the sequences on.

    `windows` are those of `support_windows`; `queries` are items (T, Q), ratings (T, Q) and a mask (T, Q). `ends` are
    those of `query_windows`; they begin rows 1, 2, ..., and stand for no support rating.
    """
    window_start, length, layout = windows
    query_items, query_ratings, query = queries
    longest = options.max_seq_len - 1

    # Where each position of a layout comes from: a place `at` in the support
    length, times = keep_longest(window_start, length, keeps_longest(options))
    n_ends, n_known = 0, n_support
    if ends is not None:
        parts, times = zip((window_start[layout], length[layout]), ends, strict=True), times[layout]
        window_start, length = (np.concatenate([own[:, :1], end, own[:, 1:]], 1) for own, end in parts)
        n_ends, n_known, layout = ends[0].shape[1], n_support + 1, np.arange(len(start))
    row, column = pack(length, longest, n_ends)
    number, window, inside = positions(length)
    place = number, row[number, window], column[number, window] + inside
    in_query, ends_at_query = (window > 0) & (window <= n_ends), (window > 0) & options.query_windows
    first, after = np.minimum((window_start[number, window], inside), np.array(times.shape[1:])[:, None] - 1)

    def laid_out(values, dtype):
        out = np.zeros((len(length), 1 + row.max(), longest), dtype)
        out[place] = values
        return out[layout]

    at = laid_out(window_start[number, window] + inside, np.int64)
    segment = laid_out(window + 1, np.int64)

    # The supports (T, S), with query windows also the query, and from them the rows of all windows (T, R, S)
    known = longest + (ends is not None)
    task, inner = (np.arange(known) < n_known[:, None]).nonzero()
    items, ratings = np.zeros((len(start), known), np.int64), np.zeros((len(start), known), np.float32)
    items[task, inner] = sequences.items[start[task] + inner]
    ratings[task, inner] = sequences.ratings[start[task] + inner]
    table, slots = task_tables(np.concatenate([items, query_items], axis=1), 1 + longest + query_items.shape[1])

    def in_rows(values):
        return np.take_along_axis(values, at.reshape(len(at), -1), 1).reshape(at.shape) * (segment > 0)

    arrays = Tasks(
        table=table,
        items=in_rows(slots[:, :known]),
        ratings=in_rows(ratings),
        segment=segment,
        position=laid_out(length[number, window] - inside - ends_at_query, np.int64),
        times=laid_out(np.where(in_query, 0, times[number, first, after]), np.float32),
        in_query=laid_out(in_query, np.bool_),
        n_support=n_support,
        query_items=slots[:, known:],
        query_ratings=query_ratings.astype(np.float32),
        query=query,
        query_weight=sequences.weights[nearest_level(query_ratings, sequences.levels)].astype(np.float32),
        fold=np.zeros(len(start), np.int64),
    )
    return Tasks(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


def support_windows(n_support, options, rng=None):
    """Up to `num_samples` distinct windows of each support: (start (L, W), length (L, W), layout (T,)).

    A support has the windows of its layout; length 0 is padding. Window 0 is the whole support, and the only one where
    there are no inner steps to learn from the others. Windows are numbered by falling length, so that number i lacks
    d = floor((sqrt(8 i + 1) - 1) / 2) ratings. Without `rng` the numbers lie at equal distances, so that supports of
    one length have one layout.
    """
    most = options.num_samples if options.num_inner_steps else 1
    layout = np.arange(len(n_support))
    if rng is None or most == 1:
        n_support, layout = np.unique(n_support, return_inverse=True)
    shortest = np.minimum(options.min_sub_window_size, np.maximum(n_support, 1))
    kinds = n_support - shortest + 1
    total = kinds * (kinds + 1) // 2
    if rng is None or most == 1:
        chosen = np.minimum(most, total)[:, None]
        rank = np.arange(most)
        number = np.where(rank < chosen, rank * total[:, None] // np.maximum(chosen, 1), -1)
    else:
        keys = rng.random((len(n_support), max(most, total.max())))
        keys[:, 0] = -1
        keys[np.arange(keys.shape[1]) >= total[:, None]] = 2
        number = np.argsort(keys, axis=1)[:, :most]
        number = np.where(np.take_along_axis(keys, number, 1) < 2, number, -1)
    lacking = ((np.sqrt(8 * np.maximum(number, 0) + 1) - 1) // 2).astype(np.int64)
    length = np.where(number >= 0, n_support[:, None] - lacking, 0)
    return np.maximum(number, 0) - lacking * (lacking + 1) // 2, length, layout


def query_windows(n_support, options, rng):
    """`num_query_set` windows of random length that end at the rating after each support: (start, length), (T, W).

    Their last position is that of a query, 0, which all windows but the history then share.
    """
    most = np.minimum(n_support + 1, options.max_seq_len - 1)[:, None]
    least = np.minimum(options.min_sub_window_size, most)
    length = rng.integers(least, most + 1, size=(len(n_support), options.num_query_set))
    return n_support[:, None] + 1 - length, length


def keeps_longest(options):
    """Whether what a learner and its loss compute at a position depends on the window's start alone, not on its end."""
    reads_end = options.use_adaptive_loss and options.loss_network != "lstm"  # the others see how recent a rating is
    return LEARNERS[options.model].recurrent and not reads_end


def keep_longest(start, length, longest_alone):
    """With `longest_alone`, keep only the longest of the windows (T, W) of one start: it stands for all of them.

    Returns the lengths of the windows (0 where one is left out), and how many windows each position stands for
    (T, start, place).
    This makes the paper form of NARM and GRU4Rec 1.4 times as fast.
    """
    starts, places = start.max(initial=0) + 1, length.max(initial=1)
    if not longest_alone:
        return length, np.ones((len(length), starts, places), np.int64)
    times, most = np.zeros((len(length), starts, places), np.int64), np.zeros((len(length), starts), np.int64)
    task, window = np.nonzero(length)
    times[task, start[task, window], length[task, window] - 1] = 1  # windows are distinct
    every = np.arange(len(length))[:, None]
    np.maximum.at(most, (every, start), length)
    return np.where(length == most[every, start], length, 0), times[..., ::-1].cumsum(-1)[..., ::-1]


def pack(length, width, n_ends=0):
    """First-fit packing of windows (T, W) into rows of `width` positions, longest first: (row, column), each (T, W).

    Window 0 begins row 0, and the `n_ends` windows after it the rows after it.
    """
    fixed = np.arange(1 + n_ends)
    order = np.argsort(-length[:, len(fixed) :], axis=1, kind="stable") + len(fixed)
    row, column, used = np.zeros_like(length), np.zeros_like(length), np.zeros_like(length)
    row[:, fixed], used[:, fixed] = fixed, length[:, fixed]
    tasks = np.arange(len(length))
    for window in order.T:
        need = length[tasks, window]
        first = np.argmax(used + need[:, None] <= width, axis=1)
        row[tasks, window], column[tasks, window] = first, used[tasks, first]
        used[tasks, first] += need
    return row, column


def positions(length):
    """(task, window, place within the window) of every position of windows with `length` (T, W)."""
    task, window = np.nonzero(length)
    count = length[task, window]
    inside = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(task, count), np.repeat(window, count), inside


def task_tables(items, places):
    """Each task's distinct items (T, U = places), padding first, and the place of `items` (T, N) in them."""
    items = np.concatenate([np.zeros((len(items), 1), items.dtype), items], axis=1)
    width = items.shape[1]  # numbers and places are sorted as one, in a fraction of argsort's time
    ranked, order = np.divmod(np.sort(items * width + np.arange(width), axis=1), width)
    rank = np.cumsum(np.diff(ranked, axis=1, prepend=0) > 0, axis=1)
    slots = np.empty_like(rank)
    np.put_along_axis(slots, order, rank, axis=1)
    table = np.zeros((len(items), places), items.dtype)
    np.put_along_axis(table, rank, ranked, axis=1)
    return table, slots[:, 1:]


# -----------------------------------------------------------------------------
# parts of a meta-batch


def sizes(tasks):
    """Rows, width and number of positions that each task needs, three tensors (T,)."""
    used = tasks.segment > 0
    rows = (used.any(2) * torch.arange(1, used.shape[1] + 1)).amax(1).clamp_min(1)  # row 0 of no support is empty
    width = used.any(1).sum(1).clamp_min(1)
    return rows, width, rows * torch.where(rows > 1, tasks.items.shape[2], width)


def parts(tasks, device, purpose="predict", chunk=0):
    """Cut a meta-batch into parts of tasks of like size: (their numbers, `Tasks`), the largest first.

    `purpose` is adapt (with a meta-gradient) or predict. On a CPU, a part has at most AT_ONCE[purpose] positions; on a
    GPU, ON_GPU. It has at most `chunk` tasks, unless that is 0, but one task at least. A GPU has a graph for each shape
    that it adapts to: so rows are rounded up to a multiple of ROWS there, and have all positions.
    """
    rows, width, size = sizes(tasks)
    budget = ON_GPU if device.type == "cuda" else AT_ONCE[purpose]
    for_graphs = device.type == "cuda" and purpose == "adapt"
    order, first = size.argsort(descending=True, stable=True), 0
    while first < len(order):
        most = max(1, int(budget // size[order[first]]))
        numbers = order[first : first + min(most, chunk or most)]
        some = numbers
        if len(numbers) == len(order):  # all of them, which need not be copied
            numbers, some = torch.arange(len(order)), slice(None)
        part = tasks.take(some, rows[some].max(), None if for_graphs else width[some].max())
        yield numbers, add_rows(part, ROWS) if for_graphs else part
        first += len(numbers)


def add_rows(tasks, multiple):
    """The same tasks with empty rows, so that their number is one or a multiple of `multiple`."""
    n_rows = tasks.items.shape[1]
    more = -n_rows % multiple if n_rows > 1 else 0
    return tasks._replace(**{name: F.pad(getattr(tasks, name), (0, 0, 0, more)) for name in IN_ROWS})


def share(tasks, chunk=0, rank=0, world_size=1):
    """The numbers of the tasks that a rank takes, in groups of at most `chunk` (0: in one group).

    Tasks go to the groups in turns by size, so that all ranks have as much to do. With `chunk` the groups are the same
    for any number of ranks that divides their number.
    """
    total = len(tasks.table)
    groups = -(-total // chunk) if chunk else 1
    groups = -(-groups // world_size) * world_size
    if groups == 1:
        return [np.arange(total)]
    turn = np.arange(total) % (2 * groups)
    group = np.minimum(turn, 2 * groups - 1 - turn)
    order = sizes(tasks)[2].argsort(descending=True, stable=True).numpy()
    mine = range(rank, groups, world_size)
    return [numbers for number in mine if len(numbers := np.sort(order[group == number]))]
