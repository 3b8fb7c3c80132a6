"""Options of all scripts and what happens at the edge of the program: odd values, stored options, lost output."""

import contextlib
import io
import math
import os
import re
import sys
import time
import tomllib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import running
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compare
import datasets
import main
import options as option_module
import recommend
import utils
from evaluation import evaluate
from models import checkpoint
from utils import UserError

ROOT = Path(__file__).parents[1]
PARSER = option_module.build_parser("")
ACTIONS = {action.dest: action for action in PARSER._actions if action.dest != "help"}
ODD = [
    "", " ", "-0", "+1", "1_000", " 1", "1 ", "1.", ".5", "1e400", "-1e400", "1e-400", "nan", "NaN", "inf", "-inf",
    "Infinity", "10**20", str(10**20), str(-(10**20)), "9" * 400, "9" * 5000, "0x10", "１２", "٣", "1\n", "true",
    "yes",
    "None", "-", "--", "=", "a" * 300, "a\0b", "caf\udce9", "\ud800", "\x1b[31m", "(1,2)", "2147483648", "%s%d", "~",
]  # fmt: skip
OTHERS = {
    "compare": (compare.parse, ("output", "report", "models", "methods", "folds", "seeds", "jobs", "threads")),
    "recommend": (
        lambda words: recommend.parse(["--run=r", "--ratings=-", *words]),
        ("run", "checkpoint_step", "device", "ratings", "titles", "top", "pairs", "plot", "output", "format", "export"),
    ),
    "datasets": (datasets.parse, ("data_path", "min_item", "max_seq_len", "plot", "cache_dir", "skip_bad_rows")),
    "benchmark": (
        lambda words: pytest.importorskip("benchmark", exc_type=ImportError).parse(words),
        ("only", "models", "reps", "threads", "tasks", "users", "items", "rows", "device"),
    ),
}


def is_sentence(error):
    text = f"{error.value}"
    return text and "Traceback" not in text and len(utils.printable(text)) < 400


def is_in_range(value):
    return value is None or not isinstance(value, float) or (not math.isnan(value) and str(value) != "-0.0")


@pytest.mark.parametrize("name", ACTIONS)
def test_odd_values_are_refused_or_in_range(name):
    for text in ODD:
        try:
            value = getattr(PARSER.parse_args([f"--{name}={text}"]), name)
        except UserError as error:
            assert name in str(error) and len(utils.printable(error)) < 400
            continue
        assert is_in_range(value)
        if isinstance(ACTIONS[name].default, int | float) and name != "checkpoint_minutes":
            assert -1 <= value <= 1e30, text
        assert isinstance(value, str | bool | int | float)


@pytest.mark.parametrize("script", OTHERS)
def test_odd_values_in_other_scripts(script):
    parse, names = OTHERS[script]
    for name in names:
        for text in ODD:
            with contextlib.suppress(UserError):
                values = getattr(parse([f"--{name}={text}"]), name)
                assert all(map(is_in_range, values if isinstance(values, list) else [values]))


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("--members=1000000", "from 1 to 64"),
        ("--val_size=100000000000000000000", "from 1 to 1000000000"),
        ("--num_factors=" + "9" * 400, "99999... is out of range; it must be from 1 to 256"),
        ("--inner_lr=nan", "'nan' is not a finite number"),
        ("--outer_lr=1e400", "out of range"),
        ("--batch_size=1_6", "'1_6' is not a whole number"),
        ("--max_seq_len=３０", "'３０' is not a whole number"),
        ("--min_item= 5", "' 5' is not a whole number"),
        ("--log_dir=", "give the path"),
        (f"--log_dir={'a' * 300}", "too long"),
        (f"--cache_dir=ok/{'a' * 300}/b", "too long"),
        ("--data_path=caf\udce9.csv", r"'caf\xe9.csv' is not UTF-8"),
        ("--data_path=a\0b", "give the path"),
        ("--mode=../up", "no data set"),
        ("--mod=sample", "unrecognized"),
        ("--checkpoint_step=3", "without --test"),
        ("--num_inner_steps=0", "pretrain.py"),
    ],
)
def test_refusals_say_what_is_wrong(word, says):
    with pytest.raises(UserError) as error:
        option_module.parse("", [word])
    assert says in str(error.value) and word.split("=")[0].removeprefix("--") in str(error.value)


def test_an_option_that_a_test_does_not_use_is_refused():
    for word in ("--resume", "--overwrite"):
        with pytest.raises(UserError, match="does not go with --test"):
            option_module.parse_pretrain("", ["--test", word])


