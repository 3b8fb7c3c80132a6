"""Checkpoints: what is kept of a run in a file, and where.

    <log_dir>/<mode>-<model>-<method>/checkpoints/step-00000100.pt    after iteration 100; the last few are kept
                                      checkpoints/best.pt             the best of validation
                                      checkpoints/weights-00000100.pt what was validated then, to be tested

A checkpoint is what `torch.save` writes of a dictionary of tensors and plain values; `torch.load(path)` opens it. Its
zip archive has a comment: the SHA-256 of all bytes before, which `load_checkpoint` compares. (The CRCs that the archive
has anyway miss a flipped bit in its directory that makes torch read other numbers.)
"""

import contextlib
import hashlib
import io
import os
import re
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

import utils
from utils import UserError

STEP_NAME = re.compile(r"(step|weights)-(\d{8,})\.pt")
MOST_BYTES = 1 << 30  # of all weights of a run without --keep_models, unless two take more
DIGEST = 2 * hashlib.sha256().digest_size  # characters of the comment
WEIGHTS = {"system": dict, "options": dict, "fingerprint": str, "item_ids": list, "levels": list}  # what testing needs
OPTIONAL = {"item_counts": list}  # training ratings of each item; checkpoints of earlier versions lack it
STATE = {**WEIGHTS, "last": dict, "optimizers": list, "loop": dict}  # what going on needs; both have the step, too


def run_folder(log_dir, mode, model, method):
    """The folder of one run; it need not exist."""
    return Path(log_dir) / f"{mode}-{model}-{method}"


def best_path(folder):
    """Where a run keeps the best of validation."""
    return Path(folder) / "checkpoints" / "best.pt"


def find_checkpoints(folder, kind="step"):
    """{step: path} of the periodic checkpoints or, with the kind "weights", of what was validated; ascending."""
    try:
        names = os.listdir(Path(folder) / "checkpoints")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"cannot read {folder}/checkpoints: {error.strerror}: give yourself permission") from error
    steps = sorted((int(match[2]), match[0]) for match in map(STEP_NAME.fullmatch, names) if match and match[1] == kind)
    return {step: Path(folder) / "checkpoints" / name for step, name in steps}


def checkpoint_path(folder, step=-1):
    """The checkpoint of `step`; -1 is the best, or the newest without a best. UserError where there is none."""
    paths, best = find_checkpoints(folder, "weights") | find_checkpoints(folder), best_path(folder)
    has_best = best.is_file()
    if step == -1 and (has_best or paths):
        return best if has_best else paths[max(paths)]
    if step in paths:
        return paths[step]
    if has_best and step == (best_step := step_of(best)):
        return best
    steps = sorted({*paths, *([best_step] if has_best else [])})
    there = [f"{number} (the best)" if has_best and number == best_step else str(number) for number in steps]
    if runs := sorted(Path(folder).glob("*/checkpoints")):
        raise UserError(f"{folder} holds runs and no checkpoint: give one of the runs, such as {runs[0].parent}")
    if not there:
        raise UserError(f"{folder} holds no checkpoint: train first, with the same --log_dir, --mode and method")
    raise UserError(f"{folder} has no checkpoint of step {step}: --checkpoint_step can be {', '.join(there)} or -1")


def step_of(path):
    """The step of a checkpoint, without reading its tensors; -1 where it cannot be read."""
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):  # torch.load raises anything
        step = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["step"]
        return step if type(step) is int else -1
    return -1


# -----------------------------------------------------------------------------
# saving


def save_checkpoint(folder, step, state, keep=3):
    """Save `state` as the checkpoint of `step`, then remove all but the `keep` newest up to it (0: keep all).

    state: a dictionary of tensors, numbers, text, None, lists, tuples and dictionaries of these.
    Returns the path. UserError where it cannot be written; the earlier checkpoints are whole then.
    """
    path = Path(folder) / "checkpoints" / f"step-{step:08d}.pt"
    write_checkpoint(path, step, state)
    if keep:
        remove_older(folder, "step", step, keep)
    return path


