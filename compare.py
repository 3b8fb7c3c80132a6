"""Train methods x learners x folds x seeds side by side, score all on the same targets, write tables and pictures.

    python compare.py --demo                                        # the bundled sample: a minute on 2 cores
    python compare.py --output results/ml-1m --models bert4rec narm sasrec gru4rec --folds 0
    python compare.py --output results/ml-1m --models bert4rec --paper_models bert4rec --folds 0 1 2 3 4 5
    python compare.py --output results/amazon --mode=amazon --data_path=Data/amazon/grocery_ratings.csv
    python compare.py --preset=published                            # the published method: four learners, five methods
    python compare.py --preset=published --paper_models narm        # the same for one learner
    python compare.py --output results/ml-1m --report_only          # the tables again, from the kept predictions
    python compare.py --output results/ml-1m-users --models sasrec --train_users 250 500 1000 2000     # few users
    python compare.py --output results/ml-1m --protocol=melu --seeds 1 2 3 4 5     # another paper's protocol
    python compare.py --export_targets targets --folds 0 --mode=ml-1m     # the targets as CSV, for other programs
    python compare.py --output results/ml-1m --external mine=mine.csv     # their predictions as a row of the tables

Any option of main.py may be given too and reaches every run. The same command again goes on where the last one
stopped: finished runs are not repeated, interrupted ones continue from their checkpoint. A run that is to have more
iterations than before starts again; one with other options is refused.

    <output>/runs/fold0-seed222/            what main.py and pretrain.py wrote; fold0-seed222-paper: published form
    <output>/predictions/*.parquet          every prediction, and what is known of the run that made it
    <output>/table.md, *.csv, *.png, *.svg  made from the predictions alone
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import dataloader
import options as option_module
import utils
from evaluation import external, figures, predictions, protocols, results, tables
from evaluation.predictions import Cell
from models import checkpoint
from options import LEARNERS
from ratings import cache
from utils import UserError, run_script, say

ROOT = Path(__file__).parent
METHODS = {
    "basic": ("--load_pretrained=False", "--load_pretrained_embedding=False"),
    "fomaml": ("--use_multi_step=False", "--use_adaptive_loss=False"),
    "maml": ("--use_adaptive_loss=False",),
    "metal": ("--loss_network=metal",),
    "melo": (),
}
USUAL_METHODS = ("basic", "fomaml", "maml", "melo")
PAPER_METHODS = ("basic", "maml", "melo")
SET_HERE = {"model", "fold", "random_seed", "log_dir", "pretrain_log_dir", "test", "resume", "overwrite"}
SET_HERE |= {"test_prefix"}
TRAINING = {"output", "models", "methods", "paper_models", "paper_methods", "paper_form", "init_seeds"}
TRAINING |= {"jobs", "threads", "report", "external", "train_users"}
PUBLISHED = ("--output=results/published", "--models", "--paper_models", "bert4rec", "sasrec", "narm", "gru4rec")
PUBLISHED += ("--paper_methods", *METHODS, "--init_seeds", "5", "6", "--load_pretrained_embedding=True")
PUBLISHED += ("--num_train_iterations=400",)  # not 2,000: validation is best after 100 to 400
# The rest of the authors' commands for their data sets.
ON_ML_1M = ("--folds", "-1", "--num_test_data=1000", "--lstm_hidden=128", "--lstm_input_size=8")
ON_OTHERS = ("--val_size=1000",)
DEMO = ("--output=log/demo", "--mode=sample", "--models=bert4rec", "--methods", "basic", "maml", "melo")
DEMO += ("--folds", "0", "1")
NEXT = """Next:
  {bin}/tensorboard --logdir log/demo
      the learning curves, in a browser
  {bin}/python -m examples.serve --run=log/demo/runs/fold0-seed222/sample-bert4rec-melo \\
      --titles=Data/sample/titles.csv
      the trained model, in a browser: rate items and see what it recommends
  {bin}/python main.py
      train on MovieLens-1M (downloaded: 6 MB)"""
# A run gets a pipe as standard input, which closes when this process ends, however it does; the run then stops.
CHILD = """import os, runpy, signal, sys, threading
def watch():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=watch, daemon=True).start()
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# -----------------------------------------------------------------------------
# options


