"""What main.py and pretrain.py share: the data of a run, the loop that trains, evaluation on users.

The random draws of iteration i come from streams seeded by (random_seed, i), so that a run that goes on from a
checkpoint sees what it would have seen.
"""

import contextlib
import copy
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import dataloader
import maml
import options as option_module
import utils
from evaluation import evaluate, metrics
from models import checkpoint
from models.learner import TABLES
from training import distributed, progress, run_folder
from training.optimizer import RowAdamW, clear, clip, lay_end_to_end
from utils import UserError

# -----------------------------------------------------------------------------
# evaluation


# -----------------------------------------------------------------------------
# training

LEAST_SHARE = 64  # validation users of a process; fewer are not worth dividing
EPSILON = 1e-6  # of Adam; with torch's 1e-8, gradients that are rounding errors give steps of full size


def parameter_groups(system, options):
    """The groups of parameters, see `member_groups`, of all members, each with the number of its member."""
    members = enumerate(system.members)
    return [{**group, "member": number} for number, member in members for group in member_groups(member, options)]


def member_groups(member, options):
    """Parameters by the learning rate they have, each group with its name.

    But for item tables, whose gradients may be sparse, those of a group are one; see `lay_end_to_end`.
    """
    rates = {
        "encoder": options.outer_lr,
        "embedding": options.embedding_lr,
        "items": options.item_lr,
        "rates": options.learn_lr,
        "loss": options.lstm_lr if options.loss_network == "lstm" else options.loss_lr,
        "task_info": options.task_info_lr,
    }
    parameters = {name: [] for name in rates}
    for name, parameter in member.named_parameters():
        if parameter.requires_grad:
            parameters[group_name(name)].append(parameter)
    return [
        {
            "name": name,
            "params": parameters[name] if name in ("embedding", "items") else [lay_end_to_end(parameters[name])],
            "lr": rate,
            "initial_lr": rate,
            "weight_decay": options.weight_decay if name == "encoder" else 0.0,
            "eps": EPSILON,
            "by_rows": options.sparse_items and name in ("embedding", "items"),
        }
        for name, rate in rates.items()
        if parameters[name]
    ]


def group_name(parameter):
    """The group of `member_groups` that a meta-learner's parameter belongs to, by its name."""
    part, rest = parameter.split(".", 1)
    if part == "loss_network":
        return "task_info" if rest.startswith("shift.") else "loss"
    if part == "learner" and rest in TABLES:
        return "embedding" if rest == "item_embedding" else "items"
    return "encoder" if part == "learner" else part


def anneal(options, iteration):
    """The factor on all learning rates: a short rise, then a cosine from 1 to min_outer_lr / outer_lr."""
    end = options.min_outer_lr / options.outer_lr
    done = iteration / max(1, options.num_train_iterations)
    return min(1.0, (iteration + 1) / options.warmup) * (end + (1 - end) * (1 + math.cos(math.pi * done)) / 2)


def train_step(system, optimizer, batch, options, iteration, meanwhile=lambda: None):
    """One outer step: (mean query loss before adapting, after it, absolute error after it, norm of the meta-gradient).

    Each member of the system follows its own loss and gradient; the figures are those of the mean prediction, and the
    largest norm.
    The step and its figures are those of the tasks of all processes, of which `batch` has this one's. Before the other
    processes or a GPU are waited for, `meanwhile` is called: what it does then costs little time.
    Raises FloatingPointError, with the parameters as they were, where any of them is not finite.
    """
    weights = maml.objective_weights(options, iteration).to(system.scale.device)
    parameters = parameters_of(optimizer.param_groups)
    clear(parameters)
    total = torch.zeros(options.num_inner_steps + 2, device=system.scale.device)  # losses, and the absolute error
    for part in parts_of(system, batch):
        predictions = []
        for member in system.members:
            prediction = member(part, options.use_second_order)
            losses = maml.query_losses(prediction, part, weight=part.query_weight).sum(0) / batch.count
            (losses * weights).sum().backward()
            predictions.append(prediction.detach())
        mean = torch.stack(predictions).mean(0)
        total[:-1] += maml.query_losses(mean, part).sum(0) / batch.count
        total[-1] += maml.query_losses(mean[:, -1:], part, torch.abs).sum() / batch.count
    if distributed.count() > 1:
        total = sum_over_processes(system, parameters, batch, total, meanwhile)
    else:
        meanwhile()
    norm = torch.stack([clip(own, options.clip_norm) for own in of_members(optimizer.param_groups)]).max()
    figures = torch.stack([total[0], total[-2], total[-1], norm]).tolist()
    if not all(map(math.isfinite, figures)):
        raise FloatingPointError(divergence(options, iteration, figures[0], figures[1], figures[3]))
    optimizer.step()
    return figures


