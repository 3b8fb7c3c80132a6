"""The items of a finished run for TensorBoard's PROJECTOR tab: learned factors, with ids, titles and figures."""

import contextlib

import numpy as np
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

import utils
from models import checkpoint
from ratings import table, titles
from utils import UserError

MOST_ITEMS = 10_000  # the most rated ones; a browser moves no more
TABLES = {"item_factor": "item factors", "item_embedding": "item embeddings"}
DIMENSIONS = 2  # that the projector shows at least
LEARNER = "members.0.learner"
CONFIG = "projector_config.pbtxt"  # where TensorBoard looks
TITLES = ("movies.dat", "movies.csv", "u.item")  # beside the ratings, as MovieLens comes


def write(folder, ratings, options):
    """Write the item table of the first member of a run's best checkpoint to <folder>/projector.

    The configuration beside it, without which nothing is shown, is written last.
    """
    system = checkpoint.load_checkpoint(checkpoint.checkpoint_path(folder))["system"]
    factor = system.get(f"{LEARNER}.item_factor")
    name = "item_embedding" if factor is None or factor.shape[1] < DIMENSIONS else "item_factor"
    count = np.bincount(ratings.items, minlength=len(ratings.item_ids))
    shown = np.sort(np.argsort(-count, kind="stable")[:MOST_ITEMS])
    place, config = folder / "projector", ProjectorConfig()
    paths = {"tensor_path": place / f"{name}.tsv", "metadata_path": place / "items.tsv"}
    config.embeddings.add(tensor_name=TABLES[name], **{key: f"projector/{p.name}" for key, p in paths.items()})
    try:
        (folder / CONFIG).unlink(missing_ok=True)
        place.mkdir(exist_ok=True)
        vectors = system[f"{LEARNER}.{name}"][1 + shown].tolist()
        paths["tensor_path"].write_text(as_lines([f"{x:.4g}" for x in row] for row in vectors), "utf-8")
        paths["metadata_path"].write_text(as_lines(describe(ratings, shown, read_titles(options))), "utf-8")
    except OSError as error:
        raise utils.cannot_write(place, error) from error
    utils.write_atomic(folder / CONFIG, str(config).encode())


def describe(ratings, shown, titles):
    """Rows that say what the items `shown` (places in `item_ids`) are, the names of the columns first."""
    count = np.bincount(ratings.items, minlength=len(ratings.item_ids))
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
