"""Weights of support ratings: mean 1, never negative, the identity at first, the same on any rating scale."""

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

import dataloader
from models import loss_network
from models.loss_network import rating_weights
from options import LOSS_NETWORKS

every_network = pytest.mark.parametrize("kind", list(LOSS_NETWORKS))
weighted = pytest.mark.parametrize("kind", ["lstm", "mlp"])


def build(kind, fresh=False, **given):
    options = tiny.options(loss_network=kind, **given)
    network = loss_network.build(options, (-2.4, 1.3)).double()
    return (network if fresh else tiny.jitter(network)), options


def support(length=5, **given):
    """One task with its support in two windows, and some predictions for it."""
    task = tiny.lay_out([[length], [3, 1]], width=length + 1, **given)
    predictions = torch.randn(task.ratings.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return task, predictions


@every_network
def test_a_fresh_network_is_the_squared_error(kind):
    network, _ = build(kind, fresh=True)
    task, predictions = support()
    for step in range(2):
        found = rating_weights(network, step, predictions, task)
        torch.testing.assert_close(found, (task.segment > 0).double())


@weighted
def test_normalised_weights_have_mean_one_over_what_counts(kind):
    network, _ = build(kind, normalize_loss=True)
    task, predictions = support()
    counts = (task.segment > 0) & (torch.arange(6) != 1)  # no window ends at a position that another stands for
    for times in (counts.double(), counts * torch.arange(1.0, 7, dtype=torch.float64)):
        task = task._replace(times=times)
        for step in range(2):
            slope = network(network.prepare(task), step, predictions, task)
            found = slope / (predictions - task.ratings)
            assert (found >= 0).all() and not found[~counts].any()
            assert found[counts].std() > 0.01
            torch.testing.assert_close((found * times).sum(), times.sum())


def test_a_position_that_stands_for_several_windows_counts_as_often():
    """Its weight is that of each of them, were they laid out one by one."""
    log_weight, task = tiny.random(1, 1, 4), tiny.lay_out([[4]])
    task = task._replace(times=torch.tensor([[[2.0, 1, 1, 0]]], dtype=torch.float64))
    found = loss_network.normalise(log_weight, task)
    apart = log_weight[0, 0, [0, 0, 1, 2]].softmax(0) * 4
    torch.testing.assert_close(found[0, 0], torch.cat([apart[1:], apart[:1] * 0]))


@weighted
def test_without_normalisation_weights_keep_their_size(kind):
    task, predictions = support()
    found, normalised = (
        rating_weights(build(kind, normalize_loss=normalize)[0], 0, predictions, task) for normalize in (False, True)
    )
    mean = found.sum() / task.times.sum()
    assert abs(mean - 1) > 1e-3
    torch.testing.assert_close(found / mean, normalised)


CODE = {"paper_form": "code", "lstm_input_size": 5}


def test_absolute_weights_are_those_of_the_last_layer():
    task, predictions = support()
    fresh, plain = (build("lstm", fresh=fresh, **CODE)[0] for fresh in (True, False))
    states = []
    plain.output.register_forward_pre_hook(lambda module, given: states.append(given[0]))
    found = rating_weights(plain, 0, predictions, task)
    torch.testing.assert_close(found, plain.output(states[0])[..., 0].abs() * (task.segment > 0))
    normalised = rating_weights(build("lstm", **{**CODE, "normalize_loss": True})[0], 0, predictions, task)
    torch.testing.assert_close(normalised, found * task.times.sum() / found.sum())
    assert 0 < rating_weights(fresh, 0, predictions, task)[task.segment > 0].mean() < 1


@every_network
def test_padding_does_not_count(kind):
    network, _ = build(kind)
    task, predictions = support()
    real = task.segment > 0
    changed = task._replace(ratings=torch.where(real, task.ratings, 9.0))
    first = rating_weights(network, 0, predictions, task)
    second = rating_weights(network, 0, torch.where(real, predictions, -3.0), changed)
    torch.testing.assert_close(first, second)
    assert not first[~real].any()


def test_lstm_weights_do_not_depend_on_layout_or_prediction():
    network, _ = build("lstm")
    packed, alone = tiny.lay_out([[5], [3, 2], [4, 1]], width=6), tiny.lay_out([[5], [4], [3], [2], [1]], width=9)
    found = [tiny.windows(network.prepare(task), task) for task in (packed, alone)]
    torch.testing.assert_close(*found)
    expected = network.prepare(packed) * (packed.segment > 0)
    torch.testing.assert_close(rating_weights(network, 1, packed.ratings + 1, packed), expected)


def rescaled(ratings_of_five, low, high, step):
    """Sequences whose 1-to-5 ratings are stretched to low..high in steps, with the rest as training uses it."""
    stretched = low + (ratings_of_five - 1) / 4 * (high - low)
    assert np.allclose(stretched / step, np.round(stretched / step))
    mean, std = stretched.mean(), stretched.std()
    items = np.arange(1, len(stretched) + 1)
    sequences = dataloader.Sequences(np.array([0, len(stretched)]), items, (stretched - mean) / std)
    return sequences, ((low - mean) / std, (high - mean) / std)


@pytest.mark.parametrize(("low", "high", "step"), [(0, 10, 0.5), (0.5, 4.5, 0.5), (0, 10, 2.5), (-10, 10, 5)])
@every_network
def test_weights_do_not_depend_on_the_rating_scale(kind, low, high, step):
    ratings, found = np.random.RandomState(0).randint(1, 6, 7).astype(float), []
    for bounds in ((1, 5, 1), (low, high, step)):
        sequences, scale = rescaled(ratings, *bounds)
        options = tiny.options(loss_network=kind)
        network = tiny.jitter(loss_network.build(options, scale))
        tasks = tiny.double(dataloader.last_tasks(sequences, np.array([0]), options))
        found.append(rating_weights(network, 0, torch.zeros_like(tasks.ratings), tasks))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_lstm_tells_half_stars_apart():
    network, _ = build("lstm")
    task = tiny.lay_out([[1] * 8])
    task = task._replace(ratings=torch.linspace(-2, 1, 8, dtype=torch.float64)[None, None])
    found = network.prepare(task)[0, 0]
    assert found.sort().values.diff().min() > 1e-4


def test_meta_loss_equals_its_equations():
    """phi' = (1 + m gamma) phi + q beta, with gamma and beta from the task's mean features (MeTAL)."""
    network, _ = build("metal")
    task, predictions = support()
    features = loss_network.all_features(network.prepare(task), predictions, task, network.options)
    for step in range(2):
        gamma, beta = network.shift[step](features[task.segment > 0].mean(0)).chunk(2)
        m, q = network.gates[step]
        parts = zip(network.phi[step].split(network.sizes), gamma, beta, strict=True)
        first, bias, second, last = ((1 + m * g) * phi + q * b for phi, g, b in parts)
        hidden = torch.tanh(features @ first.view(-1, network.hidden) + bias)
        learned = F.softplus(hidden @ second + last) - np.log(2)
        losses = network.losses(network.prepare(task), step, predictions, task)
        torch.testing.assert_close(losses, ((predictions - task.ratings).square() + learned) * (task.segment > 0))


def test_meta_loss_gates_and_correction_start_at_zero():
    network, _ = build("metal", fresh=True)
    assert not network.gates.any()
    task, predictions = support()
    losses = network.losses(network.prepare(task), 1, predictions, task)
    torch.testing.assert_close(losses, (predictions - task.ratings).square() * (task.segment > 0))


@pytest.mark.parametrize("kind", ["mlp", "metal"])
def test_steps_share_a_network_where_asked(kind):
    task, predictions = support()
    for own, same in ((True, False), (False, True)):
        network, _ = build(kind, use_step_loss=own)
        first, second = (rating_weights(network, step, predictions, task) for step in (0, 1))
        assert torch.allclose(first, second) == same


def test_user_statistics_are_those_of_the_support():
    task, _ = support()
    counted = task.ratings[task.segment > 0].numpy()
    mean, std, count = loss_network.user_statistics(task)
    assert float(mean) == pytest.approx(counted.mean())
    assert float(std) == pytest.approx(counted.std(), rel=1e-4)
    assert int(count) == 5


@pytest.mark.parametrize("name", ["loss", "predictions", "labels", "rating_mean", "rating_std", "num_samples"])
def test_features_can_be_switched_off(name):
    task, predictions = support()
    every, fewer = tiny.options(), tiny.options(**{f"task_info_{name}": False})
    features, whole = (
        loss_network.all_features(loss_network.known_features(task, options), predictions, task, options)
        for options in (fewer, every)
    )
    place = loss_network.FEATURES.index(name)
    assert not features[..., place].any() and whole[..., place].any()
    others = [i for i in range(len(loss_network.FEATURES)) if i != place]
    assert torch.equal(features[..., others], whole[..., others])


def test_initial_weights_hang_on_their_seed_alone():
    first = loss_network.build(tiny.options(loss_network="metal"), (-2, 1))
    torch.manual_seed(3)
    again = loss_network.build(tiny.options(loss_network="metal"), (-2, 1))
    torch.testing.assert_close(first.state_dict(), again.state_dict(), rtol=0, atol=0)


def test_without_adaptive_loss_every_rating_counts_the_same():
    network = loss_network.build(tiny.options(use_adaptive_loss=False), (-2, 1))
    task, predictions = support()
    torch.testing.assert_close(network(network.prepare(task), 0, predictions, task), predictions - task.ratings)
    torch.testing.assert_close(rating_weights(network, 0, predictions, task), (task.segment > 0).double())


@every_network
def test_tasks_do_not_touch_each_other(kind):
    network, options = build(kind)
    tasks = tiny.training_tasks(options)
    predictions = tiny.random(*tasks.ratings.shape)
    together = rating_weights(network, 0, predictions, tasks)
    for t, task in enumerate(tiny.single(tasks)):
        torch.testing.assert_close(rating_weights(network, 0, predictions[t : t + 1], task)[0], together[t])


def test_metal_is_half_the_derivative_of_its_loss():
    network, _ = build("metal")
    task, predictions = support()
    predictions.requires_grad_()
    prepared = network.prepare(task)
    [slope] = torch.autograd.grad(network.losses(prepared, 1, predictions, task).sum(), predictions)
    torch.testing.assert_close(network(prepared, 1, predictions, task), slope / 2)
