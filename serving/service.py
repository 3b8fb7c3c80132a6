"""A service over HTTP that adapts to the users in its requests, and the page at `/` to try it on.

It keeps and logs nothing about users. Work is bounded for each request and in total: bodies are small and must arrive
in time, users are adapted to a few at a time, requests take turns, and what a client no longer waits for is not done.
"""

import asyncio
import json
import logging
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import h11
import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, StrictInt, StrictStr, WithJsonSchema
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving import export
from utils import UserError

LARGEST_BODY = 1 << 20  # bytes
LARGEST_DRAIN = 1 << 26  # bytes of a refused body that are thrown away, so that its sender can read the response
BODY_SECONDS, WORK_SECONDS = 10, 60
MOST_WAITING = 256  # requests; further ones are told to try again later
USERS_AT_ONCE = 8  # adapted to before another request has its turn
MOST_PREDICTIONS = 20_000  # users x items of a response
PAGE = Path(__file__).with_name("page.html")


def check_item(item):
    if not export.is_id(item):
        raise ValueError(f"an item must be a number or a text of at most {export.LONGEST_ID} letters")
    return item


Item = Annotated[StrictInt | StrictStr, AfterValidator(check_item)]
ITEM = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
PAIR = {"type": "array", "prefixItems": [ITEM, {"type": "number"}], "minItems": 2, "maxItems": 2}
Ratings = Annotated[  # checked for each user, so that one user's mistake spares the others
    list[Annotated[Any, WithJsonSchema(PAIR)]],
    Field(max_length=10_000, description="[item, rating] pairs, oldest first", examples=[[[260, 5], [1196, 4]]]),
]
Items = Annotated[list[Item], FailFast(), Field(max_length=10_000)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class User(Body):
    ratings: Ratings


Users = Annotated[list[User], FailFast(), Field(min_length=1, max_length=1000)]


class Recommend(Body):
    users: Users
    top: Annotated[StrictInt, Field(ge=1, le=1000)] = 10
    candidates: Annotated[Items, Field(description="list only these items", examples=[[1, 2, 3]])] = None  # all
    exclude: Annotated[Items, Field(description="do not list these items", examples=[[50]])] = []


class Predict(Body):
    users: Users
    items: Annotated[Items, Field(min_length=1, description="items to predict", examples=[[1, 2, 3]])]


class Explain(Body):
    ratings: Ratings
    items: Annotated[Items, Field(max_length=100, description="items whose scores are followed", examples=[[1]])] = []


def create_app(recommender, titles, workers: int) -> FastAPI:
    """The service for a `Recommender`, with `Titles` for its page and as many threads as `workers`."""
    app = FastAPI(title="MELO", description=__doc__)
    app.add_middleware(BodyGate)
    app.add_exception_handler(RequestValidationError, refuse)
    turns = Turns(workers)
    ids = [{"item": item, "title": titles.by_item.get(str(item), str(item))} for item in recommender.item_ids]
    catalogue = json.dumps({"scale": [recommender.low, recommender.high], "items": ids}, ensure_ascii=False)

    @app.get("/", include_in_schema=False)
    def page():
        allowed = "default-src 'self' 'unsafe-inline'; img-src data:"
        return FileResponse(PAGE, headers={"Content-Security-Policy": allowed})

    @app.get("/health")
    def health():
        """What is served."""
        counts = {"items": len(ids), "step": recommender.state["step"], "scale": [recommender.low, recommender.high]}
        return {"status": "ok", "model": recommender.options.model, **counts}

    @app.get("/items")
    def items():
        """The catalogue: ids and titles, and the rating scale."""
        return Response(catalogue, media_type="application/json")

    def prepare(users, name="users[{}].ratings"):
        return lambda: read_users(recommender, users, name)

    @app.post("/recommend")
    async def recommend(body: Recommend, request: Request):
        """Each user's items of the highest score, not rated yet; `unknown` lists items that training did not see.

        A user with a mistake gets an `error` instead.
        """
        n = min(body.top, len(ids))
        bound(len(body.users) * n)
        allowed = allowed_items(recommender, body)

        def work(supports):
            return [{"items": listed(best)} for best in recommender.top(supports, n, allowed)]

        unknown = [item for item in body.candidates or [] if not recommender.number(item)]
        return await turns.run(request, prepare(body.users), work, unknown)

    @app.post("/predict")
    async def predict(body: Predict, request: Request):
        """Each user's predicted ratings of the given items; null for items that training did not see.

        A user with a mistake gets an `error` instead.
        """
        bound(len(body.users) * len(body.items))
        numbers = np.array([recommender.number(item) for item in body.items])

        def work(supports):
            scores = recommender.scores(supports, [numbers] * len(supports))
            return [{"items": rated(recommender, body.items, numbers, row)} for row in scores]

        return await turns.run(request, prepare(body.users), work)

    @app.post("/explain")
    async def explain(body: Explain, request: Request):
        """What each rating of one user weighed at each inner step, and the scores of items after 0, 1, ... steps."""
        known = [item for item in body.items if recommender.number(item)]
        numbers = np.array([recommender.number(item) for item in known], np.int64)

        def work(supports):
            found = recommender.explain(supports[0], numbers)
            ratings = zip(found.items, found.ratings, found.weights.round(4).tolist(), strict=True)
            moves = zip(known, found.predictions.round(4).tolist(), strict=True)
            return [{
                "ratings": [{"item": item, "rating": rating, "weights": row} for item, rating, row in ratings],
                "items": [{"item": item, "scores": row} for item, row in moves],
            }]  # fmt: skip

        return await turns.run(request, prepare([User.model_construct(ratings=body.ratings)], "ratings"), work)

    return app


# -----------------------------------------------------------------------------
# what comes in


def refuse(request, error):
    """The first mistake of a body as a sentence, without the value that it is about."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return respond({"detail": f"the body is no JSON: {first['ctx']['error']} at character {first['loc'][-1]}"}, 422)
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:]).lstrip(".")
    reason = first["msg"]
    if first["type"] == "model_attributes_type":
        reason = "must be a JSON object" + ("" if place else ", sent with Content-Type: application/json")
    return respond({"detail": f"{place or 'the body'}: {reason}"}, 422)


def bound(predictions):
    if predictions > MOST_PREDICTIONS:
        raise HTTPException(422, f"at most {MOST_PREDICTIONS:,} predictions a request: send fewer users or items")


def read_users(recommender, users, name):
    """The response without predictions of each user, and the user's `Support`, None where a rating is wrong."""
    found = [read_user(recommender, user, name.format(number)) for number, user in enumerate(users)]
    errors = [fields["error"] for fields, support in found if support is None]
    if len(errors) == len(users):
        raise HTTPException(422, errors[0])
    return found


def read_user(recommender, user, name):
    for place, pair in enumerate(user.ratings):
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in (int, str) or not export.is_id(pair[0]):
            problem = f"give [item, rating] with a number, or a text of at most {export.LONGEST_ID} letters, as item"
            return {"error": f"{name}[{place}]: {problem}"}, None
    try:
        support, unknown = recommender.support(user.ratings)
    except UserError as error:
        return {"error": f"{name}: {error}"}, None
    return {"adapted": len(support.items) > 0, "unknown": unknown}, support


def allowed_items(recommender, body):
    """(n_items,) whether each item may be listed; None where all may."""
    if body.candidates is None and not body.exclude:
        return None
    allowed = np.full(len(recommender.item_ids), body.candidates is None)
    for items, value in ((body.candidates or [], True), (body.exclude, False)):
        numbers = np.array([number for item in items if (number := recommender.number(item))], np.int64)
        allowed[numbers - 1] = value
    return allowed


def listed(best):
    """A user's `Recommendation`s for a response."""
    return [{"item": item, "rating": round(rating, 4), "score": round(score, 4)} for item, rating, score in best]


def rated(recommender, items, numbers, scores):
    """One user's predictions for a response."""
    ratings = recommender.cut(scores).round(4).tolist()
    return [
        {"item": item, "rating": rating, "score": round(score, 4)} if number else {"item": item, "rating": None}
        for item, number, rating, score in zip(items, numbers, ratings, scores.tolist(), strict=True)
    ]


def respond(content, status=200, headers=None):
    return Response(json.dumps(content, allow_nan=False), status, headers, "application/json")


# -----------------------------------------------------------------------------
# bounds on bodies and work


class Turns:
    """Lets requests use the threads in turns, a few users at a time."""

    def __init__(self, workers):
        self.pool, self.slots, self.waiting = ThreadPoolExecutor(workers), asyncio.Semaphore(workers), 0

    async def run(self, request, read, work, unknown=()):
        """The response to a request: `read()` gives `read_users`, `work(supports)` a dictionary for each support."""
        if self.waiting >= MOST_WAITING:
            raise HTTPException(503, "too many requests are waiting: try again later", {"Retry-After": "1"})
        self.waiting += 1
        try:
            async with asyncio.timeout(WORK_SECONDS):
                users, found = await self.take(request, read), []
                supports = [support for _, support in users if support is not None]
                for first in range(0, len(supports), USERS_AT_ONCE):
                    found += await self.take(request, work, supports[first : first + USERS_AT_ONCE])
                return await self.take(request, join, users, found, unknown)
        except TimeoutError:
            raise HTTPException(503, f"not done in {WORK_SECONDS} s: send fewer users, or try again later") from None
        finally:
            self.waiting -= 1

    async def take(self, request, function, *arguments):
        """What a function gives that is called in a thread, when it is this request's turn."""
        async with self.slots:
            if await request.is_disconnected():
                raise HTTPException(499, "the client has left")
            return await asyncio.get_running_loop().run_in_executor(self.pool, guarded, function, *arguments)


def guarded(function, *arguments):
    """Call a function; a fault in it is logged without its message, which may hold what users sent."""
    try:
        return function(*arguments)
    except HTTPException:
        raise
    except Exception as error:
        frames = "".join(traceback.format_tb(error.__traceback__))
        logging.getLogger("melo").error("%s in a request\n%s", type(error).__name__, frames)
        raise HTTPException(500, "the service failed on this request") from None


def join(users, found, unknown):
    """The response for all users of a request."""
    found = iter(found)
    return respond([
        {**fields, "unknown": [*fields["unknown"], *unknown], **next(found)} if support is not None else fields
        for fields, support in users
    ])  # fmt: skip


class BodyGate:
    """Reads bodies before the application does: what is too large or too slow is refused unread and unparsed."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await read_body(scope, receive)
        except TimeoutError:
            late = {"detail": f"the body did not arrive in {BODY_SECONDS} s"}
            return await respond(late, 408, {"Connection": "close"})(scope, receive, send)
        if body is None:
            return await refuse_body(receive, send)
        first = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again():
            return first.pop() if first else await receive()

        return await self.app(scope, receive_again, send)


async def read_body(scope, receive):
    """The body of a request; None where it is too large."""
    body, more = b"", True
    if int(dict(scope["headers"]).get(b"content-length", 0)) > LARGEST_BODY:
        return None
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > LARGEST_BODY:
            return None
    return body


async def refuse_body(receive, send):
    """Respond with 413 at once, and throw away what still comes for a while: a sender may read only after it."""
    large = respond({"detail": f"the body is larger than {LARGEST_BODY:,} bytes"}, 413, {"Connection": "close"})
    await send({"type": "http.response.start", "status": 413, "headers": large.raw_headers})
    await send({"type": "http.response.body", "body": large.body, "more_body": True})
    thrown, more = 0, True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more and thrown < LARGEST_DRAIN:
                message = await receive()
                thrown, more = thrown + len(message.get("body", b"")), message.get("more_body", False)
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class Protocol(H11Protocol):
    """Closes a connection whose next request's head is begun, or awaited from the first, but not there in time."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.watch = self.loop.call_later(BODY_SECONDS, transport.close)

    def data_received(self, data):
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self.watch.cancel()
        elif self.watch.cancelled():
            self.watch = self.loop.call_later(BODY_SECONDS, self.transport.close)
