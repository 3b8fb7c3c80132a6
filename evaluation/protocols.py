"""Other papers' protocols, for `compare.py --protocol`: how they split the data, what they measure, what they found.

MeLU (Lee et al., KDD 2019) on MovieLens-1M. Items are existing or new by the year in their titles; users by chance, 80
to 20. That makes four partitions of the ratings. In each, the users with 13 to 100 ratings are kept; 10 of a user's
ratings, drawn at random, are the queries, and the others the support. Existing users' ratings of existing items are
what is trained on. The paper tests on the same; here the queries of a tenth of these users are kept out of training,
and the partition "warm" is these users.

The partitions' users become test users of one file of ratings, whose last ten are the queries: everything else is done
by main.py, pretrain.py and the figures of order on these last ten.
"""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import dataloader
import utils
from evaluation import baselines, evaluate, metrics, predictions, tables
from models import checkpoint
from ratings import cache, table
from ratings.titles import read_rows, split_year
from utils import UserError

PROTOCOLS = ("melu",)
PARTITIONS = {"user-cold": (True, False), "warm": (False, False), "item-cold": (False, True), "both cold": (True, True)}
PREFIX = "melu/"  # a test user is called melu/<partition>/<user>
FEWEST, MOST = 13, 100  # ratings of a user in a partition
QUERIES = metrics.ORDER_TARGETS
LAST_YEAR = 1997  # of existing items
NEW_USERS = 0.2
WARM_SHARE = 10  # one warm user in ten is tested
RIDGE = 5.0  # items that pull what genres and decade say of an item table to nothing
TITLES = ("movies.dat", "movies.csv")
UNUSED = {"min_item", "min_sequence", "num_test_data", "num_folds", "columns", "sep", "encoding", "unrated"}
UNUSED |= {"skip_bad_rows", "drop_outside"}  # options that would hold for the file of a draw, too

FIGURES = {"mae": "MAE", "mae_median": "MAE of medians", "ndcg@1": "nDCG@1", "ndcg@3": "nDCG@3"}
FIGURES |= {"exp_ndcg@1": "nDCG@1, 2^r - 1", "exp_ndcg@3": "nDCG@3, 2^r - 1"}
SOURCE = "published, Lee et al. 2019"
PUBLISHED = {  # user-cold: MAE, nDCG@1, nDCG@3
    "PPR": (1.0748, 0.8299, 0.8468),
    "Wide & Deep": (1.0694, 0.8559, 0.8639),
    "MeLU, 1 step": (0.7884, 0.8799, 0.8810),
    "MeLU, 5 steps": (0.7854, 0.8803, 0.8812),
}
ABOUT = """Means over {seeds} draws of users and queries, in brackets the standard deviation between draws.
MAE is the mean over users of a user's mean absolute error. *MAE of medians* is that of rating levels in place of the
predictions: predictions are means, while the absolute error is least at the median. The map from predictions to levels
rises, has one boundary between neighbouring levels, and is learned for each row on validation users, a part of the
existing users. Published MAEs compare with the column MAE.

nDCG orders the ten queries of a user by prediction. Gains are the ratings or, in the last two columns, 2^r - 1, as
MeLU's paper states. Random order, the row of the global mean, has {linear} at 1 with ratings as gains and
{power} with 2^r - 1. No method that was tried comes near the published figures with 2^r - 1. They compare with
nDCG@1 and nDCG@3. *Popularity* orders by the number of training ratings.

No training rating tells of new items. Their effects, factors and embeddings are predicted from genres and decade, by a
ridge regression on the existing items. The published methods see more of users and items, such as age, occupation and
actors.

Users of the partition *warm* were trained on, without their queries. The paper tests on queries that it trains on."""


# -----------------------------------------------------------------------------
# the split


