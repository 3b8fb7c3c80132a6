"""Meta-gradients equal those of a plain loop over tasks and finite differences; the rest of the outer loop's parts."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from test_factor_analysis import simulate
from torch.func import functional_call

import dataloader
import maml
from models import item_tables
from models.loss_network import MetaLoss

LOSSES = {"none": {"use_adaptive_loss": False}, **{name: {"loss_network": name} for name in ("lstm", "mlp", "metal")}}


def make(model="sasrec", loss="none", adapt="head", **given):
    options = tiny.options(model=model, adapt=adapt, **LOSSES[loss], **given)
    return tiny.system(options), tiny.training_tasks(options, stream=7, lengths=(9, 3, 12))


def losses_of(member, tasks, second_order=True):
    """The query losses (T, K + 1) that training takes."""
    if not member.options.query_windows:
        return maml.query_losses(member(tasks, second_order), tasks)
    count = member.options.num_query_set
    adapted = member.adapt(tasks, second_order, n_windows=count)
    return maml.query_losses(torch.cat([adapted.queries, adapted.windows], -1), maml.with_windows(tasks, count))


def plain(member, tasks, second_order):
    """The same query losses (T, K + 1) by the book: task by task, whole item tables, torch.autograd.grad."""
    learner, every = member.learner, dict(member.learner.named_parameters())
    moved = [name for name in every if member.options.adapt == "all" or name in learner.head.adapted]
    losses = []
    for task in tiny.single(tasks):
        items = task.table[0]
        task = task._replace(items=items[task.items], query_items=items[task.query_items])
        count, theta, of_task = task.n_support, dict(every), []
        start = flat(theta, moved)
        for step in range(member.options.num_inner_steps + 1):
            tables = {name: theta[name] for name in learner.tables()}
            support, query = functional_call(learner, theta, ("predict", task, tables))
            errors = (query - task.query_ratings)[task.query], (support - task.ratings)[task.in_query]
            of_task.append(torch.cat(errors).square().mean())
            if step == member.options.num_inner_steps:
                break
            slope = loss_slope(member.loss_network, step, support, task) * task.times
            parameters = [theta[name] for name in moved]
            gradients = torch.autograd.grad(support, parameters, slope, create_graph=True, materialize_grads=True)
            gradients = gradients if second_order else [gradient.detach() for gradient in gradients]
            if member.rates.of_posterior:
                if step == 0:
                    features = features_of(support, parameters, second_order)
                    gram = (features * task.times.flatten()[:, None]).T @ features
                damping = torch.cat([logs(member, "damping", name)[0].exp().flatten() for name in moved])
                doubt = torch.cat([logs(member, "doubt", name)[0].exp().flatten() for name in moved])
                damping = damping + task.times.sum() * doubt
                pull = torch.cat([g.flatten() for g in gradients]) + damping * (flat(theta, moved) - start)
                move = torch.linalg.solve(gram + torch.diag(damping), pull)
                parts = move.split([p.numel() for p in parameters])
                gradients = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
            for name, gradient in zip(moved, gradients, strict=True):
                alpha = logs(member, "rate", name)[step].exp()
                if not member.rates.of_posterior:
                    alpha = alpha / task.times.sum().clamp_min(1)
                    if member.options.inner_damping:
                        alpha = alpha * count / (count + logs(member, "damping", name)[step].exp())
                theta[name] = theta[name] - alpha * gradient
        losses.append(torch.stack(of_task))
    return torch.stack(losses)


def flat(theta, names):
    return torch.cat([theta[name].flatten() for name in names])


def logs(member, kind, name):
    return getattr(member.rates, f"log_{kind}")[name.replace(".", "/")]


def features_of(support, parameters, graph):
    """The derivatives (N, P) of the support's predictions in the parameters."""
    rows = [torch.autograd.grad(value, parameters, create_graph=True) for value in support.flatten()]
    found = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    return found if graph else found.detach()


def loss_slope(network, step, support, task):
    """Half the derivative of each position's loss in its prediction."""
    prepared = network.prepare(task)
    if isinstance(network, MetaLoss):
        losses = network.losses(prepared, step, support, task).sum()
        return torch.autograd.grad(losses, support, create_graph=True)[0] / 2
    return network(prepared, step, support, task)


