"""Other programs' predictions beside ours: the targets as CSV files to predict, and the predictions as rows of a table.

A target is named by its task: "last" is a user's last rating, predicted from the ratings before it; "order" are the
user's last ten, all predicted from the ratings before these ten. Supports are oldest first. For the curve over the
number of known ratings, "last" is also predicted from the last `shots` ratings of its support.
"""

import io

import numpy as np
import pandas as pd

import utils
from evaluation import baselines
from utils import UserError

FILES = ("training.csv", "validation.csv", "support.csv", "targets.csv")
SHOWN = 3  # targets that a refusal names


def export(folder, problem, longest):
    """Write FILES for a split of the users: ratings to train and to choose on, supports (`longest` or fewer) and
    targets of the test users."""
    ratings, parts = problem.ratings, {"support.csv": [], "targets.csv": []}
    last = problem.test, *baselines.last_support(ratings, problem.test, longest)
    order = baselines.order_support(ratings, problem.test, longest)
    for task, (user, support, target) in {"last": last, "order": order}.items():
        first = np.flatnonzero(np.diff(user, prepend=-1))  # targets of a user follow each other and share the support
        row, place = np.nonzero(support.items[first] >= 0)
        items, values = (part[first][row, place] for part in (support.items, support.values))
        parts["targets.csv"].append(rated(ratings, user, support.target_item, target).assign(task=task))
        parts["support.csv"].append(rated(ratings, user[first][row], items, values).assign(task=task))
    frames = {name: pd.concat(frames) for name, frames in parts.items()}
    owner = np.repeat(np.arange(len(ratings.user_ids)), np.diff(ratings.offsets))
    for name, users in (("training.csv", problem.train), ("validation.csv", problem.validation)):
        at = np.isin(owner, users)
        frames[name] = rated(ratings, owner[at], ratings.items[at], ratings.values[at]).assign(time=ratings.times[at])
    for name in FILES:
        utils.write_atomic(folder / name, frames[name].to_csv(index=False).encode())


def rated(ratings, user, item, value):
    """Ratings as a table with ids in place of numbers."""
    return pd.DataFrame({"user": ratings.user_ids[user], "item": ratings.item_ids[item], "rating": value})


def read(name, path, rows):
    """The predictions of a CSV file as rows like those of kept predictions, `rows`, whose targets it must all have.

    The columns are user, item and prediction; fold and seed where `rows` has several of them; task where the order is
    to be scored too; shots where all numbers of known ratings are predicted ("order": from the largest).

    UserError for missing, doubled or foreign targets and for what is no prediction.
    """
    given = read_table(path)
    keys = ["user", "item"] + [place for place in ("fold", "seed") if rows[place].nunique() > 1]
    keys += [name for name in ("task", "shots") if name in given]
    if lacking := [column for column in (*keys, "prediction") if column not in given]:
        raise UserError(f"{path} lacks the column {', '.join(lacking)}: it needs {', '.join([*keys, 'prediction'])}")
    targets = rows.drop_duplicates(["task", "fold", "seed", "user", "item", "shots"])
    if "shots" not in given:
        targets = targets[targets.shots == targets.shots.max()]
    if "task" not in given:
        targets = targets[targets.task == "last"]
    targets = targets.drop(columns=["prediction", "method", "learner", "paper"])
    for key in keys:
        targets[f"key_{key}"] = targets[key].astype(str)
    columns = [f"key_{key}" for key in keys]
    given = given[[*keys, "prediction"]].set_axis([*columns, "prediction"], axis=1)
    both = targets.merge(given, how="outer", on=columns, indicator=True)
    refuse(path, "predicts what is not a target", both[both._merge == "right_only"][columns])
    refuse(path, "predicts a target more than once", both[both.duplicated(columns)][columns])
    refuse(path, "has no prediction of a target", both[both._merge == "left_only"][columns])
    both["prediction"] = pd.to_numeric(both.prediction, errors="coerce")
    refuse(path, "has a prediction that is not a finite number", both[~np.isfinite(both.prediction)][columns])
    return both.drop(columns=[*columns, "_merge"]).assign(learner="external", method=name, paper=False)


def read_table(path):
    """A CSV file's columns as text."""
    data = utils.read_regular(path, "a CSV file of predictions")
    try:
        return pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False)
    except (ValueError, pd.errors.ParserError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is not a CSV file with a header ({reason:.100}): write it again") from error


def refuse(path, what, rows):
    """UserError that names the first of the rows, where there are any."""
    if len(rows) == 0:
        return
    names = [column.removeprefix("key_") for column in rows]
    first = [", ".join(f"{n} {v!r:.40}" for n, v in zip(names, row, strict=True)) for row in rows[:SHOWN].to_numpy()]
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    raise UserError(f"{path} {what} ({'; '.join(first)}{more}): predict each row of targets.csv once")
