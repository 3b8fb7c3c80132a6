"""A run's folder: its lock, its `config.json`, its checkpoints, and how a run is stopped and continued.

    <log_dir>/<mode>-<model>-<method>/
        lock                            process id and host of the run that writes here; empty when none does
        config.json                     options, versions, data fingerprint, command, continuations
        checkpoints/step-00000100.pt    after iteration 100; the last few are kept
        checkpoints/best.pt             the best of validation
        events.out.tfevents.*           for TensorBoard: one of each start, and one of the test
        projector/, projector_config.pbtxt    likewise: the items, once the run has ended
        test.json                       what --test found

A checkpoint is a header (magic, format version, step, length), the SHA-256 of header and payload, and the
payload, which `torch.save` made of tensors and plain values only. It is loaded from the verified bytes with
`weights_only=True`, so that a file from somebody else cannot run code.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import platform
import re
import shlex
import signal
import socket
import stat
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

import processes
from utils import UserError

CONFIG_VERSION = 1
CHECKPOINT_VERSION = 1
MAGIC = b"MELO-CKP"
HEADER = struct.Struct("<8sIQQ")  # magic, format version, step, length of the payload
PREFIX_BYTES = HEADER.size + hashlib.sha256().digest_size
STEP_NAME = re.compile(r"step-(\d{8,})\.pt")

# What may differ when a run goes on: where things are (the data's fingerprint is checked instead), what is
# shown, how often is saved, how much is computed at once, and what was asked of this one command.
MAY_CHANGE = (
    "cache_dir",
    "checkpoint_interval",
    "checkpoint_minutes",
    "checkpoint_step",
    "data_path",
    "data_url",
    "device",
    "keep_checkpoints",
    "log_dir",
    "log_interval",
    "overwrite",
    "pretrain_log_dir",
    "resume",
    "skip_nonfinite",
    "task_chunk",
    "test",
    "test_baseline",
)
MAY_GROW = ("num_train_iterations", "pretrain_epochs")


def run_folder(log_dir, mode, model, method):
    """The folder of one run; it need not exist."""
    return Path(log_dir) / f"{mode}-{model}-{method}"


# ----------------------------------------------------------------------------------------------------
# Files that are whole or absent


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


# ----------------------------------------------------------------------------------------------------
# One run at a time


@contextlib.contextmanager
def lock_folder(folder):
    """Create the folder and hold it for this process; a second run in it gets a UserError.

    The lock ends with the process, however it dies, so that a dead one's is taken over. One left by a process
    of another host is respected: its end cannot be seen from here.
    """
    folder = Path(folder)
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        claim(descriptor, path)
        try:
            remove_leftovers(folder)
            yield
        finally:
            # Emptied, not removed: with the name gone, two later runs could lock two different files.
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def claim(descriptor, path):
    """Take the lock and write process id and host into it, or raise UserError with those of the holder."""
    free = try_lock(descriptor)
    process, host = holder(descriptor)
    here = socket.gethostname()
    if free is None and host == here:
        free = not is_alive(process)
    elif host not in (here, ""):
        free = False
    if free is False:
        raise UserError(
            f"{path.parent} is in use by process {process or 'unknown'} on host {host or 'unknown'}: "
            f"wait for it, choose another --log_dir, or, if that process is gone, remove {path}"
        )
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {here}\n".encode(), 0)
    except OSError as error:
        raise cannot_write(path, error) from error


def try_lock(descriptor):
    """True where this process now holds the lock, False where another does, None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def holder(descriptor):
    """(process id, host) from a lock file; (0, "") where it is empty or not to be understood."""
    words = os.pread(descriptor, 1000, 0).decode(errors="replace").split()
    if len(words) != 2 or not re.fullmatch(r"[1-9][0-9]{0,8}", words[0]):
        return 0, ""
    return int(words[0]), words[1]


