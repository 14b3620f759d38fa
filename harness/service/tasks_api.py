"""Tasks over HTTP: submit, follow, download, cancel."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Header, HTTPException, Query, Request
from fastapi.responses import Response, StreamingResponse
from redis.exceptions import RedisError

from harness.errors import InputError
from harness.service import webhooks
from harness.service.audio import FORMATS
from harness.service.download import download
from harness.service.intake import RequestRejected, read_request
from harness.service.models import TaskAccepted, TaskRequest, TaskView
from harness.service.queue import digest
from harness.service.state import (
    LIMITED,
    NOT_VALID,
    UNAUTHORIZED,
    UNAVAILABLE,
    UNKNOWN,
    Front,
    FrontState,
    LimitedOwner,
    Owner,
    content,
    failure,
)  # fmt: skip
from harness.service.task import CANCELLED, ENDED, TaskRecord, TaskSpec, new_id

LOOK_S = 5.0  # between two looks at a task of which nothing is heard
BETWEEN_S = 0.2  # events of one task come no faster
_RETRY_S = 60
_MOST_LISTED = 500
_EVENTS = content("Events: `data:` is the task, as it changes, until it has ended.", "text/event-stream")
_AUDIO = {
    **content("All of it; of a task that is being made what is stored so far, as WAV.", *FORMATS.values()),
    **content("A range of it.", *FORMATS.values(), status=206),
    **failure(410, "The task was cancelled."),
    **failure(416, "There is nothing in this range (yet)."),
}
_FORGET = Query(description="Remove a task that has ended, and its audio, for good.")
router = APIRouter(prefix="/v1/tasks", tags=["tasks"], responses={**UNAUTHORIZED, **NOT_VALID, **UNAVAILABLE})
_KEY = Header(
    alias="Idempotency-Key", max_length=200, description="A request that is repeated with its key makes no second task."
)


@router.post("", status_code=202, responses={**LIMITED, **failure(409, "The idempotency key is another request's.")})
async def submit(
    body: TaskRequest, owner: LimitedOwner, front: Front, again: Annotated[str | None, _KEY] = None
) -> TaskAccepted:
    """Queue a script to be spoken."""
    voices = await asyncio.to_thread(front.voices.names, owner)
    intake = await asyncio.to_thread(read_request, body.script, body.voices, body.options, voices, front.settings)
    spec = _completed(intake.spec, body)
    if spec.webhook:
        await _check_webhook(spec.webhook, front)
    print_ = digest(body.model_dump_json())
    made = await front.queue.submit(new_id(), owner, spec, front.settings.open_tasks, again or "", print_)
    if made.outcome == "full":
        raise HTTPException(
            429, f"{front.settings.open_tasks} tasks of this key wait or run: wait until one has ended, or cancel one",
            {"Retry-After": str(_RETRY_S)},
        )  # fmt: skip
    if made.outcome == "conflict":
        raise HTTPException(409, "this Idempotency-Key belongs to another request: use a new one")
    record = None
    with contextlib.suppress(RedisError):  # it is queued, whatever this says
        record = await front.queue.record(made.id)
    status = record.status if record else "queued"
    links = TaskRecord(id=made.id, owner=owner, spec=spec, status=status).view()["links"]
    return TaskAccepted(id=made.id, status=status, links=links, remarks=list(intake.remarks))


def _completed(spec: TaskSpec, body: TaskRequest) -> TaskSpec:
    return replace(spec, format=body.format, webhook=body.webhook or "")


async def _check_webhook(url: str, front: FrontState) -> None:
    try:
        await asyncio.to_thread(webhooks.checked, url, front.settings.private_webhooks)
    except InputError as error:
        raise RequestRejected(str(error), field="webhook") from None


@router.get("")
async def list_tasks(
    owner: Owner, front: Front, limit: Annotated[int, Query(ge=1, le=_MOST_LISTED)] = 50
) -> list[TaskView]:
    """The key's tasks, the newest first, without an estimate of when those that wait begin."""
    records = await front.queue.of_owner(owner, limit)
    return [TaskView(**await front.queue.listed(record)) for record in records]


@router.get("/{task}", responses=UNKNOWN)
async def get_task(task: str, owner: Owner, front: Front) -> TaskView:
    """How far a task is."""
    return TaskView(**await front.queue.view(await _own(task, owner, front)))


@router.delete("/{task}", responses={**UNKNOWN, **failure(409, "A worker may still write for the task.")})
async def cancel_task(task: str, owner: Owner, front: Front, forget: Annotated[bool, _FORGET] = False) -> TaskView:
    """Cancel a task that waits or runs; its audio is removed. One that has ended stays, unless you say `forget`."""
    record = await _own(task, owner, front)
    if forget and record.status in ENDED:
        if not await front.queue.at_rest(task):
            raise HTTPException(
                409, "the task was cancelled a moment ago: try again in a minute", {"Retry-After": "60"}
            )
        await asyncio.to_thread(front.store.remove, task)
        await front.queue.forget(task)
        return TaskView(**record.view())
    await front.queue.cancel(task)
    return TaskView(**await front.queue.view(await _own(task, owner, front)))


@router.get("/{task}/events", response_class=Response, responses={**UNKNOWN, **_EVENTS})
async def task_events(task: str, request: Request, owner: Owner, front: Front) -> StreamingResponse:
    """Follow a task."""
    record = await _own(task, owner, front)
    return StreamingResponse(
        _events(record, front), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


async def _events(record: TaskRecord | None, front: FrontState) -> AsyncIterator[str]:
    """The task at every change, and a comment where nothing changes, so that a lost connection is noticed."""
    said: dict[str, Any] = {}
    task = record.id if record else ""
    with front.changes.following(task) as changed:
        while record:
            changed.clear()
            view = await front.queue.view(record)
            yield f"data: {json.dumps(view)}\n\n" if view != said else ": still there\n\n"
            said = view
            if record.status in ENDED:
                return
            await asyncio.sleep(BETWEEN_S)
            try:
                async with asyncio.timeout(LOOK_S):
                    await changed.wait()
            except TimeoutError:
                pass
            record = await front.queue.record(task)


@router.get("/{task}/audio", response_class=Response, responses={**UNKNOWN, **_AUDIO})
async def task_audio(task: str, request: Request, owner: Owner, front: Front) -> Response:
    """The audio; also while it is being made, and in ranges."""
    record = await _own(task, owner, front)
    if record.status == CANCELLED:
        raise HTTPException(410, "the task was cancelled, and its audio is removed")
    return await download(record, front.store, request.headers.get("range", ""), request.headers.get("if-range", ""))


async def _own(task: str, owner: str, front: FrontState) -> TaskRecord:
    """A task of this owner; for those of others the answer is the same as for none."""
    record = await front.queue.record(task) if task.isalnum() and len(task) < 100 else None
    if record is None or record.owner != owner:
        raise HTTPException(404, "there is no such task")
    return record
