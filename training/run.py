"""A training run: what it consists of, how it begins, goes on from a checkpoint, and is saved."""

import contextlib
import copy
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import dataloader
import maml
import options as option_module
from evaluation import evaluate
from models import checkpoint
from training import distributed, run_folder
from training.graphs import Graphs
from training.optimizer import build_optimizers
from utils import UserError

AVERAGE = 0.98  # decay of the running mean of the weights; the plain head has no mean, as published
SHORT_SUPPORTS = 1, 5  # ratings of new users on whom a run is validated, beside those of full length
SMALLEST_FACTOR = 0.01  # standard deviations of a rating; smaller factors count as none
LEAST_SHARE = 64  # validation users of a rank; fewer are not worth sharing


class Run(NamedTuple):
    """What the outer loop works on."""

    system: maml.Ensemble  # what is trained
    shifts: list  # of the item tables for each member, see `maml.look_up`
    average: maml.Ensemble  # the running mean of its weights, which is validated and tested
    optimizers: list
    problem: dataloader.Problem
    options: object
    folder: Path
    loop: dict  # all that changes beside parameters and optimizers; it goes into checkpoints
    tally: dict  # of the outer steps since the last `settle`, on the device; see `count_step`
    graphs: Graphs | None  # replays the outer step on a GPU

    @property
    def device(self):
        return self.system.scale.device

    @property
    def validation_targets(self):
        """Number of last ratings of each validation user that are predicted."""
        return 3 if self.options.head == "joint" else 1

    @property
    def validation_lengths(self):
        """Most support ratings of these targets, each of which is predicted once for each length."""
        longest, short = self.options.max_seq_len - 1, SHORT_SUPPORTS if self.options.head == "joint" else ()
        return sorted({longest, *(min(n, longest) for n in short)})


def new_run(system, shifts, problem, options, folder):
    """A run of a fresh system, before its first iteration."""
    average, device = copy.deepcopy(system).requires_grad_(False), system.scale.device
    optimizers = build_optimizers(system, options)
    on_graphs = options.cuda_graphs and device.type == "cuda" and len(optimizers) == 1  # SparseAdam waits for the host
    graphs = Graphs(device) if on_graphs and distributed.world_size() == 1 else None
    return Run(system, shifts, average, optimizers, problem, options, folder, new_loop(), new_tally(device), graphs)


def new_loop():
    """The loop state of a run that begins."""
    return {
        "iteration": 0,
        "validated": -1,  # the iteration of the last validation
        "seconds": 0.0,
        "since": 0,  # iterations since then, and the sums of their figures
        "sums": [0.0] * 4,
        "skipped": 0,
        "best_rmse": math.inf,
        "best_iteration": 0,
    }


# -----------------------------------------------------------------------------
# beginning and going on


def begin(run):
    """Begin in an empty folder, or with --resume go on from its newest whole checkpoint; the same in all ranks."""
    check_alike(run)
    if distributed.is_first():
        state = checkpoint.load_newest(run.folder, checkpoint.STATE) if run.options.resume else None
        begin_new(run) if state is None else go_on(run, state)
    share_first(run)


def begin_new(run):
    run_folder.clear_folder(run.folder, run.options.overwrite)
    config = {"options": run.options, "fingerprint": run.problem.ratings.fingerprint, "chosen": chosen(run)}
    run_folder.write_config(run.folder, config)
    if run.options.load_pretrained or run.options.load_pretrained_embedding:
        load_pretrained(run)


def chosen(run):
    """What a fresh run took from the data, its number of iterations and for its inner steps: {name: number}."""
    member, counted = run.system.members[0], dataloader.count_iterations(run.options, run.problem)
    found = {"iterations": counted} if run.options.num_train_iterations == counted else {}
    if member.rates.of_posterior:
        size = member.learner.item_factor.square().mean(0).sqrt()
        found["factors"] = int((size > SMALLEST_FACTOR).sum())
    if member.rates.of_posterior and run.options.inner_damping is None:
        damping = {name: values.exp().mean().item() for name, values in member.rates.log_damping.items()}
        found |= {"noise": damping["head/user_vector"], "bias_damping": damping["head/user_bias"]}
    return found


def go_on(run, state):
    checkpoint.check_fingerprint(state["fingerprint"], run.problem.ratings.fingerprint, run.folder)
    option_module.check_resume(state["options"], run.options)
    config = run_folder.read_config(run.folder)
    run_folder.warn_versions(config)
    restore(run, state)
    check_best(run)
    run_folder.note_continuation(run.folder, config, run.loop["iteration"])


