"""What workers do beside tasks: webhooks of tasks that ended, audio of cancelled ones, and retention."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import time

from redis.exceptions import RedisError

from harness.errors import InputError
from harness.service import webhooks
from harness.service.logs import log
from harness.service.queue import TaskQueue
from harness.service.settings import StudioSettings
from harness.service.storage import AudioStore

EVERY_S = 1.0
HIDDEN_S = 60.0  # longer than a call takes: a worker that dies meanwhile delays it by so much
HOOK_TRIES, HOOK_DELAY_S = 8, 2.0  # the last of them some four minutes after the end
_DAY_S = 86_400


class Housekeeping:
    """Every worker does a share of it: what is due is given to one of them."""

    def __init__(self, settings: StudioSettings, queue: TaskQueue, store: AudioStore):
        self.settings, self.queue, self.store = settings, queue, store

    async def run(self, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            try:
                await self.once()
            except RedisError:
                pass
            except Exception as error:  # a storage's own: what is due stays due
                log("housekeeping failed", error=f"{type(error).__name__}: {error}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVERY_S):
                    await stopping.wait()

    async def once(self) -> None:
        """Do what is due now."""
        while task := await self.queue.due("hooks", HIDDEN_S):
            await self._call_hook(task)
        while task := await self.queue.due("trash", HIDDEN_S):
            if await self._removed(task):
                await self.queue.done_with("trash", task)
        for task in await self.queue.ended_before(time.time() - self.settings.retention_days * _DAY_S):
            if await self._removed(task):
                await self.queue.forget(task)
                log("task removed", task=task)

    async def _removed(self, task: str) -> bool:
        try:
            await asyncio.to_thread(self.store.remove, task)
        except OSError as error:
            log("audio cannot be removed", task=task, error=str(error))
            return False
        return True

    async def _call_hook(self, task: str) -> None:
        record, tries = await self.queue.record(task), await self.queue.try_hook(task)
        if record is None or not tries or not record.spec.webhook:
            return await self.queue.done_with("hooks", task)
        why = await asyncio.to_thread(self._tried, record.spec.webhook, record.view())
        if why and tries < HOOK_TRIES:
            await self.queue.postpone("hooks", task, HOOK_DELAY_S * 2 ** (tries - 1))
        else:
            await self.queue.done_with("hooks", task)
        log("webhook", task=task, tries=tries, error=why or None)

    def _tried(self, url: str, event: dict) -> str:
        """Call a webhook; returns why it failed, "" where it did not. The address is checked again: names change."""
        try:
            status = webhooks.call(webhooks.checked(url, self.settings.private_webhooks), event)
        except (InputError, OSError, http.client.HTTPException) as error:
            return str(error) or type(error).__name__
        return "" if 200 <= status < 300 else f"status {status}"
