"""docs/EXTENDING.md: its examples are those of the code, and its steps give a learner and a loss that train."""

import re
import sys
from pathlib import Path

import pytest
import tiny
import torch

import main
import maml
import options
from models import checkpoint

ROOT = Path(__file__).parents[1]
DOC = (ROOT / "docs" / "EXTENDING.md").read_text()
ENCODER, LOSS = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
LEARNER_ENTRY = re.search(r'`"meanpool": (Entry\(.*?\))`', DOC)[1]
LOSS_ENTRY = re.search(r'`"rating": "(.*?)"`', DOC)[1]


def test_the_example_is_the_shipped_learner():
    assert (ROOT / "models" / "meanpool.py").read_text() == ENCODER
    assert eval(LEARNER_ENTRY, {"Entry": options.Entry}) == options.LEARNERS["meanpool"]
    assert len(DOC.splitlines()) <= 70 and len(ENCODER.splitlines()) <= 30


@pytest.fixture
def extended(tmp_path, monkeypatch):
    """The registries with the two examples, each in a new file, under new names."""
    monkeypatch.syspath_prepend(tmp_path)
    for text, name in ((ENCODER, "my_encoder"), (LOSS, "my_loss")):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    entry = LEARNER_ENTRY.replace("models.meanpool", "my_encoder")
    monkeypatch.setitem(options.LEARNERS, "mine", eval(entry, {"Entry": options.Entry}))
    monkeypatch.setitem(options.LOSS_NETWORKS, "rating", LOSS_ENTRY.replace("models.rating_loss", "my_loss"))


def test_the_steps_give_a_learner_that_trains_and_is_tested(extended, tmp_path, capsys):
    given = {"mode": "sample", "model": "mine", "loss_network": "rating", "num_train_iterations": 2, "val_size": 20}
    folders = {"data_path": ROOT / "Data/sample/ratings.csv", "log_dir": tmp_path / "log", "cache_dir": tmp_path}
    command = [f"--{name}={value}" for name, value in {**tiny.SIZES, **given, **folders, "device": "cpu"}.items()]
    assert main.main(command) == 0 and main.main([*command, "--test"]) == 0
    assert "RMSE" in capsys.readouterr().out
    folder = checkpoint.run_folder(tmp_path / "log", "sample", "mine", "melo")
    before, after = (
        maml.Ensemble(1, tiny.options(model="mine", loss_network="rating"), tiny.SCALE).state_dict(),
        checkpoint.load_newest(folder, checkpoint.STATE)["system"],
    )
    assert before.keys() == after.keys()
    assert after["members.0.loss_network.weight"] != 0


def test_the_loss_weighs_high_ratings(extended):
    member, tasks = tiny.system(tiny.options(loss_network="rating")), tiny.training_tasks(tiny.options())
    weights = member.explain(tasks)[1]
    expected = (member.loss_network.weight * tasks.ratings).exp() * (tasks.segment > 0)
    torch.testing.assert_close(weights, expected[:, None].expand_as(weights))