def is_alive(process):
    """Whether a process of this host runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return process > 0


def remove_leftovers(folder):
    """Remove the temporary files of a run that was killed while writing."""
    for pattern in ("*.tmp", "checkpoints/*.tmp"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                path.unlink()


def check_folder(folder, options):
    """UserError where a run cannot begin in a folder; to be told before reading and fitting have taken their time."""
    if Path(folder).is_dir():
        with lock_folder(folder):
            if not options.resume:
                check_new(folder, options.overwrite)


def check_new(folder, overwrite=False):
    """The checkpoints that a folder holds; UserError where there are any and not `overwrite`."""
    files = [*find_checkpoints(folder).values(), *Path(folder).glob("checkpoints/best.pt")]
    if files and not overwrite:
        raise UserError(
            f"{folder} holds a run already: go on with --resume, begin anew with --overwrite, or give another --log_dir"
        )
    return files


def start_anew(folder, overwrite=False):
    """Make a locked folder ready for a new run; UserError where it holds one already and not `overwrite`."""
    files = check_new(folder, overwrite)
    for pattern in ("events.out.tfevents.*", "projector*", "projector/*.tsv", "test.json"):
        files += filter(Path.is_file, Path(folder).glob(pattern))
    for path in files:
        try:
            path.unlink()
        except OSError as error:
            raise cannot_write(path, error) from error


# ----------------------------------------------------------------------------------------------------
# config.json


def write_config(folder, config):
    """Write `config` with the format version, the versions of what computes and the command line added.

    config: "options" (dict or Namespace), "fingerprint" (of the data), and whatever else JSON can hold.
    """
    whole = {
        **config,
        "options": as_stored(config["options"]),
        "versions": versions(),
        "command": command_line(),
        "format_version": CONFIG_VERSION,
    }
    write_json(Path(folder) / "config.json", whole, allow_nan=True)  # --clip_norm=inf


def note_continuation(folder, config, step):
    """Add to `config`, as read from config.json, that the run goes on from `step`: how, and under which versions."""
    earlier = config.get("continued")
    entry = {"step": step, "command": command_line(), "versions": versions()}
    entries = [*(earlier if isinstance(earlier, list) else []), entry]
    write_json(Path(folder) / "config.json", {**config, "continued": entries}, allow_nan=True)


def command_line():
    """The command that started this process, for a shell."""
    return shlex.join(["python", *sys.argv])


def versions():
    """What decides, beside options and data, whether a run can be repeated bit for bit; all as text."""
    threads = str(torch.get_num_threads())  # sums are split among them, and among processes
    if processes.count() > 1:
        threads += f" in each of {processes.count()} processes"
    return {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "threads": threads
    }  # fmt: skip


def read_config(folder):
    """The dictionary that `write_config` wrote; UserError where it is missing or not to be used."""
    path = Path(folder) / "config.json"
    data = read_regular(path, "a run's config.json (no run was started in that folder?)")
    try:
        config = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, not JSON: train again in another --log_dir") from error
    problem = config_problem(config)
    if problem:
        raise UserError(f"{path} {problem}: train again in another --log_dir")
    return config


def config_problem(config):
    """What is wrong with a parsed config.json, or None."""
    if not isinstance(config, dict):
        return "holds no JSON object"
    version = config.get("format_version")
    if type(version) is not int or version != CONFIG_VERSION:
        return f"is of format version {version!r:.40}, and this program reads version {CONFIG_VERSION}"
    return wrong_entry(config, {"options": dict, "fingerprint": str, "versions": dict, "command": str})


def wrong_entry(entries, kinds):
    """Which entry a dictionary lacks or holds in another type than `kinds` ({name: type}) says, or None."""
    for name, kind in kinds.items():
        if name not in entries:
            return f"lacks '{name}'"
        if type(entries[name]) is not kind:
            return f"holds '{name}' as {type(entries[name]).__name__}, not {kind.__name__}"
    return None


def as_stored(options):
    """Options as they come back from JSON: tuples are lists, paths are text."""
    if isinstance(options, argparse.Namespace):
        options = vars(options)
    return json.loads(json.dumps(options, default=json_value))


def check_resume(stored_options, options, may_change=MAY_CHANGE, may_grow=MAY_GROW):
    """UserError that lists every option that differs from the stored one and may neither change nor grow.

    An option that one side does not have counts as None, not given.
    """
    try:
        old, new = as_stored(stored_options), as_stored(options)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError("the options that the run began with are damaged: train again in another --log_dir") from error
    differences = []
    for name in sorted((old.keys() | new.keys()) - set(may_change)):
        before, after = old.get(name), new.get(name)
        if before == after and type(before) is type(after):
            continue
        if name in may_grow and is_number(before) and is_number(after) and after > before:
            continue
        differences.append(f"--{name} was {shown(old, name)} and is now {shown(new, name)}")
    if differences:
        raise UserError(
            "a run goes on with the options it began with, but "
            + ", ".join(differences)
            + ": give the old values, or start a run in another --log_dir"
        )


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(options, name):
    return f"{options[name]!r:.200}" if name in options else "not there"


def check_fingerprint(stored, fingerprint, source):
    """UserError where `source` (a run or checkpoint) was made from other ratings than those at hand."""
    if stored != fingerprint:
        raise UserError(
            f"{source} belongs to other data (fingerprint {stored!s:.12}, that of the ratings given is "
            f"{fingerprint:.12}): give the same --data_path, --mode and filters"
        )


def warn_versions(config):
    """Say on standard error where a run goes on under other versions or threads: its bits may then differ."""
    changes = [
        f"{name} {config['versions'].get(name)} -> {version}"
        for name, version in versions().items()
        if config["versions"].get(name) != version
    ]
    if changes:
        print(
            f"warning: versions or threads have changed ({', '.join(changes)}): last digits may differ", file=sys.stderr
        )


# ----------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(folder, step, state, keep=3):
    """Save `state` as the checkpoint of `step`, then remove all but the `keep` newest up to it (0: keep all).

    state: a dictionary of tensors, numbers, text, None, lists, tuples and dictionaries of these.
    Returns the path. UserError where it cannot be written; the earlier checkpoints are whole then.
    """
    path = Path(folder) / "checkpoints" / f"step-{step:08d}.pt"
    write_checkpoint(path, step, state)
    if keep:
        older = [old for number, old in find_checkpoints(folder).items() if number < step]
        for old in older[: max(len(older) - keep + 1, 0)]:
            with contextlib.suppress(OSError):
                old.unlink()
    return path


def save_best(folder, step, state):
    """Save `state` as the best checkpoint so far, in place of the one before. Returns the path."""
    path = Path(folder) / "checkpoints" / "best.pt"
    write_checkpoint(path, step, state)
    return path


def write_checkpoint(path, step, state):
    payload = io.BytesIO()
    torch.save(plain({**state, "step": step}), payload)
    payload = payload.getvalue()
    header = HEADER.pack(MAGIC, CHECKPOINT_VERSION, step, len(payload))
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    write_atomic(path, header + hashlib.sha256(header + payload).digest() + payload)


def plain(value, name="state"):
    """A copy of nested values that `weights_only=True` loads; equal values give equal bytes.

    Tensors become contiguous copies on the CPU (a view would save its whole storage), NumPy scalars Python's.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {plain(key, name): plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item, f"{name}[{i}]") for i, item in enumerate(value))
    if type(value) is str:
        return sys.intern(value)  # pickle writes the same object twice as a reference: identity would show
    if value is None or type(value) in (bool, int, float):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}: a checkpoint holds tensors and plain values only")


