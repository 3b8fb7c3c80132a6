"""The learner: item tables, an encoder, and the head that turns its states into ratings.

The contract of an encoder, which is one module in `models/` and one entry of `options.LEARNERS`:

    __init__(hidden, heads, layers, length)      hidden is D; S < length; see `options.Entry`
    encode_history(items, tasks)                 embedded items (T, R, S, D) -> (states (T, R, S, D), memory)
    encode_query(items, memory)                  embedded items (T, Q, D)    -> states (T, Q, D)

A position reads positions of its own segment only; `tasks.segment`, 0 for padding, and `tasks.position` say where it is
(see `dataloader.Tasks`). The memory is a tuple, nested if need be, of tensors (T, ...) about the first `n_support`
positions of row 0, the whole support. A query reads this memory and itself. Parameters may have a task dimension T in
front, so an encoder is made of the layers in `models/layers.py`.
"""

import pkgutil

import torch
import torch.nn.functional as F
from torch import nn

from models.error_attention import ErrorAttention
from models.layers import Linear, broadcast_parameter, dot, is_multiplied, look_up
from options import LEARNERS

TABLES = ("item_embedding", "item_effect", "item_factor", "item_audience")  # one row an item; row 0 is padding


class Learner(nn.Module):
    """Items in, one standardised rating for each position and query out.

    A position's own rating never reaches its prediction.
    """

    def __init__(self, n_items, options):
        super().__init__()
        hidden, joint = hidden_size(options), options.head == "joint"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.model_init_seed)
            self.encoder = build_encoder(options)
            self.head = JointHead(hidden, options.num_factors) if joint else PlainHead(hidden)
            self.errors = ErrorAttention(hidden, options.num_factors, options.max_seq_len) if joint else None
        generator = torch.Generator().manual_seed(options.model_init_seed)
        self.item_embedding = table(n_items, hidden, 0.02, generator)
        if joint:
            self.item_effect = table(n_items, 1, 0.0, generator)
            self.item_audience = table(n_items, 1 + options.num_factors, 0.0, generator)
            self.item_factor = table(n_items, options.num_factors, 0.1, generator)

    def tables(self):
        """{name: (n_items + 1, width)} of the item tables that this learner has."""
        return {name: getattr(self, name) for name in TABLES if hasattr(self, name)}

    def start_items(self, tables):
        """Start the item tables from {name: (n_items, width)}, effects and factors in standard deviations."""
        with torch.no_grad():
            for name, values in tables.items():
                self.get_parameter(name)[1:] = torch.as_tensor(values)

    def forward(self, method, *arguments):
        """Call a method by its name; `torch.func.functional_call` calls this with other parameters."""
        return getattr(self, method)(*arguments)

    def predict_support(self, tasks, tables):
        """Predictions (T, R, S) for the support, and the memory that `predict_query` needs, from rows of the tables."""
        rows = look_up_all(tables, tasks.items)
        states, memory = self.encoder.encode_history(rows["item_embedding"], tasks)
        if self.errors is None:
            return self.head(states, rows), (memory,)
        choices = self.head.choices(tasks, rows)
        predicted = self.head(states, rows, choices[:, None, None])
        weights, of_errors = self.errors.encode_history(rows, tasks)
        error = (tasks.ratings - predicted) * (tasks.segment > 0)
        return predicted + apply(weights, error), (memory, of_errors, error[:, 0], length(tasks), choices)

    def predict_query(self, items, memory, tables):
        """Predictions (T, Q) for query items (T, Q), places in the tables."""
        rows = look_up_all(tables, items)
        states = self.encoder.encode_query(rows["item_embedding"], memory[0])
        if self.errors is None:
            return self.head(states, rows)
        _, of_errors, error, n_support, choices = memory
        shift = choices[:, None] + self.head.lean(n_support, rows)
        predicted = self.head(trust(states, n_support), rows, shift)
        return predicted + apply(self.errors.encode_query(rows, of_errors), error)

    def predict(self, tasks, tables, at_once=None):
        """Predictions for the support (T, R, S) and for the queries (T, Q), `at_once` queries at a time."""
        support, memory = self.predict_support(tasks, tables)
        parts = tasks.query_items.split(at_once or tasks.query_items.shape[-1], -1)
        return support, torch.cat([self.predict_query(items, memory, tables) for items in parts], -1)

    def features(self, tasks, tables):
        """Features of support (T, R, S, 1 + P) and queries (T, Q, 1 + P).

        Their inner products with (1, the head's adapted parameters laid end to end) are the predictions.
        """
        rows, query_rows = look_up_all(tables, tasks.items), look_up_all(tables, tasks.query_items)
        states, memory = self.encoder.encode_history(rows["item_embedding"], tasks)
        query_states = self.encoder.encode_query(query_rows["item_embedding"], memory)
        if self.errors is None:
            return self.head.features(states, rows), self.head.features(query_states, query_rows)
        n_support, choices = length(tasks), self.head.choices(tasks, rows)
        support = self.head.features(states, rows, choices[:, None, None])
        shift = choices[:, None] + self.head.lean(n_support, query_rows)
        query = self.head.features(trust(query_states, n_support), query_rows, shift)
        weights, of_errors = self.errors.encode_history(rows, tasks)
        ratings = F.pad(tasks.ratings[..., None], (0, support.shape[-1] - 1))
        error = (ratings - support) * (tasks.segment > 0)[..., None]
        return support + weights @ error, query + self.errors.encode_query(query_rows, of_errors) @ error[:, 0]


