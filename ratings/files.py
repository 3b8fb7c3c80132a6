"""The one place that opens ratings files: plain, compressed, in an archive or from a pipe, in any encoding."""

import bz2
import codecs
import contextlib
import gzip
import lzma
import os
import shutil
import stat
import struct
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

from filelock import FileLock, Timeout

from utils import PATIENCE, UserError, shorten

BLOCK = 1 << 25  # bytes of text that are read at a time
TEMPORARY = ".melo-"  # how the names of temporary folders begin
OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
ZIP_MEMBERS = ("ratings.dat", "ratings.csv", "u.data", "yelp_academic_dataset_review.json")
DAMAGED = (  # what damaged archives raise
    *(EOFError, OSError, RuntimeError, ValueError, OverflowError, IndexError, struct.error),
    *(zlib.error, lzma.LZMAError, zipfile.BadZipFile),
)


def cannot_read(path, error):
    """The UserError for what reading `path` raised."""
    reason = shorten(getattr(error, "strerror", None) or str(error) or type(error).__name__, 200)
    if isinstance(error, OSError) and error.errno:
        return UserError(f"cannot read {path}: {reason}; give a path that can be read")
    return UserError(f"{path} is damaged or was not copied completely ({reason}); fetch it again")


def open_raw(path):
    """A file, or what a pipe holds, open for reading from any position; UserError for everything else."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"{path} is a folder; name the ratings file in it")
        if stat.S_ISFIFO(mode):
            return open_pipe(path)
        if not stat.S_ISREG(mode):
            raise UserError(f"{path} is a device; give a file or a pipe")
        return open(path, "rb")
    except (OSError, ValueError) as error:
        raise cannot_read(path, error) from None


def open_pipe(path):
    """What a pipe holds, kept in a temporary file, because archives and Parquet are not read front to back."""
    begin, kept = time.monotonic(), tempfile.TemporaryFile()  # noqa: SIM115, the caller closes it
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as pipe:
        while not (piece := pipe.read(1 << 16)):  # b"": nobody writes; None: somebody has it open
            if piece == b"" and time.monotonic() - begin > PATIENCE:
                raise UserError(f"{path} is a pipe that no program writes to; start the program, or give a file")
            time.sleep(0.01)
        kept.write(piece)
        os.set_blocking(pipe.fileno(), True)
        shutil.copyfileobj(pipe, kept)
    kept.seek(0)
    return kept


@contextlib.contextmanager
def open_file(path):
    """(the file itself, its text decompressed), as its first bytes say; no text for Parquet."""
    with open_raw(path) as raw:
        try:
            start = raw.read(6)
            raw.seek(0)
        except OSError as error:
            raise cannot_read(path, error) from None
        if start.startswith(b"PAR1"):
            yield raw, None
        elif start.startswith((b"PK\3\4", b"PK\5\6")):
            yield raw, open_zip(path, raw)
        else:
            opener = next((OPENERS[magic] for magic in OPENERS if start.startswith(magic)), None)
            yield raw, opener(raw) if opener else raw


def open_zip(path, raw):
    """The ratings in a zip archive: the member of a known name, or the only one."""
    try:
        archive = zipfile.ZipFile(raw)
        members = [name for name in archive.namelist() if not name.endswith("/")]
        known = [name for name in members if name.rsplit("/", 1)[-1] in ZIP_MEMBERS] or members
        if len(known) == 1:
            return archive.open(known[0])
    except DAMAGED as error:
        raise cannot_read(path, error) from None
    listed = ", ".join(members[:5]) + (", ..." if len(members) > 5 else "")
    raise UserError(f"{path} holds {shorten(listed, 200) or 'nothing'}, not one ratings file; unpack it and name one")


def blocks(path, file, encoding=None, progress=lambda: None):
    """Blocks of whole lines of a binary file, in UTF-8, each with the number of its first line, from 1."""
    line, rest, decode = 1, b"", decoder(path, encoding)
    while True:
        try:
            piece = file.read(BLOCK)
        except DAMAGED as error:
            raise cannot_read(path, error) from None
        progress()
        rest += decode(piece)
        end = end_of_rows(rest) if piece else len(rest)
        if end:
            yield line, rest[:end]
            line, rest = line + rest.count(b"\n", 0, end), rest[end:]
        if not piece:
            return
        if len(rest) > BLOCK:
            raise UserError(f"{path}, line {line}: no line end in {len(rest):,} bytes; is this a text file?")


def decoder(path, encoding):
    """A function from the file's bytes to UTF-8; the last piece is empty."""
    if encoding is None:
        return bytes
    try:
        "".encode(encoding)  # refuses codecs that are not of text, such as rot13
        decode = codecs.getincrementaldecoder(encoding)().decode
    except (LookupError, TypeError, ValueError):
        raise UserError(f"--encoding={encoding} is not known; use for example latin-1, cp1252 or utf-16") from None

    def to_utf8(piece):
        try:
            return decode(piece, final=not piece).encode()
        except ValueError as error:
            raise UserError(f"{path} is not in --encoding={encoding} ({error}); try another") from None

    return to_utf8


def end_of_rows(block):
    """Where the last whole row ends: at a line end outside of quotes, if there is one."""
    last = end = block.rfind(b"\n") + 1
    inside = block.count(b'"', 0, end) % 2
    while inside and end:
        start = block.rfind(b"\n", 0, block.rfind(b'"', 0, end)) + 1
        inside ^= block.count(b'"', start, end) % 2
        end = start
    return end or last


# -----------------------------------------------------------------------------
# Temporary folders


@contextlib.contextmanager
def temporary_folder(parent):
    """A new folder in `parent`, which is removed at exit; `remove_leftovers` removes that of a killed process."""
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=parent) as name, FileLock(Path(name, "lock")):
        yield Path(name)


def remove_leftovers(parent):
    """Remove the temporary folders of processes that are gone: their lock is free."""
    for lock in Path(parent).glob(f"{TEMPORARY}*/lock"):
        with contextlib.suppress(Timeout, OSError):
            with FileLock(lock, timeout=0):
                pass
            shutil.rmtree(lock.parent)
