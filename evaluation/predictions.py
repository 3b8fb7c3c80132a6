"""Predictions of a comparison's test targets: made by trained runs and by the simple predictors, kept in files.

One Parquet file for each cell: a row per target and support size. The file also holds what is known of the run
(options, data, commit, hardware, time, validation curve, learned weights), so that tables need nothing else.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dataloader
import options as option_module
import utils
from evaluation import baselines, evaluate, metrics
from models import checkpoint
from utils import UserError

SHOTS = (1, 2, 3, 5, 10, 20, 29)  # support ratings of the cold-start curve, as far as max_seq_len allows
SIMPLE_OPTIONS = ("fold", "num_folds", "num_test_data", "random_seed", "max_seq_len", "mode")
LENSKIT = {"bias": "LensKit bias", "als": "LensKit ALS"}


class Cell(NamedTuple):
    """One run; the learner "simple" stands for the simple predictors."""

    learner: str
    method: str
    paper: bool
    fold: int
    seed: int


def path_of(folder, cell):
    """The cell's file in a folder of predictions."""
    form = "-paper" if cell.paper else ""
    return Path(folder) / f"{cell.learner}-{cell.method}{form}-fold{cell.fold}-seed{cell.seed}.parquet"


def stored_options(cell, options):
    """The options that the cell's predictions depend on, as they are kept."""
    return option_module.as_stored(
        {n: getattr(options, n) for n in SIMPLE_OPTIONS} if cell.learner == "simple" else options
    )


def read_about(path):
    """What is known of the run that made a file of predictions, or None where there is no such file."""
    try:
        return json.loads(pyarrow.parquet.read_schema(path).metadata[b"PANDAS_ATTRS"])
    except (OSError, pyarrow.ArrowInvalid, KeyError, TypeError, ValueError):
        return None


def is_finished(path, cell, options, fingerprint):
    """Whether the file holds predictions made with the same options from the same data."""
    about = read_about(path)
    if about is None or about["fingerprint"] != fingerprint:
        return False
    try:
        option_module.check_resume(about["options"], stored_options(cell, options), may_grow=())
    except UserError:
        return False
    return True


def write(path, cell, options, problem, columns, about):
    """Keep a cell's predictions: `columns` (user, item numbers, target, prediction, support, shots, method)."""
    ratings, user = problem.ratings, columns["user"].to_numpy()
    balance = np.zeros(len(ratings.user_ids))
    balance[problem.test] = balance_scores(problem, options)
    ids = {"user": ratings.user_ids[user], "item": ratings.item_ids[columns["item"].to_numpy()]}
    place = {"learner": cell.learner, "paper": cell.paper, "fold": cell.fold, "seed": cell.seed}
    frame = columns.assign(**ids, balance=balance[user], **place)
    frame.attrs = {
        "options": stored_options(cell, options),
        "mode": options.mode,
        "num_folds": options.num_folds,
        "fingerprint": ratings.fingerprint,
        "scale": [float(ratings.low), float(ratings.high)],
        "levels": [float(level) for level in ratings.levels],
        "commit": commit(),
        "hardware": hardware(),
        "torch": torch.__version__,
        **about,
    }
    sink = pyarrow.BufferOutputStream()
    frame.to_parquet(sink, index=False)
    utils.write_atomic(path, sink.getvalue().to_pybytes())


def balance_scores(problem, options):
    """The balance score of each test user's support."""
    support, _ = baselines.last_support(problem.ratings, problem.test, options.max_seq_len - 1)
    return metrics.balance_score(support.values, support.items >= 0, problem.ratings.levels)


def commit():
    """The commit of this program, "-dirty" where its code differs from it; "unknown" outside a repository."""
    try:
        name = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}-dirty" if changed else name


