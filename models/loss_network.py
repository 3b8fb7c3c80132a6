"""The task-adaptive loss: how much each support rating of a user counts in the inner steps (MELO).

A loss network is called once per inner step with the tasks' predictions and returns half the slope of each position's
loss in its prediction, (B, R, S): the weighted error (mlp, lstm), or that of a loss learned beside the squared one
(metal). Weights are positive, and with --normalize_loss=True of mean 1 over a user's support, so that weighting is not
confounded with step size. A fresh network gives the squared error.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad

from models.kernels import LSTMScan
from models.layers import continues, has_one_block, of_blocks, over_task

FEATURES = ("loss", "predictions", "labels", "rating_mean", "rating_std", "recency", "num_samples")


def build(options, scale):
    """The loss network that the options ask for, or None for the plain squared error.

    `scale` is the lowest and highest rating in standard deviations from the mean.
    """
    if not options.use_adaptive_loss:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.model_init_seed)
        return {"lstm": LSTMLoss, "mlp": MLPLoss, "metal": MetaLoss}[options.loss_network](options, scale)


def user_statistics(tasks):
    """Mean and deviation of the user's support ratings and their number, each (1, 1)."""
    counted = tasks.times.to(tasks.ratings.dtype)
    total = over_task(counted, tasks).clamp_min(1)
    mean = over_task(tasks.ratings * counted, tasks) / total
    std = over_task((tasks.ratings - mean).square() * counted, tasks).div(total).add(1e-6).sqrt()
    return mean, std, (tasks.query_last + 1).to(mean.dtype)[..., None, None]


def counting(tasks):
    """What `normalise` needs of how often positions count, (R, S) each: its logarithm, and the number of all that count
    over it. The lowest number and 0 where a position does not count."""
    times = tasks.times.to(tasks.ratings.dtype)
    worth = over_task(times, tasks) / times.clamp_min(1) * tasks.support
    return times.log().clamp_min(torch.finfo(times.dtype).min), worth


def normalise(log_weight, tasks, counted):
    """exp(log_weight) scaled to mean 1 over the support positions, each as often as it counts; 0 elsewhere.

    `counted` is what `counting` gives.
    """
    log_times, worth = counted
    return softmax_over_task(log_weight + log_times, tasks) * worth


def softmax_over_task(values, tasks):
    """Softmax of values (B, R, S) over all positions of a task."""
    if has_one_block(tasks):
        return values.flatten(-2).softmax(-1).view_as(values)
    top = values.detach().amax((-2, -1), keepdim=True)
    top = top[: len(tasks.table)].scatter_reduce(0, tasks.task[:, None, None], top, "amax")
    sizes = (values - of_blocks(top, tasks)).exp()
    return sizes / over_task(sizes, tasks)


def task_features(known, prediction, tasks, options):
    """What is known of each position, (R, S, F): see FEATURES; those switched off by --task_info_* are 0.

    `known` is what `known_features` gives.
    """
    of_prediction = {"loss": (prediction - tasks.ratings).square(), "predictions": prediction}
    return torch.cat([*columns(of_prediction, options), known], -1)


def known_features(tasks, options):
    """The features that depend on no prediction, the same at every inner step."""
    mean, std, count = user_statistics(tasks)
    of_ratings = {"labels": tasks.ratings, "rating_mean": mean, "rating_std": std}
    longest = options.max_seq_len
    features = {**of_ratings, "recency": tasks.position / longest, "num_samples": count / longest}
    expanded = {name: values.expand(tasks.ratings.shape) for name, values in features.items()}
    return torch.cat(columns(expanded, options), -1)


def columns(features, options):
    """Features {name: (R, S)} as a list of (R, S, 1), 0 for those switched off."""
    used = (values if getattr(options, f"task_info_{name}", True) else values * 0 for name, values in features.items())
    return [values[..., None] for values in used]