def parse(argv):
    """The options of this script; those for every run are left in `rest`, as words."""
    parser = option_module.Parser(__doc__, usage="compare.py [options below and of main.py]")
    add, count = parser.add_argument, option_module.count
    add("--output", type=option_module.folder, default=Path("results"), help="where runs and tables are kept")
    add("--models", nargs="*", default=LEARNERS, choices=LEARNERS, help="learners (default: all)")
    add("--methods", nargs="*", default=USUAL_METHODS, choices=METHODS, help="methods (default: all but metal)")
    add("--paper_models", nargs="*", default=(), choices=LEARNERS, help="learners in the form --paper_form")
    add("--paper_methods", nargs="*", default=PAPER_METHODS, choices=METHODS, help="their methods")
    add("--paper_form", default=True, type=option_module.paper_form, metavar="True|code", help="(default: True)")
    add("--folds", nargs="+", default=[0], type=count(-1), help="test users; -1: --num_test_data users (default: 0)")
    text = "values of --random_seed, which also draws the folds (default: 222)"
    add("--seeds", nargs="+", default=[222], type=count(0, 2**32 - 2), help=text)
    add("--init_seeds", nargs="+", default=[None], type=count(0, 2**32 - 1), help="values of --model_init_seed")
    add("--jobs", type=count(1, 1000), help="runs side by side (default: one per GPU, or cores / threads)")
    add("--threads", type=count(1, 1000), help="CPU threads of a run; changes last digits (default: 1)")
    add("--report", type=option_module.folder, help="folder of tables and pictures (default: that of --output)")
    add("--report_only", action="store_true", help="tables from the kept predictions, without training")
    text = "the comparison with each of these numbers of training users (<output>/<number>-users), and a picture"
    add("--train_users", nargs="+", default=(), type=count(1), metavar="N", help=text)
    text = "melu: MeLU's users, targets and figures, drawn by --seeds; in <output>/melu"
    add("--protocol", choices=protocols.PROTOCOLS, help=text)
    text = "another program's predictions as a row: a CSV file of user, item, prediction (and task, fold, seed)"
    add("--external", nargs="+", default=[], type=named_file, metavar="NAME=FILE", help=text)
    text = "write training ratings, supports and targets of --folds and --seeds as CSV files, and do nothing else"
    add("--export_targets", type=option_module.folder, metavar="DIR", help=text)
    add("--demo", action="store_true", help="a small comparison on the bundled sample, kept in log/demo")
    text = "published: the authors' commands, all methods, two initialisations; options that are given still count"
    add("--preset", choices=["published"], help=text)
    args, rest = parser.parse_known_args([*preset(argv), *argv])
    args.rest = [word for word in rest if word != "--"]
    own = [word for word in parser.parse_known_args(argv)[1] if word != "--"]
    check(args, option_module.given(argv, parser).keys(), option_module.given(own).keys())
    if args.protocol:
        args.output, args.folds = args.output / args.protocol, [-1]
    args.report, args.threads = args.report or args.output, args.threads or 1
    return args


def preset(argv):
    """The words that --demo and --preset stand for."""
    parser = option_module.Parser(add_help=False)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--preset")
    parser.add_argument("--mode", default="ml-1m")
    chosen, _ = parser.parse_known_args(argv)
    if chosen.demo or not chosen.preset:
        return DEMO if chosen.demo else ()
    return *PUBLISHED, *(ON_ML_1M if chosen.mode == "ml-1m" else ON_OTHERS)


def named_file(text):
    """NAME=FILE as a pair."""
    name, _, path = text.partition("=")
    if not (name and path and name.isprintable()) or "|" in name or len(name) > 24:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not NAME=FILE with a name of at most 24 characters")
    if name in tables.ROWS:
        raise argparse.ArgumentTypeError(f"{name} is a row already; choose another name")
    return name, option_module.folder(path)


def check(args, own, rest):
    """UserError for options, of this script or of main.py, that this script sets itself or does not use."""
    if wrong := sorted(rest & SET_HERE):
        raise UserError(f"--{wrong[0]} is for compare.py to set: use --models, --methods, --folds, --seeds, --output")
    if not args.paper_form:
        raise UserError("--paper_form is that of --paper_models: give True or code")
    for why, names in unused(args, own, rest):
        if names:
            raise UserError(f"{why}: leave out {', '.join(f'--{name}' for name in sorted(names))}")
    if len(dict(args.external)) < len(args.external):
        raise UserError("--external has two files of one name: give each a name of its own")
    if args.train_users and not (args.models and args.methods or args.paper_models and args.paper_methods):
        raise UserError("--train_users shows trained methods: give --models and --methods")


