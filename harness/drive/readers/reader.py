"""The work of a reader process: it sends each request when it is due and returns one Result for each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from harness.client.stream import SpeechClient, Stream, failed_result, make_result
from harness.drive.readers.live_stats import Lag, LiveStats, Progress
from harness.drive.readers.protocol import ConnectionTotals, Message, ProgressSample, Returned, TimerLag
from harness.records.schema import Outcome, Request, Result


class Reader:
    """Sends each submitted request when it is due, and its Result to the load generator by ``send``.

    Its messages are in times of the servers' ``clock``.
    """

    def __init__(self, client: SpeechClient, send: Callable[[Message], None]):
        self._client, self._send, self.clock = client, send, client.clock
        self._loop = asyncio.get_running_loop()
        self._live = LiveStats(self.clock.now_ns())
        self._waiting: dict[int, tuple[asyncio.TimerHandle, Request, str]] = {}
        self._streams: dict[int, Stream] = {}
        self._tasks: set[asyncio.Task] = set()
        self.lag = Lag()
        self._ending: asyncio.Task | None = None
        self.ended = asyncio.Event()

    def submit(self, number: int, request: Request, loop: str) -> None:
        handle = self._loop.call_at(self.clock.on_host(request.due_ns) / 1e9, self._start, number)
        self._waiting[number] = handle, request, loop
        self._start_if_due(number)

    def cancel(self, number: int, outcome: Outcome = Outcome.CANCELLED) -> None:
        if number in self._waiting:
            handle, request, loop = self._waiting.pop(number)
            handle.cancel()
            self._return(number, make_result(request, loop, outcome, clock=self.clock))
        elif number in self._streams:
            self._streams[number].stop(outcome)

    def finish(self, grace_s: float) -> None:
        """Finish within ``grace_s`` seconds, then set ``ended``. A second call may shorten the grace."""
        for number in list(self._waiting):
            if not self._start_if_due(number):
                self.cancel(number, Outcome.UNFINISHED)
        self._loop.call_later(self.clock.host_span(grace_s), self._cut)
        self._ending = self._ending or self._loop.create_task(self._end())

    def _cut(self) -> None:
        for stream in self._streams.values():
            stream.stop(Outcome.UNFINISHED)

    async def _end(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._send(ProgressSample(self.progress()))
        self._send(TimerLag(self.lag.p99_s()))  # before the calls to the servers, which may not answer
        self._send(ConnectionTotals(await self._client.replicas.connection_statistics()))
        self.ended.set()

    def progress(self) -> Progress:
        return self._live.progress(len(self._streams), len(self._waiting), self.clock.now_ns())

    def _start_if_due(self, number: int) -> bool:
        is_due = self._waiting[number][1].due_ns <= self.clock.now_ns()
        if is_due:
            self._start(number)
        return is_due

    def _start(self, number: int) -> None:
        """Start a stream. It is registered at once, so that a cancel right after the submit finds it."""
        handle, request, loop = self._waiting.pop(number)
        handle.cancel()
        try:
            self._streams[number] = self._client.open(request, loop, on_chunk=self._chunk)
        except Exception as error:  # whatever happens, every request gets a Result
            return self._return(number, failed_result(request, loop, error, self.clock))
        task = self._loop.create_task(self._run(number, request, loop))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, number: int, request: Request, loop: str) -> None:
        try:
            result = await self._streams[number].run()
        except Exception as error:
            result = failed_result(request, loop, error, self.clock)
        self._live.forget(self._streams.pop(number))
        self._return(number, result)

    def _chunk(self, stream: Stream, now_ns: int, samples: int) -> None:
        self._live.chunk(stream, stream.request, self.clock.of_host(now_ns), samples)

    def _return(self, number: int, result: Result) -> None:
        self._send(Returned(number, result))