def gradients(losses, member):
    """The gradient of a mix of all losses in every meta-parameter, zeros where there is none."""
    mix = torch.arange(1, losses.numel() + 1, dtype=losses.dtype).view_as(losses)
    names, parameters = zip(*((name, p) for name, p in member.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad((losses * mix).sum(), parameters, materialize_grads=True), strict=True))


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("adapt", ["head", "all"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", tiny.LEARNERS)
def test_equals_plain_loop(model, loss, adapt, second):
    member, tasks = make(model, loss, adapt)
    ours, theirs = losses_of(member, tasks, second), plain(member, tasks, second)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    got, expected = gradients(ours, member), gradients(theirs, member)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
    if loss != "none":
        assert second == any(g.any() for name, g in got.items() if name.startswith("loss_network"))


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("model", tiny.LEARNERS)
def test_paper_form_equals_plain_loop(model, windows):
    member, tasks = make(model, "lstm", "all", paper_form=True, query_windows=windows)
    ours, theirs = losses_of(member, tasks), plain(member, tasks, True)
    torch.testing.assert_close(gradients(ours, member), gradients(theirs, member), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("adapt", ["head", "all"])
@pytest.mark.parametrize("loss", ["lstm", "none"])
@pytest.mark.parametrize("model", ["narm", "gru4rec", "meanpool"])
def test_windows_with_a_common_start_are_equal_to_each_alone(model, loss, adapt, monkeypatch):
    found = []
    for longest_alone in (True, False):
        if not longest_alone:
            monkeypatch.setattr(dataloader, "keeps_longest", lambda options: False)
        member, tasks = make(model, loss, adapt, batch_size=8)
        assert (tasks.times.max() > 1) == longest_alone
        losses = losses_of(member, tasks)
        found.append((losses, tasks.times.sum((1, 2)), gradients(losses, member)))
    torch.testing.assert_close(*found)


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
        ("meanpool", "none", "all"),
        ("bert4rec", "mlp", "head"),
    ],
)
def test_second_order_gradients_equal_finite_differences(model, loss, adapt):
    member, tasks = make(model, loss, adapt)
    got = gradients(losses_of(member, tasks), member)
    mix = torch.arange(1, 10, dtype=torch.float64).view(3, 3)
    for part in ("learner.item", "learner.encoder", "learner.head", "learner.errors", "rates", "loss_network"):
        named = {name: p for name, p in member.named_parameters() if name.startswith(part)}
        if not named:
            continue
        directions = [tiny.random(*p.shape, seed=seed) for seed, p in enumerate(named.values())]
        slope = slope_by_differences(named.values(), directions, lambda: (losses_of(member, tasks) * mix).sum())
        ours = sum((got[name] * direction).sum() for name, direction in zip(named, directions, strict=True))
        torch.testing.assert_close(ours, slope, rtol=1e-5, atol=1e-6, msg=part)


@pytest.mark.parametrize("adapt", ["head", "all"])
def test_evaluation_equals_training_predictions(adapt):
    member, tasks = make("sasrec", "mlp", adapt)
    with torch.no_grad():
        first = member(tasks)
    torch.testing.assert_close(member(tasks, second_order=True).detach(), first, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adapt", ["head", "all"])
@pytest.mark.parametrize("model", tiny.LEARNERS)
def test_tasks_do_not_touch_each_other_nor_hang_on_how_they_are_cut(model, adapt):
    member, tasks = make(model, "metal", adapt, batch_size=8)
    together = member(tasks)
    for t, task in enumerate(tiny.single(tasks)):
        torch.testing.assert_close(member(task)[0], together[t])
    for numbers, part in dataloader.parts(tasks, torch.device("cpu"), chunk=3):
        torch.testing.assert_close(member(part), together[numbers])


@pytest.mark.parametrize("adapt", ["head", "all"])
def test_adapted_parameters_are_those_that_the_last_prediction_was_made_with(adapt):
    member, tasks = make("narm", "mlp", adapt)
    adapted = member.adapt(tasks)
    tables = {
        name: adapted.theta[name] if adapt == "all" else table
        for name, table in tiny.rows(member.learner, tasks).items()
    }
    weights = {name: value for name, value in adapted.theta.items() if name not in tables}
    for name in adapted.theta:
        assert adapted.theta[name].shape[0] == len(tasks.table)
    _, query = functional_call(member.learner, weights, ("predict", tasks, tables))
    torch.testing.assert_close(query, adapted.queries[:, -1])


@pytest.mark.parametrize("adapt", ["head", "all"])
def test_padding_item_and_unused_items_get_no_gradient(adapt):
    member, tasks = make("bert4rec", "mlp", adapt)
    gradient = gradients(losses_of(member, tasks), member)["learner.item_embedding"]
    used = torch.zeros(len(gradient), dtype=torch.bool)
    used[tasks.table[tasks.table > 0]] = True
    assert not gradient[~used].any()
    assert gradient[used].any(1).sum() >= len(torch.unique(tasks.table)) // 2


def test_no_inner_steps_is_the_plain_learner():
    member, tasks = make("sasrec", adapt="all")
    member.options.num_inner_steps = 0
    _, query = member.learner.predict(tasks, tiny.rows(member.learner, tasks))
    torch.testing.assert_close(member(tasks), query[:, None])


# -----------------------------------------------------------------------------
# outer steps


def steps(options, count=3):
    """A run after some outer steps in double precision, and the figures of the last."""
    run = tiny.run(options, torch.float64)
    for _ in range(count):
        figures = tiny.step(run)
    return run, figures


@pytest.fixture
def in_double(monkeypatch):
    """Tasks and weights in double precision for outer steps."""
    sample, weights = dataloader.sample_tasks, maml.objective_weights
    monkeypatch.setattr(dataloader, "sample_tasks", lambda *given: tiny.double(sample(*given)))
    monkeypatch.setattr(maml, "objective_weights", lambda *given: weights(*given).double())


def of_step(run):
    return {name: p.grad for name, p in run.system.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("chunk", "budget"), [(1, 10**6), (2, 10**6), (0, 1), (0, 30)])
def test_parts_of_any_size_give_equal_gradients(chunk, budget, monkeypatch, in_double):
    whole, figures = steps(tiny.options(model="narm", batch_size=7), count=1)
    monkeypatch.setitem(dataloader.AT_ONCE, "adapt", budget)
    parts, of_parts = steps(tiny.options(model="narm", batch_size=7, task_chunk=chunk), count=1)
    torch.testing.assert_close(of_step(parts), of_step(whole))
    assert of_parts == pytest.approx(figures)


@pytest.mark.parametrize("sparse", [True, False])
def test_members_are_trained_as_if_each_were_alone(sparse, in_double):
    together = steps(tiny.options(model_init_seed=5, members=2, sparse_items=sparse))[0].system
    alone = [steps(tiny.options(model_init_seed=seed, sparse_items=sparse))[0].system for seed in (5, 6)]
    tasks = tiny.training_tasks(together.options)
    for member, single in zip(together.members, alone, strict=True):
        torch.testing.assert_close(member.state_dict(), single.members[0].state_dict())
    (queries, weights), of_each = together.explain(tasks), [single.explain(tasks) for single in alone]
    torch.testing.assert_close(together(tasks), sum(single(tasks) for single in alone) / 2)
    torch.testing.assert_close(queries, sum(found for found, _ in of_each) / 2)
    torch.testing.assert_close(weights, sum(found for _, found in of_each) / 2)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_gradient_of_any_member_that_is_not_finite_moves_nothing(bad):
    run = tiny.run(tiny.options(members=2))
    before = {name: value.clone() for name, value in run.system.state_dict().items()}
    run.system.members[bad].learner.item_embedding.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(FloatingPointError, match="meta-gradient nan"):
        tiny.step(run)
    torch.testing.assert_close(run.system.state_dict(), before, rtol=0, atol=0)


def test_figures_of_a_step_are_the_errors_of_the_members_mean(in_double):
    options = tiny.options(members=2)
    run = tiny.run(options, torch.float64)
    tasks = tiny.training_tasks(options)
    error = run.system(tasks) - tasks.query_ratings[:, None]
    squared, absolute = (
        torch.stack([loss(error[t, k])[tasks.query[t]].mean() for t in range(3)]).mean().item()
        for loss, k in ((torch.square, 0), (torch.abs, -1))
    )
    figures = tiny.step(run)
    assert [figures[0], figures[2]] == pytest.approx([squared, absolute])


# -----------------------------------------------------------------------------
# the meta-objective and the meta-parameters


@pytest.mark.parametrize(("steps", "horizon"), [(1, 10), (3, 100), (5, 1000), (10, 7)])
def test_step_weights_follow_the_formula_and_sum_to_one(steps, horizon):
    floor, last_before = 0.03 / steps, 0
    for iteration in range(horizon):
        weights = maml.step_weights(steps, iteration, horizon)
        progress = iteration / horizon
        early, last = (1 - progress) / steps, (1 + progress * (steps - 1)) / steps
        expected = [max(early, floor)] * (steps - 1) + [min(last, 1 - floor * (steps - 1))]
        torch.testing.assert_close(weights, torch.tensor(expected))
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
        assert weights[-1] >= last_before
        last_before = weights[-1]
    for iteration in (horizon, horizon + 5):
        assert maml.step_weights(steps, iteration, horizon).tolist() == [0.0] * (steps - 1) + [1.0]


def test_objective_leaves_out_the_unadapted_prediction():
    options = tiny.options(num_inner_steps=3, multi_step_loss_num_epochs=10)
    torch.testing.assert_close(maml.objective_weights(options, 0), torch.tensor([0, 1, 1, 1]) / 3)
    options.use_multi_step = False
    assert maml.objective_weights(options, 0).tolist() == [0, 0, 0, 1]
    options.num_inner_steps = 0
    assert maml.objective_weights(options, 0).tolist() == [1]


def test_query_losses_average_over_each_tasks_queries():
    _, tasks = make()
    predictions, weight = tiny.random(3, 2, tasks.query.shape[1]), tiny.random(*tasks.query.shape, seed=1)
    losses = maml.query_losses(predictions, tasks, weight=weight)
    for t, k in np.ndindex(3, 2):
        real = tasks.query[t]
        squares = (predictions[t, k] - tasks.query_ratings[t]).square() * weight[t]
        torch.testing.assert_close(losses[t, k], squares[real].mean())


def test_without_posterior_rates_start_at_inner_lr_over_n_and_damping():
    options = tiny.options(inner_lr=0.5, inner_damping=4, head="plain", num_samples=1)
    for damping, expected in ((4, [0.5 / 5, 0.5 * 5 / 9]), (0, [0.5, 0.5])):
        options.inner_damping = damping
        member = maml.MetaLearner(tiny.N_ITEMS, options, tiny.SCALE)
        tasks = SimpleNamespace(n_support=torch.tensor([1, 5]), times=torch.tensor([[[1.0, 0.0]], [[3.0, 2.0]]]))
        alpha, direction = member.rates(SimpleNamespace(shapes={"head.bias": torch.Size([])}), tasks)
        torch.testing.assert_close(alpha.expand(2, 2, 1), torch.tensor(expected)[None, :, None].expand(2, 2, 1))
        torch.testing.assert_close(direction(torch.ones(2, 1), None), torch.tensor([[1.0], [1 / 5]]))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_first_step_of_a_fresh_system_ends_at_the_posterior_mean(loss):
    """The ridge regression of the support on bias and factors, whatever n is; later steps stay there."""
    options = tiny.options(num_samples=1, **LOSSES[loss])
    sequences, _, _ = simulate(n_users=80)
    fit = item_tables.fit(sequences, np.arange(80), 20, options)
    member = maml.MetaLearner(20, options, tiny.SCALE, fit)
    with torch.no_grad():
        member.learner.errors.gain.zero_()
        member.rates.log_damping["head/state_weight"].fill_(20.0)
    effect, factor, centre, damping, doubt, audience = fit.user
    for shots in (0, 1, 5):
        tasks = dataloader.last_tasks(sequences, np.arange(80), options, shots)
        found = member(tasks).detach().numpy()[..., 0]
        for user in range(80):
            place = sequences.offsets[user + 1] - 1 - np.arange(shots + 1)
            items = sequences.items[place] - 1
            design = np.concatenate([np.ones((shots + 1, 1)), factor[items]], axis=1)
            prior = centre + 0.6 * audience[items[1:]].sum(0) * 10 / (10 + shots)
            past, left = design[1:], sequences.ratings[place[1:]] - effect[items[1:]] - design[1:] @ prior
            vector = prior + np.linalg.solve(past.T @ past + np.diag(damping + shots * doubt), past.T @ left)
            known = effect[items[0]] + design[0] @ audience[items[0]] * 4 / (4 + shots)
            assert abs(found[user, 0] - known - design[0] @ prior) < 1e-4
            np.testing.assert_allclose(found[user, 1:], known + design[0] @ vector, atol=1e-4)


def test_predictions_come_back_on_the_datas_scale():
    ratings = maml.Ensemble(tiny.N_ITEMS, tiny.options(), tiny.SCALE).to_rating(torch.tensor([-9.0, 0.0, 1.0, 9.0]))
    assert ratings.dtype == torch.float64
    torch.testing.assert_close(ratings, torch.tensor([1, 3.6, 4.7, 5], dtype=torch.float64))
