"""A trained run as one file for another machine, and the model card beside it; docs/SERVING.md describes the format."""

import hashlib
import json
import math
import os
from pathlib import Path

import torch

import options as option_module
import utils
from evaluation import metrics
from models import checkpoint
from options import PLACES
from utils import UserError

VERSION = 1
ENTRIES = {**checkpoint.WEIGHTS, "step": int}
LONGEST_ID = 128  # characters
MARK = "<!-- model card written by recommend.py --export -->"

CARD = """# {name}

{mark}

A meta-learned sequential recommender. It adapts to a new user by {num_inner_steps} gradient steps on the user's own
ratings and predicts ratings of {n_items:,} items. Method {method}, learner {model}, checkpoint of iteration {step}.

    from recommend import Recommender
    Recommender.load("{name}").adapt([({example!r}, {high:g})]).top(10)

or `python recommend.py --run={name} --ratings=me.csv`. docs/SERVING.md describes the file's format.

## Data

`--mode={mode}`, ratings from {low:g} to {high:g} (levels {level_list}). Items have at least {min_item} ratings, users
at least {min_sequence}. Fingerprint of the filtered ratings: `{fingerprint}`. The file holds item ids and learned
parameters. It holds no user's ratings and no user id.

## Figures

{figures}

## Limits

Items that are not in the file cannot be predicted. The {support} most recent ratings of a user are used. A user
without a known rating gets the unadapted prediction. Predictions were tested on users like those of these data, and on
no others.

## Options

| option | value |
|---|---|
{option_rows}
"""


# -----------------------------------------------------------------------------
# reading


def load_state(source, step=-1):
    """(path, entries) of a run's checkpoint or of an exported file. UserError for what cannot be used."""
    path = Path(source)
    if os.path.isdir(path):
        path = checkpoint.checkpoint_path(path, step)
    state = read_safetensors(path) if path.suffix == ".safetensors" else checkpoint.load_checkpoint(path, ENTRIES)
    if step not in (-1, state["step"]):
        raise UserError(
            f"--checkpoint_step={step}: {path} holds the checkpoint of step {state['step']} alone; leave the option "
            "out, or give the run's folder as --run"
        )
    return path, check_state(state, path)


def check_state(state, source):
    """The entries, checked. UserError where one is missing or makes no sense."""
    kinds = ENTRIES | {name: kind for name, kind in checkpoint.OPTIONAL.items() if name in state}
    if problem := checkpoint.wrong_entry(state, kinds):
        raise UserError(f"{source} {problem}: export or train it again")
    if not all(map(is_id, state["item_ids"])):
        raise UserError(f"{source} holds item ids that are no text or too long: use another file")
    counts = state.get("item_counts", [0] * len(state["item_ids"]))
    if [type(count) for count in counts] != [int] * len(state["item_ids"]) or min(counts) < 0:
        raise UserError(f"{source} holds other than one number of ratings for each item: export or train it again")
    levels, numbers = state["levels"], state["system"].values()
    if not levels or not all(type(level) in (int, float) and math.isfinite(level) for level in levels):
        raise UserError(f"{source} holds rating levels that are no numbers: use another file")
    if not state["fingerprint"].isalnum() or not 0 <= state["step"] < 1 << 63:
        raise UserError(f"{source} holds a fingerprint or a step that this program does not write: use another file")
    if not all(type(t) is torch.Tensor and t.layout == torch.strided and t.is_floating_point() for t in numbers):
        raise UserError(f"{source} holds parameters that are no numbers: use another file")
    return state


def is_id(item):
    """Whether an item id is a number of 64 bits, or text of a sensible length that UTF-8 can hold."""
    if type(item) is int:
        return -(1 << 63) <= item < 1 << 63
    return 0 < len(item) <= LONGEST_ID and item.encode(errors="replace").decode() == item


