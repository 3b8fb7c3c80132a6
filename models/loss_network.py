"""The task-adaptive loss: how much each support rating of a user counts in the inner steps (MELO).

A loss is one class and one entry of `options.LOSS_NETWORKS`. It has two methods. `prepare(tasks)` computes what no
prediction changes. `forward(prepared, step, predicted, tasks)` gives half the derivative of each position's loss in its
prediction, (T, R, S): the weighted error (mlp, lstm), or that of a loss learned beside the squared one (metal). Weights
are positive, and with --normalize_loss=True of mean 1 over a user's support, so that weighting is not confounded with
step size. A fresh network gives the squared error, but that of --paper_form=code.
"""

import math
import pkgutil

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad

from models.layers import continues
from models.recurrent import LSTMScan
from options import LOSS_NETWORKS

FEATURES = ("loss", "predictions", "labels", "rating_mean", "rating_std", "recency", "num_samples")


def build(options, scale):
    """The loss that the options ask for; `scale` is the lowest and highest rating in standard deviations."""
    if not options.use_adaptive_loss:
        return SquaredError()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.model_init_seed)
        return pkgutil.resolve_name(LOSS_NETWORKS[options.loss_network])(options, scale)


class SquaredError(nn.Module):
    """The loss of MAML: every rating counts the same."""

    def prepare(self, tasks):
        return None

    def forward(self, prepared, step, predicted, tasks):
        return predicted - tasks.ratings


def rating_weights(loss, step, predicted, tasks):
    """Derivative of each position's loss relative to the squared error's (T, R, S); 0 at padding."""
    # Both derivatives vanish at the rating itself, so that the ratio is taken beside it.
    predicted = torch.where((predicted - tasks.ratings).abs() < 1e-3, tasks.ratings + 1e-3, predicted)
    slope = loss(loss.prepare(tasks), step, predicted, tasks)
    return slope / (predicted - tasks.ratings) * (tasks.segment > 0)


# -----------------------------------------------------------------------------
# what a loss network sees


def sum_per_task(values):
    """Sums over all positions of each task: (T, R, S) -> (T, 1, 1)"""
    return values.sum((1, 2), keepdim=True)


def user_statistics(tasks):
    """Mean and deviation of the user's support ratings and their number, each (T, 1, 1)."""
    total = sum_per_task(tasks.times).clamp_min(1)
    mean = sum_per_task(tasks.ratings * tasks.times) / total
    std = (sum_per_task((tasks.ratings - mean).square() * tasks.times) / total + 1e-6).sqrt()
    return mean, std, tasks.n_support.to(mean.dtype)[:, None, None]


def normalise(log_weight, tasks):
    """exp(log_weight) (T, R, S) scaled to mean 1 over the support, each position as often as it counts; 0 elsewhere."""
    times = tasks.times.to(log_weight.dtype)
    counted = torch.where(times > 0, times, torch.finfo(times.dtype).tiny)
    share = (log_weight + counted.log()).flatten(1).softmax(-1).view_as(log_weight)
    return share * (sum_per_task(times) / counted.clamp_min(1)) * (times > 0)


def known_features(tasks, options):
    """The features that depend on no prediction (T, R, S, 5); see FEATURES. Those that an option turns off are 0."""
    mean, std, count = user_statistics(tasks)
    longest = options.max_seq_len
    features = {
        "labels": tasks.ratings, "rating_mean": mean, "rating_std": std, "recency": tasks.position / longest,
        "num_samples": count / longest,
    }  # fmt: skip
    return stack({name: values.expand(tasks.ratings.shape) for name, values in features.items()}, options)


def all_features(known, predicted, tasks, options):
    """All features (T, R, S, F) from those of `known_features` and the predictions (T, R, S)."""
    changing = {"loss": (predicted - tasks.ratings).square(), "predictions": predicted}
    return torch.cat([stack(changing, options), known], -1)


def stack(features, options):
    """Features {name: (T, R, S)} as (T, R, S, F), 0 for those that a --task_info option turns off."""
    used = {name: getattr(options, f"task_info_{name}", True) for name in features}
    return torch.stack([values if used[name] else torch.zeros_like(values) for name, values in features.items()], -1)


# -----------------------------------------------------------------------------
# loss networks