def load_pretrained(run):
    """Start the learner from the best checkpoint of pretrain.py: from all its weights, or from its item tables alone.

    UserError where that was trained on other data, other users or with other sizes.
    """
    options = run.options
    folder = checkpoint.run_folder(options.pretrain_log_dir, options.mode, options.model, "basic")
    path = checkpoint.checkpoint_path(folder)
    basic, stored, _, _ = evaluate.load_system(path, options, run.problem)
    for name in ("random_seed", "fold", "num_folds", "num_test_data", "test_prefix"):
        if getattr(stored, name) != getattr(options, name):
            raise UserError(f"{path} was trained with another --{name}, so it has seen test users: pretrain again")
    try:
        for member, pretrained in zip(run.system.members, basic.members, strict=True):
            weights = pretrained.learner.state_dict() if options.load_pretrained else pretrained.learner.tables()
            member.learner.load_state_dict(weights, strict=options.load_pretrained)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} has other sizes than this learner: pretrain with the same model options") from error
    run.average.load_state_dict(run.system.state_dict())


# These may differ between ranks: where things are on their machine, and what only rank 0 does.
MAY_DIFFER = (*option_module.PLACES, "overwrite", "resume")


def check_alike(run):
    """UserError where this rank was given other options or ratings than rank 0."""
    mine = {name: value for name, value in option_module.as_stored(run.options).items() if name not in MAY_DIFFER}
    options, fingerprint = distributed.broadcast_object([mine, run.problem.ratings.fingerprint])
    differ = [f"--{name}" for name in mine if mine[name] != options.get(name)]
    if fingerprint != run.problem.ratings.fingerprint:
        differ.append("the ratings")
    if differ:
        raise UserError(f"rank {distributed.rank()} and rank 0 differ in {', '.join(differ)}: start all alike")


def share_first(run):
    """Give all ranks the state that rank 0 begins with."""
    if distributed.world_size() == 1:
        return
    states = distributed.broadcast_object([optimizer.state_dict()["state"] for optimizer in run.optimizers])
    load_moments(run, states)
    run.loop.update(distributed.broadcast_object(run.loop))
    shifts = [shift for of_member in run.shifts if of_member for shift in of_member.values()]
    distributed.broadcast_tensors([*run.system.state_dict().values(), *run.average.state_dict().values(), *shifts])


def restore(run, state):
    """Put a checkpoint's state into a run; UserError where it does not fit."""
    loop = state["loop"]
    if not is_sound(loop, run.loop, state["step"]):
        raise UserError(f"the loop state of the checkpoint in {run.folder} is damaged: use another --log_dir")
    maml.load_parameters(run.system, state["last"], run.folder)
    maml.load_parameters(run.average, state["system"], run.folder)
    if not all(map(fits, run.optimizers, state["optimizers"])) or len(run.optimizers) != len(state["optimizers"]):
        raise UserError(f"the optimizer state of the checkpoint in {run.folder} is damaged: use another --log_dir")
    load_moments(run, state["optimizers"])
    run.loop.update(loop)


def is_sound(loop, fresh, step):
    """Whether a loop state can be that of iteration `step`; `fresh` is one that begins."""
    if checkpoint.wrong_entry(loop, {name: type(value) for name, value in fresh.items()}) or loop["iteration"] != step:
        return False
    counts = loop["validated"] + 1, loop["since"], loop["skipped"], loop["best_iteration"]
    sums = [type(total) is float and total >= 0 for total in loop["sums"]]
    return all(0 <= count <= step + 1 for count in counts) and sums == [True] * len(fresh["sums"])


def fits(optimizer, moments):
    """Whether {number: moments of a parameter} can be the state of an optimizer."""
    if not isinstance(moments, dict):
        return False
    shapes = dict(enumerate(p.shape for group in optimizer.param_groups for p in group["params"]))
    for number, found in moments.items():
        if number not in shapes or not isinstance(found, dict) or found.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            return False
        for name in ("exp_avg", "exp_avg_sq"):
            value = found[name]
            if not isinstance(value, torch.Tensor) or (value.shape, value.dtype) != (shapes[number], torch.float32):
                return False
        if not isinstance(found["step"], torch.Tensor | int) or np.shape(found["step"]) != ():
            return False
    return True


def load_moments(run, states):
    """Load what each optimizer knows of its parameters, {number: moments}."""
    for optimizer, moments in zip(run.optimizers, states, strict=True):
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def check_best(run):
    """Where the best checkpoint is lost or damaged, say so and let the next validation make one."""
    loop = run.loop
    if loop["best_rmse"] == math.inf:
        return
    with contextlib.suppress(UserError):
        if checkpoint.load_checkpoint(checkpoint.best_path(run.folder))["step"] == loop["best_iteration"]:
            return
    print(f"warning: the best checkpoint in {run.folder} is lost: from here on another is chosen", file=sys.stderr)
    loop["best_rmse"] = math.inf


# -----------------------------------------------------------------------------
# what outer steps found


