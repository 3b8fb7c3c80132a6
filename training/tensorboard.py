"""TensorBoard events: scalars and histograms of a run, how its charts are laid out, its row in the HPARAMS tab."""

import io
import os
import re
import socket
import time

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, HistogramProto, Summary, SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

import utils

# What each scalar is, for the reader of its chart.
SCALARS = {
    "train/rmse": "training users' queries after adapting, mean since the last validation; supports are cut at random",
    "train/rmse_unadapted": "the same before the first inner step",
    "train/mae": "mean absolute error of the same",
    "train/gradient_norm": "norm of the meta-gradient before clipping, mean since the last validation",
    "train/skipped_iterations": "iterations left out because loss or gradient was not finite",
    "validation/rmse": "validation users' last ratings after adapting to the ratings before; chooses the checkpoint",
    "validation/rmse_unadapted": "the same before the first inner step; it may rise, since it is not trained",
    "validation/best_rmse": "the lowest validation/rmse so far",
    "validation/mae": "mean absolute error on the same targets",
    "validation/macro_rmse": "mean over rating values of their RMSE: rare ratings count as much as frequent ones",
    "simple/damped_means": "RMSE of item and user effects on the validation targets: the least to be beaten",
    "simple/matrix_factorisation": "RMSE of a matrix factorisation on the validation targets",
    "charts/iterations_per_second": "mean since the start; validations and checkpoints take part of that time",
    "charts/learning_rate": "outer learning rate of the encoder; the others keep their ratio to it",
    "test/rmse": "main.py --test: the last rating of each test user",
    "test/mae": "mean absolute error of the same",
    "test/macro_rmse": "mean over rating values of their RMSE",
}
TEST_FILE = "events.out.tfevents.0000000000.test-"  # sorts first: readers may not come back to earlier files
ADAPTING, WEIGHTS = "Validation RMSE before and after adapting", "Weight of each rating value in the loss"
LAYOUT = {
    "Is training healthy?": {
        "RMSE: training, validation, simple predictors": ["train/rmse", "validation/rmse", "simple/.*"],
        ADAPTING: ["validation/rmse_unadapted", "validation/rmse"],
        "MAE: training, validation": ["train/mae", "validation/mae"],
        "Norm of the meta-gradient": ["train/gradient_norm"],
    },
    "What was learned": {WEIGHTS: ["loss_weight/rating_.*"]},
}
FINAL = {  # of the HPARAMS tab
    "validation/best_rmse": "validation RMSE",
    "test/rmse": "test RMSE",
    "test/mae": "test MAE",
    "test/macro_rmse": "test macro-RMSE",
}


class EventLog:
    """TensorBoard events in a new file of a folder, written by `flush`.

    Not torch's SummaryWriter, which writes from a thread: there, a full disk is noticed late, and a checkpoint
    may be on the disk before the points that it counts on.
    """

    def __init__(self, folder, purge_step=None, name=None):
        """With `purge_step`, readers drop what the files before it hold from that step on. The name says the order."""
        stamps = re.findall(r"tfevents\.(\d{10})\.", " ".join(path.name for path in folder.glob("events.*")))
        stamp = max([int(time.time()), *(int(earlier) + 1 for earlier in stamps)])  # files are read in order of names
        self.path = folder / (name or f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}")
        self.simple = {}  # RMSE of simple predictors on the validation users
        self.pending = io.BytesIO()
        self.add(file_version="brain.Event:2")
        if purge_step is not None:
            self.add(step=purge_step, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def add(self, **fields):
        RecordWriter(self.pending).write(Event(wall_time=time.time(), **fields).SerializeToString())

    def add_scalar(self, tag, value, step):
        about = SummaryMetadata(summary_description=SCALARS.get(tag, ""), data_class=DATA_CLASS_SCALAR)
        about.plugin_data.plugin_name = "scalars"
        self.add(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value, metadata=about)]))

    def add_histogram(self, tag, values, step):
        """Add a histogram of the finite `values`, an array of any shape; nothing where there are none."""
        values = np.asarray(values, np.float64).ravel()
        values = values[np.isfinite(values)]
        if len(values):
            self.add(step=step, summary=Summary(value=[Summary.Value(tag=tag, histo=histogram(values))]))

    def flush(self):
        """Have all events on the disk; UserError where they cannot be written."""
        try:
            with open(self.path, "ab") as file:
                file.write(self.pending.getvalue())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise utils.cannot_write(self.path, error) from error
        self.pending = io.BytesIO()


def histogram(values, n_bins=30):
    """TensorBoard's form of a histogram of `values` (n,), with equal bins; values all alike get a narrow one."""
    low, high = values.min(), values.max()
    if high - low < 0.01 * abs(high):
        low, high = low - 0.005 * abs(high), high + 0.005 * abs(high)
    counts, edges = np.histogram(values, n_bins, (low, high if high > low else low + 1))
    return HistogramProto(
        min=values.min(), max=values.max(), num=len(values), sum=values.sum(), sum_squares=values @ values,
        bucket_limit=edges.tolist(), bucket=[0, *counts.tolist()],
    )  # fmt: skip


def add_layout(log, left_out=()):
    """Lay out the custom scalars, without the charts whose titles are `left_out`."""
    layout = {}
    for category, charts in LAYOUT.items():
        shown = {title: tags for title, tags in charts.items() if title not in left_out}
        layout[category] = {title: ["Multiline", [f"{tag}$" for tag in tags]] for title, tags in shown.items()}
    log.add(summary=summary.custom_scalars({category: charts for category, charts in layout.items() if charts}))


def add_table(log, tag, rows):
    """Add a table of names and values to the TEXT tab."""
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows)
    log.add(summary=summary.text(tag, f"| {tag} | |\n|---|---|\n{lines}"))


def add_session(log, name, options, first):
    """Begin the run's row in the HPARAMS tab, with these options (a dict); the columns named in `first` come first."""
    plain = {n: v if isinstance(v, bool | int | float | str) else str(v) for n, v in sorted(options.items())}
    config = api_pb2.Experiment(
        hparam_infos=[api_pb2.HParamInfo(name=option, differs=option in first) for option in plain],
        metric_infos=[
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=shown) for tag, shown in FINAL.items()
        ],
    )
    add_hparams(log, metadata.EXPERIMENT_TAG, experiment=config)
    log.add(summary=summary_v2.hparams_pb(plain, trial_id=name))


def end_session(log):
    """Mark the run's row in the HPARAMS tab as finished."""
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    add_hparams(log, metadata.SESSION_END_INFO_TAG, session_end_info=end)


def add_hparams(log, tag, **content):
    """Add what the HPARAMS tab is told, which stands in the metadata of an empty tensor."""
    about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**content))
    log.add(summary=Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)]))


def log_test(folder, figures, step):
    """Log the test figures of the checkpoint of `step`, in place of those of an earlier test."""
    for path in folder.glob(f"{TEST_FILE}*"):
        path.unlink(missing_ok=True)
    log = EventLog(folder, name=f"{TEST_FILE}{time.time_ns()}")
    for name in ("rmse", "mae", "macro_rmse"):
        log.add_scalar(f"test/{name}", figures[name], step)
    log.flush()
