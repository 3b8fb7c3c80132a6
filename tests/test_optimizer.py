"""The outer optimizers, their running mean, learning rates and clipping, against plain loops and torch's own."""

import math

import pytest
import tiny
import torch
import torch.nn.functional as F

from training import optimizer


def trained(options, steps=4):
    """A run after some outer steps, and what each step found: {name: (parameter before, clipped gradient)}, rates."""
    run, found = tiny.run(options), []
    for _ in range(steps):
        before = {name: p.detach().clone() for name, p in run.system.named_parameters() if p.requires_grad}
        tiny.step(run)
        gradients = {name: p.grad for name, p in run.system.named_parameters() if p.grad is not None}
        rates = {p: group for each in run.optimizers for group in each.param_groups for p in group["params"]}
        groups = {name: dict(rates[p]) for name, p in run.system.named_parameters() if p in rates}
        found.append((before, gradients, groups))
    return run, found


@pytest.mark.parametrize(("head", "keep"), [("plain", 0.0), ("joint", 0.98)])
@pytest.mark.parametrize("members", [1, 2])
def test_steps_and_their_mean_equal_a_plain_loop(members, head, keep):
    run, found = trained(tiny.options(model="gru4rec", members=members, head=head))
    moments = {}
    mean = expected = {name: value.double() for name, value in found[0][0].items()}
    for step, (_, gradients, groups) in enumerate(found, 1):
        for name, gradient in gradients.items():
            group, gradient = groups[name], gradient.double()
            first, second = moments.get(name, (0.0, 0.0))
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            moments[name] = first, second
            scale = (second / (1 - 0.999**step)).sqrt() + 1e-6
            decayed = expected[name] * (1 - group["lr"] * group["weight_decay"])
            expected[name] = decayed - group["lr"] * first / (1 - 0.9**step) / scale
        rest = keep if step > 1 else 0  # the first step's weights are the first mean
        mean = {name: torch.lerp(value, mean[name], rest) for name, value in expected.items()}
    for system, values in ((run.system, expected), (run.average, mean)):
        for name, parameter in system.named_parameters():
            if name in values:
                torch.testing.assert_close(parameter.detach().double(), values[name], rtol=1e-5, atol=1e-6)


def test_learning_rates_rise_and_fall_as_a_cosine():
    options = tiny.options(num_train_iterations=200, outer_lr=3e-3, min_outer_lr=1e-3, item_lr=2e-4)
    run = tiny.run(options)
    for iteration in (0, 10, 49, 50, 120, 200, 300):
        rates = optimizer.learning_rates(run.optimizers, options, iteration)
        done = min(iteration / 200, 1)
        factor = min((iteration + 1) / 50, 1) * (1 / 3 + 2 / 3 * (1 + math.cos(math.pi * done)) / 2)
        for group, rate in zip(run.optimizers[0].param_groups, rates, strict=True):
            assert rate == pytest.approx(factor * group["initial_lr"])
    rates = {group["name"]: group["initial_lr"] for group in run.optimizers[0].param_groups}
    assert rates["encoder"] == 3e-3 and rates["items"] == 2e-4


@pytest.mark.parametrize("loss", ["lstm", "mlp", "metal"])
@pytest.mark.parametrize("sparse", [True, False])
def test_every_parameter_is_in_one_group_of_its_kind(loss, sparse):
    options = tiny.options(loss_network=loss, members=2, sparse_items=sparse, lstm_lr=0.5, loss_lr=0.25)
    run = tiny.run(options)
    groups = [group for each in run.optimizers for group in each.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    assert sorted(map(id, parameters)) == sorted(id(p) for p in run.system.parameters() if p.requires_grad)
    tables = {id(table) for member in run.system.members for table in member.learner.tables().values()}
    assert tables == {id(p) for group in groups if group["name"] == "items" for p in group["params"]}
    assert {group["initial_lr"] for group in groups if group["name"] == "loss"} == {0.5 if loss == "lstm" else 0.25}
    assert all((group["weight_decay"] > 0) == (group["name"] == "encoder") for group in groups)


@pytest.mark.parametrize("chunk", [0, 2])
def test_sparse_tables_have_the_same_gradients_and_rows_not_in_use_do_not_move(chunk):
    found = [
        trained(tiny.options(model="gru4rec", adapt="all", sparse_items=sparse, task_chunk=chunk, full_support=1.0), 1)
        for sparse in (True, False)
    ]
    (run, [(before, gradients, _)]), (_, [(_, dense, _)]) = found
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.to_dense(), dense[name], rtol=1e-5, atol=1e-7)
    assert {name.split(".")[-1] for name, gradient in gradients.items() if gradient.is_sparse} == {
        "item_embedding", "item_effect", "item_factor", "item_audience",
    }  # fmt: skip
    for _ in range(2):  # moments of earlier steps must not move rows either
        before = {name: p.detach().clone() for name, p in run.system.named_parameters()}
        tiny.step(run)
    for name, parameter in run.system.named_parameters():
        if name in gradients and gradients[name].is_sparse:
            used = torch.zeros(len(parameter)).index_fill(0, parameter.grad.coalesce().indices()[0], 1).bool()
            moved = (parameter != before[name]).any(1)
            assert moved.any() and not used.all() and not (moved & ~used).any()


@pytest.mark.parametrize("limit", [0.5, 1e6])
@pytest.mark.parametrize("sparse", [True, False])
def test_clipping_equals_torchs(sparse, limit):
    found = []
    for rows_alone, clip in ((sparse, optimizer.clip_gradient), (False, torch.nn.utils.clip_grad_norm_)):
        tables = [torch.nn.Parameter(tiny.random(4, 3, seed=seed)) for seed in range(3)]
        places = torch.tensor([0, 2, 2])
        sum(F.embedding(places, table, sparse=rows_alone).square().sum() for table in tables[:2]).backward()
        norm = clip(tables, limit)
        found.append([norm, *(table.grad.to_dense() for table in tables[:2])])
        assert tables[2].grad is None
    torch.testing.assert_close(*found)