def find_checkpoints(folder):
    """{step: path} of the periodic checkpoints, ascending; empty where there are none."""
    try:
        names = os.listdir(Path(folder) / "checkpoints")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"cannot read {folder}/checkpoints: {error.strerror}") from error
    steps = sorted((int(match[1]), match[0]) for match in map(STEP_NAME.fullmatch, names) if match)
    return {step: Path(folder) / "checkpoints" / name for step, name in steps}


def checkpoint_path(folder, step=-1):
    """The checkpoint of `step`; -1 is the best, or the newest without a best. UserError where none is."""
    steps = find_checkpoints(folder)
    best = Path(folder) / "checkpoints" / "best.pt"
    best_step = step_of(best) if best.is_file() else None
    if step == -1 and best.is_file():
        return best
    if step == -1 and steps:
        return steps[max(steps)]
    if step in steps:
        return steps[step]
    if step == best_step:
        return best
    there = [str(number) for number in steps] + ([f"{best_step} (the best)"] if best_step is not None else [])
    if not there:
        raise UserError(f"{folder} holds no checkpoint: train first, with the same --log_dir, --mode and method")
    raise UserError(f"{folder} has no checkpoint of step {step}: --checkpoint_step can be {', '.join(there)} or -1")


def step_of(path):
    """The step in a checkpoint's header, or None where it has no readable one."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        header = file.read(HEADER.size)
        if len(header) == HEADER.size and header.startswith(MAGIC):
            return HEADER.unpack(header)[2]
    return None


def load_newest(folder, kinds=None):
    """The state of the newest whole checkpoint, None where there is no checkpoint at all; `kinds` as below.

    The best of validation counts too: going on from an older one would leave it ahead of the run. A damaged
    checkpoint is skipped with a warning on standard error for the one before; UserError where all are.
    """
    paths = list(find_checkpoints(folder).items())
    best = Path(folder) / "checkpoints" / "best.pt"
    if best.is_file():
        paths.append((-1 if (step := step_of(best)) is None else step, best))
    for _, path in sorted(paths, reverse=True):
        try:
            return load_checkpoint(path, kinds)
        except UserError as error:
            print(f"warning: {error}; trying the checkpoint before it", file=sys.stderr)
    if paths:
        raise UserError(f"no checkpoint in {folder} can be used: train again in another --log_dir")
    return None


def load_checkpoint(path, kinds=None):
    """The state of a checkpoint, a dictionary with its "step", tensors on the CPU.

    kinds: {name: type} of the entries that it must hold.

    UserError where the file does not exist, is not a checkpoint, is truncated, damaged, of another format
    version, or holds anything but tensors and plain values (nothing of it is run).
    """
    data = read_regular(path, "a checkpoint")
    payload = verified_payload(data, path)
    try:
        refuse_inflation(payload)
        with warnings.catch_warnings(action="ignore"):  # of odd pickles; they are refused in one sentence
            state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        check_plain(state, len(payload))
        if type(state.get("step")) is not int or state["step"] != HEADER.unpack_from(data)[2]:
            raise ValueError("another step inside than in the header")
    except Exception as error:  # torch.load has no error class of its own, and the file may come from anybody
        raise UserError(
            f"{path} was not written by this program and is refused "
            f"(it holds something other than tensors and plain values): use another checkpoint"
        ) from error
    if problem := wrong_entry(state, kinds or {}):
        raise UserError(f"{path} {problem}: use another checkpoint")
    return state


def verified_payload(data, path):
    """The payload of a checkpoint's bytes, whose checksum was compared. UserError where it is not whole."""
    if len(data) < PREFIX_BYTES and MAGIC.startswith(data[: len(MAGIC)]):
        raise UserError(f"{path} is truncated ({len(data)} bytes): use another checkpoint")
    if not data.startswith(MAGIC):
        raise UserError(f"{path} is not a checkpoint of this program, or its first bytes are damaged")
    _, version, _, length = HEADER.unpack_from(data)
    if version != CHECKPOINT_VERSION:
        raise UserError(
            f"{path} is of format version {version}, and this program reads version {CHECKPOINT_VERSION}: "
            "load it with the version of the program that wrote it, or train again"
        )
    whole = PREFIX_BYTES + length
    if len(data) < whole:
        raise UserError(f"{path} is truncated ({len(data)} of {whole} bytes): use another checkpoint")
    payload = data[PREFIX_BYTES:]
    if hashlib.sha256(data[: HEADER.size] + payload).digest() != data[HEADER.size : PREFIX_BYTES]:
        raise UserError(f"{path} is damaged (its checksum does not fit): use another checkpoint")
    return payload