def unused(args, own, rest):
    """Pairs of a reason and the names of options that were given and have no effect for this reason."""
    if args.report_only:
        used = {"mode"} if args.preset else set()  # it decides the folds
        yield "--report_only reads kept predictions", rest - used | own & {"jobs", "threads", "export_targets"}
    if args.export_targets:
        used = option_module.in_groups("data", "split of users") | {"max_seq_len"}
        yield "--export_targets makes no table and trains nothing", own & TRAINING | rest - used
    if args.protocol:
        owns = own & {"folds", "external", "export_targets", "train_users"} | rest & protocols.UNUSED
        yield f"--protocol={args.protocol} has users and targets of its own", owns
    if not args.paper_models:
        yield "--paper_models is not given", own & {"paper_methods", "paper_form"}
    if args.train_users:
        given = own & {"demo", "external"} | rest & {"num_train_users"}
        yield "--train_users is another comparison for each number", given


def list_cells(args):
    """All cells that the options name; their order does not depend on that of the command line."""
    forms = (False, args.models, args.methods), (args.paper_form, args.paper_models, args.paper_methods)
    kinds = []
    for paper, models, methods in forms:
        kinds += [(m, method, paper) for m in LEARNERS if m in models for method in METHODS if method in methods]
    places = [(fold, seed) for fold in sorted(set(args.folds)) for seed in sorted(set(args.seeds))]
    inits = sorted(set(args.init_seeds))
    trained = [Cell(*kind, *place, init) for kind in kinds for place in places for init in inits]
    return [Cell("simple", "simple", False, *place) for place in places] + trained


def command(args, cell):
    """The cell's script and its arguments."""
    place = args.output / "runs" / f"{predictions.place_of(cell)}{predictions.FORMS[cell.paper]}"
    words = [f"--fold={cell.fold}", f"--random_seed={cell.seed}", f"--log_dir={place}", f"--pretrain_log_dir={place}"]
    if args.protocol:
        words += protocols.words(split_path(args, cell.seed))
    if cell.learner != "simple":
        words += [f"--model={cell.learner}", *METHODS[cell.method], f"--paper_form={cell.paper}"]
        words += [] if cell.init is None else [f"--model_init_seed={cell.init}"]
    return "pretrain.py" if cell.method == "basic" else "main.py", [*args.rest, *words]


def split_path(args, seed):
    """The file of ratings of a protocol's draw."""
    return args.output / "runs" / f"seed{seed}.csv"


def read_options(args, cell):
    """The options that the cell's script will read; UserError where they are impossible or make another method."""
    script, words = command(args, cell)
    options = (option_module.parse_pretrain if script == "pretrain.py" else option_module.parse)("", words)
    if cell.method in ("basic", "simple") or (found := option_module.method(options)) == cell.method:
        return options
    raise UserError(f"the options given turn {cell.method} into {found}: leave out those that make a method")


# -----------------------------------------------------------------------------
# one run


class Run(NamedTuple):
    """A cell's script that is running."""

    process: subprocess.Popen
    folder: Path
    slot: dict  # the environment variables that give it its GPU


def start(args, cell, options, slot):
    """Start the cell's script, from its checkpoint if it can: a `Run`."""
    script, words = command(args, cell)
    folder = checkpoint.run_folder(options.log_dir, options.mode, cell.learner, cell.method)
    again = args.demo or is_to_grow(folder, options)
    if again and not args.demo:
        say(f"{shown(cell)}: starts again, to have more iterations")
    utils.make_folder(folder, parents=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), **slot}
    with open(folder / "output.txt", "w") as output, open(folder / "errors.txt", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, ROOT / script, *words, "--overwrite" if again else "--resume"],
            stdin=subprocess.PIPE, stdout=output, stderr=errors, env=environment,
        )  # fmt: skip
    return Run(process, folder, slot)


def finish(args, cell, options, run):
    """Score what a cell's script trained; UserError with its last words where it failed."""
    run.process.stdin.close()
    if status := run.process.returncode:
        lines = (run.folder / "errors.txt").read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), f"exit status {status}")
        raise UserError(last.removeprefix("error: "))
    with utils.naming_what_to_lower(options):
        scoring(args).score_run(path_of(args, cell), cell, options, run.folder)


