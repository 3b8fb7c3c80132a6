"""Checkpoints: what is kept of a run in a file, and where."""

import contextlib
import hashlib
import io
import os
import re
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

import utils
from utils import UserError

CHECKPOINT_VERSION = 1


MAGIC = b"MELO-CKP"


HEADER = struct.Struct("<8sIQQ")  # magic, format version, step, length of the payload


PREFIX_BYTES = HEADER.size + hashlib.sha256().digest_size


STEP_NAME = re.compile(r"step-(\d{8,})\.pt")


def run_folder(log_dir, mode, model, method):
    """The folder of one run; it need not exist."""
    return Path(log_dir) / f"{mode}-{model}-{method}"


def wrong_entry(entries, kinds):
    """Which entry a dictionary lacks or holds in another type than `kinds` ({name: type}) says, or None."""
    for name, kind in kinds.items():
        if name not in entries:
            return f"lacks '{name}'"
        if type(entries[name]) is not kind:
            return f"holds '{name}' as {type(entries[name]).__name__}, not {kind.__name__}"
    return None


def check_fingerprint(stored, fingerprint, source):
    """UserError where `source` (a run or checkpoint) was made from other ratings than those at hand."""
    if stored != fingerprint:
        raise UserError(
            f"{source} belongs to other data (fingerprint {stored!s:.12}, that of the ratings given is "
            f"{fingerprint:.12}): give the same --data_path, --mode and filters"
        )


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
        raise utils.cannot_write(path, error) from error
    utils.write_atomic(path, header + hashlib.sha256(header + payload).digest() + payload)


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
    data = utils.read_regular(path, "a checkpoint")
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


# What a checkpoint holds beside its step; see `save`.
STATE = {
    "system": dict,
    "last": dict,
    "optimizer": dict,
    "loop": dict,
    "options": dict,
    "fingerprint": str,
    "item_ids": list,
    "levels": list,
}
