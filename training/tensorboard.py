"""What TensorBoard shows of a run: scalars, histograms, charts, its options and figures, its items in the projector."""

import contextlib
import re
import threading
import time

import numpy as np
from torch.utils.tensorboard import SummaryWriter, summary

import utils
from models import checkpoint
from ratings import table, titles
from utils import UserError

ADAPTING = "Validation RMSE before and after adapting"
WEIGHTS = "Weight of each rating value in the loss"
CHARTS = {
    "Validation RMSE, and that of simple predictors": ["validation/rmse", "simple/.*"],
    ADAPTING: ["validation/rmse_unadapted", "validation/rmse"],
    "Training RMSE": ["train/rmse"],
    "Norm of the meta-gradient": ["train/gradient_norm"],
    WEIGHTS: ["loss_weight/rating_.*"],
}
FINAL = ("validation/best_rmse", "test/rmse", "test/mae", "test/macro_rmse")  # figures of the HPARAMS tab
MOST_ITEMS = 10_000  # in the projector, the most rated ones; a browser moves no more
TITLES = ("movies.dat", "movies.csv", "u.item", "titles.csv")  # beside the ratings


# -----------------------------------------------------------------------------
# events


def open_writer(folder, purge_step=None):
    """A `SummaryWriter` of a new file; readers drop what the files before it hold from `purge_step` on."""
    stamps = [int(stamp) for stamp in re.findall(r"tfevents\.(\d{10})\.", " ".join(map(str, folder.glob("events.*"))))]
    while stamps and 0 <= max(stamps) - int(time.time()) < 10:  # files are read in order of names
        time.sleep(0.02)
    threading.excepthook = leave_to_flush
    with writing_events(folder):
        return SummaryWriter(folder, purge_step=purge_step)


@contextlib.contextmanager
def writing_events(folder):
    """UserError where events cannot be written, which the writer's thread keeps for the next call."""
    try:
        yield
    except OSError as error:
        raise utils.cannot_write(folder / "events.out.tfevents.*", error) from error


def leave_to_flush(failure):
    """Print nothing of a thread that could not write: the next call of the writer raises its error again."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def add_histogram(writer, tag, values, step):
    """Add a histogram of the finite `values`, an array of any shape; nothing where there are none."""
    values = values[np.isfinite(values)]
    if len(values):
        writer.add_histogram(tag, values, step)


def add_charts(writer, left_out=()):
    """Lay out the custom scalars, without the charts whose titles are `left_out`."""
    charts = {t: ["Multiline", [f"{tag}$" for tag in tags]] for t, tags in CHARTS.items() if t not in left_out}
    learned = {title: charts.pop(title) for title in (WEIGHTS,) if title in charts}
    layout = {"Is training healthy?": charts, "What was learned": learned}
    writer.add_custom_scalars({name: part for name, part in layout.items() if part})


def add_options(writer, options):
    """Add a dictionary of options as a table in the TEXT tab."""
    lines = "\n".join(f"| {name} | {value} |" for name, value in sorted(options.items()))
    writer.add_text("options", f"| option | value |\n|---|---|\n{lines}")


def add_session(writer, options):
    """Add the run's row of the HPARAMS tab; its figures are those of its scalars.

    Not `writer.add_hparams`, which writes to a folder of its own that looks like another run.
    """
    plain = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in sorted(options.items())}
    for part in summary.hparams(plain, dict.fromkeys(FINAL, 0)):
        writer.file_writer.add_summary(part)


def log_test(folder, figures, step):
    """Log the test figures of the checkpoint of `step`, in place of those of an earlier test.

    The file gets a name that sorts first: readers would not come back to the file of a run that goes on.
    """
    with writing_events(folder):
        for path in folder.glob("events.*.test"):
            path.unlink()
        with SummaryWriter(folder, filename_suffix=".test") as writer:
            for name in ("rmse", "mae", "macro_rmse"):
                writer.add_scalar(f"test/{name}", figures[name], step)
        for path in folder.glob("events.*.test"):
            path.rename(folder / f"events.out.tfevents.0000000000.{time.time_ns()}.test")


# -----------------------------------------------------------------------------
# the projector


def write_projector(folder, ratings, options):
    """Write the items of a run's best checkpoint to <folder>/projector: factors or embeddings, ids, titles, figures.

    The configuration beside it, without which nothing is shown, is written last.
    """
    tensors = checkpoint.load_checkpoint(checkpoint.checkpoint_path(folder))["system"]
    tables = {name: tensors.get(f"members.0.learner.{name}") for name in ("item_factor", "item_embedding")}
    name, vectors = next((n, t) for n, t in tables.items() if t is not None and t.shape[1] > 1)  # two dimensions
    count = np.bincount(ratings.items, minlength=len(ratings.item_ids))
    shown = np.sort(np.argsort(-count, kind="stable")[:MOST_ITEMS])
    files = {
        f"projector/{name}.tsv": as_lines([f"{x:.4g}" for x in row] for row in vectors[1 + shown].tolist()),
        "projector/items.tsv": as_lines(describe(ratings, count, shown, read_titles(options))),
    }
    paths = 'tensor_path: "{}" metadata_path: "{}"'.format(*files)
    files["projector_config.pbtxt"] = f'embeddings {{ tensor_name: "{name.replace("_", " ")}s" {paths} }}\n'
    utils.make_folder(folder / "projector")
    for path, text in files.items():
        utils.write_atomic(folder / path, text.encode())


def describe(ratings, count, shown, titles):
    """Rows that say what the items `shown` (places in `item_ids`) are, the names of the columns first."""
    mean = np.bincount(ratings.items, ratings.values, len(count)) / np.maximum(count, 1)
    ids = ratings.item_ids[shown].tolist()
    columns = {"title": [titles.get(str(item), str(item)) for item in ids]} if titles else {}
    columns |= {"item": ids, "ratings": count[shown].tolist(), "mean rating": mean[shown].round(2).tolist()}
    return [columns, *zip(*columns.values(), strict=True)]


def read_titles(options):
    """{item id as text: title} of a titles file beside the ratings; empty where there is none that can be read."""
    folder = table.data_place(options)[0].parent
    for path in (folder / name for name in TITLES):
        with contextlib.suppress(UserError):
            return titles.read_titles(path).by_item
    return {}


def as_lines(rows):
    """Rows of values as tab-separated lines."""
    return "".join("\t".join(" ".join(str(value).split()) for value in row) + "\n" for row in rows)
