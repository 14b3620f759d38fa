"""A speech load test over several processes: the master records, each worker generates a share of the load.

Each worker sends its Results to the master once a second. The master orders the start when every worker is able to
send, so that the shares of an open loop together form one arrival process.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import gevent
from pydantic import InstanceOf

from harness.client.replicas import ConnectionStatistics
from harness.client.target import Target, is_this_host
from harness.clock import HOST
from harness.content import read
from harness.drive.generator import Share, lead_s
from harness.drive.observed import ReaderTotals
from harness.drive.readers.live_stats import PROGRESS_EVERY_S, Progress
from harness.drive.runners import FINISH_S, FindUsers, SpeechTest
from harness.errors import HarnessError, InputError
from harness.records.load_log import result_from_plain, result_to_plain
from harness.records.load_test import AskedLoad
from harness.records.schema import Result

WORKER_REPORT_S = 1.0
WORKERS_READY_S = 180.0  # for all workers to become able to send; busy hosts take seconds
ORDER_S = 0.2  # for the order to start to reach every worker
SAME_CLOCK_NS = 100_000_000  # monotonic clocks of one host differ by less, those of two hosts by more


@dataclass(frozen=True)
class WorkerReport:
    """What a worker tells its master each second. ``results``: those since the last report.

    ``wall_ns``: see ``wall_ns()``. ``record``: the worker's ``LoadSettings.record``. ``done``: this is the last report.
    ``failed``: why the worker could not send, or "". ``pid``: of the worker.
    """

    KIND = "speech"  # of Locust's messages

    results: tuple[InstanceOf[Result], ...]
    progress: InstanceOf[Progress]
    submitted: int
    lost: int
    lag_p99_s: float
    connections: InstanceOf[ConnectionStatistics]
    wall_ns: int
    shares_servers_clock: bool
    record: InstanceOf[AskedLoad]
    done: bool
    failed: str
    pid: int

    def to_plain(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plain | {
            "results": list(map(result_to_plain, self.results)),
            "progress": self.progress.to_plain(),
            "connections": self.connections.to_plain(),
            "record": self.record.to_dict(),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> WorkerReport:
        """Read a message. Raises ValueError, TypeError, KeyError or AttributeError for any other."""
        parts = {
            "results": tuple(map(result_from_plain, plain["results"])),
            "record": AskedLoad.of(plain["record"]),
            "progress": Progress.from_plain(plain["progress"]),
            "connections": ConnectionStatistics.from_plain(plain["connections"]),
        }
        return read(cls, {**plain, **parts})


@dataclass(frozen=True)
class Begin:
    """The master's order to start at ``start_ns`` on its clock; ``wall_ns`` is the master's ``wall_ns()``."""

    KIND = "speech_begin"

    start_ns: int
    wall_ns: int


@dataclass(frozen=True)
class End:
    """The master's order to finish within ``grace_s`` seconds."""

    KIND = "speech_finish"

    grace_s: float