def test_switches_may_be_given_with_a_value_as_in_the_original():
    assert option_module.parse("", ["--test=True"]).test and option_module.parse("", ["--test"]).test
    assert not option_module.parse("", ["--test=False"]).test
    assert not option_module.parse("", ["--use_adaptive_loss", "False"]).use_adaptive_loss


@pytest.mark.parametrize(
    ("words", "shows"),
    [
        ((), ["at least 250", "(default: joint)"]),
        (("--paper_form=True",), ["(default: 25)", "(default: plain)", "(default: lstm)"]),
        (("--paper_form=code",), ["(default: 25)", "(default: plain)"]),
    ],
)
def test_help_shows_the_defaults_of_a_form(words, shows):
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        option_module.parse("", [*words, "--help"])
    assert all(text in out.getvalue() for text in shows)


def test_what_differs_from_the_defaults_is_one_text():
    chosen = option_module.parse("", ["--mode=ml-100k", "--model=narm", "--log_dir=x", "--resume"])
    assert option_module.differing(chosen) == "--mode=ml-100k --model=narm"
    assert option_module.differing(option_module.parse("", [])) == ""
    assert option_module.differing(option_module.parse_pretrain("", ["--val_size=7"])) == "--val_size=7"


def test_options_from_python_are_those_of_the_command_line(tmp_path):
    made = option_module.make(mode="sample", members=2, use_multi_step=False, log_dir=tmp_path, outer_lr=1e-3, sep=None)
    words = ["--mode=sample", "--members=2", "--use_multi_step=False", f"--log_dir={tmp_path}", "--outer_lr=1e-3"]
    assert made == option_module.parse("", words)
    assert option_module.make(option_module.parse_pretrain, mode="sample").num_inner_steps == 0
    for wrong in ({"member": 2}, {"members": 2.5}, {"members": True}, {"members": [2]}, {"outer_lr": math.nan}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            option_module.make(**wrong)
    with pytest.raises(UserError, match="members is out of range"):
        option_module.make(members=10**5000)


def test_given_tells_what_a_command_line_sets():
    assert option_module.given(["--mode=sample", "--resume"]) == {"mode": "sample", "resume": True}
    with pytest.raises(UserError, match="nonsense"):
        option_module.given(["--nonsense=1"])


# -----------------------------------------------------------------------------
# stored options


FORMS = {
    "default": option_module.parse("", ["--mode=amazon", "--checkpoint_minutes=inf"]),
    "paper": option_module.parse("", ["--paper_form=True"]),
    "code": option_module.parse("", ["--paper_form=code"]),
    "basic": option_module.parse_pretrain("", ["--num_train_iterations=9"]),
}
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2),
    st.sampled_from([*ODD, 10**6, 10**20, 10**400, -1, 0, 1e400, 1e31]),
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_restored_options_are_those_that_were_stored(form):
    stored = FORMS[form]
    kept = {name: value for name, value in vars(stored).items() if name not in option_module.PLACES}
    found = vars(option_module.restore(option_module.as_stored(stored), {}, "melo.pt"))
    assert found.items() >= kept.items()


FOLLOWS = (
    "use_second_order",
    "item_lr",
    "inner_lr",
    "inner_damping",
    "query_windows",
)  # from other options, where they are not given


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(ACTIONS)), VALUES)
def test_stored_values_are_checked_as_on_the_command_line(name, value):
    stored = {**vars(FORMS["default"]), name: value}
    try:
        restored = option_module.restore(stored, {}, "melo.pt")
    except UserError as error:
        assert str(error).startswith("melo.pt")
        return
    found = getattr(restored, name)
    assert name in option_module.PLACES or found == value or name in FOLLOWS
    assert is_in_range(found)


def test_checkpoints_with_a_fixed_prior_of_factors_are_trained_again_unless_they_have_no_factors():
    assert option_module.restore({**vars(FORMS["paper"]), "factor_prior": 10.0}, {}, "melo.pt").head == "plain"
    with pytest.raises(UserError, match="no --factor_prior=10.0: train again"):
        option_module.restore({**vars(FORMS["default"]), "factor_prior": 10.0}, {}, "melo.pt")


def test_stored_nonsense_is_refused():
    default = vars(FORMS["default"])
    for stored in (None, [], {}, {1: 2}, {**default, "x=y": 1}, {**default, "help": True}):
        with pytest.raises(UserError, match="melo.pt"):
            option_module.restore(stored, {}, "melo.pt")
    with pytest.raises(UserError, match="members: 1000000 is out of range"):
        option_module.restore({**vars(FORMS["default"]), "members": 10**6}, {}, "melo.pt")


