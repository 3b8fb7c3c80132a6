"""Command-line options of all scripts, in one place. Nothing is parsed on import."""

import argparse
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import utils
from utils import UserError, printable, shorten


class Entry(NamedTuple):
    """A learner: its name in tables, the class of its encoder, the options that size it.

    `recurrent`: the state at a position of a window depends on the window's start, not on its end.
    """

    title: str
    encoder: str  # module:class; see `models.learner` for what it must do
    hidden: str = "bert_hidden_units"
    layers: str = "bert_num_blocks"
    heads: str = "bert_num_heads"
    recurrent: bool = False


LEARNERS = {
    "bert4rec": Entry("BERT4Rec", "models.bert4rec:BERT4Rec"),
    "narm": Entry("NARM", "models.narm:NARM", "narm_hidden_size", "narm_n_layers", recurrent=True),
    "sasrec": Entry("SASRec", "models.sasrec:SASRec"),
    "gru4rec": Entry("GRU4Rec", "models.gru4rec:GRU4Rec", "gru4rec_hidden_size", "gru4rec_n_layers", recurrent=True),
    "meanpool": Entry("Mean pooling", "models.meanpool:MeanPool", recurrent=True),
}
LOSS_NETWORKS = {  # --loss_network: module:class; see `models.loss_network` for what it must do
    "lstm": "models.loss_network:LSTMLoss",
    "mlp": "models.loss_network:MLPLoss",
    "metal": "models.loss_network:MetaLoss",
}

# The published method: plain head, every parameter adapts, LSTM weights, 16 tasks an iteration, and the original's
# other defaults.
PAPER_FORM = {
    "head": "plain", "adapt": "all", "num_inner_steps": 3, "inner_lr": 1e-3, "inner_damping": 0.0,
    "loss_network": "lstm", "lstm_hidden": 32, "lstm_input_size": 16, "normalize_loss": True,
    "use_multi_step": True, "multi_step_loss_num_epochs": 1000, "members": 1, "balance": 0.0, "gru4rec_n_layers": 2,
    "batch_size": 16, "num_samples": 25, "num_query_set": 3, "full_support": 1.0,
    "num_train_iterations": 2000, "outer_lr": 1e-3, "min_outer_lr": 1e-4, "item_lr": 1e-4, "learn_lr": 1e-1,
    "loss_lr": 1e-2, "task_info_lr": 1e-2, "lstm_lr": 1e-2,
    "pretrain_epochs": 100, "pretraining_lr": 1e-3, "val_size": 600, "log_interval": 50,
}  # fmt: skip
# What the authors' code does otherwise than their paper says, and its learning rates; see docs/METHOD.md.
CODE_FORM = {**PAPER_FORM, "normalize_loss": False, "item_lr": 1e-3, "learn_lr": 1e-2, "lstm_lr": 1e-1}
FORMS = {False: {}, True: PAPER_FORM, "code": CODE_FORM}  # --paper_form


class Parser(argparse.ArgumentParser):
    """Refuses abbreviations, and reports a wrong option as one sentence without the usage text."""

    def __init__(self, description=None, usage="%(prog)s [options]", **more):
        super().__init__(description=description, usage=usage, formatter_class=Help, allow_abbrev=False, **more)

    def error(self, message):
        raise UserError(f"{shorten(message, 300)} (see --help)")

    def _get_values(self, action, words):
        if words == ["--"]:  # --mode=-- would give an empty list
            self.error(f"argument --{action.dest}: '--' is no value")
        if action.type is str and (odd := [word for word in words if not is_utf8(word)]):
            self.error(f"argument --{action.dest}: '{shorten(odd[0])}' is not UTF-8")
        return super()._get_values(action, words)


