"""What files may do: pipes, devices, archives, encodings, damage, processes that are killed; and the cache."""

import gzip
import io
import os
import signal
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_datasets import CSV, LAYOUTS, NUMBERS, data_options, read, read_rows, save, zipped

from ratings import cache, download, files, table
from utils import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fifo(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lambda text: zipped({"ratings.csv": text})])
def test_a_pipe_is_read_like_a_file(fifo, pack):
    def write():
        time.sleep(0.05)
        with open(fifo, "wb") as file:
            time.sleep(0.3)  # longer than one waits for a program to come
            file.write(pack(LAYOUTS["ml-25m"].encode()))

    thread = threading.Thread(target=write)
    thread.start()
    assert read_rows(fifo) == NUMBERS
    thread.join()


def test_a_pipe_without_a_program_is_given_up(fifo):
    with pytest.raises(UserError, match="is a pipe that no program writes to"):
        read(fifo)


@pytest.mark.parametrize(
    "place", ["/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", "/", "a" * 300, "a\0b", "a/b"]
)
def test_what_is_no_file_is_told_in_one_sentence(tmp_path, monkeypatch, place):
    monkeypatch.chdir(save(tmp_path, "", "a").parent)
    for load in (lambda: read(place), lambda: cache.load_ratings(data_options(data_path=place))):
        with pytest.raises(UserError) as error:
            load()
        assert "\n" not in str(error.value)


def test_an_error_of_the_disk_is_told(tmp_path, monkeypatch):
    class Failing(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, _):
            raise OSError(5, "Input/output error")

    path = save(tmp_path, CSV)
    monkeypatch.setattr(files, "open_raw", lambda path: Failing())
    for load in (read, cache.identity):
        with pytest.raises(UserError, match="cannot read .*ratings.csv: Input/output error"):
            load(path)


def archive(name="ratings.csv", flags=0, **change):
    """A zip archive whose one member has this raw name."""
    data = zipped({"x" * len(name): CSV})
    return data.replace(b"x" * len(name), name)


ARCHIVES = {
    "a member without a name": zipped({"./": "", "ratings.csv": CSV}),
    "a folder alone": zipped({"./": ""}),
    "a name that is not UTF-8": zipped({"éé.csv": CSV}).replace("é".encode(), b"\xff\xff"),
    "a name of terminal escapes": zipped({"\x1b[2J.csv": "-", "\x1b]0;x\x07.csv": "-"}),
    "a broken zip64": zipped({"ratings.csv": CSV})[:-22] + b"PK\6\7" + bytes(16) + zipped({"ratings.csv": CSV})[-22:],
    "an offset beyond the end": zipped({"ratings.csv": CSV})[:-6] + b"\xff\xff\xff\xff\0\0",
    "damaged LZMA": None,
    "an empty archive": zipped({}),
}


def lzma_zip(place):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as packed:
        packed.writestr("ratings.csv", CSV * 50)
    data = bytearray(file.getvalue())
    data[place] ^= 255
    return bytes(data)


@pytest.mark.parametrize("kind", ARCHIVES)
def test_odd_archives_are_read_or_told_in_one_sentence(tmp_path, monkeypatch, kind):
    contents = [ARCHIVES[kind]] if ARCHIVES[kind] else [lzma_zip(place) for place in range(30, 130, 3)]
    monkeypatch.setitem(download.EDITIONS, "ml-1m", download.Edition("ml-1m", "ratings.csv"))
    for number, content in enumerate(contents):
        path = save(tmp_path, content, f"{number}.zip")
        folder = tmp_path / str(number)
        folder.mkdir()
        save(folder, content, "ml-1m.zip")
        for load in (lambda path=path: read(path), lambda folder=folder: download.download_edition("ml-1m", folder)):
            try:
                load()
            except UserError as error:
                assert str(error).isprintable()
        assert [path.name for path in folder.iterdir()] == ["ml-1m.zip"]


# -----------------------------------------------------------------------------
# Text


def test_encodings_are_taken_as_given(tmp_path):
    text = "user,item,rating,time\n1,é,3,4\n"
    for encoding in ("latin-1", "cp1252", "utf-16", "utf-8-sig", "utf-32-be"):
        path = save(tmp_path, text.encode(encoding))
        assert read_rows(path, encoding=encoding)[0][1] == "é"
    for encoding in ("rot13", "base64", "undefined", "none", "", "\0", "ascii"):
        with pytest.raises(UserError, match="--encoding="):
            read(save(tmp_path, text + "x"), encoding=encoding)