def new_tally(device):
    """Figures of outer steps that the host has not seen yet."""
    sizes = {"steps": (), "taken": (), "sums": (4,), "last": (4,)}
    return {name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in sizes.items()}


def count_step(run, figures):
    """Count an outer step with its figures (4,), on the device; a tensor that tells whether to skip the step.

    A step is skipped where a figure is not finite. Without --skip_nonfinite, all later steps are skipped, too, until
    `settle` ends the run.
    """
    tally, skip = run.tally, ~figures.isfinite().all()
    if not run.options.skip_nonfinite:
        stopped = tally["taken"] < tally["steps"]
        tally["last"].copy_(torch.where(stopped, tally["last"], figures))
        skip = skip | stopped
    tally["steps"] += 1
    tally["taken"] += ~skip
    tally["sums"] += figures.double().nan_to_num(0, 0, 0) * ~skip
    return skip


def settle(run):
    """Take what the device counted into the loop's state; FloatingPointError where a step's figure was not finite."""
    loop, tally = run.loop, run.tally
    steps, taken, *numbers = torch.cat([value.reshape(-1) for value in tally.values()]).tolist()
    for value in tally.values():
        value.zero_()
    loop["sums"] = [total + found for total, found in zip(loop["sums"], numbers[:4], strict=True)]
    loop["since"] += int(taken)
    if run.options.skip_nonfinite:
        loop["skipped"] += int(steps - taken)
    elif taken < steps:
        loop["iteration"] += int(taken - steps)  # of the step that failed; none was taken since
        before, after, _, norm = numbers[4:]
        what = f"the query loss is {after:g} and the norm of the meta-gradient {norm:g}"
        raise not_finite(run, what, before, ", or leave such iterations out with --resume --skip_nonfinite")


@torch.no_grad()
def move_average(run, skip):
    """Move the running mean of the weights, unless the tensor `skip` is true; as published, the plain head has none."""
    decay = AVERAGE if run.options.head == "joint" and run.loop["iteration"] else 0.0
    weight = (1 - decay) * ~skip
    for mean, value in zip(run.average.parameters(), run.system.parameters(), strict=True):
        mean.lerp_(value, weight)


# -----------------------------------------------------------------------------
# on the way


def validate(run):
    """`Scored` of the validation users; where there are many, each rank adapts to a share of them.

    FloatingPointError where their RMSE is not finite.
    """
    users = run.problem.validation[: run.options.val_size]
    shared = distributed.world_size() > 1 and len(users) >= LEAST_SHARE * distributed.world_size()
    mine = np.array_split(users, distributed.world_size())[distributed.rank()] if shared else users
    system, targets = run.average, run.validation_targets
    parts = [evaluate.evaluate(system, run.problem, mine, length, targets) for length in run.validation_lengths]
    if shared:
        parts = [part for of_rank in distributed.gather_objects([*map(tuple, parts)]) for part in of_rank]
    scored = evaluate.Scored(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    if not np.isfinite(scored.prediction).all():
        raise not_finite(run, "the RMSE of validation is not finite", scored.unadapted.sum())
    return scored


def save(run, validated=False, best=False):
    """Write a checkpoint of the run or, where it was `validated`, its weights, and the best checkpoint if it is `best`.

    FloatingPointError where its parameters are not finite.
    """
    ratings, iteration = run.problem.ratings, run.loop["iteration"]
    if not all(p.isfinite().all() for p in run.system.parameters()):
        raise not_finite(run, "the last step made parameters that are not finite", math.inf)
    if not distributed.is_first():
        return
    state = {
        "system": run.average.state_dict(),
        "last": run.system.state_dict(),
        "optimizers": [optimizer.state_dict()["state"] for optimizer in run.optimizers],
        "loop": run.loop,
        "options": option_module.as_stored(run.options),
        "fingerprint": ratings.fingerprint,
        "item_ids": ratings.item_ids.tolist(),
        "item_counts": dataloader.count_ratings(run.problem).tolist(),
        "levels": ratings.levels.tolist(),
    }
    if best:
        checkpoint.save_best(run.folder, iteration, state)
    if validated:
        checkpoint.save_weights(run.folder, iteration, state, run.options.keep_models)
    else:
        checkpoint.save_checkpoint(run.folder, iteration, state, run.options.keep_checkpoints)


def not_finite(run, what, before, more=""):
    """A FloatingPointError that names the option that is likely to blame.

    It is the rate of the inner steps where the figure `before` them is finite, else that of the outer steps.
    """
    cause = "--inner_lr" if math.isfinite(before) else "--outer_lr"
    cause = cause if run.options.num_inner_steps else "--pretraining_lr"
    return FloatingPointError(f"iteration {run.loop['iteration']}: {what}: train again with a lower {cause}{more}")