def test_options_that_a_version_lacked_take_the_value_of_then(monkeypatch):
    stored = vars(FORMS["paper"]).copy()
    del stored["balance"], stored["inner_damping"], stored["val_size"]
    monkeypatch.setattr(option_module, "BEFORE", {"val_size": 7})
    restored = option_module.restore(stored, {}, "melo.pt")
    assert (restored.balance, restored.inner_damping, restored.val_size) == (0.0, 0.0, 7)
    now = {**vars(FORMS["paper"]), "val_size": 7}
    option_module.check_resume(stored, now)
    with pytest.raises(UserError, match="--val_size was 7 and is now 600"):
        option_module.check_resume(stored, FORMS["paper"])


@pytest.mark.parametrize(
    ("old", "restores", "resumes"),
    [
        ({"num_maskings": 4}, True, True),
        ({"read_ratings": False}, True, True),
        ({"read_ratings": True}, False, False),
        ({"rise": 50}, True, True),
        ({"rise": 3}, True, False),
        ({"never_was": 1}, False, False),
    ],
)
def test_options_that_are_gone(monkeypatch, old, restores, resumes):
    """What made no difference to the trained system is ignored; going on also needs what made one to training."""
    gone = {"num_maskings": option_module.ANY, "read_ratings": False, "rise": 50}
    monkeypatch.setattr(option_module, "removed", lambda stored: gone)
    monkeypatch.setattr(option_module, "DECIDES", ("read_ratings",))
    stored = {**vars(FORMS["default"]), **old}
    for works, use in (
        (restores, lambda: option_module.restore(stored, {}, "melo.pt")),
        (resumes, lambda: option_module.check_resume(stored, FORMS["default"])),
    ):
        with contextlib.nullcontext() if works else pytest.raises(UserError, match=next(iter(old))):
            use()


@pytest.mark.parametrize(("form", "value", "works"), [("paper", False, 1), ("paper", True, 0), ("default", True, 1)])
def test_absolute_weights_of_an_lstm_are_those_of_the_code(form, value, works):
    stored = {**vars(FORMS[form]), "absolute_weights": value}
    with contextlib.nullcontext() if works else pytest.raises(UserError, match="no --absolute_weights=True"):
        option_module.restore(stored, {}, "melo.pt")


def test_removed_options_are_gone_or_still_accepted():
    for form in FORMS.values():
        gone = option_module.removed(vars(form))
        assert set(option_module.DECIDES) <= gone.keys()


def test_places_come_from_the_command_alone(monkeypatch, tmp_path):
    """Somebody else's checkpoint cannot make this program read files, create folders or call addresses."""
    stored = vars(FORMS["default"]) | dict.fromkeys(option_module.PLACES, str(tmp_path / "evil"))
    restored = option_module.restore(stored, {"cache_dir": "mine"}, "melo.pt")
    assert "evil" not in str(vars(restored)) and restored.cache_dir == "mine"
    state = {"options": stored, "fingerprint": "", "step": 1}
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda *_: state)
    with pytest.raises(UserError, match="--mode=amazon, not sample"):
        evaluate.load_system("melo.pt", option_module.parse("", ["--mode=sample", "--test"]))
    assert not list(tmp_path.iterdir())


# -----------------------------------------------------------------------------
# output that goes away, memory that does not suffice


def run_alone(function, out="/dev/null", error="/dev/null", needs_output=True):
    """The exit status of `run_script(function)` in a process of its own, which writes to these files; None: closed."""
    work = partial(run_with_streams, function, (out, error), needs_output)
    return running.wait(running.spawn(work, out or "/dev/null", error or "/dev/null"), 60)


def run_with_streams(function, files, needs_output):
    for number, (name, file) in enumerate(zip(("stdout", "stderr"), files, strict=True), 1):
        stream = None
        if file is None:
            os.close(number)
        else:
            stream = io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "ascii")
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    utils.run_script(function, needs_output)


def print_much():
    for _ in range(1000):
        print("é\ud800" * 20, flush=True)


def say_and_print():
    utils.say("x")
    print("y")


needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


