"""docs/NOTEBOOK.md: its code runs as it stands, from any folder, with any command line. Only sizes are tiny."""

import re
import sys
from pathlib import Path

import pytest

import main  # noqa: F401 - before pytest puts the parent of the project's folder on the path
import options

PAGE = (Path(__file__).parents[1] / "docs" / "NOTEBOOK.md").read_text()
TINY = {
    "num_train_iterations": 2, "batch_size": 4, "log_interval": 1, "val_size": 20, "num_test_data": 30,
    "bert_hidden_units": 8, "num_factors": 2,
}  # fmt: skip


@pytest.mark.skipif(not hasattr(options, "make"), reason="options.make is not there yet")
def test_the_code_of_the_notebook_page_runs(tmp_path, monkeypatch):
    make, names = options.make, {}
    monkeypatch.setattr(options, "make", lambda **given: make(**{**given, **TINY}))
    monkeypatch.setattr(sys, "argv", ["notebook", "--no_option_of_ours"])
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 2 and len(blocks[0].splitlines()) <= 17
    for block in blocks:
        exec(block, names)
    assert (tmp_path / "log/notebook/checkpoints/best.pt").exists()
    assert len(names["user"].top(5)) == 5 and len(names["user"].predict([3, 4])) == 2
    assert names["report"]["n"] == TINY["num_test_data"]
