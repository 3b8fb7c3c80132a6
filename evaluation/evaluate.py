"""Evaluate a run's checkpoint on its test users: the printed table and test.json."""

import sys
from typing import NamedTuple

import numpy as np
import torch

import dataloader
import maml
import options as option_module
import utils
from evaluation import baselines, metrics
from models import checkpoint
from ratings import table
from utils import choose_device

# What --test takes from the command line, but where that leaves it None or 0; everything else is the checkpoint's own.
FROM_COMMAND = ("data_path", "cache_dir", "data_url", "device", "log_dir", "task_chunk")


def load_system(path, options, problem=None):
    """The trained system of a checkpoint, its own options, its problem and its step: (system, options, problem, step).

    UserError where the checkpoint is damaged, of another model, or belongs to other data than those at hand.
    """
    state = checkpoint.load_checkpoint(path, checkpoint.STATE)
    given = {name: value for name in FROM_COMMAND if (value := getattr(options, name)) not in (None, 0)}
    stored = option_module.restore(state["options"], given, path)
    problem = problem or dataloader.load_problem(stored)
    checkpoint.check_fingerprint(state["fingerprint"], problem.ratings.fingerprint, path)
    system = maml.build_system(problem, stored, fresh=False)
    maml.load_parameters(system, state["system"], path)
    return system.to(choose_device(options.device, stored.deterministic)), stored, problem, state["step"]


def test(folder, options):
    """Test the checkpoint `checkpoint_step` (-1: the best), print its figures and write test.json; the figures."""
    path = checkpoint.checkpoint_path(folder, options.checkpoint_step)
    system, stored, problem, step = load_system(path, options)
    with utils.naming_what_to_lower(stored):
        scored = evaluate(system, problem, problem.test)
    users = f"fold {stored.fold} of {stored.num_folds}" if stored.fold >= 0 else "drawn"
    print(f"{folder.name}, {path.name}: {len(scored.user)} test users ({users} by seed {stored.random_seed})")
    report = {"checkpoint": path.name, "step": step, "options": finite(vars(stored))}
    report |= figures(scored, scored.prediction, problem.ratings)
    print_figures(report)
    if options.test_baseline:
        report["simple_predictors"] = simple_predictors(problem, stored, scored)
        print_table(report["simple_predictors"])
    utils.write_json(folder / "test.json", report)
    print(f"written to {folder / 'test.json'}", file=sys.stderr)
    return report


def figures(scored, prediction, ratings):
    """RMSE, MAE and macro-RMSE with standard errors, and the RMSE of each rating level."""
    errors = metrics.prediction_errors(scored.target, prediction, ratings.low, ratings.high)
    level = table.nearest_level(scored.target, ratings.levels)
    by_level = metrics.rmse_by_group(errors**2, level, len(ratings.levels))
    summary = metrics.summary(errors**2, abs(errors), level)
    return {
        **{name: none_if_nan(value) for name, value in summary.items()},
        "by_rating": [
            {"rating": float(value), "n": int(n), "rmse": none_if_nan(rmse), "rmse_se": none_if_nan(error)}
            for value, (rmse, error, n) in zip(ratings.levels, zip(*by_level, strict=True), strict=True)
        ],
    }


def finite(options):
    """The options with infinite ones as text: JSON knows no infinity."""
    return {name: str(value) if value == float("inf") else value for name, value in options.items()}


def none_if_nan(value):
    """JSON knows no nan."""
    return value if np.isfinite(value) else None


def print_figures(report):
    """Print what `figures` gave."""
    for name, label in (("rmse", "RMSE"), ("mae", "MAE"), ("macro_rmse", "macro-RMSE")):
        print(f"{label:<12}{metrics.text(report[name])}  (standard error {metrics.text(report[f'{name}_se'])})")
    for row in report["by_rating"]:
        print(f"  rating {row['rating']:<5g} RMSE {metrics.text(row['rmse'])}  ({row['n']} targets)")


def simple_predictors(problem, options, scored):
    """`figures` of each simple predictor on the same targets, by name."""
    users = problem.train, problem.validation, scored.user
    predictions, _ = baselines.score_baselines(problem.ratings, *users, options.max_seq_len)
    return {name: figures(scored, prediction[0], problem.ratings) for name, prediction in predictions.items()}


def print_table(reports):
    """Print one line of figures for each method."""
    width = max(map(len, reports))
    print(f"{'':<{width}}  RMSE (standard error)   MAE     macro-RMSE")
    for name, report in reports.items():
        rmse, error, mae, macro = (metrics.text(report[key]) for key in ("rmse", "rmse_se", "mae", "macro_rmse"))
        print(f"{name:<{width}}  {f'{rmse} ({error})':<24}{mae}  {macro}")


class Scored(NamedTuple):
    """Predictions of users' targets, all of shape (n,)."""

    user: np.ndarray  # user numbers
    item: np.ndarray  # item numbers of the targets
    support: np.ndarray  # number of support ratings
    target: np.ndarray  # the ratings
    prediction: np.ndarray  # on the data's scale, clipped to it
    unadapted: np.ndarray  # the same before the first inner step


@torch.no_grad()
def predict(system, tasks):
    """Predicted ratings (T, K + 1) of each task's single query after 0..K inner steps, float64 on the data's scale."""
    found = np.empty((len(tasks.table), system.options.num_inner_steps + 1))
    for numbers, part in dataloader.by_size(tasks, system.options.task_chunk, system.scale.is_cuda, dataloader.AT_ONCE):
        found[numbers] = system.to_rating(system(part.to(system.scale.device))[..., 0]).cpu().numpy()
    return found


def evaluate(system, problem, users, shots=None, num_targets=1):
    """`Scored` for the last rating of each user, or the last `num_targets`, each with the ratings before it as support.

    `shots` limits the support to the most recent ratings.
    """
    sequences, parts = problem.sequences, []
    for back in range(num_targets):
        users = users[sequences.offsets[users + 1] - sequences.offsets[users] > back + 1]
        if back and not len(users):
            break
        tasks = dataloader.last_tasks(sequences, users, system.options, shots, back)
        at = sequences.offsets[users + 1] - 1 - back
        predictions = predict(system, tasks)
        target = problem.ratings.values[at].astype(np.float64)
        support = tasks.query_last.numpy() + 1
        parts.append((users, problem.ratings.items[at], support, target, predictions[:, -1], predictions[:, 0]))
    return Scored(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def support_weights(system, problem, users):
    """Of users' support ratings, some users at a time: (place of the user in `users`, number of the rating's level,
    weight at each inner step (n, K), how often the rating counts)."""
    options, device = system.options, system.scale.device
    at_once = options.task_chunk or max(1, dataloader.AT_ONCE // (options.num_samples * (options.max_seq_len - 1)))
    for first in range(0, len(users), at_once):
        tasks = dataloader.last_tasks(problem.sequences, users[first : first + at_once], options).to(device)
        weights = system.explain(tasks)[1].movedim(1, -1)[tasks.support].cpu().numpy()
        values = system.to_rating(tasks.ratings[tasks.support]).cpu().numpy()
        user = first + tasks.support.nonzero()[:, 0].cpu().numpy()
        times = tasks.times[tasks.support].cpu().numpy()
        yield user, table.nearest_level(values, problem.ratings.levels), weights, times
