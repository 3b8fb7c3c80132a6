"""Predictions of a comparison's test targets: made by trained runs and by the simple predictors, kept in files.

One Parquet file for each cell, with a row for each target and support size. The file also holds what is known of the
run (options, data, commit, hardware, time, validation curve, learned weights), so that tables need nothing else.
"""

import os
import platform
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dataloader
import options as option_module
import utils
from evaluation import baselines, evaluate, metrics
from models import checkpoint
from utils import UserError

SHOTS = (0, 1, 2, 3, 5, 10, 20, 29)  # support ratings of the cold-start curve, as far as max_seq_len allows
SIMPLE_OPTIONS = ("fold", "num_folds", "num_test_data", "random_seed", "max_seq_len", "mode", "test_prefix")
SIMPLE_OPTIONS += ("num_train_users",)
FORMS = {False: "", True: "-paper", "code": "-code"}  # in the names of files, by --paper_form
NUMBERS = ("target", "prediction", "support", "shots", "balance")  # columns of a file, beside those in KEY
KEY = ["method", "task", "shots", "user", "item"]
TASKS = {"last"}, {"last", "order"}, {"order", "validation"}  # of a file; those of a user's last rating, of the last
# ten, and of a validation user's last ten
ABOUT = {"options": dict, "mode": str, "num_folds": int, "fingerprint": str, "scale": list, "levels": list}
VERSION = 2  # of the methods: what another version trained is trained again
ABOUT |= {"commit": str, "hardware": str, "torch": str}  # what a file must say of its run


class Cell(NamedTuple):
    """One run; the learner "simple" stands for the simple predictors."""

    learner: str
    method: str
    paper: bool | str  # --paper_form: False, True or "code"
    fold: int
    seed: int
    init: int | None = None  # --model_init_seed, where it is not left at its default


def path_of(folder, cell):
    """The cell's file in a folder of predictions."""
    return Path(folder) / f"{cell.learner}-{cell.method}{FORMS[cell.paper]}-{place_of(cell)}.parquet"


def place_of(cell):
    """Fold and seeds of a cell, for the name of a file or folder."""
    return f"fold{cell.fold}-seed{cell.seed}" + ("" if cell.init is None else f"-init{cell.init}")


def stored_options(cell, options):
    """The options that the cell's predictions depend on, as they are kept."""
    simple = {name: getattr(options, name) for name in SIMPLE_OPTIONS}
    return option_module.as_stored(simple if cell.learner == "simple" else options)


# -----------------------------------------------------------------------------
# files


def read(path):
    """The predictions of a file, with what is known of the run in `attrs`; UserError where the file is damaged."""
    try:
        frame = pd.read_parquet(path)
        check(frame)
    except Exception as error:  # damaged files make the parsers raise errors of many kinds
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path} does not hold predictions ({reason:.100}): remove it, and give the same command without "
            "--report_only to make it again"
        ) from error
    return frame


def check(frame):
    """ValueError, KeyError or TypeError where a file's content is not what `write` makes."""
    if len(frame) == 0 or frame[[*KEY, *NUMBERS]].isna().any(axis=None) or frame.duplicated(KEY).any():
        raise ValueError("rows are missing or doubled")
    if not np.isfinite(frame[list(NUMBERS)].to_numpy(np.float64)).all() or set(frame.task) not in TASKS:
        raise ValueError("impossible values")
    if not frame.balance.between(0, 1).all():
        raise ValueError("impossible values")
    about = frame.attrs
    if wrong := checkpoint.wrong_entry(about, ABOUT):
        raise ValueError(wrong)
    if not all(text.isprintable() for text in (*frame.method.unique(), *(about[n] for n in ABOUT if ABOUT[n] is str))):
        raise ValueError("names that cannot be printed")
    low, high = np.array(about["scale"], np.float64)
    levels = np.array(about["levels"], np.float64)
    curve = np.array(about.get("curve") or [(0, 0)], np.float64)
    weights = np.array([about["weights"][name] for name in GROUPS] if "weights" in about else [levels] * 2, np.float64)
    fits = curve.ndim == 2 and curve.shape[1] == 2 and weights.shape == (2, len(levels))
    if not fits or not low < high or not (np.diff(levels) > 0).all() or not np.isfinite(curve).all():
        raise ValueError("impossible values")


def is_finished(path, cell, options, fingerprint):
    """Whether the file holds predictions made by this version with the same options from the same data."""
    try:
        about = read(path).attrs
        option_module.check_resume(about["options"], stored_options(cell, options), may_grow=())
    except UserError:
        return False
    return about["fingerprint"] == fingerprint and (cell.learner == "simple" or about.get("version") == VERSION)