def refuse_inflation(payload):
    """ValueError where an archive would unpack to more than its own size; `torch.save` does not compress."""
    with zipfile.ZipFile(io.BytesIO(payload)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > len(payload):
            raise ValueError("compressed entries")


def check_plain(state, budget):
    """ValueError unless `state` is a dictionary of plain values and contiguous tensors on the CPU.

    budget: bytes of the file. Each saved value takes one or more, each tensor its elements; what comes to
    more was built from references or strides, to fill the memory or to hang us.
    """
    if type(state) is not dict:
        raise ValueError("not a dictionary")
    values = [state]
    while values:
        value = values.pop()
        budget -= 1
        if type(value) is dict:
            values.extend(value)
            values.extend(value.values())
        elif type(value) in (list, tuple):
            values.extend(value)
        elif type(value) is torch.Tensor:
            if value.layout != torch.strided or value.device.type != "cpu" or not value.is_contiguous():
                raise ValueError("a tensor that was not saved from here")
            budget -= value.nbytes
        elif value is not None and type(value) not in (bool, int, float, str):
            raise ValueError(f"a {type(value).__name__}")
        if len(values) > budget:
            raise ValueError("more values than bytes")


# ----------------------------------------------------------------------------------------------------
# Signals


class Interruption:
    """While entered, SIGINT and SIGTERM only set `signal`, which the training loop reads every iteration.

    A second SIGINT stops at once: every file is written whole or not at all, so nothing is harmed.
    `exit_code` is 130 after SIGINT, 143 after SIGTERM, 0 where the loop saw no signal.
    """

    def __init__(self):
        self.signal = 0  # what came to this process
        self.agreed = 0  # what the loop has seen, the same in all processes

    @property
    def requested(self):
        return self.agreed != 0

    @property
    def exit_code(self):
        return 128 + self.agreed if self.agreed else 0

    def __enter__(self):
        signals = signal.SIGINT, signal.SIGTERM
        self.before = {number: signal.signal(number, self.handle) for number in signals}
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt:
            raise SystemExit(128 + signal.SIGINT) from None

    def handle(self, number, frame):
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or int(number)
        # os.write, because print may not be entered again from a handler.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this iteration (Ctrl-C again: at once)\n")