class LSTMLoss(nn.Module):
    """An LSTM with a learned start reads a window's embedded ratings; its states give the weights.

    It sees ratings alone, so its weights are the same at every inner step and computed once a task.
    """

    def __init__(self, options, scale):
        super().__init__()
        hidden, inputs = options.lstm_hidden, options.lstm_input_size
        self.register_buffer("centres", torch.linspace(*scale, inputs))
        self.embed = nn.Linear(inputs, inputs)
        widths = [inputs] + [hidden] * (options.lstm_num_layers - 1)
        self.cells = nn.ModuleList(nn.Linear(width + hidden, 4 * hidden) for width in widths)
        self.start = nn.Parameter(torch.zeros(options.lstm_num_layers, 2, hidden))
        self.output = nn.Linear(hidden, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.normalised = options.normalize_loss
        self.output.bias.requires_grad_(not self.normalised)  # normalising takes it out again

    def prepare(self, tasks):
        """Weight of each position (R, S)."""
        # Bumps along the data's own scale take ratings of any scale, half stars included, without a table of values.
        width = self.centres[1] - self.centres[0]
        states = self.embed(torch.exp(-((tasks.ratings[..., None] - self.centres) / width).square()))
        for cell, start in zip(self.cells, self.start, strict=True):
            states = LSTMScan.apply(states, continues(tasks), cell.weight, cell.bias, start)
        log_weight = self.output(states)[..., 0]
        return normalise(log_weight, tasks, counting(tasks)) if self.normalised else log_weight.exp() * tasks.support

    def forward(self, prepared, step, prediction, tasks):
        return prepared * (prediction - tasks.ratings)


class MLPLoss(nn.Module):
    """An MLP per inner step on each position's statistics gives its weight."""

    def __init__(self, options, scale):
        super().__init__()
        self.options = options
        steps = options.num_inner_steps if options.use_step_loss else 1
        sizes = len(FEATURES), options.lstm_hidden, options.loss_num_layers
        self.networks = nn.ModuleList(mlp(*sizes) for _ in range(steps))
        for network in self.networks:
            network[-1].bias.requires_grad_(not options.normalize_loss)  # normalising takes it out again

    def prepare(self, tasks):
        return known_features(tasks, self.options), counting(tasks) if self.options.normalize_loss else None

    def weights(self, prepared, step, prediction, tasks):
        """Weight of each position (R, S); `prepared` is what `prepare` gives."""
        known, counted = prepared
        network = self.networks[min(step, len(self.networks) - 1)]
        features = task_features(known, prediction, tasks, self.options)
        log_weight = network(features.flatten(0, -2)).view(features.shape[:-1])
        if self.options.normalize_loss:
            return normalise(log_weight, tasks, counted)
        return log_weight.exp() * tasks.support

    def forward(self, prepared, step, prediction, tasks):
        return self.weights(prepared, step, prediction, tasks) * (prediction - tasks.ratings)


def mlp(inputs, hidden, layers):
    """`layers` hidden layers of tanh units and a linear output that starts at zero."""
    parts = []
    for layer in range(layers):
        parts += [nn.Linear(inputs if layer == 0 else hidden, hidden), nn.Tanh()]
    output = nn.Linear(hidden, 1)
    nn.init.zeros_(output.weight)
    nn.init.zeros_(output.bias)
    return nn.Sequential(*parts, output)


class MetaLoss(nn.Module):
    """A learned loss per inner step, added to the squared error, whose own weights phi are shifted for the task:

    phi' = (1 + m gamma) phi + q beta, where (gamma, beta) come from the task's mean features, and m, q start at 0
    (MeTAL: Baik et al., ICCV 2021).
    """

    def __init__(self, options, scale):
        super().__init__()
        self.options = options
        steps = options.num_inner_steps if options.use_step_loss else 1
        hidden, inputs = options.lstm_hidden, len(FEATURES)
        sizes = (inputs * hidden, hidden, hidden, 1)
        self.sizes, self.hidden = sizes, hidden
        phi = torch.randn(steps, sum(sizes)) * inputs**-0.5
        phi[:, -hidden - 1 :] = 0
        self.phi = nn.Parameter(phi)
        self.shift = nn.ModuleList(nn.Linear(inputs, 2 * len(sizes)) for _ in range(steps))
        self.gates = nn.Parameter(torch.zeros(steps, 2))  # m, q

    def prepare(self, tasks):
        return known_features(tasks, self.options)

    def forward(self, prepared, step, prediction, tasks):
        return grad(lambda predicted: self.losses(prepared, step, predicted, tasks).sum())(prediction) / 2

    def losses(self, prepared, step, prediction, tasks):
        """Loss of each position (R, S); `prepared` is what `prepare` gives."""
        step = min(step, len(self.phi) - 1)
        features = task_features(prepared, prediction, tasks, self.options)
        counted = tasks.times[..., None].to(features.dtype)
        total, number = (over_task(values, tasks, (-3, -2)) for values in (features * counted, counted))
        state = (total / number.clamp_min(1))[..., 0, 0, :]
        gamma, beta = (shift.unbind(-2) for shift in self.shift[step](state)[..., None].chunk(2, -2))
        m, q = self.gates[step]
        parts = self.phi[step].split(self.sizes)
        first, bias, second, last = ((1 + m * g) * part + q * b for part, g, b in zip(parts, gamma, beta, strict=True))
        first = first.unflatten(-1, (-1, self.hidden))[..., None, :, :]
        inside = torch.tanh(features @ first + bias[..., None, None, :])
        learned = F.softplus((inside * second[..., None, None, :]).sum(-1) + last[..., None]) - math.log(2)
        return ((prediction - tasks.ratings).square() + learned) * tasks.support