def length(tasks):
    """The number of support ratings (T, 1), as a real number."""
    return tasks.n_support[:, None].to(tasks.ratings.dtype)


def trust(states, n_support):
    """Query states (T, Q, D) as far as a history of `n_support` (T, 1) ratings can be trusted: not at all without one.

    Then the prediction is that of the factor analysis, which is hard to beat for users of whom nothing is known.
    """
    return states * (n_support / (n_support + 1))[..., None]


def apply(weights, errors):
    """Sums (T, ..., N) of errors (T, ..., M) by weights (T, ..., N, M)."""
    return (weights @ errors[..., None])[..., 0]


def look_up_all(tables, places):
    """Rows {name: (T, ..., width)} of tables {name: (U, width) or (T, U, width)} at places (T, ...)."""
    if not all(map(is_multiplied, tables.values())):
        return {name: look_up(table, places) for name, table in tables.items()}
    widths = [table.shape[-1] for table in tables.values()]
    rows = look_up(torch.cat(list(tables.values()), -1), places).split(widths, -1)
    return dict(zip(tables, rows, strict=True))


def hidden_size(options):
    """Width of the encoder's states and of the item embeddings."""
    return getattr(options, LEARNERS[options.model].hidden)


def build_encoder(options):
    """The encoder that `options.LEARNERS` names, with the sizes of its options."""
    entry = LEARNERS[options.model]
    heads, layers = getattr(options, entry.heads), getattr(options, entry.layers)
    return pkgutil.resolve_name(entry.encoder)(hidden_size(options), heads, layers, options.max_seq_len)


def table(n_items, width, std, generator):
    """A trainable table (n_items + 1, width) whose padding row is zero."""
    values = torch.randn(n_items + 1, width, generator=generator) * std
    values[0] = 0
    return nn.Parameter(values)


FADING = 4.0  # ratings of a user that halve what the item's audience counts, at the start
CHOICE, ALIKE = 0.6, 10.0  # what the audience of each rated item counts, and the ratings that halve it, at the start


class JointHead(nn.Module):
    """item effect + user bias + item factor . (user vector + A state) + state weight . state.

    User bias, user vector and state weight adapt to a user. Bias and vector add what `choices` gives, and a query adds
    what `lean` gives.
    """

    adapted = ("head.user_bias", "head.user_vector", "head.state_weight")

    def __init__(self, hidden, factors):
        super().__init__()
        self.user_bias = nn.Parameter(torch.zeros(()))
        self.user_vector = nn.Parameter(torch.zeros(factors))
        self.state_weight = nn.Parameter(torch.zeros(hidden))
        self.to_vector = Linear(hidden, factors, bias=False)
        nn.init.zeros_(self.to_vector.weight)
        self.log_fading = nn.Parameter(torch.tensor(FADING).log())
        self.choice = nn.Parameter(torch.full((1 + factors,), CHOICE))
        self.log_alike = nn.Parameter(torch.tensor(ALIKE).log())

    def start_user(self, centre):
        """Start from the training users' mean bias and vector (1 + factors,)."""
        with torch.no_grad():
            self.user_bias.fill_(float(centre[0]))
            self.user_vector.copy_(torch.as_tensor(centre[1:]))

    def choices(self, tasks, rows):
        """What the items that a user rated say of the user's bias and vector (T, 1 + factors), whatever the ratings.

        It is the sum of the items' audiences, of which many count less each, as they are alike.
        """
        whole, n_support = (tasks.segment[:, 0] == 1)[..., None], length(tasks)
        total = (rows["item_audience"][:, 0] * whole).sum(1)
        alike = broadcast_parameter(self.log_alike, n_support, 0).exp()
        return broadcast_parameter(self.choice, total) * total * (alike / (n_support + alike))

    def lean(self, n_support, rows):
        """The same of a query's item (T, Q, 1 + factors): its whole audience without ratings, then less and less."""
        fading = broadcast_parameter(self.log_fading, n_support, 0).exp()
        return (fading / (n_support + fading))[..., None] * rows["item_audience"]

    def forward(self, state, rows, shift):
        """Predictions (T, ...) from states (T, ..., D) and the items' rows {name: (T, ..., width)}.

        `shift` (T, ..., 1 + factors) adds to bias and vector.
        """
        vector = broadcast_parameter(self.user_vector, state) + self.to_vector(state) + shift[..., 1:]
        bias = rows["item_effect"][..., 0] + broadcast_parameter(self.user_bias, state[..., 0], 0) + shift[..., 0]
        return bias + (rows["item_factor"] * vector).sum(-1) + dot(state, self.state_weight)

    def features(self, state, rows, shift):
        """Features (T, ..., 1 + P) whose inner products with (1, bias, user vector, state weight) are `forward`'s."""
        factor = rows["item_factor"]
        vector = self.to_vector(state) + shift[..., 1:]
        effect = rows["item_effect"] + shift[..., :1] + (factor * vector).sum(-1, keepdim=True)
        return torch.cat([effect, torch.ones_like(effect), factor.expand(*effect.shape[:-1], -1), state], -1)


class PlainHead(nn.Module):
    """The paper's head: a linear function of the state alone."""

    adapted = ("head.weight", "head.bias")

    def __init__(self, hidden):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(hidden) * hidden**-0.5)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, state, rows):
        return dot(state, self.weight) + broadcast_parameter(self.bias, state[..., 0], 0)

    def features(self, state, rows):
        """Features (T, ..., 1 + P) whose inner products with (1, weight, bias) are predictions."""
        one = torch.ones_like(state[..., :1])
        return torch.cat([torch.zeros_like(one), state, one], -1)
