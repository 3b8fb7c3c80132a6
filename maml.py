"""Meta-learning: inner steps on a user's support ratings, and the error on the queries that trains them.

Equations of MELO (Kim et al., CIKM 2023), which follows MAML++ (Antoniou et al., ICLR 2019). Shapes: T tasks, B blocks
of R rows, S positions, Q queries, K inner steps.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import dataloader
from models import item_tables, loss_network
from models.layers import of_blocks, of_tasks, over_task
from models.learner import Learner
from utils import UserError


class InnerRates(nn.Module):
    """The inner learning rates alpha: one per tensor (or element) and step, positive because kept as logarithms.

    A step is theta <- theta - alpha * gradient / (n + lambda) with the gradient summed over n support ratings and
    a learned lambda, which shrinks users with few ratings towards the initialisation; lambda = 0 is the mean loss.
    """

    def __init__(self, learner, options, item_counts=None):
        super().__init__()
        self.log_rate, self.log_damping = nn.ParameterDict(), nn.ParameterDict()
        for name in adapted_names(learner, options):
            curvature = feature_curvature(learner, name, item_counts)
            if options.inner_rates == "tensor" or name in learner.table_names():
                curvature = curvature.mean()
            rate = (options.inner_lr / curvature).log()
            steps = (options.num_inner_steps,) + (1,) * rate.dim()
            self.log_rate[key(name)] = nn.Parameter(rate.repeat(steps))
            if options.inner_damping > 0:
                damping = (options.inner_damping / curvature).log()
                self.log_damping[key(name)] = nn.Parameter(damping.repeat(steps))
        self.requires_grad_(options.use_learnable_params)

    def forward(self, name, step, count):
        """What multiplies the gradient of `name` at `step` for a user of `count` support ratings."""
        rate = self.log_rate[key(name)][step].exp()
        if not self.log_damping:
            return rate / count.clamp_min(1)
        return rate / (count + self.log_damping[key(name)][step].exp())

    def laid_out(self, shapes, count):
        """What multiplies the mean loss's gradient in parameters {name: shape} laid end to end, per step: (K, T, P).

        T is 1 where it is the same for all tasks.
        """
        rate = lay_out(self.log_rate, shapes)
        if not self.log_damping:
            return rate
        count = count[:, None]
        return rate * (count / (count + lay_out(self.log_damping, shapes)))


def key(name):
    """A parameter's name as a key of nn.ParameterDict, which forbids dots."""
    return name.replace(".", "/")


def lay_out(logs, shapes):
    """exp of {key: (K,) or (K, ...)} for parameters {name: shape} laid end to end: (K, 1, P)."""
    rows = ((logs[key(name)].unsqueeze(-1).flatten(1), shape.numel()) for name, shape in shapes.items())
    return torch.cat([row.expand(-1, size) for row, size in rows], 1).exp()[:, None]


def feature_curvature(learner, name, item_counts):
    """Mean square of what a parameter multiplies in the prediction: the scale of its gradient's slope.

    Rates that start at its inverse make all directions converge alike, as a diagonal Newton step would.
    """
    if name == "head.user_vector" and item_counts is not None:
        share = (item_counts / item_counts.sum())[:, None]
        return (learner.item_factor.detach()[1:].square() * share).sum(0).clamp_min(1e-4)
    return torch.ones_like(learner.get_parameter(name).detach())


def adapted_names(learner, options):
    """Names of the parameters that the inner steps move."""
    return list(learner.head.adapted) if options.adapt == "head" else [n for n, _ in learner.named_parameters()]


def look_up(learner, tasks, sparse=False):
    """Each task's own rows of the item tables: name -> (T, U, width).

    Exact, because under gradient steps rows of items that a task does not use never move. With `sparse` the tables'
    gradients are sparse.
    """
    return {name: learner.rows(name, tasks, sparse) for name in learner.table_names()}


def adapt(learner, loss_network, rates, tasks, tables, options, second_order):
    """Adapt to each task: query predictions before the first and after each inner step (T, K + 1, Q), and the support
    predictions (B, R, S) that each step started from, a list of K.

    `tables` are the tasks' item rows. Where the encoder stays as it is (--adapt=head), its states are computed once.
    """
    return inner_loop(learner, loss_network, rates, tasks, tables, options, second_order)[1:]


