"""A run's folder: its lock, its `config.json`, and the signals that stop a run.

<log_dir>/<mode>-<model>-<method>/
    lock, holder                            of the run that writes here: its process id and host
    config.json                             options, versions, data fingerprint, command, continuations
    checkpoints/                            see `models.checkpoint`
    events.out.tfevents.*                   for TensorBoard: one file of each start, and one of the test
    projector/, projector_config.pbtxt      for TensorBoard, too: the items, once the run has ended
    test.json                               what --test found
"""

import contextlib
import json
import os
import platform
import shlex
import signal
import socket
import sys
import threading
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

import options
import utils
from models import checkpoint
from training import distributed
from utils import UserError

CONFIG_VERSION = 1
CONFIG = {"format_version": int, "options": dict, "fingerprint": str, "versions": dict, "command": str}

# -----------------------------------------------------------------------------
# one run at a time


@contextlib.contextmanager
def lock_folder(folder):
    """Create the folder and hold it for this process; a second run in it gets a UserError.

    The lock ends with the process, however it dies. What a killed run left half-written is removed.
    """
    folder = Path(folder)
    lock, holder = FileLock(folder / "lock", timeout=0), folder / "holder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_links(folder)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{folder} is in use by {read_holder(holder)}: wait, or choose another --log_dir") from error
    except OSError as error:
        raise utils.cannot_write(folder / "lock", error) from error
    try:
        for path in (*folder.glob("*.tmp"), *folder.glob("*/*.tmp")):
            with contextlib.suppress(OSError):
                path.unlink()
        with contextlib.suppress(OSError):  # a full disk is noticed soon enough
            holder.write_text(f"process {os.getpid()} on host {socket.gethostname()}")
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()


def read_holder(path):
    """Who holds a lock, as its holder wrote it."""
    with contextlib.suppress(UserError, ValueError):
        return utils.read_regular(path, "").decode("ascii")[:100] or "another process"
    return "another process"


def refuse_links(folder):
    """UserError where a run's folder holds a link: what is written through it would land elsewhere."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise UserError(f"{path} is a link, and a run writes in its own folder alone: remove it")


def check_folder(folder, options):
    """UserError where a run cannot begin in a folder; to be told before reading and fitting have taken their time."""
    if Path(folder).is_dir():
        with lock_folder(folder):
            if not options.resume:
                check_new(folder, options.overwrite)


def check_new(folder, overwrite=False):
    """UserError where a folder holds a run already and that is not to be overwritten."""
    if not overwrite and (checkpoint.find_checkpoints(folder) or checkpoint.best_path(folder).exists()):
        remedy = "go on with --resume, start again with --overwrite, or give another --log_dir"
        raise UserError(f"{folder} holds a run already: {remedy}")


def clear_folder(folder, overwrite=False):
    """Make a locked folder ready for a new run; UserError where it holds one already and not `overwrite`."""
    check_new(folder, overwrite)
    for pattern in ("checkpoints/*.pt", "events.out.tfevents.*", "projector*", "projector/*.tsv", "test.json"):
        for path in filter(Path.is_file, Path(folder).glob(pattern)):
            try:
                path.unlink()
            except OSError as error:
                raise utils.cannot_write(path, error) from error


# -----------------------------------------------------------------------------
# config.json


def write_config(folder, config):
    """Write `config` with the format version, the versions of what computes and the command line added.

    config: "options" (dict or Namespace), "fingerprint" (of the data), and whatever else JSON can hold.
    """
    added = {"versions": versions(), "command": command_line(), "format_version": CONFIG_VERSION}
    config = {**config, "options": options.as_stored(config["options"]), **added}
    utils.write_json(Path(folder) / "config.json", config, allow_nan=True)  # --checkpoint_minutes=inf


def note_continuation(folder, config, step):
    """Add to `config`, as read from config.json, that the run goes on from `step`: how, and under which versions."""
    earlier = config.get("continued")
    entry = {"step": step, "command": command_line(), "versions": versions()}
    entries = [*(earlier if isinstance(earlier, list) else []), entry]
    utils.write_json(Path(folder) / "config.json", {**config, "continued": entries}, allow_nan=True)


def read_config(folder):
    """The dictionary that `write_config` wrote; UserError where it is missing or not to be used."""
    path = Path(folder) / "config.json"
    data = utils.read_regular(path, "a run's config.json (no run was started in that folder?)")
    try:
        config = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, not JSON: train again in another --log_dir") from error
    problem = "holds no JSON object"
    if isinstance(config, dict):
        version = config.get("format_version")
        other = f"is of format version {version!r:.40}, and this program reads version {CONFIG_VERSION}"
        known = type(version) is int and version == CONFIG_VERSION
        problem = checkpoint.wrong_entry(config, CONFIG) if known else other
    if problem:
        raise UserError(f"{path} {problem}: train again in another --log_dir")
    return config


def command_line():
    """The command that started this process, for a shell."""
    return shlex.join(["python", *sys.argv])


def versions():
    """What decides, beside options and data, whether a run can be repeated bit for bit; all as text."""
    threads = str(torch.get_num_threads())  # sums are split among them, and among ranks
    if distributed.world_size() > 1:
        threads += f" in each of {distributed.world_size()} ranks"
    return {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "threads": threads
    }  # fmt: skip


def warn_versions(config):
    """Say on standard error where a run goes on under other versions or threads: its bits may then differ."""
    before = config["versions"]
    changes = [f"{name} {before.get(name)} -> {now}" for name, now in versions().items() if before.get(name) != now]
    if changes:
        utils.say(f"warning: versions or threads have changed ({', '.join(changes)}): last digits may differ")


# -----------------------------------------------------------------------------
# signals

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interruption:
    """While entered, SIGINT, SIGTERM and SIGHUP only set `signal`, which the training loop reads every iteration.

    A second SIGINT stops at once: every file is written whole or not at all, so nothing is harmed.
    `exit_code` is 130 after SIGINT, 143 after SIGTERM, 129 after SIGHUP, 0 where the loop saw no signal.
    """

    def __init__(self):
        self.signal = 0  # what came to this process
        self.agreed = 0  # what the loop has seen, the same in all ranks

    @property
    def requested(self):
        return self.agreed != 0

    @property
    def exit_code(self):
        return 128 + self.agreed if self.agreed else 0

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            heeded = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
            self.before = {number: signal.signal(number, self.handle) for number in heeded}
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
        with contextlib.suppress(OSError):  # os.write, because print may not be entered again from a handler
            os.write(2, b"\nstopping after this iteration (Ctrl-C again: at once)\n")