def is_utf8(text):
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows the default of each option that has one."""

    def _get_help_string(self, action):
        hidden = action.default in (None, argparse.SUPPRESS, False) or "default: " in action.help
        return action.help + ("" if hidden else " (default: %(default)s)")


# -----------------------------------------------------------------------------
# converters: text from the command line -> a value; argparse makes their ArgumentTypeError a UserError


def true_or_false(text):
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"write True or False, not '{shorten(text)}'")
    return text == "True"


def paper_form(text):
    return text if text == "code" else true_or_false(text)


def number(kind, low, high, infinite=False):
    """A converter for finite numbers of `kind` (int or float) from low to high, and for inf if `infinite`."""
    digits = r"[+-]?[0-9]+" if kind is int else r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
    name = "a whole number" if kind is int else "a finite number"

    def convert(text):
        if infinite and text == "inf":
            return float(text)
        if not re.fullmatch(digits, text):
            raise argparse.ArgumentTypeError(f"'{shorten(text)}' is not {name}")
        value = float(text) if kind is float or len(text) > 40 else int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{shorten(text)} is out of range; it must be from {low} to {high}")
        return kind(value) + 0  # no -0.0

    return convert


def count(low=1, high=10**9):
    return number(int, low, high)


def real(low=0.0, high=1e9, infinite=False):
    return number(float, low, high, infinite)


def path(text):
    """A path that the file system can hold, whether or not something is there."""
    try:
        if not text or "\0" in text:
            raise argparse.ArgumentTypeError("give the path of a file or folder")
        name = max(os.fsencode(text).decode().split("/"), key=len)
        os.lstat(name if len(name) > 200 else text)  # a long name is refused by itself, whatever folders there are
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"'{shorten(text)}' is not UTF-8: rename the file or folder") from None
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long, a folder without permission
        raise argparse.ArgumentTypeError(f"{shorten(text)}: {error.strerror}; give another path") from None
    return text


def folder(text):
    return Path(path(text))


def group(parser, title):
    """`add(name, default, kind, help)` for a titled group; `kind` is a converter, or bool for a switch."""
    titled = parser.add_argument_group(title)

    def add(name, default, kind, text, **more):
        if kind is bool:  # --name alone, or as the original writes it
            kind, more = true_or_false, {"nargs": "?", "const": True, "metavar": "True|False", **more}
        return titled.add_argument(f"--{name}", default=default, type=kind, help=text, **more)

    return add


# -----------------------------------------------------------------------------
# data


def add_layout_options(add):
    """How to read a ratings file, for the group that `add` belongs to."""
    add("columns", None, str, "columns of a csv or parquet file, by name or number from 0", metavar="user:U,item:I,...")
    add("sep", None, str, r"column separator of a csv file, \s+ for blanks; default: found from the first lines")
    add("encoding", None, str, "the text's encoding, such as latin-1 or utf-16; default: UTF-8")
    add("skip_bad_rows", False, bool, "drop up to 1 %% unreadable rows, and say which")
    add("unrated", None, str, "drop rows with these ratings, which the file uses for 'not rated'", metavar="V[,V]")
    add("drop_outside", False, bool, "drop rows whose rating is outside the scale, however many they are")


def add_data_options(parser):
    add = group(parser, "data")
    add("mode", "ml-1m", str, "ml-100k to ml-32m, ml-latest[-small], amazon, yelp, sample; csv or parquet: your own")
    add("data_path", None, path, "ratings file; default: the data set's place under ./Data")
    add("min_item", 50, count(0), "keep items with at least this many ratings")
    add("min_sequence", 5, count(2), "then keep users with at least this many ratings")
    add("rating_scale", None, str, "rating scale; default: found from the data", metavar="LOW:HIGH")
    add_layout_options(add)
    add("data_url", None, str, "mirror to download the data set from")
    add("cache_dir", None, path, "folder for parsed data; default: beside the data")


def add_split_options(parser):
    add = group(parser, "split of users")
    add("random_seed", 222, count(0, 2**32 - 2), "seed of the split and of all sampling")
    add("num_test_data", 0, count(0), "number of test users, where --fold is -1; 0 = a sixth, at most 1,000")
    add("fold", -1, count(-1), "test on this fold of --num_folds; -1 = draw --num_test_data users instead")
    add("num_folds", 6, count(2), "number of folds that all users are divided into")
    add("test_prefix", "", str, "test on the users whose ids begin with this text, a split of your own")
    add("val_size", 1000, count(), "validate on at most this many validation users")
    add("num_train_users", 0, count(0), "train on this many of the training users; 0 = all")


# -----------------------------------------------------------------------------
# tasks, learner, inner loop, loss network


def add_task_options(parser):
    add = group(parser, "tasks")
    add("max_seq_len", 30, count(2, 10_000), "most ratings of a user that are used, the target included")
    add("num_samples", 1, count(1, 1000), "support windows of a task; the first is the whole support")
    add("min_sub_window_size", 2, count(1, 10_000), "fewest ratings in a support window")
    add("num_query_set", 10, count(1, 10_000), "most queries of a task in training; evaluation has the last rating")
    text = "train on all positions of --num_query_set windows that end at one query; default: with --paper_form=code, "
    add("query_windows", None, bool, text + "and in pretrain.py with any --paper_form")
    add("full_support", 0.25, real(0, 1), "share of training tasks with their whole support; others have part of it")


def add_learner_options(parser):
    add = group(parser, "learner")
    layers, units = count(1, 64), count(1, 8192)
    add("model", "bert4rec", str, "sequence encoder", choices=list(LEARNERS))
    heads = {"choices": ["joint", "plain"]}
    add("head", "joint", str, "joint: effects, factors and sequence state; plain: the state alone", **heads)
    add("num_factors", 16, count(1, 256), "most item factors (joint head); those that ratings do not support vanish")
    add("model_init_seed", 5, count(0, 2**32 - 1), "seed of the initial weights")
    add("bert_num_blocks", 2, layers, "blocks of BERT4Rec and SASRec")
    add("bert_num_heads", 4, units, "attention heads of BERT4Rec and SASRec")
    add("bert_hidden_units", 32, units, "hidden size of BERT4Rec and SASRec")
    add("narm_hidden_size", 32, units, "hidden size of NARM")
    add("narm_n_layers", 1, layers, "layers of each of NARM's encoders")
    add("gru4rec_hidden_size", 32, units, "hidden size of GRU4Rec")
    add("gru4rec_n_layers", 1, layers, "layers of GRU4Rec")


RATE = real(0, 1e30)
POSITIVE = real(1e-9, 1e30)
MOST_TASKS = 1 << 16  # of an iteration; more would take minutes before the first line


def add_inner_options(parser):
    add = group(parser, "inner loop")
    add("num_inner_steps", 3, count(0, 1000), "gradient steps on a user's support ratings; 0 = none (pretrain.py)")
    add("adapt", "head", str, "the steps change the head's user parameters or everything", choices=["head", "all"])
    add("inner_lr", None, POSITIVE, "first value of the inner rates; default: 1 for the joint head alone, else 0.05")
    add("use_learnable_params", True, bool, "learn the inner rates and dampings")
    add(
        "inner_damping",
        None,
        real(),
        "first lambda, in ratings; default: for the joint head alone from the data, else 4",
    )
    add("use_second_order", None, bool, "differentiate through the steps; default: unless it is FO-MAML")
    add("use_multi_step", True, bool, "multi-step loss: score queries after every inner step, annealed to the last")
    add("multi_step_loss_num_epochs", 300, count(), "iterations over which the multi-step loss is annealed")


def add_loss_options(parser):
    add = group(parser, "task-adaptive loss")
    add("use_adaptive_loss", True, bool, "learn a loss per user (MELO); False: squared error (MAML)")
    add("loss_network", "mlp", str, "the network that gives the weights", choices=list(LOSS_NETWORKS))
    add("normalize_loss", False, bool, "scale the weights to mean 1 over a user's support")
    add("use_step_loss", True, bool, "one loss network for each inner step (mlp, metal)")
    add("loss_num_layers", 1, count(1, 64), "hidden layers of the mlp")
    add("lstm_hidden", 16, count(1, 8192), "hidden size of the loss network")
    add("lstm_num_layers", 1, count(1, 64), "layers of the lstm")
    add("lstm_input_size", 5, count(2, 8192), "width of the embedded ratings of the lstm")
    for name in ("loss", "predictions", "labels", "rating_mean", "rating_std", "num_samples"):
        add(f"task_info_{name}", True, bool, f"mlp and metal see {name.replace('_', ' ')}")


# -----------------------------------------------------------------------------
# outer loop, pretraining, runs


def add_outer_options(parser):
    add = group(parser, "outer loop")
    add("num_train_iterations", None, count(0), "meta-iterations; default: 18 tasks per training user, at least 250")
    add("batch_size", 128, count(1, MOST_TASKS), "tasks an iteration")
    add("task_chunk", 0, count(0, MOST_TASKS), "tasks in memory at once; 0 = as many as the processor's cache holds")
    add("outer_lr", 3e-3, POSITIVE, "learning rate of the learner, which falls as a cosine")
    add("min_outer_lr", 1e-4, RATE, "the value it falls to; all other rates fall in proportion")
    text = "learning rate of the item tables; default: 0 for the joint head, else 3e-4 or, in pretrain.py with a "
    add("item_lr", None, RATE, text + "--paper_form, --pretraining_lr")
    add("learn_lr", 1e-2, RATE, "learning rate of the inner rates")
    add("loss_lr", 3e-3, RATE, "learning rate of the mlp and metal loss networks")
    add("task_info_lr", 1e-2, RATE, "learning rate of the metal loss's shift for the task")
    add("lstm_lr", 1e-2, RATE, "learning rate of the lstm loss network")
    add("members", 1, count(1, 64), "learners trained side by side, each with its own seed; predictions are their mean")
    add("balance", 0.0, real(0, 10), "weight of a rating in the meta-objective: its rarity to this power")
    add("sparse_items", False, bool, "update only the item rows that an iteration uses; for large catalogues")


def add_pretrain_options(parser):
    add = group(parser, "pretraining")
    add("pretraining_batch_size", 128, count(1, MOST_TASKS), "tasks an iteration of pretrain.py")
    add("pretrain_epochs", 10, count(1, 10**6), "tasks per training user without --num_train_iterations, at least 250")
    add("pretraining_lr", 3e-3, POSITIVE, "learning rate of pretrain.py")
    add("load_pretrained_embedding", False, bool, "start from the pretrained item tables")
    add("load_pretrained", False, bool, "start from all pretrained weights")
    add("pretrain_log_dir", "./log", path, "where pretrain.py keeps its runs")


def add_run_options(parser):
    add = group(parser, "run")
    add("log_dir", "./log", path, "where main.py keeps its runs")
    add("log_interval", 50, count(), "iterations between validations")
    add("checkpoint_minutes", 5.0, real(infinite=True), "minutes between checkpoints; 0 = each iteration, inf = never")
    add("keep_checkpoints", 3, count(), "number of these that are kept beside the best")
    add("keep_models", 0, count(0), "validated models that are kept for --checkpoint_step; 0 = as many as take 1 GiB")
    add("resume", False, bool, "go on from the newest whole checkpoint, with more --num_train_iterations if you like")
    add("overwrite", False, bool, "start again in a folder that holds a run")
    add("checkpoint_step", -1, count(-1), "checkpoint for --test; -1 = the best of validation")
    add("skip_nonfinite", False, bool, "leave out iterations whose loss or gradient is not finite instead of stopping")
    add("device", "auto", str, "where to compute", choices=["auto", "cpu", "cuda"])
    add("cuda_graphs", True, bool, "on a GPU, replay the outer step as one graph instead of launching each operation")
    add("deterministic", False, bool, "use only operations that give the same bits each time on a GPU, as a CPU does")
    add("ranking", False, bool, "with --test: rank each user's last item among all that the user has not rated, too")
    add("test", False, bool, "evaluate a run's checkpoint on its test users, with the options it was trained with")


# -----------------------------------------------------------------------------
# reading them


def build_parser(description):
    """The parser of all options of main.py and pretrain.py."""
    parser = Parser(description)
    add = group(parser, "preset")
    text = "use the values of the paper (True) or of its authors' code; options that are given still count"
    add("paper_form", False, paper_form, text, nargs="?", const=True, metavar="True|False|code")
    for add_options in (
        *(add_data_options, add_split_options, add_task_options, add_learner_options, add_inner_options),
        *(add_loss_options, add_outer_options, add_pretrain_options, add_run_options),
    ):
        add_options(parser)
    return parser


def parse(description, argv=None):
    """The options of main.py. UserError for impossible ones."""
    options = read(description, argv)
    check(options)
    check_command(options)
    if options.num_inner_steps == 0:
        raise UserError("--num_inner_steps must be at least 1: pretrain.py trains without inner steps")
    # Not in `check`, because runs that were trained this way can still be tested and used.
    if options.use_adaptive_loss and not options.use_second_order and not options.test:
        raise UserError("--use_second_order=False cannot train the loss network: add --use_adaptive_loss=False")
    return options


def parse_pretrain(description, argv=None):
    """The options of pretrain.py: a learner without inner steps, in the pretraining's folder."""
    options = read(description, argv, use_adaptive_loss=False, num_train_iterations=None, item_lr=None)
    options.num_inner_steps, options.use_multi_step, options.use_adaptive_loss = 0, False, False
    options.use_second_order = False
    options.outer_lr = options.pretraining_lr
    if options.paper_form and options.item_lr is None:
        options.item_lr = options.pretraining_lr
    options.batch_size, options.log_dir = options.pretraining_batch_size, options.pretrain_log_dir
    check(options)
    check_command(options)
    return options


