"""The worker: takes tasks, speaks them segment by segment, and stores each segment before it is acknowledged.

python -m harness.service.worker        settings from HARNESS_STUDIO_*, connection options from LOCUST_*
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from redis.exceptions import RedisError

from harness.client.stream import SpeechClient
from harness.client.target import Target
from harness.errors import ServerError
from harness.service import audio
from harness.service.housekeeping import Housekeeping
from harness.service.logs import log, run_part
from harness.service.queue import SIGN_OF_LIFE_S, Claim, TaskQueue, connect
from harness.service.room import must_yield, tasks_allowed
from harness.service.segments import (
    SegmentFailed,
    SegmentRun,
    SegmentStopped,
    ServerFull,
    SpokenSegment,
    Unspeakable,
    next_segment,
)
from harness.service.settings import StudioSettings
from harness.service.storage import AudioStore
from harness.service.task import StoredSegment

PAUSE_S = 0.5  # after a service that does not answer
LOOK_S = 0.1  # between two looks at whether streams leave room
WAIT_S = 0.25  # for a new task, after which room and tasks that were given back are looked at again
BEATS_PER_LEASE = 5
_RESULT = "audio"


class TaskLost(Exception):
    """The task was cancelled, or another worker has it: nothing more may be written."""


class TaskWorker:
    """Places for tasks at one target. ``run`` serves until ``stop``; tasks in progress are then given back."""

    def __init__(self, settings: StudioSettings, queue: TaskQueue, store: AudioStore, client: SpeechClient):
        self.settings, self.queue, self.store, self.client = settings, queue, store, client
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._runs: set[SegmentRun] = set()
        self._stopping, self._freed = asyncio.Event(), asyncio.Event()
        self._asking = asyncio.Lock()

    def stop(self) -> None:
        self._stopping.set()
        self._freed.set()
        for run in list(self._runs):
            run.stop()

    async def run(self) -> None:
        """Serve until ``stop``."""
        keeping = Housekeeping(self.settings, self.queue, self.store)
        beside = [asyncio.create_task(each) for each in (self._say_alive(), keeping.run(self._stopping))]
        try:
            await self._until_prepared()
            places = range(self.settings.jobs_at_once)
            await asyncio.gather(*(self._place(f"{self.name}-{number}") for number in places))
        finally:
            for each in beside:
                each.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            with contextlib.suppress(RedisError):
                await self.queue.gone("slots", self._member)

    @property
    def _member(self) -> str:
        return f"{self.name}|{self.settings.jobs_at_once}"

    async def _say_alive(self) -> None:
        while True:
            with contextlib.suppress(RedisError):
                await self.queue.alive("slots", self._member)
            await asyncio.sleep(SIGN_OF_LIFE_S)

    async def _until_prepared(self) -> None:
        while not self._stopping.is_set():
            try:
                return await self.queue.prepare()
            except RedisError as error:
                await self._pause(error)

    async def _place(self, consumer: str) -> None:
        """One place for a task: take, work, again."""
        while not self._stopping.is_set():
            try:
                if claim := await self._ask(consumer):
                    await self._work(claim)
                    self._freed.set()
            except (RedisError, ServerError) as error:
                await self._pause(error)

    async def _ask(self, consumer: str) -> Claim | None:
        """The next task, if there is one and room for it. One place asks at a time: each sees what the others took."""
        async with self._asking:
            if self._stopping.is_set() or not (most := await self._most_running()):
                return None
            return await self.queue.take(consumer, WAIT_S, most)

    async def _most_running(self) -> int:
        """Tasks that may run beside the streams; 0, after a moment, where there is no room for another one now.

        Raises ServerError where the server cannot speak.
        """
        self._freed.clear()
        room = await self.queue.room()
        most = tasks_allowed(room, self.settings.sessions)
        if room.running >= most:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._freed.wait()
            return 0
        await self.client.any_ready()
        return most

    async def _pause(self, error: Exception | None = None) -> None:
        if error:
            log("waiting", error=str(error))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PAUSE_S):
                await self._stopping.wait()

    async def _work(self, claim: Claim) -> None:
        """Speak a task until it is done, or until it has to be given back."""
        task = claim.record.id
        log("task taken", task=task, attempt=claim.token, segments=len(claim.record.segments))
        try:
            while not claim.record.spoken:
                claim = await self._speak(claim)
                if not claim.record.spoken and await self._has_to_yield(claim):
                    await self.queue.release(claim)
                    return log("task yielded", task=task, frames=claim.record.frames)
            await self._finish(claim)
            log("task done", task=task, frames=claim.record.frames)
        except TaskLost:
            log("task lost", task=task, attempt=claim.token)
        except SegmentStopped:
            await self.queue.release(claim)
        except ServerFull as error:
            await self.queue.release(claim, min(PAUSE_S, self.settings.lease_s), why=str(error))
        except Unspeakable as error:
            await self.queue.fail(claim, str(error))
            log("task failed", task=task, error=str(error))
        except SegmentFailed as error:
            await self._try_again(claim, str(error))
        except OSError as error:  # of the storage: no fault of the task, however long it lasts
            log("storage failed", task=task, error=str(error))
            await self.queue.release(
                claim, self.settings.lease_s, why=f"the storage failed ({error}); it is tried again"
            )
        except RedisError:
            raise
        except Exception as error:  # of the encoder, or a storage's own: it must not end the other tasks
            await self._try_again(claim, f"{type(error).__name__}: {error}")

    async def _try_again(self, claim: Claim, why: str) -> None:
        """Give a task back after a failure, or end it after too many without a stored segment between them."""
        record = await self.queue.record(claim.record.id)
        failures = record.failures + 1 if record else 0
        log("segment failed", task=claim.record.id, error=why, failures=failures)
        if failures >= self.settings.tries:
            await self.queue.fail(claim, f"a segment failed {failures} times in a row, the last time because: {why}")
        else:
            delay_s = min(self.settings.lease_s, PAUSE_S * 2**failures)
            await self.queue.release(claim, delay_s, failed=True, why=why)

    async def _has_to_yield(self, claim: Claim) -> bool:
        if self._stopping.is_set():
            return True
        return must_yield(await self.queue.room(claim.record.id), self.settings.sessions)

    async def _speak(self, claim: Claim) -> Claim:
        """Speak and store the next segment; returns the claim with the new record."""
        record = claim.record
        carry = await self._carry_of(claim)
        run = SegmentRun(self.client, record, next_segment(record, self.settings.segment_frames), carry)
        async with self._attended(claim, run):
            spoken = await run.run()
            stored = await self._store(claim, spoken)
            if not await self._insisting(lambda: self.queue.commit(claim, stored, spoken.seconds, spoken.last)):
                raise TaskLost
        if record.segments and record.segments[-1].carry:  # the next one has taken its place
            await asyncio.to_thread(self._remove, record.id, record.segments[-1].carry)
        return await self._again(claim)

    async def _carry_of(self, claim: Claim) -> bytes:
        segments = claim.record.segments
        if not segments:
            return b""
        try:
            return await asyncio.to_thread(self.store.read, claim.record.id, segments[-1].carry)
        except FileNotFoundError:
            raise Unspeakable("what was spoken so far is gone from the storage: submit the task again") from None

    async def _store(self, claim: Claim, spoken: SpokenSegment) -> StoredSegment:
        """Store audio and carry under names with the attempt: no other attempt overwrites them."""
        number, task = len(claim.record.segments), claim.record.id
        name = f"{number:05d}-{claim.token}.pcm"
        carry = f"{number:05d}-{claim.token}.carry" if spoken.carry else ""
        await asyncio.to_thread(self.store.write, task, name, spoken.pcm)
        if carry:
            await asyncio.to_thread(self.store.write, task, carry, spoken.carry)
        return StoredSegment(name, spoken.frames, len(spoken.pcm), carry)

    async def _finish(self, claim: Claim) -> None:
        """Encode the audio if its format asks for it, and end the task."""
        record = claim.record
        name, size = "", 0
        async with self._attended(claim):
            if record.spec.format != "wav":
                name = f"{_RESULT}-{claim.token}.{record.spec.format}"
                size = await asyncio.to_thread(self._encode, claim, name)
            if not await self._insisting(lambda: self.queue.finish(claim, name, size)):
                raise TaskLost
        kept = [segment.name for segment in record.segments] if not name else [name]
        with contextlib.suppress(OSError):  # retention removes all of it
            await asyncio.to_thread(self.store.keep_only, record.id, kept)

    def _encode(self, claim: Claim, name: str) -> int:
        record = claim.record
        with tempfile.TemporaryDirectory(prefix="harness-studio-") as folder:
            path = Path(folder) / name
            objects = [(segment.name, segment.bytes) for segment in record.segments]
            audio.encode(record.spec.format, self.store.pieces(record.id, objects), path)
            self.store.put(record.id, name, path)
            return path.stat().st_size

    def _remove(self, task: str, name: str) -> None:
        with contextlib.suppress(OSError):
            self.store.remove_object(task, name)

    async def _again(self, claim: Claim) -> Claim:
        record = await self._insisting(lambda: self.queue.record(claim.record.id))
        if record is None or record.attempt != claim.token:
            raise TaskLost
        return Claim(record, claim.token, claim.consumer)

    async def _insisting(self, ask: Callable):
        """The answer of Redis, however long that takes: what is stored is worth waiting for."""
        while True:
            try:
                return await ask()
            except RedisError as error:
                if self._stopping.is_set():
                    raise
                await self._pause(error)

    @contextlib.asynccontextmanager
    async def _attended(self, claim: Claim, run: SegmentRun | None = None) -> AsyncIterator[None]:
        """Renew the lease meanwhile. A task that was lost stops the segment, and raises TaskLost."""
        lost = asyncio.Event()
        beating = asyncio.create_task(self._beat(claim, run, lost))
        if run:
            self._runs.add(run)
            if self._stopping.is_set():
                run.stop()
        try:
            yield
        except SegmentStopped:
            if lost.is_set():
                raise TaskLost from None
            raise
        finally:
            self._runs.discard(run)
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    async def _beat(self, claim: Claim, run: SegmentRun | None, lost: asyncio.Event) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.settings.lease_s / BEATS_PER_LEASE))
            with contextlib.suppress(RedisError):
                if not await self.queue.beat(claim, run.frames if run else 0):
                    lost.set()
                    if run:
                        run.stop()
                    return


async def serve(settings: StudioSettings) -> None:
    """Serve with these settings until SIGTERM or SIGINT."""
    redis = connect(settings.redis)
    try:
        async with SpeechClient(Target.from_environment(settings.url)) as client:
            worker = TaskWorker(settings, TaskQueue(redis, settings.lease_s), AudioStore(settings.storage_url), client)
            for each in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(each, worker.stop)
            await worker.run()
    finally:
        await redis.aclose()


def main() -> None:
    run_part("worker", lambda: asyncio.run(serve(StudioSettings.from_environment())))


if __name__ == "__main__":
    main()
