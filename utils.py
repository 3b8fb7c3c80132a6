"""Small things that every script shares: errors, seeds, devices."""

import ctypes
import os
import sys

import numpy as np
import torch


class UserError(Exception):
    """A mistake in what the user gave; its text is one sentence that says what to change."""


def run_script(main):
    """Run `main()`; a `UserError` becomes one line on standard error and exit status 2, Ctrl-C status 130."""
    keep_memory()
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def keep_memory():
    """Let glibc keep what is freed: giving pages back and asking for them again is 6 % of a meta-iteration."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, the most that it takes


def random_stream(seed, *stream):
    """A NumPy generator of its own for each (seed, stream...): nothing reads global random state."""
    return np.random.default_rng([seed, *stream])


def choose_device(name, deterministic=False):
    """The torch device of `--device`; auto takes a GPU where there is one, with torchrun each process its own.

    With `deterministic`, torch raises RuntimeError for an operation that it cannot repeat bit for bit.
    """
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when the first matrix product is made
        torch.use_deterministic_algorithms(True)
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: torch finds no GPU here; use --device=cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", 0))  # of the processes that torchrun started on this machine
    if number >= torch.cuda.device_count():
        raise UserError(
            f"process {number + 1} of this machine finds {torch.cuda.device_count()} GPUs: give torchrun a lower "
            "--nproc_per_node, or train with --device=cpu"
        )
    return torch.device("cuda", number)
