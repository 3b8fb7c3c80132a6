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

import dataloader
import maml
import options
from evaluation import evaluate
from models import checkpoint
from training import distributed, loop, run_folder, tensorboard
from training.distributed import run_script
from utils import choose_device


def main(argv=None):
    opts = options.parse(__doc__, argv)
    folder = checkpoint.run_folder(opts.log_dir, opts.mode, opts.model, options.method(opts))
    if opts.test:
        if distributed.is_first():
            report = evaluate.test(folder, opts)
            tensorboard.log_test(folder, report, report["step"])
        return 0

    if distributed.is_first():
        run_folder.check_folder(folder, opts)
    with distributed.one_by_machine():  # the others map its cache into memory
        problem = dataloader.load_problem(opts)
    system = maml.build_system(problem, opts, first=distributed.is_first())
    goes_on = opts.resume and checkpoint.find_checkpoints(folder)
    if (opts.load_pretrained or opts.load_pretrained_embedding) and distributed.is_first() and not goes_on:
        loop.load_pretrained(system, problem, opts)
    system.to(choose_device(opts.device, opts.deterministic))
    return loop.fit(system, problem, opts, folder)


if __name__ == "__main__":
    run_script(main)
