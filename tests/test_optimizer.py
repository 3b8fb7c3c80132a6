"""The row-wise optimizer equals torch's own, and moves no other row; so do its means."""

import copy

import pytest
import tiny
import torch

from training import loop, optimizer


def steps(kind, rows_of, sparse, shape=(6, 3), count=5, **given):
    """A table after some steps on the squared values of the rows each step uses."""
    table = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    chosen = kind([table], lr=0.1, **given)
    for step in range(count):
        chosen.zero_grad()
        rows = torch.tensor(rows_of(step))
        (torch.nn.functional.embedding(rows, table, sparse=sparse) - step).square().sum().backward()
        if sparse:
            table.grad = table.grad.coalesce()
        chosen.step()
    return table.detach(), chosen.state_dict()["state"]


def test_with_all_rows_it_is_adam():
    given = {"weight_decay": 0.0}
    found, state = steps(optimizer.RowAdamW, lambda step: [0, 1, 2, 3, 4, 5, 2], True, **given)
    expected, of_torch = steps(torch.optim.AdamW, lambda step: [0, 1, 2, 3, 4, 5, 2], False, **given)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(state, of_torch)


def test_with_some_rows_it_is_torchs_sparse_adam():
    rows = [[0, 1, 1], [5], [0, 5], [2, 1], [1]].__getitem__
    found, _ = steps(optimizer.RowAdamW, rows, True, weight_decay=0.0, eps=1e-20)
    expected, _ = steps(torch.optim.SparseAdam, rows, True, eps=1e-20)  # which adds eps elsewhere
    torch.testing.assert_close(found, expected)
    start, _ = steps(optimizer.RowAdamW, rows, True, count=0)
    assert torch.equal(found[3:5], start[3:5])


def test_dense_gradients_go_to_torch():
    found, state = steps(optimizer.RowAdamW, lambda step: [step], False, weight_decay=0.3)
    expected, of_torch = steps(torch.optim.AdamW, lambda step: [step], False, weight_decay=0.3)
    torch.testing.assert_close((found, state), (expected, of_torch), rtol=0, atol=0)


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_parameters_laid_end_to_end_move_as_if_each_were_alone(limit):
    def trained(laid):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
        parameters = list(model.parameters())
        parameters = [optimizer.lay_end_to_end(parameters)] if laid else parameters
        chosen = (optimizer.RowAdamW if laid else torch.optim.AdamW)(parameters, lr=0.1, weight_decay=0.3)
        for _ in range(5):
            optimizer.clear(parameters)
            model(torch.randn(6, 3).double()).square().sum().backward()
            norm = (optimizer.clip if laid else torch.nn.utils.clip_grad_norm_)(parameters, limit)
            chosen.step()
        return norm, model.state_dict()

    torch.testing.assert_close(trained(True), trained(False))


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_equals_torchs(limit):
    tables = [torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(2)]
    found = []
    for sparse in (True, False):
        for table in tables:
            table.grad = None
        rows = torch.tensor([0, 2, 2])
        sum(torch.nn.functional.embedding(rows, table, sparse=sparse).square().sum() for table in tables).backward()
        clip = optimizer.clip if sparse else torch.nn.utils.clip_grad_norm_
        norm = clip(tables, limit)
        found.append([norm, *(table.grad.to_dense() for table in tables)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("keep", [0.0, 0.9])
def test_means_are_those_of_a_step_at_a_time(sparse, keep):
    """Of rows, too, that most steps do not use, whenever they are asked for or loaded into another optimizer."""
    options = tiny.options(model="gru4rec", init_items="random", average=keep, sparse_items=sparse, warmup=1)
    run = loop.new_run(tiny.ensemble(options), None, options, None)
    expected = {}
    for step in range(9):
        loop.train_step(run.system, run.optimizer, tiny.training_batch(options, step), options, step)
        for name, value in run.system.state_dict().items():
            expected[name] = torch.lerp(expected[name], value, 1 - keep) if step else value.clone()
        if step == 4:
            run.optimizer.catch_up()
        if step > 5:
            torch.testing.assert_close(loop.average_state(run), expected, rtol=1e-5, atol=1e-7)
    assert sparse == any(not mean.equal(run.optimizer.mean_of(p)) for p, mean in run.optimizer.means.items())
    other = loop.new_run(tiny.ensemble(options), None, options, None)
    other.system.load_state_dict(run.system.state_dict())
    other.average.load_state_dict(loop.average_state(run))
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for each in (run, other):
        loop.train_step(each.system, each.optimizer, tiny.training_batch(options, 10), options, 10)
        each.optimizer.catch_up()
    for name, value in run.average.state_dict().items():
        assert torch.equal(value, other.average.state_dict()[name])


@pytest.mark.parametrize("chunk", [0, 2])
def test_sparse_tables_take_the_same_first_step(chunk):
    found = []
    for sparse in (True, False):
        options = tiny.options(model="gru4rec", adapt="all", init_items="random", sparse_items=sparse, task_chunk=chunk)
        system, batch = tiny.ensemble(options), tiny.training_batch(options)
        chosen = optimizer.RowAdamW(loop.parameter_groups(system, options))
        figures = loop.train_step(system, chosen, batch, options, 0)
        found.append((figures, system.state_dict()))
    torch.testing.assert_close(*found)
