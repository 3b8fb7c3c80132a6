"""The outer step depends on no data on the host, so that a GPU can capture it as a graph."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import _pytree as pytree

import dataloader
import main
import maml
import options as option_module
from models import narm
from training import optimizer
from training import run as runs

FORMS = {
    "default": [],
    "paper": ["--paper_form=True"],
    "query windows": ["--paper_form=True", "--query_windows=True"],
    "first order": ["--use_multi_step=False", "--use_adaptive_loss=False"],
    "metal": ["--loss_network=metal"],
    "members": ["--members=2", "--skip_nonfinite=True"],
    "fixed tables": ["--sparse_items=True"],
}


def fake_step(options):
    """Take an outer step on fake tensors, which have a shape and no values: what reads one raises."""
    tasks = dataloader.sample_tasks(tiny.sequences(), np.arange(6), options, 0)
    with FakeTensorMode() as mode:
        systems = [maml.Ensemble(tiny.N_ITEMS, options, tiny.SCALE) for _ in range(2)]
        with mock.patch.object(runs, "copy", SimpleNamespace(deepcopy=lambda system: systems[1])):  # fakes cannot copy
            run = runs.new_run(systems[0], [None] * options.members, None, options, None)
        rates = torch.ones(len(optimizer.all_groups(run.optimizers)))
        main.meta_step(run, [pytree.tree_map(mode.from_tensor, tasks)], torch.ones(options.num_inner_steps + 1), rates)
    return len(run.optimizers[0].state)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", option_module.LEARNERS)
def test_the_outer_step_reads_no_value_of_a_tensor(model, form, monkeypatch):
    as_on_a_gpu = lambda self, target, past, mask: self.weights(target, past) * mask  # noqa: E731
    monkeypatch.setattr(narm.NARM, "history_weights", as_on_a_gpu)
    assert fake_step(option_module.parse("", [f"--model={model}", "--batch_size=4", *FORMS[form]])) > 10


def test_a_value_that_is_read_is_found(monkeypatch):
    monkeypatch.setattr(maml, "query_losses", lambda *given, **more: given[0].sum().item())
    with pytest.raises(DataDependentOutputException):
        fake_step(tiny.options())
