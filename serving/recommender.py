"""A trained system in use: adapt to users by their ratings, score the catalogue, explain.

from recommend import Recommender
Recommender.load("log/ml-1m-bert4rec-melo").adapt([(260, 5), (1196, 4)]).top(10)
"""

import copy
import threading
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.func import functional_call

import dataloader
import maml
import options as option_module
from models import checkpoint
from options import PLACES
from serving import export
from utils import UserError, choose_device

ADAPTED_AT_ONCE = 128  # users
SCORED_AT_ONCE = 65536  # items of all users
IN_CACHE = 6000  # items of all users whose states the processor's cache holds; fewer call more operations
ON_GPU = 32  # times as many of all these on a GPU, where the number of operations is what counts

Item = int | str


class Support(NamedTuple):
    """A user's ratings of known items, oldest first, each item once."""

    items: np.ndarray  # (n,) int64, catalogue numbers from 1
    ratings: np.ndarray  # (n,) float32, on the data's scale


class Recommendation(NamedTuple):
    item: Item
    rating: float  # predicted, cut to the data's scale
    score: float  # the same before it is cut; items are ranked by it


class Explanation(NamedTuple):
    """What each rating weighed at each of the K inner steps, and how predictions moved over them."""

    items: list[Item]  # of the ratings that were used, oldest first
    ratings: list[float]
    weights: np.ndarray  # (n, K); 1 is what the squared error gives
    predictions: np.ndarray  # (Q, K + 1) scores of the given items, after 0..K steps


