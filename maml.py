"""Meta-learning: inner steps on a user's support ratings, and the error on the queries that trains them.

Equations of MELO (Kim et al., CIKM 2023), which follows MAML++ (Antoniou et al., ICLR 2019). Per-task shapes:
R rows, S positions, Q queries, K inner steps.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap


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


def key(name):
    """A parameter's name as a key of nn.ParameterDict, which forbids dots."""
    return name.replace(".", "/")


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


def look_up(learner, tasks):
    """Each task's own rows of the item tables: name -> (T, U, width).

    Exact, because under gradient steps rows of items that a task does not use never move.
    """
    return {name: F.embedding(tasks.table, learner.get_parameter(name)) for name in learner.table_names()}


def adapt(learner, loss_network, rates, tasks, tables, options, second_order):
    """Adapt to one task; its query predictions before the first and after each inner step, (K + 1, Q).

    `tasks` is one task's slice of `dataloader.Tasks`, `tables` its item rows. Where the encoder stays as it is
    (--adapt=head), its states are computed once.
    """
    names = adapted_names(learner, options)
    fast = {name: tables[name] if name in tables else learner.get_parameter(name) for name in names}
    states = learner.encode(tasks, tables) if options.adapt == "head" else None
    count = (tasks.query_last + 1).to(tasks.ratings.dtype)
    # A rating in several windows counts once in all.
    share = tasks.support * (count / tasks.support.sum().clamp_min(1))
    prepared = None if loss_network is None else loss_network.prepare(tasks)

    def predict(fast):
        weights = {name: value for name, value in fast.items() if name not in tables}
        rows = {name: fast.get(name, value) for name, value in tables.items()}
        return functional_call(learner, weights, (tasks, rows, states))

    def support_loss(fast, step):
        history, query = predict(fast)
        if loss_network is None:
            losses = (history - tasks.ratings).square()
        else:
            losses = loss_network(prepared, step, history, tasks)
        return 0.5 * (losses * share).sum(), query

    queries = []
    for step in range(options.num_inner_steps):
        gradients, query = grad(support_loss, has_aux=True)(fast, step)
        if not second_order:
            gradients = {name: gradient.detach() for name, gradient in gradients.items()}
        fast = {name: value - rates(name, step, count) * gradients[name] for name, value in fast.items()}
        queries.append(query)
    return torch.stack([*queries, predict(fast)[1]])


def adapt_all(learner, loss_network, rates, tasks, options, second_order):
    """`adapt` for all tasks of a batch at once: (T, K + 1, Q)."""
    tables = look_up(learner, tasks)

    def one(task, rows):
        return adapt(learner, loss_network, rates, task, rows, options, second_order)

    return vmap(one)(tasks, tables)


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


def query_losses(predictions, tasks):
    """Squared error of each task's queries, averaged over them, per number of inner steps: (T, K + 1)."""
    errors = (predictions - tasks.query_ratings[:, None]).square() * tasks.query[:, None]
    return errors.sum(-1) / tasks.query.sum(-1, keepdim=True)
