"""The queue of a running studio for a script that is not asynchronous itself."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Self

from harness.service.queue import TaskQueue, connect


class QueueAccess:
    """A context manager with ``queue``, its ``redis``, and ``ask``, which runs a coroutine of them to its end."""

    def __init__(self, redis_url: str, lease_s: float):
        self.loop = asyncio.new_event_loop()
        self.redis = connect(redis_url)
        self.queue = TaskQueue(self.redis, lease_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.ask(self.redis.aclose())
        self.loop.close()

    def ask(self, coroutine: Coroutine) -> Any:
        return self.loop.run_until_complete(coroutine)