class Recommender:
    """A trained system with its catalogue. Any number of threads may use one at the same time.

    It keeps nothing of the users that it adapts to.
    """

    def __init__(self, state: dict, source: str | Path, device: str = "cpu"):
        """Take the entries of a checkpoint; `source` is named in errors. `load` reads them from a file."""
        state = export.check_state(state, source)
        self.source = Path(source)
        self.state = {name: state[name] for name in (*export.ENTRIES, *checkpoint.OPTIONAL) if name in state}
        given = {"device": device, **dict.fromkeys(PLACES, "")}  # a file says nothing of this machine's places
        self.options = option_module.restore(state["options"], given, source)
        self.item_ids: list[Item] = state["item_ids"]
        self._system = maml.restore_system(len(self.item_ids), self.options, state["system"], source)
        self._system.to(choose_device(device)).eval().requires_grad_(False)
        self.device = self._system.scale.device
        self.mean, self.std, self.low, self.high = self._system.scale.tolist()
        self._numbers = {str(item): number for number, item in enumerate(self.item_ids, 1)}
        self._own = threading.local()
        self.adapt([])  # what torch imports on first use takes .4 s, for which no user should wait

    @classmethod
    def load(cls, source: str | Path, checkpoint_step: int = -1, device: str = "cpu") -> "Recommender":
        """Load a run's folder (its best checkpoint, or that of `checkpoint_step`) or an exported file.

        `device` is cpu, cuda or auto. The training data is not needed. UserError for what cannot be used.
        """
        path, state = export.load_state(source, checkpoint_step)
        return cls(state, path, device)

    @property
    def item_counts(self) -> np.ndarray | None:
        """Training ratings (n_items,) of each item; None where an earlier version of the program trained the run."""
        return np.array(self.state["item_counts"]) if "item_counts" in self.state else None

    def number(self, item: Item) -> int:
        """The catalogue number of an item, from 1; 0 for one that training did not see. Equal ids are equal as text."""
        return self._numbers.get(str(item), 0)

    def support(self, ratings: Iterable[tuple[Item, float]]) -> tuple[Support, list[Item]]:
        """(`Support`, items that training did not see) of one user's (item, rating) pairs, oldest first.

        The later rating of an item counts. UserError for a rating that is no number or outside the scale.
        """
        known, unknown = {}, []
        for item, rating in ratings:
            if not isinstance(rating, Real) or isinstance(rating, bool) or not self.low <= rating <= self.high:
                raise UserError(
                    f"item {item!r:.80} is rated {rating!r:.20}; give ratings from {self.low:g} to {self.high:g}, "
                    "the scale of the data that was trained on"
                )
            if number := self.number(item):
                known.pop(number, None)
                known[number] = rating
            else:
                unknown.append(item)
        return Support(np.array(list(known), np.int64), np.array(list(known.values()), np.float32)), unknown

    def adapt(self, ratings: Iterable[tuple[Item, float]]) -> "AdaptedUser":
        """Adapt to one user by (item, rating) pairs, oldest first; without a known item there is no adaptation."""
        support, unknown = self.support(ratings)
        return AdaptedUser(self, support, unknown, *self._adapt([support]))

    def top(self, supports: Sequence[Support], n: int = 10, allowed=None) -> list[list[Recommendation]]:
        """Each user's `n` items of the highest score among those not rated yet, best first.

        `allowed` (n_items,) says which items may be listed, None: all.
        """
        found = []
        for first, scores in self._scores(supports):
            found += self._best(scores, supports[first : first + len(scores)], n, allowed)
        return found

    def scores(self, supports: Sequence[Support], numbers: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Each user's predictions for the items with these catalogue numbers, float64, not cut to the data's scale."""
        found = []
        for first, scores in self._scores(supports, numbers):
            values = self._system.to_rating(scores, clip=False).cpu().numpy()
            found += [row[: len(numbers[first + i])] for i, row in enumerate(values)]
        return found

    def cut(self, scores):
        """Scores cut to the data's scale."""
        return np.clip(scores, self.low, self.high)

    @torch.no_grad()
    def explain(self, support: Support, numbers: np.ndarray) -> Explanation:
        """What the inner steps made of one user's ratings, and of the predictions for these catalogue numbers."""
        system = self._thread_system()
        query = np.asarray(numbers, np.int64)[None]
        tasks = self._tasks([support], query if query.size else np.zeros((1, 1), np.int64))
        predictions, weights = system.explain(tasks)
        used = support.items[-(self.options.max_seq_len - 1) :]
        cells = tasks.segment[0].cpu() > 0
        at = torch.gather(tasks.table[0], 0, tasks.items[0].flatten()).reshape(cells.shape).cpu()
        # A rating that stands in several windows weighs what its copies do together.
        times = tasks.times[0].cpu()[cells]
        weights = weights[0].cpu()[:, cells] * (times * len(used) / times.sum().clamp_min(1))
        weights = torch.stack([weights[:, at[cells] == number].sum(1) for number in used.tolist()] or [weights.sum(1)])
        return Explanation(
            [self.item_ids[number - 1] for number in used],
            support.ratings[-len(used) :].tolist() if len(used) else [],
            weights.double().numpy()[: len(used)],
            self._system.to_rating(predictions[0].T, clip=False).cpu().numpy()[: query.size],
        )

    # The steps of all of these: tasks of the supports, adapted parameters, scores.

    @property
    def _times(self):
        return ON_GPU if self.device.type == "cuda" else 1

    def _thread_system(self):
        """This thread's own modules around the shared parameters: calling a module with other weights changes it
        for the time of the call."""
        if not hasattr(self._own, "system"):
            shared = {id(tensor): tensor for tensor in (*self._system.parameters(), *self._system.buffers())}
            self._own.system = copy.deepcopy(self._system, shared)
        return self._own.system

    def _tasks(self, supports, query_items):
        """`dataloader.Tasks` of supports, whose queries are the catalogue numbers query_items (T, Q)."""
        longest = self.options.max_seq_len - 1
        items = [support.items[-longest:] for support in supports]
        ratings = np.concatenate([support.ratings[-longest:] for support in supports])
        lengths = np.array([len(each) for each in items])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        standard = ((ratings - self.mean) / self.std).astype(np.float32)
        sequences = dataloader.Sequences(offsets, np.concatenate(items), standard)
        blank = np.zeros(query_items.shape)
        windows, queries = dataloader.support_windows(lengths, self.options), (query_items, blank, blank == 0)
        return dataloader.assemble(sequences, offsets[:-1], lengths, windows, queries, self.options).to(self.device)

    @torch.no_grad()
    def _adapt(self, supports):
        """(tasks, each member's adapted parameters {name: (T, ...)}) of at least one user."""
        tasks = self._tasks(supports, np.zeros((len(supports), 1), np.int64))
        return tasks, [member.adapt(tasks).theta for member in self._thread_system().members]

    @torch.no_grad()
    def _score(self, tasks, thetas, items=None):
        """Standardised predictions (T, Q) of the catalogue numbers items (T, Q); None: of the whole catalogue."""
        numbers = tasks.table.gather(1, tasks.items.flatten(1)).view_as(tasks.items)
        if items is None:
            items = torch.arange(1, len(self.item_ids) + 1, device=self.device)
            # With --adapt=all every user has item tables of their own.
            items = items.expand(len(tasks.table) if self.options.adapt == "all" else 1, -1)
        tasks = tasks._replace(items=numbers).take(slice(None), rows=1)._replace(query_items=items)
        at_once = max(1, self._times * IN_CACHE // len(tasks.table))
        members = self._thread_system().members
        return sum(score(*pair, tasks, at_once) for pair in zip(members, thetas, strict=True)) / len(members)

    def _scores(self, supports, numbers=None):
        """(number of the first user, `_score` (T, Q)) for a few users at a time; see SCORED_AT_ONCE."""
        at_once = self._times * ADAPTED_AT_ONCE
        for begin in range(0, len(supports), at_once):
            tasks, thetas = self._adapt(supports[begin : begin + at_once])
            items = None if numbers is None else padded(numbers[begin : begin + at_once]).to(self.device)
            n_items = len(self.item_ids) if items is None else items.shape[1]
            step = max(1, self._times * SCORED_AT_ONCE // n_items)
            for first in range(0, len(tasks.table), step):
                part = slice(first, first + step)
                some = dataloader.Tasks(*(tensor[part] for tensor in tasks))
                scores = self._score(some, cut_thetas(thetas, part), None if items is None else items[part])
                yield begin + first, scores

    def _best(self, scores, supports, n, allowed=None):
        """Lists of `Recommendation` from the catalogue's scores (T, Q)."""
        if allowed is not None:
            scores[:, torch.from_numpy(~allowed).to(self.device)] = -torch.inf
        for row, support in zip(scores, supports, strict=True):
            row[torch.from_numpy(support.items - 1)] = -torch.inf
        best = scores.topk(min(n, scores.shape[1]))
        values = self._system.to_rating(best.values, clip=False).cpu().numpy()
        found = []
        for items, row in zip(best.indices.tolist(), values, strict=True):
            row = row[np.isfinite(row)]
            found.append([
                Recommendation(self.item_ids[item], rating, score)
                for item, rating, score in zip(items, self.cut(row).tolist(), row.tolist(), strict=False)
            ])  # fmt: skip
        return found


class AdaptedUser(NamedTuple):
    """One user after adaptation; from `Recommender.adapt`."""

    recommender: Recommender
    support: Support
    unknown: list[Item]  # rated items that training did not see, left out
    tasks: dataloader.Tasks
    thetas: list[dict]  # each member's adapted parameters

    @property
    def adapted(self) -> bool:
        """Whether there was a known rating to adapt to."""
        return len(self.support.items) > 0

    def top(self, n: int = 10) -> list[Recommendation]:
        """The `n` items of the highest score among those not rated yet, best first."""
        scores = self.recommender._score(self.tasks, self.thetas)
        return self.recommender._best(scores, [self.support], n)[0]

    def predict(self, items: Sequence[Item]) -> list[float]:
        """Predicted ratings of these items; nan for those that training did not see."""
        numbers = self._numbers(items)
        scores = self.recommender._score(self.tasks, self.thetas, numbers[None])[0]
        ratings = self.recommender.cut(self.recommender._system.to_rating(scores, clip=False).cpu().numpy())
        return np.where(numbers.cpu() > 0, ratings, np.nan).tolist()

    def explain(self, items: Sequence[Item]) -> Explanation:
        """What the inner steps made of the ratings, and of the predictions for these known items."""
        return self.recommender.explain(self.support, self._numbers(items).cpu().numpy())

    def _numbers(self, items):
        return torch.tensor([self.recommender.number(item) for item in items], device=self.recommender.device).long()


def score(member, thetas, tasks, at_once):
    """A member's predictions (T, Q) with adapted parameters `thetas`; items and queries of tasks are catalogue numbers.

    The item tables are not copied for each user.
    """
    tables = member.learner.tables()
    rows = {name: moved(table, tasks, thetas.get(name)) for name, table in tables.items()}
    weights = {name: value for name, value in thetas.items() if name not in tables}
    return functional_call(member.learner, weights, ("predict", tasks, rows, at_once))[1]


def cut_thetas(thetas, part):
    """Part of the users' adapted parameters."""
    return [{name: tensor[part] for name, tensor in of_member.items()} for of_member in thetas]


def moved(table, tasks, rows):
    """An item table (n + 1, width), or each task's own (T, n + 1, width) with its adapted `rows` in their places."""
    if rows is None:
        return table
    place = tasks.table[..., None].expand_as(rows)
    return table.expand(len(rows), *table.shape).scatter(1, place, rows)


def padded(numbers):
    """Arrays of catalogue numbers as one tensor (T, Q) with 0 after the shorter ones."""
    out = np.zeros((len(numbers), max(1, *map(len, numbers))), np.int64)
    for row, each in zip(out, numbers, strict=True):
        row[: len(each)] = each
    return torch.from_numpy(out)
