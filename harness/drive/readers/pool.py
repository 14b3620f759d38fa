"""Stream-reader processes beside the load generator: in them asyncio does nothing but send requests and time chunks.

A ``ReaderPool`` lives in the load generator, which may run on threads or on gevent's patched ones. Its processes
(``python -m harness.drive.readers.process``) exchange the messages of ``protocol`` with it over a socket pair each.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

from harness.client.replicas import ConnectionStatistics
from harness.client.stream import make_result
from harness.client.target import Target
from harness.clock import HOST, Clock
from harness.drive.readers.live_stats import Progress
from harness.drive.readers.protocol import (
    Cancel,
    Connect,
    ConnectionTotals,
    Finish,
    Inbox,
    Message,
    ProgressSample,
    Ready,
    Refused,
    Returned,
    Submit,
    TimerLag,
    to_bytes,
)
from harness.errors import HarnessError, InputError, ServerError
from harness.host.places import CODE
from harness.records.schema import Outcome, Request, Result

START_TIMEOUT_S = 60.0
LAST_WORDS_S = 15.0  # after the grace, to stop the streams and return every Result
READ_BYTES = 1 << 20
PROCESS = "harness.drive.readers.process"
# gRPC's older polling engine: the newer one passes every message through two more threads, at twice the cost.
POLLING = "-event_engine_client"

log = logging.getLogger(__name__)


class Ticket:
    """A request handed to a reader: ``wait()`` for its Result, or ``cancel()`` it."""

    def __init__(self, reader: _ReaderProcess, number: int, request: Request, loop: str, then):
        self._reader, self._number, self._then = reader, number, then
        self._done = threading.Event()
        self.request, self.loop = request, loop
        self.result: Result | None = None

    def wait(self, timeout_s: float | None = None) -> Result | None:
        """The Result; None if ``timeout_s`` passed without one."""
        self._done.wait(timeout_s)
        return self.result

    def cancel(self) -> None:
        """Ask for an early end. The Result still comes, as ``cancelled`` unless the request had already ended."""
        self._reader.send(Cancel(self._number))

    def settle(self, result: Result) -> None:
        self.result = result
        if self._then is not None:
            try:
                self._then(result)
            except Exception:  # a faulty listener must not stop the delivery of other Results
                log.exception("the listener of request %s failed", self.request.request_id)
        self._done.set()


class _ReaderProcess:
    """The load generator's side of one reader process."""

    def __init__(self, target: Target, first: int, of: int):
        self.tickets: dict[int, Ticket] = {}
        self.progress, self.clock = Progress(), HOST
        self._start_s = START_TIMEOUT_S + 4 * target.ready_s  # it makes four calls to its servers before it is ready
        self.returned, self.lost, self.lag_p99_s = 0, 0, math.nan
        self.connections = ConnectionStatistics()
        self._refusal = ""
        self._answered = threading.Event()
        self._sending = threading.Lock()
        self._socket, theirs = socket.socketpair()
        with theirs:
            self.process = _spawn(theirs.fileno())
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        self.send(Connect(target, first, of))

    def await_ready(self) -> None:
        if not self._answered.wait(self._start_s):
            self._refusal = f"a stream-reader process did not start within {self._start_s:.0f} s"
        if self._refusal:
            raise ServerError(self._refusal)

    def send(self, message: Message) -> None:
        """Send a message. Errors are ignored: the receiving thread notices the same end and settles every ticket."""
        with self._sending:
            try:
                self._socket.sendall(to_bytes(message))
            except OSError:
                log.debug("the reader process has ended: %s not sent", type(message).__name__)

    def submit(self, ticket: Ticket, number: int) -> None:
        self.tickets[number] = ticket
        self.send(Submit(number, ticket.request, ticket.loop))
        if not self._thread.is_alive():
            self._settle_lost()

    def close(self, within_s: float) -> None:
        """Wait for the last Results, then for the process; after ``within_s`` seconds kill it."""
        self._thread.join(within_s)
        if self._thread.is_alive():
            self.process.kill()
        self.process.wait()
        self._thread.join()
        self._socket.close()

    def _read(self) -> None:
        inbox = Inbox()
        while data := self._receive():
            for message in inbox.feed(data):
                self._take(message)
        self._refusal = self._refusal or "a stream-reader process ended before it was ready"
        self._answered.set()
        self._settle_lost()

    def _receive(self) -> bytes:
        with contextlib.suppress(OSError):
            return self._socket.recv(READ_BYTES)
        return b""

    def _take(self, message: Message) -> None:
        match message:
            case Ready(_, dilation):
                self.clock = Clock(dilation)
                self._answered.set()
            case Refused(reason):
                self._refusal = reason
                self._answered.set()
            case Returned(number, result):
                self.returned += 1
                self.tickets.pop(number).settle(result)
            case ProgressSample(progress):
                self.progress = progress
            case TimerLag(p99_s):
                self.lag_p99_s = p99_s
            case ConnectionTotals(connections):
                self.connections = connections

    def _settle_lost(self) -> None:
        self.progress = Progress(samples=self.progress.samples, stalls=self.progress.stalls)
        if not self.tickets:
            return
        code = self.process.wait()
        error = f"stream-reader process {self.process.pid} died (exit code {code}) with this request in progress"
        while self.tickets:
            _, ticket = self.tickets.popitem()
            self.lost += 1
            ticket.settle(make_result(ticket.request, ticket.loop, Outcome.ERROR, error, clock=self.clock))


