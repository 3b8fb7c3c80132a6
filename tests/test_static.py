"""The meta-step depends on no data on the host, so that a GPU could capture it as a graph."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dataloader
import maml
import options as option_module
from models import narm

FORMS = {
    "default": [],
    "paper": ["--paper_form=True"],
    "first order": ["--use_multi_step=False", "--use_adaptive_loss=False"],
    "metal": ["--loss_network=metal"],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", option_module.LEARNERS)
def test_the_meta_gradient_reads_no_value_of_a_tensor(model, form, monkeypatch):
    """A fake tensor has a shape and no values: `.item()`, `nonzero` and the like raise."""
    as_on_a_gpu = lambda self, target, past, mask: self.weights(target, past) * mask  # noqa: E731
    monkeypatch.setattr(narm.NARM, "history_weights", as_on_a_gpu)
    options = option_module.parse("", [f"--model={model}", "--batch_size=4", *FORMS[form]])
    rng, n_users = np.random.RandomState(0), 40
    offsets = np.concatenate([[0], rng.randint(10, 40, n_users).cumsum()])
    ratings = rng.randn(offsets[-1]).astype(np.float32)
    sequences = dataloader.Sequences(offsets, rng.randint(1, 50, offsets[-1]), ratings)
    system, weights = maml.Ensemble(50, options, (3.0, 1.0, 1.0, 5.0)), maml.objective_weights(options, 1)
    tasks = dataloader.sample_tasks(sequences, np.arange(n_users), options, 0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = dataloader.Tasks(*map(mode.from_tensor, tasks))
        loss, _ = maml.meta_loss(system, fake, weights, [None], 4)
        loss.backward()
    assert isinstance(loss, torch.Tensor) and loss.shape == ()
