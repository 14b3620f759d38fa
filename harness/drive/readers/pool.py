"""Stream-reader processes beside the load generator, so that nothing but asyncio ever times a chunk.

A ``ReaderPool`` lives in the load generator, whether that runs on threads or on gevent's patched ones. Each of its
processes (``python -m harness.drive.readers.pool``) shares one socketpair with it and speaks
msgpack pairs ``[kind, value]``:

    to the reader     target [target, first, of], then submit [number, request, loop] · cancel number · finish grace_s
    from the reader   hello pid · refused why · result [number, result] · progress {…} · lag_p99_s · fared {…}

The target comes that way because there may be secrets in it, which a command line would show to everybody. A reader
exits when its socket closes, so it never outlives its load generator.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgpack

from harness.client.replicas import Fared
from harness.client.stream import SpeechClient, make_result
from harness.client.target import Target
from harness.drive.readers.live_stats import Lag, Progress
from harness.drive.readers.reader import Desk
from harness.errors import HarnessError, InputError, ServerError
from harness.host.places import CODE
from harness.records.load_log import request_to_plain, result_from_plain
from harness.records.schema import Outcome, Request, Result

START_TIMEOUT_S = 60.0
LAST_WORDS_S = 15.0  # after the grace: to stop the streams and send every Result home
PROGRESS_EVERY_S = 1.0
TICK_NS = 20_000_000
NICE = -10
AUTOGROUP = Path("/proc/self/autogroup")
READ_BYTES = 1 << 20
# gRPC's older way to wait for a socket: the newer one passes every message through two threads more, at twice the cost.
POLLING = "-event_engine_client"

log = logging.getLogger(__name__)


class Ticket:
    """A request that was handed to a reader; ``wait()`` for its Result, or ``cancel()`` it."""

    def __init__(self, reader: _ReaderProcess, number: int, request: Request, loop: str, then):
        self._reader, self._number, self._then = reader, number, then
        self._done = threading.Event()
        self.request, self.loop = request, loop
        self.result: Result | None = None

    def wait(self, timeout_s: float | None = None) -> Result | None:
        """The Result; None when ``timeout_s`` passed without one."""
        self._done.wait(timeout_s)
        return self.result

    def cancel(self) -> None:
        """Ask for an early end; the Result still comes, ``cancelled`` unless the request had ended before."""
        self._reader.send("cancel", self._number)

    def settle(self, result: Result) -> None:
        self.result = result
        if self._then is not None:
            try:
                self._then(result)
            except Exception:  # a faulty listener must not stop the reading of all other results
                log.exception("the listener of request %s failed", self.request.request_id)
        self._done.set()


class _ReaderProcess:
    """The load generator's side of one reader process."""

    def __init__(self, target: Target, first: int, of: int):
        self.tickets: dict[int, Ticket] = {}
        self.progress = Progress()
        self._start_s = START_TIMEOUT_S + 3 * target.ready_s  # it asks its servers three things before it greets
        self.returned, self.lost, self.lag_p99_s = 0, 0, math.nan
        self.fared = Fared()
        self._refusal = ""
        self._greeted = threading.Event()
        self._sending = threading.Lock()
        self._socket, theirs = socket.socketpair()
        with theirs:
            self.process = _spawn(theirs.fileno())
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        self.send("target", [target.to_plain(), first, of])

    def await_hello(self) -> None:
        if not self._greeted.wait(self._start_s):
            self._refusal = f"a stream-reader process did not start within {self._start_s:.0f} s"
        if self._refusal:
            raise ServerError(self._refusal)

    def send(self, kind: str, value) -> None:
        """Errors are left to the reading side, which sees the same end and settles every ticket."""
        with self._sending:
            try:
                self._socket.sendall(msgpack.packb([kind, value]))
            except OSError:
                log.debug("the reader process is gone: %s not sent", kind)

    def submit(self, ticket: Ticket, number: int) -> None:
        self.tickets[number] = ticket
        self.send("submit", [number, request_to_plain(ticket.request), ticket.loop])
        if not self._thread.is_alive():
            self._settle_lost()

    def close(self, within_s: float) -> None:
        """Wait for the last Results, then for the process; after ``within_s`` end it by force."""
        self._thread.join(within_s)
        if self._thread.is_alive():
            self.process.kill()
        self.process.wait()
        self._thread.join()
        self._socket.close()

    def _read(self) -> None:
        unpacker = msgpack.Unpacker(max_buffer_size=0)
        while data := self._receive():
            unpacker.feed(data)
            for kind, value in unpacker:
                self._take(kind, value)
        self._refusal = self._refusal or "a stream-reader process ended before it was ready"
        self._greeted.set()
        self._settle_lost()

    def _receive(self) -> bytes:
        with contextlib.suppress(OSError):
            return self._socket.recv(READ_BYTES)
        return b""

    def _take(self, kind: str, value) -> None:
        match kind:
            case "hello":
                self._greeted.set()
            case "refused":
                self._refusal = value
                self._greeted.set()
            case "result":
                number, plain = value
                self.returned += 1
                self.tickets.pop(number).settle(result_from_plain(plain))
            case "progress":
                self.progress = Progress.from_plain(value)
            case "lag_p99_s":
                self.lag_p99_s = value
            case "fared":
                self.fared = Fared.from_plain(value)

    def _settle_lost(self) -> None:
        self.progress = Progress(samples=self.progress.samples, stalls=self.progress.stalls)
        if not self.tickets:
            return
        code = self.process.wait()
        error = f"stream-reader process {self.process.pid} died (exit code {code}) with this request under way"
        while self.tickets:
            _, ticket = self.tickets.popitem()
            self.lost += 1
            ticket.settle(make_result(ticket.request, ticket.loop, Outcome.ERROR, error))


