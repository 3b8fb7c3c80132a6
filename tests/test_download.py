"""Downloads from a local server that does what servers do: stalls, breaks off, lies, serves a wrong file."""

import argparse
import hashlib
import io
import socket
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from options import add_data_options
from ratings import cache, download
from utils import UserError

RATINGS = "1::10::5::3\n1::20::4::2\n2::10::3::1\n"


def data_options(**values):
    parser = argparse.ArgumentParser()
    add_data_options(parser)
    options = parser.parse_args([])
    vars(options).update({"mode": "ml-1m", "min_item": 1, "min_sequence": 1} | values)
    return options


def archive_of(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return file.getvalue()


ARCHIVE = archive_of({"ml-1m/": "", "ml-1m/README": "about", "ml-1m/ratings.dat": RATINGS})
PAGE = b"<html>Sorry, we are down for maintenance</html>"


def serve(request, body=ARCHIVE, length=None, sent=None, stall=False, status=200):
    """Answer with `body`, of which `sent` bytes are really sent and `length` are announced."""
    request.send_response(status)
    if length != "unknown":
        request.send_header("Content-Length", str(len(body) if length is None else length))
    request.end_headers()
    request.wfile.write(body[:sent])
    if stall:
        request.wfile.flush()
        request.server.done.wait(10)


ANSWERS = {
    "whole": {},
    "whole, of unknown length": {"length": "unknown"},
    "stalls": {"sent": 100, "stall": True},
    "stalls at once": {"sent": 0, "stall": True},
    "breaks off": {"sent": 100},
    "breaks off, of unknown length": {"sent": 100, "length": "unknown"},
    "announces less": {"length": 100},
    "announces more": {"length": 10_000},
    "a page": {"body": PAGE},
    "another archive": {"body": archive_of({"ml-1m/ratings.dat": "1::1::1::1\n"})},
    "not found": {"body": PAGE, "status": 404},
    "broken": {"body": PAGE, "status": 500},
}


@pytest.fixture
def server(monkeypatch):
    """A server that gives its `answers` in turn, the last one again and again; `asked` are the paths."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server = self.server
            server.asked.append(self.path)
            answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            serve(self, **ANSWERS[answer])
            self.close_connection = True

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.asked, server.answers, server.done = [], ["whole"], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    monkeypatch.setattr(download, "PAUSE", 0)
    edition = download.Edition("ml-1m", "ratings.dat", hashlib.md5(ARCHIVE).hexdigest())
    monkeypatch.setitem(download.EDITIONS, "ml-1m", edition)
    yield server
    server.done.set()
    server.shutdown()
    server.server_close()


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


WHOLE = ["ml-1m/README", "ml-1m/ratings.dat"]


@pytest.mark.parametrize("answer", ["whole", "whole, of unknown length"])
@pytest.mark.parametrize("suffix", ["", "/", "/mirror/ml-1m.zip"])
def test_a_whole_archive_is_unpacked_and_nothing_else_stays(tmp_path, server, answer, suffix):
    server.answers = [answer]
    download.download_edition("ml-1m", tmp_path / "Data", server.url + suffix)
    assert files(tmp_path) == [f"Data/{name}" for name in WHOLE]
    assert (tmp_path / "Data/ml-1m/ratings.dat").read_text() == RATINGS
    assert server.asked == ["/mirror/ml-1m.zip" if "mirror" in suffix else "/ml-1m.zip"]


@pytest.mark.parametrize("answer", [answer for answer in ANSWERS if not answer.startswith("whole")])
def test_a_failure_says_what_to_do_and_leaves_nothing(tmp_path, server, answer):
    server.answers = [answer]
    default = socket.getdefaulttimeout()
    with pytest.raises(UserError) as error:
        download.download_edition("ml-1m", tmp_path, server.url)
    text = str(error.value)
    assert f"cannot get ml-1m from {server.url}/ml-1m.zip (tried 3 times: " in text and "\n" not in text
    assert f"fetch {download.PUBLISHER}/ml-1m.zip by hand and put it at {tmp_path}/ml-1m.zip" in text
    assert "--data_url" in text and "--data_path" in text
    assert len(server.asked) == 3 and not list(tmp_path.iterdir()) and socket.getdefaulttimeout() == default


def test_a_server_that_recovers_is_asked_again(tmp_path, server):
    server.answers = ["stalls", "breaks off", "whole"]
    download.download_edition("ml-1m", tmp_path, server.url)
    assert files(tmp_path) == WHOLE and len(server.asked) == 3


def test_no_server_at_all_is_said(tmp_path, server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="refused.* by hand"):
            download.download_edition("ml-1m", tmp_path, f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(UserError, match="unknown url type.* by hand"):
        download.download_edition("ml-1m", tmp_path, "mirror")


def test_an_archive_fetched_by_hand_is_used_and_kept(tmp_path, server):
    (tmp_path / "ml-1m.zip").write_bytes(ARCHIVE)
    download.download_edition("ml-1m", tmp_path)
    assert files(tmp_path) == ["ml-1m.zip", *WHOLE] and not server.asked


def test_a_wrong_archive_fetched_by_hand_is_refused_and_kept(tmp_path, server):
    (tmp_path / "ml-1m.zip").write_bytes(PAGE)
    with pytest.raises(UserError, match="cannot get ml-1m from .*/ml-1m.zip .its MD5 is"):
        download.download_edition("ml-1m", tmp_path)
    assert files(tmp_path) == ["ml-1m.zip"]


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"/tmp/ml-1m/ratings.dat": RATINGS}, "outside of its folder"),
        ({"ml-1m/ratings.dat": RATINGS, "ml-1m/../../ratings.dat": RATINGS}, "outside of its folder"),
        ({"ml-1m/ratings.dat": RATINGS, "..\\ratings.dat": RATINGS}, "outside of its folder"),
        ({"ml-1m/ratings.dat": RATINGS, "C:\\ratings.dat": RATINGS}, "outside of its folder"),
        ({"ml-1m/ratings.dat": RATINGS, link("ml-1m/link"): "/etc"}, "outside of its folder"),
        ({"ml-1m/ratings.dat": "0" * 10**7}, "would unpack to 10,000,000 bytes"),
        ({"ratings.dat": RATINGS}, "holds no ml-1m/ratings.dat"),
        ({}, "holds no ml-1m/ratings.dat"),
    ],
)
def test_an_unsafe_or_other_archive_is_not_unpacked(tmp_path, server, members, said):
    download.EDITIONS["ml-1m"] = download.EDITIONS["ml-1m"]._replace(md5=None)
    data = tmp_path / "a" / "b" / "Data"
    data.mkdir(parents=True)
    (data / "ml-1m.zip").write_bytes(archive_of(members))
    with pytest.raises(UserError, match=said):
        download.download_edition("ml-1m", data)
    assert files(tmp_path) == ["a/b/Data/ml-1m.zip"]


def test_every_damaged_archive_is_refused_or_whole(tmp_path, server):
    download.EDITIONS["ml-1m"] = download.EDITIONS["ml-1m"]._replace(md5=None)
    for place in range(0, len(ARCHIVE), 5):
        data = tmp_path / str(place)
        data.mkdir()
        damaged = ARCHIVE[:place] + bytes([ARCHIVE[place] ^ 255]) + ARCHIVE[place + 1 :]
        (data / "ml-1m.zip").write_bytes(damaged)
        try:
            download.download_edition("ml-1m", data)
        except UserError:
            assert files(data) == ["ml-1m.zip"]
        else:
            assert (data / "ml-1m/ratings.dat").read_text() == RATINGS


def test_what_lies_beside_the_ratings_is_kept(tmp_path, server):
    (tmp_path / "ml-1m").mkdir()
    (tmp_path / "ml-1m" / "mine.txt").write_text("mine")
    download.download_edition("ml-1m", tmp_path, server.url)
    assert files(tmp_path) == ["ml-1m/mine.txt", "ml-1m/ratings.dat"]


@pytest.mark.parametrize("path", [None, "Data/ml-1m/ratings.dat"])
def test_a_missing_edition_is_downloaded_to_its_place(tmp_path, server, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    options = data_options(data_path=path, data_url=server.url)
    ratings = cache.load_ratings(options)
    assert files(tmp_path) == ["Data/ml-1m/README", "Data/ml-1m/ratings.dat"]
    assert ratings.values.tolist() == [4, 5, 3]
    cache.load_ratings(options)
    assert len(server.asked) == 1


def test_a_missing_file_of_ones_own_is_not_downloaded(tmp_path, server, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no file mine.dat; leave out --data_path to download"):
        cache.load_ratings(data_options(data_path="mine.dat", data_url=server.url))
    assert not server.asked and not files(tmp_path)
