"""From a table of ratings to batches of tasks: user splits, support windows, packing, task-local item tables.

Everything here works on flat arrays, for all tasks of a batch at once. Shapes: T tasks, B blocks of R rows of support,
S positions in a row, Q queries, U distinct items of a task and one for padding.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from ratings.cache import load_ratings
from ratings.table import Ratings, nearest_level
from utils import UserError, random_stream


class Tasks(NamedTuple):
    """A batch of tasks as tensors. Item 0 and segment 0 are padding.

    Rows hold windows of the user's support, several packed into one row and told apart by their segment. Tasks with
    many rows have them in several blocks of R: the first T blocks are the first ones of the T tasks.
    A query is one item to be rated as the next one after the first window of row 0 of the task's first block.
    """

    table: torch.Tensor  # (T, U) catalogue numbers, 1-based, of the items that the task uses
    items: torch.Tensor  # (B, R, S) places in the task's table
    ratings: torch.Tensor  # (B, R, S) standardised ratings
    segment: torch.Tensor  # (B, R, S) number of the window, from 1; 0 = nothing
    position: torch.Tensor  # (B, R, S) counted from the window's end, which is 1
    known: torch.Tensor  # (B, R, S) whether the learner may read the rating
    support: torch.Tensor  # (B, R, S) whether the position counts in the support loss
    times: torch.Tensor  # (B, R, S) how often it does: once for each window that it stands for, see `share_starts`
    query_items: torch.Tensor  # (T, Q) places in the task's table
    query_ratings: torch.Tensor  # (T, Q) standardised targets
    query: torch.Tensor  # (T, Q) whether there is a query
    query_weight: torch.Tensor  # (T, Q) what its error counts in the meta-objective
    part: torch.Tensor  # (T,) part of the users, from 1, whose item tables were fitted without the user; 0: none
    query_last: torch.Tensor  # (T,) last position of the query's history in row 0; -1: no history
    task: torch.Tensor  # (B,) number of the task that a block is of; read where B > T alone

    def to(self, device):
        """The same tasks on a device."""
        return Tasks(*(tensor.to(device, non_blocking=True) for tensor in self))


IN_ROWS = ("items", "ratings", "segment", "position", "known", "support", "times")  # those of shape (B, R, S)


class Sequences(NamedTuple):
    """Users' ratings in time order on flat arrays; user u's are offsets[u]:offsets[u + 1]."""

    offsets: np.ndarray  # (n_users + 1,)
    items: np.ndarray  # (n,) catalogue numbers, 1-based
    ratings: np.ndarray  # (n,) standardised
    levels: np.ndarray = np.zeros(1)  # (n_levels,) standardised rating levels
    weights: np.ndarray = np.ones(1)  # (n_levels,) what an error in a rating of each level counts in training


def split_users(n_users, options):
    """Split users, never ratings, into (train, validation, test), each an ascending array of user numbers.

    Test users are drawn by `random_seed`, or are fold `fold` of `num_folds`; 15 % of the rest validate.
    """
    rng = np.random.RandomState(options.random_seed)
    if options.fold >= 0:
        if options.num_folds > n_users:
            raise UserError(f"--num_folds={options.num_folds} is more than the {n_users} users; lower it")
        test = np.array_split(rng.permutation(n_users), options.num_folds)[options.fold]
    else:
        if options.num_test_data > n_users - 2:
            raise UserError(
                f"--num_test_data={options.num_test_data} leaves too few of the {n_users} users to train and "
                "validate on; lower it"
            )
        test = rng.choice(n_users, options.num_test_data, replace=False)
    rest = np.setdiff1d(np.arange(n_users), test)
    rest = np.random.RandomState([options.random_seed, 1]).permutation(rest)
    n_train = min(max(1, round(0.85 * len(rest))), len(rest) - 1)
    return np.sort(rest[:n_train]), np.sort(rest[n_train:]), np.sort(test)


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


def usable_users(sequences, users, min_support=1):
    """Those of `users` with a target and at least `min_support` ratings before it."""
    return users[np.diff(sequences.offsets)[users] > min_support]


class Stretches(NamedTuple):
    """Tasks as stretches of users' sequences, before any item is looked up; W windows a support."""

    start: np.ndarray  # (T,) row of the first support rating
    n_support: np.ndarray  # (T,)
    n_query: np.ndarray  # (T,) ratings after the support that are asked
    part: np.ndarray  # (T,) as in `Tasks`
    window_start: np.ndarray  # (T, W) see `support_windows`
    window_length: np.ndarray  # (T, W) likewise


