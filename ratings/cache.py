"""The ratings that the options ask for, and a cache of what was parsed.

A cache file is the checksum of its header, a line of JSON, and the arrays, whose digest is the ratings' fingerprint.
"""

import hashlib
import json
import os
import stat
from pathlib import Path

import numpy as np

from ratings import files, table
from utils import UserError, say

CACHE_FROM = 1 << 20  # bytes; smaller files are read as fast as their cache would be
CACHE_VERSION = 2  # changes with what is cached


def load_ratings(options):
    """The `Ratings` that the data options ask for, from the cache where it holds just these."""
    path = table.find_data(options)
    found = path.stat()
    is_small = found.st_size < CACHE_FROM or not stat.S_ISREG(found.st_mode)
    ratings, notes = table.parse_ratings(path, options) if is_small else cached_ratings(path, options)
    for note in notes:
        say(f"{path}: {note}")
    return ratings


def cached_ratings(path, options):
    """What `parse_ratings` gives, parsed once for the same content and options."""
    place, before = cache_place(path, options), identity(path)
    files.remove_leftovers(place.parent)
    found = read_cache(place, before)
    if found is None:
        found = table.parse_ratings(path, options)
        if identity(path) != before:
            raise UserError(f"{path} was changed while it was read; run again when it is complete")
        write_cache(place, before, *found)
    return found


def identity(path):
    """The digest of a file's content."""
    with files.open_raw(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise files.cannot_read(path, error) from None


def cache_place(path, options):
    """The cache file for a data file and these options."""
    names = ("mode", "columns", "sep", "encoding", "skip_bad_rows", "unrated", "drop_outside", "rating_scale")
    names += ("min_item", "min_sequence")
    given = [CACHE_VERSION, str(path.resolve()), *(getattr(options, name) for name in names)]
    digest = hashlib.sha256(json.dumps(given).encode()).hexdigest()
    return Path(options.cache_dir or path.parent) / f"{path.name}.{digest[:16]}.cache"


def write_cache(place, content, ratings, notes):
    """Keep `ratings` in `place`, under a temporary name until it is whole."""
    arrays = {name: getattr(ratings, name) for name in table.ARRAYS}
    arrays = dict(sorted(arrays.items(), key=lambda pair: -pair[1].dtype.alignment))  # none needs padding
    header = {"content": content, "notes": notes, "low": ratings.low, "high": ratings.high}
    header["fingerprint"] = ratings.fingerprint
    header["arrays"] = [[name, array.dtype.str, len(array)] for name, array in arrays.items()]
    header = json.dumps(header).encode()
    header += b" " * (-(len(header) + 66) % 8) + b"\n"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with files.temporary_folder(place.parent) as folder:
            with open(folder / "cache", "wb") as file:
                file.write(hashlib.sha256(header).hexdigest().encode() + b"\n" + header)
                for array in arrays.values():
                    file.write(array)
            os.replace(folder / "cache", place)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        say(f"parsed data is not kept in {place.parent} ({reason}); --cache_dir gives another place")


def read_cache(place, content):
    """(`Ratings` mapped into memory, notes) kept in `place`; None where damaged or of other content."""
    try:
        with place.open("rb") as file:
            digest, line = file.read(65).decode().strip(), file.readline()
            header = json.loads(line)
            if hashlib.sha256(line).hexdigest() != digest or header.pop("content") != content:
                return None
            data, position = np.memmap(file, np.uint8, "r").view(np.ndarray), 65 + len(line)
        for name, dtype, length in header.pop("arrays"):
            end = position + length * np.dtype(dtype).itemsize
            header[name], position = data[position:end].view(dtype), end
        notes = [str(note) for note in header.pop("notes")]
        ratings = table.Ratings(**header)
        return (ratings, notes) if position == len(data) and table.is_sound(ratings) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, MemoryError):
        return None
