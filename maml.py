"""Meta-learning: inner steps on a user's support ratings, and the error on the queries that trains them.

Equations of MELO (Kim et al., CIKM 2023), which follows MAML++ (Antoniou et al., ICLR 2019); docs/METHOD.md has them.
Shapes: T tasks, R rows, S positions, Q queries, K inner steps, P adapted parameters laid end to end.
"""

import argparse
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils import _pytree as pytree

import utils
from models import factor_analysis, item_tables, loss_network
from models.learner import Learner
from options import steps_in_posterior
from utils import UserError


class Adapted(NamedTuple):
    """What adapting to tasks gives."""

    theta: dict  # {name: (T, ...)} the adapted parameters
    queries: torch.Tensor  # (T, K + 1, Q) standardised predictions before the first and after each inner step
    support: list  # tensors (T, R, S), the support predictions that each of the K steps started from
    windows: torch.Tensor | None  # (T, K + 1, W S) as `queries`, for all positions of W query windows; None for W = 0


def adapt(member, tasks, tables, second_order, n_windows=0):
    """The inner loop: equations 1 to 4 of docs/METHOD.md, for all tasks at once. Returns `Adapted`.

    `tables` are the tasks' rows of the item tables {name: (T, U, width)}; `n_windows` is W, the number of the tasks'
    query windows.
    """
    adapts_all = member.options.adapt == "all" and member.options.num_inner_steps > 0
    way = AdaptAll if adapts_all else AdaptHead
    user = way(member.learner, tasks, tables, second_order)
    theta, thetas, support = user.theta, [user.theta], []
    moved = torch.zeros_like(theta)  # theta - theta_0, which subtracting would round
    alpha, direction = member.rates(user, tasks)  # (K, T or 1, P), and a function
    prepared = member.loss_network.prepare(tasks)
    for step in range(member.options.num_inner_steps):
        predicted = user.predict_support(theta)  # (1): (T, R, S)
        slope = member.loss_network(prepared, step, predicted, tasks) * tasks.times  # (2): dL / dpredicted, (T, R, S)
        gradient = user.vjp(predicted, slope)  # (3): (T, P)
        moved = moved - alpha[step] * direction(gradient, moved)  # (4): (T, P)
        theta = user.theta + moved
        thetas.append(theta)
        support.append(predicted)
    queries, last = user.predict_queries(thetas, n_windows)
    of_windows = [predicted[:, 1 : 1 + n_windows].flatten(1) for predicted in [*support, last]] if n_windows else []
    return Adapted(split(theta, user.shapes), queries, support, torch.stack(of_windows, 1) if n_windows else None)


class AdaptHead:
    """Adapting the head alone: the encoder runs once, and predictions are linear in theta."""

    def __init__(self, learner, tasks, tables, second_order):
        support, self.query_features = learner.features(tasks, tables)
        self.shape, self.second_order = tasks.items.shape, second_order
        self.at_zero, self.features = support.flatten(1, 2)[..., 0], support.flatten(1, 2)[..., 1:]  # (T, N), (T, N, P)
        self.theta, self.shapes = first_theta(learner, learner.head.adapted, tables)

    def predict_support(self, theta):
        return torch.baddbmm(self.at_zero[:, None], theta[:, None], self.features.mT).view(self.shape)

    def vjp(self, predicted, slope):
        gradient = torch.bmm(slope.flatten(1)[:, None], self.features)[:, 0]
        return gradient if self.second_order else gradient.detach()

    def gram(self, times):
        """Sums (T, P, P) of the support features' products, each counted `times` (T, R, S)."""
        gram = (self.features * times.flatten(1)[..., None]).mT @ self.features
        return gram if self.second_order else gram.detach()

    def predict_queries(self, thetas, n_windows):
        """Predictions of the queries (T, K + 1, Q) and, for query windows, of the support by the last theta."""
        at_zero, features = self.query_features[..., 0], self.query_features[..., 1:]
        queries = torch.baddbmm(at_zero[:, None], torch.stack(thetas, 1), features.mT)
        return queries, self.predict_support(thetas[-1]) if n_windows else None