def sample_stretches(sequences, users, options, *stream):
    """Draw `batch_size` training tasks; the same (random_seed, stream) draws the same tasks.

    A task is a random stretch of a random user's sequence: its support is cut to a random length in a share of
    1 - `full_support` of the tasks, and the one to `num_query_set` ratings that follow are the queries, each asked as
    the next one.
    """
    rng = random_stream(options.random_seed, *stream)
    count, longest = options.batch_size, options.max_seq_len - 1
    user = users[rng.integers(len(users), size=count)]
    length = sequences.offsets[user + 1] - sequences.offsets[user]
    n_query = np.minimum(rng.integers(1, options.num_query_set + 1, size=count), length - 1)
    most = np.minimum(longest, length - n_query)
    cut = rng.integers(1, most + 1)
    n_support = np.where(rng.random(count) < options.full_support, most, cut)
    start = sequences.offsets[user] + rng.integers(0, length - n_support - n_query + 1)
    part = user % options.cross_fit + 1 if options.cross_fit else np.zeros_like(user)
    return Stretches(start, n_support, n_query, part, *support_windows(n_support, options, rng))


def last_tasks(sequences, users, options, shots=None, back=0):
    """The evaluation tasks: each user's last rating is the target, the ratings before it the support.

    `shots` keeps only that many of the most recent support ratings (the cold-start curve); `back` leaves out that
    many of the user's last ratings first.
    """
    end = sequences.offsets[users + 1] - 1 - back
    longest = options.max_seq_len - 1 if shots is None else shots
    n_support = np.minimum(end - sequences.offsets[users], longest)
    windows = support_windows(n_support, options)
    stretches = Stretches(end - n_support, n_support, np.ones_like(end), np.zeros_like(end), *windows)
    return build_tasks(sequences, stretches, options)


def take(stretches, numbers):
    """The stretches of these numbers."""
    return Stretches(*(values[numbers] for values in stretches))


def items_of(sequences, stretches):
    """Catalogue numbers of all items of stretches, ascending, and 0 for padding."""
    length = stretches.n_support + stretches.n_query
    task, _, inside = positions(length[:, None])
    return np.unique(np.append(sequences.items[stretches.start[task] + inside], 0))


def build_tasks(sequences, stretches, options):
    """`Tasks` whose support and queries are stretches of sequences."""
    start, n_support, n_query, part, *windows = stretches
    place = start[:, None] + n_support[:, None] + np.arange(n_query.max())
    query = np.arange(n_query.max()) < n_query[:, None]
    place = np.where(query, place, start[:, None])
    query_items, query_ratings = sequences.items[place] * query, sequences.ratings[place] * query
    asked = query_items, query_ratings, query
    return assemble(sequences, start, n_support, windows, asked, options)._replace(part=torch.from_numpy(part))


