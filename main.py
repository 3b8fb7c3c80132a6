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
    if opts.num_train_iterations is None:  # pretrain.py counts epochs
        opts.num_train_iterations = dataloader.count_iterations(opts, problem)

    # System: learner, inner rates and loss network of each member, and the running mean of all of them
    with utils.naming_what_to_lower(opts, "building"):
        device = utils.choose_device(opts.device, opts.deterministic)
        system, shifts = maml.build_system(problem, opts)
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

        # Validate the running mean of the weights; keep it where it is the best so far
        if loop["validated"] != loop["iteration"] and (last_step or loop["iteration"] % opts.log_interval == 0):
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
        optimizer.set_learning_rates(run.optimizers, opts, loop["iteration"])
        try:
            figures = outer_step(run)
        except FloatingPointError:
            if not opts.skip_nonfinite:
                raise
            loop["skipped"] += 1
        else:
            loop["sums"] = [total + figure for total, figure in zip(loop["sums"], figures, strict=True)]
            loop["since"] += 1
        loop["iteration"] += 1
        bar.update()

    bar.close()
    if last_step and distributed.is_first():
        progress.close_log(run, log)


def outer_step(run):
    """Adapt to a meta-batch of tasks and move the meta-parameters against the error on their queries.

    Returns the mean squared error of the queries before and after adapting, their absolute error after it, and the
    largest norm of a member's meta-gradient. FloatingPointError, with the parameters as they were, where one is not
    finite.
    """
    opts, problem, device = run.options, run.problem, run.system.scale.device
    tasks = dataloader.sample_tasks(problem.sequences, problem.train, opts, run.loop["iteration"])
    weights = maml.objective_weights(opts, run.loop["iteration"]).to(device)

    # The meta-loss of this rank's share of the tasks, part by part, and its gradient
    figures = torch.zeros(3, device=device)
    run.system.zero_grad()
    for numbers in dataloader.share(tasks, opts.task_chunk, distributed.rank(), distributed.world_size()):
        for _, part in dataloader.parts(tasks.take(numbers), device, "adapt", opts.task_chunk):
            loss, found = maml.meta_loss(run.system, part, weights, run.shifts, opts.batch_size)
            loss.backward()
            figures += found
    if distributed.world_size() > 1:
        tables = [table for member in run.system.members for table in member.learner.tables().values()]
        rows = tasks.table.unique().to(device) if opts.sparse_items else None
        figures = distributed.sum_gradients(run.parameters, tables if opts.sparse_items else [], rows, figures)

    # Clip and step
    norms = [optimizer.clip_gradient(member.parameters()) for member in run.system.members]
    figures = [*figures.tolist(), torch.stack(norms).max().item()]  # nan where any is nan
    runs.check_finite(run, figures)
    for each in run.optimizers:
        each.step()
    run.average.update_parameters(run.system)
    return figures


def test(opts, folder):
    """Test a run's checkpoint on the test users; prints its figures and writes test.json."""
    if distributed.is_first():
        report = evaluate.test(folder, opts)
        tensorboard.log_test(folder, report, report["step"])
    return 0


if __name__ == "__main__":
    distributed.run_script(main)