class AdaptAll:
    """Adapting every parameter: each task has weights of its own, also its rows of the item tables.

    Rows of items that a task does not use never move, so that this is exact.
    """

    def __init__(self, learner, tasks, tables, second_order):
        self.learner, self.tasks, self.table_names = learner, tasks, tuple(tables)
        self.second_order, self.training = second_order, torch.is_grad_enabled()
        self.theta, self.shapes = first_theta(learner, [name for name, _ in learner.named_parameters()], tables)
        self.memories = []  # of the history, one for each theta that predicted the support

    def call(self, theta, method, *arguments):
        """A method of the learner with parameters theta (T, P)."""
        own = split(theta, self.shapes)
        weights = {name: value for name, value in own.items() if name not in self.table_names}
        tables = {name: own[name] for name in self.table_names}
        return functional_call(self.learner, weights, (method, *arguments, tables))

    def predict_support(self, theta):
        with torch.enable_grad():
            self.leaf = theta if self.training else theta.detach().requires_grad_()
            predicted, memory = self.call(self.leaf, "predict_support", self.tasks)
        self.memories.append(memory if self.training else pytree.tree_map(torch.detach, memory))
        return predicted

    def vjp(self, predicted, slope):
        create = self.second_order and self.training
        return torch.autograd.grad(predicted, self.leaf, slope, retain_graph=self.training, create_graph=create)[0]

    def predict_queries(self, thetas, n_windows):
        history_and_windows = self.tasks.take(slice(None), rows=1 + n_windows)
        last, memory = self.call(thetas[-1], "predict_support", history_and_windows)
        self.memories.append(memory)
        # The queries of all steps are one call, as if of T (K + 1) tasks.
        theta, *memory = (
            torch.stack(values, 1).flatten(0, 1)
            for values in (thetas, *zip(*map(pytree.tree_leaves, self.memories), strict=True))
        )
        memory = pytree.tree_unflatten(memory, pytree.tree_structure(self.memories[0]))
        items = self.tasks.query_items.repeat_interleave(len(thetas), 0)
        return self.call(theta, "predict_query", items, memory).unflatten(0, (-1, len(thetas))), last


def first_theta(learner, names, tables):
    """The adapting parameters before the first step, theta (T, P), and their {name: shape} in the order of theta."""
    n_tasks = len(next(iter(tables.values())))
    values = {name: tables.get(name, learner.get_parameter(name)) for name in names}
    whole = {name: v if name in tables else v.expand(n_tasks, *v.shape) for name, v in values.items()}
    return torch.cat([v.reshape(n_tasks, -1) for v in whole.values()], 1), {n: v.shape[1:] for n, v in whole.items()}