def assemble(sequences, start, n_support, windows, asked, options):
    """`Tasks` from supports in `sequences`, of `n_support` (T,) ratings from row `start` (T,) on, their windows as
    `support_windows` gives them, and `asked`: query items (T, Q), ratings (T, Q) and mask (T, Q)."""
    (window_start, window_length), (query_items, query_ratings, query) = windows, asked
    window_length, times = share_starts(window_start, window_length, shares_starts(options))
    row, column = pack(window_length, np.maximum(n_support, 1))
    shape = (len(start), row.max() + 1, max(1, (column + window_length).max()))

    task, window, inside = positions(window_length)
    source = start[task] + window_start[task, window] + inside
    place = (task, row[task, window], column[task, window] + inside)
    from_end = window_length[task, window] - inside
    hidden = is_hidden(window, from_end, options)
    counts = hidden if uses_cloze(options) else np.ones_like(hidden)

    def rows(values, dtype):
        out = np.zeros(shape, dtype)
        out[place] = values
        return out

    items = rows(sequences.items[source], np.int64)
    table, slots = task_tables(np.concatenate([items.reshape(len(start), -1), query_items], axis=1))
    split = items[0].size
    arrays = Tasks(
        table=table,
        items=slots[:, :split].reshape(shape),
        ratings=rows(sequences.ratings[source], np.float32),
        segment=rows(window + 1, np.int64),
        position=rows(from_end, np.int64),
        known=rows(~hidden, bool),
        support=rows(counts, bool),
        times=rows(counts * times[task, window_start[task, window], inside], np.int64),
        query_items=slots[:, split:],
        query_ratings=query_ratings.astype(np.float32),
        query=query,
        query_weight=sequences.weights[nearest_level(query_ratings, sequences.levels)].astype(np.float32),
        part=np.zeros(len(start), np.int64),
        query_last=n_support - 1,
        task=np.arange(len(start)),
    )
    return Tasks(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


def deal(stretches, groups, options):
    """Deal tasks into groups of about as many ratings, in turns by size: the numbers of each group's tasks."""
    length = stretches.window_length
    length = longest_of_start(stretches.window_start, length) if shares_starts(options) else length
    order = np.argsort(-length.sum(1), kind="stable")
    turn = np.arange(len(order)) % (2 * groups)
    group = np.minimum(turn, 2 * groups - 1 - turn)
    return [np.sort(order[group == number]) for number in range(groups)]


PART = 900  # positions whose arithmetic costs as much as calling the operations of another part
CACHE = 6000  # positions whose arrays fill a processor's cache
AT_ONCE = 27_000  # the same without a meta-gradient, for which fewer arrays wait
STRIP = 64  # tasks at which a part may begin that are looked at together
BLOCK = 2  # rows in a block, unless all of a task's are in one
WEIGHTS = 15  # positions whose arithmetic costs as much as copying a task's weights for a block
ON_GPU = 256  # tasks at once on a GPU, where calling operations is what costs


def by_size(tasks, chunk=0, on_gpu=False, cache=CACHE):
    """Split a meta-batch into parts of like size, packed anew: (numbers of its tasks, `Tasks`) for each part.

    A part holds `chunk` tasks; with chunk 0 parts are as large as is cheapest, see `part_lengths`, for which `cache` is
    the most that one costs, and large on a GPU.
    """
    length = window_lengths(tasks.segment.cpu().numpy())
    used, width = length.sum(1), length.max(1).clip(1)
    order = np.lexsort((-used, -width))
    if chunk or on_gpu:
        ends = np.arange(0, len(order), chunk or ON_GPU)[1:]
    else:
        ends = np.cumsum(part_lengths(used[order], width[order], cache))[:-1]
    if len(order) and not len(ends) and tasks.segment.shape[1:] == (1, width.max()):
        yield np.arange(len(order)), cut(tasks)  # as they are, packing anew changes nothing
        return
    for numbers in np.split(order, ends) if len(order) else ():
        widest = int(width[numbers].max())
        row, column = pack(length[numbers], np.full(len(numbers), widest))
        rows = 1 + np.where(length[numbers], row, 0).max(1)
        (height,), _ = block_costs(rows[None], np.array([widest]))
        yield numbers, cut(lay_out(tasks, numbers, length[numbers], row, column, widest, height[-1]))


def window_lengths(segment):
    """Lengths (T, W) of the windows whose numbers are in segment (B, R, S)."""
    windows = max(1, segment.max(initial=0))
    flat = (segment + np.arange(len(segment))[:, None, None] * (windows + 1)).ravel()
    return np.bincount(flat, minlength=len(segment) * (windows + 1)).reshape(-1, windows + 1)[:, 1:]


def part_lengths(used, width, cache):
    """The numbers of tasks of the parts that cost least together; ratings and width (T,) of each, the widest first.

    A part costs its blocks, see `block_costs`, and PART for its calls; only one of a single task outgrows `cache`.
    """
    n = len(used)
    if n and is_one_part(used, width, cache):
        return [n]
    cost, length = np.zeros(n + 1), np.empty(n, np.int64)  # of what follows each task, and of the part it begins
    for begin in reversed(range(0, n, STRIP)):
        sizes = part_sizes(used[begin:], width[begin : begin + STRIP], cache)
        fits = (sizes <= cache).sum(1).clip(1)
        for first in reversed(range(begin, begin + len(sizes))):
            whole = sizes[first - begin, : fits[first - begin]] + cost[first + 1 : first + 1 + fits[first - begin]]
            length[first] = whole.argmin() + 1
            cost[first] = whole.min() + PART
    lengths, first = [], 0
    while first < n:
        lengths.append(int(length[first]))
        first += lengths[-1]
    return lengths


def is_one_part(used, width, cache):
    """Whether a look at the least that two parts cost, and three, shows that no parts save the calls of another."""
    n, first = len(used), np.arange(1, len(used))
    whole = block_costs(-(-used // width[0])[None], width[:1])[1][0, -1]
    two = (first * width[0] + (n - first) * width[1:]).min(initial=n * width[0])
    saved = whole - WEIGHTS * n - np.array([max(two, used.sum()), used.sum()])
    return whole <= cache and (saved < [PART, 2 * PART]).all()


def part_sizes(used, width, cache):
    """What parts cost that begin at each of the first tasks and have 1, 2, ... tasks, as far as they may fit."""
    most = min(len(used), 1 + cache // width[-1])
    following = sliding_window_view(np.pad(used, (0, most)), most)[: len(width)]
    _, sizes = block_costs(-(-following // width[:, None]), width)  # packing seldom takes more rows
    here = np.arange(1, most + 1) <= len(used) - np.arange(len(width))[:, None]
    return np.where(here, sizes, np.inf)


def block_costs(rows, width):
    """How high the blocks of the first 1, 2, ... tasks of rows (F, N) and `width` (F,) are best, and what they cost.

    Few rows a block leave few of them empty, but copy a task's weights for each block. Costs are in positions.
    """
    number, highest = np.arange(1, rows.shape[1] + 1), np.maximum.accumulate(rows, 1)
    whole = number * (highest * width[:, None] + WEIGHTS)
    several = np.cumsum(-(-rows // BLOCK), 1) * (BLOCK * width[:, None] + WEIGHTS)
    return np.where(several < whole, BLOCK, highest), np.minimum(several, whole)


def lay_out(tasks, numbers, length, row, column, width, height):
    """The tasks of these numbers (T,), their windows, of `length` (T, W), at row and column (T, W) of rows of `width`,
    `height` rows a block."""
    rows = 1 + np.where(length, row, 0).max(1)
    more = (rows - 1) // height  # blocks beside a task's first one
    first = len(rows) + np.cumsum(more) - more
    block = np.where(row < height, np.arange(len(rows))[:, None], first[:, None] + row // height - 1)

    at = torch.from_numpy(numbers).to(tasks.segment.device)
    segment, size = tasks.segment[at].flatten(), tasks.segment[0].numel()
    (place,) = segment.nonzero(as_tuple=True)
    task, window = place // size, segment[place] - 1
    source = place + ((at - torch.arange(len(at), device=at.device)) * size)[task]
    of_window = (torch.from_numpy(x).to(at.device) for x in (block, row % height, column + length))
    block, row, end = (x[task, window] for x in of_window)
    shape = len(rows) + int(more.sum()), int(height), width
    place = (block * shape[1] + row) * width + end - tasks.position.flatten()[source]

    def lay(values):
        out = values.new_zeros(shape)
        out.view(-1)[place] = values.flatten()[source]
        return out

    task = torch.from_numpy(np.concatenate([np.arange(len(rows)), np.repeat(np.arange(len(rows)), more)])).to(at.device)
    found = {name: lay(values) if name in IN_ROWS else values[at] for name, values in tasks._asdict().items()}
    return Tasks(**{**found, "task": task})


def cut(tasks):
    """Tasks without the queries and places in tables that none of them uses."""
    queries = int(tasks.query.any(0).sum())
    table = 1 + max(int(tasks.items.max()), int(tasks.query_items.max()))
    of_query = ("query_items", "query_ratings", "query", "query_weight")
    return tasks._replace(
        table=tasks.table[:, :table], **{name: getattr(tasks, name)[:, :queries] for name in of_query}
    )


def shares_starts(options):
    """Whether what is computed at a position of a window depends on the window's start alone, not on its end."""
    reads_end = options.use_adaptive_loss and options.loss_network != "lstm"  # recency is a feature of the others
    return options.model in ("narm", "gru4rec") and not reads_end


def share_starts(start, length, shared):
    """Of windows (T, W) with the same start the longest alone, if `shared`: its positions stand for those of all.

    Gives the windows' lengths, 0 for those left out, and for how many windows a position stands (T, start, place).
    """
    if not shared:
        return length, np.ones((len(length), start.max(initial=0) + 1, length.max(initial=1)), np.int64)
    times = np.zeros((len(length), start.max(initial=0) + 1, length.max(initial=1)), np.int64)
    task, window = np.nonzero(length)
    times[task, start[task, window], length[task, window] - 1] = 1  # windows are distinct
    return longest_of_start(start, length), times[..., ::-1].cumsum(-1)[..., ::-1]


def longest_of_start(start, length):
    """Lengths (T, W) of the windows, 0 for those that are not the longest with their start."""
    task, most = np.arange(len(start))[:, None], np.zeros((len(start), start.max(initial=0) + 1), np.int64)
    np.maximum.at(most, (task, start), length)
    return np.where(length == most[task, start], length, 0)


def uses_cloze(options):
    """Whether support ratings must be hidden to be predicted: a learner that reads ratings from both sides."""
    return options.use_rating_input and options.model == "bert4rec"


def is_hidden(window, from_end, options):
    """Which positions of the masked copies are hidden: each position in one of `num_masks` copies, none in window 0."""
    if not uses_cloze(options):
        return np.zeros(len(window), bool)
    return (window > 0) & (from_end % options.num_masks == (window - 1) % options.num_masks)


def support_windows(n_support, options, rng=None):
    """Up to `num_samples` distinct windows of each support: (start, length), each (T, W); length 0 is padding.

    Window 0 is the whole support, which is also the history of the queries. Windows are numbered by falling
    length, so number i lacks d = floor((sqrt(8 i + 1) - 1) / 2) ratings.
    """
    shortest = np.minimum(options.min_sub_window_size, np.maximum(n_support, 1))
    kinds = n_support - shortest + 1
    total = kinds * (kinds + 1) // 2
    if rng is None or options.num_samples == 1:
        chosen = np.minimum(options.num_samples, total)[:, None]
        rank = np.arange(options.num_samples)
        number = np.where(rank < chosen, rank * total[:, None] // np.maximum(chosen, 1), -1)
    else:
        keys = rng.random((len(n_support), max(options.num_samples, total.max())))
        keys[:, 0] = -1
        keys[np.arange(keys.shape[1]) >= total[:, None]] = 2
        number = np.argsort(keys, axis=1)[:, : options.num_samples]
        number = np.where(np.take_along_axis(keys, number, 1) < 2, number, -1)
    if uses_cloze(options):
        number = np.concatenate([number[:, :1], np.repeat(number, options.num_masks, axis=1)], axis=1)
    lacking = ((np.sqrt(8 * np.maximum(number, 0) + 1) - 1) // 2).astype(np.int64)
    length = np.where(number >= 0, n_support[:, None] - lacking, 0)
    return np.maximum(number, 0) - lacking * (lacking + 1) // 2, length


def pack(length, width):
    """First-fit packing of windows (T, W) into rows of `width` (T,), longest first: (row, column), each (T, W)."""
    order = np.argsort(-length[:, 1:], axis=1, kind="stable") + 1
    row, column = np.zeros_like(length), np.zeros_like(length)
    used = np.zeros_like(length)
    used[:, 0] = length[:, 0]
    tasks = np.arange(len(length))
    for window in order.T:
        need = length[tasks, window]
        first = np.argmax(used + need[:, None] <= width[:, None], axis=1)
        row[tasks, window], column[tasks, window] = first, used[tasks, first]
        used[tasks, first] += need
    return row, column


def positions(length):
    """(task, window, place within the window) of every position of windows with `length` (T, W)."""
    task, window = np.nonzero(length)
    count = length[task, window]
    inside = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(task, count), np.repeat(window, count), inside


def task_tables(items):
    """Each task's distinct items (T, U), padding first, and the place of `items` (T, N) in them."""
    items = np.concatenate([np.zeros((len(items), 1), items.dtype), items], axis=1)
    width = items.shape[1]  # numbers and places are sorted as one, which takes a fraction of argsort's time
    ranked, order = np.divmod(np.sort(items * width + np.arange(width), axis=1), width)
    rank = np.cumsum(np.diff(ranked, axis=1, prepend=0) > 0, axis=1)
    slots = np.empty_like(rank)
    np.put_along_axis(slots, order, rank, axis=1)
    table = np.zeros((len(items), rank.max() + 1), items.dtype)
    np.put_along_axis(table, rank, ranked, axis=1)
    return table, slots[:, 1:]


class Problem(NamedTuple):
    """The ratings, who is trained, validated and tested on, and the training ratings' mean and deviation."""

    ratings: Ratings
    sequences: Sequences
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    mean: float
    std: float


def load_problem(options):
    """Read the ratings and split their users; users without any support rating are left out."""
    ratings = load_ratings(options)
    train, validation, test = split_users(len(ratings.user_ids), options)
    sequences, mean, std = standardise(ratings, train, options.balance)
    usable = [usable_users(sequences, users) for users in (train, validation, test)]
    if not all(len(users) for users in usable):
        raise UserError("the split leaves no users to train, validate or test on; lower --num_test_data or the filters")
    return Problem(ratings, sequences, *usable, mean, std)
