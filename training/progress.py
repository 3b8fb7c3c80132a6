"""What a run shows: its progress bar, the lines that it prints, its TensorBoard events."""

import itertools
import sys
import textwrap
from typing import NamedTuple

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import options as option_module
from evaluation import baselines, evaluate, metrics
from ratings import table
from training import run_folder, tensorboard
from training.optimizer import learning_rates
from training.run import chosen
from utils import printable

MOST_USERS = 256  # validation users whose ratings' weights are shown
GUIDE = """`{command}`

{n_train:,} training, {n_validation:,} validation and {n_test:,} test users; {n_items:,} items; {n_ratings:,} ratings \
from {low:g} to {high:g}; {n_parameters:,} parameters on {device}.

* **Custom Scalars**: is training healthy? `validation/rmse` should fall below the simple predictors' lines, and below \
`validation/rmse_unadapted`, or adapting is of no use. `train/rmse` is the mean since the last validation, of training \
users whose supports are cut at random.
* **Histograms**: `inner_rate` and `inner_damping`, the learned step sizes of each part that adapts to a user, and how \
strongly users with few ratings are kept near the start, in ratings; `loss_weight`, what ratings count in a user's \
loss (1: as in the squared error).
* **HParams**: options and final figures of all runs. **Projector**: the items of the best checkpoint, \
when a run has ended.
"""


class Log(NamedTuple):
    writer: SummaryWriter
    simple: dict  # {name: RMSE} of simple predictors on the validation users


def open_log(run):
    """The `Log` in a run's folder; a run that goes on replaces the points after its checkpoint.

    Says what is to be trained.
    """
    validated, options, problem = run.loop["validated"], run.options, run.problem
    writer = tensorboard.open_writer(run.folder, validated + 1 if validated >= 0 else None)
    users = problem.train, problem.validation[: options.val_size]
    simple = baselines.reference_rmse(problem.ratings, *users, run.validation_lengths, run.validation_targets)
    if validated < 0:
        log_start(run, writer)
    parts = [len(users) for users in (problem.train, problem.validation, problem.test)]
    print(printable(run.folder))
    given = f"options: {option_module.differing(options) or 'the defaults'}"
    print(textwrap.fill(given, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))
    print("{:,} users train, {:,} validate, {:,} test; {:,} items".format(*parts, len(problem.ratings.item_ids)))
    if validated < 0 and (taken := say_chosen(run)):
        print(textwrap.fill(f"chosen from the data: {taken}", 80, subsequent_indent="  "))
    print("validation RMSE to beat: " + ", ".join(f"{name} {value:.4f}" for name, value in simple.items()))
    if run.loop["iteration"]:
        print(f"going on after iteration {run.loop['iteration']}")
    sys.stdout.flush()
    return Log(writer, simple)


def say_chosen(run):
    """What `chosen` found, as one text."""
    found = chosen(run)
    texts = {
        "factors": "{factors} of {most} factors", "noise": "noise {noise:.2f}",
        "bias_damping": "biases shrunk by {bias_damping:,.1f} ratings", "iterations": "{iterations} iterations",
    }  # fmt: skip
    text = ", ".join(text for name, text in texts.items() if name in found)
    return text.format(most=run.options.num_factors, **found)


def log_start(run, writer):
    """Log what a run has once: what to look at, its options, how charts are laid out."""
    options, problem, ratings = run.options, run.problem, run.problem.ratings
    text = GUIDE.format(
        command=run_folder.command_line(), n_train=len(problem.train), n_validation=len(problem.validation),
        n_test=len(problem.test), n_items=len(ratings.item_ids), n_ratings=len(ratings.values), low=ratings.low,
        high=ratings.high, n_parameters=sum(p.numel() for p in run.system.parameters()),
        device=run.system.scale.device,
    )  # fmt: skip
    has = {tensorboard.ADAPTING: options.num_inner_steps > 0, tensorboard.WEIGHTS: options.use_adaptive_loss}
    shown = {name: value for name, value in vars(options).items() if name not in option_module.MAY_CHANGE}
    with tensorboard.writing_events(run.folder):
        writer.add_text("guide", text)
        tensorboard.add_options(writer, vars(options))
        tensorboard.add_charts(writer, left_out=[title for title, there in has.items() if not there])
        tensorboard.add_session(writer, shown | {"method": run.folder.name.rpartition("-")[2]})


