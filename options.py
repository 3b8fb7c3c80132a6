"""Command-line options of all scripts, in one place. Nothing is parsed on import."""

import argparse
import json

import utils
from utils import UserError

# The published method: items only, plain head, every parameter adapted, one rate per tensor and step, LSTM
# weights, 16 tasks an iteration, and the original's other defaults.
PAPER_FORM = {
    "use_rating_input": False,
    "head": "plain",
    "adapt": "all",
    "init_items": "random",
    "normalize_loss": True,
    "inner_rates": "tensor",
    "inner_damping": 0.0,
    "inner_lr": 1e-3,
    "num_inner_steps": 3,
    "loss_network": "lstm",
    "lstm_hidden": 32,
    "lstm_input_size": 16,
    "use_multi_step": True,
    "multi_step_loss_num_epochs": 1000,
    "batch_size": 16,
    "num_samples": 25,
    "num_query_set": 3,
    "full_support": 0.0,
    "members": 1,
    "balance": 0.0,
    "num_train_iterations": 2000,
    "outer_lr": 1e-3,
    "min_outer_lr": 1e-4,
    "embedding_lr": 1e-3,
    "item_lr": 1e-3,
    "learn_lr": 1e-3,
    "loss_lr": 1e-2,
    "task_info_lr": 1e-2,
    "lstm_lr": 1e-1,
    "weight_decay": 0.0,
    "average": 0.0,
    "gru4rec_n_layers": 2,
    "pretrain_epochs": 100,
    "val_size": 600,
    "val_targets": 1,
    "log_interval": 200,
}


# Chosen on validation users of each data set; see results/EXPERIMENTS.md.
DATA_DEFAULTS = {
    "amazon": {
        "num_train_iterations": 800,
        "outer_lr": 3e-4,
        "item_lr": 1e-4,
        "num_factors": 1,
        "factor_prior": 10.0,
        "members": 3,
        "balance": 0.05,
    },
    "ml-100k": {"factor_prior": 20.0, "num_test_data": 150},
    "ml-latest-small": {"num_test_data": 100},
    "sample": {"num_test_data": 150},
}


class Parser(argparse.ArgumentParser):
    """Reports a wrong option as one sentence, without the usage text."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def true_or_false(text):
    """The value of a `--flag=True|False` option."""
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"write True or False, not '{text}'")
    return text == "True"


def number(kind, low, high=float("inf"), infinite=False):
    """A converter for numbers of `kind` (int or float) from low to high; inf is one of them only if `infinite`."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"'{text}' is not {name}") from None
        if value == float("inf") and not infinite:
            raise argparse.ArgumentTypeError(f"'{text}' is not a finite number")
        if not low <= value <= high:
            limit = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range; it must be {limit}")
        return value

    return convert


def count(low=1, high=float("inf")):
    return number(int, low, high)


def real(low=0.0, high=float("inf"), infinite=False):
    return number(float, low, high, infinite)


def group(parser, title):
    """`add(name, default, type, help)` for a titled group; type bool makes a switch."""
    titled = parser.add_argument_group(title)

    def add(name, default, kind, text, **more):
        if kind is bool:
            return titled.add_argument(f"--{name}", action="store_true", help=text)
        shown = "" if default is None else " (default: %(default)s)"
        if kind is true_or_false:
            more["metavar"] = "True|False"
        return titled.add_argument(f"--{name}", default=default, type=kind, help=text + shown, **more)

    return add


# -----------------------------------------------------------------------------
# data


def add_layout_options(add):
    """How a ratings file is to be read, for the group that `add` belongs to."""
    add(
        "columns",
        None,
        str,
        "columns of --mode=csv or parquet, by name or 0-based position",
        metavar="user:U,item:I,...",
    )
    add("sep", None, str, "column separator of --mode=csv; default: found from the first line")
    add("skip_bad_rows", False, bool, "drop up to 1 %% unreadable rows, and say which")


