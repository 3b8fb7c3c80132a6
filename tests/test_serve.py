"""The service under real requests, and its page in a real browser."""

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from fastapi import Request
from fastapi.responses import HTMLResponse

import main
from examples import latency, serve
from ratings.titles import Titles
from recommend import Recommender
from serving import service
from utils import UserError

ROOT = Path(__file__).parents[1]
TINY = ("--mode=sample", "--num_train_iterations=2", "--log_interval=2", "--num_test_data=30", "--device=cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    assert main.main([*TINY, f"--log_dir={folder}"]) == 0
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def recommender(run):
    return Recommender.load(run)


@contextlib.contextmanager
def served(app):
    """The address of an application while it is served."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", http=service.Protocol))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def address(recommender):
    with served(service.create_app(recommender, Titles({}), 2)) as base:
        yield base


def post(url, body, content_type="application/json"):
    """(status, parsed answer) of a request with this body."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def get(url):
    with urllib.request.urlopen(url) as answer:
        return answer.read().decode()


def expected(recommender, ratings, n):
    return [[item, pytest.approx(rating, abs=1e-4)] for item, rating, _ in recommender.adapt(ratings).top(n)]


def as_pairs(user):
    return [[best["item"], best["rating"]] for best in user["items"]]


def users(*ratings):
    return [{"ratings": each} for each in ratings]


def test_batch_with_unknown_items_and_a_user_without_ratings(address, recommender):
    ids = recommender.item_ids
    each = [[ids[0], 2]], [], [["no such item", 3], [str(ids[5]), 4]]
    status, answer = post(address + "recommend", {"users": users(*each), "top": 3})
    assert status == 200
    assert [user["adapted"] for user in answer] == [True, False, True]
    assert [user["unknown"] for user in answer] == [[], [], ["no such item"]]
    assert [as_pairs(user) for user in answer] == [expected(recommender, ratings, 3) for ratings in each]


def test_candidates_and_exclude(address, recommender):
    ids = recommender.item_ids
    body = {"users": users([[ids[0], 5]]), "top": 50, "candidates": [*ids[:6], "x"], "exclude": [ids[2]]}
    _, (user,) = post(address + "recommend", body)
    assert {best["item"] for best in user["items"]} == {ids[1], *ids[3:6]} and user["unknown"] == ["x"]
    whole = recommender.adapt([(ids[0], 5)]).top(10**6)
    assert as_pairs(user) == [[i, pytest.approx(r, abs=1e-4)] for i, r, _ in whole if i in ids[1:6] and i != ids[2]]


def test_predict_gives_the_scores_of_the_items_asked_for(address, recommender):
    ids, ratings = recommender.item_ids, [[recommender.item_ids[0], 5]]
    body = {"users": users(ratings, []), "items": [ids[7], f"0{ids[7]}", ids[3]]}
    _, answer = post(address + "predict", body)
    for user, of_user in zip(answer, (ratings, []), strict=True):
        found = recommender.adapt(of_user).predict([ids[7], ids[3]])
        assert [item["item"] for item in user["items"]] == body["items"]
        assert [user["items"][0]["rating"], user["items"][2]["rating"]] == pytest.approx(found, abs=1e-4)
        assert user["items"][1]["rating"] is None


def test_explain_gives_weights_and_moves(address, recommender):
    ids = recommender.item_ids
    ratings, asked = [[ids[0], 5], [ids[1], 1]], [ids[4], "unknown"]
    _, (user,) = post(address + "explain", {"ratings": ratings, "items": asked})
    found = recommender.adapt(ratings).explain(asked[:1])
    np.testing.assert_allclose([each["weights"] for each in user["ratings"]], found.weights, atol=1e-4)
    np.testing.assert_allclose([item["scores"] for item in user["items"]], found.predictions, atol=1e-4)


def test_health_and_examples_of_the_schema(address, recommender):
    health = json.loads(get(address + "health"))
    assert health["status"] == "ok" and health["items"] == len(recommender.item_ids)
    schemas = json.loads(get(address + "openapi.json"))["components"]["schemas"]
    assert schemas["User"]["properties"]["ratings"]["examples"] == [[[260, 5], [1196, 4]]]


# -----------------------------------------------------------------------------
# what is refused

WRONG = [
    b"not json", b"{}", b"[" * 100_000, b'{"users": []}', b'{"users": [5]}', b'{"users": [{"ratings": [[1]]}]}',
    b'{"users": [{"ratings": [[1, "good"]]}]}', b'{"users": [{"ratings": [[1, true]]}]}',
    b'{"users": [{"ratings": [[1, 99]]}]}', b'{"users": [{"ratings": [[1, NaN]]}]}',
    b'{"users": [{"ratings": [[1, -Infinity]]}]}', b'{"users": [{"ratings": [[1, 1e400]]}]}',
    b'{"users": [{"ratings": [[1, 1%s]]}]}' % (b"0" * 400), b'{"users": [{"ratings": [[1, 1%s]]}]}' % (b"0" * 5000),
    b'{"users": [{"ratings": [["\\ud800", 5]]}]}', b'{"users": [{"ratings": [[1.0, 5]]}]}',
    b'{"users": [{"ratings": [[null, 5]]}]}', b'{"users": [{"ratings": []}], "\\ud800": 1}',
    b'{"users": [{"ratings": []}], "top": 0}', b'{"users": [{"ratings": []}], "top": 1e99}',
    b'{"users": [{"ratings": []}], "exclude": ["\\udfff"]}', b'{"users": [{"ratings": []}], "candidates": [true]}',
]  # fmt: skip


@pytest.mark.parametrize("body", WRONG, ids=range(len(WRONG)))
def test_malformed_requests_are_refused_in_a_sentence(address, body):
    status, answer = post(address + "recommend", body)
    assert status in (400, 422) and isinstance(answer["detail"], str) and len(answer["detail"]) < 300
    assert "dictionary" not in answer["detail"]


def test_a_body_that_is_not_sent_as_json_is_told_how(address):
    status, answer = post(address + "recommend", {"users": users([])}, "application/x-www-form-urlencoded")
    assert status == 422 and "Content-Type: application/json" in answer["detail"]


def test_a_bad_rating_names_its_user_and_spares_the_others(address, recommender):
    good = [[recommender.item_ids[0], 5]]
    for bad in ([[1, 99]], [[1, "x"]], [[1]], [5], [["\ud800", 5]], [[1, 5], [1, None]]):
        status, answer = post(address + "recommend", {"users": users(good, bad, good), "top": 2})
        assert status == 200 and "users[1]" in answer[1]["error"] and "items" not in answer[1]
        assert as_pairs(answer[0]) == as_pairs(answer[2]) == expected(recommender, good, 2)


def test_answers_are_bounded(address, recommender):
    everybody = users(*[[]] * 300)
    status, answer = post(address + "predict", {"users": everybody, "items": recommender.item_ids[:100]})
    assert status == 422 and "at most 20,000 predictions" in answer["detail"]


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_are_refused_unread(address, monkeypatch, chunked):
    pieces = (b"1," * 500_000 for _ in range(20))
    headers = {"Content-Type": "application/json"} | ({} if chunked else {"Content-Length": str(20_000_000)})
    request = urllib.request.Request(address + "recommend", pieces, headers)
    with pytest.raises(urllib.error.HTTPError, match="413") as error:
        urllib.request.urlopen(request)
    assert "larger than" in json.load(error.value)["detail"]


def test_slow_bodies_and_heads_end(address, monkeypatch):
    monkeypatch.setattr(service, "BODY_SECONDS", 0.3)
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    head = b"POST /recommend HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
    for sent, answer in ((head + b"\r\n{", b"408"), (head, b""), (b"", b"")):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(sent)
            received = b""
            while piece := connection.recv(4096):
                received += piece
            assert answer in received[:20]


class Work:
    """Stands for a `Recommender` whose work takes a time, and counts it."""

    def __init__(self, recommender, seconds):
        self.found, self.seconds, self.done = recommender, seconds, 0

    def __getattr__(self, name):
        return getattr(self.found, name)

    def top(self, supports, n, allowed):
        self.done += len(supports)
        time.sleep(self.seconds)
        return self.found.top(supports, n, allowed)


def test_a_long_request_leaves_turns_to_others_and_ends_with_its_client(recommender):
    slow = Work(recommender, 0.1)
    with served(service.create_app(slow, Titles({}), 1)) as base:
        host, port = base.removeprefix("http://").rstrip("/").split(":")
        body = json.dumps({"users": users(*[[]] * 400), "top": 1}).encode()
        with socket.create_connection((host, int(port))) as connection:
            head = (
                f"POST /recommend HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            )
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            time.sleep(0.15)
            start = time.monotonic()
            assert post(base + "recommend", {"users": users([])})[0] == 200
            assert time.monotonic() - start < 1  # of 5 s that the long one takes
        time.sleep(0.3)
        done = slow.done
        time.sleep(0.3)
        assert slow.done == done < 400


def test_too_many_at_once_are_told_to_come_again(recommender, monkeypatch):
    monkeypatch.setattr(service, "MOST_WAITING", 2)
    with served(service.create_app(Work(recommender, 0.3), Titles({}), 1)) as base, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: post(base + "recommend", {"users": users([])}), range(8)))
    assert {status for status, _ in found} == {200, 503}


