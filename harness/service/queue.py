"""The queue of tasks on Redis Streams: delivered at least once, changed by nobody but the worker that holds a task.

One message per task stays in the stream until the task ends; a worker that holds it says so every few seconds, and
each stored segment is recorded in one atomic step that checks the worker's token. A message that nobody has attended
to for ``lease_s`` is given to the next worker that asks. That needs three things that job engines on Redis Streams do
not offer, so it is written with redis-py here: the id of the message inside our own scripts (in taskiq-redis 1.2 a
broker keeps it, and hands a task over after a fixed time, whether its worker lives or not), a lease that is renewed
while a task runs, and Redis 6.2, which is what wheels bundle (streaq 7 loads Redis 7 functions).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeout

from harness.service.scripts import GROUP, SCRIPTS
from harness.service.task import RUNNING, StoredSegment, TaskRecord, TaskSpec

PREFIX = "studio:"
NO_LIMIT = 1 << 30
AGAIN_S = 86_400  # for which an idempotency key is remembered
SIGN_OF_LIFE_S = 5.0
ANSWER_S = 10.0
_RETRIES = 5
_WRITTEN_LOOK_S = 0.02


class TimedRedis(Redis):
    """A client whose commands take ``ANSWER_S`` at most.

    Not by ``socket_timeout``: with it redis-py sends by ``asyncio.wait_for``, which in Python 3.11 loses a cancellation
    that comes while it sends, so that a task that was cancelled goes on for ever.
    """

    async def execute_command(self, *arguments: Any, **options: Any) -> Any:
        async with in_time():
            return await super().execute_command(*arguments, **options)


@contextlib.asynccontextmanager
async def in_time() -> AsyncIterator[None]:
    """Raise redis's TimeoutError where the block takes longer than ``ANSWER_S``."""
    try:
        async with asyncio.timeout(ANSWER_S):
            yield
    except TimeoutError:
        raise RedisTimeout(f"Redis has not answered within {ANSWER_S:g} s") from None


def connect(url: str) -> Redis:
    """A client with text answers. Lost connections are retried: see ``scripts`` for why that is safe."""
    return TimedRedis.from_url(
        url, decode_responses=True, protocol=2, socket_timeout=None, socket_connect_timeout=5, socket_keepalive=True,
        retry=Retry(ExponentialBackoff(cap=1.0, base=0.05), _RETRIES),
    )  # fmt: skip


@dataclass(frozen=True)
class Submitted:
    """What became of a submission: ``queued``, ``known`` (the same was submitted before), ``conflict`` (the
    idempotency key belongs to another request) or ``full`` (the owner's quota)."""

    outcome: str
    id: str


@dataclass(frozen=True)
class Claim:
    """A task that a worker holds: its record, the fencing token, and the worker's name as a consumer."""

    record: TaskRecord
    token: int
    consumer: str


@dataclass(frozen=True)
class Room:
    """Who uses the target: streams, those of them that wait for room, running tasks, and one task's rank among them."""

    streams: int
    impatient: int
    running: int
    rank: int


