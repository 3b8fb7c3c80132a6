"""examples/serve.py under real requests."""

import json
import logging
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvicorn

import main
from examples import latency, serve
from recommend import Recommender

TINY = ("--mode=sample", "--num_train_iterations=2", "--log_interval=2", "--num_test_data=30", "--device=cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    assert main.main([*TINY, f"--log_dir={folder}"]) == 0
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def address(run):
    server = uvicorn.Server(uvicorn.Config(serve.create_app(str(run)), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/recommend"
    server.should_exit = True
    thread.join()


def post(address, body):
    """(status, parsed answer) of a request with this body."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def expected(recommender, ratings, n):
    return [[item, pytest.approx(rating, abs=1e-6)] for item, rating in recommender.adapt(ratings).top(n)]


def as_pairs(user):
    return [[best["item"], best["rating"]] for best in user["items"]]


def test_single_user(address, run):
    recommender = Recommender.load(run)
    ratings = [[recommender.item_ids[3], 5], [recommender.item_ids[8], 1.0]]
    status, answer = post(address, {"users": [{"ratings": ratings}], "top": 4})
    assert status == 200 and answer[0]["adapted"] and answer[0]["unknown"] == []
    assert as_pairs(answer[0]) == expected(recommender, ratings, 4)


def test_batch_with_unknown_items_and_a_user_without_ratings(address, run):
    recommender = Recommender.load(run)
    users = [[[recommender.item_ids[0], 2]], [], [["no such item", 3], [recommender.item_ids[5], 4]]]
    status, answer = post(address, {"users": [{"ratings": ratings} for ratings in users], "top": 3})
    assert status == 200
    assert [user["adapted"] for user in answer] == [True, False, True]
    assert [user["unknown"] for user in answer] == [[], [], ["no such item"]]
    assert [as_pairs(user) for user in answer] == [expected(recommender, ratings, 3) for ratings in users]


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"{}",
        b'{"users": []}',
        b'{"users": [{"ratings": [[1]]}]}',
        b'{"users": [{"ratings": [[1, "good"]]}]}',
        b'{"users": [{"ratings": [[1, 99]]}]}',
        b'{"users": [{"ratings": [[1, NaN]]}]}',
        b'{"users": [{"ratings": [[1, 5]]}], "top": 0}',
    ],
)
def test_malformed_requests_are_refused(address, body):
    status, answer = post(address, body)
    assert status == 422 and answer["detail"]


def test_a_hundred_at_once_are_answered_as_one_alone(address, run):
    recommender = Recommender.load(run)
    n_items = len(recommender.item_ids)
    users = [
        [[recommender.item_ids[(7 * i + 3 * j) % n_items], 1 + (i + j) % 5] for j in range(1 + i % 6)]
        for i in range(100)
    ]
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda ratings: post(address, {"users": [{"ratings": ratings}], "top": 5}), users))
    assert {status for status, _ in answers} == {200}
    assert [as_pairs(answer[0]) for _, answer in answers] == [expected(recommender, ratings, 5) for ratings in users]


def test_nothing_about_users_is_logged_or_printed(address, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    post(address, {"users": [{"ratings": [["secret item", 5]]}]})
    assert "secret" not in caplog.text + "".join(capfd.readouterr())


def test_latency_is_measured_on_any_run(run):
    assert min(latency.measure(run, n_single=2, n_batch=4)) > 0
