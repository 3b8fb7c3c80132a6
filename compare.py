"""Train methods x learners x folds x seeds side by side, score all on the same targets, write tables and pictures.

    python compare.py --output results/ml-1m --models bert4rec narm sasrec gru4rec --folds 0
    python compare.py --output results/ml-1m --models bert4rec --paper_models bert4rec --folds 0 1 2 3 4 5
    python compare.py --output results/amazon --mode=amazon --data_path=Data/amazon/grocery_ratings.csv
    python compare.py --output results/ml-1m --report_only          # the tables again, from the kept predictions
    python compare.py --demo                                        # the bundled sample: minutes on 2 cores

Any option of main.py may be given too and reaches every run. The same command again goes on where the last one
stopped: finished runs are not repeated, interrupted ones continue from their checkpoint. With more iterations
than before a run begins anew; with other options it is refused.

    <output>/runs/fold0-seed222/            what main.py and pretrain.py wrote; fold0-seed222-paper: --paper_form=True
    <output>/predictions/*.parquet          every prediction, and what is known of the run that made it
    <output>/table.md, *.csv, *.png, *.svg  made from the predictions alone
"""

import os
import queue
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, Lock
from typing import NamedTuple

import torch
from tqdm import tqdm

import dataloader
import options as option_module
import pretrain
import utils
from evaluation import figures, predictions, tables
from evaluation.predictions import Cell
from models import checkpoint
from ratings import cache
from utils import UserError, run_script

ROOT = Path(__file__).parent
LEARNERS = ("bert4rec", "narm", "sasrec", "gru4rec")
METHODS = {
    "basic": (),
    "fomaml": ("--use_multi_step=False", "--use_adaptive_loss=False"),
    "maml": ("--use_adaptive_loss=False",),
    "melo": (),
}
PAPER_METHODS = ("basic", "maml", "melo")
SET_HERE = ("model", "fold", "random_seed", "paper_form", "log_dir", "pretrain_log_dir", "test", "resume", "overwrite")
DEMO = ("--output=log/demo", "--mode=sample", "--models=bert4rec", "--methods", "basic", "maml", "melo")
DEMO += ("--folds", "0", "1", "--num_train_iterations=400", "--log_interval=100")


# -----------------------------------------------------------------------------
# what is asked for


