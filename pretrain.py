"""Train the plain learner (Basic): no inner steps, no adaptation. Its weights can start main.py.

    python pretrain.py                              # plain BERT4Rec on MovieLens-1M
    python pretrain.py --test                       # the best checkpoint on the test users main.py is tested on
    python main.py --load_pretrained=True           # start meta-training from it
    python main.py --load_pretrained_embedding=True # start from its item tables alone

The run is kept in <pretrain_log_dir>/<mode>-<model>-basic/. The loop is that of main.py, with no inner steps.
"""

import main as meta
import options
from models import checkpoint
from training import distributed


def main(argv=None):
    opts = options.parse_pretrain(__doc__, argv)
    folder = checkpoint.run_folder(opts.log_dir, opts.mode, opts.model, "basic")
    return meta.test(opts, folder) if opts.test else meta.train(opts, folder)


if __name__ == "__main__":
    distributed.run_script(main)