def git(*words):
    """What git answers in the folder of this program."""
    done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def hardware():
    """The processor's name and number of cores, and the GPU's name where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores{gpu}"


def shots_of(options):
    """Support sizes at which all is scored: the full one first, then those of the cold-start curve."""
    full = options.max_seq_len - 1
    return [full, *(n for n in SHOTS if n < full)]


# -----------------------------------------------------------------------------
# trained runs


def score_run(path, cell, options, folder):
    """Score the best checkpoint of a run's folder on its test users, at every support size."""
    system, _, problem, _ = evaluate.load_system(checkpoint.checkpoint_path(folder), options)
    parts = []
    for shots in shots_of(options):
        scored = evaluate.evaluate(system, problem, problem.test, shots)
        columns = {name: getattr(scored, name) for name in ("user", "item", "target", "prediction", "support")}
        parts.append(pd.DataFrame({**columns, "shots": shots, "method": cell.method}))
    about = {"curve": validation_curve(folder)}
    if cell.method == "melo":
        about["weights"] = learned_weights(system, problem)
    write(path, cell, options, problem, pd.concat(parts), about)


def validation_curve(folder):
    """[seconds since training began, validation RMSE] of each validation, from the run's events.

    The seconds are wall time: earlier validations and checkpoints are in them, what passed between two starts is not.
    """
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    if "validation/rmse" not in events.Tags()["scalars"]:
        return []
    rate = {event.step: event.value for event in events.Scalars("charts/iterations_per_second")}
    return [[e.step / rate[e.step] if rate[e.step] else 0.0, e.value] for e in events.Scalars("validation/rmse")]


def learned_weights(system, problem):
    """Mean weight in the loss of each rating level, for the least and the most balanced third of the test users.

    Averaged over steps and support positions: {"imbalanced": one for each level, "balanced": likewise}, None where
    such users gave no such rating.
    """
    ratings, users = problem.ratings, problem.test
    score = balance_scores(problem, system.options)
    groups = {"imbalanced": score <= np.quantile(score, 1 / 3), "balanced": score >= np.quantile(score, 2 / 3)}
    total, count = np.zeros((2, len(users), len(ratings.levels)))
    for user, level, weights, times in evaluate.support_weights(system, problem, users):
        at = user, level
        np.add.at(total, at, weights.mean(1) * times)
        np.add.at(count, at, times)
    return {name: mean_or_none(total[group].sum(0), count[group].sum(0)) for name, group in groups.items()}


def mean_or_none(total, count):
    return [float(t / n) if n else None for t, n in zip(total, count, strict=True)]


# -----------------------------------------------------------------------------
# simple predictors


def score_simple(path, cell, options):
    """Fit the simple predictors and score them on the same targets; LensKit's, too, where it is installed."""
    problem = dataloader.load_problem(options)
    ratings, users, shots = problem.ratings, problem.test, shots_of(options)
    fitting = ratings, problem.train, problem.validation, users, options.max_seq_len
    found, chosen = baselines.score_baselines(*fitting, shots=shots[1:])
    supports = [baselines.last_support(ratings, users, n) for n in shots]
    found |= lenskit(ratings, problem.train, supports[0][0], chosen)
    parts = []
    for name, rows in found.items():
        for n, (support, target), prediction in zip(shots, supports, rows, strict=False):
            columns = {"user": users, "item": support.target_item, "target": target}
            columns["prediction"] = np.clip(prediction, ratings.low, ratings.high)
            columns["support"] = (support.items >= 0).sum(1)
            parts.append(pd.DataFrame({**columns, "shots": n, "method": name}))
    write(path, cell, options, problem, pd.concat(parts), {"constants": chosen})


def lenskit(ratings, train, support, chosen):
    """LensKit's predictions at full support, with the damping and width chosen for ours: {name: (1, T)}."""
    effects, width = chosen["user + item effects"], chosen["matrix factorisation"]["k"]
    damping = effects["item_damping"], effects["user_damping"]
    try:
        found = baselines.lenskit_predictions(ratings, train, support, damping, width, regularisation=0.1)
    except UserError as error:
        print(f"left out: {error}", file=sys.stderr)
        return {}
    return {LENSKIT[name]: prediction[None] for name, prediction in found.items()}