def _spawn(descriptor: int) -> subprocess.Popen:
    """Start a reader that inherits one socket, in its own session, so that Ctrl-C does not reach it."""
    path = os.pathsep.join(filter(None, (str(CODE), os.environ.get("PYTHONPATH", ""))))
    return subprocess.Popen(
        [sys.executable, "-m", PROCESS, str(descriptor)],
        pass_fds=(descriptor,),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={"GRPC_EXPERIMENTS": POLLING, **os.environ, "PYTHONPATH": path},
    )


class ReaderPool:
    """Reader processes connected to one service; requests go to them in turn.

    ``first`` is the number of the first process and ``of`` how many there are in all, where other pools share the
    service (see ``Replicas``). Raises InputError for an unusable target or fewer than one process, ServerError when a
    server is not ready.
    """

    def __init__(self, target: Target | str, processes: int = 1, first: int = 0, of: int | None = None):
        self.target = Target.of(target)
        if processes < 1:
            raise InputError(f"--readers {processes} must be 1 or more")
        self._readers = [_ReaderProcess(self.target, first + number, of or processes) for number in range(processes)]
        self.submitted = 0
        try:
            for reader in self._readers:
                reader.await_ready()
        except HarnessError:
            self.close()
            raise

    @property
    def clock(self) -> Clock:
        """The clock of the servers: that of every time in a request and in a Result."""
        return self._readers[0].clock

    @property
    def returned(self) -> int:
        """Results that came from a reader. Results made up for a reader that died are counted as ``lost`` instead."""
        return sum(reader.returned for reader in self._readers)

    @property
    def lost(self) -> int:
        return sum(reader.lost for reader in self._readers)

    @property
    def lag_p99_s(self) -> float:
        """How late the readers' own timers ran (p99 of the worst reader, s), once closed: their timestamps' error."""
        return max((reader.lag_p99_s for reader in self._readers), default=math.nan)

    @property
    def connections(self) -> ConnectionStatistics:
        """Statistics of the connections to the servers, once closed."""
        return sum((reader.connections for reader in self._readers), ConnectionStatistics())

    def submit(self, request: Request, loop: str, then: Callable[[Result], None] | None = None) -> Ticket:
        """Hand over a request to be sent at its ``due_ns``, or at once if that has passed.

        ``then`` is called with the Result, in the thread that receives from the reader.
        """
        number, self.submitted = self.submitted, self.submitted + 1
        reader = self._readers[number % len(self._readers)]
        ticket = Ticket(reader, number, request, loop, then)
        reader.submit(ticket, number)
        return ticket

    def progress(self) -> Progress:
        """The streams in progress in all readers, at most about a second old."""
        return sum((reader.progress for reader in self._readers), Progress())

    def close(self, grace_s: float = 0.0) -> None:
        """Give requests in progress ``grace_s`` to finish, cut off the rest as ``unfinished``, and end the readers.

        Requests that are not yet due come back unfinished with ``sent_ns`` = 0: they were never sent. On return every
        ticket has its Result. A second call, made while the first waits, may shorten the grace.
        """
        for reader in self._readers:
            reader.send(Finish(grace_s))
        for reader in self._readers:
            reader.close(reader.clock.host_span(grace_s) + LAST_WORDS_S)
