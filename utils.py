"""Small things that every script shares: errors, output, seeds, devices, files."""

import contextlib
import errno
import io
import json
import os
import re
import stat
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

PATIENCE = 5  # seconds to wait for the program at the other end of a pipe


class UserError(Exception):
    """A mistake in what the user gave; its text is one sentence that says what to change."""


# -----------------------------------------------------------------------------
# the boundary of all scripts


def run_script(main, needs_output=True):
    """Run `main()` and exit with its status, whatever happens outside the program.

    A `UserError`, an error of the operating system and a lack of memory become one line on standard error and status
    2. Ctrl-C gives status 130. Nothing fails where standard output goes away; a script that `needs_output` for its
    result then ends with status 2, unless the reader had enough (`| head`).
    """
    output = keep_streams()
    status = exit_status(main)
    sys.stdout.flush()
    if output and output.lost and output.lost.errno != errno.EPIPE:
        kind = "error" if needs_output else "warning"
        say(f"{kind}: cannot write to standard output ({output.lost.strerror}): send it to a file on a disk with room")
        status = status or 2 * needs_output
    sys.exit(status)


def exit_status(main):
    """The status that `main()` returns, or that of the error that it raises, which is printed in one line."""
    try:
        return main()
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except Exception as error:
        if (text := explain(error)) is None:
            raise
        say(f"error: {text}")
        return 2


def explain(error):
    """One sentence for an error that comes from outside the program, None for a mistake in it."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory: end other programs, or use a machine with more memory"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot use {error.filename or 'a file'} ({error.strerror}): give another path, or permission"
    return None


class Output(io.FileIO):
    """Standard output or error, to which writing never fails: what follows the first error, `lost`, is dropped."""

    lost = None

    def write(self, data):
        if self.lost is None:
            try:
                return super().write(data)
            except OSError as error:
                self.lost = error
        return memoryview(data).nbytes


def keep_streams():
    """Replace standard output and error by `Output`s that print every character. Returns that of standard output.

    It is None where somebody has replaced standard output before.
    """
    for number in range(3):  # a closed one must not become the number of a file that is opened later
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)
    for name, number in (("stderr", 2), ("stdout", 1)):
        stream, output = getattr(sys, name), None
        if stream is getattr(sys, f"__{name}__"):
            output = Output(number, "w", closefd=False)
            encoding = stream.encoding if stream else "utf-8"
            by_line = number == 2 or output.isatty()
            text = io.TextIOWrapper(io.BufferedWriter(output), encoding, "backslashreplace", line_buffering=by_line)
            text.was_closed = stream is None
            setattr(sys, name, text)
    return output


def is_closed(stream):
    """Whether a standard stream was closed before the program began."""
    return stream is None or getattr(stream, "was_closed", False)


# -----------------------------------------------------------------------------
# text


def say(text):
    """Write one line to standard error, above a progress bar where there is one."""
    tqdm.write(printable(text), file=sys.stderr)


# Control characters, line ends, changes of the writing direction, and what is no character at all.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text):
    """Text from outside that can do nothing to a terminal, in one line: odd characters become escapes such as \\x1b."""
    return UNPRINTABLE.sub(escape, str(text))


def shorten(text, width=80):
    """The text in one printable line of at most `width` characters."""
    text = printable(str(text).strip("\r\n")[: width + 1])
    return text if len(text) <= width else f"{text[: width - 3].rstrip()}..."


def escape(found):
    number = ord(found[0])
    if 0xDC80 <= number <= 0xDCFF:  # a byte of a file's name that is not UTF-8
        number -= 0xDC00
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


# -----------------------------------------------------------------------------
# seeds and devices


def random_stream(seed, *stream):
    """A separate NumPy generator for each (seed, stream...). Nothing reads global random state."""
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
        remedy = "give torchrun a lower --nproc_per_node, or train with --device=cpu"
        raise UserError(f"process {number + 1} of this machine finds {torch.cuda.device_count()} GPUs: {remedy}")
    return torch.device("cuda", number)


# -----------------------------------------------------------------------------
# files


def write_atomic(path, data):
    """Write bytes to `path` so that it holds either its old or its new content, whatever happens.

    A link is replaced, not followed. UserError where the file cannot be written; no temporary file is left.
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


def write_output(path, data):
    """Write bytes to a path that the user named: into a device, a pipe or the file behind a link, or `write_atomic`."""
    try:
        target = Path(path).resolve()
        if not Path(path).exists() or target.is_file() or target.is_dir():
            return write_atomic(target, data)
        with open(wait_for_reader(path), "wb") as file:
            file.write(data)
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself
        raise cannot_write(path, error) from error