def add_data_options(parser):
    add = group(parser, "data")
    add("mode", "ml-1m", str, "ml-100k to ml-32m, ml-latest[-small], amazon, yelp, sample; csv or parquet: your own")
    add("data_path", None, str, "ratings file; default: the data set's place under ./Data")
    add("min_item", 50, count(0), "keep items with at least this many ratings")
    add("min_sequence", 5, count(2), "then keep users with at least this many ratings")
    add("rating_scale", None, str, "rating scale; default: found from the data", metavar="LOW:HIGH")
    add_layout_options(add)
    add("data_url", None, str, "mirror to download the data set from")
    add("cache_dir", None, str, "folder for parsed data; default: beside the data")


def add_split_options(parser):
    add = group(parser, "split of users")
    add("random_seed", 222, count(0, 2**32 - 2), "seed of the split and of all sampling")
    add("num_test_data", 1000, count(1), "number of test users, where --fold is -1")
    add("fold", -1, count(-1), "test on this fold of --num_folds; -1 = draw --num_test_data users instead")
    add("num_folds", 6, count(2), "number of folds that all users are dealt into")
    add("val_size", 1000, count(1), "validate on at most this many validation users")
    add("val_targets", 3, count(1), "last ratings of each validation user that are targets")


# -----------------------------------------------------------------------------
# tasks, learner, inner loop, loss network


def add_task_options(parser):
    add = group(parser, "tasks")
    add("max_seq_len", 30, count(2), "ratings of a user that are used: the target and the support before it")
    add("num_samples", 1, count(1), "support windows a task; the first is the whole support")
    add("min_sub_window_size", 2, count(1), "least ratings in a support window")
    add("num_query_set", 10, count(1), "most queries a task in training; evaluation has one, the last rating")
    add(
        "full_support",
        0.5,
        real(0, 1),
        "share of training tasks with all the support there is; others get a random part",
    )
    add(
        "num_masks", 4, count(2), "BERT4Rec with rating input: each support rating is hidden in one of this many copies"
    )


def add_learner_options(parser):
    add = group(parser, "learner")
    add("model", "bert4rec", str, "sequence encoder", choices=["bert4rec", "sasrec", "narm", "gru4rec"])
    add(
        "head",
        "joint",
        str,
        "joint: effects, factors and sequence state; plain: the state alone",
        choices=["joint", "plain"],
    )
    add("use_rating_input", False, true_or_false, "let the encoder read ratings, not items alone")
    add("num_factors", 16, count(1), "width of item factors and user vector (joint head)")
    add("error_heads", 2, count(0), "heads of the attention over a user's earlier errors (joint head); 0 = none")
    add("init_items", "factors", str, "start of the item tables (joint head)", choices=["factors", "random"])
    add("cross_fit", 4, count(0), "parts of the training users, of which each meets tables fitted without it; 0 = none")
    add("factor_prior", 10.0, real(1e-6), "factors: pseudo-ratings that pull each item's factors to 0")
    add("model_init_seed", 5, count(0, 2**32 - 1), "seed of the initial weights")
    add("bert_num_blocks", 2, count(1), "blocks of BERT4Rec and SASRec")
    add("bert_num_heads", 4, count(1), "attention heads of BERT4Rec and SASRec")
    add("bert_hidden_units", 32, count(1), "hidden size of BERT4Rec and SASRec")
    add("narm_hidden_size", 32, count(1), "hidden size of NARM")
    add("narm_n_layers", 1, count(1), "layers of each of NARM's encoders")
    add("gru4rec_hidden_size", 32, count(1), "hidden size of GRU4Rec")
    add("gru4rec_n_layers", 1, count(1), "layers of GRU4Rec")


