"""What TensorBoard itself shows of tiny runs, asked through its HTTP interface, and the pieces that make it."""

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
import tiny
from running import ITERATIONS, NAMES, command, read_events

import dataloader
import main
import options as option_module
import pretrain
from evaluation import baselines, evaluate
from models import checkpoint
from training import progress, run_folder, tensorboard

PATIENCE = 90  # seconds
MELO, BASIC = NAMES["main"], NAMES["pretrain"]
SCALARS = {
    "train/rmse", "train/rmse_unadapted", "train/mae", "train/gradient_norm",
    "validation/rmse", "validation/rmse_unadapted", "validation/best_rmse", "validation/mae", "validation/macro_rmse",
    "simple/damped_means", "simple/matrix_factorisation", "charts/iterations_per_second", "charts/learning_rate",
    "test/rmse", "test/mae", "test/macro_rmse",
}  # fmt: skip
PARTS = ("user_bias", "user_vector", "state_weight")
HISTOGRAMS = {f"{kind}/{part}" for kind in ("inner_rate", "inner_damping") for part in PARTS}
HISTOGRAMS.add("loss_weight/all_ratings")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A log folder with a run of main.py, tested twice, and one of pretrain.py."""
    place = tmp_path_factory.mktemp("tensorboard") / "log"
    assert main.main(command(place)) == 0
    assert main.main(command(place, "--test")) == 0
    assert main.main(command(place, "--test")) == 0
    assert pretrain.main(command(place)) == 0
    return place


@pytest.fixture(scope="module")
def ask(log):
    """A function that asks a real TensorBoard: ask("scalars/tags"), ask("hparams/experiment", {...})."""
    words = [sys.executable, "-m", "tensorboard.main", f"--logdir={log}", "--host=127.0.0.1", "--port=0"]
    output = log.parent / "tensorboard.txt"
    with output.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
    try:
        where = wait_for(lambda: re.search(r"http://127\.0\.0\.1:\d+/", output.read_text()))[0]

        def ask(path, body=None, as_json=True):
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(f"{where}data/plugin/{path}", data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                text = answer.read().decode()
            return json.loads(text) if as_json else text

        wait_for(lambda: {MELO, BASIC} <= ask("scalars/tags").keys())
        yield ask
    finally:
        process.terminate()
        process.wait(PATIENCE)


def wait_for(condition):
    """What a condition gives once it is true."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.1)
    raise AssertionError("what was waited for did not come")


def test_scalars_are_few(ask):
    tags = ask("scalars/tags")
    assert set(tags) == {MELO, BASIC}  # no stray sub-runs
    by_rating = {tag for tag in tags[MELO] if tag.startswith("loss_weight/rating_")}
    assert set(tags[MELO]) - by_rating == SCALARS and len(by_rating) == 5
    adapting = {"train/rmse_unadapted", "validation/rmse_unadapted"}
    assert set(tags[BASIC]) == {tag for tag in SCALARS - adapting if not tag.startswith("test/")}


def test_every_custom_scalar_finds_its_lines(ask):
    layout = ask("custom_scalars/layout")
    charts = {chart["title"]: chart["multiline"]["tag"] for part in layout["category"] for chart in part["chart"]}
    assert len(charts) == 5
    found = {}
    for title, patterns in charts.items():
        for pattern in patterns:
            path = f"custom_scalars/scalars?run={MELO}&tag={urllib.parse.quote(pattern)}"
            found.setdefault(title, set()).update(ask(path)["tag_to_events"])
    simple = {"simple/damped_means", "simple/matrix_factorisation"}
    assert found["Validation RMSE, and that of simple predictors"] == {"validation/rmse", *simple}
    assert all(found.values())
    lines = ask(f"scalars/scalars?run={MELO}&tag=simple/damped_means")
    assert [step for _, step, _ in lines] == [0, 5, 10, 12] and len({value for *_, value in lines}) == 1


def test_histograms(ask):
    assert set(ask("histograms/tags")[MELO]) == HISTOGRAMS
    steps = ask(f"histograms/histograms?run={MELO}&tag=inner_rate/state_weight")
    assert [step for _, step, _ in steps] == [0, 5, 10, 12]
    n_rates = 2 * 8  # inner steps x hidden units
    assert sum(count for *_, count in steps[-1][2]) == pytest.approx(n_rates)


def test_text(ask):
    assert set(ask("text/tags")[MELO]) == {"guide/text_summary", "options/text_summary"}
    assert "num_inner_steps" in ask(f"text/text?run={MELO}&tag=options/text_summary")[0]["text"]


def test_hparams_hold_options_and_final_figures(ask, log):
    infos = ask("hparams/experiment", {"experimentName": ""})["hparamInfos"]
    columns = [{"hparam": info["name"], "includeInResult": True} for info in infos]
    metrics = [{"metric": {"tag": tag}} for tag in tensorboard.FINAL]
    asked = {"colParams": columns + metrics, "startIndex": 0, "sliceSize": 10, "allowedStatuses": ["STATUS_SUCCESS"]}
    groups = ask("hparams/session_groups", asked)["sessionGroups"]
    assert len(groups) == 2
    group = next(group for group in groups if group["hparams"]["method"] == "melo")
    options = group["hparams"]
    assert options["mode"] == "sample" and options["batch_size"] == 4 and options["use_multi_step"] == 1
    assert not options.keys() & {"log_dir", "data_path", "device"}
    figures = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
    report = json.loads((log / MELO / "test.json").read_text())
    assert figures.keys() == set(tensorboard.FINAL)
    for name in ("rmse", "mae", "macro_rmse"):
        assert figures[f"test/{name}"] == pytest.approx(report[name], rel=1e-6)