def inner_loop(learner, loss_network, rates, tasks, tables, options, second_order):
    """What `adapt` gives, with the adapted parameters {name: (T, ...)} before it."""
    fast, (blocks, block_tables) = start(learner, tables, options), in_blocks(tasks, tables)
    shapes = {name: value.shape[1:] for name, value in fast.items()}
    flat = torch.cat([value.reshape(len(value), -1) for value in fast.values()], 1)
    if options.adapt == "head":
        predict, pull, answer = adapt_head(learner, tasks, blocks, block_tables)
    else:
        predict, pull, answer = adapt_all(learner, tasks, tables, blocks, block_tables, shapes)
    # A rating in several windows counts once in all.
    times = blocks.times.to(blocks.ratings.dtype)
    share = times / over_task(times, blocks).clamp_min(1)
    descents = (-rates.laid_out(shapes, (tasks.query_last + 1).to(times.dtype))).unbind()
    prepared = None if loss_network is None else loss_network.prepare(blocks)

    before, histories = [], []
    for step in range(options.num_inner_steps):
        flat, history = predict(flat)
        slope = history - blocks.ratings if loss_network is None else loss_network(prepared, step, history, blocks)
        gradient = pull(flat, history, slope * share, second_order and torch.is_grad_enabled())
        before.append(flat)
        histories.append(history)
        flat = flat + descents[step] * gradient
    return split(flat, shapes), answer([*before, flat]), histories


