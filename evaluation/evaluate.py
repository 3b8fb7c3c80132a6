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
from utils import UserError, choose_device

# What --test takes from the command line, never from a checkpoint, which may be somebody else's.
FROM_COMMAND = (*option_module.PLACES, "device")
RANKED_AT_ONCE = 16  # users whose whole catalogue is scored at a time


def load_system(path, options, problem=None):
    """Load a checkpoint's trained system: (system, its options, its problem, its step).

    UserError where the checkpoint is damaged, is of another model, or belongs to other data.
    """
    state = checkpoint.load_checkpoint(path, checkpoint.WEIGHTS)
    given = {name: getattr(options, name) for name in FROM_COMMAND}
    if options.task_chunk:
        given["task_chunk"] = options.task_chunk
    stored = option_module.restore(state["options"], given, path)
    if stored.mode != options.mode:  # it decides which data set is downloaded
        raise UserError(f"{path} was trained with --mode={stored.mode}, not {options.mode}: give that --mode")
    problem = problem or dataloader.load_problem(stored)
    checkpoint.check_fingerprint(state["fingerprint"], problem.ratings.fingerprint, path)
    system = maml.restore_system(len(problem.ratings.item_ids), stored, state["system"], path)
    return system.to(choose_device(options.device, stored.deterministic)), stored, problem, state["step"]


def test(folder, options):
    """Test the checkpoint `checkpoint_step` (-1: the best), print its figures and write test.json; the figures."""
    path = checkpoint.checkpoint_path(folder, options.checkpoint_step)
    system, stored, problem, step = load_system(path, options)
    with utils.naming_what_to_lower(stored):
        last, ordered = evaluate(system, problem, problem.test), evaluate_order(system, problem, problem.test)
    users = f"fold {stored.fold} of {stored.num_folds}" if stored.fold >= 0 else "drawn"
    users = f"{stored.test_prefix}..." if stored.test_prefix else f"{users} by seed {stored.random_seed}"
    print(f"{folder.name}, {path.name}: {len(last.user)} test users ({users})")
    options_report = {n: str(v) if v == float("inf") else v for n, v in vars(stored).items()}  # JSON knows no infinity
    report = {"checkpoint": path.name, "step": step, "options": options_report}
    report |= figures(last.target, last.prediction, problem.ratings)
    report["order"] = order_figures(ordered.user, ordered.target, ordered.prediction, problem.ratings)
    report["simple_predictors"] = simple_predictors(problem, stored)
    if options.ranking:
        with utils.naming_what_to_lower(stored):
            ranks = rank_targets(system, problem, problem.test)
        report["ranking"] = {name: metrics.ranking_summary(rank) for name, rank in ranks.items()}
    print_figures(folder.name, report)
    if options.ranking:
        print_ranking(report["ranking"])
    utils.write_json(folder / "test.json", report)
    print(f"written to {folder / 'test.json'}", file=sys.stderr)
    return report


def figures(target, prediction, ratings):
    """RMSE, MAE and macro-RMSE with standard errors, and the RMSE of each rating level, as JSON takes them."""
    errors = metrics.prediction_errors(target, prediction, ratings.low, ratings.high)
    level = table.nearest_level(target, ratings.levels)
    by_level = metrics.rmse_by_group(errors**2, level, len(ratings.levels))
    names = "rating", "rmse", "rmse_se", "n"
    rows = zip(ratings.levels.tolist(), *(column.tolist() for column in by_level), strict=True)
    return {
        **none_for_nan(metrics.summary(errors**2, abs(errors), level)),
        "by_rating": [none_for_nan(dict(zip(names, row, strict=True))) for row in rows],
    }


def order_figures(user, target, prediction, ratings):
    """How well the predictions order each user's last ratings, with standard errors; {"users": 0} without users."""
    if len(user) == 0:
        return {"users": 0}
    return none_for_nan(metrics.order_summary(metrics.order_by_user(user, target, prediction, ratings.low)[1]))


def none_for_nan(report):
    """The figures with None for nan, which JSON does not know."""
    return {name: value if np.isfinite(value) else None for name, value in report.items()}


