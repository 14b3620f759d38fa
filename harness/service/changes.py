"""Tells those who follow tasks that one has changed: one subscription to Redis for all followers of a process."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterator

from redis.asyncio import Redis
from redis.exceptions import RedisError

from harness.service.queue import PREFIX

_AGAIN_S = 0.5


class TaskChanges:
    """``following(task)`` gives an event that is set at every change; ``run`` serves until it is cancelled.

    Changes during a lost connection are missed, so followers look by themselves every few seconds too.
    """

    def __init__(self, client: Redis, prefix: str = PREFIX):
        self._client, self._channel = client, f"{prefix}changed"
        self._followers: dict[str, set[asyncio.Event]] = defaultdict(set)

    @contextlib.contextmanager
    def following(self, task: str) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        self._followers[task].add(event)
        try:
            yield event
        finally:
            self._followers[task].discard(event)
            if not self._followers[task]:
                del self._followers[task]

    async def run(self) -> None:
        while True:
            with contextlib.suppress(RedisError, OSError):
                async with self._client.pubsub(ignore_subscribe_messages=True) as subscription:
                    await subscription.subscribe(self._channel)
                    while True:
                        if message := await subscription.get_message(timeout=_AGAIN_S):
                            self._tell(message["data"])
            await asyncio.sleep(_AGAIN_S)

    def _tell(self, task: str) -> None:
        for event in self._followers.get(task, ()):
            event.set()