def make(script=parse, **given):
    """Options from Python, checked as on the command line: `make(mode="sample", members=2)`.

    script: `parse` for main.py, `parse_pretrain` for pretrain.py. UserError for unknown or impossible options.
    """
    return script("", as_words(given))


def read(description, argv=None, **defaults):
    """The options as given, unchecked; `defaults` replaces some defaults."""
    first = Parser(add_help=False)  # the two that choose defaults, so that --help shows these
    first.add_argument("--mode")
    first.add_argument("--paper_form", nargs="?", const=True, type=paper_form, default=False)
    chosen, _ = first.parse_known_args(argv)
    parser = build_parser(description)
    parser.set_defaults(**{**FORMS[chosen.paper_form], **defaults})
    return parser.parse_args(argv)


def given(words, parser=None):
    """{name: value} of the options that `words` of a command line set, for scripts that refuse what they do not use.

    The options are those of `parser`, which loses its defaults and passes over unknown words. Without a parser they are
    those of main.py, and others are a UserError.
    """
    own = parser or build_parser("")
    for action in own._actions:
        action.default = argparse.SUPPRESS
    return vars(own.parse_known_args(words)[0] if parser else own.parse_args(words))


def in_groups(*titles):
    """The names of the options of main.py in the groups with these titles."""
    groups = build_parser("")._action_groups
    return {action.dest for group in groups if group.title in titles for action in group._group_actions}