def split_safetensors(data):
    """(metadata, bytes of the tensors) of a .safetensors file. ValueError where it is none."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("no metadata")
    return metadata, data[end:]


def read_safetensors(path):
    """The entries of an exported .safetensors file. UserError where it is damaged, foreign or of another version."""
    import safetensors.torch

    data = utils.read_regular(path, "an exported file")
    try:
        metadata, payload = split_safetensors(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no .safetensors file, or is damaged: export it again") from error
    if metadata.get("format") != "melo":
        raise UserError(f"{path} was not written by recommend.py --export: export a run with it")
    if metadata.get("format_version") != str(VERSION):
        version = f"{metadata.get('format_version')!r:.20}, and this program reads version {VERSION}"
        raise UserError(f"{path} has format version {version}: export it again with this version of the program")
    if hashlib.sha256(payload).hexdigest() != metadata.get("sha256"):
        raise UserError(f"{path} is damaged (its checksum does not fit): export or copy it again")
    try:
        names = [name for name in (*ENTRIES, *checkpoint.OPTIONAL) if name in metadata or name in ENTRIES]
        state = {name: json.loads(metadata[name]) for name in names if name != "system"}
        return {**state, "system": safetensors.torch.load(data)}
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: export it again") from error


# -----------------------------------------------------------------------------
# writing


def write(recommender, path):
    """Write all that `load_state` needs to one file, .safetensors or .pt."""
    path, target, state = Path(path), Path(os.path.realpath(path)), recommender.state
    state = {**state, "options": {name: "" if name in PLACES else value for name, value in state["options"].items()}}
    if path.suffix == ".safetensors":
        utils.write_atomic(target, safetensors_bytes(state))
    else:
        checkpoint.write_checkpoint(target, state["step"], state)


def safetensors_bytes(state):
    """The bytes of an exported .safetensors file."""
    import safetensors.torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state["system"].items()}
    metadata = {name: json.dumps(value) for name, value in state.items() if name != "system"}
    metadata |= {"format": "melo", "format_version": str(VERSION)}
    metadata["sha256"] = hashlib.sha256(split_safetensors(safetensors.torch.save(tensors))[1]).hexdigest()
    return safetensors.torch.save(tensors, metadata)


def card_path(path):
    """Where the card of an exported file stands: beside it, with .md after the whole name.

    UserError where another text stands there.
    """
    card = Path(f"{path}.md")
    if os.path.lexists(card) and (not os.path.isfile(card) or MARK.encode() not in card.read_bytes()[:4096]):
        raise UserError(
            f"--export={path} would write its model card over {card}, which is no model card of an earlier export: "
            "move that file, or give another name"
        )
    return card


def export(recommender, path, run):
    """Write the exported file, and its model card beside it. Returns the card's path."""
    card = card_path(path)
    write(recommender, path)
    utils.write_atomic(os.path.realpath(card), describe(recommender, Path(path).name, run).encode())
    return card


def describe(recommender, name, run):
    """The model card: what the run was trained on, how, and how well it predicts."""
    options, state = recommender.options, recommender.state
    rows = [f"| {key} | {value} |" for key, value in sorted(state["options"].items()) if key not in PLACES]
    return CARD.format(
        **state | vars(options),
        mark=MARK,
        name=name,
        n_items=len(recommender.item_ids),
        method=option_module.method(options) if options.num_inner_steps else "basic",
        example=recommender.item_ids[0],
        low=recommender.low,
        high=recommender.high,
        level_list=" ".join(f"{level:g}" for level in state["levels"]),
        figures=figures(Path(run), state["step"]),
        support=options.max_seq_len - 1,
        option_rows="\n".join(rows),
    )


def figures(run, step):
    """The test figures of the run's checkpoint of this step as Markdown, from its test.json.

    best.pt may be another checkpoint now than the one that was tested, so the step must be the same.
    """
    missing = "None: `main.py --test` was not run on this checkpoint before it was exported."
    try:
        report = json.loads((run / "test.json").read_text())
        lines = [f"On the last rating of each of {report['n']:,} test users, who were not trained on:", ""]
        lines += ["| | | standard error |", "|---|---|---|"]
        for name, label in (("rmse", "RMSE"), ("mae", "MAE"), ("macro_rmse", "macro-RMSE")):
            lines.append(f"| {label} | {metrics.text(report[name])} | {metrics.text(report[f'{name}_se'])} |")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return missing
    return "\n".join(lines) if report.get("step") == step else missing