def is_to_grow(folder, options):
    """Whether the run in a folder differs in nothing but that it was to have fewer iterations.

    With --resume a script would go on with it, though its learning rates fell to an earlier end.
    """
    state = checkpoint.load_newest(folder, {"options": dict})
    if state is None:
        return False
    kept, wanted = state["options"], option_module.as_stored(options)
    if wanted["num_train_iterations"] is None:  # counted from the data's size
        problem = dataloader.load_problem(options)
        if state.get("fingerprint") != problem.ratings.fingerprint:
            return False  # the script will say so
        wanted["num_train_iterations"] = dataloader.count_iterations(options, problem)
    try:
        option_module.check_resume(kept, wanted)
    except UserError:
        return False  # the script will say why
    return any(kept[name] != wanted[name] for name in option_module.MAY_GROW)


def scoring(args):
    """The module that makes predictions of what was trained."""
    return protocols if args.protocol else predictions


def path_of(args, cell):
    return predictions.path_of(args.output / "predictions", cell)


# -----------------------------------------------------------------------------
# many, side by side


def make_predictions(args, cells):
    """Run what is not finished: {cell: why it failed}. Basic runs come first where others start from them."""
    torch.set_num_threads(args.threads)
    options = {cell: read_options(args, cell) for cell in cells}
    prints = {path: cache.load_ratings(o).fingerprint for path, o in {o.data_path: o for o in options.values()}.items()}
    utils.make_folder(args.output / "predictions", parents=True)
    left = {
        c: o for c, o in options.items() if not predictions.is_finished(path_of(args, c), c, o, prints[o.data_path])
    }
    say(f"{len(cells) - len(left)} of {len(cells)} runs are finished, {len(left)} are left")
    later = {c for c in left if c.method != "basic" and (left[c].load_pretrained or left[c].load_pretrained_embedding)}
    first = run_all(args, {c: o for c, o in left.items() if c not in later})
    return first | run_all(args, {c: o for c, o in left.items() if c in later})


def run_all(args, options):
    """Run the cells of {cell: options}: {cell: why it failed}. No script is left running, whatever happens."""
    waiting, running, failed, began = dict(options), {}, {}, time.monotonic()
    slots = places(args, next(iter(options.values())).device) if options else []
    shape = {"bar_format": "{n_fmt}/{total_fmt} runs |{bar:10}| {elapsed}{postfix}", "dynamic_ncols": True}
    bar = tqdm(total=len(options), **shape, disable=None if options else True)

    def ended(cell, error):
        failed.update({cell: error} if error else {})
        done = f"{len(options) - len(waiting) - len(running)}/{len(options)}, {time.monotonic() - began:.0f} s"
        if error or bar.disable:
            say(f"[{done}] {shown(cell)}{': ' + error if error else ''}")
        bar.update()

    try:
        while waiting or running:
            for cell in [c for c in waiting if c.learner != "simple"][: len(slots)]:
                error, run = attempt(start, args, cell, waiting.pop(cell), slots[0])
                if error:
                    ended(cell, error)
                    continue
                running[cell], slots = run, slots[1:]
                if bar.disable:
                    say(f"started {shown(cell)}")
            show_running(bar, running)
            for cell in [c for c, run in running.items() if run.process.poll() is not None]:
                run = running.pop(cell)
                slots = [*slots, run.slot]
                ended(cell, attempt(finish, args, cell, options[cell], run)[0])
            for cell in [c for c in waiting if c.learner == "simple"][:1]:
                ended(cell, attempt(scoring(args).score_simple, path_of(args, cell), cell, waiting.pop(cell))[0])
            time.sleep(0.2 if running else 0)
    finally:
        for run in running.values():
            run.process.terminate()
        for run in running.values():
            run.process.wait()
        bar.close()
    return failed


def attempt(function, *arguments):
    """(why the call failed or None, what it returned): one cell's failure costs neither the others nor the tables."""
    try:
        return None, function(*arguments)
    except UserError as error:
        return str(error), None
    except Exception as error:
        say(traceback.format_exc())
        words, _, _ = str(error).partition("\n")
        return f"unexpected {type(error).__name__}: {words}", None