def test_a_fault_is_told_without_what_users_sent(recommender, monkeypatch, caplog):
    message = "secret item"

    def fail(*_):
        raise ValueError(message)

    broken = Work(recommender, 0)
    broken.top = fail
    with served(service.create_app(broken, Titles({}), 1)) as base:
        assert post(base + "recommend", {"users": users([])})[0] == 500
    assert "ValueError" in caplog.text and message not in caplog.text


def test_a_hundred_at_once_are_answered_as_one_alone(address, recommender):
    ids = recommender.item_ids
    each = [[[ids[(7 * i + 3 * j) % len(ids)], 1 + (i + j) % 5] for j in range(1 + i % 6)] for i in range(100)]
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda own: post(address + "recommend", {"users": users(own), "top": 5}), each))
    assert {status for status, _ in answers} == {200}
    assert [as_pairs(answer[0]) for _, answer in answers] == [expected(recommender, own, 5) for own in each]


def test_nothing_about_users_is_logged_or_printed(address, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    for rating in ("5", "NaN", "99", '"x"'):
        post(address + "recommend", b'{"users": [{"ratings": [["secret item", %s]]}]}' % rating.encode())
    assert "secret" not in caplog.text + "".join(capfd.readouterr())


# -----------------------------------------------------------------------------
# the command


@pytest.mark.parametrize("flags, message", [
    (("--run={0}/nowhere",), "nowhere"), ((), "--run"), (("--run={0}",), "holds no checkpoint"),
    (("--run={1}/..",), "such as .*sample-bert4rec-melo$"),
    (("--run={1}", "--titles={0}/none.csv"), "none.csv"), (("--run={1}", "--port=99999"), "--port"),
    (("--run={1}", "--port={2}"), "cannot listen"), (("--run={1}", "--host=no.such.host.invalid"), "cannot listen"),
])  # fmt: skip
def test_wrong_commands_are_one_sentence(run, tmp_path, flags, message):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match=message) as error:
        serve.main([flag.format(tmp_path, run, taken.getsockname()[1]) for flag in flags])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", [["-m", "examples.serve"], ["examples/serve.py"]])
