"""main.py, pretrain.py and the documents' commands by their real command lines: the bundled sample, tiny sizes."""

import contextlib
import csv
import fcntl
import importlib
import io
import json
import os
import re
import shlex
import shutil
import struct
import termios
from functools import partial
from pathlib import Path

import pytest
import running

import compare
import main
import options
import pretrain
import recommend
from evaluation import evaluate
from models import checkpoint
from utils import UserError, run_script

SCRIPTS = {"main.py": main.main, "pretrain.py": pretrain.main}
ROOT = Path(__file__).parents[1]
SMALL = (
    "--num_train_iterations=2", "--batch_size=4", "--pretraining_batch_size=4", "--log_interval=1", "--val_size=20",
    "--bert_hidden_units=8", "--narm_hidden_size=8", "--gru4rec_hidden_size=8", "--num_factors=2", "--num_test_data=30",
)  # fmt: skip
SAMPLE = ("--mode=sample", f"--data_path={ROOT / 'Data/sample/ratings.csv'}", "--cache_dir=cache")
FOMAML = ("--use_multi_step=False", "--use_adaptive_loss=False")


def run(folder, script, *flags, status=0):
    """What a script prints to standard output and error, run in `folder` by the function that its command line runs.

    In this process, because starting Python and torch takes longer than all that is tested here.
    """
    out, error = io.StringIO(), io.StringIO()
    redirect = contextlib.redirect_stdout(out), contextlib.redirect_stderr(error)
    with contextlib.chdir(folder), redirect[0], redirect[1], pytest.raises(SystemExit) as stopped:
        run_script(lambda: SCRIPTS[script](list(flags)))
    assert (stopped.value.code or 0) == status, error.getvalue()
    return out.getvalue(), error.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a pretrained and a meta-trained run."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "other.csv").write_bytes((ROOT / "Data/sample/ratings.csv").read_bytes()[:400_000].rpartition(b"\n")[0])
    run(folder, "pretrain.py", *SAMPLE, *SMALL)
    run(folder, "main.py", *SAMPLE, *SMALL, "--load_pretrained_embedding=True")
    return folder


def test_testing_twice_gives_the_same_digits(trained):
    first, _ = run(trained, "main.py", *SAMPLE, *SMALL, "--test")
    report = trained / "log/sample-bert4rec-melo/test.json"
    figures = report.read_bytes()
    second, _ = run(trained, "main.py", *SAMPLE, *SMALL, "--test", "--checkpoint_step=-1")
    assert first == second
    assert report.read_bytes() == figures
    assert json.loads(figures)["n"] == 30
    assert "macro-RMSE" in first


def test_pretrained_run_is_tested_on_the_same_users(trained):
    run(trained, "main.py", *SAMPLE, *SMALL, "--test")
    run(trained, "pretrain.py", *SAMPLE, *SMALL, "--checkpoint_step=2", "--test")
    counts = [
        [row["n"] for row in json.loads((trained / folder / "test.json").read_text())["by_rating"]]
        for folder in ("log/sample-bert4rec-melo", "log/sample-bert4rec-basic")
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("flags", "chunk"), [((), 3), (("--task_chunk=2",), 2)])
def test_a_test_holds_as_many_tasks_at_once_as_training_did(trained, monkeypatch, flags, chunk):
    path = trained / "log/sample-bert4rec-melo/checkpoints/best.pt"
    state = checkpoint.load_checkpoint(path)
    state["options"]["task_chunk"] = 3
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda *_: state)
    monkeypatch.chdir(trained)
    system, stored, _, _ = evaluate.load_system(path, options.parse("", [*SAMPLE, *SMALL, *flags]))
    assert system.options.task_chunk == stored.task_chunk == chunk


@pytest.mark.parametrize(
    "flags",
    [
        ("--model=narm", "--use_adaptive_loss=False"),
        ("--model=gru4rec", *FOMAML),
        ("--model=sasrec", "--loss_network=lstm"),
        ("--model=bert4rec", "--loss_network=metal"),
        ("--paper_form=True", "--num_samples=4", "--lstm_hidden=4", "--lstm_input_size=3"),
        ("--min_sub_window_size=2", "--max_seq_len=30", "--num_samples=25", "--num_query_set=1"),
    ],
    ids=lambda flags: flags[0].lstrip("-"),
)
def test_every_method_trains_and_tests(tmp_path, flags):
    run(tmp_path, "main.py", *SAMPLE, *SMALL, *flags)
    out, _ = run(tmp_path, "main.py", *SAMPLE, *SMALL, *flags, "--test")
    assert "RMSE" in out
    json.loads(next(tmp_path.rglob("test.json")).read_text(), parse_constant=pytest.fail)


