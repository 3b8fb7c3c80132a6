"""main.py and pretrain.py by their real command lines, at tiny sizes, on the bundled sample."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import main
import pretrain
from utils import run_script

SCRIPTS = {"main.py": main.main, "pretrain.py": pretrain.main}
ROOT = Path(__file__).parents[1]
SMALL = (
    "--num_train_iterations=2", "--batch_size=4", "--pretraining_batch_size=4", "--log_interval=1", "--val_size=20",
    "--bert_hidden_units=8", "--narm_hidden_size=8", "--gru4rec_hidden_size=8", "--num_factors=2", "--num_test_data=30",
)  # fmt: skip
SAMPLE = ("--mode=sample", f"--data_path={ROOT / 'Data/sample/ratings.csv'}", "--cache_dir=cache")
FOMAML = ("--use_multi_step=False", "--use_adaptive_loss=False")


def run(folder, script, *flags, status=0):
    """What a script prints to standard output and error, run in `folder` by the function that its command line runs.

    In this process, because starting Python and torch takes longer than all that is tested here.
    """
    out, error = io.StringIO(), io.StringIO()
    redirect = contextlib.redirect_stdout(out), contextlib.redirect_stderr(error)
    with contextlib.chdir(folder), redirect[0], redirect[1], pytest.raises(SystemExit) as stopped:
        run_script(lambda: SCRIPTS[script](list(flags)))
    assert (stopped.value.code or 0) == status, error.getvalue()
    return out.getvalue(), error.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a pretrained and a meta-trained run."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "other.csv").write_bytes((ROOT / "Data/sample/ratings.csv").read_bytes()[:400_000].rpartition(b"\n")[0])
    run(folder, "pretrain.py", *SAMPLE, *SMALL)
    run(folder, "main.py", *SAMPLE, *SMALL, "--load_pretrained_embedding=True")
    return folder


def test_testing_twice_gives_the_same_digits(trained):
    first, _ = run(trained, "main.py", *SAMPLE, *SMALL, "--test")
    report = trained / "log/sample-bert4rec-melo/test.json"
    figures = report.read_bytes()
    second, _ = run(trained, "main.py", *SAMPLE, *SMALL, "--test", "--checkpoint_step=-1")
    assert first == second
    assert report.read_bytes() == figures
    assert json.loads(figures)["n"] == 30
    assert "macro-RMSE" in first


def test_pretrained_run_is_tested_on_the_same_users(trained):
    run(trained, "main.py", *SAMPLE, *SMALL, "--test")
    run(trained, "pretrain.py", *SAMPLE, *SMALL, "--checkpoint_step=2", "--test")
    counts = [
        [row["n"] for row in json.loads((trained / folder / "test.json").read_text())["by_rating"]]
        for folder in ("log/sample-bert4rec-melo", "log_pretrained/sample-bert4rec-basic")
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "flags",
    [
        ("--model=narm", "--use_adaptive_loss=False"),
        ("--model=gru4rec", *FOMAML),
        ("--model=sasrec", "--loss_network=lstm", "--use_rating_input=True"),
        ("--model=bert4rec", "--loss_network=metal", "--use_rating_input=True"),
        ("--paper_form=True", "--num_samples=4", "--lstm_hidden=4", "--lstm_input_size=3"),
        ("--min_sub_window_size=2", "--max_seq_len=30", "--num_samples=25", "--num_query_set=1"),
    ],
    ids=lambda flags: flags[0].lstrip("-"),
)
def test_every_method_trains_and_tests(tmp_path, flags):
    run(tmp_path, "main.py", *SAMPLE, *SMALL, *flags)
    out, _ = run(tmp_path, "main.py", *SAMPLE, *SMALL, *flags, "--test")
    assert "RMSE" in out


def test_a_run_is_not_overwritten_unasked(trained):
    _, error = run(trained, "main.py", *SAMPLE, *SMALL, status=2)
    assert "--resume" in error


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--data_path=nowhere.dat",), "nowhere.dat"),
        (("--mode=netflix",), "netflix"),
        (("--model=transformer",), "transformer"),
        (("--use_multi_step=yes",), "True or False"),
        (("--batch_size=0",), "at least 1"),
        (("--bert_hidden_units=30",), "multiple"),
        (("--fold=7",), "--num_folds"),
        (("--num_test_data=100000",), "--num_test_data"),
        (("--checkpoint_step=77", "--test"), "77"),
        (("--model=narm", "--test"), "no checkpoint"),
        (("--data_path=other.csv", "--test"), "other data"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, tuple) else "",
)
def test_bad_input_gets_one_sentence(trained, flags, says):
    out, error = run(trained, "main.py", *SAMPLE, *SMALL, *flags, status=2)
    assert out == ""
    assert error.startswith("error: ") and error.count("\n") == 1
    assert says in error


def test_pretrained_weights_of_other_sizes_are_refused(trained):
    _, error = run(trained, "main.py", *SAMPLE, *SMALL, "--bert_hidden_units=16", "--load_pretrained=True",
                   "--log_dir=other", status=2)  # fmt: skip
    assert "sizes" in error


def test_a_truncated_checkpoint_is_refused(trained):
    path = trained / "log/sample-bert4rec-melo/checkpoints/step-00000002.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    _, error = run(trained, "main.py", *SAMPLE, *SMALL, "--checkpoint_step=2", "--test", status=2)
    path.write_bytes(whole)
    assert "truncated" in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_grouped(script):
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
    assert "inner loop:" in done.stdout and "--paper_form" in done.stdout
