"""The model card that stands beside an exported file: what it was trained on, how, and how well it predicts."""

import json
from pathlib import Path

import options as option_module
import utils
from evaluation import metrics
from serving.recommender import LOCAL

CARD = """# {name}

A meta-learned sequential recommender: it adapts to a new user by {steps} gradient steps on the user's own ratings and
predicts ratings of {n_items:,} items. Method {method}, learner {model}, checkpoint of iteration {step}.

    from recommend import Recommender
    Recommender.load("{name}").adapt([({example!r}, {high:g})]).top(10)

or `python recommend.py --run={name} --ratings=me.csv`. The file's format: docs/EXPORT.md.

## Data

`--mode={mode}`, ratings from {low:g} to {high:g} (levels {levels}); items with {min_item} ratings or more, users with
{min_sequence} or more. Fingerprint of the filtered ratings: `{fingerprint}`. The file holds item ids and learned
parameters, but no user's ratings or id.

## Figures

{figures}

## Limits

Items that are not in the file cannot be predicted. A user's {support} most recent ratings are used. A user without a
known rating gets the unadapted prediction. Predictions were tested on users like those of these data, and on no
others.

## Options

| option | value |
|---|---|
{options}
"""


def export(recommender, path, run):
    """Write the exported file, and beside it the model card of the same name with the ending .md."""
    recommender.export(path)
    path, options = Path(path), recommender.options
    text = CARD.format(
        name=path.name,
        steps=options.num_inner_steps,
        n_items=len(recommender.item_ids),
        method=option_module.method(options) if options.num_inner_steps else "basic",
        model=options.model,
        step=recommender.state["step"],
        example=recommender.item_ids[0],
        mode=options.mode,
        low=recommender.low,
        high=recommender.high,
        levels=" ".join(f"{level:g}" for level in recommender.state["levels"]),
        min_item=options.min_item,
        min_sequence=options.min_sequence,
        fingerprint=recommender.state["fingerprint"],
        figures=figures(Path(run), recommender.state["step"]),
        support=options.max_seq_len - 1,
        options="\n".join(
            f"| {name} | {value} |" for name, value in sorted(recommender.state["options"].items()) if name not in LOCAL
        ),
    )
    utils.write_atomic(path.with_suffix(".md"), text.encode())


def figures(run, step):
    """The figures of the run's checkpoint of this step on its test users as Markdown, from its test.json.

    The step, because best.pt may be another checkpoint than the one of that name that was tested.
    """
    missing = "None: `main.py --test` was not run on this checkpoint before it was exported."
    try:
        report = json.loads((run / "test.json").read_text())
        lines = [f"On the last rating of each of {report['n']:,} test users, who were not trained on:", ""]
        lines += ["| | | standard error |", "|---|---|---|"]
        for name, label in (("rmse", "RMSE"), ("mae", "MAE"), ("macro_rmse", "macro-RMSE")):
            lines.append(f"| {label} | {metrics.text(report[name])} | {metrics.text(report[f'{name}_se'])} |")
    except (OSError, ValueError, KeyError, TypeError):
        return missing
    return "\n".join(lines) if report.get("step") == step else missing