def test_both_ways_to_start_it(run, how):
    command = [sys.executable, *how, f"--run={run}", "--port=0", "--device=cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        base = process.stderr.readline().split()[-1]
        until = time.monotonic() + 20
        while True:
            with contextlib.suppress(urllib.error.URLError):
                assert json.loads(get(base + "health"))["status"] == "ok"
                break
            assert time.monotonic() < until
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (0, 130) and "Traceback" not in process.stderr.read()
        process.stderr.close()


def test_latency_is_measured_on_any_run(run):
    assert min(latency.measure(run, n_single=2, n_batch=4)) > 0


# -----------------------------------------------------------------------------
# the page

DRIVER = """<!doctype html><iframe id="page" src="/" style="width: 360px; height: 800px"></iframe><script>
const frame = document.getElementById("page"), result = {};
const find = selector => [...frame.contentDocument.querySelectorAll(selector)];
const sleep = ms => new Promise(done => setTimeout(done, ms));
async function until(what, test) {
  for (let i = 0; i < 200; i++) { if (test()) return; await sleep(50); }
  throw new Error("waited in vain: " + what);
}
const top10 = () => find("#top .name").map(node => node.textContent).join("|");
async function drive() {
  await until("list", () => find("#top li").length === 10);
  const before = top10(), search = find("#search")[0];
  search.value = "TITRE 2";
  search.dispatchEvent(new Event("input"));
  result.found = find("#found .name").map(node => node.textContent);
  const star = find("#found li:first-child input[value='1']")[0];
  star.focus();
  star.click();
  await until("change", () => top10() !== before && find("#rated .weights span").length > 0);
  const focused = frame.contentDocument.activeElement;  // arrow keys go on from it
  result.focus = focused.closest("#found") !== null && focused.value === "1" && focused.checked;
  result.rated = find("#rated .name").map(node => node.textContent);
  result.weights = find("#rated .weights")[0].getAttribute("aria-label");
  const first = top10();
  find("#found li:nth-child(2) input[value='5']")[0].click();
  await until("second change", () => top10() !== first && find("#rated .weights").length === 2);
  find("#top li:nth-child(3) button")[0].click();
  result.chosen = [find("#top .name")[2].textContent, find("#chosen")[0].textContent, find("#chart circle").length];
  result.pressed = find("#top [aria-pressed=true]").length;
  result.narrow = frame.contentDocument.documentElement.scrollWidth;
  result.unnamed = find("input, button").filter(node =>
    !node.ariaLabel && !node.textContent.trim() && !node.labels?.length).length;
  const last = top10(), loaded = new Promise(done => frame.addEventListener("load", done, { once: true }));
  frame.contentWindow.location.reload();
  await loaded;
  await until("reload", () => top10() === last && find("#rated .weights").length === 2);
  frame.contentWindow.fetch = () => Promise.reject(new TypeError("gone"));
  find("#rated button")[0].click();
  await until("error", () => !find("#error")[0].hidden);
  result.error = find("#error")[0].textContent;
}
drive().catch(error => { result.failed = String(error); })
  .finally(() => fetch("/result", { method: "POST", body: JSON.stringify(result) }));
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium: `apt-get install chromium` gives one")
def test_the_page_in_a_browser(recommender, tmp_path):
    names = {str(item): f"Titré {number}" for number, item in enumerate(recommender.item_ids)}
    app, results = service.create_app(recommender, Titles(names), 1), []

    @app.get("/driver")
    def driver():
        return HTMLResponse(DRIVER)

    @app.post("/result")
    async def result(request: Request):
        results.append(await request.json())

    flags = "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"
    with served(app) as base:
        browser = subprocess.Popen(
            ["chromium", *flags, base + "driver"], stderr=subprocess.DEVNULL, start_new_session=True
        )
        until = time.monotonic() + 60
        while not results and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()
    (found,) = results
    assert "failed" not in found, found
    assert found["found"][0] == "Titré 2" and len(found["found"]) == 8 and found["rated"] == ["Titré 2"]
    assert found["weights"].startswith("weights by step: ") and found["pressed"] == 1
    place, sentence, points = found["chosen"]
    assert sentence.startswith(place.removeprefix("3. ")) and points == recommender.options.num_inner_steps + 1
    assert found["narrow"] <= 360 and found["unnamed"] == 0 and found["focus"]
    assert "cannot be reached" in found["error"]