class MasterTest(SpeechTest):
    """Records the Results of all workers."""

    progress_age_s = PROGRESS_EVERY_S + WORKER_REPORT_S

    def __init__(self, environment, find_users: FindUsers):
        super().__init__(environment, find_users)
        self._reports: dict[str, WorkerReport] = {}  # the last report of each worker
        self._shift_ns: dict[str, int] = {}  # from each worker's clock to ours
        self._unreadable: set[str] = set()  # workers
        self._begun = False
        environment.parsed_options.speech_workers = 1
        environment.runner.register_message(WorkerReport.KIND, self._hear)

    def progress(self) -> Progress:
        return sum((report.progress for report in self._reports.values()), Progress())

    def _open(self, target: Target) -> None:
        self._reports.clear()
        self._unreadable.clear()
        self._begun = False
        self._wall_ns = wall_ns()
        self._expected = {client.id for client in self._runner.clients.all}
        options = self._environment.parsed_options  # Locust sends them to the workers
        options.speech_workers = max(len(self._expected), 1)
        options.speech_users = [each.name for each in self.settings.users]
        self._open_records(target)
        gevent.spawn_later(WORKERS_READY_S, self._give_up, self._tests)

    def _begin(self) -> None:
        """Do nothing yet: the test starts when all workers can send."""

    def _give_up(self, test: int) -> None:
        if self._running and not self._finishing and not self._begun and test == self._tests:
            late = ", ".join(sorted(self._expected - self._reports.keys()))
            self.recording.add_fault(f"after {WORKERS_READY_S:.0f} s these workers were not able to send: {late}")
            self.end()

    def _hear(self, environment, msg) -> None:
        if not self._running:
            return
        try:
            report = WorkerReport.from_plain(msg.data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self._take_for_lost(msg.node_id, error)
            return
        self._shift_ns[msg.node_id] = _shift_ns(report.wall_ns, self._wall_ns)
        if not self._shift_ns[msg.node_id]:  # a worker of this host is no disturbance, whoever started it
            self.monitoring.count_as_own(report.pid)
        for result in report.results:
            self._record(_shifted(result, self._shift_ns[msg.node_id]))
        known = any(each.failed for each in self._reports.values())
        self._reports[msg.node_id] = replace(report, results=())
        if not report.failed:
            self._begin_when_all_are_ready()
        elif not (known or self._finishing):  # no share of a load is that load: end at once
            self.end()

    def _take_for_lost(self, worker: str, error: Exception) -> None:
        """Make the test INVALID, once per worker: its requests are missing."""
        if worker not in self._unreadable:
            self._unreadable.add(worker)
            self.recording.add_fault(f"worker {worker} sent a message that cannot be read: {error}")

    def _begin_when_all_are_ready(self) -> None:
        here = self._expected & set(self._runner.clients)
        refused = any(each.failed for each in self._reports.values())
        if refused or self._begun or self._finishing or not here <= self._reports.keys():
            return
        self._begun = True
        if self.settings.load.loop == "open":
            self.recording.begin(time.monotonic_ns() + round((lead_s(self.settings) + ORDER_S) * 1e9))
            self._runner.send_message(Begin.KIND, asdict(Begin(self.recording.start_ns, self._wall_ns)))
        self._limit_time(max(self.recording.start_ns, time.monotonic_ns()))

    def _gather(self, grace_s: float) -> ReaderTotals:
        self._hurry(grace_s)
        deadline_s = time.monotonic() + grace_s + FINISH_S
        while self._silent() & set(self._runner.clients) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        reports = self._reports.values()
        one_clock = len(set(self._shift_ns.values())) < 2
        return ReaderTotals(
            submitted=sum(each.submitted for each in reports),
            lost=sum(each.lost for each in reports),
            lag_p99_s=max((each.lag_p99_s for each in reports), default=math.nan),
            connections=sum((each.connections for each in reports), ConnectionStatistics()),
            share_servers_clock=one_clock and all(each.shares_servers_clock for each in reports),
            faults=tuple(self._faults()),
            notes=tuple(self._notes()),
        )

    def _hurry(self, grace_s: float) -> None:
        self._runner.send_message(End.KIND, asdict(End(grace_s)))

    def _silent(self) -> set[str]:
        """Workers whose last report has not arrived."""
        return {each for each in self._expected if each not in self._reports or not self._reports[each].done}

    def _faults(self) -> list[str]:
        own = self.settings.record().to_dict()
        faults = [f"worker {worker} never reported its last results" for worker in sorted(self._silent())]
        faults += sorted({report.failed for report in self._reports.values() if report.failed})
        for worker, report in sorted(self._reports.items()):
            theirs = report.record.to_dict()
            other = [key for key in own | theirs if theirs.get(key) != own.get(key)]
            if other:
                faults.append(
                    f"worker {worker} has a different {', '.join(other)}: give all workers the same options and files"
                )
        return faults

    def _notes(self) -> list[str]:
        shifted = sum(shift_ns != 0 for shift_ns in self._shift_ns.values())
        if not shifted:
            return []
        return [
            f"{shifted} of {len(self._shift_ns)} workers ran on other hosts: their times were converted to the "
            "master's clock by the hosts' wall clocks; TTFA, RTF and stalls are differences of times on one host"
        ]


class WorkerTest(SpeechTest):
    """One share of the load; its Results are sent to the master."""

    def __init__(self, environment, find_users: FindUsers):
        super().__init__(environment, find_users)
        self._outbox: list[Result] = []
        environment.runner.register_message(Begin.KIND, self._begin_on_order, concurrent=True)
        environment.runner.register_message(End.KIND, self._end_on_order, concurrent=True)

    def start(self) -> None:
        try:
            super().start()
        except HarnessError as error:
            self._report(done=True, failed=str(error))
            raise

    def _picked(self) -> Sequence[str]:
        return getattr(self._environment.parsed_options, "speech_users", ())

    def _announce(self) -> None:
        """Do nothing: the master prints the start line."""

    def _begin(self) -> None:
        """Do nothing: the master orders the start."""

    def _open(self, target: Target) -> None:
        options = self._environment.parsed_options
        self._wall_ns, self._shares_servers_clock = wall_ns(), is_this_host(target)
        self.share = Share(self.settings, target, self._take, self._runner.worker_index, options.speech_workers)
        if self.share.clock != HOST:
            self.share.finish(0)
            raise InputError(
                "a server with time dilation needs a load from one Locust process: leave out --processes and workers"
            )
        threading.Thread(target=self._keep_reporting, args=(self.share,), daemon=True).start()

    def _take(self, result: Result) -> None:
        self._outbox.append(result)
        self._fire(result)

    def _conclude(self, end_ns: int, readers: ReaderTotals) -> None:
        self._report(done=True)

    def _begin_on_order(self, environment, msg) -> None:
        order = read(Begin, msg.data)
        if self.share and not self.share.stopping:
            self.share.begin(order.start_ns - _shift_ns(self._wall_ns, order.wall_ns))

    def _end_on_order(self, environment, msg) -> None:
        self.finish(read(End, msg.data).grace_s)

    def _keep_reporting(self, share: Share) -> None:
        while not share.stopping:
            self._report()
            time.sleep(WORKER_REPORT_S)

    def _report(self, *, done: bool = False, failed: str = "") -> None:
        results, self._outbox = self._outbox, []
        share = self.share
        report = WorkerReport(
            results=tuple(results),
            progress=share.pool.progress() if share and not done else Progress(),
            submitted=share.pool.submitted if share else 0,
            lost=share.pool.lost if share else 0,
            lag_p99_s=share.pool.lag_p99_s if share else math.nan,
            connections=share.pool.connections if share else ConnectionStatistics(),
            wall_ns=self._wall_ns if share else wall_ns(),
            shares_servers_clock=self._shares_servers_clock if share else True,
            record=self.settings.record(),
            done=done,
            failed=failed,
            pid=os.getpid(),
        )
        self._runner.send_message(WorkerReport.KIND, report.to_plain())


def wall_ns() -> int:
    """This host's wall clock minus its monotonic clock, in ns. It differs between hosts."""
    return time.time_ns() - time.monotonic_ns()


def _shift_ns(their_wall_ns: int, our_wall_ns: int) -> int:
    """What to add to a monotonic time of the other host to convert it to our clock, in ns; 0 on the same host."""
    shift_ns = their_wall_ns - our_wall_ns
    return 0 if abs(shift_ns) < SAME_CLOCK_NS else shift_ns


def _shifted(result: Result, by_ns: int) -> Result:
    """A Result with its times moved by ``by_ns``; a time of 0 (a request that was never sent) stays 0."""
    if not by_ns:
        return result
    sent_ns = result.sent_ns and result.sent_ns + by_ns
    chunks = result.chunks
    chunks = replace(chunks, received_ns=chunks.received_ns + by_ns, sent_at_ns=chunks.sent_at_ns + by_ns)
    return replace(
        result, due_ns=result.due_ns + by_ns, sent_ns=sent_ns, ended_ns=result.ended_ns + by_ns, chunks=chunks
    )
