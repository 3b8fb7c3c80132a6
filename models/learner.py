"""The learner: item tables, one of four encoders, and the head that turns a state into a rating."""

import torch
import torch.nn.functional as F
from torch import nn

from models.bert4rec import BERT4Rec
from models.error_attention import ErrorAttention, add_errors, errors
from models.gru4rec import GRU4Rec
from models.kernels import Dot
from models.layers import Linear, append_queries, last_state, look_up_all, spread
from models.narm import NARM
from models.sasrec import SASRec

ENCODERS = {"bert4rec": BERT4Rec, "sasrec": SASRec, "narm": NARM, "gru4rec": GRU4Rec}
TABLES = ("item_embedding", "item_effect", "item_factor")  # one row an item; row 0 is padding


class Learner(nn.Module):
    """Items (and ratings, with `use_rating_input`) in, one standardised rating per position out.

    A position's own rating never reaches its prediction. One task or, with a dimension in front, many (see layers.py).
    """

    def __init__(self, n_items, options):
        super().__init__()
        generator = torch.Generator().manual_seed(options.model_init_seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.model_init_seed)
            self.encoder = ENCODERS[options.model](options)
            self.read_rating = ReadRating(self.encoder.hidden) if options.use_rating_input else None
            hidden = self.encoder.hidden
            joint = options.head == "joint"
            self.head = JointHead(hidden, options.num_factors) if joint else PlainHead(hidden)
            self.errors = ErrorAttention(options, hidden) if joint and options.error_heads else None
        self.item_embedding = table(n_items, self.encoder.hidden, 0.02, generator)
        if joint:
            self.item_effect = table(n_items, 1, 0.0, generator)
            self.item_factor = table(n_items, options.num_factors, 0.1, generator)

    def start_items(self, tables):
        """Start the item tables from {name: (n_items, width)}, effects and factors in standard deviations."""
        with torch.no_grad():
            for name, values in tables.items():
                self.get_parameter(name)[1:] = torch.as_tensor(values)

    def shift_items(self, shifts):
        """Keep {name: (parts, n_items, width)}, added to the tables for tasks of each part. No checkpoint has them."""
        for name in self.table_names():  # in this order, in every process
            values = F.pad(torch.as_tensor(shifts[name]), (0, 0, 1, 0))
            self.register_buffer(f"{name}_shift", values, persistent=False)

    def rows(self, name, tasks, sparse=False):
        """The rows (T, U, width) of an item table that the tasks use, shifted for their parts of the users."""
        rows, shift = F.embedding(tasks.table, self.get_parameter(name), sparse=sparse), f"{name}_shift"
        return rows + getattr(self, shift)[tasks.part[:, None], tasks.table] if hasattr(self, shift) else rows

    def table_names(self):
        """Names of the tables that this learner has."""
        return [name for name in TABLES if hasattr(self, name)]

    def tables(self):
        """{name: (n_items + 1, width)} of the tables that this learner has."""
        return {name: self.get_parameter(name) for name in self.table_names()}

    def forward(self, method, *arguments):
        """What a method of this class gives: torch's functional_call, which lends it other parameters, calls this."""
        return getattr(self, method)(*arguments)

    def predict(self, tasks, tables, at_once=None):
        """Predictions of one task: (R, S) for its positions, (Q,) for its queries, in standard deviations.

        Queries are answered `at_once` at a time.
        """
        history, memory = self.read(tasks, tables)
        parts = tasks.query_items.split(at_once or tasks.query_items.shape[-1], -1)
        return history, torch.cat([self.answer(items, memory, tables) for items in parts], -1)

    def read(self, tasks, tables):
        """Predictions (R, S) for a task's positions, and what `answer` needs of them: tensors in tuples, and None."""
        rows = look_up_all(tables, tasks.items)
        states, weights, memory = self.read_states(tasks, rows)
        history = self.head(states, rows)
        if weights is None:
            return history, (memory, None)
        error = errors(history, tasks)
        return add_errors(history, weights, error), (memory, error.select(-2, 0))

    def answer(self, items, memory, tables):
        """Predictions (Q,) for query items (Q,)."""
        memory, error = memory
        rows = look_up_all(tables, items)
        states, weights = self.ask_states(rows, memory)
        query = self.head(states, rows)
        return query if weights is None else add_errors(query, weights, error)

    def linear(self, tasks, tables):
        """Predictions as inner products with (1, what the head adapts, laid end to end): (R, S, 1 + P), (Q, 1 + P)."""
        if self.encoder.reads_queries and self.read_rating is None and tasks.items.shape[-2] == 1:
            return self.linear_of_one_row(tasks, tables)
        rows, of_items = look_up_all(tables, tasks.items), look_up_all(tables, tasks.query_items)
        states, weights, memory = self.read_states(tasks, rows)
        asked, of_query = self.ask_states(of_items, memory)
        history, query = self.head.linear(states, rows), self.head.linear(asked, of_items)
        if weights is None:
            return history, query
        error = linear_errors(history, tasks)
        return history + weights @ error, query + of_query @ error.select(-3, 0)

    def linear_of_one_row(self, tasks, tables):
        """`linear` of tasks of one row in half the calls: queries are further positions, which no other reads."""
        parts, longer = [tasks.items.shape[-1], tasks.query_items.shape[-1]], append_queries(tasks)
        rows = look_up_all(tables, longer.items)
        found = self.head.linear(self.encoder.read(rows["item_embedding"], longer)[0], rows)
        if self.errors is not None:
            error = linear_errors(found.split(parts, -2)[0], tasks)
            found = found + self.errors.of_one_row(tasks, rows) @ error
        history, query = found.split(parts, -2)
        return history, query.squeeze(-3)

    def read_states(self, tasks, rows):
        """Of histories, from their items' rows: states (R, S, D), weights of earlier errors (R, S, S) or None, and what
        `ask_states` needs."""
        history, rated = rows["item_embedding"], None
        if self.read_rating is not None:
            history, rated = self.read_rating(history, tasks, self.encoder.causal)
        states, past = self.encoder.read(history, tasks)
        weights, errors = (None, None) if self.errors is None else self.errors(tasks, rows)
        return states, weights, (rated, past, errors)

    def ask_states(self, rows, memory):
        """Of queries, from their items' rows: states (Q, D), weights of the errors in row 0 (Q, S) or None."""
        rated, past, errors = memory
        query = rows["item_embedding"]
        states = self.encoder.ask(query if rated is None else query + rated, past)
        return states, None if errors is None else self.errors.ask(rows, errors)


