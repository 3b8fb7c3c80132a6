"""A data set -> one table of users' ratings in time order: download, filters, ids, scale, cache.

What is in a data set, before and after the filters; then a file of your own, with a picture:

    python datasets.py --mode=ml-1m
    python datasets.py --mode=csv --data_path=my.csv --columns=user:0,item:1,rating:2 --plot=my.png
"""

import argparse

import numpy as np

from evaluation import metrics
from options import add_data_options
from ratings import table
from utils import UserError, run_script

# -----------------------------------------------------------------------------
# From rows to ratings


# -----------------------------------------------------------------------------
# Cache: a line with the checksum of the rest, a line of JSON, then the arrays


# -----------------------------------------------------------------------------
# The data table


def describe(columns, levels, longest):
    """What the data table says of rows by user and time: a dict of name -> number or text."""
    lengths = np.bincount(columns.users)
    lengths = lengths[lengths > 0]
    tied = (np.diff(columns.users) == 0) & (np.diff(columns.times) == 0)
    ties = np.append(tied, False) | np.append(False, tied)
    days = [str(np.datetime64(int(time), "s"))[:10] for time in (columns.times.min(), columns.times.max())]
    histogram = np.bincount(table.nearest_level(columns.ratings, levels), minlength=len(levels))
    return {
        "users": len(lengths),
        "items": len(np.unique(columns.items)),
        "ratings": len(columns.ratings),
        "mean length": lengths.mean(),
        f"mean length, last {longest}": np.minimum(lengths, longest).mean(),
        "balance score": metrics.balance(histogram),
        "share of ties": ties.mean(),
        "first day": days[0],
        "last day": days[1],
    }


def print_table(path, before, after, ratings, notes):
    """The data table, before and after the filters."""
    print(f"{path}\n\n{'':<24}{'file':>14}{'filtered':>14}")
    for name, value in before.items():
        texts = [
            cell if isinstance(cell, str) else f"{cell:,}" if isinstance(cell, int) else f"{cell:.3f}"
            for cell in (value, after[name])
        ]
        print(f"{name:<24}{texts[0]:>14}{texts[1]:>14}")
    listed = " ".join(f"{level:g}" for level in ratings.levels)
    print(f"{'scale':<24}{ratings.low:g} to {ratings.high:g}, levels {listed}")
    for note in notes or ["no row was dropped"]:
        print(note)


def plot(file, ratings):
    """Save a picture of the filtered ratings: their histogram, users' lengths and users' balance."""
    from matplotlib.figure import Figure  # takes a second to import

    level = table.nearest_level(ratings.values, ratings.levels)
    lengths, n_levels = np.diff(ratings.offsets), len(ratings.levels)
    of_user = np.repeat(np.arange(len(lengths)), lengths)
    histograms = np.bincount(of_user * n_levels + level, minlength=len(lengths) * n_levels).reshape(-1, n_levels)
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.bar([f"{each:g}" for each in ratings.levels], histograms.sum(0))
    left.set(xlabel="rating", ylabel="ratings")
    middle.hist(lengths, bins=np.geomspace(lengths.min(), lengths.max() + 1, 40))
    middle.set(xlabel="ratings of a user", ylabel="users", xscale="log")
    right.hist(metrics.balance(histograms), bins=40, range=(0, 1))
    right.set(xlabel="balance score of a user", ylabel="users")
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot={file} cannot be written: {error}") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_options(parser)
    parser.add_argument("--max_seq_len", type=int, default=30, help="cut for the mean length (default: %(default)s)")
    parser.add_argument("--plot", nargs="?", const="ratings.png", metavar="FILE", help="save a picture too")
    options = parser.parse_args()
    path = table.find_data(options)
    columns, notes = table.load_columns(path, options)
    kept = table.filter_rows(columns, options)
    ratings = table.build_ratings(columns, kept, options)
    tables = [describe(rows, ratings.levels, options.max_seq_len) for rows in (columns, kept)]
    print_table(path, *tables, ratings, notes)
    if options.plot:
        plot(options.plot, ratings)


if __name__ == "__main__":
    run_script(main)