def as_words(values):
    """Words of a command line that set options to these values; None leaves an option at its default."""
    for name, value in values.items():
        if not isinstance(value, bool | int | float | str | os.PathLike | None):
            raise UserError(f"--{shorten(name)} cannot be a {type(value).__name__}")
        if isinstance(value, int) and value.bit_length() > 1000:
            raise UserError(f"--{shorten(name)} is out of range")
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def differing(options):
    """The options that differ from the plain defaults, as one text; without those of a command, such as places."""
    plain = parse("", []) if options.num_inner_steps else parse_pretrain("", [])
    left_out = {*MAY_CHANGE, *(["num_train_iterations"] if plain.num_train_iterations is None else [])}  # it is counted
    names = [name for name, value in vars(options).items() if name not in left_out and value != getattr(plain, name)]
    return " ".join(f"--{name}={printable(getattr(options, name))}" for name in names)


# -----------------------------------------------------------------------------
# options that were stored with a run, perhaps by another version

# Files, folders and addresses. They never come from a checkpoint, which may be somebody else's.
PLACES = ("data_path", "cache_dir", "data_url", "log_dir", "pretrain_log_dir")

# Options that earlier versions lack, with the value that does what those did, where it is not the default.
BEFORE = {"query_windows": False}

ANY = object()