def write(path, cell, options, problem, columns, about):
    """Keep a cell's predictions: `columns` as `rows` gives them, and `about`, what is known of the run."""
    ratings, user = problem.ratings, columns["user"].to_numpy()
    balance = np.zeros(len(ratings.user_ids))
    balance[problem.test] = balance_scores(problem, options)
    ids = {"user": ratings.user_ids[user], "item": ratings.item_ids[columns["item"].to_numpy()]}
    frame = columns.assign(**ids, balance=balance[user])
    frame.attrs = {
        "options": stored_options(cell, options),
        "version": VERSION,
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


def rows(scored, task, shots, method):
    """Predictions as rows of a file, with user and item numbers in place of ids."""
    names = "user", "item", "support", "target", "prediction"
    columns = {name: getattr(scored, name) for name in names}
    return pd.DataFrame({**columns, "task": task, "shots": shots, "method": method})


def balance_scores(problem, options):
    """The balance score of each test user's support."""
    support, _ = baselines.last_support(problem.ratings, problem.test, options.max_seq_len - 1)
    return metrics.balance_score(support.values, support.items >= 0, problem.ratings.levels)


def shots_of(options):
    """Support sizes at which all is scored: the full one first, then those of the cold-start curve."""
    full = options.max_seq_len - 1
    return [full, *(n for n in SHOTS if n < full)]


def commit():
    """The commit of this program, "-dirty" where its code differs from it; "unknown" outside a repository."""
    try:
        name = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}-dirty" if changed else name


def git(*words):
    """The output of git in the folder of this program."""
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


# -----------------------------------------------------------------------------
# trained runs

GROUPS = ("balanced", "imbalanced")  # the most and the least balanced third of the test users


def score_run(path, cell, options, folder):
    """Score the best checkpoint of a run's folder on its test users, at every support size."""
    system, _, problem, _ = evaluate.load_system(checkpoint.checkpoint_path(folder), options)
    users, shots = problem.test, shots_of(options)
    parts = [rows(evaluate.evaluate(system, problem, users, n), "last", n, cell.method) for n in shots]
    parts.append(rows(evaluate.evaluate_order(system, problem, users), "order", shots[0], cell.method))
    about = {"curve": validation_curve(folder)}
    if cell.method in ("melo", "metal"):
        about["weights"] = learned_weights(system, problem)
    write(path, cell, options, problem, pd.concat([part for part in parts if len(part)]), about)


def validation_curve(folder):
    """[seconds since training began, validation RMSE] of each validation, from the run's events.

    The seconds are wall time with earlier validations and checkpoints, without the time between two starts.
    """
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    if "validation/rmse" not in events.Tags()["scalars"]:
        return []
    rate = {event.step: event.value for event in events.Scalars("charts/iterations_per_second")}
    return [[e.step / rate[e.step] if rate[e.step] else 0.0, e.value] for e in events.Scalars("validation/rmse")]


def learned_weights(system, problem):
    """Mean weight in the loss of each rating level, {name: one for each level} for the users of GROUPS.

    It is averaged over steps and support positions, and None where these users gave no such rating.
    """
    ratings, users = problem.ratings, problem.test
    score = balance_scores(problem, system.options)
    groups = {"imbalanced": score <= np.quantile(score, 1 / 3), "balanced": score >= np.quantile(score, 2 / 3)}
    total, count = np.zeros((2, len(users), len(ratings.levels)))
    for user, level, weights, times in evaluate.support_weights(system, problem, users):
        at = user, level
        np.add.at(total, at, weights.mean(1) * times)
        np.add.at(count, at, times)
    sums = {name: zip(total[group].sum(0), count[group].sum(0), strict=True) for name, group in groups.items()}
    return {name: [float(weight / n) if n else None for weight, n in pairs] for name, pairs in sums.items()}


# -----------------------------------------------------------------------------
# simple predictors


def score_simple(path, cell, options):
    """Fit the simple predictors and score them on the same targets, at every support size."""
    problem, shots, parts = dataloader.load_problem(options), shots_of(options), []
    fitting = problem.ratings, problem.train, problem.validation, options.max_seq_len
    predictors, chosen = baselines.fit_baselines(*fitting)
    for name, predictor in predictors.items():
        parts += [rows(evaluate.evaluate_simple(predictor, problem, n), "last", n, name) for n in shots]
        parts.append(rows(evaluate.evaluate_simple(predictor, problem, shots[0], order=True), "order", shots[0], name))
    write(path, cell, options, problem, pd.concat([part for part in parts if len(part)]), {"constants": chosen})