def simple_predictors(problem, options):
    """`figures` and `order_figures` of each simple predictor on the test users' targets, by name."""
    ratings, longest, reports = problem.ratings, options.max_seq_len - 1, {}
    predictors, _ = baselines.fit_baselines(ratings, problem.train, problem.validation, options.max_seq_len)
    for name, predictor in predictors.items():
        last, ordered = (evaluate_simple(predictor, problem, longest, order) for order in (False, True))
        reports[name] = figures(last.target, last.prediction, ratings)
        reports[name]["order"] = order_figures(ordered.user, ordered.target, ordered.prediction, ratings)
    return reports


def print_figures(name, report):
    """Print a run's figures, those of the simple predictors below them, and the run's RMSE by rating."""
    rows = {name: report, **report["simple_predictors"]}
    table_rows = [["", "RMSE", "(standard error)", "MAE", "macro-RMSE", "nDCG@10", "pairs in order"]]
    for label, row in rows.items():
        values = [row[key] for key in ("rmse", "rmse_se", "mae", "macro_rmse")]
        values += [row["order"].get(key) for key in ("ndcg@10", "pairs")]
        table_rows.append([label, *map(metrics.text, values)])
    print(f"\n{metrics.aligned(table_rows)}")
    print("\nErrors are those of each user's last rating; the lowest is best. The order is that of their last ten;")
    print(f"the highest is best. RMSE of {name} by the rating that was given:")
    for row in report["by_rating"]:
        print(f"  rating {row['rating']:<5g} RMSE {metrics.text(row['rmse'])}  ({row['n']} targets)")


def print_ranking(rows):
    """Print how high the last ratings' items rank, {name: `metrics.ranking_summary`}."""
    names = {"hr@10": "HR@10", "ndcg@10": "nDCG@10", "mrr": "MRR"}
    values = [[name, *(f"{row[key]:.4f} ({row[f'{key}_se']:.4f})" for key in names)] for name, row in rows.items()]
    print(f"\n{metrics.aligned([['', *names.values()], *values])}")
    print("\nHow high the item of each user's last rating ranks among all items that the user has not rated. Predicted")
    print("ratings say how much a user will like an item, not whether the user will come to it next: popularity does.")


class Scored(NamedTuple):
    """Predictions of users' targets, all of shape (n,)."""

    user: np.ndarray  # user numbers
    item: np.ndarray  # item numbers of the targets
    support: np.ndarray  # number of support ratings
    target: np.ndarray  # the ratings
    prediction: np.ndarray  # on the data's scale; clipped to it by `evaluate`, not by `evaluate_order`
    unadapted: np.ndarray  # the same before the first inner step


@torch.no_grad()
def predict(system, tasks):
    """Standardised predictions (T, K + 1, Q) of each task's queries after 0..K inner steps; nan where there is none."""
    device, shape = system.scale.device, (len(tasks.table), system.options.num_inner_steps + 1, tasks.query.shape[1])
    found = np.full(shape, np.nan)
    parts = dataloader.parts(tasks, device, chunk=system.options.task_chunk)
    predicted = [(numbers, system(part.to(device))) for numbers, part in parts]  # a GPU is waited for once, below
    for numbers, values in predicted:
        found[numbers] = values.cpu().numpy()
    return found