def test_projector_has_every_item(ask, log):
    embeddings = ask(f"projector/info?run={MELO}")["embeddings"]
    assert [(each["tensorName"], each["tensorShape"][1]) for each in embeddings] == [("item factors", 2)]
    lines = ask(f"projector/metadata?run={MELO}&name=item%20factors", as_json=False).splitlines()
    ids = checkpoint.load_checkpoint(checkpoint.checkpoint_path(log / MELO))["item_ids"]
    assert lines[0] == "title\titem\tratings\tmean rating" and [line.split("\t")[1] for line in lines[1:]] == ids


# -----------------------------------------------------------------------------
# the pieces


@pytest.fixture
def problem(log):
    return dataloader.load_problem(option_module.parse("", command(log)))


def test_reference_lines_are_scored_on_the_targets_of_validation(log, problem, monkeypatch):
    system, options, _, _ = evaluate.load_system(
        checkpoint.checkpoint_path(log / MELO), option_module.parse("", command(log))
    )
    scored = [evaluate.evaluate(system, problem, problem.validation, length, 3) for length in (1, 5)]
    scored = evaluate.Scored(*map(np.concatenate, zip(*scored, strict=True)))
    targets, prediction_errors = [], baselines.prediction_errors

    def watch(target, *rest):
        targets.append(target)
        return prediction_errors(target, *rest)

    fitting = problem.ratings, problem.train, problem.validation, (1, options.max_seq_len - 1), 3
    found = baselines.reference_rmse(*fitting)
    monkeypatch.setattr(baselines, "prediction_errors", watch)
    assert found == baselines.reference_rmse(*fitting)
    assert np.array_equal(np.concatenate(targets[:6]), scored.target)
    monkeypatch.undo()
    many = baselines.reference_rmse(*fitting[:-1], int(np.diff(problem.ratings.offsets).max()) + 5)
    assert all(np.isfinite(error) for error in many.values())  # targets that no user is long enough for are left out
    assert 0 < found["matrix factorisation"] < found["damped means"] < scored.target.std()


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-1.0, 1.0, np.nan, np.inf], [1e-12, 1e-12 * 1.5], [np.nan]])
def test_histograms_hold_the_finite_values(tmp_path, values):
    with tensorboard.open_writer(tmp_path) as writer:
        tensorboard.add_histogram(writer, "x", np.array(values), 1)
    events, finite = read_events(tmp_path), np.isfinite(values).sum()
    if finite:
        assert sum(events.Histograms("x")[0].histogram_value.bucket) == finite
    else:
        assert not events.Tags()["histograms"]


def test_the_most_rated_items_are_shown_with_titles_beside_the_ratings(log, problem, tmp_path, monkeypatch):
    folder, ratings = log / MELO, problem.ratings
    count = np.bincount(ratings.items)
    most = ratings.item_ids[np.sort(np.argsort(-count, kind="stable")[:3])]
    (tmp_path / "movies.csv").write_text("movieId,title\n" + "".join(f'{item},"Film  {item}"\n' for item in most))
    options = option_module.parse("", command(log, f"--data_path={tmp_path / 'ratings.csv'}"))
    monkeypatch.setattr(tensorboard, "MOST_ITEMS", 3)
    before = (folder / "projector_config.pbtxt").read_text()
    tensorboard.write_projector(folder, ratings, options)
    lines = (folder / "projector" / "items.tsv").read_text().splitlines()
    assert [line.split("\t")[:2] for line in lines[1:]] == [[f"Film {item}", str(item)] for item in most]
    assert len((folder / "projector" / "item_factor.tsv").read_text().splitlines()) == 3
    assert (folder / "projector_config.pbtxt").read_text() == before


def test_a_test_leaves_one_file_and_the_curves_as_they_were(log):
    assert len(list((log / MELO).glob("events.*.test"))) == 1
    scalars = read_events(log / MELO)
    assert [event.step for event in scalars.Scalars("validation/rmse")] == [0, 5, 10, ITERATIONS]
    assert len(scalars.Scalars("test/rmse")) == 1


def test_starting_again_leaves_nothing_of_the_run_before(log):
    run_folder.clear_folder(log / BASIC, overwrite=True)
    left = {path.name for path in (log / BASIC).rglob("*") if path.is_file()}
    assert left == {"config.json", "lock"}


@pytest.mark.parametrize(
    ("given", "found"), [({}, "noise 4.00, biases shrunk by 4.0 ratings, "), ({"inner_damping": 9}, "")]
)
def test_a_run_says_what_it_chose_and_not_what_was_given(given, found):
    least = dataloader.LEAST_ITERATIONS
    run = tiny.run(tiny.options(num_train_iterations=least, **given))
    assert progress.say_chosen(run) == f"3 of 3 factors, {found}{least} iterations"
    assert progress.say_chosen(tiny.run(tiny.options(num_train_iterations=least, adapt="all"))) == f"{least} iterations"
    assert progress.say_chosen(tiny.run(tiny.options(num_train_iterations=400, adapt="all"))) == ""
