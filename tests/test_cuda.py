"""On a GPU every learner trains and predicts as on the CPU."""

import numpy as np
import pytest
import tiny
import torch

import dataloader
import main
from evaluation import evaluate
from training import optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


def trained(device, options):
    """The figures of two outer steps, the system after them, and what it predicts."""
    run, figures = tiny.run(options, device=device), []
    for iteration in range(2):
        optimizer.set_learning_rates(run.optimizers, options, iteration)
        figures += main.outer_step(run)
        run.loop["iteration"] += 1
    tasks = dataloader.last_tasks(run.problem.sequences, np.arange(6), options)
    return (
        figures,
        {name: value.cpu() for name, value in run.system.state_dict().items()},
        evaluate.predict(run.system, tasks),
    )


@pytest.mark.parametrize(
    "given", [{}, {"adapt": "all", "loss_network": "lstm"}, {"loss_network": "metal"}, {"sparse_items": True}]
)
@pytest.mark.parametrize("model", tiny.LEARNERS)
def test_two_steps_equal_those_on_the_cpu(model, given):
    options = tiny.options(model=model, members=2, **given)
    torch.testing.assert_close(trained("cuda", options), trained("cpu", options), rtol=1e-5, atol=1e-5)