def removed(options):
    """Options that this version no longer has: {name: the value that it always takes, or ANY where all do the same}."""
    joint = options.get("head", "joint") == "joint"
    return {
        "num_masks": ANY, "checkpoint_interval": ANY, "test_baseline": ANY, "use_rating_input": False,
        "embedding_lr": options.get("item_lr"), "warmup": 50, "clip_norm": 5.0,
        "weight_decay": 0.01 if joint else 0.0, "average": 0.98 if joint else 0.0, "val_targets": 3 if joint else 1,
        "error_heads": 2 if joint else ANY, "cross_fit": 4 if joint else ANY, "init_items": "factors" if joint else ANY,
        "inner_rates": "element" if options.get("adapt", "head") == "head" else "tensor",
        "absolute_weights": options.get("paper_form") == "code" if options.get("loss_network") == "lstm" else ANY,
    } | ({} if joint else {"factor_prior": ANY})  # fmt: skip


# The removed options that decide what a trained system predicts; the others were for training alone.
DECIDES = ("use_rating_input", "error_heads", "inner_rates", "absolute_weights")


def without_removed(stored, gone):
    """Stored options without those that are gone. Those that held another value stay, so that they are refused.

    gone: what `removed` gives.
    """
    known = vars(build_parser("").parse_args([]))
    return {
        name: value
        for name, value in stored.items()
        if name in known or name not in gone or gone[name] is not ANY and gone[name] != value
    }