def split(theta, shapes):
    """Parameters laid end to end (T, P) as {name: (T, ...)}."""
    parts = theta.split([shape.numel() for shape in shapes.values()], 1)
    return {name: part.view(-1, *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def look_up(learner, tasks, shifts=None, sparse=False):
    """Each task's rows of the item tables: {name: (T, U, width)}.

    `shifts` {name: (FOLDS + 1, n_items + 1, width)} are added by the fold of the user; see `item_tables`. With `sparse`
    the tables' gradients are sparse.
    """
    rows = {name: F.embedding(tasks.table, table, sparse=sparse) for name, table in learner.tables().items()}
    if shifts is None:
        return rows
    return {name: value + shifts[name][tasks.fold[:, None], tasks.table] for name, value in rows.items()}


# -----------------------------------------------------------------------------
# meta-parameters


DAMPING = 4.0  # first lambda where no factor analysis tells it, in ratings
LEAST_DAMPING, LEAST_DOUBT = 1e-3, 1e-6  # for their logarithms
STATE_DAMPING = 1000.0  # first lambda of the state's weight, in ratings: at the start it hardly moves


class InnerRates(nn.Module):
    """The inner learning rates alpha and dampings lambda, learned and kept as logarithms.

    In the default head, whose predictions are linear in theta, a step is

        theta <- theta - alpha A^-1 (gradient + d (theta - theta_0)),    A = X^T X + diag(d),    d = lambda + n c

    with the gradient summed over the support, the support's features X (n, P) and the start theta_0. With alpha = 1 and
    the squared error the first step ends at the ridge regression of the user's ratings: the mean of their posterior
    under the factor analysis of the training users. Lambda starts there, at the noise's variance over the users', and
    the doubt c at the mean variance of the items' factors, which few training users leave uncertain.

    Else a step is theta <- theta - alpha * gradient / (n + lambda). lambda = 0 is the mean loss.
    """

    def __init__(self, learner, options, user=None):
        """`user`, a `factor_analysis.Factors`, has the first lambda and c of the user's bias and vector."""
        super().__init__()
        self.log_rate, self.log_damping, self.log_doubt = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.of_posterior = steps_in_posterior(options)
        names = learner.head.adapted if options.adapt == "head" else [name for name, _ in learner.named_parameters()]
        steps = options.num_inner_steps
        for name in names:
            start = torch.ones(()) if options.adapt == "all" else torch.ones_like(learner.get_parameter(name))
            self.log_rate[key(name)] = per_step(start * options.inner_lr, steps)
            if self.of_posterior:
                damping, doubt = (start * value for value in first_damping(name, options, user))
                self.log_damping[key(name)], self.log_doubt[key(name)] = per_step(damping, 1), per_step(doubt, 1)
            elif options.inner_damping > 0:
                self.log_damping[key(name)] = per_step(start * options.inner_damping, steps)
        self.requires_grad_(options.use_learnable_params)

    def forward(self, user, tasks):
        """The rates (K, T or 1, P) of adapting to a `user`, and a function: gradient, theta - theta_0 -> direction.

        The gradient is that of the loss summed over the support.
        """
        rate = lay_out(self.log_rate, user.shapes)
        count = loss_network.sum_per_task(tasks.times).flatten(1)  # (T, 1), over all windows
        if self.of_posterior and len(rate):
            damping = lay_out(self.log_damping, user.shapes)[0] + count * lay_out(self.log_doubt, user.shapes)[0]
            inverse = Inverse.apply(user.gram(tasks.times) + damping.diag_embed())
            return rate, lambda g, moved: (inverse @ (g + damping * moved)[..., None])[..., 0]
        count = count.clamp_min(1)
        if self.log_damping and len(rate):
            n_support = tasks.n_support.to(rate.dtype)[:, None]
            rate = rate * (n_support / (n_support + lay_out(self.log_damping, user.shapes)))
        return rate, lambda g, moved: g / count


class Inverse(torch.autograd.Function):
    """Inverses of positive definite matrices (T, P, P), whose gradient takes half as long as that of torch.linalg.inv.

    It has no second derivative, and needs none: the inner loop does not differentiate it.
    """

    @staticmethod
    def forward(ctx, matrices):
        inverse = factor_analysis.invert(matrices)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (inverse,) = ctx.saved_tensors
        return -(inverse @ gradient @ inverse)


def first_damping(name, options, user):
    """The first lambda of a parameter of the default head, in ratings, and its c."""
    if name == "head.state_weight":
        return STATE_DAMPING, LEAST_DOUBT
    of_name = 0 if name == "head.user_bias" else slice(1, None)
    found = (np.full(2, DAMPING), np.zeros(2)) if user is None else (user.damping, user.doubt)
    damping, doubt = (torch.as_tensor(values[of_name], dtype=torch.float32) for values in found)
    if options.inner_damping is not None:
        damping = max(options.inner_damping, LEAST_DAMPING)
    return damping, doubt.clamp_min(LEAST_DOUBT)


def key(name):
    """A parameter's name as a key of `nn.ParameterDict`, which forbids dots."""
    return name.replace(".", "/")


def per_step(start, steps):
    """A trainable logarithm of `start` (...) for each inner step (K, ...)."""
    return nn.Parameter(start.detach().log().repeat(steps, *(1,) * start.dim()))


def lay_out(logs, shapes):
    """exp of {key: (K,) or (K, ...)} for parameters {name: shape} laid end to end: (K, 1, P)."""
    rows = ((logs[key(name)].unsqueeze(-1).flatten(1), shape.numel()) for name, shape in shapes.items())
    return torch.cat([row.expand(-1, size) for row, size in rows], 1).exp()[:, None]


class MetaLearner(nn.Module):
    """One member's meta-parameters: the learner's initialisation, the inner rates and the loss network.

    With `num_inner_steps=0` it is the plain learner (Basic), which does not adapt.
    """

    def __init__(self, n_items, options, scale, start=None):
        """`scale` is (mean, std, low, high) of the ratings; `start`, an `item_tables.Fit`."""
        super().__init__()
        self.options = options
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))
        self.learner = Learner(n_items, options)
        if start is not None:
            self.learner.start_items(start.whole)
            self.learner.head.start_user(start.user.centre)
        for table in self.learner.tables().values():
            table.requires_grad_(options.item_lr > 0)
        self.rates = InnerRates(self.learner, options, None if start is None else start.user)
        mean, std, low, high = scale
        self.loss_network = loss_network.build(options, ((low - mean) / std, (high - mean) / std))

    def adapt(self, tasks, second_order=False, shifts=None, n_windows=0):
        """`Adapted` to the tasks; for `shifts` see `look_up`."""
        tables = look_up(self.learner, tasks, shifts, self.options.sparse_items)
        return adapt(self, tasks, tables, second_order, n_windows)

    def forward(self, tasks, second_order=False, shifts=None):
        """Standardised query predictions after 0..K inner steps: (T, K + 1, Q)."""
        return self.adapt(tasks, second_order, shifts).queries

    def explain(self, tasks):
        """Query predictions as `forward` gives them, and the weight of each support rating at each step (T, K, R, S).

        A weight is the slope of the rating's loss over that of the squared error: 1 everywhere without loss network.
        """
        adapted, loss = self.adapt(tasks), self.loss_network
        steps = enumerate(adapted.support)
        weights = [loss_network.rating_weights(loss, step, predicted, tasks) for step, predicted in steps]
        return adapted.queries, torch.stack(weights, 1) if weights else tasks.ratings[:, None][:, :0]