def add_inner_options(parser):
    add = group(parser, "inner loop")
    add("num_inner_steps", 5, count(1), "gradient steps on a user's support ratings")
    add("adapt", "head", str, "what the steps move: the head's user parameters or everything", choices=["head", "all"])
    add("inner_lr", 0.05, real(1e-9, 1e30), "start of the inner rates, in units of the inverse curvature")
    add("use_learnable_params", True, true_or_false, "learn the inner rates and dampings")
    add(
        "inner_rates",
        "element",
        str,
        "one learned rate per tensor or per element, for each step",
        choices=["tensor", "element"],
    )
    add(
        "inner_damping",
        4.0,
        real(0),
        "start of lambda in gradient / (n + lambda), in ratings; 0 = mean loss, not learned",
    )
    add(
        "use_second_order",
        None,
        true_or_false,
        "differentiate through the steps; default: unless multi-step and adaptive loss are both off",
    )
    add(
        "use_multi_step",
        True,
        true_or_false,
        "multi-step loss: queries are scored after every inner step, annealed to the last",
    )
    add("multi_step_loss_num_epochs", 300, count(1), "iterations over which the multi-step loss is annealed")


def add_loss_options(parser):
    add = group(parser, "task-adaptive loss")
    add("use_adaptive_loss", True, true_or_false, "learn a loss per user (MELO); False: squared error (MAML)")
    add("loss_network", "mlp", str, "what gives the weights", choices=["lstm", "mlp", "metal"])
    add("normalize_loss", False, true_or_false, "scale the weights to mean 1 over a user's support")
    add("use_step_loss", True, true_or_false, "a loss network of its own for each inner step (mlp, metal)")
    add("loss_num_layers", 1, count(1), "hidden layers of the mlp")
    add("lstm_hidden", 16, count(1), "hidden size of the loss network")
    add("lstm_num_layers", 1, count(1), "layers of the lstm")
    add("lstm_input_size", 5, count(2), "width of the embedded ratings of the lstm")
    for name in ("loss", "predictions", "labels", "rating_mean", "rating_std", "num_samples"):
        add(f"task_info_{name}", True, true_or_false, f"mlp and metal see {name.replace('_', ' ')}")


# -----------------------------------------------------------------------------
# outer loop, pretraining, runs


def add_outer_options(parser):
    add = group(parser, "outer loop")
    add("num_train_iterations", 400, count(0), "meta-iterations")
    add("batch_size", 128, count(1), "tasks an iteration")
    add("task_chunk", 0, count(0), "tasks held in memory at once; 0 = as many as the cache holds")
    add("outer_lr", 3e-3, real(1e-9, 1e30), "learning rate of the learner, falling as a cosine")
    add("min_outer_lr", 1e-4, real(0, 1e30), "its end; all other rates fall in proportion")
    add("embedding_lr", 3e-4, real(0, 1e30), "learning rate of the encoder's item embeddings")
    add("item_lr", 3e-4, real(0, 1e30), "learning rate of item effects and factors")
    add("learn_lr", 1e-2, real(0, 1e30), "learning rate of the inner rates")
    add("loss_lr", 1e-2, real(0, 1e30), "learning rate of the mlp and metal loss networks")
    add("task_info_lr", 1e-2, real(0, 1e30), "learning rate of the metal loss's shift for the task")
    add("lstm_lr", 1e-2, real(0, 1e30), "learning rate of the lstm loss network")
    add(
        "members",
        1,
        count(1),
        "learners that are trained side by side, each with a seed of its own; predictions are their mean",
    )
    add("balance", 0.0, real(0, 10), "a rating counts its rarity to this power in the meta-objective; 0 = all alike")
    add("warmup", 50, count(1), "iterations over which all rates rise")
    add("weight_decay", 0.01, real(0), "decoupled weight decay of the encoder")
    add(
        "average",
        0.98,
        real(0, 0.9999),
        "decay of the running mean of the weights that is validated and tested; 0 = the last weights",
    )
    add("sparse_items", False, true_or_false, "move only the item rows that an iteration uses; for large catalogues")
    add("clip_norm", 5.0, real(1e-9, infinite=True), "largest norm of the meta-gradient; inf = no limit")


