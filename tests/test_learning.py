"""Training learns: the error of validation falls by a stated amount and ends at a recorded value."""

import re

import numpy as np
import pytest

import main
import options
from evaluation import evaluate
from models import checkpoint

ITERATIONS = 50
FORMS = [  # options, by how much the RMSE falls at least, and where it ends with one thread
    ((), -0.002, 0.7266),  # which starts at the fold-in of the model that made the ratings
    (
        ("--head=plain", "--adapt=all", "--loss_network=lstm", "--outer_lr=0.01", "--item_lr=0.03", "--inner_lr=0.01"),
        0.05,
        0.9529,
    ),
]


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    """A file of 400 users with biases and tastes, 16 ratings each of 40 items."""
    rng, n_users, n_items = np.random.default_rng(0), 400, 40
    taste, genre = rng.normal(size=(n_users, 3)), rng.normal(size=(n_items, 3))
    score = 3.6 + 0.6 * rng.normal(size=(n_users, 1)) + 0.5 * rng.normal(size=n_items) + 0.5 * taste @ genre.T
    items = np.argsort(rng.random(score.shape), axis=1)[:, :16]
    noisy = np.take_along_axis(score, items, 1) + 0.4 * rng.normal(size=items.shape)
    values = np.clip(np.round(noisy), 1, 5).astype(int)
    lines = [f"u{user},i{items[user, k]},{values[user, k]},{k}" for user in range(n_users) for k in range(16)]
    path = tmp_path_factory.mktemp("learning") / "ratings.csv"
    path.write_text("\n".join(["user,item,rating,time", *lines]))
    return path


def train(ratings, folder, capsys, *flags):
    """The validation RMSE before training and after it, and that of the test users before and after adapting."""
    words = [
        "--mode=csv", f"--data_path={ratings}", f"--log_dir={folder}", f"--num_train_iterations={ITERATIONS}",
        f"--log_interval={ITERATIONS}", "--batch_size=16", "--num_test_data=100", "--min_item=0", "--max_seq_len=12",
        "--bert_hidden_units=16", "--num_factors=4", "--num_inner_steps=2", "--device=cpu",
        *flags,
    ]  # fmt: skip
    assert main.main(words) == 0
    shown = [float(value) for value in re.findall(r"validation RMSE ([\d.]+)", capsys.readouterr().out)]
    path = checkpoint.best_path(checkpoint.run_folder(folder, "csv", "bert4rec", "melo"))
    system, _, problem, _ = evaluate.load_system(path, options.parse("", words))
    scored = evaluate.evaluate(system, problem, problem.test, num_targets=3)
    return *shown[:2], rmse(scored.unadapted, scored.target), rmse(scored.prediction, scored.target)


def rmse(prediction, target):
    return float(np.sqrt(np.mean((prediction - target) ** 2)))


@pytest.mark.parametrize(("flags", "fall", "recorded"), FORMS, ids=["joint head", "plain head"])
def test_training_lowers_the_error_to_a_recorded_value(ratings, tmp_path, capsys, flags, fall, recorded):
    before, after, unadapted, adapted = train(ratings, tmp_path, capsys, *flags)
    assert after < before - fall
    assert after == pytest.approx(recorded, abs=1e-4)
    assert adapted < unadapted