class Ensemble(nn.Module):
    """`options.members` meta-learners with seeds of their own, each trained as if it were alone.

    The prediction is the mean of theirs. They agree on what the ratings tell and differ in what their random start
    left in them, so that their mean has the lower error.
    """

    def __init__(self, n_items, options, scale, start=None):
        """The arguments are those of `MetaLearner`."""
        super().__init__()
        self.options = options
        self.members = nn.ModuleList(MetaLearner(n_items, own, scale, start) for own in member_options(options))

    @property
    def scale(self):
        return self.members[0].scale

    def forward(self, tasks):
        """Standardised query predictions after 0..K inner steps: (T, K + 1, Q)."""
        return torch.stack([member(tasks) for member in self.members]).mean(0)

    def explain(self, tasks):
        """The members' mean `MetaLearner.explain`."""
        queries, weights = zip(*(member.explain(tasks) for member in self.members), strict=True)
        return torch.stack(queries).mean(0), torch.stack(weights).mean(0)

    def to_rating(self, standardised, clip=True):
        """Standardised predictions on the data's own scale, as float64; clipped to it unless told otherwise."""
        mean, std, low, high = self.scale
        ratings = standardised.double() * std + mean
        return ratings.clamp(low, high) if clip else ratings


def member_options(options):
    """Each member's options: the seeds of initialisation count up from `options.model_init_seed`."""
    seeds = range(options.model_init_seed, options.model_init_seed + options.members)
    return [argparse.Namespace(**{**vars(options), "model_init_seed": seed}) for seed in seeds]


def build_system(problem, options, device="cpu"):
    """A fresh `Ensemble` and, for training, each member's shifts of the item tables (see `look_up`) or None.

    With --head=joint item tables, users and dampings start from the training users' ratings, the same for all members.
    """
    n_items = len(problem.ratings.item_ids)
    scale = (problem.mean, problem.std, problem.ratings.low, problem.ratings.high)
    if options.head == "plain":
        return Ensemble(n_items, options, scale), [None] * options.members
    fit = item_tables.fit(problem.sequences, problem.train, n_items, options, device)
    return Ensemble(n_items, options, scale, fit), [fit.shifts] * options.members


def restore_system(n_items, options, state, source):
    """The `Ensemble` of a state dictionary; UserError where it is not of this model and these sizes."""
    scale = state.get("members.0.scale")
    if not isinstance(scale, torch.Tensor) or scale.shape != (4,) or not (scale[1] > 0 and scale[2] < scale[3]):
        raise misfit(source)
    if any(getattr(options, name) > 8 * utils.USUAL[name] for name in utils.OF_MODEL):  # else it is built in no time
        one = argparse.Namespace(**{**vars(options), "members": 1})
        with torch.device("meta"):  # tells sizes without taking memory, but takes seconds to import
            of_one = Ensemble(n_items, one, (0, 1, 0, 1)).state_dict()
        check_parameters({name: state.get(name) for name in of_one}, of_one, source)
    system = Ensemble(n_items, options, scale.tolist())
    load_parameters(system, state, source)
    return system