def adapt_all(learner, tasks, tables, blocks, block_tables, shapes):
    """What an inner step does with all parameters of a learner, laid end to end for each task (T, P): functions
    `predict` (the parameters and the support predictions (B, R, S)), `pull` (the gradient (T, P) for slopes in these)
    and `answer` (query predictions (T, K + 1, Q) with the parameters before the first step and after each).
    """
    train, memories = torch.is_grad_enabled(), []

    def run(flat, tables, method, what, *more):
        fast = split(flat, shapes)
        weights = {name: value for name, value in fast.items() if name not in tables}
        return functional_call(learner, weights, (method, what, *more, {name: fast[name] for name in tables}))

    def predict(flat):
        with torch.enable_grad():
            flat = flat if train else flat.detach().requires_grad_()
            history, memory = run(of_blocks(flat, tasks), block_tables, "read", blocks)
        memories.append(each(lambda part: (part if train else part.detach())[: len(flat)], memory))
        return flat, history

    def pull(flat, history, slope, graph):
        return torch.autograd.grad(history, flat, slope, retain_graph=train, create_graph=graph)[0]

    def answer(flats):
        memories.append(run(flats[-1], tables, "read", history_alone(tasks))[1])
        states = list(zip(flats, memories, strict=True))
        if train:  # of fewer tasks, so that calls cost more than copies
            states = [(torch.cat(flats), each(lambda *parts: torch.cat(parts), *memories))]
        items = tasks.query_items.repeat(len(flats) // len(states), 1)
        found = torch.cat([run(flat, tables, "answer", items, memory) for flat, memory in states])
        return found.unflatten(0, (len(flats), -1)).transpose(0, 1)

    return predict, pull, answer


def each(function, *nested):
    """`function` of the tensors in the same places of nested tuples, with None where there is none."""
    if isinstance(nested[0], tuple):
        return tuple(each(function, *parts) for parts in zip(*nested, strict=True))
    return None if nested[0] is None else function(*nested)


def adapt_head(learner, tasks, blocks, block_tables):
    """`adapt_all` for the parameters of the head alone, in which predictions are linear: the encoder is run once."""
    history, query = learner.linear(blocks, block_tables)
    shape, history, query = tasks.items.shape, history.flatten(1, 2), query[: len(tasks.table)].mT
    at_zero, slopes = history[:, None, :, 0], history[..., 1:]
    across, query_at_zero, query_slopes = slopes.mT, query[:, :1], query[:, 1:]

    def predict(flat):
        return flat, torch.baddbmm(at_zero, of_blocks(flat, tasks)[:, None], across).view(shape)

    def pull(flat, predicted, slope, graph):
        gradient = torch.bmm(slope.view(len(across), 1, -1), slopes)[:, 0]
        return of_tasks(gradient if graph else gradient.detach(), tasks)

    def answer(flats):
        return torch.baddbmm(query_at_zero, torch.stack(flats, 1), query_slopes)

    return predict, pull, answer


def split(flat, shapes):
    """Parameters laid end to end (T, P) as {name: (T, ...)}."""
    parts = zip(shapes.items(), flat.split([shape.numel() for shape in shapes.values()], 1), strict=True)
    return {name: part if len(shape) == 1 else part.view(-1, *shape) for (name, shape), part in parts}


def start(learner, tables, options):
    """The parameters that the inner steps move as they are before the first, for each task: {name: (T, ...)}."""
    n_tasks, fast = len(next(iter(tables.values()))), {}
    for name in adapted_names(learner, options):
        value = learner.get_parameter(name)
        fast[name] = tables[name] if name in tables else value.expand(n_tasks, *value.shape)
    return fast


def in_blocks(tasks, tables):
    """Tasks and their item rows as the learner is to see them, each block as if it were a task: the first T answer."""
    of_query = {name: of_blocks(getattr(tasks, name), tasks) for name in ("query_items", "query_last")}
    return tasks._replace(**of_query), {name: of_blocks(table, tasks) for name, table in tables.items()}


def history_alone(tasks):
    """The tasks without the rows that their queries do not read."""
    return tasks._replace(**{name: getattr(tasks, name)[: len(tasks.table), :1] for name in dataloader.IN_ROWS})


def position_weights(network, step, history, tasks):
    """Slope of each position's loss in its prediction, relative to the squared error's. (R, S)"""
    if network is None:
        return tasks.support.to(history.dtype)
    # Off the exact rating, where both slopes vanish.
    history = torch.where((history - tasks.ratings).abs() < 1e-3, tasks.ratings + 1e-3, history)
    return network(network.prepare(tasks), step, history, tasks) / (history - tasks.ratings) * tasks.support


def step_weights(steps, iteration, horizon):
    """Weights of the query losses after inner steps 1..N in the multi-step loss (MAML++), shape (N,).

    For i < N: w_i = max(1/N - e/(N E), 0.03/N); w_N = min(1/N + e (N-1)/(N E), 1 - 0.03 (N-1)/N), at iteration
    e < E, the horizon; from there on the last step counts alone.
    """
    if iteration >= horizon:
        return torch.eye(steps)[-1]
    early = max(1 / steps - iteration / (steps * horizon), 0.03 / steps)
    last = min(1 / steps + iteration * (steps - 1) / (steps * horizon), 1 - 0.03 * (steps - 1) / steps)
    return torch.tensor([early] * (steps - 1) + [last])


def objective_weights(options, iteration):
    """Weights of the query losses after 0..K inner steps in the meta objective, shape (K + 1,)."""
    steps = options.num_inner_steps
    if steps == 0:
        return torch.ones(1)
    horizon = options.multi_step_loss_num_epochs if options.use_multi_step else 0
    return F.pad(step_weights(steps, iteration, horizon), (1, 0))


def query_losses(predictions, tasks, loss=torch.square, weight=1):
    """`loss` of the errors of each task's queries times a `weight` (T, Q), averaged over the queries, per number of
    inner steps: (T, K + 1)."""
    errors = loss(predictions - tasks.query_ratings[:, None]) * (tasks.query * weight)[:, None]
    return errors.sum(-1) / tasks.query.sum(-1, keepdim=True)


class MetaLearner(nn.Module):
    """One member's meta-parameters: the learner's initialisation, the inner rates and the loss network.

    With `num_inner_steps=0` it is the plain learner (Basic), which does not adapt.
    """

    def __init__(self, n_items, options, scale, item_counts=None, start=None):
        """`scale` is (mean, std, low, high) of the ratings; `start`, item tables {name: (n_items, width)}."""
        super().__init__()
        self.options = options
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))
        self.learner = Learner(n_items, options)
        if start is not None:
            self.learner.start_items(start)
        self.rates = InnerRates(self.learner, options, item_counts)
        mean, std, low, high = scale
        self.loss_network = loss_network.build(options, ((low - mean) / std, (high - mean) / std))

    def forward(self, tasks, second_order=False):
        """Standardised query predictions after 0..K inner steps, all tasks at once: (T, K + 1, Q)."""
        rows = look_up(self.learner, tasks, self.options.sparse_items)
        return adapt(self.learner, self.loss_network, self.rates, tasks, rows, self.options, second_order)[0]

    def adapt(self, tasks):
        """The adapted parameters {name: (T, ...)}."""
        rows = look_up(self.learner, tasks)
        return inner_loop(self.learner, self.loss_network, self.rates, tasks, rows, self.options, False)[0]

    def explain(self, tasks):
        """Query predictions as `forward` gives them, and the weight of each support rating at each step (T, K, R, S).

        A weight is the slope of the rating's loss over that of the squared error: 1 everywhere without loss network.
        """
        rows = look_up(self.learner, tasks)
        queries, histories = adapt(self.learner, self.loss_network, self.rates, tasks, rows, self.options, False)
        weights = [position_weights(self.loss_network, step, h, tasks) for step, h in enumerate(histories)]
        return queries, torch.stack(weights, 1) if weights else tasks.ratings[:, None][:, :0]

    def to_rating(self, standardised):
        """Standardised predictions on the data's own scale, clipped to it, as float64."""
        mean, std, low, high = self.scale
        return (standardised.double() * std + mean).clamp(low, high)


