"""Parts of the job service as tests run them."""

import asyncio
import contextlib
import threading
import time
from dataclasses import replace

import requests
import uvicorn
from redis.exceptions import RedisError

from harness.client.stream import SpeechClient
from harness.deploy.ports import free_ports
from harness.service.front import create_app
from harness.service.limits import timed_protocol
from harness.service.queue import TaskQueue, connect
from harness.service.storage import AudioStore
from harness.service.task import TaskSpec
from harness.service.worker import TaskWorker

KEYS = ("first-key-of-somebody-0001", "second-key-of-somebody-002")


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def spec_of(script="Speaker 1: hello", frames=8, **more):
    return TaskSpec(**{"script": script, "voices": (1,), "frames": frames, "estimate": frames, **more})


@contextlib.asynccontextmanager
async def opened(settings):
    """A queue and a store."""
    client = connect(settings.redis)
    try:
        queue = TaskQueue(client, settings.lease_s)
        with contextlib.suppress(RedisError):  # of a test without one
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


async def until(condition, timeout_s=60.0):
    """Wait until an asynchronous condition gives something true; returns it."""
    async with asyncio.timeout(timeout_s):
        while not (found := await condition()):
            await asyncio.sleep(0.02)
        return found


class Service:
    """A front and a worker on one event loop in a thread of this process; ``get``, ``post`` and ``delete`` call it."""

    def __init__(self, settings, works=True):
        self.settings = replace(settings, port=settings.port or free_ports(1)[0])
        self.url = f"http://127.0.0.1:{self.settings.port}"
        self._works, self._session = works, requests.Session()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._ready = threading.Event()

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(120)
        return self

    def __exit__(self, *_):
        self._session.close()
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(120)
        assert not self._thread.is_alive()

    async def _run(self):
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        app = create_app(self.settings)
        made = uvicorn.Config(
            app, port=self.settings.port, http=timed_protocol(self.settings.body_s), log_config=None, access_log=False,
            timeout_graceful_shutdown=1, ws="none",
        )  # fmt: skip
        server = uvicorn.Server(made)
        server.install_signal_handlers = lambda: None
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        async with opened(self.settings) as (self.queue, self.store):
            async with working(self.settings, self.queue, self.store) if self._works else contextlib.nullcontext():
                self._ready.set()
                await self._end.wait()
            server.should_exit = True
            await serving

    def ask(self, coroutine):
        """Run a coroutine of the queue on the service's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(120)

    def call(self, method, path, **more):
        return self._session.request(method, self.url + path, timeout=60, **more)

    def get(self, path, **more):
        return self.call("GET", path, **more)

    def post(self, path, json=None, **more):
        return self.call("POST", path, json=json, **more)

    def submit(self, script="Speaker 1: one two three", **body):
        """Submit a task; returns its id."""
        answer = self.post("/v1/tasks", {"script": script, **body})
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]

    def ended(self, task, timeout_s=60):
        """Wait until a task has ended; returns it."""
        deadline = time.monotonic() + timeout_s
        while (found := self.get(f"/v1/tasks/{task}").json())["status"] in ("queued", "running"):
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        return found