def _spawn(descriptor: int) -> subprocess.Popen:
    """Start a reader that inherits one socket; in a session of its own, where Ctrl-C does not reach it."""
    path = os.pathsep.join(filter(None, (str(CODE), os.environ.get("PYTHONPATH", ""))))
    return subprocess.Popen(
        [sys.executable, "-m", "harness.drive.readers.pool", str(descriptor)],
        pass_fds=(descriptor,),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={"GRPC_EXPERIMENTS": POLLING, **os.environ, "PYTHONPATH": path},
    )


class ReaderPool:
    """Reader processes on one service; requests go to them in turn. ``first``: the number of the first of them, and
    ``of`` how many there are in all, where other pools share the service (see ``Replicas``).

    Raises InputError for an unusable target or fewer than one process, ServerError when a server is not ready.
    """

    def __init__(self, target: Target | str, processes: int = 1, first: int = 0, of: int | None = None):
        self.target = Target.of(target)
        if processes < 1:
            raise InputError(f"{processes} reader processes cannot read a stream: use 1 or more")
        self._readers = [_ReaderProcess(self.target, first + number, of or processes) for number in range(processes)]
        self.submitted = 0
        try:
            for reader in self._readers:
                reader.await_hello()
        except HarnessError:
            self.close()
            raise

    @property
    def returned(self) -> int:
        """Results that came from a reader; those made up for a reader that died are ``lost`` instead."""
        return sum(reader.returned for reader in self._readers)

    @property
    def lost(self) -> int:
        return sum(reader.lost for reader in self._readers)

    @property
    def lag_p99_s(self) -> float:
        """How late the readers' own timers ran (p99, the worst reader), once closed: the error of their timestamps."""
        return max((reader.lag_p99_s for reader in self._readers), default=math.nan)

    @property
    def fared(self) -> Fared:
        """How the connections to the servers fared, once closed."""
        return sum((reader.fared for reader in self._readers), Fared())

    def submit(self, request: Request, loop: str, then: Callable[[Result], None] | None = None) -> Ticket:
        """Hand over a request, to be sent at its ``due_ns`` (at once if that has passed).

        ``then`` is called with the Result, in the thread that reads from the reader.
        """
        number, self.submitted = self.submitted, self.submitted + 1
        reader = self._readers[number % len(self._readers)]
        ticket = Ticket(reader, number, request, loop, then)
        reader.submit(ticket, number)
        return ticket

    def progress(self) -> Progress:
        """What all readers see, at most about a second old."""
        return sum((reader.progress for reader in self._readers), Progress())

    def close(self, grace_s: float = 0.0) -> None:
        """Give requests under way ``grace_s`` to finish, cut off the rest as ``unfinished``, and end the readers.

        Requests that are not yet due come back unfinished with ``sent_ns`` = 0: they were never sent. When this
        returns, every ticket has its Result. A second call, while the first waits, may shorten the grace.
        """
        for reader in self._readers:
            reader.send("finish", grace_s)
        for reader in self._readers:
            reader.close(grace_s + LAST_WORDS_S)