class Ensemble(nn.Module):
    """`options.members` meta-learners with seeds of their own, of which each is trained as if it were alone.

    The prediction is the mean of theirs: they err alike in what the ratings do not tell and unlike in what their
    random start left in them, so their mean has the lower error.
    """

    def __init__(self, n_items, options, scale, item_counts=None, starts=None):
        """`starts` holds each member's `start`; the other arguments are those of `MetaLearner`."""
        super().__init__()
        starts = starts or [None] * options.members
        self.options = options
        self.members = nn.ModuleList(
            MetaLearner(n_items, own, scale, item_counts, start)
            for own, start in zip(member_options(options), starts, strict=True)
        )

    @property
    def scale(self):
        return self.members[0].scale

    def forward(self, tasks, second_order=False):
        """Standardised query predictions after 0..K inner steps: (T, K + 1, Q)."""
        return torch.stack([member(tasks, second_order) for member in self.members]).mean(0)

    def explain(self, tasks):
        """The members' mean `MetaLearner.explain`."""
        queries, weights = zip(*(member.explain(tasks) for member in self.members), strict=True)
        return torch.stack(queries).mean(0), torch.stack(weights).mean(0)

    def to_rating(self, standardised):
        """`MetaLearner.to_rating`, which is the same for all members."""
        return self.members[0].to_rating(standardised)


def member_options(options):
    """Each member's options: the seeds of initialisation count up from `options.model_init_seed`."""
    seeds = range(options.model_init_seed, options.model_init_seed + options.members)
    return [argparse.Namespace(**{**vars(options), "model_init_seed": seed}) for seed in seeds]


def build_system(problem, options, fresh=True, first=True):
    """A `Ensemble`; a fresh one's item tables start from the training users with --init_items=factors.

    `first` is False in processes other than 0, whose values are overwritten by those of process 0.
    """
    ratings, n_items, starts, counts = problem.ratings, len(problem.ratings.item_ids), None, None
    fittings = [(problem.sequences, problem.train, n_items, own) for own in member_options(options)]
    fit_items = fresh and options.head == "joint" and options.init_items == "factors"
    if fit_items and first:
        starts = [item_tables.fit(*fitting) for fitting in fittings]
        of_train = np.repeat(np.isin(np.arange(len(ratings.user_ids)), problem.train), np.diff(ratings.offsets))
        counts = torch.from_numpy(np.bincount(ratings.items[of_train], minlength=n_items)).float()
    scale = (problem.mean, problem.std, ratings.low, ratings.high)
    system = Ensemble(n_items, options, scale, counts, starts)
    if fit_items and options.cross_fit:
        for number, (member, fitting) in enumerate(zip(system.members, fittings, strict=True)):
            tables = {name: table[1:] for name, table in member.learner.tables().items()}
            nothing = {name: table.new_zeros(options.cross_fit + 1, *table.shape) for name, table in tables.items()}
            member.learner.shift_items(item_tables.fit_apart(*fitting, starts[number]) if starts else nothing)
    return system


def load_parameters(system, state, source):
    """Load a state dictionary; UserError where it is not of this model and these sizes."""
    try:
        system.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"{source} does not fit its own options (other names or sizes): use another checkpoint"
        ) from error
