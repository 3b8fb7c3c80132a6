"""What a run shows: its progress bar, its lines in a log file, its TensorBoard events."""

import itertools
import sys

import numpy as np
from torch.utils.tensorboard import summary
from tqdm import tqdm

import options as option_module
from evaluation import baselines, evaluate, metrics
from ratings import table
from training import projector, run_folder, tensorboard
from training.tensorboard import EventLog

GUIDE = """`{command}`

{n_train:,} training, {n_validation:,} validation and {n_test:,} test users; {n_items:,} items; {n_ratings:,} ratings \
from {low:g} to {high:g}; {n_parameters:,} parameters on {device}.

* **Custom Scalars**: is training healthy? `validation/rmse` should fall below the simple predictors' lines, and below \
`validation/rmse_unadapted`, or adapting is of no use.
* **Histograms**: `inner_rate` and `inner_damping`, the learned step sizes of each part that adapts to a user, and how \
strongly users with few ratings are kept near the start, in ratings; `loss_weight`, what ratings count in a user's \
loss (1: as in the squared error).
* **HParams**: options and final figures of all runs. **Projector**: the items of the best checkpoint, \
when a run has ended.
"""


def open_log(run):
    """An `EventLog` in the run's folder; a run that goes on replaces the points after its checkpoint.

    It also knows the RMSE of simple predictors on the validation users, in `simple`. Says what is to be trained.
    """
    validated, options, problem = run.loop["validated"], run.options, run.problem
    log = EventLog(run.folder, validated + 1 if validated >= 0 else None)
    users = problem.validation[: options.val_size]
    log.simple = baselines.reference_rmse(
        problem.ratings, problem.train, users, options.max_seq_len, options.val_targets
    )
    if validated < 0:
        log_start(run, log)
    parts = [len(users) for users in (problem.train, problem.validation, problem.test)]
    print(f"{run.folder}")
    print("{:,} users train, {:,} validate, {:,} test; {:,} items".format(*parts, len(problem.ratings.item_ids)))
    print("validation RMSE to beat: " + ", ".join(f"{name} {value:.4f}" for name, value in log.simple.items()))
    if run.loop["iteration"]:
        print(f"going on after iteration {run.loop['iteration']}")
    sys.stdout.flush()
    return log


def log_start(run, log):
    """Log what a run has once: what to look at, its options, how charts are laid out."""
    options, problem, ratings = run.options, run.problem, run.problem.ratings
    text = GUIDE.format(
        command=run_folder.command_line(), n_train=len(problem.train), n_validation=len(problem.validation),
        n_test=len(problem.test), n_items=len(ratings.item_ids), n_ratings=len(ratings.values), low=ratings.low,
        high=ratings.high, n_parameters=sum(p.numel() for p in run.system.parameters()),
        device=run.system.scale.device,
    )  # fmt: skip
    log.add(summary=summary.text("guide", text))
    tensorboard.add_table(log, "options", sorted(vars(options).items()))
    has = {tensorboard.ADAPTING: options.num_inner_steps > 0, tensorboard.WEIGHTS: options.use_adaptive_loss}
    tensorboard.add_layout(log, left_out=[title for title, there in has.items() if not there])
    chosen = {name: value for name, value in vars(options).items() if name not in option_module.MAY_CHANGE}
    chosen["method"] = run.folder.name.rpartition("-")[2]
    name = f"{run.folder.parent.name}/{run.folder.name}"
    tensorboard.add_session(log, name, chosen, first=("mode", "model", "method", "fold", "random_seed"))


def close_log(run, log):
    """Log that the run has ended, and write the items of its best checkpoint for the projector."""
    tensorboard.end_session(log)
    log.flush()
    projector.write(run.folder, run.problem.ratings, run.options)
    best = run.loop["best_rmse"], run.loop["best_iteration"]
    print("best validation RMSE {:.4f} after iteration {}; --test tests that checkpoint".format(*best))


def progress(run):
    """A progress bar on a terminal, below the lines of `log_validation`; elsewhere nothing."""
    total, done = run.options.num_train_iterations, run.loop["iteration"]
    return tqdm(total=total, initial=done, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())


def log_validation(run, log, bar, scored):
    """Log the losses since the last validation, the validation figures, and what was learned."""
    loop, iteration = run.loop, run.loop["iteration"]
    std, levels = run.problem.std, run.problem.ratings.levels
    errors = scored.prediction - scored.target
    found = metrics.summary(errors**2, abs(errors), table.nearest_level(scored.target, levels))
    figures = {f"validation/{name}": found[name] for name in ("rmse", "mae", "macro_rmse")}
    figures["validation/best_rmse"] = loop["best_rmse"]
    if loop["since"]:
        before, after, absolute, norm = (total / loop["since"] for total in loop["sums"])
        figures |= {"train/rmse": std * after**0.5, "train/mae": std * absolute, "train/gradient_norm": norm}
    if run.options.num_inner_steps:
        figures["validation/rmse_unadapted"] = metrics.rmse((scored.unadapted - scored.target) ** 2)[0]
        if loop["since"]:
            figures["train/rmse_unadapted"] = std * before**0.5
    figures |= {f"simple/{name.replace(' ', '_')}": value for name, value in log.simple.items()}
    figures["charts/iterations_per_second"] = iteration / max(loop["seconds"], 1e-9)
    figures["charts/learning_rate"] = run.optimizer.param_groups[0]["lr"]
    if loop["skipped"]:
        figures["train/skipped_iterations"] = loop["skipped"]
    for tag, value in figures.items():
        log.add_scalar(tag, value, iteration)
    log_learned(run, log)
    log.flush()
    training = f"training RMSE {figures['train/rmse']:.4f}  " if loop["since"] else " " * 22
    line = f"iteration {iteration:6d}  {training}validation RMSE {found['rmse']:.4f}  {loop['seconds']:5.0f} s"
    bar.write(line, file=sys.stdout)
    sys.stdout.flush()


def log_learned(run, log):
    """Log the inner rates and dampings of each part that adapts, and what the loss network made of the ratings."""
    iteration = run.loop["iteration"]
    for kind in ("rate", "damping"):
        parts = {}
        tensors = [getattr(member.rates, f"log_{kind}").items() for member in run.average.members]
        for name, values in itertools.chain(*tensors):
            part = name.split("/")[0] if name.startswith("encoder") else name.split("/")[-1]
            parts.setdefault(part, []).append(values.detach().exp().flatten().cpu().numpy())
        for part, values in parts.items():
            log.add_histogram(f"inner_{kind}/{part}", np.concatenate(values), iteration)
    if run.options.use_adaptive_loss:
        weights, level = rating_weights(run)
        log.add_histogram("loss_weight/all_ratings", weights, iteration)
        mean = weights.mean(1)
        for number, value in enumerate(run.problem.ratings.levels):
            if (level == number).any():
                log.add_scalar(f"loss_weight/rating_{value:g}", mean[level == number].mean(), iteration)


def rating_weights(run, most_users=256):
    """Weights that the loss network gives to the support ratings of some validation users at each inner step (n, K),
    and the numbers of these ratings' levels (n,)."""
    parts = evaluate.support_weights(run.average, run.problem, run.problem.validation[:most_users])
    _, level, weights, times = map(np.concatenate, zip(*parts, strict=True))
    return weights.repeat(times, 0), level.repeat(times)
