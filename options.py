"""Command-line options of all scripts, in one place. Nothing is parsed on import."""

import argparse


def true_or_false(text):
    """The value of a `--flag=True|False` option."""
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"write True or False, not '{text}'")
    return text == "True"


def add_data_options(parser):
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--mode", default="ml-1m", help="data set or file layout (default: %(default)s)")
    add("--data_path", default=None, help="ratings file; default: the data set's place under ./Data")
    add("--min_item", type=int, default=50, help="keep items with at least this many ratings (default: %(default)s)")
    add("--min_sequence", type=int, default=5, help="then keep users with at least this many ratings (default: %(default)s)")
    add("--rating_scale", default=None, metavar="LOW:HIGH", help="rating scale; default: found from the data")
    add("--columns", default=None, metavar="user:U,item:I,rating:R,time:T", help="columns of --mode=csv or parquet, by name or 0-based position")
    add("--sep", default=None, help="column separator of --mode=csv; default: found from the first line")
    add("--skip_bad_rows", action="store_true", help="drop up to 1 %% of rows that cannot be read, and say how many")
    add("--data_url", default=None, help="mirror to download the data set from")
    add("--cache_dir", default=None, help="where parsed data is kept; default: beside the data")
