"""Speech that a caller listens to while it is made: streams come before tasks."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator

from redis.exceptions import RedisError

from harness.client.stream import SpeechClient, Stream
from harness.records.schema import Outcome
from harness.service.audio import to_pcm
from harness.service.queue import SIGN_OF_LIFE_S, TaskQueue
from harness.service.segments import ServerFull, raise_for, request_of
from harness.service.task import TaskSpec

IMPATIENT_S = 1.0  # without a sound, after which tasks make room
AGAIN_S = 0.5  # between two tries at a server without room
TRAFFIC_CLASS = "stream"


class StreamsFull(Exception):
    """The owner listens to as many streams as one key may."""


class LiveSpeech:
    """A script being spoken; an async context manager that ends the stream when the listener leaves.

    ``most``: streams that ``owner`` may listen to at once; entering raises StreamsFull beyond them.

    ``first`` waits for the first audio, so that a failure can still be answered as one; ``rest`` yields what follows.
    """

    def __init__(
        self, client: SpeechClient, queue: TaskQueue, spec: TaskSpec, patience_s: float, owner: str, most: int
    ):
        self._client, self._queue, self._spec, self._patience_s = client, queue, spec, patience_s
        self._owner, self._most = owner, most
        self._name = secrets.token_hex(8)
        self._audio: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._stream: Stream | None = None
        self._heard = asyncio.Event()
        self._left = False

    async def __aenter__(self) -> LiveSpeech:
        if not await self._queue.enter(self._owner, self._name, self._most):
            raise StreamsFull
        self._speaking = asyncio.create_task(self._speak())
        self._counting = asyncio.create_task(self._count())
        return self

    async def __aexit__(self, *_) -> None:
        self._left = True
        if self._stream:
            self._stream.stop(Outcome.CANCELLED)
        for task in (self._speaking, self._counting):
            task.cancel()
        await asyncio.gather(self._speaking, self._counting, return_exceptions=True)
        await self._uncount()

    @property
    def _kinds(self) -> tuple[str, str]:
        """The sets in which it is counted."""
        return "streams", f"streams:{self._owner}"

    async def first(self) -> bytes:
        """The first samples, 16 bit. Raises what ``raise_for`` does."""
        piece = await self._audio.get()
        if piece is None:
            await self._speaking  # raises
            return b""
        return piece

    async def rest(self) -> AsyncIterator[bytes]:
        """What follows, as it comes. Raises what ``raise_for`` does where the server fails in between."""
        ended = False
        while not ended:
            pieces = [await self._audio.get()]
            while not self._audio.empty():
                pieces.append(self._audio.get_nowait())
            ended = pieces[-1] is None
            if audio := b"".join(filter(None, pieces)):
                yield audio
        await self._speaking

    async def _speak(self) -> None:
        try:
            until_s = time.monotonic() + self._patience_s
            while True:
                try:
                    return await self._try()
                except ServerFull:
                    if self._left or time.monotonic() > until_s:
                        raise
                    await asyncio.sleep(AGAIN_S)
        finally:
            self._audio.put_nowait(None)

    async def _try(self) -> None:
        request = request_of(self._name, TRAFFIC_CLASS, self._spec, self._spec.frames)
        self._stream = self._client.open(request, "open", on_audio=self._hear)
        result = await self._stream.run()
        raise_for(result.outcome, result.error)

    def _hear(self, samples: bytes) -> None:
        self._heard.set()
        self._audio.put_nowait(to_pcm(samples))

    async def _count(self) -> None:
        """Tell the workers that this stream is there, and whether it waits for room."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IMPATIENT_S):
                await self._heard.wait()
        while True:
            with contextlib.suppress(RedisError):
                for kind in self._kinds:
                    await self._queue.alive(kind, self._name)
                if self._heard.is_set():
                    await self._queue.gone("impatient", self._name)
                else:
                    await self._queue.alive("impatient", self._name)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SIGN_OF_LIFE_S):
                    await (self._heard.wait() if not self._heard.is_set() else asyncio.sleep(SIGN_OF_LIFE_S))

    async def _uncount(self) -> None:
        with contextlib.suppress(RedisError):
            for kind in (*self._kinds, "impatient"):
                await self._queue.gone(kind, self._name)
