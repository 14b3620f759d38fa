"""What one load test observed: the facts behind its certificate, its report and its stored records."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from harness.client.replicas import ConnectionStatistics
from harness.client.target import Target
from harness.drive.generator import LoadSettings
from harness.drive.host_monitor import HostRecord
from harness.records.load_test import HeldRung, ServerRequests
from harness.records.schema import Outcome, Result


@dataclass(frozen=True)
class ReaderTotals:
    """Counts of all readers of a test, known at its end.

    ``lost``: requests whose reader died. ``lag_p99_s``: how late the readers' own timers ran (of the worst reader).
    ``share_servers_clock``: whether all readers ran on the servers' host. ``faults``: each makes the test INVALID.
    """

    submitted: int = 0
    lost: int = 0
    lag_p99_s: float = math.nan
    connections: ConnectionStatistics = field(default_factory=ConnectionStatistics)
    share_servers_clock: bool = True
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Observed:
    """One load test from ``start_ns``, when all processes could send, to ``end_ns``.

    ``results``: requests that were sent; ``never_sent`` counts those cut off before they were due. ``unwritten``:
    records that could not be written. ``faults``: each makes the test INVALID. ``ladder_ended``: why a ladder ended
    before its last rung, or "". ``rungs``: those of a ladder, each as often as it was held. ``dilation``: how many
    times slower than these times the servers ran.
    """

    settings: LoadSettings
    target: Target
    results: Sequence[Result]
    start_ns: int
    end_ns: int
    never_sent: int = 0
    unwritten: int = 0
    faults: tuple[str, ...] = ()
    ladder_ended: str = ""
    rungs: tuple[HeldRung, ...] = ()
    readers: ReaderTotals = ReaderTotals()
    host: HostRecord = HostRecord()
    dilation: float = 1.0

    @property
    def recorded(self) -> int:
        """Requests whose Result came from a reader and was kept."""
        return len(self.results) + self.never_sent - self.readers.lost - self.unwritten

    def failed(self) -> list[Result]:
        return [result for result in self.results if result.outcome is Outcome.ERROR]

    def by_server(self) -> list[ServerRequests]:
        """Requests to each server, and statistics of the connections to it."""
        requests, connections = Counter(result.target for result in self.results), self.readers.connections
        return [
            ServerRequests(
                address=each,
                requests=requests[each],
                reconnects=connections.reconnects[each],
                passed_over=connections.passed_over[each],
                forgotten=connections.forgotten[each],
            )
            for each in self.target.addresses
        ]
