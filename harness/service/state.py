"""What the requests to the front share, and who may make them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, HTTPException, Request

from harness.client.stream import SpeechClient
from harness.service.changes import TaskChanges
from harness.service.keys import KeyRing
from harness.service.models import Failure, Rejected
from harness.service.queue import TaskQueue
from harness.service.settings import StudioSettings
from harness.service.storage import AudioStore
from harness.service.voices import VoiceBank


def failure(status: int, description: str) -> dict:
    """A failure, as the OpenAPI document describes it."""
    return {status: {"model": Failure, "description": description}}


def content(description: str, *kinds: str, status: int = 200) -> dict:
    """A response that is no JSON, as the OpenAPI document describes it."""
    return {status: {"description": description, "content": {kind: {} for kind in kinds}}}


UNAUTHORIZED = failure(401, "No key, or one that is not known.")
NOT_VALID = {422: {"model": Rejected, "description": "A parameter cannot be used."}}
LIMITED = {
    **failure(400, "The body cannot be read."),
    **failure(413, "The request is too large."),
    422: {"model": Rejected, "description": "What cannot be used, by line of the script or by field."},
    **failure(429, "A limit of the key is reached; `Retry-After` says for how long."),
}
UNKNOWN = failure(404, "The key has no such thing.")
UNAVAILABLE = failure(503, "No room now, or a part of the service does not answer.")


@dataclass
class FrontState:
    """The parts of a front."""

    settings: StudioSettings
    queue: TaskQueue
    store: AudioStore
    client: SpeechClient
    keys: KeyRing
    voices: VoiceBank
    changes: TaskChanges


def front_of(request: Request) -> FrontState:
    return request.app.state.front


Front = Annotated[FrontState, Depends(front_of)]


def caller_of(request: Request, front: Front) -> str:
    """The owner that a request's key stands for. Raises 401."""
    owner = front.keys.owner_of(request.headers.get("authorization", ""))
    if owner is None:
        raise HTTPException(
            401, "give a key of this service in the header `Authorization: Bearer KEY`", {"WWW-Authenticate": "Bearer"}
        )
    return owner


Owner = Annotated[str, Depends(caller_of)]


async def limited_caller(owner: Owner, front: Front) -> str:
    """The owner of a request that makes speech. Raises 429 where there were too many in this minute."""
    if wait_s := await front.queue.allow(owner, front.settings.per_minute):
        raise HTTPException(
            429,
            f"more than {front.settings.per_minute} requests in a minute: try again in {wait_s} s",
            {"Retry-After": str(wait_s)},
        )
    return owner


LimitedOwner = Annotated[str, Depends(limited_caller)]
