"""Small things that every script shares: errors, seeds, devices."""

import contextlib
import ctypes
import errno
import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm


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


def say(text):
    """Write a line to standard error, above a progress bar where there is one."""
    tqdm.write(text, file=sys.stderr)


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


def write_atomic(path, data):
    """Write bytes to `path` so that it holds either its old or its new content, whatever happens meanwhile.

    Raises UserError (disk full, file-size limit, folder gone, no permission) and leaves no temporary file.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:  # an interrupt, too, must leave nothing half-written
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise cannot_write(path, error) from error
    sync_folder(path.parent)


def sync_folder(folder):
    """Make a rename in the folder survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cannot_write(path, error):
    """The UserError for an OSError on writing `path`."""
    remedy = {
        errno.ENOSPC: "make room on the disk",
        errno.EDQUOT: "make room in your quota",
        errno.EFBIG: "raise the file-size limit (ulimit -f)",
        errno.ENOENT: "its folder was removed; choose another --log_dir",
    }.get(error.errno, "give yourself permission to write there or choose another --log_dir")
    reason = os.strerror(error.errno or errno.EIO)
    return UserError(f"cannot write {path} ({reason}); what was saved before is whole: {remedy}")


def write_json(path, value, allow_nan=False):
    """Write a JSON file whole or not at all; NumPy scalars become numbers, paths text.

    ValueError for nan and infinity, which are no JSON, but with `allow_nan`.
    """
    write_atomic(path, (json.dumps(value, indent=2, default=json_value, allow_nan=allow_nan) + "\n").encode())


def json_value(value):
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def read_regular(path, what):
    """All bytes of a regular file (a named pipe would block for ever); UserError where it cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path} is not a file: give the path of {what}")
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: give the path of {what}") from error
    except (OSError, ValueError, MemoryError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


@contextlib.contextmanager
def naming_what_to_lower(options):
    """Turn want of memory into a UserError that names the option to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        chunk = options.task_chunk or min(options.batch_size, 16)  # fewer than fit at once by themselves
        if isinstance(error, MemoryError):  # from numpy, which draws all tasks of a batch at once
            remedy = f"lower --batch_size, which is {options.batch_size}"
        elif chunk > 1:
            remedy = f"give --task_chunk={chunk // 2}, which changes no more than last digits"
        else:
            remedy = f"lower --num_samples, which is {options.num_samples}, or --max_seq_len"
        raise UserError(f"out of memory: {remedy}; a checkpoint goes on with --resume") from error


def is_out_of_memory(error):
    """Whether an error is torch's (GPU or CPU), Python's or NumPy's for want of memory."""
    signs = "not enough memory", "can't allocate memory", "bad_alloc", "could not create a primitive"  # oneDNN's words
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)
