"""Meta-train a sequential recommender that adapts to new users, or test what was trained.

    python main.py                                                      # MELO on MovieLens-1M
    python main.py --use_adaptive_loss=False                            # MAML
    python main.py --use_multi_step=False --use_adaptive_loss=False     # FO-MAML: first order
    python main.py --mode=sample --num_train_iterations=200             # the bundled sample: under a minute on a laptop
    python main.py --resume                                             # after an interruption: the same bits
    torchrun --nproc_per_node=2 main.py                                 # two processes, each with half of the tasks
    python main.py --test                                               # the best checkpoint on the test users

The run is kept in <log_dir>/<mode>-<model>-<method>/; the same options with --test find it there.
"""

import options
import processes
import runs
import testing
import training
from processes import run_script
from utils import choose_device


def main(argv=None):
    opts = options.parse(__doc__, argv)
    folder = runs.run_folder(opts.log_dir, opts.mode, opts.model, options.method(opts))
    if opts.test:
        return testing.test(folder, opts) if processes.is_first() else 0

    if processes.is_first():
        runs.check_folder(folder, opts)
    problem = training.load_problem(opts)
    system = training.build_system(problem, opts)
    goes_on = opts.resume and runs.find_checkpoints(folder)
    if (opts.load_pretrained or opts.load_pretrained_embedding) and processes.is_first() and not goes_on:
        testing.load_pretrained(system, problem, opts)
    system.to(choose_device(opts.device, opts.deterministic))
    return training.fit(system, problem, opts, folder)


if __name__ == "__main__":
    run_script(main)