def add_pretrain_options(parser):
    add = group(parser, "pretraining")
    add("pretraining_batch_size", 128, count(1), "tasks an iteration of pretrain.py")
    add("pretrain_epochs", 10, count(1), "tasks per training user, where --num_train_iterations is not given")
    add("pretraining_lr", 3e-3, real(1e-9, 1e30), "learning rate of pretrain.py")
    add("load_pretrained_embedding", False, true_or_false, "start from the pretrained item tables")
    add("load_pretrained", False, true_or_false, "start from all pretrained weights")
    add("pretrain_log_dir", "./log_pretrained", str, "where pretrain.py keeps its runs")


def add_run_options(parser):
    add = group(parser, "run")
    add("log_dir", "./log", str, "where main.py keeps its runs")
    add("log_interval", 50, count(1), "iterations between validations")
    add("checkpoint_minutes", 5.0, real(0, infinite=True), "minutes between checkpoints to go on from; inf = never")
    add("checkpoint_interval", 0, count(0), "iterations between these; 0 = by minutes alone")
    add("keep_checkpoints", 3, count(1), "how many of these are kept beside the best")
    add(
        "resume",
        False,
        bool,
        "go on from the newest whole checkpoint, if there is one; a larger --num_train_iterations trains a "
        "finished run further, at the learning rates of the longer cosine",
    )
    add("overwrite", False, bool, "begin anew in a folder that holds a run")
    add("checkpoint_step", -1, count(-1), "checkpoint for --test; -1 = the best of validation")
    add(
        "skip_nonfinite",
        False,
        bool,
        "leave out and count iterations whose loss or gradient is not finite, which otherwise end the run",
    )
    add("device", "auto", str, "where to compute", choices=["auto", "cpu", "cuda"])
    add(
        "deterministic",
        False,
        bool,
        "use repeatable operations alone on a GPU, or stop where there is none; without it the same command "
        "gives the same bits on a CPU with the same number of threads, and on a GPU may differ in the last digits",
    )
    add("test", False, bool, "evaluate a run's checkpoint, with the options it was trained with, on its test users")
    add("test_baseline", False, bool, "with --test: the simple predictors beside it")


def build_parser(description, *parts):
    parser = Parser(
        description=description,
        usage="%(prog)s [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = group(parser, "preset")
    add("paper_form", False, true_or_false, "options below as in the published method; given ones still count")
    for part in parts:
        part(parser)
    return parser


ALL = (
    add_data_options,
    add_split_options,
    add_task_options,
    add_learner_options,
    add_inner_options,
    add_loss_options,
    add_outer_options,
    add_pretrain_options,
    add_run_options,
)


def parse(description, argv=None):
    """The options of main.py. UserError for impossible ones."""
    options = read(description, argv)
    check(options)
    # Not in `check`, because runs that were trained so can still be tested and used.
    if options.use_adaptive_loss and not options.use_second_order and not options.test:
        raise UserError(
            "--use_second_order=False leaves nothing to train the loss network with: add --use_adaptive_loss=False"
        )
    return options


def parse_pretrain(description, argv=None):
    """The options of pretrain.py: those of a learner without inner steps, in the pretraining's folder."""
    options = read(description, argv, use_adaptive_loss=False, num_train_iterations=None)
    options.num_inner_steps, options.use_multi_step, options.use_adaptive_loss = 0, False, False
    options.use_second_order = False
    options.outer_lr = options.pretraining_lr
    options.batch_size, options.log_dir = options.pretraining_batch_size, options.pretrain_log_dir
    check(options)
    return options


def read(description, argv=None, **defaults):
    """The options as given, unchecked; `defaults` replaces some defaults."""
    parser = build_parser(description, *ALL)
    parser.set_defaults(**defaults)
    options = parser.parse_args(argv)
    preset = {**DATA_DEFAULTS.get(options.mode, {}), **(PAPER_FORM if options.paper_form else {})}
    parser.set_defaults(**{**preset, **defaults})
    return parser.parse_args(argv)


def restore(stored, given, source):
    """A checkpoint's own options as a Namespace, with those in `given` replaced; UserError where they make no sense."""
    known = vars(build_parser("", *ALL).parse_args([]))
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored):
        raise UserError(f"{source} holds no options: use another checkpoint")
    if odd := sorted(known.keys() ^ stored.keys()):
        raise UserError(f"{source} was written by another version ({', '.join(odd)} differ): train again")
    options = argparse.Namespace(**{**stored, **given})
    wrong = [name for name, value in known.items() if value is not None and not same_kind(value, stored[name])]
    if wrong:
        raise UserError(f"{source} holds a wrong value for {', '.join(wrong)}: use another checkpoint")
    check(options)
    return options


