"""Speech and voices over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from fastapi import APIRouter, HTTPException, Request, UploadFile
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from harness import wire
from harness.errors import InputError
from harness.service.audio import wav_header
from harness.service.intake import RequestRejected, read_request
from harness.service.models import SpokenRequest, VoiceView
from harness.service.segments import SegmentFailed, ServerFull, Unspeakable
from harness.service.speech import LiveSpeech, StreamsFull
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
from harness.service.task import TaskSpec

_RETRY = {"Retry-After": "5"}
_CLOSED = 499  # nobody reads it; the log does
_MEDIA = {"pcm": "audio/pcm", "wav": "audio/wav"}
_SPEECH = {
    **LIMITED,
    **failure(502, "The server failed."),
    **content("Samples as they are made (16 bit, little-endian, mono, 24 kHz), or a WAV of them.", *_MEDIA.values()),
}
router = APIRouter(prefix="/v1", responses={**UNAUTHORIZED, **NOT_VALID, **UNAVAILABLE})


@router.post("/audio/speech", tags=["speech"], response_class=Response, responses=_SPEECH)
async def speech(body: SpokenRequest, request: Request, owner: LimitedOwner, front: Front) -> Response:
    """Speak now. Streams come before tasks."""
    spec, settings = await _spec_of(body, owner, front), front.settings
    headers = {"X-Sample-Rate": str(wire.SAMPLE_RATE_HZ), "Cache-Control": "no-store"}
    async with contextlib.AsyncExitStack() as stack:
        made = LiveSpeech(front.client, front.queue, spec, settings.patience_s, owner, settings.open_streams)
        try:
            live = await stack.enter_async_context(made)
            first = await _unless_gone(request, live.first())
            if not body.stream:
                pcm = first + await _unless_gone(request, _all(live))
                return Response(_headed(body, pcm), headers=headers, media_type=_MEDIA[body.response_format])
        except StreamsFull:
            words = f"{settings.open_streams} streams of this key are listened to: end one, or wait until one has ended"
            raise HTTPException(429, words, _RETRY) from None
        except ServerFull as error:
            raise HTTPException(503, f"no room for another stream now: {error}", _RETRY) from None
        except Unspeakable as error:
            raise RequestRejected(str(error)) from None
        except SegmentFailed as error:
            raise HTTPException(502, str(error)) from None
        kept = stack.pop_all()
    return _LiveResponse(_streamed(body, first, live), kept, headers=headers, media_type=_MEDIA[body.response_format])


async def _spec_of(body: SpokenRequest, owner: str, front: FrontState) -> TaskSpec:
    """What is to be spoken. Raises RequestRejected, also for what is too long to be spoken in one go."""
    given = body.voices if body.voices is not None else body.voice
    voices = [given] if isinstance(given, int | str) else given
    known = await asyncio.to_thread(front.voices.names, owner)
    intake = await asyncio.to_thread(read_request, body.input, voices, body.options, known, front.settings)
    length_s, most_s = intake.spec.estimate * wire.SECONDS_PER_FRAME, front.settings.speech_s
    if length_s > most_s:
        raise RequestRejected(
            f"the script takes about {length_s / 60:.0f} minutes, and at most {most_s / 60:g} are spoken at once: "
            "have it made in the background (POST /v1/tasks)"
        )
    return intake.spec


async def _all(live: LiveSpeech) -> bytes:
    return b"".join([piece async for piece in live.rest()])


async def _unless_gone(request: Request, work: Coroutine[Any, Any, bytes]) -> bytes:
    """What the work returns; ended where the caller leaves before, since nobody would hear it."""
    gone, working = asyncio.create_task(_left(request)), asyncio.create_task(work)
    try:
        await asyncio.wait({gone, working}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HTTPException(_CLOSED, "the caller has left")
        return await working
    finally:
        gone.cancel()
        working.cancel()
        await asyncio.gather(gone, working, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _headed(body: SpokenRequest, pcm: bytes) -> bytes:
    return (wav_header(len(pcm)) if body.response_format == "wav" else b"") + pcm


async def _streamed(body: SpokenRequest, first: bytes, live: LiveSpeech) -> AsyncIterator[bytes]:
    yield (wav_header(None) if body.response_format == "wav" else b"") + first
    async for piece in live.rest():
        yield piece


class _LiveResponse(StreamingResponse):
    """Audio as it comes; ends the stream at the server when the listener leaves, however early."""

    def __init__(self, audio: AsyncIterator[bytes], kept: contextlib.AsyncExitStack, **more: Any):
        super().__init__(audio, **more)
        self._kept = kept

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._kept:
            await super().__call__(scope, receive, send)


@router.get("/voices", tags=["voices"])
async def list_voices(owner: Owner, front: Front) -> list[VoiceView]:
    """The voices that the key may use."""
    names = await asyncio.to_thread(front.voices.names, owner)
    return [VoiceView(id=number, name=name) for number, name in names.items()]


@router.get(
    "/voices/{voice}/sample", tags=["voices"], response_class=Response,
    responses={**UNKNOWN, **content("A WAV.", "audio/wav")},
)  # fmt: skip
async def voice_sample(voice: int, owner: Owner, front: Front) -> Response:
    """The sample of a voice."""
    data = await asyncio.to_thread(front.voices.sample, owner, voice)
    if data is None:
        raise HTTPException(404, "there is no such voice")
    return Response(data, media_type="audio/wav", headers={"Cache-Control": "no-store"})


@router.post(
    "/voices", tags=["voices"], status_code=201, responses={**LIMITED, **failure(409, "This service takes no voices.")}
)
async def add_voice(file: UploadFile, owner: LimitedOwner, front: Front) -> VoiceView:
    """Add a voice: an uncompressed WAV of 9 to 30 s. It belongs to the key."""
    if not front.voices.may_grow:
        raise HTTPException(409, "this service takes no voices: its servers have a fixed set")
    data = await file.read()
    if len(data) > front.settings.voice_bytes:
        raise HTTPException(413, f"the voice is larger than {front.settings.voice_bytes} bytes")
    try:
        number = await asyncio.to_thread(
            front.voices.add, owner, file.filename or "voice", data, front.settings.voice_s
        )
    except InputError as error:
        raise RequestRejected(str(error), field="file") from None
    names = await asyncio.to_thread(front.voices.names, owner)
    return VoiceView(id=number, name=names[number])