def prepare(options, path, seed):
    """Write the ratings of a draw to a CSV file: those of test users, whose last ten are queries, and those that are
    trained on. Each user's are in random order."""
    options.min_item, options.min_sequence = 0, 2  # the protocol has no filters
    ratings, rng = cache.load_ratings(options), utils.random_stream(seed)
    items = read_items(options, ratings)
    utils.write_atomic(path.with_name("items.csv"), items.to_csv(index_label="item").encode())
    n_users = len(ratings.user_ids)
    owner = np.repeat(np.arange(n_users), np.diff(ratings.offsets))
    columns = {"user": ratings.user_ids[owner], "item": ratings.item_ids[ratings.items], "rating": ratings.values}
    columns["new_user"] = (rng.permutation(n_users) < round(NEW_USERS * n_users))[owner]
    columns["new_item"] = (items.year.to_numpy() > LAST_YEAR)[ratings.items]
    frame, parts = pd.DataFrame(columns).sample(frac=1, random_state=rng), []
    for name, (new_user, new_item) in PARTITIONS.items():
        part = frame[(frame.new_user == new_user) & (frame.new_item == new_item)]
        part = part[part.groupby("user").user.transform("size").between(FEWEST, MOST)]
        if name == "warm":  # the only part that is trained on, but for the queries of some
            tested = part.user.isin(rng.permutation(part.user.unique())[: -(-part.user.nunique() // WARM_SHARE)])
            query = part.groupby("user").cumcount(ascending=False) < QUERIES
            parts.append(part[~(tested & query)])
            part = part[tested]
        parts.append(part.assign(user=f"{PREFIX}{name}/" + part.user))
    if not all(map(len, parts)):
        raise UserError(f"--protocol=melu: no user has {FEWEST} to {MOST} ratings in each partition; use larger data")
    frame = pd.concat(parts)[["user", "item", "rating"]].assign(timestamp=range(sum(map(len, parts))))
    utils.write_atomic(path, frame.to_csv(index=False).encode())


def read_items(options, ratings):
    """What the file of titles beside the ratings says of the items, by their ids: the year, and a column of 0 and 1 for
    each genre and decade. New items count to the last decade of the existing ones."""
    folder = table.find_data(options).parent
    paths = [folder / name for name in TITLES if (folder / name).exists()]
    if not paths:
        raise UserError(f"--protocol=melu needs titles with years: put {' or '.join(TITLES)} into {folder}")
    known = {cells[0]: cells[1:] for _, cells in read_rows(paths[0], "a file of item ids, titles and genres")}
    ids = ratings.item_ids.tolist()
    years = [split_year(known.get(item, [""])[0])[1] for item in ids]
    if None in years:
        raise UserError(
            f"{paths[0]} gives no year, such as (1995), in the title of item {ids[years.index(None)]}: add it"
        )
    year, genres = pd.Series(years, ids).astype(int), pd.Series(["|".join(known[item][1:]) for item in ids], ids)
    decade = pd.get_dummies(year.clip(upper=LAST_YEAR) // 10, prefix="decade", dtype=int)
    return pd.concat([year.rename("year"), genres.str.get_dummies(), decade], axis=1)


def words(path):
    """The options with which main.py and pretrain.py train and test on a file of `prepare`."""
    return ["--mode=csv", f"--data_path={path}", "--min_item=0", "--min_sequence=2", f"--test_prefix={PREFIX}"]


# -----------------------------------------------------------------------------
# predictions


def score_run(path, cell, options, folder):
    """Keep the predictions of a run's best checkpoint for the queries, and for validation users."""
    system, _, problem, _ = evaluate.load_system(checkpoint.checkpoint_path(folder), options)
    fill = item_prior(problem, options)
    for member in system.members:
        for values in member.learner.tables().values():
            values.data[1:] = torch.from_numpy(fill(values.data[1:].cpu().numpy()))
    score(path, cell, options, problem, {cell.method: partial(evaluate.evaluate_order, system, problem)}, {})


def score_simple(path, cell, options):
    """The same for the simple predictors and for popularity."""
    problem = dataloader.load_problem(options)
    ratings, longest = problem.ratings, options.max_seq_len - 1
    predictors, chosen = baselines.fit_baselines(ratings, problem.train, problem.validation, options.max_seq_len)
    count, fill = dataloader.count_ratings(problem).astype(np.float64), item_prior(problem, options)
    for name, predictor in predictors.items():
        tables_filled = (fill(each) if np.ndim(each) else each for each in predictor.args)
        predictors[name] = partial(predictor.func, *tables_filled)
    predictors["popularity"] = lambda support: count[support.target_item]
    scorers = {n: partial(evaluate.score_order, p, ratings, longest) for n, p in predictors.items()}
    score(path, cell, options, problem, scorers, {"constants": chosen})


def item_prior(problem, options):
    """A function that gives an item table (n_items, ...) rows for the items without training ratings: by a ridge
    regression of the other items' rows on genres and decade."""
    items = pd.read_csv(Path(options.data_path).with_name("items.csv"), dtype={"item": str}).set_index("item")
    features = items.drop(columns="year").loc[problem.ratings.item_ids.astype(str)].to_numpy(np.float64)
    features = np.pad(features, ((0, 0), (1, 0)), constant_values=1)
    new = dataloader.count_ratings(problem) == 0
    gram = features[~new].T @ features[~new] + RIDGE * np.eye(features.shape[1])

    def fill(values):
        filled = values.copy()
        filled[new] = features[new] @ np.linalg.solve(gram, features[~new].T @ values[~new])
        return filled

    return fill


def score(path, cell, options, problem, scorers, about):
    """Write the predictions of {method: function of users that gives `Scored`}."""
    tasks = {"order": problem.test, "validation": problem.validation}
    parts = [
        predictions.rows(scorer(users), task, options.max_seq_len - 1, method)
        for method, scorer in scorers.items()
        for task, users in tasks.items()
    ]
    predictions.write(path, cell, options, problem, pd.concat(parts), about)


# -----------------------------------------------------------------------------
# figures


def boundaries(prediction, target, levels):
    """Where predictions go from one level to the next, (n_levels - 1,): each where it parts the targets at or below
    the level from those above it with the fewest errors. Mapping to levels so has the least absolute error."""
    values, place = np.unique(prediction, return_inverse=True)
    middle = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
    found = []
    for level in levels[:-1]:
        above = np.bincount(place, np.where(target > level, 1, -1))
        found.append(middle[np.append(0, np.cumsum(above)).argmin()])
    return np.array(found)


def figures(rows, scale, levels):
    """FIGURES of one method's `rows` of one draw, {partition: {name: value}}, with the number of users."""
    rows = rows.assign(error=abs(rows.prediction.clip(*scale) - rows.target))
    known, found = rows[rows.task == "validation"], {}
    cuts = boundaries(known.prediction.to_numpy(), known.target.to_numpy(), levels)
    median = levels[np.searchsorted(cuts, rows.prediction)]
    rows = rows.assign(median_error=abs(median - rows.target))
    for name in PARTITIONS:
        part = rows[rows.user.str.startswith(f"{PREFIX}{name}/")]
        columns = part.user, part.target, part.prediction
        users, linear = metrics.order_by_user(*columns, scale[0])
        _, power = metrics.order_by_user(part.user, 2.0**part.target - 1, part.prediction, 0)
        mae, median = part.groupby("user")[["error", "median_error"]].mean().mean()
        values = mae, median, *(gains[f"ndcg@{k}"].mean() for gains in (linear, power) for k in (1, 3))
        found[name] = dict(zip(FIGURES, values, strict=True)) | {"users": len(users)}
        if rows.method.iloc[0] == "popularity":  # no ratings
            found[name] |= {"mae": np.nan, "mae_median": np.nan}
    return found


def report(folder, paths):
    """Write table.md and table.csv of the kept predictions {cell: path}; the Markdown text."""
    rows, known = [], []
    for cell, path in paths.items():
        frame = predictions.read(path)
        known.append(frame.attrs)
        scale, levels = frame.attrs["scale"], np.array(frame.attrs["levels"])
        frame.attrs = {}
        for method, own in frame.groupby("method", sort=False):
            group = {"learner": cell.learner, "method": method, "paper": cell.paper}
            found = figures(own, scale, levels).items()
            rows += [{"partition": name, **group, "seed": cell.seed, **values} for name, values in found]
    rows = pd.DataFrame(rows)
    text = "\n\n".join(["# MeLU's protocol", *(section(name, rows[rows.partition == name]) for name in PARTITIONS)])
    chance = rows[(rows.partition == "user-cold") & (rows.method == "global mean")].mean(numeric_only=True)
    linear, power = metrics.text(chance["ndcg@1"]), metrics.text(chance["exp_ndcg@1"])
    made = "; ".join(tables.listed_of(known, name) for name in ("commit", "torch", "hardware"))
    about = ABOUT.format(seeds=rows.seed.nunique(), linear=linear, power=power)
    text += f"\n\n{about}\n\nCommit, torch, machine: {made}.\n"
    utils.write_atomic(folder / "table.md", text.encode())
    utils.write_atomic(folder / "table.csv", tables.as_csv(rows.to_dict("records")))
    return text


def section(name, rows):
    """A partition's table in Markdown, below the published figures where there are any."""
    blank, lines = ["--"] * 3, []
    for method, (mae, *gains) in PUBLISHED.items() if name == "user-cold" else ():
        lines.append([SOURCE, method, metrics.text(mae), "--", *map(metrics.text, gains), *blank])
    for group, own in rows.groupby(["learner", "method", "paper"], sort=False):
        mean, spread = own[list(FIGURES)].mean(), own[list(FIGURES)].std()
        values = [metrics.text(mean[f]) + ("" if np.isnan(spread[f]) else f" ({spread[f]:.4f})") for f in FIGURES]
        lines.append([tables.learner_name(group), tables.title(group), *values, f"{own.users.mean():.0f}"])
    return f"## {name}\n\n" + tables.markdown(["learner", "method", *FIGURES.values(), "users"], lines)