class TaskQueue:
    """Tasks in Redis. Methods raise redis.exceptions.RedisError where Redis does not answer."""

    def __init__(self, client: Redis, lease_s: float, prefix: str = PREFIX):
        self.client: Any = client  # its answers depend on the protocol and on decoding, which types do not show
        self.lease_s, self.prefix = lease_s, prefix
        self._scripts = {name: client.register_script(text) for name, text in SCRIPTS.items()}

    async def prepare(self) -> None:
        """Create the stream and its group, once."""
        with contextlib.suppress(ResponseError):  # it is there
            await self.client.xgroup_create(self._key("queue"), GROUP, id="0", mkstream=True)

    async def submit(self, task: str, owner: str, spec: TaskSpec, most: int, again: str, print_: str) -> Submitted:
        """Queue a task, unless the owner has ``most`` open ones, or submitted it before with the same key ``again``.

        Returns once it is in Redis's append-only file, so that a killed Redis forgets no task that was accepted.
        """
        key = f"{owner}:{digest(again)}" if again else ""
        answer = await self._run("submit", task, owner, spec.text(), spec.webhook, most, key, print_, AGAIN_S)
        await self.written()
        return Submitted(*answer)

    async def written(self, most_s: float = 3.0) -> None:
        """Wait until Redis has handed its append-only file to the kernel, if it keeps one; at most ``most_s``.

        It puts that off for up to 2 s while an earlier fsync runs, as on a slow disk.
        """
        with contextlib.suppress(ResponseError):  # not every user of a Redis may ask
            for _ in range(round(most_s / _WRITTEN_LOOK_S)):
                if not (await self.client.info("persistence")).get("aof_buffer_length"):
                    return
                await asyncio.sleep(_WRITTEN_LOOK_S)

    async def take(self, consumer: str, block_s: float = 1.0, most: int = NO_LIMIT) -> Claim | None:
        """The next task: first one whose worker is gone or that was given back, then the oldest new one.

        None where there is none, or where living workers run ``most`` already: the claim itself counts them.
        """
        message = await self._run("reclaim", "", consumer, round(self.lease_s * 1000))
        if not message:
            arrived = await self.client.xreadgroup(
                GROUP, consumer, {self._key("queue"): ">"}, count=1, block=max(1, round(block_s * 1000))
            )
            message = _first(arrived)
        if not message:
            return None
        number, task = message
        token = await self._run("claim", task, number, most, self.lease_s)
        record = await self.record(task) if token else None
        return Claim(record, int(token), consumer) if record else None

    async def beat(self, claim: Claim, live_frames: int) -> bool:
        """Renew the lease; False where the task is no longer the caller's."""
        before = len(claim.record.segments)
        return bool(await self._run("beat", claim.record.id, claim.token, claim.consumer, live_frames, before))

    async def commit(self, claim: Claim, segment: StoredSegment, busy_s: float, spoken: bool) -> bool:
        """Record a stored segment after those of the claim's record; False where the task is another's."""
        before = len(claim.record.segments)
        return bool(
            await self._run(
                "commit", claim.record.id, claim.token, claim.consumer, before, segment.text(), f"{busy_s:.6f}",
                int(spoken), segment.frames,
            )
        )  # fmt: skip

    async def finish(self, claim: Claim, result: str, result_bytes: int) -> bool:
        return bool(await self._run("finish", claim.record.id, claim.token, result, result_bytes))

    async def fail(self, claim: Claim, why: str) -> bool:
        return bool(await self._run("fail", claim.record.id, claim.token, why))

    async def release(self, claim: Claim, delay_s: float = 0.0, failed: bool = False, why: str = "") -> bool:
        """Give a task back; it keeps its place, and is not delivered before ``delay_s`` (at most the lease)."""
        idle_ms = max(0, round((self.lease_s - delay_s) * 1000))
        return bool(await self._run("release", claim.record.id, claim.token, idle_ms, int(failed), why))

    async def cancel(self, task: str) -> str | None:
        """Cancel a task that has not ended; returns the state that it was in."""
        return await self._run("cancel", task, 2 * self.lease_s)

    async def at_rest(self, task: str) -> bool:
        """Whether a task has ended, and no worker may still write for it."""
        return bool(await self._run("at_rest", task))

    async def forget(self, task: str) -> None:
        await self._run("forget", task)

    async def due(self, kind: str, hidden_s: float) -> str | None:
        """A task of ``hooks`` or ``trash`` whose time has come; others do not get it for ``hidden_s``."""
        return await self._run("due", kind, hidden_s)

    async def done_with(self, kind: str, task: str) -> None:
        await self.client.zrem(self._key(kind), task)

    async def try_hook(self, task: str) -> int:
        """Count an attempt to deliver a task's webhook; returns how many there were, 0 for a task that is gone."""
        return int(await self._run("try_hook", task))

    async def postpone(self, kind: str, task: str, delay_s: float) -> None:
        await self.client.zadd(self._key(kind), {task: time.time() + delay_s}, xx=True)

    async def ended_before(self, at_s: float, most: int = 20) -> list[str]:
        """Tasks that ended before a time (seconds since 1970)."""
        return await self.client.zrangebyscore(self._key("ended"), "-inf", at_s, start=0, num=most)

    async def record(self, task: str) -> TaskRecord | None:
        return (await self.records([task]))[0]

    async def records(self, tasks: Iterable[str]) -> list[TaskRecord | None]:
        """The records of tasks, None for those that are not there."""
        async with in_time(), self.client.pipeline(transaction=True) as pipe:
            for task in tasks:
                pipe.hgetall(self._key("task", task))
                pipe.lrange(self._key("segments", task), 0, -1)
            answers = await pipe.execute()
        pairs = zip(answers[::2], answers[1::2], strict=True)
        return [TaskRecord.of(found, segments) if found else None for found, segments in pairs]

    async def of_owner(self, owner: str, most: int) -> list[TaskRecord]:
        """An owner's tasks, the newest first."""
        tasks = await self.client.zrevrange(self._key("owner", owner), 0, most - 1)
        return [record for record in await self.records(tasks) if record] if tasks else []

    async def position(self, task: str) -> int | None:
        """The place of a waiting task, from 1."""
        rank = await self.client.zrank(self._key("waiting"), task)
        return None if rank is None else rank + 1

    async def estimated_start(self, record: TaskRecord) -> float | None:
        """When a waiting task is likely to begin (seconds since 1970), by the work before it and the recent pace.

        None where no worker lives, or none has stored a segment yet.
        """
        counts, slots = await self.counts(), await self.slots()
        if not slots or not counts.get("busy_s") or not counts.get("frames"):
            return None
        rank = await self.client.zrank(self._key("waiting"), record.id) or 0
        before = await self.client.zrange(self._key("waiting"), 0, rank - 1) if rank else []
        running = await self.client.zrange(self._key("running"), 0, -1)
        records = await self.records([*before, *running]) if before or running else []
        frames = sum(max(0, each.of_frames - each.frames - each.live) for each in records if each)
        if len(running) < slots and not before:
            frames = 0
        return time.time() + frames * counts["busy_s"] / counts["frames"] / slots

    async def allow(self, owner: str, most: int) -> int:
        """Count a request of an owner; returns 0, or the seconds to wait where there were ``most`` in this minute."""
        return int(await self._run("allow", owner, most))

    async def alive(self, kind: str, member: str, seconds: float = 3 * SIGN_OF_LIFE_S) -> None:
        """Say that a member of ``streams``, ``impatient`` or ``slots`` is there; it ends by itself."""
        await self._run("alive", kind, member, seconds)

    async def enter(self, owner: str, stream: str, most: int, seconds: float = 3 * SIGN_OF_LIFE_S) -> bool:
        """Say that a stream of an owner is there; False, and nothing said, where the owner has ``most`` already."""
        return bool(await self._run("enter", owner, stream, most, seconds))

    async def gone(self, kind: str, member: str) -> None:
        await self.client.zrem(self._key(kind), member)

    async def slots(self) -> int:
        """Places for tasks of all workers that live."""
        members = await self.client.zrangebyscore(self._key("slots"), time.time(), "+inf")
        return sum(int(member.rpartition("|")[2]) for member in members)

    async def room(self, task: str = "") -> Room:
        return Room(*map(int, await self._run("room", task, self.lease_s)))

    async def counts(self) -> dict[str, float]:
        """Counters since the beginning: submitted, done, failed, cancelled, segments, frames, busy_s, reclaimed, …"""
        return {name: float(value) for name, value in (await self.client.hgetall(self._key("counters"))).items()}

    async def lengths(self) -> dict[str, int]:
        """How many tasks wait and run, and how many ended ones are kept."""
        async with in_time(), self.client.pipeline(transaction=False) as pipe:
            for name in ("waiting", RUNNING, "ended"):
                pipe.zcard(self._key(name))
            return dict(zip(("queued", RUNNING, "ended"), await pipe.execute(), strict=True))

    async def view(self, record: TaskRecord) -> dict:
        """A task as callers see it."""
        if record.status != "queued":
            return record.view()
        return record.view(await self.position(record.id), await self.estimated_start(record))

    async def listed(self, record: TaskRecord) -> dict:
        """A task in a list: ``view`` without the estimate, which reads every task that comes before."""
        return record.view(await self.position(record.id) if record.status == "queued" else None)

    def _key(self, *parts: str) -> str:
        return self.prefix + ":".join(parts)

    async def _run(self, name: str, *arguments: Any) -> Any:
        return await self._scripts[name](keys=[self.prefix], args=arguments)


def digest(text: str) -> str:
    """A short fingerprint of a secret or of a request."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _first(arrived: Any) -> tuple[str, str] | None:
    """The id and the task of the one message in an answer of XREADGROUP."""
    for _, messages in arrived or ():
        for number, fields in messages:
            return number, fields["task"]
    return None
