"""A run's folder under faults that really happen: damage, full disks, kills, signals.

MELO_FUZZ_EXAMPLES sets how many damaged files each fuzz test tries (100), MELO_KILLS how many processes are
killed while they save (10).
"""

import argparse
import contextlib
import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import OrderedDict
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import ROOT, same, spawn, wait, wait_until

import options as option_module
import utils
from models import checkpoint
from training import run_folder
from utils import UserError

KILLS = int(os.environ.get("MELO_KILLS", 10))
fuzz = settings(
    max_examples=int(os.environ.get("MELO_FUZZ_EXAMPLES", 100)),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
few = settings(max_examples=50, deadline=None, derandomize=True)


@pytest.fixture
def folder(tmp_path):
    """A run's folder with checkpoints of steps 10 and 20 in it."""
    path = checkpoint.run_folder(tmp_path / "log", "ml-1m", "bert4rec", "melo")
    path.mkdir(parents=True)
    for step in (10, 20):
        checkpoint.save_checkpoint(path, step, state_of(step))
    return path


def state_of(step, size=50):
    return {"weights": torch.full((size,), float(step)), "loop": {"best": 0.5, "names": ["a", ("b", None)]}}


def is_whole(state):
    return bool((state["weights"] == state["step"]).all())


def refused(function, *arguments):
    """The one sentence of the UserError that a function raises."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert len(str(error.value)) > 20 and "\n" not in str(error.value)
    return str(error.value)


# -----------------------------------------------------------------------------
# what is saved comes back


tensors = st.builds(
    lambda values, kind: torch.tensor(values).to(kind),
    st.lists(st.integers(0, 1), max_size=5),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
)
leaves = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text() | tensors
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@few
@given(state=st.dictionaries(st.text(max_size=5), values, max_size=4), step=st.integers(0, 10**9))
def test_saved_state_comes_back(state, step):
    """Through torch.load, too, as anyone would open it."""
    with tempfile.TemporaryDirectory() as place:
        path = checkpoint.save_best(place, step, state)
        assert same(checkpoint.load_checkpoint(path), {**state, "step": step})
        assert same(torch.load(path, weights_only=True), {**state, "step": step})
        assert checkpoint.step_of(path) == step
        assert zipfile.ZipFile(path).testzip() is None


def test_training_state_comes_back(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    parts = {"model": model, "optimizer": optimizer}
    checkpoint.save_checkpoint(tmp_path, 1, {name: part.state_dict() for name, part in parts.items()})
    loaded = checkpoint.load_newest(tmp_path)
    for name, part in parts.items():
        part.load_state_dict(loaded[name])
        assert same(checkpoint.plain(part.state_dict()), loaded[name])


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path):
    whole = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    path = checkpoint.save_best(tmp_path, 1, {"row": whole[3], "column": whole[:5, 7], "spread": whole[0, 0].expand(9)})
    assert path.stat().st_size < 20_000
    assert same(checkpoint.load_checkpoint(path)["column"], whole[:5, 7].contiguous())


def test_numpy_scalars_become_plain_and_other_objects_are_refused(tmp_path):
    path = checkpoint.save_best(tmp_path, 1, {"best": np.float32(0.5), "order": OrderedDict(a=np.int64(3))})
    assert same(checkpoint.load_checkpoint(path), {"best": 0.5, "order": {"a": 3}, "step": 1})
    with pytest.raises(TypeError, match=r"state\['ids'\]\[1\] is a ndarray"):
        checkpoint.save_best(tmp_path, 2, {"ids": [1, np.zeros(3)]})
    assert checkpoint.load_checkpoint(path)["step"] == 1


# -----------------------------------------------------------------------------
# which checkpoint


@pytest.mark.parametrize(("keep", "left"), [(1, [50]), (3, [30, 40, 50]), (0, [10, 20, 30, 40, 50])])
def test_the_newest_are_kept(folder, keep, left):
    for step in (30, 40, 50):
        checkpoint.save_checkpoint(folder, step, state_of(step), keep)
    assert list(checkpoint.find_checkpoints(folder)) == left


def test_a_damaged_later_checkpoint_does_not_push_out_a_good_one(folder):
    checkpoint.save_checkpoint(folder, 30, state_of(30))
    os.truncate(checkpoint.checkpoint_path(folder, 30), 100)
    checkpoint.save_checkpoint(folder, 25, state_of(25), keep=1)
    assert checkpoint.load_newest(folder)["step"] == 25


def test_checkpoint_path(folder):
    assert checkpoint.checkpoint_path(folder).name == "step-00000020.pt"
    assert checkpoint.checkpoint_path(folder, 10).name == "step-00000010.pt"
    checkpoint.save_best(folder, 15, state_of(15))
    assert checkpoint.checkpoint_path(folder).name == checkpoint.checkpoint_path(folder, 15).name == "best.pt"
    with pytest.raises(UserError, match=r"no checkpoint of step 7.*can be 10, 15 \(the best\), 20 or -1"):
        checkpoint.checkpoint_path(folder, 7)
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.checkpoint_path(folder / "elsewhere")
    assert checkpoint.load_newest(folder / "elsewhere") is None


def test_a_folder_that_holds_a_run_is_not_overwritten_by_accident(folder):
    for name in ("test.json", "events.out.tfevents.1"):
        (folder / name).touch()
    with pytest.raises(UserError, match="--resume"):
        run_folder.clear_folder(folder)
    assert list(checkpoint.find_checkpoints(folder)) == [10, 20]
    run_folder.clear_folder(folder, overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["checkpoints"]
    run_folder.clear_folder(folder)


# -----------------------------------------------------------------------------
# damage


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << position % 8
    path.write_bytes(data)


@pytest.mark.parametrize("share", [0, 0.001, 0.02, 0.5, 0.99, 0.9999])
def test_truncation_is_noticed_and_the_one_before_taken(folder, share, capsys):
    path = checkpoint.checkpoint_path(folder, 20)
    os.truncate(path, int(path.stat().st_size * share))
    assert "its checksum does not fit" in refused(checkpoint.load_checkpoint, path)
    assert checkpoint.load_newest(folder)["step"] == 10
    assert capsys.readouterr().err.startswith(f"warning: {path} is damaged")


def test_a_flipped_bit_is_noticed_anywhere(folder):
    path = checkpoint.checkpoint_path(folder, 20)
    data = path.read_bytes()
    for position in {*range(0, len(data), 17), *range(len(data) - 70, len(data))}:
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :])
        refused(checkpoint.load_checkpoint, path)
    assert checkpoint.load_newest(folder)["step"] == 10


def test_bytes_too_many_are_noticed(folder):
    path = checkpoint.checkpoint_path(folder, 20)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_checkpoint(path)


def test_all_damaged_is_an_error(folder):
    for path in checkpoint.find_checkpoints(folder).values():
        flip(path, -1)
    with pytest.raises(UserError, match="no checkpoint in .* can be used"):
        checkpoint.load_newest(folder)


# -----------------------------------------------------------------------------
# hostile files


class Evil:
    """Unpickled, it would make a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def payload_of(state, **options):
    payload = io.BytesIO()
    torch.save({"step": 20, **state} if isinstance(state, dict) else state, payload, **options)
    return payload.getvalue()


def write_file(path, payload):
    """A file with a right checksum around anything."""
    payload = payload[:-2] + checkpoint.DIGEST.to_bytes(2, "little")
    path.write_bytes(payload + hashlib.sha256(payload).hexdigest().encode())


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_code_in_a_pickle_is_not_run(folder, tmp_path, new_format, wrapped):
    marker, path = tmp_path / "marker", checkpoint.checkpoint_path(folder, 20)
    payload = payload_of({"weights": Evil(marker)}, _use_new_zipfile_serialization=new_format)
    write_file(path, payload) if wrapped else path.write_bytes(payload)
    refused(checkpoint.load_checkpoint, path)
    assert checkpoint.step_of(path) == -1
    assert checkpoint.load_newest(folder)["step"] == 10
    assert not marker.exists()
    with contextlib.suppress(Exception):  # the file does what it is said to do
        torch.load(io.BytesIO(payload), weights_only=False)
    assert marker.exists()


def deflated(payload):
    """The archive again, with compression."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(payload)) as old, zipfile.ZipFile(result, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return result.getvalue()


def circle():
    values = []
    values.append(values)
    return {"values": values}


def doubled(depth):
    """A list that walks to 10 ** depth values in a few hundred bytes."""
    values = [0]
    for _ in range(depth):
        values = [values] * 10
    return {"values": values}


def nested(depth):
    values = []
    for _ in range(depth):
        values = [values]
    return {"values": values}


HOSTILE = {
    "a bomb": deflated(payload_of({"weights": torch.zeros(10**6)})),
    "faked terabytes": payload_of({"weights": torch.zeros(1).expand(10**12)}),
    "a tensor without memory": payload_of({"weights": torch.empty(10**12, device="meta")}),
    "a sparse tensor": payload_of({"weights": torch.zeros(4).to_sparse()}),
    "a list in itself": payload_of(circle()),
    "exponentially many references": payload_of(doubled(30)),
    "other objects": payload_of({"weights": {1, 2}, "kind": torch.float32}),
    "not a dictionary": payload_of([1, 2]),
    "no step": payload_of([("step", 20)]),
    "a step that is no number": payload_of({"step": "20"}),
    "no archive": b"PK\3\4" + bytes(100),
    "nothing": bytes(2),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_payload_with_a_right_checksum_is_refused(folder, name):
    path = checkpoint.checkpoint_path(folder, 20)
    write_file(path, HOSTILE[name])
    refused(checkpoint.load_checkpoint, path)
    assert checkpoint.load_newest(folder)["step"] == 10


@pytest.mark.parametrize("ids", [[], [1, "2"], [1, 1], ["a", "a"], ["a", "\ud800"], [1.5], [True], [[]], [10**5000, 1]])
def test_item_ids_that_are_no_catalogue_are_refused(folder, ids):
    path = checkpoint.checkpoint_path(folder, 20)
    write_file(path, payload_of({"item_ids": ids}))
    with contextlib.suppress(TypeError):
        assert "item_ids" in refused(checkpoint.load_checkpoint, path, {"item_ids": list})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_not_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "missing", Path("/dev/zero"), tmp_path / "a\0b"):
        refused(checkpoint.load_checkpoint, path)


# -----------------------------------------------------------------------------
# fuzz

places = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)
edits = st.lists(
    st.tuples(st.sampled_from(["flip", "set", "cut", "insert", "end"]), places, st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=4,
)


def damage(data, edits):
    """`data` with each (what, place 0..1, bytes) done to it."""
    data = bytearray(data)
    for what, place, piece in edits:
        at = min(int(place * len(data)), max(len(data) - 1, 0))
        if what == "flip":
            data[at : at + 1] = bytes(byte ^ (1 << piece[0] % 8) for byte in data[at : at + 1])
        elif what == "set":
            data[at : at + len(piece)] = piece
        elif what == "cut":
            del data[at : at + len(piece)]
        elif what == "insert":
            data[at:at] = piece
        else:
            del data[at:]
    return bytes(data)


@fuzz
@given(edits=edits)
def test_fuzz_damaged_checkpoint(tmp_path_factory, edits):
    path = tmp_path_factory.getbasetemp() / "fuzz.pt"
    write_file(path, payload_of(state_of(20)))
    data = path.read_bytes()
    path.write_bytes(damage(data, edits))
    if path.read_bytes() == data:
        assert is_whole(checkpoint.load_checkpoint(path))
    else:
        refused(checkpoint.load_checkpoint, path)


@pytest.mark.filterwarnings("error")
@fuzz
@given(edits=edits, evil=st.booleans())
def test_fuzz_damaged_payload_with_a_right_checksum(tmp_path_factory, edits, evil):
    place = tmp_path_factory.getbasetemp()
    path, marker = place / "fuzz.pt", place / "marker"
    write_file(path, damage(payload_of({"weights": Evil(marker)} if evil else state_of(20)), edits))
    with contextlib.suppress(UserError):  # a changed element of a tensor cannot be known
        state = checkpoint.load_checkpoint(path)
        assert not evil
        assert state["step"] == 20
    assert not marker.exists()


# -----------------------------------------------------------------------------
# faults while writing


def assert_unharmed(folder, step=20):
    assert is_whole(state := checkpoint.load_newest(folder)) and state["step"] == step
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk(folder):
    temporary = folder / "checkpoints" / f"step-00000030.pt.{os.getpid()}.tmp"
    temporary.symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left.*what was saved before is whole: make room"):
        checkpoint.save_checkpoint(folder, 30, state_of(30))
    assert_unharmed(folder)


def run_python(code, place, before):
    """Run `code` as the main() of a script in a new interpreter, after other words."""
    imports = "import sys, utils, torch\nfrom models import checkpoint\nfrom training import run_folder"
    script = f"{imports}\ndef main():\n    {code}\nutils.run_script(main)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [*before, sys.executable, "-c", script, str(place)]
    return subprocess.run(words, capture_output=True, text=True, env=environment)


def test_full_file_system(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount += [f'mount -t tmpfs -o size=300k none "{place}" && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    code = """
    folder = sys.argv[1]
    checkpoint.save_checkpoint(folder, 1, {'x': torch.ones(20_000)})
    run_folder.write_config(folder, {'options': {}, 'fingerprint': 'a'})
    for _ in range(2):
        try:
            checkpoint.save_checkpoint(folder, 2, {'x': torch.ones(60_000)})
        except utils.UserError as error:
            print(error)
    run_folder.write_config(folder, {'options': {'x': 1}, 'fingerprint': 'a'})
    print(checkpoint.load_newest(folder)['x'].sum().item(), run_folder.read_config(folder)['options'])
    """
    done = run_python(code.strip(), place, mount)
    assert done.returncode == 0, done.stderr
    *errors, last = done.stdout.splitlines()
    assert len(errors) == 2 and all("No space left" in error for error in errors)
    assert last == "20000.0 {'x': 1}"


def test_outputs_that_the_user_named(tmp_path, capfdbinary):
    """A link stays a link, a device or pipe is written through, a folder is refused."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    utils.write_output(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"new"
    (tmp_path / "dangling").symlink_to("later")
    utils.write_output(tmp_path / "dangling", b"made")
    assert (tmp_path / "later").read_bytes() == b"made"
    (tmp_path / "circle").symlink_to("circle")
    cases = {tmp_path: "it is a folder", tmp_path / "no" / "x": "its folder is missing", tmp_path / "circle": "circle"}
    cases[tmp_path / ("x" * 300)] = "choose a shorter name"
    if os.path.exists("/dev/full"):
        cases["/dev/full"] = "make room on the disk"
    for path, remedy in cases.items():
        assert remedy in refused(utils.write_output, path, b"data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle", "dangling", "file", "later", "link"]


@pytest.mark.skipif(not os.path.exists("/dev/fd/1"), reason="needs /dev/fd")
def test_output_into_a_pipe():
    ours, theirs = os.pipe()
    utils.write_output(f"/dev/fd/{theirs}", b"data")
    os.close(theirs)
    assert os.read(ours, 10) == b"data"
    os.close(ours)


def test_errors_of_a_device_have_a_sentence():
    assert "(Input/output error)" in str(utils.cannot_write("x", OSError(errno.EIO, "")))


def test_log_folder_removed_during_the_run(folder):
    with run_folder.lock_folder(folder):
        shutil.rmtree(folder)
        with pytest.raises(UserError, match="its folder is missing or was removed"):
            checkpoint.save_checkpoint(folder, 30, state_of(30))
        with pytest.raises(UserError, match="its folder is missing or was removed"):
            run_folder.write_config(folder, CONFIG)
    assert not folder.exists()


def test_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "log").touch()
    with pytest.raises(UserError, match="cannot write"), run_folder.lock_folder(tmp_path / "log" / "run"):
        pass
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="cannot write"):
        checkpoint.save_checkpoint(tmp_path, 1, state_of(1))
    assert checkpoint.load_newest(tmp_path) is None


