"""Train the plain learner (Basic): no inner steps, no adaptation. Its weights can start main.py.

    python pretrain.py                              # plain BERT4Rec on MovieLens-1M
    python pretrain.py --test                       # the best checkpoint on the test users main.py is tested on
    python main.py --load_pretrained=True           # start meta-training from it
    python main.py --load_pretrained_embedding=True # start from its item tables alone

The run is kept in <pretrain_log_dir>/<mode>-<model>-basic/.
"""

import math

import options
import processes
import runs
import testing
import training
from processes import run_script
from utils import choose_device


def main(argv=None):
    opts = options.parse_pretrain(__doc__, argv)
    folder = runs.run_folder(opts.log_dir, opts.mode, opts.model, "basic")
    if opts.test:
        return testing.test(folder, opts) if processes.is_first() else 0

    if processes.is_first():
        runs.check_folder(folder, opts)
    problem = training.load_problem(opts)
    if opts.num_train_iterations is None:
        opts.num_train_iterations = count_iterations(opts, problem)
    system = training.build_system(problem, opts).to(choose_device(opts.device, opts.deterministic))
    return training.fit(system, problem, opts, folder)


def count_iterations(opts, problem):
    """The iterations that --pretrain_epochs takes."""
    return math.ceil(opts.pretrain_epochs * len(problem.train) / opts.batch_size)


if __name__ == "__main__":
    run_script(main)
