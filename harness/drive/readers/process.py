"""A stream-reader process: it sends requests when they are due and timestamps every chunk that arrives.

``python -m harness.drive.readers.process DESCRIPTOR`` serves the ``ReaderPool`` at the other end of that socket.
It ends when the socket closes, so it never outlives its load generator.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from harness.client.stream import SpeechClient
from harness.drive.readers.live_stats import PROGRESS_EVERY_S
from harness.drive.readers.protocol import (
    Cancel,
    Connect,
    Finish,
    Inbox,
    Message,
    ProgressSample,
    Ready,
    Refused,
    Submit,
    to_bytes,
)
from harness.drive.readers.reader import Reader
from harness.errors import HarnessError

TICK_NS = 20_000_000
NICE = -10
AUTOGROUP = Path("/proc/self/autogroup")
READ_BYTES = 1 << 20

log = logging.getLogger(__name__)


async def _report(reader: Reader, send: Callable[[Message], None]) -> None:
    while True:
        await asyncio.sleep(reader.clock.host_span(PROGRESS_EVERY_S))
        send(ProgressSample(reader.progress()))


async def _keep_time(reader: Reader) -> None:
    """Record how late timers run. Timers are due on a fixed grid, so that a late one does not hide the next."""
    due_ns = time.monotonic_ns()
    while True:
        due_ns = max(due_ns + TICK_NS, time.monotonic_ns())
        await asyncio.sleep((due_ns - time.monotonic_ns()) / 1e9)
        reader.lag.note(*map(reader.clock.of_host, (due_ns, time.monotonic_ns())))


async def _messages(stream: asyncio.StreamReader) -> AsyncIterator[Message]:
    """The load generator's messages, until it closes its end of the socket."""
    inbox = Inbox()
    while data := await stream.read(READ_BYTES):
        for message in inbox.feed(data):
            yield message


async def _obey(reader: Reader, messages: AsyncIterator[Message]) -> None:
    async for message in messages:
        match message:
            case Submit(number, request, loop):
                reader.submit(number, request, loop)
            case Cancel(number):
                reader.cancel(number)
            case Finish(grace_s):
                reader.finish(grace_s)


async def _serve(descriptor: int) -> None:
    stream, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=descriptor))
    messages = _messages(stream)

    def send(message: Message) -> None:
        writer.write(to_bytes(message))

    connect = await anext(messages, None)
    if not isinstance(connect, Connect):  # the load generator has ended already
        return
    try:
        async with SpeechClient(connect.target, connect.first, connect.of) as client:
            await client.ready()
            await _work(client, messages, send)
            await _flush(writer)
            signal.alarm(5)  # clean-up must not keep a reader alive
    except HarnessError as error:
        send(Refused(str(error)))
        await _flush(writer)


async def _work(client: SpeechClient, messages: AsyncIterator[Message], send: Callable[[Message], None]) -> None:
    reader = Reader(client, send)
    send(Ready(os.getpid(), reader.clock.dilation))
    chores = _obey(reader, messages), _report(reader, send), _keep_time(reader), reader.ended.wait()
    await asyncio.wait(map(asyncio.create_task, chores), return_when=asyncio.FIRST_COMPLETED)


async def _flush(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):  # the load generator may have ended
        await writer.wait_closed()


def go_first() -> None:
    """Raise this process's priority above that of the measured load; without permission go on (``Lag`` shows it).

    Real-time scheduling holds timers to 2 ms where a full host let them slip by 20. Next best is a nice value: of the
    process, and of its session, which is what counts where the kernel groups processes by session.
    """
    gc.freeze()  # later collections skip what the imports allocated, and stay short
    gc.set_threshold(50_000, 50, 50)
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        return
    except OSError:
        log.debug("no real-time scheduling for the stream reader")
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
        AUTOGROUP.write_text(str(NICE))


def main() -> None:
    """Entry point of a reader process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    go_first()
    asyncio.run(_serve(int(sys.argv[1])))


if __name__ == "__main__":
    main()