def close_log(run, log):
    """End the log of a run, and write the items of its best checkpoint for the projector."""
    with tensorboard.writing_events(run.folder):
        log.writer.close()
    tensorboard.write_projector(run.folder, run.problem.ratings, run.options)
    best = run.loop["best_rmse"], run.loop["best_iteration"]
    print("best validation RMSE {:.4f} after iteration {}; --test tests that checkpoint".format(*best))


def say_end(run, stop):
    """Say what was left out, and how to go on where a signal stopped the run."""
    if run.loop["skipped"]:
        print(f"left out {run.loop['skipped']} iterations that were not finite", file=sys.stderr)
    if stop.requested:
        message = f"stopped after iteration {run.loop['iteration']}; the same command with --resume goes on"
        print(message, file=sys.stderr)


def progress(run):
    """A progress bar on a terminal, below the lines of `log_validation`; elsewhere nothing."""
    total, done = run.options.num_train_iterations, run.loop["iteration"]
    return tqdm(total=total, initial=done, leave=False, dynamic_ncols=True, disable=None)


def log_validation(run, log, bar, scored):
    """Log the losses since the last validation, the validation figures, and what was learned; print a line."""
    loop, iteration = run.loop, run.loop["iteration"]
    figures = validation_figures(run, scored)
    figures |= {f"simple/{name.replace(' ', '_')}": value for name, value in log.simple.items()}
    with tensorboard.writing_events(run.folder):
        for tag, value in figures.items():
            log.writer.add_scalar(tag, value, iteration)
        log_learned(run, log.writer)
        log.writer.flush()
    training = f"training RMSE {figures['train/rmse']:.4f}  " if loop["since"] else " " * 22
    validation = f"validation RMSE {figures['validation/rmse']:.4f}"
    bar.write(f"iteration {iteration:6d}  {training}{validation}  {loop['seconds']:5.0f} s", file=sys.stdout)
    sys.stdout.flush()


def validation_figures(run, scored):
    """{tag: value} of the losses since the last validation and of the `Scored` validation users."""
    loop, std = run.loop, run.problem.std
    errors = scored.prediction - scored.target
    found = metrics.summary(errors**2, abs(errors), table.nearest_level(scored.target, run.problem.ratings.levels))
    figures = {f"validation/{name}": found[name] for name in ("rmse", "mae", "macro_rmse")}
    figures["validation/best_rmse"] = loop["best_rmse"]
    if loop["since"]:
        before, after, absolute, norm = (total / loop["since"] for total in loop["sums"])
        figures |= {"train/rmse": std * after**0.5, "train/mae": std * absolute, "train/gradient_norm": norm}
    if run.options.num_inner_steps:
        figures["validation/rmse_unadapted"] = metrics.rmse((scored.unadapted - scored.target) ** 2)[0]
        if loop["since"]:
            figures["train/rmse_unadapted"] = std * before**0.5
    figures["charts/iterations_per_second"] = loop["iteration"] / max(loop["seconds"], 1e-9)
    rates = learning_rates(run.optimizers, run.options, max(0, loop["iteration"] - 1))
    figures["charts/learning_rate"] = rates[0].item()
    if loop["skipped"]:
        figures["train/skipped_iterations"] = loop["skipped"]
    return figures


def log_learned(run, writer):
    """Log the inner rates and dampings of each part that adapts, and what the loss network made of the ratings."""
    iteration = run.loop["iteration"]
    for kind in ("rate", "damping"):
        parts = {}
        tensors = [getattr(member.rates, f"log_{kind}").items() for member in run.average.members]
        for name, values in itertools.chain(*tensors):
            part = name.split("/")[0] if name.startswith("encoder") else name.split("/")[-1]
            parts.setdefault(part, []).append(values.detach().exp().flatten().cpu().numpy())
        for part, values in parts.items():
            tensorboard.add_histogram(writer, f"inner_{kind}/{part}", np.concatenate(values), iteration)
    if run.options.use_adaptive_loss:
        users = run.problem.validation[:MOST_USERS]
        parts = evaluate.support_weights(run.average, run.problem, users)
        _, level, weights, times = map(np.concatenate, zip(*parts, strict=True))
        weights, level = weights.repeat(times, 0), level.repeat(times)
        tensorboard.add_histogram(writer, "loss_weight/all_ratings", weights, iteration)
        mean = weights.mean(1)
        for number, value in enumerate(run.problem.ratings.levels):
            if (level == number).any():
                writer.add_scalar(f"loss_weight/rating_{value:g}", mean[level == number].mean(), iteration)
