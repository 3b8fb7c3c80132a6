"""LensKit's bias model and matrix factorisation as rows of the tables: how another program is compared with ours.

    python compare.py --export_targets targets --mode=ml-1m --folds 0
    python examples/lenskit_rows.py targets
    python compare.py --output results/ml-1m --report_only --external "LensKit bias=targets/bias.csv" \\
        "LensKit ALS=targets/als.csv"

It reads nothing but the exported CSV files. For each fold it trains on training.csv and predicts every row of
targets.csv from the rows of support.csv with the same task and user. Last ratings are also predicted from fewer rows.
"""

import argparse
from pathlib import Path

import pandas as pd
from lenskit import als, basic, data, training


def read(path):
    """Users and items are text, whose zeros in front count."""
    return pd.read_csv(path, dtype={"user": str, "item": str})


def predict(scorer, support, targets):
    """A trained scorer's predictions of all targets, a column beside them."""
    known, parts = dict(list(support.groupby(["task", "user", "shots"]))), []
    for key, rows in targets.groupby(["task", "user", "shots"]):
        mine = known.get(key, support.head(0))
        history = data.ItemList(item_ids=mine.item.to_numpy(str), rating=mine.rating.to_numpy()) if len(mine) else None
        found = scorer(data.RecQuery(history_items=history), data.ItemList(item_ids=rows.item.to_numpy(str)))
        parts.append(rows.assign(prediction=found.scores()))
    return pd.concat(parts).sort_index()


def with_fewer(support, targets, shots):
    """Supports and targets with a column `shots`: last ratings with the last 0, 1, ... ratings of their support."""
    last, known = targets[targets.task == "last"], support[support.task == "last"].groupby("user")
    fewer = [known.tail(n).assign(shots=n) for n in shots[:-1]], [last.assign(shots=n) for n in shots[:-1]]
    full = support.assign(shots=shots[-1]), targets.assign(shots=shots[-1])
    return [pd.concat([whole, *parts], ignore_index=True) for whole, parts in zip(full, fewer, strict=True)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="what compare.py --export_targets wrote")
    parser.add_argument("--item_damping", type=float, default=10)
    parser.add_argument("--user_damping", type=float, default=5)
    usual = [0, 1, 2, 3, 5, 10, 20, 29]
    parser.add_argument("--shots", type=int, nargs="+", default=usual, help="known ratings of a user, all of them last")
    args = parser.parse_args(argv)
    damping, parts = {"item": args.item_damping, "user": args.user_damping}, {"bias": [], "als": []}
    for fold in sorted(args.folder.glob("fold*-seed*")):
        rated, support, targets = (read(fold / f"{name}.csv") for name in ("training", "support", "targets"))
        number, seed = fold.name.removeprefix("fold").split("-seed")
        targets = targets.drop(columns="rating").assign(fold=number, seed=seed)
        support, targets = with_fewer(support, targets, args.shots)
        table = data.from_interactions_df(rated.rename(columns={"user": "user_id", "item": "item_id"}))
        bias = basic.BiasScorer(damping=damping)
        factors = als.BiasedMFScorer(embedding_size=20, regularization=0.1, damping=damping)
        for scorer in (bias, factors):
            scorer.train(table, training.TrainingOptions(rng=0))
        parts["bias"].append(predict(bias, support, targets))
        found = predict(factors, support, targets)  # nan where an item has no training rating
        parts["als"].append(found.fillna({"prediction": parts["bias"][-1].prediction}))
    for name, frames in parts.items():
        pd.concat(frames).to_csv(args.folder / f"{name}.csv", index=False)
        print(args.folder / f"{name}.csv")


if __name__ == "__main__":
    main()
