"""Meta-gradients equal those of a plain loop over tasks and finite differences; the rest of the outer loop's parts."""

from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from torch.func import functional_call

import dataloader
import maml
from models import loss_network
from training import loop, optimizer

LOSSES = {
    "none": {"use_adaptive_loss": False},
    "lstm": {"loss_network": "lstm"},
    "mlp": {"loss_network": "mlp"},
    "metal": {"loss_network": "metal"},
}
GRID = [
    (model, loss, second, adapt)
    for number, model in enumerate(tiny.LEARNERS)
    for place, loss in enumerate(LOSSES)
    for second in (True, False)
    for adapt in ("head", "all")
    if (number + place) % 4 == 0 or (second and adapt == "all")
]


def make(model="sasrec", loss="none", adapt="head", **given):
    given = {"head": "joint", "init_items": "random", **given}
    options = tiny.options(model=model, adapt=adapt, **LOSSES[loss], **given)
    return tiny.system(options), tiny.training_tasks(options, stream=7, lengths=(9, 3, 12)), options


def vectorised(system, tasks, second_order, rows=1):
    """The query losses (T, K + 1) of tasks laid out in blocks of at most that many rows, as in training."""
    with mock.patch.multiple(dataloader, BLOCK=rows, WEIGHTS=-1):
        [(numbers, part)] = dataloader.by_size(tasks, len(tasks.table))
    assert (len(part.task) > len(part.table)) == (rows == 1)
    return maml.query_losses(system(part, second_order), part)[np.argsort(numbers)]


def plain(system, tasks, options, second_order):
    """The same query losses (T, K + 1) by the book: task by task, whole item tables, torch.autograd.grad."""
    every = dict(system.learner.named_parameters())
    moved = [name for name in every if options.adapt == "all" or name in system.learner.head.adapted]
    losses = []
    for task in (type(tasks)(*parts) for parts in zip(*tasks, strict=True)):
        task = task._replace(items=task.table[task.items], query_items=task.table[task.query_items])
        count, fast, of_task = task.query_last + 1, dict(every), []
        share = task.times.double() * count / task.times.sum().clamp_min(1)
        for step in range(options.num_inner_steps + 1):
            tables = {name: fast[name] for name in system.learner.table_names()}
            history, query = functional_call(system.learner, fast, ("predict", task, tables))
            of_task.append((query - task.query_ratings)[task.query].square().mean())
            if step == options.num_inner_steps:
                break
            slopes = loss_slopes(system.loss_network, step, history, task) * share
            parameters = [fast[name] for name in moved]
            gradients = torch.autograd.grad(history, parameters, slopes, create_graph=True, allow_unused=True)
            for name, gradient in zip(moved, gradients, strict=True):
                if gradient is None:
                    continue
                rate = system.rates.log_rate[name.replace(".", "/")][step].exp()
                damping = system.rates.log_damping[name.replace(".", "/")][step].exp()
                gradient = gradient if second_order else gradient.detach()
                fast[name] = fast[name] - rate / (count + damping) * gradient
        losses.append(torch.stack(of_task))
    return torch.stack(losses)


def loss_slopes(network, step, history, task):
    """Half the slope of each support position's loss in its prediction; weights count as constants in it."""
    if network is None:
        return history - task.ratings
    prepared = network.prepare(task)
    if isinstance(network, loss_network.MetaLoss):
        losses = network.losses(prepared, step, history, task).sum()
        return torch.autograd.grad(losses, history, create_graph=True)[0] / 2
    weights = network.weights(prepared, step, history, task) if hasattr(network, "weights") else prepared
    return weights * (history - task.ratings)


