"""The ratings that the options ask for, and a cache of what was parsed.

A cache file is a line with the checksum of the rest, a line of JSON, then the arrays.
"""

import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from ratings import table
from ratings.readers import open_raw
from utils import say

CACHE_FROM = 1 << 20  # bytes; smaller files are read as fast as their cache would be


CACHE_VERSION = 1  # changes with what is cached


def load_ratings(options):
    """The `Ratings` that the data options ask for, from the cache where it holds just these."""
    path = table.find_data(options)
    is_small = path.stat().st_size < CACHE_FROM
    ratings, notes = table.parse_ratings(path, options) if is_small else cached_ratings(path, options)
    for note in notes:
        say(f"{path}: {note}")
    return ratings


def cached_ratings(path, options):
    """What `parse_ratings` gives, parsed once for the same content and options."""
    place = cache_place(path, options)
    with open_raw(path) as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    found = read_cache(place, content)
    if found is None:
        found = table.parse_ratings(path, options)
        write_cache(place, content, *found)
    return found


def cache_place(path, options):
    """The cache file for a data file and these options."""
    names = ("mode", "columns", "sep", "skip_bad_rows", "rating_scale", "min_item", "min_sequence")
    asked = [CACHE_VERSION, str(path.resolve()), *(getattr(options, name) for name in names)]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    return Path(options.cache_dir or path.parent) / f"{path.name}.{digest[:16]}.cache"


def write_cache(place, content, ratings, notes):
    """Keep `ratings` in `place`, under a temporary name until it is whole."""
    header = vars(ratings) | {"content": content, "notes": notes}
    arrays = {name: value for name, value in header.items() if isinstance(value, np.ndarray)}
    header["arrays"] = [[name, array.dtype.str, len(array)] for name, array in arrays.items()]
    header = {name: value for name, value in header.items() if name not in arrays}
    part = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.parent.stat().st_mode & 0o200:
            raise PermissionError(errno.EACCES, "the folder is read-only")  # for root too
        with part.open("w+b") as file:
            file.write(bytes(64) + b"\n" + json.dumps(header).encode() + b"\n")
            for array in arrays.values():
                file.write(bytes(-file.tell() % 64))
                file.write(array)
            file.seek(65)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            file.write(digest.encode())
        os.replace(part, place)
    except OSError as error:
        say(f"parsed data is not kept in {place.parent} ({error.strerror}); --cache_dir gives another place")
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def read_cache(place, content):
    """(`Ratings` mapped into memory, notes) kept in `place`; None where damaged or of other content."""
    try:
        with place.open("rb") as file:
            digest = file.read(65).decode().strip()
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return None
            file.seek(65)
            header = json.loads(file.readline())
            position = file.tell()
            data = np.memmap(file, np.uint8, "r").view(np.ndarray)
    except (OSError, ValueError):
        return None
    if header.pop("content") != content:
        return None
    notes, arrays = header.pop("notes"), header.pop("arrays")
    for name, dtype, length in arrays:
        position += -position % 64
        end = position + length * np.dtype(dtype).itemsize
        header[name] = data[position:end].view(dtype)
        position = end
    return table.Ratings(**header), notes