def restore(stored, given, source):
    """A checkpoint's own options as a Namespace, with those in `given` replaced.

    UserError where they would be refused on the command line, or this version lacks one that matters.
    """
    if not (isinstance(stored, dict) and stored) or not all(isinstance(name, str) for name in stored):
        raise UserError(f"{source} holds no options: use another checkpoint")
    gone = {name: value if name in DECIDES else ANY for name, value in removed(stored).items()}
    values = {n: value for n, value in {**BEFORE, **without_removed(stored, gone)}.items() if n not in PLACES}
    if odd := sorted(values.keys() - vars(read("", [])).keys()):
        odd = ", ".join(f"--{shorten(name)}={shorten(values[name])}" for name in odd)
        raise UserError(f"{source} was written by another version, and this one has no {odd}: train again")
    try:
        options = read("", as_words(values))
        wrong = [name for name, value in values.items() if not same(value, getattr(options, name))]
        if wrong:
            raise UserError(f"wrong kind of value for {', '.join(wrong)}")
        vars(options).update(given)
        check(options)
    except UserError as error:
        raise UserError(f"{source} holds options that cannot be used ({error}): train again") from None
    return options


def same(value, other):
    """Whether two options are equal and of one kind; whole numbers may be stored for others."""
    return value == other and (type(value) is type(other) or (type(value), type(other)) == (int, float))


def check_command(options):
    """Refuse options that the command does not use."""
    if found := [name for name in ("resume", "overwrite") if options.test and getattr(options, name)]:
        raise UserError(f"--{found[0]} does not go with --test: leave it out")
    for name, is_given in (("checkpoint_step", options.checkpoint_step != -1), ("ranking", options.ranking)):
        if is_given and not options.test:
            raise UserError(f"--{name} does not go without --test: leave it out")