def save_weights(folder, step, state, keep=0):
    """Save what testing needs of `state`, then remove all but the `keep` newest such files (0: those in MOST_BYTES)."""
    path = Path(folder) / "checkpoints" / f"weights-{step:08d}.pt"
    write_checkpoint(path, step, {name: state[name] for name in (*WEIGHTS, *OPTIONAL) if name in state})
    remove_older(folder, "weights", step, keep or max(2, MOST_BYTES // path.stat().st_size))


def remove_older(folder, kind, step, keep):
    """Remove all but the `keep` newest files of a kind up to a step."""
    older = [old for number, old in find_checkpoints(folder, kind).items() if number < step]
    for old in older[: max(len(older) - keep + 1, 0)]:
        with contextlib.suppress(OSError):
            old.unlink()


def save_best(folder, step, state):
    """Save `state` as the best checkpoint so far, in place of the one before. Returns the path."""
    write_checkpoint(best_path(folder), step, state)
    return best_path(folder)


def write_checkpoint(path, step, state):
    """Write `state`, with the step in it, to a file whose folder is made where it is missing."""
    file = io.BytesIO()
    torch.save(plain({**state, "step": step}), file)
    file.seek(-2, os.SEEK_END)  # the length of the archive's comment, its last field
    file.write(DIGEST.to_bytes(2, "little"))
    file.write(hashlib.sha256(file.getbuffer()).hexdigest().encode())
    utils.make_folder(path.parent)
    utils.write_atomic(path, file.getbuffer())


def plain(value, name="state"):
    """A copy of nested values that `weights_only=True` loads: tensors contiguous and on the CPU, the rest Python's own.

    A view would save its whole storage.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {plain(key, name): plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item, f"{name}[{i}]") for i, item in enumerate(value))
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}: a checkpoint holds tensors and plain values only")


# -----------------------------------------------------------------------------
# loading


def load_newest(folder, kinds=None):
    """The state of the newest whole checkpoint, None where there is no checkpoint at all; `kinds` as below.

    The best of validation counts too: going on from an older one would leave it ahead of the run. A damaged
    checkpoint is skipped with a warning on standard error for the one before; UserError where all are.
    """
    paths = list(find_checkpoints(folder).items())
    if (best := best_path(folder)).is_file():
        paths.append((step_of(best), best))
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

    UserError where the file does not exist, is damaged or no checkpoint, or holds anything but tensors and plain
    values (nothing of it is run).
    """
    data = utils.read_regular(path, "a checkpoint")
    if hashlib.sha256(memoryview(data)[:-DIGEST]).hexdigest().encode() != data[-DIGEST:]:
        raise UserError(f"{path} is damaged or no checkpoint (its checksum does not fit): use another checkpoint")
    try:
        refuse_inflation(data)
        with warnings.catch_warnings(action="ignore"):  # of odd pickles; they are refused in one sentence
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        check_plain(state, len(data))
        if type(state["step"]) is not int or not 0 <= state["step"] < 1 << 63:
            raise ValueError("no step")
    except Exception as error:  # torch.load has no error class of its own, and the file may come from anybody
        what = "it holds something other than tensors and plain values"
        raise UserError(f"{path} was not written by this program ({what}): use another checkpoint") from error
    if problem := wrong_entry(state, kinds or {}):
        raise UserError(f"{path} {problem}: use another checkpoint")
    return state


def refuse_inflation(data):
    """ValueError where an archive would unpack to more than its own size; `torch.save` does not compress."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > len(data):
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


def wrong_entry(entries, kinds):
    """Which entry a dictionary lacks or holds in another type than `kinds` ({name: type}) says, or None."""
    for name, kind in kinds.items():
        if name not in entries:
            return f"lacks '{name}'"
        if not isinstance(entries[name], kind) or isinstance(entries[name], bool):
            return f"holds '{name}' as {type(entries[name]).__name__}, not {kind.__name__}"
    if "item_ids" in kinds and not is_catalogue(entries["item_ids"]):
        return "holds 'item_ids' that are not distinct numbers or distinct texts"
    return None


def is_catalogue(ids):
    """Whether item ids, a list, are distinct numbers or distinct texts, each of which can be printed."""
    if {type(item) for item in ids} not in ({int}, {str}) or len(set(ids)) < len(ids):
        return False
    with contextlib.suppress(ValueError):  # lone surrogates, numbers of thousands of digits
        return bool("".join(map(str, ids)).encode())
    return False


def check_fingerprint(stored, fingerprint, source):
    """UserError where `source` (a run or checkpoint) was made from other ratings than those at hand."""
    if stored != fingerprint:
        other = f"fingerprint {stored!s:.12}, that of the ratings given is {fingerprint:.12}"
        raise UserError(f"{source} belongs to other data ({other}): give the same --data_path, --mode and filters")
