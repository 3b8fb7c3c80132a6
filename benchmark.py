"""Speed and memory, as ratios measured in one run: medians over repetitions, same work, same threads.

    python benchmark.py                                    # every section but accuracy, on synthetic ratings
    python benchmark.py --only learners eval --threads=2   # some sections
    python benchmark.py --only operations                  # number of operations that a GPU launches in an outer step
    python benchmark.py --only accuracy --data_path=FILE   # time to the damped means' error, on real ratings
    python benchmark.py --only data --rows=25000000        # a file of ML-25M's size: 3 minutes, 1 GB of disk

Options of main.py (--bert_hidden_units=64, ...) hold for all sections. --models chooses learners; sections catalogue,
tasks, steps, processes and accuracy measure the first. Form "paper" is --paper_form=True: every parameter adapted, 25
windows, 16 tasks; form "default" is what main.py does, but that item tables start at random.
"""

import platform

import torch

import options as option_module
from benchmarks.measure import outer_steps, settings  # noqa: F401
from benchmarks.sections import SECTIONS
from utils import choose_device, run_script


def parse(argv=None):
    """The options of this script; the rest of the command line, which main.py's options take, in `rest`."""
    parser = option_module.Parser(__doc__)
    add, count = option_module.group(parser, "benchmark"), option_module.count
    everywhere = [section for section in SECTIONS if section != "accuracy"]
    add("only", everywhere, str, "sections to run", nargs="+", choices=SECTIONS)
    usual = [name for name in option_module.LEARNERS if name != "meanpool"]
    add("models", usual, str, "learners to measure", nargs="+", choices=option_module.LEARNERS)
    add("reps", 3, count(), "repetitions, whose median counts")
    add("threads", 1, count(1, 1024), "CPU threads")
    add("device", "auto", str, "where to compute", choices=["auto", "cpu", "cuda"])
    add("tasks", 16, count(4), "tasks in a meta-batch")
    add("users", 512, count(), "users to adapt to in eval; 16 times as many on a GPU")
    add("many_items", 1_000_000, count(50), "items of a large catalogue")
    add("rows", 1_000_000, count(5000), "rows of a ratings file")
    bench, bench.rest = parser.parse_known_args(argv)
    bench.device = choose_device(bench.device)
    settings("default", bench)  # refuses what main.py would refuse
    return bench


def main(argv=None):
    bench = parse(argv)
    torch.set_num_threads(bench.threads)
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{device}, {bench.threads} threads, torch {torch.__version__}, medians of {bench.reps}")
    for section in bench.only:
        print(f"\n{section}: {SECTIONS[section].__doc__.splitlines()[0]}", flush=True)
        for name, value, unit, target in SECTIONS[section](bench):
            print(f"  {name:<58}{value:>12.4g} {unit:<9}{target and f'target: {target}'}", flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