def load_parameters(system, state, source):
    """Load a state dictionary; UserError where it is not of this model and these sizes."""
    check_parameters(state, system.state_dict(), source)
    system.load_state_dict(state)


def check_parameters(state, expected, source):
    """UserError where a state dictionary has other names, shapes or types than expected, or is not finite."""
    if state.keys() != expected.keys() or not all(is_like(state[name], expected[name]) for name in expected):
        raise misfit(source)


def is_like(tensor, other):
    alike = isinstance(tensor, torch.Tensor) and (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
    return alike and bool(tensor.isfinite().all())


def misfit(source):
    return UserError(
        f"{source} does not fit its own options (other names, sizes or values): it is damaged or of another version; "
        "use another file, or train again in another --log_dir"
    )


# -----------------------------------------------------------------------------
# the meta-objective


def step_weights(steps, iteration, horizon):
    """Weights of the query losses after inner steps 1..N in the multi-step loss (MAML++), shape (N,).

    For i < N: w_i = max(1/N - e/(N E), 0.03/N); w_N = min(1/N + e (N-1)/(N E), 1 - 0.03 (N-1)/N), at iteration
    e < E, the horizon. From there on the last step counts alone.
    """
    if iteration >= horizon:
        return torch.eye(steps)[-1]
    early = max(1 / steps - iteration / (steps * horizon), 0.03 / steps)
    last = min(1 / steps + iteration * (steps - 1) / (steps * horizon), 1 - 0.03 * (steps - 1) / steps)
    return torch.tensor([early] * (steps - 1) + [last])


def objective_weights(options, iteration):
    """Weights of the query losses after 0..K inner steps in the meta-objective, shape (K + 1,)."""
    steps = options.num_inner_steps
    if steps == 0:
        return torch.ones(1)
    horizon = options.multi_step_loss_num_epochs if options.use_multi_step else 0
    return F.pad(step_weights(steps, iteration, horizon), (1, 0))


def query_losses(predictions, tasks, loss=torch.square, weight=1):
    """`loss` of the errors of each task's queries times a `weight` (T, Q), averaged over the queries: (T, K + 1)."""
    errors = loss(predictions - tasks.query_ratings[:, None]) * (tasks.query * weight)[:, None]
    return errors.sum(-1) / tasks.query.sum(-1, keepdim=True)


def with_windows(tasks, count):
    """Tasks whose queries are followed by the positions of the `count` windows of `dataloader.query_windows`."""
    mask, ratings = tasks.in_query[:, 1 : 1 + count].flatten(1), tasks.ratings[:, 1 : 1 + count].flatten(1)
    return tasks._replace(
        query=torch.cat([tasks.query, mask], 1),
        query_ratings=torch.cat([tasks.query_ratings, ratings], 1),
        query_weight=torch.cat([tasks.query_weight, torch.ones_like(ratings)], 1),
    )


def meta_loss(system, tasks, weights, shifts, n_tasks):
    """The meta-objective of tasks that are a part of `n_tasks`: (loss, figures (3,)).

    Each member of the system follows its own loss, whose weights (K + 1,) are those of `objective_weights`. The figures
    are the squared error before adapting and after it, and the absolute error after it, of the members' mean.
    """
    loss, predictions, options = 0, [], system.options
    n_windows = options.num_query_set if options.query_windows else 0
    targets = with_windows(tasks, n_windows) if n_windows else tasks
    for member, shift in zip(system.members, shifts, strict=True):
        adapted = member.adapt(tasks, options.use_second_order, shift, n_windows)
        predicted = torch.cat([adapted.queries, adapted.windows], -1) if n_windows else adapted.queries
        loss = loss + (query_losses(predicted, targets, weight=targets.query_weight).sum(0) @ weights) / n_tasks
        predictions.append(predicted.detach())
    mean = torch.stack(predictions).mean(0)
    squared, absolute = query_losses(mean, targets).sum(0), query_losses(mean, targets, torch.abs).sum(0)
    return loss, torch.stack([squared[0], squared[-1], absolute[-1]]) / n_tasks