def wait_for_reader(path):
    """A descriptor of a device, or of a named pipe once a program reads it; OSError where none does."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
            os.set_blocking(descriptor, True)
            return descriptor
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > until:
                raise
            time.sleep(0.02)


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
    number = getattr(error, "errno", None) or (errno.ELOOP if isinstance(error, RuntimeError) else errno.EIO)
    remedy = {
        errno.ENOSPC: "make room on the disk",
        errno.EDQUOT: "make room in your quota",
        errno.EFBIG: "raise the file-size limit (ulimit -f)",
        errno.ENOENT: "its folder is missing or was removed; make it again or choose another",
        errno.EISDIR: "it is a folder; give the name of a file",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.ENXIO: "it is a pipe that no program reads; start the program first",
    }.get(number, "give yourself permission to write there or choose another folder")
    return UserError(f"cannot write {path} ({os.strerror(number)}); what was saved before is whole: {remedy}")


def make_folder(path, parents=False):
    """Make a folder, and with `parents` those that it is in, where there is none; UserError where that cannot be."""
    try:
        path.mkdir(parents=parents, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_json(path, value, allow_nan=False):
    """Write a JSON file whole or not at all; NumPy scalars become numbers, paths text.

    ValueError for nan and infinity, which JSON does not know, unless `allow_nan`.
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
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}: give a path that can be read") from error


# -----------------------------------------------------------------------------
# a lack of memory


# Sizes that take memory, with a usual value of each.
USUAL = {
    "num_factors": 16, "members": 1, "bert_hidden_units": 32, "bert_num_blocks": 2, "narm_hidden_size": 32,
    "narm_n_layers": 1, "gru4rec_hidden_size": 32, "gru4rec_n_layers": 1, "lstm_hidden": 16, "lstm_num_layers": 1,
    "lstm_input_size": 5, "loss_num_layers": 1, "num_inner_steps": 5, "max_seq_len": 30, "num_samples": 1,
    "num_query_set": 10, "batch_size": 128,
}  # fmt: skip
OF_MODEL = [name for name in USUAL if name.startswith(("num_f", "bert", "narm", "gru", "lstm", "loss", "num_inner"))]
OF_TASKS = ("batch_size", "max_seq_len", "num_samples", "num_query_set")  # what decides how large drawn tasks are
MORE_MEMORY = "use a machine with more memory"


@contextlib.contextmanager
def naming_what_to_lower(options, stage="training"):
    """Turn a lack of memory into a UserError that names what helps, usually an option to lower.

    stage: "reading" ratings, "building" a system, or "training", for any work on tasks.
    """
    try:
        yield
    except (MemoryError, RuntimeError, ValueError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        if stage == "reading":
            remedy = f"give --data_path a smaller file, or {MORE_MEMORY}"
        elif stage == "building":
            remedy = largest(options, [name for name in USUAL if name != "batch_size"])
            remedy = remedy or f"raise --min_item, which is {options.min_item}, to have fewer items, or {MORE_MEMORY}"
        else:
            remedy = f"{what_helps_training(options, error)}; a checkpoint goes on with --resume"
        raise UserError(f"out of memory: {remedy}") from error


def what_helps_training(options, error):
    if isinstance(error, MemoryError | ValueError):  # of NumPy, which draws all tasks of a batch at once
        return largest(options, OF_TASKS) or f"lower --batch_size, which is {options.batch_size}"
    chunk = options.task_chunk or min(options.batch_size, 16)  # parts that are cut without it hold more tasks
    if chunk > 1:
        return f"give --task_chunk={chunk // 2}, which changes no more than last digits"
    return largest(options, USUAL) or f"lower --max_seq_len, which is {options.max_seq_len}, or {MORE_MEMORY}"


def largest(options, names):
    """Advice to lower the option that is furthest above its usual value, or None where none is above it."""
    learner = "bert" if options.model in ("bert4rec", "sasrec") else options.model
    others = tuple({"bert", "narm", "gru4rec"} - {learner})
    above = {name: getattr(options, name) / USUAL[name] for name in names if not name.startswith(others)}
    name = max(above, key=above.get)
    return f"lower --{name}, which is {getattr(options, name)}" if above[name] > 1 else None


def is_out_of_memory(error):
    """Whether an error is torch's (GPU or CPU), Python's, NumPy's or the system's for a lack of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    signs = "not enough memory|can't allocate memory|bad_alloc|array is too big|could not create a primitive"
    return isinstance(error, RuntimeError | ValueError) and re.search(signs, str(error)) is not None
