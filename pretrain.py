"""Train the plain learner (Basic): no inner steps, no adaptation. Its weights can start main.py.

    python pretrain.py                              # plain BERT4Rec on MovieLens-1M
    python pretrain.py --test                       # the best checkpoint on the test users main.py is tested on
    python main.py --load_pretrained=True           # start meta-training from it
    python main.py --load_pretrained_embedding=True # start from its item tables alone

The run is kept in <pretrain_log_dir>/<mode>-<model>-basic/.
"""

import math

import dataloader
import maml
import options
from evaluation import evaluate
from models import checkpoint
from training import distributed, loop, run_folder, tensorboard
from training.distributed import run_script
from utils import choose_device


def main(argv=None):
    opts = options.parse_pretrain(__doc__, argv)
    folder = checkpoint.run_folder(opts.log_dir, opts.mode, opts.model, "basic")
    if opts.test:
        if distributed.is_first():
            report = evaluate.test(folder, opts)
            tensorboard.log_test(folder, report, report["step"])
        return 0

    if distributed.is_first():
        run_folder.check_folder(folder, opts)
    with distributed.one_by_machine():  # the others map its cache into memory
        problem = dataloader.load_problem(opts)
    if opts.num_train_iterations is None:
        opts.num_train_iterations = count_iterations(opts, problem)
    system = maml.build_system(problem, opts, first=distributed.is_first()).to(
        choose_device(opts.device, opts.deterministic)
    )
    return loop.fit(system, problem, opts, folder)


def count_iterations(opts, problem):
    """The iterations that --pretrain_epochs takes."""
    return math.ceil(opts.pretrain_epochs * len(problem.train) / opts.batch_size)


if __name__ == "__main__":
    run_script(main)
