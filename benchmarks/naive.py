"""The naive reference: what one writes with torch at hand and no thought of speed.

One task follows the other. Each window is padded in a row of its own, item tables are whole, recurrences are loops over
steps, everything is computed again at every inner step, and all derivatives are autograd's.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch.func import functional_call

import maml
from benchmarks.measure import objective_weights
from models.layers import GRU, continues
from models.loss_network import LSTMLoss, normalise


def naive_copy(system):
    """A copy of an `Ensemble` whose recurrences are loops over steps."""
    system = copy.deepcopy(system)
    for module in system.modules():
        if isinstance(module, GRU):
            module.forward = partial(run_gru, module)
        elif isinstance(module, LSTMLoss):
            module.prepare = partial(run_lstm, module)
    return system


def run_gru(gru, x, tasks):
    """`GRU.forward`: histories x (T, R, S, I) -> states (T, R, S, D)."""
    inputs, goes_on, states = gru.input(x), continues(tasks)[..., None], []
    state = x.new_zeros(*x.shape[:-2], gru.state.in_features)
    for step in range(x.shape[-2]):
        before = goes_on[..., step, :] * state
        x_r, x_z, x_n = inputs[..., step, :].chunk(3, -1)
        h_r, h_z, h_n = gru.state(before).chunk(3, -1)
        update, new = torch.sigmoid(x_z + h_z), torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
        state = new + update * (before - new)
        states.append(state)
    return torch.stack(states, -2)


def run_lstm(network, tasks):
    """`LSTMLoss.prepare`: the weight of each position (T, R, S)."""
    width, goes_on = network.centres[1] - network.centres[0], continues(tasks)[..., None]
    states = network.embed(torch.exp(-((tasks.ratings[..., None] - network.centres) / width).square()))
    for cell, (first_state, first_memory) in zip(network.cells, network.start, strict=True):
        inputs, states, state, memory = states, [], first_state, first_memory
        for step in range(inputs.shape[-2]):
            on = goes_on[..., step, :]
            state, memory = first_state + on * (state - first_state), first_memory + on * (memory - first_memory)
            enter, forget, new, leave = cell(torch.cat([inputs[..., step, :], state], -1)).chunk(4, -1)
            memory = torch.sigmoid(forget) * memory + torch.sigmoid(enter) * torch.tanh(new)
            state = torch.sigmoid(leave) * torch.tanh(memory)
            states.append(state)
        states = torch.stack(states, -2)
    log_weight = network.output(states)[..., 0]
    return normalise(log_weight, tasks) if network.normalised else log_weight.exp()


def lay_out_windows(tasks):
    """A list of `Tasks` of one task each, with each window in a row of its own and catalogue numbers as items."""
    return [lay_out_task(tasks.take(slice(number, number + 1))) for number in range(len(tasks.table))]


def lay_out_task(task):
    windows = list(list_windows(task.segment[0], task.times[0])) or [torch.zeros(0, dtype=torch.long)]
    places = torch.zeros(1, len(windows), task.items.shape[2], dtype=torch.long)
    position = torch.zeros_like(places)
    for number, at in enumerate(windows):
        places[0, number, : len(at)] = at
        position[0, number, : len(at)] = torch.arange(len(at), 0, -1)
    real = position > 0
    return task._replace(
        items=task.table[0][task.items.flatten()[places]] * real,
        ratings=task.ratings.flatten()[places] * real,
        segment=real.long(),
        position=position,
        times=real.to(task.times.dtype),
        query_items=task.table.gather(1, task.query_items),
    )


def list_windows(segment, times):
    """The places of each window's positions among all R S of a task, the whole support's first.

    A segment may stand for several windows with its start, see `dataloader.keep_longest`; one ends where fewer go on.
    """
    for number in range(1, int(segment.max()) + 1):
        at = (segment.flatten() == number).nonzero()[:, 0]
        ends = times.flatten()[at] > F.pad(times.flatten()[at], (0, 1))[1:]
        yield from (at[: last + 1] for last in reversed(ends.nonzero()[:, 0].tolist()))


def meta_gradient(system, tasks):
    """Add the meta-gradient of `lay_out_windows` to the parameters of a `naive_copy`."""
    for task in tasks:
        for member in system.members:
            (query_losses(member, task) @ objective_weights(system) / len(tasks)).backward()


def query_losses(member, task):
    """Query losses (K + 1,) before the first and after each inner step of one task."""
    learner, network, options = member.learner, member.loss_network, member.options
    theta, losses = dict(learner.named_parameters()), []
    names = learner.head.adapted if options.adapt == "head" else list(theta)
    theta |= {name: theta[name].clone().requires_grad_() for name in names if not theta[name].requires_grad}
    first = theta
    for step in range(options.num_inner_steps + 1):
        tables = {name: theta[name] for name in learner.tables()}
        support, query = functional_call(learner, theta, ("predict", task, tables))
        squared = (query - task.query_ratings).square() * task.query * task.query_weight
        losses.append(squared.sum() / task.query.sum())
        if step == options.num_inner_steps:
            return torch.stack(losses)
        slope = network(network.prepare(task), step, support, task) * task.times
        values, second_order = [theta[name] for name in names], options.use_second_order
        gradients = torch.autograd.grad(support, values, slope, True, second_order, materialize_grads=True)
        if member.rates.of_posterior:
            gradients = posterior_steps(member, task, tables, gradients, values, [first[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            theta = theta | {name: theta[name] - inner_rate(member.rates, name, step, task) * gradient}


def posterior_steps(member, task, tables, gradients, values, first):
    """What the gradients become in the metric of the posterior, see `maml.InnerRates`."""
    names = member.learner.head.adapted
    features = member.learner.features(task, tables)[0].flatten(0, -2)[:, 1:]
    features = features if member.options.use_second_order else features.detach()
    gram = (features * task.times.flatten()[:, None]).T @ features
    logs = [(member.rates.log_damping[name][0], member.rates.log_doubt[name][0]) for name in map(maml.key, names)]
    damping = torch.cat([(first.exp() + task.times.sum() * more.exp()).flatten() for first, more in logs])
    gradient, value, start = (torch.cat([part.flatten() for part in parts]) for parts in (gradients, values, first))
    step = torch.linalg.solve(gram + torch.diag(damping), gradient + damping * (value - start))
    parts = step.split([part.numel() for part in values])
    return [part.view_as(of) for part, of in zip(parts, values, strict=True)]


def inner_rate(rates, name, step, task):
    """What multiplies the gradient of the loss summed over the support in a parameter at an inner step."""
    rate, count = rates.log_rate[maml.key(name)][step].exp(), task.n_support
    if rates.of_posterior:
        return rate
    if rates.log_damping:
        rate = rate * count / (count + rates.log_damping[maml.key(name)][step].exp())
    return rate / task.times.sum().clamp_min(1)