def places(args, device):
    """The environments of the runs that may run at the same time: one GPU each, where there are any."""
    n_gpus = torch.cuda.device_count() if device != "cpu" else 0
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))
    gpus = [{"CUDA_VISIBLE_DEVICES": name} for name in names.split(",")][:n_gpus] or [{}]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = args.jobs or n_gpus or max(1, cores // args.threads)
    return [gpus[i % len(gpus)] for i in range(jobs)]


# -----------------------------------------------------------------------------
# what is shown


def show_running(bar, running):
    """Show beside the bar the last iteration in the output of each run; a narrow terminal shows the first runs."""
    lines = []
    for cell, run in running.items():
        text = (run.folder / "output.txt").read_text(errors="replace")
        found = re.findall(r"^iteration +(\d+)", text, re.MULTILINE)
        lines.append(f"iteration {found[-1] if found else 0} of {shown(cell)}")
    with contextlib.suppress(OSError):  # the terminal may be gone
        bar.set_postfix_str("; ".join(lines))


def shown(cell):
    """A cell in a few words."""
    what = "simple predictors" if cell.learner == "simple" else f"{cell.learner} {cell.method}"
    init = "" if cell.init is None else f" init {cell.init}"
    form = predictions.FORMS[cell.paper].replace("-", " ")
    return f"{what}{form} fold {cell.fold} seed {cell.seed}{init}"


@contextlib.contextmanager
def stopped_by_signals():
    """Turn SIGTERM, and SIGHUP unless it is ignored, into KeyboardInterrupt while entered."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def export_targets(args, cells):
    """Write the CSV files of every fold and seed."""
    for cell in [cell for cell in cells if cell.learner == "simple"]:
        options = read_options(args, cell)
        folder = args.export_targets / f"fold{cell.fold}-seed{cell.seed}"
        utils.make_folder(folder, parents=True)
        external.export(folder, dataloader.load_problem(options), options.max_seq_len - 1)
        print(f"{folder}: {', '.join(external.FILES)}")


def report(args, cells, paths):
    """Write tables and pictures of the kept predictions {cell: path}; what a terminal shows of them."""
    if args.protocol:
        utils.make_folder(args.report, parents=True)
        return protocols.report(args.report, paths)
    found = results.load(paths, args.external)
    utils.make_folder(args.report, parents=True)
    figures.draw_all(args.report, cells, found)
    return tables.write(args.report, cells, found)


def kept(args, cells):
    """The files of predictions that are there, {cell: path}."""
    return {cell: path for cell in cells if os.path.exists(path := path_of(args, cell))}


def compare_once(args):
    """Run what is left of a comparison, write its tables and pictures and print them: the exit status."""
    cells = list_cells(args)
    try:
        with stopped_by_signals():
            failed = {} if args.report_only else make_predictions(args, cells)
    except KeyboardInterrupt:
        say("stopped; the same command goes on")
        return 130
    there = kept(args, [cell for cell in cells if cell not in failed])
    if failed and not there:
        cell, error = next(iter(failed.items()))
        raise UserError(f"no run succeeded; {shown(cell)}: {error}")
    if not there:
        raise UserError(f"{args.output} holds no predictions of these runs: give the command without --report_only")
    print(report(args, cells, there))
    print(f"Tables and pictures: {args.report}")
    if args.demo:
        print(NEXT.format(bin=os.path.relpath(Path(sys.executable).parent)))
    for cell, error in failed.items():
        say(f"failed: {shown(cell)}: {error}")
    return 1 if failed else 0


def compare_train_users(args):
    """A comparison with each of `args.train_users`, and a picture of all: the exit status."""
    parts, cells = {number: of_train_users(args, number) for number in sorted(set(args.train_users))}, list_cells(args)
    if not args.report_only:
        dataloader.load_problem(read_options(parts[max(parts)], cells[0]))  # refuses a number that is too large
    status = 0
    for part in parts.values():
        if (of_part := compare_once(part)) == 130:
            return of_part
        status = max(status, of_part)
    found = {number: results.load(kept(part, cells)) for number, part in parts.items()}
    figures.draw_train_users(args.report, cells, found)
    print(f"Picture of all numbers of training users: {args.report / 'train_users.png'}")
    return status


def of_train_users(args, number):
    """The options of the comparison with that many training users."""
    output, report = (path / f"{number}-users" for path in (args.output, args.report))
    rest = args.rest if args.report_only else [*args.rest, f"--num_train_users={number}"]
    return argparse.Namespace(**{**vars(args), "output": output, "report": report, "rest": rest})


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.protocol and not args.report_only:
        utils.make_folder(args.output / "runs", parents=True)
        for seed in args.seeds:
            protocols.prepare(option_module.parse("", args.rest), split_path(args, seed), seed)
    if args.export_targets:
        return export_targets(args, list_cells(args))
    return compare_train_users(args) if args.train_users else compare_once(args)


if __name__ == "__main__":
    run_script(main)