async def _report(desk: Desk, send) -> None:
    while True:
        await asyncio.sleep(PROGRESS_EVERY_S)
        send("progress", desk.look())


async def _keep_time(lag: Lag) -> None:
    """Note how late timers run; they follow each other on a grid, so that a late one does not hide the next."""
    due_ns = time.monotonic_ns()
    while True:
        due_ns = max(due_ns + TICK_NS, time.monotonic_ns())
        await asyncio.sleep((due_ns - time.monotonic_ns()) / 1e9)
        lag.note(due_ns, time.monotonic_ns())


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[tuple[str, object]]:
    """What the load generator says until its end of the socket closes."""
    unpacker = msgpack.Unpacker(max_buffer_size=0)
    while data := await reader.read(READ_BYTES):
        unpacker.feed(data)
        for kind, value in unpacker:
            yield kind, value


async def _obey(desk: Desk, messages: AsyncIterator[tuple[str, object]]) -> None:
    async for kind, value in messages:
        if kind == "submit":
            desk.submit(*value)
        elif kind == "cancel":
            desk.cancel(value)
        elif kind == "finish":
            desk.finish(value)


async def _serve(descriptor: int) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=descriptor))
    messages = _messages(reader)

    def send(kind: str, value) -> None:
        writer.write(msgpack.packb([kind, value]))

    first_word = await anext(messages, None)
    if first_word is None:  # the load generator is gone already
        return
    _, (plain, first, of) = first_word
    try:
        async with SpeechClient(Target.from_plain(plain), first, of) as client:
            await client.ready()
            await _work(client, messages, send)
            await _flush(writer)
            signal.alarm(5)  # the clean-up must not keep a reader alive
    except HarnessError as error:
        send("refused", str(error))
        await _flush(writer)


async def _work(client: SpeechClient, messages: AsyncIterator[tuple[str, object]], send) -> None:
    desk = Desk(client, send)
    send("hello", os.getpid())
    chores = _obey(desk, messages), _report(desk, send), _keep_time(desk.lag), desk.ended.wait()
    await asyncio.wait(map(asyncio.create_task, chores), return_when=asyncio.FIRST_COMPLETED)


async def _flush(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):  # the load generator may be gone
        await writer.wait_closed()


def go_first() -> None:
    """Ask to run before the load that is measured; without permission go on, and the lag will tell.

    Real-time scheduling holds timers to 2 ms where a full host let them slip by 20. Next best is a nice value: of the
    process, and of its session, which is what counts where the kernel groups processes by session.
    """
    gc.freeze()  # what the imports made is never looked at again: collections stay short
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
    """Entry of a reader process: ``python -m harness.drive.readers.pool DESCRIPTOR``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    go_first()
    asyncio.run(_serve(int(sys.argv[1])))


if __name__ == "__main__":
    main()