def check(options):
    """Refuse impossible combinations of options, which are settled."""
    if not re.fullmatch("[a-z0-9-]{1,40}", options.mode):
        raise UserError(f"--mode={shorten(options.mode)} is no data set: see --help")
    if options.model in ("bert4rec", "sasrec") and options.bert_hidden_units % options.bert_num_heads:
        sizes = f"--bert_hidden_units={options.bert_hidden_units}", f"--bert_num_heads={options.bert_num_heads}"
        raise UserError(f"{sizes[0]} must be a multiple of {sizes[1]}")
    if options.test_prefix and options.fold >= 0:
        raise UserError("--test_prefix chooses the test users: leave out --fold")
    if options.fold >= options.num_folds:
        raise UserError(f"--fold={options.fold} must be below --num_folds={options.num_folds}")
    if (least := options.min_sub_window_size) >= options.max_seq_len:
        raise UserError(f"--min_sub_window_size={least} must be below --max_seq_len={options.max_seq_len}")
    if options.min_outer_lr > options.outer_lr:
        start = "outer_lr" if options.num_inner_steps else "pretraining_lr"
        raise UserError(f"--min_outer_lr={options.min_outer_lr} must not be above --{start}={options.outer_lr}")
    settle(options)
    if options.query_windows and options.balance:
        raise UserError("--balance does not go with --query_windows=True: leave one of them out")


def settle(options):
    """Give the options that follow from others, where they are not given, their values."""
    if options.item_lr is None:
        options.item_lr = 0.0 if options.head == "joint" else 3e-4
    if options.inner_lr is None:
        options.inner_lr = 1.0 if steps_in_posterior(options) else 0.05
    if options.inner_damping is None and not steps_in_posterior(options):
        options.inner_damping = 4.0
    if options.query_windows is None:
        options.query_windows = options.paper_form == "code" or bool(options.paper_form) and not options.num_inner_steps
    if options.use_second_order is None:
        options.use_second_order = options.use_multi_step or options.use_adaptive_loss


def steps_in_posterior(options):
    """Whether an inner step is taken in the metric of the user's posterior; see `maml.InnerRates`."""
    return options.adapt == "head" and options.head == "joint"


def method(options):
    """The name of the method that the options describe: melo, metal, maml or fomaml."""
    if options.use_adaptive_loss:
        return "metal" if options.loss_network == "metal" else "melo"
    return "maml" if options.use_second_order else "fomaml"


# What may differ when a run goes on: where things are (the data's fingerprint is checked instead), what is
# shown, how often is saved, how much is computed at once, and what concerns this one command.
MAY_CHANGE = (
    *(*PLACES, "checkpoint_minutes", "checkpoint_step", "cuda_graphs", "device", "keep_checkpoints", "keep_models"),
    "log_interval",
    *("overwrite", "ranking", "resume", "skip_nonfinite", "task_chunk", "test"),
)
MAY_GROW = ("num_train_iterations", "pretrain_epochs")


def as_stored(options):
    """Options as they come back from JSON: tuples are lists, paths are text."""
    if isinstance(options, argparse.Namespace):
        options = vars(options)
    return json.loads(json.dumps(options, default=utils.json_value))


def check_resume(stored_options, options, may_grow=MAY_GROW):
    """UserError that lists every option that differs from the stored one and may neither change nor grow."""
    try:
        old, new = as_stored(stored_options), as_stored(options)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError("the options that the run began with are damaged: train again in another --log_dir") from error
    defaults = vars(read("", as_words({name: old[name] for name in ("mode", "paper_form") if name in old})))
    old = without_removed(old, removed(new))
    old |= {name: BEFORE.get(name, defaults[name]) for name in new.keys() & defaults.keys() - old.keys()}
    differences = []
    for name in sorted((old.keys() | new.keys()) - set(MAY_CHANGE)):
        before, after = old.get(name), new.get(name)
        if before == after and type(before) is type(after):
            continue
        if name in may_grow and is_number(before) and is_number(after) and after > before:
            continue
        differences.append(f"--{name} was {shown(old, name)} and is now {shown(new, name)}")
    if differences:
        remedy = "give the old values, or start a run in another --log_dir"
        raise UserError(f"a run goes on with the options it began with, but {', '.join(differences)}: {remedy}")


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(options, name):
    return f"{options[name]!r:.200}" if name in options else "not there"