def parameters_of(groups):
    """All parameters of the groups of `parameter_groups`."""
    return [p for group in groups for p in group["params"]]


def of_members(groups):
    """The parameters of each member, from the groups of `parameter_groups`."""
    members = {}
    for group in groups:
        members.setdefault(group["member"], []).extend(group["params"])
    return members.values()


class Batch(NamedTuple):
    """This process's share of the tasks of an iteration."""

    groups: list  # of `Tasks`, which are adapted to one after the other
    count: int  # number of the tasks of all processes
    rows: torch.Tensor | None  # (r,) catalogue numbers of all their items, ascending, where processes sum sparse rows


def draw_batch(sequences, users, options, *stream):
    """Draw the tasks of an iteration, see `dataloader.sample_stretches`: the `Batch` of this process."""
    return own_share(sequences, dataloader.sample_stretches(sequences, users, options, *stream), options)


def own_share(sequences, drawn, options):
    """The `Batch` that this process takes of tasks `drawn` for all.

    With --task_chunk the groups are the same for one process as for several that have one each, to the last bit.
    """
    total, count = len(drawn.start), distributed.count()
    least = -(-total // options.task_chunk) if options.task_chunk else 1
    groups = dataloader.deal(drawn, -(-least // count) * count, options)
    own = [numbers for numbers in groups[slice(*distributed.share(len(groups)))] if len(numbers)]
    tasks = [dataloader.build_tasks(sequences, dataloader.take(drawn, numbers), options) for numbers in own]
    sums_rows = options.sparse_items and count > 1
    rows = torch.from_numpy(dataloader.items_of(sequences, drawn)) if sums_rows else None
    return Batch(tasks, total, rows)


def parts_of(system, batch):
    """The parts of a batch, on the system's device, one after the other."""
    for tasks in batch.groups:
        for _, part in dataloader.by_size(tasks, system.options.task_chunk, system.scale.is_cuda):
            yield part.to(system.scale.device)


def sum_over_processes(system, parameters, batch, figures, meanwhile):
    """Make gradients, and `figures` (n,), those of all tasks; the figures. For `meanwhile` see `train_step`."""
    learners = [member.learner for member in system.members] if system.options.sparse_items else []
    tables = [table for learner in learners for table in learner.tables().values()]
    rows = batch.rows.to(figures.device) if tables else None
    return distributed.sum_gradients(parameters, tables, rows, figures, meanwhile)


def divergence(options, iteration, before, after, norm):
    """What was not finite at an iteration, and the option that is likely to blame, in one sentence."""
    return (
        f"iteration {iteration}: the query loss is {after:g} and the norm of the meta-gradient {norm:g}: train again "
        f"with a lower {likely_cause(options, before)}, or leave such iterations out with --resume --skip_nonfinite"
    )


def likely_cause(options, before):
    """The option that is likely to blame where what was finite or not `before` adapting is not finite after it."""
    if options.num_inner_steps == 0:
        return "--pretraining_lr"
    return "--inner_lr" if math.isfinite(before) else "--outer_lr"


class Run(NamedTuple):
    """What the loop works on: constant through a run, but for what `loop` holds."""

    system: maml.Ensemble  # what is trained
    average: maml.Ensemble  # with the running mean of its weights, see `RowAdamW`: what is validated and tested
    problem: dataloader.Problem
    options: object
    folder: Path
    optimizer: RowAdamW  # which moves both
    loop: dict  # all that changes beside parameters and optimizer; goes into checkpoints


def new_run(system, problem, options, folder):
    """A run of a fresh system, before its first iteration."""
    shifts = {id(b): b for name, b in system.named_buffers() if name.endswith("_shift")}  # a gigabyte a million items
    average = copy.deepcopy(system, shifts)
    means = parameters_of(parameter_groups(average, options))
    optimizer = RowAdamW(parameter_groups(system, options), means, options.average)
    return Run(system, average, problem, options, folder, optimizer, new_loop())


def fit(system, problem, options, folder):
    """Train in a run's folder until the last iteration or a signal; the exit status.

    That is 0, 130 or 143 after a signal, 3 where loss or gradient are not finite. Checkpoints hold all that going on
    needs: parameters, optimizer, loop state, id maps, options.
    """
    run = new_run(system, problem, options, folder)
    distributed.connect(system.scale.device)
    check_alike(run)
    lock = run_folder.lock_folder(folder) if distributed.is_first() else contextlib.nullcontext()
    with lock, run_folder.Interruption() as stop, utils.naming_what_to_lower(options):
        if distributed.is_first():
            start(run)
        copy_first(run)
        try:
            iterate(run, stop)
        except FloatingPointError as error:
            with contextlib.suppress(FloatingPointError):
                save(run)
            distributed.barrier()
            print(f"error: {error}", file=sys.stderr)
            return 3
        distributed.barrier()  # torchrun ends all when one has ended
    if run.loop["skipped"]:
        print(f"left out {run.loop['skipped']} iterations that were not finite", file=sys.stderr)
    if stop.requested:
        print(
            f"stopped after iteration {run.loop['iteration']}; the same command with --resume goes on", file=sys.stderr
        )
    return stop.exit_code


def iterate(run, stop):
    """Train until the last iteration or a signal; validate and save on the way."""
    log, bar = progress.open_log(run) if distributed.is_first() else None, progress.progress(run)
    batch = draw_tasks(run)
    clock = time.monotonic() - run.loop["seconds"]
    begun, saved = run.loop["iteration"], time.monotonic()
    while True:
        iteration = run.loop["iteration"]
        last = iteration >= run.options.num_train_iterations
        run.loop["seconds"] = time.monotonic() - clock
        stop.agreed, due = distributed.largest(stop.signal, iteration > begun and is_save_due(run, saved))
        if run.loop["validated"] != iteration and (last or iteration % run.options.log_interval == 0):
            validate(run, log, bar)
        if last or stop.requested or due:
            save(run)
            saved = time.monotonic()
        if last or stop.requested:
            break
        batch = train_iteration(run, batch)
        bar.update()
    bar.close()
    if last and distributed.is_first():
        progress.close_log(run, log)


def is_save_due(run, saved):
    """Whether it is time for a checkpoint, the last being of `saved` on the monotonic clock."""
    interval = run.options.checkpoint_interval
    if interval and run.loop["iteration"] % interval == 0:
        return True
    return time.monotonic() - saved > 60 * run.options.checkpoint_minutes


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


def start(run):
    """Begin in an empty folder, or with --resume go on from its newest whole checkpoint."""
    state = checkpoint.load_newest(run.folder, checkpoint.STATE) if run.options.resume else None
    if state is None:
        run_folder.start_anew(run.folder, run.options.overwrite)
        run_folder.write_config(run.folder, {"options": run.options, "fingerprint": run.problem.ratings.fingerprint})
        return
    checkpoint.check_fingerprint(state["fingerprint"], run.problem.ratings.fingerprint, run.folder)
    option_module.check_resume(state["options"], run.options)
    config = run_folder.read_config(run.folder)
    run_folder.warn_versions(config)
    restore(run, state)
    check_best(run)
    run_folder.note_continuation(run.folder, config, run.loop["iteration"])


# What processes may be given differently: where things are on their machine, and what only process 0 does.
MAY_DIFFER = ("cache_dir", "data_path", "data_url", "log_dir", "overwrite", "pretrain_log_dir", "resume")


def check_alike(run):
    """UserError where this process was given other options or ratings than process 0."""
    mine = {name: value for name, value in option_module.as_stored(run.options).items() if name not in MAY_DIFFER}
    options, fingerprint = distributed.from_first([mine, run.problem.ratings.fingerprint])
    differ = [f"--{name}" for name in mine if mine[name] != options.get(name)]
    if fingerprint != run.problem.ratings.fingerprint:
        differ.append("the ratings")
    if differ:
        raise UserError(f"process {distributed.rank()} and process 0 differ in {', '.join(differ)}: start all alike")


def copy_first(run):
    """Give all processes the state that process 0 begins with."""
    moments = run.optimizer.state_dict()["state"]
    loop, numbers = distributed.from_first([run.loop, sorted(moments)])
    run.loop.update(loop)
    pairs = [(group, p) for group in run.optimizer.param_groups for p in group["params"]]
    for number in numbers:
        if number not in moments:
            run.optimizer.begin(*pairs[number])
    moments = run.optimizer.state_dict()["state"]
    tensors = [tensor for number in numbers for _, tensor in sorted(moments[number].items())]
    whole = [*run.system.buffers(), *run.system.parameters(), *run.average.state_dict().values()]
    distributed.copy_first([*whole, *tensors])


def restore(run, state):
    """Put a checkpoint's state into a run; UserError where it does not fit."""
    loop = state["loop"]
    if not is_sound(loop, run.loop, state["step"]):
        raise UserError(
            f"the loop state of the checkpoint in {run.folder} is damaged: train again in another --log_dir"
        )
    maml.load_parameters(run.system, state["last"], run.folder)
    maml.load_parameters(run.average, state["system"], run.folder)
    load_moments(run.optimizer, state["optimizer"], run.folder)
    run.loop.update(loop)
    set_rates(run.optimizer, run.options, loop["iteration"] - 1)


def is_sound(loop, fresh, step):
    """Whether a loop state can be that of iteration `step`; `fresh` is one that begins."""
    if checkpoint.wrong_entry(loop, {name: type(value) for name, value in fresh.items()}) or loop["iteration"] != step:
        return False
    counts = loop["validated"] + 1, loop["since"], loop["skipped"], loop["best_iteration"]
    sums = [type(total) is float and total >= 0 for total in loop["sums"]]
    return all(0 <= count <= step + 1 for count in counts) and sums == [True] * len(fresh["sums"])


def load_moments(optimizer, state, source):
    """Load what AdamW knows of its parameters, {number: moments}; UserError where it does not fit them."""
    shapes = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            whole = tuple(p.shape)
            of_rows = {"met": whole[:1], "mean": whole} if group["by_rows"] else {}
            shapes[len(shapes)] = {"step": (), "exp_avg": whole, "exp_avg_sq": whole, **of_rows}
    for number, moments in state.items():
        values = moments if isinstance(moments, dict) else {}
        found = {name: tuple(value.shape) for name, value in values.items() if isinstance(value, torch.Tensor)}
        if found != shapes.get(number) or any(value.dtype != torch.float32 for value in values.values()):
            raise UserError(
                f"the optimizer state of the checkpoint in {source} is damaged or of another version: "
                "use another --log_dir"
            )
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def check_best(run):
    """Where the best checkpoint is lost or damaged, say so and let the next validation make one."""
    loop = run.loop
    if loop["best_rmse"] == math.inf:
        return
    with contextlib.suppress(UserError):
        if checkpoint.load_checkpoint(run.folder / "checkpoints" / "best.pt")["step"] == loop["best_iteration"]:
            return
    print(f"warning: the best checkpoint in {run.folder} is lost: from here on another is chosen", file=sys.stderr)
    loop["best_rmse"] = math.inf


def save(run, best=False):
    """Write a checkpoint of the run; FloatingPointError where its parameters are not finite."""
    ratings, iteration = run.problem.ratings, run.loop["iteration"]
    if not all(p.isfinite().all() for p in run.system.parameters()):
        raise FloatingPointError(
            f"iteration {iteration}: the last step made parameters that are not finite: train again with a lower "
            f"{likely_cause(run.options, math.inf)}"
        )
    if not distributed.is_first():
        return
    state = {
        "system": average_state(run),
        "last": run.system.state_dict(),
        "optimizer": run.optimizer.state_dict()["state"],
        "loop": run.loop,
        "options": option_module.as_stored(run.options),
        "fingerprint": ratings.fingerprint,
        "item_ids": ratings.item_ids.tolist(),
        "levels": ratings.levels.tolist(),
    }
    if best:
        checkpoint.save_best(run.folder, iteration, state)
    else:
        checkpoint.save_checkpoint(run.folder, iteration, state, run.options.keep_checkpoints)


def average_state(run):
    """The state of `run.average` after all steps so far, of which the means of some rows may not have met all."""
    means = {mean: run.optimizer.mean_of(p) for p, mean in run.optimizer.means.items()}
    tables = {name: means[mean] for name, mean in run.average.named_parameters() if mean in means}
    return run.average.state_dict() | tables


def set_rates(optimizer, options, iteration):
    """Set all learning rates for an iteration."""
    factor = anneal(options, iteration)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def draw_tasks(run, ahead=0):
    """The `Batch` of the iteration that comes next, or of one so far behind it."""
    problem, iteration = run.problem, run.loop["iteration"] + ahead
    return draw_batch(problem.sequences, problem.train, run.options, iteration)


def train_iteration(run, batch):
    """Take one outer step, or leave it out where it is not finite; the `Batch` of the next one, drawn in between."""
    loop, options, iteration, drawn = run.loop, run.options, run.loop["iteration"], []

    def draw():
        drawn.append(draw_tasks(run, ahead=1))

    set_rates(run.optimizer, options, iteration)
    try:
        figures = train_step(run.system, run.optimizer, batch, options, iteration, draw)
    except FloatingPointError:
        if not options.skip_nonfinite:
            raise
        loop["skipped"] += 1
    else:
        loop["sums"] = [total + figure for total, figure in zip(loop["sums"], figures, strict=True)]
        loop["since"] += 1
    loop["iteration"] += 1
    return drawn[0]


def validate(run, log, bar):
    """Score the validation users, log, and keep the best checkpoint."""
    loop, options = run.loop, run.options
    run.optimizer.catch_up()
    scored = score_validation(run)
    error, _ = metrics.rmse((scored.prediction - scored.target) ** 2)
    if not math.isfinite(error):
        likely = likely_cause(options, scored.unadapted.sum())
        raise FloatingPointError(
            f"iteration {loop['iteration']}: the RMSE of validation is {error:g}: train again with a lower {likely}"
        )
    loop["validated"] = loop["iteration"]
    if better := error < loop["best_rmse"]:
        loop["best_rmse"], loop["best_iteration"] = error, loop["iteration"]
    if distributed.is_first():
        progress.log_validation(run, log, bar, scored)
    loop["sums"], loop["since"] = new_loop()["sums"], 0
    if better:
        save(run, best=True)


def score_validation(run):
    """`Scored` of the validation users; where there are many, each process adapts to a share of them."""
    users = run.problem.validation[: run.options.val_size]
    shared = distributed.count() > 1 and len(users) >= LEAST_SHARE * distributed.count()
    first, end = distributed.share(len(users)) if shared else (0, len(users))
    scored = evaluate.evaluate(run.average, run.problem, users[first:end], num_targets=run.options.val_targets)
    if not shared:
        return scored
    return evaluate.Scored(
        *(np.concatenate(column) for column in zip(*distributed.from_all(tuple(scored)), strict=True))
    )


def load_pretrained(system, problem, options):
    """Start a system's learner from the best checkpoint of pretrain.py: all weights, or the item tables alone.

    UserError where that was trained on other data, other users or with other sizes.
    """
    folder = checkpoint.run_folder(options.pretrain_log_dir, options.mode, options.model, "basic")
    path = checkpoint.checkpoint_path(folder)
    basic, stored, _, _ = evaluate.load_system(path, options, problem)
    for name in ("random_seed", "fold", "num_folds", "num_test_data"):
        if getattr(stored, name) != getattr(options, name):
            raise UserError(f"{path} was trained with another --{name}, so it has seen test users: pretrain anew")
    try:
        for member, pretrained in zip(system.members, basic.members, strict=True):
            weights = pretrained.learner.state_dict() if options.load_pretrained else pretrained.learner.tables()
            member.learner.load_state_dict(weights, strict=options.load_pretrained)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} has other sizes than this learner: pretrain with the same model options") from error
