"""Weights of support ratings: mean 1, never negative, the identity at first, the same on any rating scale."""

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

import dataloader
import maml
from models import loss_network

WEIGHTED = ("lstm", "mlp")


def build(kind, fresh=False, **given):
    options = tiny.options(loss_network=kind, **given)
    network = loss_network.build(options, (-2.4, 1.3)).double()
    return (network if fresh else tiny.jitter(network)), options


def support(length=5, **given):
    """One task with its support in two windows, and some predictions for it."""
    task = tiny.lay_out([[length], [3, 1]], width=length + 1, **given)
    predictions = torch.randn(task.ratings.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return task, predictions


def weights(network, task, predictions, step=0):
    """Slope of each position's loss over that of the squared error."""
    return maml.position_weights(network, step, predictions, task)


def own_weights(network, task, predictions, step=0):
    """Weight of each position as an LSTM or an MLP gives it, of those that do not count too."""
    prepared = network.prepare(task)
    return network.weights(prepared, step, predictions, task) if hasattr(network, "weights") else prepared


@pytest.mark.parametrize("kind", ["lstm", "mlp", "metal"])
def test_a_fresh_network_is_the_squared_error(kind):
    network, _ = build(kind, fresh=True)
    task, predictions = support()
    for step in range(2):
        torch.testing.assert_close(weights(network, task, predictions, step), task.support.double())


@pytest.mark.parametrize("kind", WEIGHTED)
def test_normalised_weights_have_mean_one_and_are_not_negative(kind):
    network, _ = build(kind, normalize_loss=True)
    task, predictions = support()
    for step in range(2):
        found = own_weights(network, task, predictions, step)
        assert (found >= 0).all() and not found[~task.support].any()
        assert found[task.support].std() > 0.01
        torch.testing.assert_close(found.sum() / task.support.sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("kind", WEIGHTED)
def test_without_normalisation_weights_keep_their_size(kind):
    (free, _), (normal, _) = build(kind), build(kind, normalize_loss=True)
    task, predictions = support()
    found, normalised = (own_weights(network, task, predictions) for network in (free, normal))
    mean = found.sum() / task.support.sum()
    assert abs(mean - 1) > 1e-3
    torch.testing.assert_close(found / mean, normalised)


@pytest.mark.parametrize("kind", ["lstm", "mlp", "metal"])
def test_padding_does_not_count(kind):
    network, _ = build(kind)
    task, predictions = support()
    real = task.segment > 0
    changed = task._replace(ratings=torch.where(real, task.ratings, 9.0))
    first = weights(network, task, predictions)[real]
    second = weights(network, changed, torch.where(real, predictions, -3.0))[real]
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("kind", WEIGHTED)
def test_hidden_positions_alone_count_for_a_cloze(kind):
    network, _ = build(kind, normalize_loss=True)
    task, predictions = support()
    hidden = task.support & (torch.arange(6) % 2 == 0)
    found = own_weights(network, task._replace(support=hidden, times=hidden.long()), predictions)
    assert not found[~hidden].any()
    torch.testing.assert_close(found.sum(), hidden.sum().double())


def test_lstm_weights_do_not_depend_on_layout_or_prediction():
    network, _ = build("lstm")
    packed, alone = tiny.lay_out([[5], [3, 2], [4, 1]], width=6), tiny.lay_out([[5], [4], [3], [2], [1]], width=9)
    found = [tiny.windows(network.prepare(task), task) for task in (packed, alone)]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(weights(network, packed, packed.ratings + 1, 1), network.prepare(packed))


def rescaled(ratings_of_five, low, high, step):
    """Sequences whose 1-to-5 ratings are stretched to low..high in steps, with the rest as training uses it."""
    stretched = low + (ratings_of_five - 1) / 4 * (high - low)
    assert np.allclose(stretched / step, np.round(stretched / step))
    mean, std = stretched.mean(), stretched.std()
    items = np.arange(1, len(stretched) + 1)
    sequences = dataloader.Sequences(np.array([0, len(stretched)]), items, (stretched - mean) / std)
    return sequences, ((low - mean) / std, (high - mean) / std)


@pytest.mark.parametrize(("low", "high", "step"), [(0, 10, 0.5), (0.5, 4.5, 0.5), (0, 10, 2.5), (-10, 10, 5)])
@pytest.mark.parametrize("kind", ["lstm", "mlp", "metal"])
def test_weights_do_not_depend_on_the_rating_scale(kind, low, high, step):
    ratings, found = np.random.RandomState(0).randint(1, 6, 7).astype(float), []
    for bounds in ((1, 5, 1), (low, high, step)):
        sequences, scale = rescaled(ratings, *bounds)
        options = tiny.options(loss_network=kind)
        network = tiny.jitter(loss_network.build(options, scale))
        tasks = tiny.double(dataloader.last_tasks(sequences, np.array([0]), options))
        task = type(tasks)(*(tensor[0] for tensor in tasks))
        found.append(weights(network, task, torch.zeros_like(task.ratings)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_lstm_tells_half_stars_apart():
    network, _ = build("lstm")
    task = tiny.lay_out([[1] * 8])
    task = task._replace(ratings=torch.linspace(-2, 1, 8, dtype=torch.float64)[None])
    found = network.prepare(task)[0]
    assert found.sort().values.diff().min() > 1e-4


def test_meta_loss_without_gates_is_not_shifted():
    network, _ = build("metal")
    task, predictions = support()
    with torch.no_grad():
        network.gates.zero_()
    losses = network.losses(network.prepare(task), 0, predictions, task)
    features = loss_network.task_features(network.prepare(task), predictions, task, network.options)
    first, bias, second, last = network.phi[0].split(network.sizes)
    hidden = torch.tanh(features @ first.view(-1, network.hidden) + bias)
    learned = F.softplus(hidden @ second + last) - np.log(2)
    torch.testing.assert_close(losses, ((predictions - task.ratings).square() + learned) * task.support)
    with torch.no_grad():
        network.gates += 0.5
    assert (network.losses(network.prepare(task), 0, predictions, task) - losses).abs().max() > 1e-3


def test_meta_loss_gates_and_correction_start_at_zero():
    network, _ = build("metal", fresh=True)
    assert not network.gates.any()
    task, predictions = support()
    losses = network.losses(network.prepare(task), 1, predictions, task)
    torch.testing.assert_close(losses, (predictions - task.ratings).square() * task.support)


@pytest.mark.parametrize("kind", ["mlp", "metal"])
def test_steps_share_a_network_where_asked(kind):
    task, predictions = support()
    for own, same in ((True, False), (False, True)):
        network, _ = build(kind, use_step_loss=own)
        first, second = (weights(network, task, predictions, step) for step in (0, 1))
        assert torch.allclose(first, second) == same


def test_user_statistics_are_those_of_the_support():
    task, _ = support()
    counted = task.ratings[task.support].numpy()
    mean, std, count = loss_network.user_statistics(task)
    assert float(mean) == pytest.approx(counted.mean())
    assert float(std) == pytest.approx(counted.std(), rel=1e-4)
    assert int(count) == 5


@pytest.mark.parametrize("name", ["loss", "predictions", "labels", "rating_mean", "rating_std", "num_samples"])
def test_features_can_be_switched_off(name):
    task, predictions = support()
    every, fewer = tiny.options(), tiny.options(**{f"task_info_{name}": False})
    features, whole = (
        loss_network.task_features(loss_network.known_features(task, options), predictions, task, options)
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


def test_no_network_without_adaptive_loss():
    assert loss_network.build(tiny.options(use_adaptive_loss=False), (-2, 1)) is None
