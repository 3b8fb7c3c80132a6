"""On a GPU every learner trains and predicts as on the CPU, and a graph replays what its operations did one by one."""

import numpy as np
import pytest
import tiny
import torch

import dataloader
import main
import maml
import utils
from evaluation import evaluate
from models import checkpoint
from training import graphs
from training import run as runs

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")]
FORMS = [{}, {"adapt": "all", "loss_network": "lstm"}, {"loss_network": "metal"}]
FIRST_ORDER = {"use_multi_step": False, "use_adaptive_loss": False}
SAMPLE = (
    *("--mode=sample", "--bert_hidden_units=8", "--bert_num_heads=2", "--num_test_data=20", "--val_size=20"),
    *("--num_train_iterations=20", "--log_interval=10", "--batch_size=8"),
)


def trained(device, options, steps=2, dtype=torch.float32):
    """The figures of outer steps, the system after them, and what it predicts."""
    run = tiny.run(options, dtype, device)
    figures = [figure for _ in range(steps) for figure in tiny.step(run)]
    tasks = dataloader.last_tasks(run.problem.sequences, np.arange(6), options)
    tasks = tiny.double(tasks) if dtype == torch.float64 else tasks
    state = {name: value.cpu() for name, value in run.system.state_dict().items()}
    return figures, state, evaluate.predict(run.system, tasks)


@pytest.mark.parametrize("given", [*FORMS, {"sparse_items": True}])
@pytest.mark.parametrize("model", tiny.LEARNERS)
def test_two_steps_equal_those_on_the_cpu(model, given, monkeypatch):
    """In double precision, because Adam enlarges rounding errors."""
    sample, weights = dataloader.sample_tasks, maml.objective_weights
    monkeypatch.setattr(dataloader, "sample_tasks", lambda *given: tiny.double(sample(*given)))
    monkeypatch.setattr(maml, "objective_weights", lambda *given: weights(*given).double())
    options = tiny.options(model=model, members=2, **given)
    found = [trained(device, options, dtype=torch.float64) for device in ("cuda", "cpu")]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", [*FORMS, FIRST_ORDER])
@pytest.mark.parametrize("model", tiny.LEARNERS)
def test_graphs_give_the_bits_of_single_operations(model, given):
    found = [trained("cuda", tiny.options(model=model, cuda_graphs=on, **given), 20) for on in (True, False)]
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_graph_is_captured_for_each_number_of_rows():
    run = tiny.run(tiny.options(adapt="all"), device="cuda")
    for _ in range(20):
        tiny.step(run)
    assert run.graphs.calls == 20 and 1 <= len(run.graphs.captured) <= 3


@pytest.mark.parametrize("skip", [True, False])
def test_a_step_that_is_not_finite_changes_nothing_on_the_device(skip):
    run = tiny.run(tiny.options(skip_nonfinite=skip), device="cuda")
    for _ in range(graphs.WARM_UP + 2):
        tiny.step(run)
    before = {name: value.clone() for name, value in [*run.system.named_parameters(), *run.average.named_buffers()]}
    table = run.system.members[0].learner.item_embedding
    with torch.no_grad():
        kept = table.clone()
        table.fill_(torch.inf)
    if skip:
        tiny.step(run)
        assert run.loop["skipped"] == 1
    else:
        main.outer_step(run)
        main.outer_step(run)
        run.loop["iteration"] += 2
        with pytest.raises(FloatingPointError, match="iteration 5: "):
            runs.settle(run)
        assert run.loop["iteration"] == graphs.WARM_UP + 2
    with torch.no_grad():
        table.copy_(kept)
    for name, value in run.system.named_parameters():
        assert torch.equal(value, before[name])
    tiny.step(run)
    assert not torch.equal(table, kept) or run.options.item_lr == 0


def best_weights(log):
    return checkpoint.load_checkpoint(checkpoint.best_path(log / "sample-bert4rec-melo"))["system"]


def test_deterministic_runs_give_equal_bits(tmp_path):
    words = *SAMPLE, "--deterministic=True"
    for name in ("one", "two"):
        assert main.main([*words, f"--log_dir={tmp_path / name}"]) == 0
    torch.testing.assert_close(best_weights(tmp_path / "one"), best_weights(tmp_path / "two"), rtol=0, atol=0)


def test_a_run_goes_on_after_a_save_with_the_same_bits():
    whole, first, second = (tiny.run(tiny.options(), device="cuda") for _ in range(3))
    for _ in range(12):
        tiny.step(whole)
    for _ in range(6):
        tiny.step(first)
    second.system.load_state_dict(first.system.state_dict())
    second.average.load_state_dict(first.average.state_dict())
    runs.load_moments(second, [optimizer.state_dict()["state"] for optimizer in first.optimizers])
    second.loop["iteration"] = 6
    for _ in range(6):
        tiny.step(second)
    torch.testing.assert_close(second.system.state_dict(), whole.system.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(second.average.state_dict(), whole.average.state_dict(), rtol=0, atol=0)


def test_a_lack_of_memory_names_what_to_lower(tmp_path):
    torch.cuda.set_per_process_memory_fraction(1e-3)
    try:
        with pytest.raises(utils.UserError, match="out of memory: (lower|give) --"):
            main.main([*SAMPLE, "--batch_size=4096", "--num_samples=25", "--adapt=all", f"--log_dir={tmp_path}"])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
