"""A service that adapts to the users in its requests; it writes and keeps nothing about them.

    python -m examples.serve log/ml-1m-bert4rec-melo 8000
    curl localhost:8000/recommend -H 'Content-Type: application/json' \\
        -d '{"users": [{"ratings": [[260, 5], [1196, 4]]}], "top": 3}'
"""

import sys
from typing import Annotated

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

from recommend import Recommender
from utils import UserError


class User(BaseModel):
    ratings: Annotated[list[tuple[int | str, float]], Field(max_length=10_000)]  # [item, rating], oldest first


class Request(BaseModel):
    users: Annotated[list[User], Field(min_length=1, max_length=1000)]
    top: Annotated[int, Field(ge=1, le=1000)] = 10


def create_app(run: str) -> FastAPI:
    """The service for a run's folder or an exported file."""
    torch.set_num_threads(1)  # requests run beside each other
    app, recommender = FastAPI(title="MELO"), Recommender.load(run)

    @app.post("/recommend")
    def recommend(request: Request):
        try:
            supports, unknown = zip(*(recommender.support(user.ratings) for user in request.users), strict=True)
        except UserError as error:
            raise HTTPException(422, str(error)) from None
        lists = recommender.top(supports, request.top)
        return [
            {"items": [best._asdict() for best in items], "adapted": len(support.items) > 0, "unknown": left_out}
            for items, support, left_out in zip(lists, supports, unknown, strict=True)
        ]

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(sys.argv[1]), port=int(sys.argv[2]) if len(sys.argv) > 2 else 8000)