def parse(argv):
    """The options of this script; those for every run are left in `rest`."""
    parser = option_module.Parser(
        usage="compare.py [options below and of main.py]", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    add, count = parser.add_argument, option_module.count
    add("--output", type=Path, default=Path("results"), help="where runs and tables are kept (default: %(default)s)")
    add("--models", nargs="*", default=LEARNERS, choices=LEARNERS, help="learners (default: all)")
    add("--methods", nargs="*", default=tuple(METHODS), choices=METHODS, help="methods (default: all)")
    add("--paper_models", nargs="*", default=(), choices=LEARNERS, help="learners with --paper_form=True")
    add("--paper_methods", nargs="*", default=PAPER_METHODS, choices=METHODS, help="their methods")
    add("--folds", nargs="+", default=[0], type=count(-1), help="test users; -1: --num_test_data users (default: 0)")
    add(
        "--seeds",
        nargs="+",
        default=[222],
        type=count(0),
        help="values of --random_seed, which deals the folds too (default: 222)",
    )
    add("--jobs", type=count(), help="runs side by side (default: one per GPU, or cores / threads)")
    add("--threads", type=count(), default=1, help="CPU threads of a run; changes last digits (default: 1)")
    add("--report", type=Path, help="folder of tables and pictures (default: that of --output)")
    add("--report_only", action="store_true", help="tables from the kept predictions, without training")
    add("--demo", action="store_true", help="a small comparison on the bundled sample, kept in log/demo")
    args, rest = parser.parse_known_args([*DEMO, *argv] if "--demo" in argv else argv)
    args.rest = [word for word in rest if word != "--"]
    for word in args.rest:
        if (name := word.split("=")[0].removeprefix("--")) in SET_HERE:
            raise UserError(f"--{name} is for compare.py to set: use --models, --methods, --folds, --seeds, --output")
    args.report = args.report or args.output
    return args


def list_cells(args):
    """All cells asked for, in an order that does not depend on that of the command line."""
    forms = (False, args.models, args.methods), (True, args.paper_models, args.paper_methods)
    kinds = [("simple", "simple", False)]
    for paper, models, methods in forms:
        kinds += [(m, method, paper) for m in LEARNERS if m in models for method in METHODS if method in methods]
    places = [(fold, seed) for fold in sorted(set(args.folds)) for seed in sorted(set(args.seeds))]
    return [Cell(*kind, *place) for kind in kinds for place in places]


def command(args, cell):
    """The cell's script and its arguments."""
    place = args.output / "runs" / f"fold{cell.fold}-seed{cell.seed}{'-paper' if cell.paper else ''}"
    words = [f"--fold={cell.fold}", f"--random_seed={cell.seed}", f"--log_dir={place}", f"--pretrain_log_dir={place}"]
    if cell.learner != "simple":
        words += [f"--model={cell.learner}", *METHODS[cell.method], f"--paper_form={cell.paper}"]
    return "pretrain.py" if cell.method == "basic" else "main.py", [*args.rest, *words]


def read_options(args, cell):
    """The options that the cell's script will read; UserError where they are impossible or make another method."""
    script, words = command(args, cell)
    options = (option_module.parse_pretrain if script == "pretrain.py" else option_module.parse)("", words)
    if cell.method in ("basic", "simple") or (found := option_module.method(options)) == cell.method:
        return options
    raise UserError(f"the options given turn {cell.method} into {found}: leave out those that make a method")


# -----------------------------------------------------------------------------
# running, side by side


class Work(NamedTuple):
    """What the threads that run cells share."""

    args: object
    options: dict  # of each cell
    slots: queue.Queue  # environment variables of each place where a run can be
    running: dict  # cells at work, each with its process or None
    scoring: Lock  # one scores at a time: memory, and the GPU
    stop: Event


def run_cell(work, cell):
    """Train and score one cell; None, or a line that says why it failed."""
    slot = work.slots.get()
    work.running[cell] = None
    options, path = work.options[cell], predictions.path_of(work.args.output / "predictions", cell)
    try:
        if work.stop.is_set():
            return "not started"
        if cell.learner == "simple":
            return predictions.score_simple(path, cell, options)
        folder = checkpoint.run_folder(options.log_dir, options.mode, cell.learner, cell.method)
        if error := train(work, cell, folder, slot):
            return error
        with work.scoring, utils.naming_what_to_lower(options):
            return predictions.score_run(path, cell, options, folder)
    except UserError as error:
        return str(error)
    except Exception as error:  # must cost neither the other cells nor the tables
        tqdm.write(traceback.format_exc(), file=sys.stderr)
        words, _, _ = str(error).partition("\n")
        return f"unexpected {type(error).__name__}: {words}"
    finally:
        del work.running[cell]
        work.slots.put(slot)


def train(work, cell, folder, slot):
    """Run the cell's script to its end, going on from a checkpoint if it can; None, or its last words."""
    script, words = command(work.args, cell)
    anew = work.args.demo or is_to_grow(folder, work.options[cell])
    if anew and not work.args.demo:
        tqdm.write(f"{shown(cell)}: begun anew, to have more iterations", file=sys.stderr)
    environment = {**os.environ, "OMP_NUM_THREADS": str(work.args.threads), **slot}
    make_folder(folder)
    with open(folder / "output.txt", "w") as output, open(folder / "errors.txt", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, ROOT / script, *words, "--overwrite" if anew else "--resume"],
            stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment,
        )  # fmt: skip
        work.running[cell] = process
        if work.stop.is_set():  # only now, when those at work have been stopped already
            process.terminate()
        status = process.wait()
    lines = (folder / "errors.txt").read_text(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), f"exit status {status}")
    return last.removeprefix("error: ") if status else None


def is_to_grow(folder, options):
    """Whether the run in a folder differs in nothing but that it was to have fewer iterations.

    With --resume a script would go on with it, though its learning rates fell to an earlier end.
    """
    state = checkpoint.load_newest(folder, {"options": dict})
    if state is None:
        return False
    try:
        kept = kept_options(options)
        option_module.check_resume(state["options"], kept)
    except UserError:
        return False  # the script will say why
    return state["options"]["num_train_iterations"] != option_module.as_stored(kept)["num_train_iterations"]


