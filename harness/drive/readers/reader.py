"""The work of a reader process: requests in, each sent when it is due, one Result out for each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from harness.client.stream import SpeechClient, Stream, failed_result, make_result
from harness.drive.readers.live_stats import Lag, Watch
from harness.records.load_log import request_from_plain, result_to_plain
from harness.records.schema import Outcome, Request, Result


class Desk:
    """Takes requests in; each that comes is sent when it is due, and ``send`` takes its Result home."""

    def __init__(self, client: SpeechClient, send: Callable[[str, object], None]):
        self._client, self._send = client, send
        self._loop = asyncio.get_running_loop()
        self._watch = Watch(time.monotonic_ns())
        self._waiting: dict[int, tuple[asyncio.TimerHandle, Request, str]] = {}
        self._streams: dict[int, Stream] = {}
        self._tasks: set[asyncio.Task] = set()
        self.lag = Lag()
        self._ending: asyncio.Task | None = None
        self.ended = asyncio.Event()

    def submit(self, number: int, plain: dict, loop: str) -> None:
        request = request_from_plain(plain)
        handle = self._loop.call_at(request.due_ns / 1e9, self._start, number)
        self._waiting[number] = handle, request, loop
        self._start_if_due(number)

    def cancel(self, number: int, outcome: Outcome = Outcome.CANCELLED) -> None:
        if number in self._waiting:
            handle, request, loop = self._waiting.pop(number)
            handle.cancel()
            self._return(number, make_result(request, loop, outcome))
        elif number in self._streams:
            self._streams[number].stop(outcome)

    def finish(self, grace_s: float) -> None:
        """End within ``grace_s``; ``ended`` is set when every Result is on its way. A second call may shorten it."""
        for number in list(self._waiting):
            if not self._start_if_due(number):
                self.cancel(number, Outcome.UNFINISHED)
        self._loop.call_later(grace_s, self._cut)
        self._ending = self._ending or self._loop.create_task(self._end())

    def _cut(self) -> None:
        for stream in self._streams.values():
            stream.stop(Outcome.UNFINISHED)

    async def _end(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._send("progress", self.look())
        self._send("lag_p99_s", self.lag.p99_s())  # before servers are asked, which may not answer
        self._send("fared", (await self._client.replicas.fared()).to_plain())
        self.ended.set()

    def look(self) -> dict:
        return self._watch.look(len(self._streams), len(self._waiting), time.monotonic_ns()).to_plain()

    def _start_if_due(self, number: int) -> bool:
        is_due = self._waiting[number][1].due_ns <= time.monotonic_ns()
        if is_due:
            self._start(number)
        return is_due

    def _start(self, number: int) -> None:
        """The stream is there at once, so that a cancel that follows the submit finds it."""
        handle, request, loop = self._waiting.pop(number)
        handle.cancel()
        try:
            self._streams[number] = self._client.open(request, loop, on_chunk=self._chunk)
        except Exception as error:  # whatever happens, every request has a Result
            return self._return(number, failed_result(request, loop, error))
        task = self._loop.create_task(self._run(number, request, loop))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, number: int, request: Request, loop: str) -> None:
        try:
            result = await self._streams[number].run()
        except Exception as error:
            result = failed_result(request, loop, error)
        self._watch.forget(self._streams.pop(number))
        self._return(number, result)

    def _chunk(self, stream: Stream, now_ns: int, samples: int) -> None:
        self._watch.chunk(stream, stream.request, now_ns, samples)

    def _return(self, number: int, result: Result) -> None:
        self._send("result", [number, result_to_plain(result)])