class LSTMLoss(nn.Module):
    """An LSTM with a learned start reads a window's embedded ratings; its states give the weights.

    It sees ratings alone, so its weights are the same at every inner step.
    """

    def __init__(self, options, scale):
        super().__init__()
        hidden, inputs = options.lstm_hidden, options.lstm_input_size
        self.register_buffer("centres", torch.linspace(*scale, inputs))
        self.embed = nn.Linear(inputs, inputs)
        widths = [inputs] + [hidden] * (options.lstm_num_layers - 1)
        self.cells = nn.ModuleList(nn.Linear(width + hidden, 4 * hidden) for width in widths)
        self.start = nn.Parameter(torch.zeros(options.lstm_num_layers, 2, hidden))
        self.absolute, self.normalised = options.paper_form == "code", options.normalize_loss
        self.output = nn.Linear(hidden, 1) if self.absolute else zero_linear(hidden, options.normalize_loss)

    def prepare(self, tasks):
        """Weight of each position (T, R, S)."""
        # Bumps along the scale take ratings of any scale, half stars included, without a table of values.
        width = self.centres[1] - self.centres[0]
        states = self.embed(torch.exp(-((tasks.ratings[..., None] - self.centres) / width).square()))
        for cell, start in zip(self.cells, self.start, strict=True):
            states = LSTMScan.apply(states, continues(tasks), cell.weight, cell.bias, start)
        log_weight = self.output(states)[..., 0]
        if self.absolute:
            log_weight = log_weight.abs().clamp_min(1e-6).log()
        return normalise(log_weight, tasks) if self.normalised else log_weight.exp()

    def forward(self, prepared, step, predicted, tasks):
        return prepared * (predicted - tasks.ratings)


class MLPLoss(nn.Module):
    """An MLP for each inner step turns each position's statistics into its weight."""

    def __init__(self, options, scale):
        super().__init__()
        self.options = options
        steps = options.num_inner_steps if options.use_step_loss else 1
        self.networks = nn.ModuleList(mlp(options) for _ in range(steps))

    def prepare(self, tasks):
        return known_features(tasks, self.options)

    def forward(self, prepared, step, predicted, tasks):
        network = self.networks[min(step, len(self.networks) - 1)]
        log_weight = network(all_features(prepared, predicted, tasks, self.options))[..., 0]
        weights = normalise(log_weight, tasks) if self.options.normalize_loss else log_weight.exp()
        return weights * (predicted - tasks.ratings)


def mlp(options):
    """`loss_num_layers` hidden layers of tanh units and a linear output that starts at zero."""
    widths = [len(FEATURES)] + [options.lstm_hidden] * options.loss_num_layers
    hidden = [layer for pair in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*hidden, zero_linear(widths[-1], options.normalize_loss))


def zero_linear(inputs, normalised):
    """A linear layer with one output that starts at zero; normalising would cancel its bias, which then stays."""
    layer = nn.Linear(inputs, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    layer.bias.requires_grad_(not normalised)
    return layer


class MetaLoss(nn.Module):
    """A learned loss for each inner step, added to the squared error, whose own weights phi are shifted for the task:

    phi' = (1 + m gamma) phi + q beta, where (gamma, beta) come from the task's mean features, and m, q start at 0
    (MeTAL: Baik et al., ICCV 2021).
    """

    def __init__(self, options, scale):
        super().__init__()
        self.options = options
        steps = options.num_inner_steps if options.use_step_loss else 1
        hidden, inputs = options.lstm_hidden, len(FEATURES)
        self.hidden, self.sizes = hidden, (inputs * hidden, hidden, hidden, 1)
        phi = torch.randn(steps, sum(self.sizes)) * inputs**-0.5
        phi[:, -hidden - 1 :] = 0
        self.phi = nn.Parameter(phi)
        self.shift = nn.ModuleList(nn.Linear(inputs, 2 * len(self.sizes)) for _ in range(steps))
        self.gates = nn.Parameter(torch.zeros(steps, 2))  # m, q

    def prepare(self, tasks):
        return known_features(tasks, self.options)

    def forward(self, prepared, step, predicted, tasks):
        return grad(lambda values: self.losses(prepared, step, values, tasks).sum())(predicted) / 2

    def losses(self, prepared, step, predicted, tasks):
        """The loss of each position (T, R, S), 0 at padding, whose loss depends on the others' predictions too."""
        step = min(step, len(self.phi) - 1)
        features, times = all_features(prepared, predicted, tasks, self.options), tasks.times[..., None]
        state = (features * times).sum((1, 2)) / times.sum((1, 2)).clamp_min(1)  # (T, F)
        gamma, beta = self.shift[step](state).chunk(2, -1)
        m, q = self.gates[step]
        parts = zip(self.phi[step].split(self.sizes), gamma.split(1, -1), beta.split(1, -1), strict=True)
        first, bias, second, last = ((1 + m * g) * phi + q * b for phi, g, b in parts)  # (T, size) each
        inside = torch.tanh(features.flatten(1, 2) @ first.unflatten(1, (-1, self.hidden)) + bias[:, None])
        learned = F.softplus((inside * second[:, None]).sum(-1) + last) - math.log(2)
        return ((predicted - tasks.ratings).square() + learned.view_as(predicted)) * (tasks.times > 0)
