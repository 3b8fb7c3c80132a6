"""Evaluate a run's checkpoint on its test users: the printed table and test.json."""

import sys

import numpy as np

import baselines
import events
import metrics
import options as option_module
import runs
import training
from utils import UserError, choose_device

# What --test takes from the command line, but where that leaves it None or 0; everything else is the checkpoint's own.
FROM_COMMAND = ("data_path", "cache_dir", "data_url", "device", "log_dir", "task_chunk")


def load_system(path, options, problem=None):
    """The trained system of a checkpoint, its own options, its problem and its step: (system, options, problem, step).

    UserError where the checkpoint is damaged, of another model, or belongs to other data than those at hand.
    """
    state = runs.load_checkpoint(path, training.STATE)
    given = {name: value for name in FROM_COMMAND if (value := getattr(options, name)) not in (None, 0)}
    stored = option_module.restore(state["options"], given, path)
    problem = problem or training.load_problem(stored)
    runs.check_fingerprint(state["fingerprint"], problem.ratings.fingerprint, path)
    system = training.build_system(problem, stored, fresh=False)
    training.load_parameters(system, state["system"], path)
    return system.to(choose_device(options.device, stored.deterministic)), stored, problem, state["step"]


def load_pretrained(system, problem, options):
    """Start a system's learner from the best checkpoint of pretrain.py: all weights, or the item tables alone.

    UserError where that was trained on other data, other users or with other sizes.
    """
    folder = runs.run_folder(options.pretrain_log_dir, options.mode, options.model, "basic")
    path = runs.checkpoint_path(folder)
    basic, stored, _, _ = load_system(path, options, problem)
    for name in ("random_seed", "fold", "num_folds", "num_test_data"):
        if getattr(stored, name) != getattr(options, name):
            raise UserError(f"{path} was trained with another --{name}, so it has seen test users: pretrain anew")
    try:
        for member, pretrained in zip(system.members, basic.members, strict=True):
            weights = pretrained.learner.state_dict() if options.load_pretrained else pretrained.learner.tables()
            member.learner.load_state_dict(weights, strict=options.load_pretrained)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} has other sizes than this learner: pretrain with the same model options") from error


def test(folder, options):
    """Test the checkpoint `checkpoint_step` (-1: the best), print its figures and write test.json. Returns 0."""
    path = runs.checkpoint_path(folder, options.checkpoint_step)
    system, stored, problem, step = load_system(path, options)
    with training.naming_what_to_lower(stored):
        scored = training.evaluate(system, problem, problem.test)
    users = f"fold {stored.fold} of {stored.num_folds}" if stored.fold >= 0 else "drawn"
    print(f"{folder.name}, {path.name}: {len(scored.user)} test users ({users} by seed {stored.random_seed})")
    report = {"checkpoint": path.name, "step": step, "options": finite(vars(stored))}
    report |= figures(scored, scored.prediction, problem.ratings)
    print_figures(report)
    if options.test_baseline:
        report["simple_predictors"] = simple_predictors(problem, stored, scored)
        print_table(report["simple_predictors"])
    runs.write_json(folder / "test.json", report)
    events.log_test(folder, report, step)
    print(f"written to {folder / 'test.json'}", file=sys.stderr)
    return 0


def figures(scored, prediction, ratings):
    """RMSE, MAE and macro-RMSE with standard errors, and the RMSE of each rating level."""
    errors = metrics.prediction_errors(scored.target, prediction, ratings.low, ratings.high)
    level = metrics.nearest_level(scored.target, ratings.levels)
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