def linear_errors(features, tasks):
    """The errors of predictions that are inner products with (1, p), as such products too: both (R, S, 1 + P)."""
    ratings = F.pad(tasks.ratings[..., None], (0, features.shape[-1] - 1))
    return (ratings - features) * tasks.known[..., None]


def hidden_size(options):
    """Width of the encoder's states and of the item embeddings."""
    units = {"narm": options.narm_hidden_size, "gru4rec": options.gru4rec_hidden_size}
    return units.get(options.model, options.bert_hidden_units)


def table(n_items, width, std, generator):
    """A trainable table (n_items + 1, width) whose padding row is zero."""
    values = torch.randn(n_items + 1, width, generator=generator) * std
    values[0] = 0
    return nn.Parameter(values)


class ReadRating(nn.Module):
    """Adds known ratings to the inputs: a causal encoder gets the previous item's, a cloze its own."""

    def __init__(self, hidden):
        super().__init__()
        self.by_item = Linear(hidden, hidden, bias=False)
        self.by_value = Linear(2, hidden)

    def forward(self, history, tasks, causal):
        """Inputs (R, S, D) with ratings added, and what is to be added to queries (1, D) or None."""
        values = torch.stack([tasks.ratings, torch.ones_like(tasks.ratings)], -1)
        rated = tasks.ratings[..., None] * self.by_item(history) + self.by_value(values)
        rated = rated * tasks.known[..., None]
        if not causal:
            return history + rated, None
        same = (tasks.segment[..., 1:] == tasks.segment[..., :-1])[..., None]
        return history + F.pad(rated[..., :-1, :] * same, (0, 0, 1, 0)), last_state(rated, tasks)[..., None, :]


class JointHead(nn.Module):
    """item effect + user bias + item factor . (user vector + A state) + state weight . state.

    User bias, user vector and state weight are what adapts to a user.
    """

    adapted = ("head.user_bias", "head.user_vector", "head.state_weight")

    def __init__(self, hidden, factors):
        super().__init__()
        self.user_bias = nn.Parameter(torch.zeros(()))
        self.user_vector = nn.Parameter(torch.zeros(factors))
        self.state_weight = nn.Parameter(torch.zeros(hidden))
        self.to_vector = Linear(hidden, factors, bias=False)
        nn.init.zeros_(self.to_vector.weight)

    def forward(self, state, rows):
        """Predictions (...) from states (..., D) and the items' rows {name: (..., width)}."""
        vector = spread(self.user_vector, state) + self.to_vector(state)
        bias = spread(self.user_bias, state[..., 0], 0)
        effect, factor = rows["item_effect"][..., 0], rows["item_factor"]
        return effect + bias + (factor * vector).sum(-1) + dot(state, self.state_weight)

    def linear(self, state, rows):
        """What the prediction is the inner product of with (1, bias, user vector, state weight): (..., 1 + P)."""
        effect, factor = rows["item_effect"], rows["item_factor"]
        effect = effect + (factor * self.to_vector(state)).sum(-1, keepdim=True)
        return torch.cat([effect, torch.ones_like(effect), factor.expand(*effect.shape[:-1], -1), state], -1)


class PlainHead(nn.Module):
    """The paper's head: a linear function of the state alone."""

    adapted = ("head.weight", "head.bias")

    def __init__(self, hidden):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(hidden) * hidden**-0.5)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, state, rows):
        return dot(state, self.weight) + spread(self.bias, state[..., 0], 0)

    def linear(self, state, rows):
        """What the prediction is the inner product of with (1, weight, bias): (..., 1 + P)."""
        one = torch.ones_like(state[..., :1])
        return torch.cat([torch.zeros_like(one), state, one], -1)


def dot(state, weight):
    """Inner products of states (..., D) with a weight (D,), or of each task's with its own (T, D)."""
    if weight.dim() == 1:
        return state @ weight
    return Dot.apply(state, weight)
