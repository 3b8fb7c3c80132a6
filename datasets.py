"""What is in a data set, before and after the filters; docs/DATA.md lists the files that can be read.

python datasets.py --mode=ml-1m
python datasets.py --mode=csv --data_path=my.csv --columns=user:0,item:1,rating:2 --plot=my.png
"""

import io
import os
from pathlib import Path

import numpy as np

import options as option_module
from evaluation import metrics
from ratings import table
from utils import UserError, run_script, shorten, write_output

PICTURES = (".png", ".svg", ".pdf")


def describe(columns, levels, longest):
    """What the data table says of rows by user and time: a dict of name -> number or text."""
    lengths = np.bincount(columns.users)
    lengths = lengths[lengths > 0]
    tied = (np.diff(columns.users) == 0) & (np.diff(columns.times) == 0)
    ties = np.append(tied, False) | np.append(False, tied)
    histogram = np.bincount(table.nearest_level(columns.ratings, levels), minlength=len(levels))
    found = {
        "users": len(lengths),
        "items": len(np.unique(columns.items)),
        "ratings": len(columns.ratings),
        "mean length": lengths.mean(),
        f"mean length, last {longest}": np.minimum(lengths, longest).mean(),
        "balance score": metrics.balance(histogram),
        "share of ties": ties.mean(),
    }
    if columns.unit:
        for name, time in (("first day", columns.times.min()), ("last day", columns.times.max())):
            found[name] = str(np.datetime64(int(time / columns.unit), "s"))[:10]
    return found


def print_table(path, before, after, ratings, notes):
    """The data table, before and after the filters."""

    def text(value):
        return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"

    rows = [[name, text(value), text(after[name])] for name, value in before.items()]
    print(f"{shorten(path, 500)}\n\n{metrics.aligned([['', 'file', 'filtered'], *rows])}")
    listed = " ".join(f"{level:g}" for level in ratings.levels)
    print(f"scale from {ratings.low:g} to {ratings.high:g}, levels {listed}")
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
    data = io.BytesIO()
    figure.savefig(data, format=Path(file).suffix[1:])
    write_output(file, data.getvalue())


def parse(argv=None):
    """The options of this script; UserError for impossible ones."""
    parser = option_module.Parser(__doc__)
    option_module.add_data_options(parser)
    add = option_module.group(parser, "table")
    add("max_seq_len", 30, option_module.count(2), "cut for the mean length")
    add("plot", None, option_module.path, "save a picture too", nargs="?", const="ratings.png", metavar="FILE")
    options = parser.parse_args(argv)
    if options.plot and Path(options.plot).suffix not in PICTURES:
        raise UserError(f"--plot={options.plot} must end in {', '.join(PICTURES)}")
    if options.plot and not os.path.isdir(Path(options.plot).parent):
        raise UserError(f"--plot={options.plot}: there is no folder {Path(options.plot).parent}")
    return options


def main(argv=None):
    options = parse(argv)
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
