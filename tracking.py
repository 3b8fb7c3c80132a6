"""What a run shows: its progress bar, its lines in a log file, its TensorBoard events."""

import io
import os
import re
import socket
import sys
import time

import numpy as np
import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary
from tqdm import tqdm

import dataloader
import maml
import metrics
import runs


class EventLog:
    """TensorBoard events in a new file of a folder, written by `flush`.

    Not torch's SummaryWriter, which writes from a thread: there, a full disk is noticed late, and a checkpoint
    may be on the disk before the points that it counts on.
    """

    def __init__(self, folder, purge_step=None):
        """With `purge_step`, readers drop what the files before it hold from that step on."""
        stamps = re.findall(r"tfevents\.(\d{10})\.", " ".join(path.name for path in folder.glob("events.*")))
        stamp = max([int(time.time()), *(int(earlier) + 1 for earlier in stamps)])  # files are read in order of names
        self.path = folder / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
        self.pending = io.BytesIO()
        self.add(file_version="brain.Event:2")
        if purge_step is not None:
            self.add(step=purge_step, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def add(self, **fields):
        RecordWriter(self.pending).write(Event(wall_time=time.time(), **fields).SerializeToString())

    def add_scalar(self, tag, value, step):
        self.add(step=step, summary=summary.scalar(tag, value))

    def flush(self):
        """Have all events on the disk; UserError where they cannot be written."""
        try:
            with open(self.path, "ab") as file:
                file.write(self.pending.getvalue())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise runs.cannot_write(self.path, error) from error
        self.pending = io.BytesIO()


def open_log(run):
    """An `EventLog` in the run's folder; a run that goes on replaces the points behind its checkpoint."""
    validated = run.loop["validated"]
    if validated >= 0:
        return EventLog(run.folder, purge_step=validated + 1)
    log = EventLog(run.folder)
    rows = "\n".join(f"| {name} | {value} |" for name, value in sorted(vars(run.options).items()))
    log.add(summary=summary.text("options", f"| option | value |\n|---|---|\n{rows}"))
    return log


def progress(run):
    """A progress bar on a terminal; elsewhere nothing, since `log_validation` prints a line each time."""
    options = run.options
    return tqdm(
        total=options.num_train_iterations,
        initial=run.loop["iteration"],
        desc=run.folder.name,
        unit="it",
        dynamic_ncols=True,
        disable=not sys.stderr.isatty(),
    )


def log_validation(run, log, bar, scored):
    """Log the losses since the last validation, the validation figures, and what was learned."""
    loop, iteration = run.loop, run.loop["iteration"]
    errors = scored.prediction - scored.target
    (rmse, _), (mae, _) = metrics.rmse(errors**2), metrics.mean_with_error(abs(errors))
    std = run.problem.std
    if loop["since"]:
        before, after, absolute, norm = (total / loop["since"] for total in loop["sums"])
        log.add_scalar("train/loss", after, iteration)
        log.add_scalar("train/rmse", std * after**0.5, iteration)
        log.add_scalar("train/mae", std * absolute, iteration)
        log.add_scalar("train/rmse_unadapted", std * before**0.5, iteration)
        log.add_scalar("train/gradient_norm", norm, iteration)
        bar.set_postfix(loss=f"{after:.4f}", val_rmse=f"{rmse:.4f}")
    log.add_scalar("validation/loss", float((errors**2).mean()) / std**2, iteration)
    log.add_scalar("validation/rmse", rmse, iteration)
    log.add_scalar("validation/mae", mae, iteration)
    log.add_scalar("validation/rmse_unadapted", metrics.rmse((scored.unadapted - scored.target) ** 2)[0], iteration)
    log.add_scalar("charts/iterations_per_second", iteration / max(loop["seconds"], 1e-9), iteration)
    for group in run.optimizer.param_groups:
        log.add_scalar(f"learning_rate/{group['name']}", group["lr"], iteration)
    if loop["skipped"]:
        log.add_scalar("train/skipped_iterations", loop["skipped"], iteration)
    log_learned(run, log)
    log.flush()
    if bar.disable:
        shown = f"loss {loop['sums'][1] / loop['since']:.4f}  " if loop["since"] else ""
        print(f"iteration {iteration:6d}  {shown}validation RMSE {rmse:.4f}  {loop['seconds']:.0f} s", flush=True)


def log_learned(run, log):
    """Log inner rates by tensor and step, step weights, and the weight given to each rating value."""
    options, iteration = run.options, run.loop["iteration"]
    for name, rates in run.average.module.rates.log_rate.items():
        for step, rate in enumerate(rates.detach().exp()):
            log.add_scalar(f"inner_rate/{name.replace('/', '.')}/step_{step + 1}", rate.mean().item(), iteration)
    for step, weight in enumerate(maml.objective_weights(options, iteration)[1:].tolist()):
        log.add_scalar(f"step_weight/step_{step + 1}", weight, iteration)
    if options.use_adaptive_loss:
        for level, weight in zip(run.problem.ratings.levels, weight_by_level(run), strict=True):
            if np.isfinite(weight):
                log.add_scalar(f"rating_weight/{level:g}", weight, iteration)


@torch.no_grad()
def weight_by_level(run, most_users=256):
    """Mean weight that the loss network gives to each rating level over validation users; nan where none has it."""
    users = run.problem.validation[:most_users]
    tasks = dataloader.last_tasks(run.problem.sequences, users, run.options)
    device = run.system.scale.device
    tasks = dataloader.Tasks(*(tensor.to(device) for tensor in tasks))
    weights = run.average.module.explain(tasks)[1].mean(1)[tasks.support].cpu().numpy()
    values = run.average.module.to_rating(tasks.ratings[tasks.support]).cpu().numpy()
    level = metrics.nearest_level(values, run.problem.ratings.levels)
    return [
        weights[level == i].mean() if (level == i).any() else np.nan for i in range(len(run.problem.ratings.levels))
    ]