def test_a_run_is_not_overwritten_unasked(trained):
    _, error = run(trained, "main.py", *SAMPLE, *SMALL, status=2)
    assert "--resume" in error


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--data_path=nowhere.dat", "--log_dir=other"), "nowhere.dat"),
        (("--mode=netflix",), "netflix"),
        (("--model=transformer",), "transformer"),
        (("--use_multi_step=yes",), "True or False"),
        (("--batch_size=0",), "from 1 to"),
        (("--inner_damping=inf",), "not a finite number"),
        (("--bert_hidden_units=30",), "multiple"),
        (("--fold=7",), "--num_folds"),
        (("--use_second_order=False",), "add --use_adaptive_loss=False"),
        (("--num_test_data=100000", "--log_dir=other"), "--num_test_data"),
        (("--checkpoint_step=77", "--test"), "77"),
        (("--model=narm", "--test"), "no checkpoint"),
        (("--data_path=other.csv", "--test"), "other data"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, tuple) else "",
)
def test_bad_input_gets_one_sentence(trained, flags, says):
    out, error = run(trained, "main.py", *SAMPLE, *SMALL, *flags, status=2)
    assert out == ""
    assert error.startswith("error: ") and error.count("\n") == 1
    assert says in error


def test_pretraining_falls_from_its_own_learning_rate(trained):
    _, error = run(trained, "pretrain.py", *SAMPLE, *SMALL, "--pretraining_lr=5e-5", status=2)
    assert error == "error: --min_outer_lr=0.0001 must not be above --pretraining_lr=5e-05\n"
    assert options.parse_pretrain("", ["--outer_lr=1e-3"]).outer_lr == 3e-3


def test_checkpoints_whose_loss_network_was_not_trained_can_be_read():
    stored = vars(options.parse("", [])) | {"use_second_order": False}
    assert options.restore(stored, {}, "melo.pt").use_adaptive_loss
    assert options.parse("", ["--use_second_order=False", "--test"]).use_adaptive_loss


def test_infinity_is_a_number_where_it_lifts_a_limit():
    assert options.parse("", ["--checkpoint_minutes=inf"]).checkpoint_minutes == float("inf")
    for name in ("inner_damping", "outer_lr"):
        for text in ("inf", "1e999", "nan"):
            with pytest.raises(UserError, match=name):
                options.parse("", [f"--{name}={text}"])


def test_pretrained_weights_of_other_sizes_are_refused(trained):
    _, error = run(trained, "main.py", *SAMPLE, *SMALL, "--bert_hidden_units=16", "--load_pretrained=True",
                   "--log_dir=other", status=2)  # fmt: skip
    assert "sizes" in error


def test_a_run_that_goes_on_needs_no_pretrained_one(trained, tmp_path):
    shutil.copytree(trained / "log", tmp_path / "log")
    run(tmp_path, "main.py", *SAMPLE, *SMALL, "--load_pretrained_embedding=True", "--resume")


def test_a_truncated_checkpoint_is_refused(trained):
    path = trained / "log/sample-bert4rec-melo/checkpoints/step-00000002.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    _, error = run(trained, "main.py", *SAMPLE, *SMALL, "--checkpoint_step=2", "--test", status=2)
    path.write_bytes(whole)
    assert "damaged" in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_grouped(tmp_path, script):
    out, _ = run(tmp_path, script, "--help")
    assert "inner loop:" in out and "--paper_form" in out


# -----------------------------------------------------------------------------
# the documents


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "BENCHMARKS.md"]
LINES = [line for page in PAGES for line in re.findall(r"^ {4}((?:python|torchrun|make) .*)$", page.read_text(), re.M)]
COMMANDS = [shlex.split(line, comments=True) for line in dict.fromkeys(LINES)]


def commands_of(*scripts):
    return [words[2:] for words in COMMANDS if words[:2] in [["python", script] for script in scripts]]


def test_training_commands_of_the_documents_run(tmp_path):
    """In their order, each with the sample's data and tiny sizes added, and none in the way of another."""
    found = [(words[1], words[2:]) for words in COMMANDS if words[0] == "python" and words[1] in SCRIPTS]
    assert len(found) >= 7
    small = *SMALL, "--lstm_hidden=4", "--lstm_input_size=3", "--num_samples=4", "--max_seq_len=8"
    for script, flags in found:
        mode = next((flag for flag in flags if flag.startswith("--mode=")), "ml-1m")  # all are the sample's here
        (tmp_path / mode).mkdir(exist_ok=True)
        run(tmp_path / mode, script, *flags, *SAMPLE, *small)


def test_commands_for_new_users_run(trained, tmp_path):
    """Their names of runs and files stand for those of a test."""
    (tmp_path / "me.csv").write_text("user,item,rating\nme,17,5\nme,42,1\n")
    (tmp_path / "movies.dat").write_text("17::Heat::Crime\n42::Alien::Horror\n")
    found = commands_of("recommend.py")
    assert len(found) >= 4
    for flags in found:
        words = [re.sub("log/[a-z0-9-]+", str(trained / "log/sample-bert4rec-melo"), flag) for flag in flags]
        words = [word.replace("Data/ml-1m/", "") for word in words]
        with contextlib.chdir(tmp_path), contextlib.redirect_stderr(io.StringIO()), capture() as out:
            assert recommend.main([*words, "--device=cpu"]) == 0
        assert "--top" not in " ".join(words) or out.getvalue()
    written = {path.name for path in tmp_path.iterdir()}
    assert {"me.png", "melo.safetensors", "melo.safetensors.md"} <= written