@contextlib.contextmanager
def ordinary_user():
    """Without the rights of root, which no permission stops."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def shut_folder():
    """A read-only folder with an unreadable newest checkpoint, in a place where others may look."""
    with tempfile.TemporaryDirectory() as place:
        for step in (10, 20, 30):
            checkpoint.save_checkpoint(place, step, state_of(step))
        paths = [Path(place), *Path(place).rglob("*")]
        for path in paths:
            path.chmod(0o000 if path.name == "step-00000030.pt" else 0o555)
        yield Path(place)
        for path in paths:
            path.chmod(0o755)


def test_read_only_folder(shut_folder):
    with ordinary_user():
        with pytest.raises(UserError, match="cannot write .*Permission denied"), run_folder.lock_folder(shut_folder):
            pass
        with pytest.raises(UserError, match="Permission denied.*another folder"):
            checkpoint.save_checkpoint(shut_folder, 40, state_of(40))
        with pytest.raises(UserError, match="Permission denied"):
            run_folder.clear_folder(shut_folder, overwrite=True)
    assert_unharmed(shut_folder, step=30)


def test_unreadable_files(shut_folder, capsys):
    with ordinary_user():
        with pytest.raises(UserError, match="cannot read .*Permission denied"):
            checkpoint.load_checkpoint(checkpoint.checkpoint_path(shut_folder, 30))
        assert checkpoint.load_newest(shut_folder)["step"] == 20
    assert "Permission denied" in capsys.readouterr().err


def save_for_ever(folder):
    with run_folder.lock_folder(folder), run_folder.Interruption():
        for step in count(checkpoint.load_newest(folder)["step"] + 1):
            checkpoint.save_checkpoint(folder, step, state_of(step, size=20_000))
            checkpoint.save_best(folder, step, state_of(step, size=20_000))


def start_saving(folder, stderr):
    """A process that saves for ever and has begun to."""
    before = max(checkpoint.find_checkpoints(folder))
    process = spawn(partial(utils.run_script, partial(save_for_ever, folder)), os.devnull, stderr)
    wait_until(lambda: max(checkpoint.find_checkpoints(folder)) > before)
    return process


def assert_all_whole(folder):
    paths = [*checkpoint.find_checkpoints(folder).values(), *folder.glob("checkpoints/best.pt")]
    assert all(is_whole(checkpoint.load_checkpoint(path)) for path in paths)


def test_killed_while_saving(folder, tmp_path):
    moments = random.Random(1)
    for _ in range(KILLS):
        process = start_saving(folder, tmp_path / "err")
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        assert wait(process) == -signal.SIGKILL
        assert_all_whole(folder)
        with run_folder.lock_folder(folder):  # a dead one's is taken over, what it left half-written removed
            assert not list(folder.rglob("*.tmp"))


# -----------------------------------------------------------------------------
# one run at a time


def lock_once(folder):
    with run_folder.lock_folder(folder):
        pass


def test_second_run_is_refused_with_process_and_host(folder, tmp_path):
    words = f"in use by process {os.getpid()} on host {socket.gethostname()}: wait, or choose another --log_dir"
    with run_folder.lock_folder(folder):
        process = spawn(partial(utils.run_script, partial(lock_once, folder)), os.devnull, tmp_path / "err")
        assert wait(process) == 2
        assert (tmp_path / "err").read_text() == f"error: {folder} is {words}\n"
        assert words in refused(lock_once, folder)
        for content in (b"", b"\xff", b"x" * 200_000):
            (folder / "holder").write_bytes(content)
            assert len(refused(lock_once, folder)) < 500
        (folder / "holder").unlink()
        assert "in use by another process" in refused(lock_once, folder)
    lock_once(folder)


@pytest.mark.parametrize("content", ["999999 elsewhere", "rubbish", "\0" * 50])
def test_what_stands_in_a_free_lock_does_not_matter(folder, content):
    for name in ("lock", "holder"):
        (folder / name).write_text(content)
    lock_once(folder)


def test_lock_ends_with_an_exception(folder):
    with pytest.raises(ZeroDivisionError), run_folder.lock_folder(folder):
        raise ZeroDivisionError
    assert not (folder / "holder").exists()
    lock_once(folder)


@pytest.mark.parametrize(
    "name", ["lock", "holder", "config.json", "projector/items.tsv", "checkpoints/step-00000010.pt", "projector"]
)
def test_links_in_a_run_folder_are_refused(folder, tmp_path, name):
    (target := tmp_path / "precious").write_text("precious")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    assert f"{folder / name} is a link" in refused(lock_once, folder)
    assert target.read_text() == "precious"


# -----------------------------------------------------------------------------
# config.json

CONFIG = {"options": {"model": "narm", "fold": 3, "lr": 1e-3, "test": False}, "fingerprint": "ab" * 32}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def use_config(folder):
    """All that a script does with a config.json; UserError is the only way to fail."""
    config = run_folder.read_config(folder)
    checkpoint.check_fingerprint(config["fingerprint"], CONFIG["fingerprint"], folder)
    option_module.check_resume(config["options"], CONFIG["options"])
    run_folder.warn_versions(config)


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """A folder with a config.json, and the bytes of it."""
    place = tmp_path_factory.mktemp("configured")
    run_folder.write_config(place, CONFIG)
    return place, (place / "config.json").read_bytes()


@fuzz
@given(edits=edits)
def test_fuzz_damaged_config(configured, edits):
    place, data = configured
    (place / "config.json").write_bytes(damage(data, edits))
    with contextlib.suppress(UserError):
        use_config(place)


@fuzz
@given(data=st.data())
def test_fuzz_config_of_other_values(configured, data):
    place, whole = configured
    config = json.loads(whole)
    for holder in (config, config["options"]):
        for key in data.draw(st.lists(st.sampled_from(sorted(holder)))):
            holder[key] = data.draw(json_values)
            if not isinstance(config["options"], dict):
                break
    (place / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(UserError):
        use_config(place)


def test_config_comes_back_with_what_repeats_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--data_path=my ratings.csv"])
    options = argparse.Namespace(model="narm", scale=(1, 5), path=tmp_path, lr=np.float64(0.1))
    run_folder.write_config(tmp_path, {"options": options, "fingerprint": "ab", "parameters": 7})
    config = run_folder.read_config(tmp_path)
    assert config["options"] == {"model": "narm", "scale": [1, 5], "path": str(tmp_path), "lr": 0.1}
    assert config["command"] == "python main.py '--data_path=my ratings.csv'"
    assert config["versions"]["torch"] == torch.__version__ and config["versions"]["numpy"] == np.__version__
    assert config["parameters"] == 7
    option_module.check_resume(config["options"], options)


GOOD = {"options": {}, "fingerprint": "a", "versions": {}, "command": "", "format_version": 1}
BAD_CONFIGS = {
    "": "not JSON",
    "{": "not JSON",
    "\xff": "not JSON",
    "[" * 100_000: "not JSON",
    "1" * 5000: "not JSON",
    "[1]": "no JSON object",
    "{}": "format version None",
    json.dumps({**GOOD, "format_version": 2}): "format version 2, and this program reads version 1",
    json.dumps({**GOOD, "format_version": True}): "format version True",
    json.dumps({**GOOD, "options": []}): "holds 'options' as list, not dict",
    json.dumps({**GOOD, "fingerprint": None}): "holds 'fingerprint' as NoneType, not str",
    json.dumps({key: GOOD[key] for key in GOOD if key != "versions"}): "lacks 'versions'",
}


@pytest.mark.parametrize(("text", "message"), BAD_CONFIGS.items(), ids=BAD_CONFIGS.values())
def test_bad_config(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert message in refused(run_folder.read_config, tmp_path)


def test_missing_config(tmp_path):
    assert "config.json does not exist" in refused(run_folder.read_config, tmp_path)


def test_resume_lists_every_difference():
    old = {"model": "narm", "num_train_iterations": 100, "log_interval": 5, "fold": 1, "gone": 1}
    option_module.check_resume(old, {**old, "num_train_iterations": 200, "log_interval": 7, "device": "cuda"})
    new = {"model": "sasrec", "num_train_iterations": 50, "log_interval": 7, "fold": True, "added": 2}
    with pytest.raises(UserError) as error:
        option_module.check_resume(old, new)
    for part in (
        "--model was 'narm' and is now 'sasrec'",
        "--num_train_iterations was 100 and is now 50",
        "--fold was 1 and is now True",
        "--gone was 1 and is now not there",
        "--added was not there and is now 2",
    ):
        assert part in str(error.value)
    assert "log_interval" not in str(error.value)


def test_other_data_and_other_versions(capsys):
    checkpoint.check_fingerprint("abc", "abc", "log")
    with pytest.raises(UserError, match="log belongs to other data"):
        checkpoint.check_fingerprint("abc", "abd", "log")
    run_folder.warn_versions({"versions": run_folder.versions()})
    assert capsys.readouterr().err == ""
    run_folder.warn_versions({"versions": {**run_folder.versions(), "torch": "1.0"}})
    assert f"torch 1.0 -> {torch.__version__}" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# signals


@pytest.mark.parametrize("number", run_folder.STOPPING)
def test_first_signal_only_asks(number):
    before = [signal.getsignal(each) for each in run_folder.STOPPING]
    with run_folder.Interruption() as stop:
        assert not stop.requested and stop.exit_code == 0
        signal.raise_signal(number)
        assert stop.signal == number and not stop.requested
        stop.agreed = stop.signal  # as the loop does, once an iteration
        assert stop.requested and stop.exit_code == 128 + number
        signal.raise_signal(signal.SIGTERM)
        assert stop.exit_code == 128 + number
    assert [signal.getsignal(each) for each in run_folder.STOPPING] == before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_what_nohup_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with run_folder.Interruption() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_second_interrupt_stops_at_once_without_harm(folder, tmp_path):
    for i in range(3):
        stderr = tmp_path / f"err{i}"
        process = start_saving(folder, stderr)
        os.kill(process.pid, signal.SIGTERM)
        wait_until(lambda file=stderr: "stopping after this iteration" in file.read_text())
        os.kill(process.pid, signal.SIGTERM)  # asking again changes nothing
        os.kill(process.pid, signal.SIGINT)
        assert wait(process) == 130
        assert_all_whole(folder)
        assert not list(folder.rglob("*.tmp")) and not (folder / "holder").exists()
        assert "Traceback" not in stderr.read_text()
