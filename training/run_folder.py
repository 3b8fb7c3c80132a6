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

import contextlib
import fcntl
import json
import os
import platform
import re
import shlex
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import torch

import options
import utils
from models import checkpoint
from training import distributed
from utils import UserError

CONFIG_VERSION = 1


# ----------------------------------------------------------------------------------------------------
# Files that are whole or absent


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
        raise utils.cannot_write(path, error) from error
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
        raise utils.cannot_write(path, error) from error


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
    files = [*checkpoint.find_checkpoints(folder).values(), *Path(folder).glob("checkpoints/best.pt")]
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
            raise utils.cannot_write(path, error) from error


# ----------------------------------------------------------------------------------------------------
# config.json


def write_config(folder, config):
    """Write `config` with the format version, the versions of what computes and the command line added.

    config: "options" (dict or Namespace), "fingerprint" (of the data), and whatever else JSON can hold.
    """
    whole = {
        **config,
        "options": options.as_stored(config["options"]),
        "versions": versions(),
        "command": command_line(),
        "format_version": CONFIG_VERSION,
    }
    utils.write_json(Path(folder) / "config.json", whole, allow_nan=True)  # --clip_norm=inf


def note_continuation(folder, config, step):
    """Add to `config`, as read from config.json, that the run goes on from `step`: how, and under which versions."""
    earlier = config.get("continued")
    entry = {"step": step, "command": command_line(), "versions": versions()}
    entries = [*(earlier if isinstance(earlier, list) else []), entry]
    utils.write_json(Path(folder) / "config.json", {**config, "continued": entries}, allow_nan=True)


def command_line():
    """The command that started this process, for a shell."""
    return shlex.join(["python", *sys.argv])


def versions():
    """What decides, beside options and data, whether a run can be repeated bit for bit; all as text."""
    threads = str(torch.get_num_threads())  # sums are split among them, and among processes
    if distributed.count() > 1:
        threads += f" in each of {distributed.count()} processes"
    return {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "threads": threads
    }  # fmt: skip


def read_config(folder):
    """The dictionary that `write_config` wrote; UserError where it is missing or not to be used."""
    path = Path(folder) / "config.json"
    data = utils.read_regular(path, "a run's config.json (no run was started in that folder?)")
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
    return checkpoint.wrong_entry(config, {"options": dict, "fingerprint": str, "versions": dict, "command": str})


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
