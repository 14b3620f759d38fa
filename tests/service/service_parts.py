"""Parts of the job service as tests run them."""

import asyncio
import contextlib

from harness.client.stream import SpeechClient
from harness.service.queue import TaskQueue, connect
from harness.service.storage import AudioStore
from harness.service.task import TaskSpec
from harness.service.worker import TaskWorker


def spec_of(script="Speaker 1: hello", frames=8, **more):
    return TaskSpec(**{"script": script, "voices": (1,), "frames": frames, "estimate": frames, **more})


@contextlib.asynccontextmanager
async def opened(settings):
    """A queue and a store."""
    client = connect(settings.redis)
    try:
        queue = TaskQueue(client, settings.lease_s)
        await queue.prepare()
        yield queue, AudioStore(settings.storage_url)
    finally:
        await client.aclose()


@contextlib.asynccontextmanager
async def working(settings, queue, store):
    """A worker that serves meanwhile."""
    async with SpeechClient(settings.url) as client:
        worker = TaskWorker(settings, queue, store, client)
        running = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            worker.stop()
            await running


async def until(condition, timeout_s=20.0):
    """Wait until an asynchronous condition gives something true; returns it."""
    async with asyncio.timeout(timeout_s):
        while not (found := await condition()):
            await asyncio.sleep(0.02)
        return found