@needs_full
def test_output_that_cannot_be_written(tmp_path):
    errors, figures = tmp_path / "errors", tmp_path / "figures"
    assert run_alone(print_much, figures, errors) == 0
    assert figures.read_text().startswith(r"\xe9\ud800") and figures.read_text().count("\n") == 1000
    assert run_alone(print_much, "/dev/full", errors) == 2
    assert re.fullmatch("error: cannot write to standard output .*\n", errors.read_text())
    assert run_alone(print_much, None, errors) == 2
    assert re.fullmatch("error: cannot write to standard output .*\n", errors.read_text())
    assert run_alone(print_much, "/dev/full", errors, needs_output=False) == 0
    assert errors.read_text().startswith("warning: ")
    assert run_alone(print_much, None, None) == 2
    assert run_alone(say_and_print, figures, "/dev/full") == 0 and figures.read_text() == "y\n"


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    """`... | head -1`"""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    process = running.spawn(
        partial(run_with_streams, wait_and_print, (pipe, "errors"), True), pipe, tmp_path / "errors"
    )
    running.wait_until((tmp_path / "errors").exists)
    os.close(reader)
    assert running.wait(process, 60) == 0
    assert (tmp_path / "errors").read_text() == ""


def wait_and_print():
    time.sleep(0.5)
    print_much()


@needs_full
@pytest.mark.parametrize("out", ["/dev/full", None])
def test_a_training_goes_on_without_output(tmp_path, out):
    log = tmp_path / "log"
    words = running.command(log, "--num_train_iterations=3")
    assert run_alone(partial(main.main, words), out, out, needs_output=False) == 0
    folder = log / running.NAMES["main"]
    assert max(checkpoint.find_checkpoints(folder)) == 3 and (folder / "checkpoints/best.pt").is_file()


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (UserError("bad \x1b[31m\nname"), 2, r"error: bad \x1b[31m\x0aname"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "data/x"), 2, "error: cannot use data/x (Permission denied): "),
        (OSError(36, "File name too long", "x"), 2, "error: cannot use x (File name too long): "),
        (MemoryError(), 2, "error: out of memory: "),
        (OSError(12, "Cannot allocate memory"), 2, "error: out of memory: "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory: "),
    ],
)
def test_what_comes_from_outside_is_one_line(capsys, error, status, says):
    def fail():
        raise error

    with pytest.raises(SystemExit) as end:
        utils.run_script(fail)
    shown = capsys.readouterr().err
    assert end.value.code == status and shown.startswith(says) and shown.count("\n") == 1


def test_a_mistake_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        utils.run_script(lambda: 1 // 0)


def test_printable_text_cannot_touch_a_terminal():
    assert utils.printable("Amélie 天気の子 \u200d🎬") == "Amélie 天気の子 \u200d🎬"
    assert utils.printable("a\x1b[2J\r\n\u202eb\udce9\ud800\x7f") == r"a\x1b[2J\x0d\x0a\u202eb\xe9\ud800\x7f"


@pytest.mark.parametrize(
    ("stage", "words", "advice"),
    [
        ("reading", [], "give --data_path a smaller file"),
        ("building", ["--num_factors=200", "--members=2"], "lower --num_factors, which is 200"),
        ("building", ["--model=narm", "--narm_hidden_size=4096"], "lower --narm_hidden_size, which is 4096"),
        ("building", ["--model=sasrec", "--narm_hidden_size=4096"], "raise --min_item, which is 50"),
        ("training", ["--task_chunk=1", "--max_seq_len=1000"], "lower --max_seq_len, which is 1000"),
        ("training", ["--task_chunk=8"], "give --task_chunk=4"),
    ],
)
def test_want_of_memory_names_what_helps(stage, words, advice):
    options = option_module.parse("", words)
    with pytest.raises(UserError, match=advice), utils.naming_what_to_lower(options, stage):
        raise RuntimeError("not enough memory: you tried to allocate 1 PB")
    with pytest.raises(UserError, match="--batch_size|--max_seq_len"), utils.naming_what_to_lower(options):
        np.empty(2**60)
    with pytest.raises(RuntimeError, match="shapes"), utils.naming_what_to_lower(options, stage):
        torch.zeros(2) @ torch.zeros(3) if False else (_ for _ in ()).throw(RuntimeError("shapes"))


# -----------------------------------------------------------------------------
# the package


def test_the_package_lists_all_that_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]
    assert sorted(listed["py-modules"]) == sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "__init__")
    assert set(listed["packages"]) == {path.parent.name for path in ROOT.glob("*/__init__.py")}
    pinned = re.findall(r"^([a-z-]+)==", (ROOT / "requirements.txt").read_text(), re.M)
    groups = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    assert {re.split("[>=]", name)[0] for group in groups for name in group} <= set(pinned)
    assert len(option_module.build_parser("")._actions) <= 94


def test_text_that_is_not_utf8_is_refused():
    for name in ("unrated", "sep", "columns", "rating_scale", "mode", "data_url", "encoding"):
        with pytest.raises(UserError, match=f"--{name}: .* is not UTF-8"):
            PARSER.parse_args([f"--{name}=\udcff"])
