"""MovieLens editions from their publisher or a mirror: whole, checked and safely unpacked, or not at all."""

import hashlib
import http.client
import os
import shutil
import stat
import time
import urllib.request
import zipfile
from pathlib import PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from ratings import files
from utils import UserError, say, shorten

PUBLISHER = "https://files.grouplens.org/datasets/movielens"
TIMEOUT = 30  # seconds without a byte
TRIES = 3
PAUSE = 2  # seconds after the first failure; twice as many after the second
LARGEST_RATIO = 100  # of the unpacked size to the archive's; text of ratings has 5


class Edition(NamedTuple):
    """An archive <name>.zip that unpacks to `folder`."""

    folder: str
    member: str  # the ratings file in it
    md5: str | None = None  # None: the publisher changes the archive from time to time


EDITIONS = {
    "ml-100k": Edition("ml-100k", "u.data", "0e33842e24a9c977be4e0107933c0723"),
    "ml-1m": Edition("ml-1m", "ratings.dat", "c4d9eecfca2ab87c1945afe126590906"),
    "ml-10m": Edition("ml-10M100K", "ratings.dat", "ce571fd55effeba0271552578f2648bd"),
    "ml-20m": Edition("ml-20m", "ratings.csv", "cd245b17a1ae2cc31bb14903e1204af3"),
    "ml-25m": Edition("ml-25m", "ratings.csv", "6b51fb2759a8657d3bfcbfc42b592ada"),
    "ml-32m": Edition("ml-32m", "ratings.csv", "d472be332d4daa821edc399621853b57"),
    "ml-latest": Edition("ml-latest", "ratings.csv"),
    "ml-latest-small": Edition("ml-latest-small", "ratings.csv"),
}


class BadArchive(Exception):
    """What came is not the edition's archive."""


def download_edition(name, root, data_url=None):
    """Put an edition's folder under `root`, from `root`/<name>.zip if it lies there, else from the net.

    `data_url` is a mirror: the archive or the folder that it is in. Where the archive cannot be had or
    is not the right one, raises `UserError` and leaves nothing behind.
    """
    edition, by_hand = EDITIONS[name], root / f"{name}.zip"
    url = (data_url or PUBLISHER).rstrip("/")
    url += "" if url.endswith(".zip") else f"/{name}.zip"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with files.temporary_folder(root) as folder:
            archive = by_hand if by_hand.exists() else fetch(url, folder / f"{name}.zip", edition)
            check(archive, edition)
            unpacked = unpack(archive, folder / "unpacked", edition)
            put(unpacked, root / edition.folder, edition.member)
    except (BadArchive, OSError) as error:
        raise UserError(
            f"cannot get {name} from {by_hand if by_hand.exists() else url} ({shorten(error, 300)}); fetch "
            f"{PUBLISHER}/{name}.zip by hand and put it at {by_hand}, or give a ratings file with --data_path, or a "
            "mirror with --data_url"
        ) from None


def fetch(url, archive, edition):
    """Download `url` to `archive` in several tries; raises `BadArchive`."""
    for attempt in range(TRIES):
        time.sleep(PAUSE * attempt)
        say(f"downloading {url}")
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response, archive.open("wb") as file:
                size = int(response.headers.get("Content-Length") or 0)
                bar = {"total": size or None, "desc": archive.name, "leave": False, "disable": None}
                with tqdm.wrapattr(response, "read", **bar) as body:
                    shutil.copyfileobj(body, file)
            if archive.stat().st_size < size:
                raise BadArchive("the connection broke off")
            check(archive, edition)
            return archive
        except (BadArchive, OSError, ValueError, http.client.HTTPException) as error:
            failure = error
    raise BadArchive(f"tried {TRIES} times: {failure}")


def check(archive, edition):
    """Raise `BadArchive` unless the file is the edition's archive, or any archive where editions change."""
    if edition.md5:
        with archive.open("rb") as file:
            digest = hashlib.file_digest(file, "md5").hexdigest()
        if digest != edition.md5:
            raise BadArchive(f"its MD5 is {digest}, not {edition.md5}")
    elif not zipfile.is_zipfile(archive):
        raise BadArchive("it is not a zip archive")


def unpack(archive, folder, edition):
    """Unpack the archive into `folder`, and return the edition's folder there; raises `BadArchive`."""
    try:
        with zipfile.ZipFile(archive) as file:
            members = file.infolist()
            size = sum(member.file_size for member in members)
            if size > LARGEST_RATIO * archive.stat().st_size:
                raise BadArchive(f"it would unpack to {size:,} bytes")
            unsafe = next((member.filename for member in members if leaves(member)), None)
            if unsafe is not None:
                raise BadArchive(f"its member {shorten(unsafe)} would be put outside of its folder")
            for member in tqdm(members, desc=f"unpacking {archive.name}", delay=2, leave=False, disable=None):
                file.extract(member, folder)
    except files.DAMAGED as error:
        raise BadArchive(str(error) or type(error).__name__) from None
    if not (folder / edition.folder / edition.member).is_file():
        raise BadArchive(f"it holds no {edition.folder}/{edition.member}")
    return folder / edition.folder


def leaves(member):
    """Whether an archive's member points out of the folder: absolute, upwards, or by a link."""
    path = PurePosixPath(member.filename.replace("\\", "/"))
    link = stat.S_ISLNK(member.external_attr >> 16)
    return path.is_absolute() or ".." in path.parts or ":" in "".join(path.parts[:1]) or link


def put(unpacked, target, member):
    """Give the unpacked folder its name; where there is one already, its ratings file alone is put there."""
    try:
        os.replace(unpacked, target)
    except OSError:
        os.replace(unpacked / member, target / member)