def same_kind(value, other):
    """Whether both are numbers, both truth values, or both text."""
    if isinstance(value, bool) or isinstance(other, bool):
        return isinstance(value, bool) and isinstance(other, bool)
    return isinstance(other, (int, float) if isinstance(value, int | float) else type(value))


def check(options):
    """Refuse impossible combinations, and settle the defaults that depend on other options."""
    if options.model in ("bert4rec", "sasrec") and options.bert_hidden_units % options.bert_num_heads:
        sizes = f"--bert_hidden_units={options.bert_hidden_units}", f"--bert_num_heads={options.bert_num_heads}"
        raise UserError(f"{sizes[0]} must be a multiple of {sizes[1]}")
    if options.fold >= options.num_folds:
        raise UserError(f"--fold={options.fold} must be below --num_folds={options.num_folds}")
    if options.min_sub_window_size >= options.max_seq_len:
        raise UserError(
            f"--min_sub_window_size={options.min_sub_window_size} must be below --max_seq_len={options.max_seq_len}"
        )
    if options.min_outer_lr > options.outer_lr:
        start = "outer_lr" if options.num_inner_steps else "pretraining_lr"
        raise UserError(f"--min_outer_lr={options.min_outer_lr} must not be above --{start}={options.outer_lr}")
    if options.use_second_order is None:
        options.use_second_order = options.use_multi_step or options.use_adaptive_loss


def method(options):
    """The name of the method that the options describe: melo, maml or fomaml."""
    if options.use_adaptive_loss:
        return "melo"
    return "maml" if options.use_second_order else "fomaml"


# What may differ when a run goes on: where things are (the data's fingerprint is checked instead), what is
# shown, how often is saved, how much is computed at once, and what was asked of this one command.
MAY_CHANGE = (
    "cache_dir",
    "checkpoint_interval",
    "checkpoint_minutes",
    "checkpoint_step",
    "data_path",
    "data_url",
    "device",
    "keep_checkpoints",
    "log_dir",
    "log_interval",
    "overwrite",
    "pretrain_log_dir",
    "resume",
    "skip_nonfinite",
    "task_chunk",
    "test",
    "test_baseline",
)


MAY_GROW = ("num_train_iterations", "pretrain_epochs")


def as_stored(options):
    """Options as they come back from JSON: tuples are lists, paths are text."""
    if isinstance(options, argparse.Namespace):
        options = vars(options)
    return json.loads(json.dumps(options, default=utils.json_value))


def check_resume(stored_options, options, may_change=MAY_CHANGE, may_grow=MAY_GROW):
    """UserError that lists every option that differs from the stored one and may neither change nor grow.

    An option that one side does not have counts as None, not given.
    """
    try:
        old, new = as_stored(stored_options), as_stored(options)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError("the options that the run began with are damaged: train again in another --log_dir") from error
    differences = []
    for name in sorted((old.keys() | new.keys()) - set(may_change)):
        before, after = old.get(name), new.get(name)
        if before == after and type(before) is type(after):
            continue
        if name in may_grow and is_number(before) and is_number(after) and after > before:
            continue
        differences.append(f"--{name} was {shown(old, name)} and is now {shown(new, name)}")
    if differences:
        raise UserError(
            "a run goes on with the options it began with, but "
            + ", ".join(differences)
            + ": give the old values, or start a run in another --log_dir"
        )


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(options, name):
    return f"{options[name]!r:.200}" if name in options else "not there"