def gradients(losses, system):
    """The gradient of a mix of all losses in every meta-parameter, zeros where there is none."""
    mix = torch.arange(1, losses.numel() + 1, dtype=losses.dtype).view_as(losses)
    names, parameters = zip(*system.named_parameters(), strict=True)
    found = torch.autograd.grad((losses * mix).sum(), parameters, allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return dict(zip(names, (torch.zeros_like(p) if g is None else g for p, g in pairs), strict=True))


@pytest.mark.parametrize(("model", "loss", "second", "adapt"), GRID)
def test_equals_plain_loop(model, loss, second, adapt):
    system, tasks, options = make(model, loss, adapt)
    ours, theirs = vectorised(system, tasks, second), plain(system, tasks, options, second)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours, vectorised(system, tasks, second, rows=100))
    got, expected = gradients(ours, system), gradients(theirs, system)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
    if loss != "none":
        assert second == any(g.any() for name, g in got.items() if name.startswith("loss_network"))


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("model", tiny.LEARNERS)
def test_rating_input_equals_plain_loop(model, reads):
    system, tasks, options = make(model, "lstm", "all", use_rating_input=reads, inner_rates="tensor")
    ours, theirs = vectorised(system, tasks, True), plain(system, tasks, options, True)
    torch.testing.assert_close(gradients(ours, system), gradients(theirs, system), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("adapt", ["head", "all"])
@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize(("model", "loss"), [("narm", "lstm"), ("gru4rec", "lstm"), ("gru4rec", "none")])
def test_windows_with_a_common_start_are_equal_to_each_alone(model, loss, reads, adapt, monkeypatch):
    found = []
    for shared in (True, False):
        if not shared:
            monkeypatch.setattr(dataloader, "shares_starts", lambda options: False)
        system, tasks, _ = make(model, loss, adapt, use_rating_input=reads, batch_size=8)
        assert (tasks.times.max() > 1) == shared
        losses = vectorised(system, tasks, True)
        found.append((losses, tasks.times.sum((1, 2)), gradients(losses, system)))
    torch.testing.assert_close(found[0], found[1])


def slope_by_differences(parameters, directions, value, step=1e-5):
    """Slope of `value()` along the directions of the parameters, by central differences."""
    ends = []
    with torch.no_grad():
        for sign in (1, -2, 1):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += sign * step * direction
            ends.append(value())
    return (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize(
    ("model", "loss", "adapt"),
    [
        ("bert4rec", "none", "all"),
        ("sasrec", "lstm", "all"),
        ("narm", "metal", "all"),
        ("gru4rec", "mlp", "all"),
        ("bert4rec", "mlp", "head"),
    ],
)
def test_second_order_gradients_equal_finite_differences(model, loss, adapt):
    system, tasks, _ = make(model, loss, adapt)
    got = gradients(vectorised(system, tasks, True), system)
    mix, generator = torch.arange(1, 10, dtype=torch.float64).view(3, 3), torch.Generator().manual_seed(0)
    for part in ("learner.item", "learner.encoder", "learner.head", "rates", "loss_network"):
        named = {name: p for name, p in system.named_parameters() if name.startswith(part)}
        if not named:
            continue
        directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in named.values()]
        slope = slope_by_differences(named.values(), directions, lambda: (vectorised(system, tasks, True) * mix).sum())
        ours = sum((got[name] * direction).sum() for name, direction in zip(named, directions, strict=True))
        torch.testing.assert_close(ours, slope, rtol=1e-5, atol=1e-6, msg=part)


def test_first_order_is_the_gradient_at_the_adapted_weights():
    system, tasks, options = make("gru4rec", "none", "all", inner_rates="tensor")
    tasks = type(tasks)(*(tensor[:1] for tensor in tasks))
    got = gradients(vectorised(system, tasks, False)[:, -1:], system)
    names = maml.adapted_names(system.learner, options)
    with torch.no_grad():
        tables = {name: rows[0] for name, rows in maml.look_up(system.learner, tasks).items()}
    task = type(tasks)(*(tensor[0] for tensor in tasks))
    fast = {name: tables[name] if name in tables else system.learner.get_parameter(name).detach() for name in names}
    for step in range(options.num_inner_steps):
        fast = {name: value.detach().requires_grad_() for name, value in fast.items()}
        rows = {name: fast[name] for name in tables}
        history, _ = functional_call(system.learner, fast, ("predict", task, rows))
        loss = ((history - task.ratings).square() * task.times).sum() / task.times.sum() * (task.query_last + 1) / 2
        slopes = torch.autograd.grad(loss, list(fast.values()), allow_unused=True)
        count = task.query_last + 1
        fast = {
            name: value - (0 if slope is None else system.rates(name, step, count).detach() * slope)
            for (name, value), slope in zip(fast.items(), slopes, strict=True)
        }
    fast = {name: value.detach().requires_grad_() for name, value in fast.items()}
    _, query = functional_call(system.learner, fast, ("predict", task, {name: fast[name] for name in tables}))
    loss = (query - task.query_ratings)[task.query].square().mean()
    plain_names = [name for name in names if name not in tables]
    expected = torch.autograd.grad(loss, [fast[name] for name in plain_names], allow_unused=True)
    for name, gradient in zip(plain_names, expected, strict=True):
        gradient = torch.zeros_like(fast[name]) if gradient is None else gradient
        torch.testing.assert_close(got[f"learner.{name}"], gradient)


@pytest.mark.parametrize("chunk", [1, 2])
def test_task_chunk_gives_equal_gradients(chunk):
    found = []
    for size in (0, chunk):
        _, _, options = make("narm", "lstm", "all", task_chunk=size)
        system, batch = tiny.ensemble(options), tiny.training_batch(options, stream=7, lengths=(9, 3, 12))
        optimizer = torch.optim.SGD(loop.parameter_groups(system, options), lr=1.0)
        figures = loop.train_step(system, optimizer, batch, options, 3)
        found.append((figures, system.state_dict()))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("sparse", [True, False])
def test_members_are_trained_as_if_each_were_alone(sparse):
    def trained(seed, members):
        given = {"init_items": "random", "sparse_items": sparse, "clip_norm": 0.1}
        options = tiny.options(model_init_seed=seed, members=members, **given)
        system = maml.Ensemble(40, options, tiny.SCALE).double()
        chosen = optimizer.RowAdamW(loop.parameter_groups(system, options))
        for _ in range(3):
            loop.train_step(system, chosen, tiny.training_batch(options), options, 0)
        return system, tiny.training_tasks(options)

    together, tasks = trained(5, 2)
    alone = [trained(5 + number, 1)[0] for number in range(2)]
    for member, single in zip(together.members, alone, strict=True):
        torch.testing.assert_close(member.state_dict(), single.members[0].state_dict())
    (queries, weights), of_each = together.explain(tasks), [single.explain(tasks) for single in alone]
    torch.testing.assert_close(together(tasks), sum(single(tasks) for single in alone) / 2)
    torch.testing.assert_close(queries, sum(found for found, _ in of_each) / 2)
    torch.testing.assert_close(weights, sum(found for _, found in of_each) / 2)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_gradient_of_any_member_that_is_not_finite_moves_nothing(bad):
    options = tiny.options(members=2, init_items="random")
    system = maml.Ensemble(40, options, tiny.SCALE).double()
    chosen = optimizer.RowAdamW(loop.parameter_groups(system, options))
    before = {name: value.clone() for name, value in system.state_dict().items()}
    system.members[bad].learner.item_embedding.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(FloatingPointError, match="meta-gradient nan"):
        loop.train_step(system, chosen, tiny.training_batch(options), options, 0)
    torch.testing.assert_close(system.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("adapt", ["head", "all"])
def test_padding_item_and_unused_items_get_no_gradient(adapt):
    system, tasks, _ = make("bert4rec", "mlp", adapt)
    gradient = gradients(vectorised(system, tasks, True), system)["learner.item_embedding"]
    used = torch.zeros(len(gradient), dtype=torch.bool)
    used[tasks.table[tasks.table > 0]] = True
    assert not gradient[~used].any()
    assert gradient[used].any(1).sum() >= len(torch.unique(tasks.table)) // 2


def test_evaluation_equals_training_predictions():
    system, tasks, _ = make("sasrec", "mlp", "all")
    with torch.no_grad():
        first = system(tasks)
    torch.testing.assert_close(system(tasks, second_order=True).detach(), first, rtol=1e-12, atol=1e-12)


def test_tasks_do_not_touch_each_other():
    system, tasks, _ = make("narm", "lstm", "all")
    together = system(tasks)
    for t in range(len(together)):
        torch.testing.assert_close(system(type(tasks)(*(tensor[t : t + 1] for tensor in tasks)))[0], together[t])


def test_no_inner_steps_is_the_plain_learner():
    system, tasks, options = make("sasrec")
    system.options.num_inner_steps = 0
    predictions = system(tasks)
    tables = maml.look_up(system.learner, tasks)
    for t, prediction in enumerate(predictions):
        task = type(tasks)(*(tensor[t] for tensor in tasks))
        _, query = system.learner.predict(task, {name: rows[t] for name, rows in tables.items()})
        torch.testing.assert_close(prediction, query[None])


@pytest.mark.parametrize(("steps", "horizon"), [(1, 10), (3, 100), (5, 1000), (10, 7)])
def test_step_weights_follow_the_formula_and_sum_to_one(steps, horizon):
    floor = 0.03 / steps
    for iteration in {0, 1, horizon // 2, horizon - 1}:
        weights = maml.step_weights(steps, iteration, horizon)
        assert len(weights) == steps
        progress = iteration / horizon
        early, last = (1 - progress) / steps, (1 + progress * (steps - 1)) / steps
        expected = [max(early, floor)] * (steps - 1) + [min(last, 1 - floor * (steps - 1))]
        torch.testing.assert_close(weights, torch.tensor(expected))
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    for iteration in (horizon, horizon + 5):
        assert maml.step_weights(steps, iteration, horizon).tolist() == [0.0] * (steps - 1) + [1.0]


def test_last_step_counts_more_and_more():
    last = [float(maml.step_weights(4, iteration, 50)[-1]) for iteration in range(60)]
    assert last == sorted(last)
    assert last[0] == 0.25 and last[-1] == 1


def test_objective_leaves_out_the_unadapted_prediction():
    options = tiny.options(num_inner_steps=3, multi_step_loss_num_epochs=10)
    torch.testing.assert_close(maml.objective_weights(options, 0), torch.tensor([0, 1, 1, 1]) / 3)
    options.use_multi_step = False
    assert maml.objective_weights(options, 0).tolist() == [0, 0, 0, 1]
    options.num_inner_steps = 0
    assert maml.objective_weights(options, 0).tolist() == [1]


def test_query_losses_average_over_each_tasks_queries():
    _, tasks, _ = make()
    predictions = torch.randn(3, 2, tasks.query.shape[1], dtype=torch.float64)
    losses = maml.query_losses(predictions, tasks)
    for t, k in np.ndindex(3, 2):
        real = tasks.query[t]
        torch.testing.assert_close(losses[t, k], (predictions[t, k] - tasks.query_ratings[t])[real].square().mean())


def test_rates_start_at_inner_lr_over_curvature():
    options = tiny.options(head="joint", init_items="random", inner_lr=0.5, inner_damping=4)
    counts = torch.arange(1.0, 41.0)
    rates = maml.MetaLearner(40, options, tiny.SCALE, counts).rates
    one, five = torch.tensor(1.0), torch.tensor(5.0)
    torch.testing.assert_close(rates("head.user_bias", 0, five), torch.tensor(0.5 / 9))
    torch.testing.assert_close(rates("head.user_bias", 1, one), torch.tensor(0.5 / 5))
    options.inner_damping = 0
    undamped = maml.MetaLearner(40, options, tiny.SCALE, counts).rates
    torch.testing.assert_close(undamped("head.user_bias", 0, five), torch.tensor(0.1))


def test_predictions_come_back_on_the_datas_scale():
    system, _, _ = make()
    ratings = system.to_rating(torch.tensor([-9.0, 0.0, 1.0, 9.0]))
    assert ratings.dtype == torch.float64
    torch.testing.assert_close(ratings, torch.tensor([1, 3.6, 4.7, 5], dtype=torch.float64))