def evaluate(system, problem, users, shots=None, num_targets=1):
    """`Scored` for the last rating of each user, or the last `num_targets`, each with the ratings before it as support.

    `shots` limits the support to that many of the most recent ratings; with 0 nothing is known of the user.
    """
    sequences, ratings, parts = problem.sequences, problem.ratings, []
    for back in range(num_targets):
        users = users[sequences.offsets[users + 1] - sequences.offsets[users] > back + 1]
        if back and not len(users):
            break
        tasks = dataloader.last_tasks(sequences, users, system.options, shots, back)
        at = sequences.offsets[users + 1] - 1 - back
        predictions = predict(system, tasks)[..., 0] * problem.std + problem.mean
        predictions = np.clip(predictions, ratings.low, ratings.high)
        target, support = ratings.values[at].astype(np.float64), tasks.n_support.numpy()
        parts.append((users, ratings.items[at], support, target, predictions[:, -1], predictions[:, 0]))
    return Scored(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def evaluate_order(system, problem, users):
    """`Scored` for each user's last ten ratings, all of them queries of one task, with the ratings before them as
    support; the users and targets are those of `baselines.order_support`."""
    sequences, ratings = problem.sequences, problem.ratings
    length = np.diff(sequences.offsets)
    users = users[length[users] > 2]
    count = np.minimum(metrics.ORDER_TARGETS, length[users] - 1)
    if not len(users):
        return Scored(*np.zeros((len(Scored._fields), 0)))
    tasks = dataloader.last_tasks(sequences, users, system.options, count=count)
    user, query = tasks.query.numpy().nonzero()
    at, n_support = (sequences.offsets[users + 1] - count)[user] + query, tasks.n_support.numpy()
    predictions = predict(system, tasks)[user, :, query] * problem.std + problem.mean
    target = ratings.values[at].astype(np.float64)
    return Scored(users[user], ratings.items[at], n_support[user], target, predictions[:, -1], predictions[:, 0])


@torch.no_grad()
def rank_targets(system, problem, users):
    """Ranks, {"prediction": (T,), "popularity": (T,)}, of each user's last item among all that the user has not rated.

    They are by predicted rating and by number of training ratings. Items with the target's score count half.
    """
    sequences, n_items, found = problem.sequences, len(problem.ratings.item_ids), []
    popularity = dataloader.count_ratings(problem)
    catalogue, longest = np.arange(1, n_items + 1), system.options.max_seq_len - 1
    for part in np.array_split(users, -(-len(users) // RANKED_AT_ONCE)):
        start, end = sequences.offsets[part], sequences.offsets[part + 1] - 1
        n_support, shape = np.minimum(end - start, longest), (len(part), n_items)
        queries = np.broadcast_to(catalogue, shape), np.zeros(shape), np.ones(shape, bool)
        windows = dataloader.support_windows(n_support, system.options)
        tasks = dataloader.assemble(sequences, end - n_support, n_support, windows, queries, system.options)
        scores = predict(system, tasks)[:, -1]
        for score, first, last in zip(scores, start, end, strict=True):
            target = sequences.items[last] - 1
            others = np.ones(n_items, bool)
            others[sequences.items[first : last + 1] - 1] = False
            found.append([rank_of(by[target], by[others]) for by in (score, popularity)])
    return dict(zip(("prediction", "popularity"), np.array(found).T, strict=True))


def rank_of(score, others):
    return 1 + (others > score).sum() + (others == score).sum() / 2


def evaluate_simple(predictor, problem, shots, order=False):
    """`Scored` for the test users' last ratings by one of `baselines.fit_baselines`, with `shots` support ratings.

    With `order` it is for their last ten ratings, as `evaluate_order` gives it.
    """
    if order:
        return score_order(predictor, problem.ratings, shots, problem.test)
    support, target = baselines.last_support(problem.ratings, problem.test, shots)
    return scored(predictor, problem.test, support, target)


def score_order(predictor, ratings, shots, users):
    """`Scored` for the users' last ten ratings by one of `baselines.fit_baselines`, with `shots` support ratings."""
    return scored(predictor, *baselines.order_support(ratings, users, shots))


def scored(predictor, user, support, target):
    prediction = baselines.predict(predictor, support)
    return Scored(user, support.target_item, (support.items >= 0).sum(1), target, prediction, prediction)


@torch.no_grad()
def support_weights(system, problem, users):
    """Yield for some users at a time what the loss network makes of their n support ratings: place of the user in
    `users`, number of the rating's level, weight at each inner step (n, K), how often the rating counts."""
    tasks = dataloader.last_tasks(problem.sequences, users, system.options)
    for numbers, part in dataloader.parts(tasks, system.scale.device, chunk=system.options.task_chunk):
        part = part.to(system.scale.device)
        real = part.segment > 0
        weights = system.explain(part)[1].movedim(1, -1)[real].cpu().numpy()
        values = system.to_rating(part.ratings[real]).cpu().numpy()
        user, times = numbers[real.nonzero()[:, 0].cpu()].numpy(), part.times[real].cpu().numpy().astype(np.int64)
        yield user, table.nearest_level(values, problem.ratings.levels), weights, times
