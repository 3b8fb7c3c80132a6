"""Meta-train a sequential recommender that adapts to new users, or test what was trained.

    python main.py                                                      # MELO on MovieLens-1M
    python main.py --use_adaptive_loss=False                            # MAML
    python main.py --use_multi_step=False --use_adaptive_loss=False     # FO-MAML: first order
    python main.py --mode=sample --num_train_iterations=200             # the bundled sample: under a minute on a laptop
    python main.py --resume                                             # after an interruption: the same bits
    torchrun --nproc_per_node=2 main.py                                 # two ranks, each with half of the tasks
    python main.py --test                                               # the best checkpoint on the test users

The run is kept in <log_dir>/<mode>-<model>-<method>/; the same options with --test find it there.
"""

import contextlib
import sys
import time

import torch

import dataloader
import maml
import options
import utils
from evaluation import evaluate, metrics
from models import checkpoint
from training import distributed, optimizer, progress, run_folder, tensorboard
from training import run as runs


def main(argv=None):
    opts = options.parse(__doc__, argv)
    folder = checkpoint.run_folder(opts.log_dir, opts.mode, opts.model, options.method(opts))
    return test(opts, folder) if opts.test else train(opts, folder)


def train(opts, folder):
    """Train in a run's folder until the last iteration or a signal, and keep the checkpoint that validates best.

    Returns the exit status: 0, 128 + the number of a signal, or 3 where loss or gradient are not finite.
    """
    if distributed.is_first():
        run_folder.check_folder(folder, opts)

    # Data: users' ratings in time order, who is trained, validated and tested on
    with utils.naming_what_to_lower(opts, "reading"), distributed.first_of_machine_first():
        problem = dataloader.load_problem(opts)
    if opts.num_train_iterations is None:
        opts.num_train_iterations = dataloader.count_iterations(opts, problem)

    # System: learner, inner rates and loss network of each member, and the running mean of all of them
    with utils.naming_what_to_lower(opts, "building"):
        device = utils.choose_device(opts.device, opts.deterministic)
        system, shifts = maml.build_system(problem, opts, "cpu" if opts.deterministic else device)
        system.to(device)
        shifts = [shift and {name: table.to(device) for name, table in shift.items()} for shift in shifts]
        run = runs.new_run(system, shifts, problem, opts, folder)

    lock = run_folder.lock_folder(folder) if distributed.is_first() else contextlib.nullcontext()
    with lock, run_folder.Interruption() as stop, utils.naming_what_to_lower(opts):
        runs.begin(run)  # or go on from the newest checkpoint
        try:
            outer_loop(run, stop)
        except FloatingPointError as error:
            with contextlib.suppress(FloatingPointError):
                runs.save(run)
            distributed.barrier()
            print(f"error: {error}", file=sys.stderr)
            return 3
        distributed.barrier()  # torchrun ends all ranks when one has ended
    progress.say_end(run, stop)
    return stop.exit_code


def outer_loop(run, stop):
    """The outer loop: draw tasks, adapt to each, move the meta-parameters; validate and save on the way."""
    opts, loop = run.options, run.loop
    log, bar = progress.open_log(run) if distributed.is_first() else None, progress.progress(run)
    clock = saved = time.monotonic()
    clock -= loop["seconds"]

    while True:
        last_step = loop["iteration"] >= opts.num_train_iterations
        loop["seconds"] = time.monotonic() - clock
        save_due = time.monotonic() - saved > 60 * opts.checkpoint_minutes
        stop.agreed, save_due = distributed.max_over_ranks(stop.signal, save_due)

        validation_due = loop["validated"] != loop["iteration"] and (
            last_step or loop["iteration"] % opts.log_interval == 0
        )
        if run.device.type == "cpu" or validation_due or save_due or last_step or stop.requested:
            runs.settle(run)  # a GPU is not waited for at each step

        # Validate the running mean of the weights; keep it where it is the best so far
        if validation_due:
            scored = runs.validate(run)
            rmse, _ = metrics.rmse((scored.prediction - scored.target) ** 2)
            loop["validated"] = loop["iteration"]
            if better := rmse < loop["best_rmse"]:
                loop["best_rmse"], loop["best_iteration"] = rmse, loop["iteration"]
            if distributed.is_first():
                progress.log_validation(run, log, bar, scored)
            loop["sums"], loop["since"] = [0.0] * 4, 0
            runs.save(run, validated=True, best=better)

        # Save what going on needs
        if last_step or stop.requested or save_due:
            runs.save(run)
            saved = time.monotonic()
        if last_step or stop.requested:
            break

        # One outer step
        outer_step(run)
        loop["iteration"] += 1
        bar.update()

    bar.close()
    if last_step and distributed.is_first():
        progress.close_log(run, log)


def outer_step(run):
    """Draw a meta-batch of tasks, and take a step on this rank's share of them. `runs.settle` tells what it found."""
    opts, problem, iteration = run.options, run.problem, run.loop["iteration"]
    tasks = dataloader.sample_tasks(problem.sequences, problem.train, opts, iteration)
    weights, rates = maml.objective_weights(opts, iteration), optimizer.learning_rates(run.optimizers, opts, iteration)
    shares = dataloader.share(tasks, opts.task_chunk, distributed.rank(), distributed.world_size())
    mine = [tasks] if len(shares) == distributed.world_size() == 1 else [tasks.take(numbers) for numbers in shares]
    parts = [part for each in mine for _, part in dataloader.parts(each, run.device, "adapt", opts.task_chunk)]
    if run.graphs and len(parts) == 1:
        run.graphs(lambda *given: meta_step(run, *given), parts, weights, rates)
    else:
        meta_step(run, parts, weights, rates, tasks.table.unique() if opts.sparse_items else None)


def meta_step(run, parts, weights, rates, items=None):
    """Adapt to the tasks in `parts` and move the meta-parameters against the error on their queries.

    The query losses after 0..K inner steps have `weights` (K + 1,), parameter groups the learning `rates` (G,). With
    sparse gradients, `items` are those of all ranks' tasks. No value of a tensor is read on the host, so that a GPU
    captures it all as one graph; parameters stay as they were where a figure is not finite.
    """
    weights, rates = weights.to(run.device), rates.to(run.device)
    figures = torch.zeros(3, device=run.device)
    run.system.zero_grad()

    # The meta-loss, part by part, and its gradient
    for part in parts:
        loss, found = maml.meta_loss(run.system, part.to(run.device), weights, run.shifts, run.options.batch_size)
        loss.backward()
        figures += found
    if distributed.world_size() > 1:
        figures = distributed.sum_gradients(run.system, items, figures)

    # Clip and step
    norms = [optimizer.clip_gradient(member.parameters()) for member in run.system.members]
    skip = runs.count_step(run, torch.cat([figures, torch.stack(norms).max()[None]]))  # nan where any is nan
    optimizer.take_step(run.optimizers, rates, skip)
    runs.move_average(run, skip)


def test(opts, folder):
    """Test a run's checkpoint on the test users; prints its figures and writes test.json."""
    if distributed.is_first():
        report = evaluate.test(folder, opts)
        tensorboard.log_test(folder, report, report["step"])
    return 0


if __name__ == "__main__":
    distributed.run_script(main)