def kept_options(options):
    """The options as a cell's script keeps them: pretrain.py counts its iterations where they are not given."""
    if options.num_train_iterations is not None:
        return options
    count = pretrain.count_iterations(options, dataloader.load_problem(options))
    return {**vars(options), "num_train_iterations": count}


def places(args, device):
    """The environment of each run that may be at work at the same time: one GPU each, where there are any."""
    n_gpus = torch.cuda.device_count() if device != "cpu" else 0
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))
    gpus = [{"CUDA_VISIBLE_DEVICES": name} for name in names.split(",")][:n_gpus] or [{}]
    jobs = args.jobs or n_gpus or max(1, len(os.sched_getaffinity(0)) // args.threads)
    return [gpus[i % len(gpus)] for i in range(jobs)]


def run_all(args, options):
    """Run the cells of {cell: options}; {cell: why it failed}. KeyboardInterrupt once all have stopped in order."""
    slots = queue.Queue()
    for place in places(args, next(iter(options.values())).device):
        slots.put(place)
    work = Work(args, options, slots, {}, Lock(), Event())
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(slots.qsize()) as pool:
            try:
                return watch(work, {pool.submit(run_cell, work, cell): cell for cell in options})
            except KeyboardInterrupt:
                work.stop.set()
                for process in filter(None, list(work.running.values())):
                    process.terminate()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)


def watch(work, futures):
    """Show what runs and what is left until all is done: a bar on a terminal, elsewhere a line for each run."""
    failed, left, began = {}, set(futures), time.monotonic()
    bar = tqdm(total=len(futures), unit="run", dynamic_ncols=True, disable=not sys.stderr.isatty())
    while left:
        done, left = wait(left, timeout=1, return_when=FIRST_COMPLETED)
        for future in done:
            cell, error = futures[future], future.result()
            if error:
                failed[cell] = error
            bar.update()
            if error or bar.disable:
                passed = f"{len(futures) - len(left)}/{len(futures)}, {time.monotonic() - began:.0f} s"
                tqdm.write(f"[{passed}] {shown(cell)}{': ' + error if error else ''}", file=sys.stderr)
        bar.set_postfix_str("now " + "; ".join(map(shown, list(work.running))), refresh=True)
    bar.close()
    return failed


def shown(cell):
    """A cell in a few words."""
    what = "simple predictors" if cell.learner == "simple" else f"{cell.learner} {cell.method}"
    return f"{what}{' (paper)' if cell.paper else ''} fold {cell.fold} seed {cell.seed}"


# -----------------------------------------------------------------------------


def make_predictions(args, cells):
    """Run what is not finished: {cell: why it failed}. Basic runs come first where others start from them."""
    torch.set_num_threads(args.threads)
    options = {cell: read_options(args, cell) for cell in cells}
    fingerprint = cache.load_ratings(options[cells[0]]).fingerprint
    folder, failed = args.output / "predictions", {}
    make_folder(folder)
    left = {
        cell: given
        for cell, given in options.items()
        if not predictions.is_finished(predictions.path_of(folder, cell), cell, given, fingerprint)
    }
    print(f"{len(cells) - len(left)} of {len(cells)} runs are finished, {len(left)} are left", file=sys.stderr)
    later = {c for c in left if c.method != "basic" and (left[c].load_pretrained or left[c].load_pretrained_embedding)}
    for wave in (left.keys() - later, later):
        if part := {cell: given for cell, given in left.items() if cell in wave}:
            failed |= run_all(args, part)
    return failed


def make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {path} ({error.strerror}): choose another folder") from error


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    cells = list_cells(args)
    try:
        failed = {} if args.report_only else make_predictions(args, cells)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    paths = {cell: predictions.path_of(args.output / "predictions", cell) for cell in cells if cell not in failed}
    rows, about = tables.load({cell: path for cell, path in paths.items() if path.exists()})
    make_folder(args.report)
    figures.draw_all(args.report, cells, rows, about)
    print(tables.write(args.report, cells, rows, about))
    tensorboard = os.path.relpath(Path(sys.executable).parent / "tensorboard")
    print(f"tables and pictures: {args.report}\nlearning curves: {tensorboard} --logdir {args.output}")
    for cell, error in failed.items():
        print(f"failed: {shown(cell)}: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