def test_unclosed_quotes_and_huge_fields_are_told_in_one_sentence(tmp_path):
    for row in ('1,"2,3,4\n', f"1,{'2' * 200_000},3,4\n", f'1,"{"2" * 200_000}",3,4\n', f'"{"1" * 200_000},2,3,4\n'):
        for content in (CSV + row, row + CSV, CSV + row + CSV * 20):
            with pytest.raises(UserError) as error:
                read(save(tmp_path, content))
            assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_terminal_escapes_do_not_reach_the_terminal(tmp_path):
    bad = "\x1b]0;x\x07\x1b[31m\u202e"
    for content in (
        CSV + f"{bad},2,x,4\n",
        f"{bad},item,rating\n1,2,3\n",
        f"{bad}\n",
        '{"' + bad.encode("unicode_escape").decode().replace("\\x", "\\u00") + '": 1}\n',
        f"user,item,rating,rating\n{bad},2,3,4\n",
        CSV + f"1,2,3,{bad}\n",
    ):
        with pytest.raises(UserError) as error:
            read(save(tmp_path, content))
        assert str(error.value).isprintable()


# -----------------------------------------------------------------------------
# Leftovers and the cache


def test_what_a_killed_process_left_is_removed_and_what_runs_is_not(tmp_path, monkeypatch):
    child = os.fork()
    if child == 0:
        with files.temporary_folder(tmp_path) as folder:
            (folder / "half").write_text("half")
            time.sleep(60)
    while not (halves := list(tmp_path.glob("*/half"))):
        time.sleep(0.01)
    files.remove_leftovers(tmp_path)
    assert halves[0].exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    monkeypatch.setattr(cache, "CACHE_FROM", 0)
    path = save(tmp_path, CSV + "1,3,4,5\n")
    cache.load_ratings(data_options(data_path=str(path), cache_dir=str(tmp_path)))
    assert sorted(each.suffix for each in tmp_path.iterdir()) == [".cache", ".csv"]


def test_data_that_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE_FROM", 0)
    path, original = save(tmp_path, CSV + "1,3,4,5\n"), table.read_columns

    def read_and_change(*given):
        found = original(*given)
        path.write_text(path.read_text().replace("1,3,4", "1,3,5"))
        return found

    monkeypatch.setattr(table, "read_columns", read_and_change)
    with pytest.raises(UserError, match="was changed while it was read"):
        cache.load_ratings(data_options(data_path=str(path)))
    assert list(tmp_path.iterdir()) == [path]


def test_a_cache_with_right_digests_but_wrong_content_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE_FROM", 0)
    path = save(tmp_path, CSV + "1,3,4,5\n1,4,5,6\n2,3,3,9\n")
    options = data_options(data_path=str(path))
    whole = cache.load_ratings(options)
    place, content = cache.cache_place(path, options), cache.identity(path)
    for change in (
        {"values": whole.values + 90},
        {"values": whole.values * np.float32("nan")},
        {"values": whole.values.astype(float)},
        {"items": whole.items + 1},
        {"items": -whole.items},
        {"offsets": whole.offsets[::-1].copy()},
        {"offsets": whole.offsets + 1},
        {"offsets": whole.offsets[:1]},
        {"user_ids": whole.user_ids[:1]},
        {"user_ids": np.arange(2)},
        {"times": whole.times[:1]},
        {"levels": whole.levels[::-1].copy()},
        {"low": float("nan")},
        {"high": 1.0},
        {"high": "5"},
        {"low": None},
    ):
        forged = table.replace(whole, **change)
        cache.write_cache(place, content, table.replace(forged, fingerprint=table.fingerprint(forged)), [])
        assert cache.read_cache(place, content) is None, change
        assert cache.load_ratings(options).fingerprint == whole.fingerprint
        assert cache.read_cache(place, content) is not None
    for notes in (None, 5, {"a": 1}):
        cache.write_cache(place, content, whole, notes)
        cache.load_ratings(options)


def test_the_sample_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = table.find_data(data_options(mode="sample"))
    assert path == ROOT / "Data" / "sample" / "ratings.csv" and path.exists()