@contextlib.contextmanager
def capture():
    """Standard output as text; what is written to its buffer too."""
    out = io.TextIOWrapper(io.BytesIO(), write_through=True)
    out.getvalue = lambda: out.buffer.getvalue().decode()
    with contextlib.redirect_stdout(out):
        yield out


def test_other_commands_of_the_documents_are_understood():
    for flags in commands_of("compare.py"):
        cells = compare.list_cells(args := compare.parse(flags))
        assert all(compare.read_options(args, cell) for cell in cells)
    targets = {words[1] for words in COMMANDS if words[0] == "make"}
    assert targets <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)) and "demo" in targets
    named = {word for words in COMMANDS for word in words if word.endswith(".py")}
    assert named and all((ROOT / name).exists() for name in named)
    for flags in (words[words.index("main.py") + 1 :] for words in COMMANDS if words[0] == "torchrun"):
        options.parse("", flags)
    for words in [words for words in COMMANDS if words[:2] == ["python", "-m"]]:
        assert importlib.import_module(words[2]).parse(words[3:])


def test_benchmark_commands_of_the_documents_are_understood():
    benchmark = pytest.importorskip("benchmark", exc_type=ImportError)
    for flags in commands_of("benchmark.py"):
        assert benchmark.parse(flags).only


def test_links_of_the_documents_lead_somewhere():
    for page in [*PAGES, ROOT / "results" / "EXPERIMENTS.md"]:
        text = page.read_text()
        for link, heading in re.findall(r"\]\(([^):#]*)(?:#([^)]*))?\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
            if heading and not link:
                assert heading in [h.lower().replace(" ", "-") for h in re.findall("^#+ (.*)", text, re.M)], heading


@pytest.mark.parametrize("page", ["README.md", "docs/RESULTS.md"])
def test_results_of_the_documents_are_those_of_the_tables(page):
    """The columns of the table with all folds are data sets; a cell begins with the RMSE, or is --."""
    table = re.search(r"^\|[^|]*\| MovieLens-1M.*\n\|[-|]+\n((?:\|.*\n)+)", (ROOT / page).read_text(), re.M)
    header, _, *rows = (line.strip("| ").split("|") for line in table[0].splitlines())
    assert len(rows) >= 6
    for number, name in enumerate(header[-len(rows[0]) + 1 :], 1):
        cells = [row[number].strip() for row in rows if row[number].strip() != "--"]
        folder = name.split(",")[0].strip().lower().replace("movielens", "ml") + "-folds"
        figures = {figures_of(line) for line in read_table(folder)} if cells else set()
        for cell in cells:
            shown = tuple(re.findall(r"\d\.\d{4}", cell))
            assert shown and shown in {each[: len(shown)] for each in figures}, f"{name}: {cell}"


def read_table(folder):
    with open(ROOT / "results" / folder / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def figures_of(row):
    return tuple(f"{float(row[name]):.4f}" for name in ("rmse", "mae", "macro_rmse"))


def test_every_message_that_has_a_remedy_can_come():
    table = (ROOT / "docs" / "TROUBLESHOOTING.md").read_text()
    messages = [part for row in re.findall(r"^\| (`.*?) \| ", table, re.M) for part in re.findall("`([^`]+)`", row)]
    sources = [path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), ROOT / "Makefile")]
    assert len(messages) >= 15
    for message in messages:
        pieces = [piece.strip() for piece in message.split("...") if piece.strip()]
        assert any(all(piece in source for piece in pieces) for source in sources) or "/" in message, message


# -----------------------------------------------------------------------------
# what a terminal shows


def test_a_log_file_is_a_line_a_validation(tmp_path):
    out, error = run(tmp_path, "main.py", *SAMPLE, *SMALL)
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("iteration")] == [
        ["iteration", str(i)] for i in range(3)
    ]
    options = [line for line in lines if line.startswith(("options: ", "chosen from the data: ", "  "))]
    assert options[0].startswith("options: --mode=sample") and len(lines) == len(options) + 3 + 3 + 1 and error == ""
    assert max(map(len, lines)) <= 80 and not set(out) & {"\r", "\x1b"}


def test_a_terminal_of_80_columns_is_not_overrun(tmp_path):
    """A real terminal's other end, where the bar is drawn below the lines."""
    ours, theirs = os.openpty()
    terminal = os.ttyname(theirs)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    train = partial(running.run_main, "main", [*SAMPLE, *SMALL], partial(os.chdir, tmp_path))
    process = running.spawn(train, terminal, terminal)
    shown = os.read(ours, 10_000)
    os.close(theirs)
    with contextlib.suppress(OSError):  # the terminal is gone when the process is
        while data := os.read(ours, 10_000):
            shown += data
    os.close(ours)
    assert running.wait(process, 60) == 0
    text = shown.decode()
    assert max(map(len, re.split("[\r\n]+", text))) <= 80
    assert len(re.findall(r"iteration +\d .* validation RMSE \d", text)) == 3 and "0/2" in text
