"""What else happened on the host of a test: CPU stolen or used by others, the server's memory, its restarts.

A sample reads /proc in a thread of the load generator and takes some milliseconds; it sends the server nothing.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import psutil

from harness.clock import HOST, Clock
from harness.drive.disturbance import HostLoad, HostSample, load_between
from harness.host.cpu_time import HostTime, ProcessTime, descendants, processes, used_by, used_s
from harness.records.load_test import HostSummary

INTERVAL_S = 1.0
LEADER_VARIABLE = "HARNESS_LEADER"  # pid of the process that started the load generator for a trial
_LOOK_AGAIN_S = 5.0  # for the owner of a port, where it is not found: that search is expensive
_FRESH_S = 0.2  # a sample over a shorter time would be coarse: the clocks tick in 10 ms
_NAMED = 5  # of the other processes of a sample
# They listen in place of a server whose processes are in a container, hidden from this host's view.
_FORWARDERS = ("docker-proxy", "rootlessport", "rootlesskit", "slirp4netns", "pasta")


@dataclass(frozen=True)
class HostRecord:
    """The samples of one test, and its events: server processes that ended or started."""

    samples: tuple[HostSample, ...] = ()
    events: tuple[str, ...] = ()
    cores: int = os.cpu_count() or 1

    def load(self, start_ns: int, end_ns: int) -> HostLoad | None:
        """Who used the CPU over [start_ns, end_ns); None where it is not known."""
        return load_between(self.samples, self.cores, start_ns, end_ns)

    def summary(self, start_ns: int, end_ns: int) -> HostSummary:
        """Means and maxima of the samples in [start_ns, end_ns], as shares of the host's cores, and all events."""
        inside = [each for each in self.samples if start_ns <= each.at_ns <= end_ns and not math.isnan(each.busy_share)]
        known = [each for each in inside if not math.isnan(each.other_share)]
        other_share = _mean(each.other_share for each in known)
        return HostSummary(
            samples=len(inside),
            cores=self.cores,
            stolen_share=_mean(each.stolen_share for each in inside),
            stolen_share_max=max((each.stolen_share for each in inside), default=None),
            busy_share=_mean(each.busy_share for each in inside),
            other_share=None if other_share is None else max(other_share, 0.0),
            other_share_max=max((max(each.other_share, 0.0) for each in known), default=None),
            server_memory_bytes=inside[-1].server_memory_bytes if inside else 0,
            server_events=self.events,
        )


class HostMonitor:
    """Samples this host until ``close()``. ``ports``: ports of the servers on this host; empty if there are none.

    Times of its samples are those of the servers' ``clock``.
    """

    def __init__(self, ports: Sequence[int], interval_s: float = INTERVAL_S, clock: Clock = HOST):
        self.samples: list[HostSample] = []
        self.events: list[str] = []
        self._ports, self._clock = ports, clock
        self._began_ns = clock.now_ns()
        self._roots = {os.getpid(), *_leader()}
        self._host: HostTime | None = None
        self._cores = os.cpu_count() or 1
        self._processes: dict[int, ProcessTime] = {}
        self._main: dict[int, psutil.Process | None] = {}  # by port
        self._looked_s = -math.inf  # when the owner of a port was last looked for
        self._server: dict[tuple[int, int], str] = {}
        self._sampling, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._run, args=(interval_s,), daemon=True).start()

    @property
    def server_memory_bytes(self) -> int:
        """The server's memory at the last sample; 0 before the first."""
        return self.samples[-1].server_memory_bytes if self.samples else 0

    def count_as_own(self, pid: int) -> None:
        """Count another process of this host, and its children, as part of the harness: a worker of the load test."""
        self._roots.add(pid)

    def load(self, start_ns: int, end_ns: int) -> HostLoad | None:
        """Who used the CPU over [start_ns, end_ns), until now at most; None where it is not known."""
        if not self._closed.is_set():
            self._sample()
        return self.record().load(start_ns, end_ns)

    def record(self) -> HostRecord:
        return HostRecord(tuple(self.samples), tuple(self.events), self._cores)

    def close(self) -> HostRecord:
        """Take a last sample and stop."""
        if not self._closed.is_set():
            self._closed.set()
            self._sample()
        return self.record()

    def _run(self, interval_s: float) -> None:
        while not self._closed.is_set():
            self._sample()
            self._closed.wait(interval_s)

    def _sample(self) -> None:
        with self._sampling:
            if self._host and time.monotonic() - self._host.at_s < _FRESH_S and not self._closed.is_set():
                return
            host, found = HostTime.read(), processes()
            server = self._server_pids(found)
            self._note_changes({pid: found[pid] for pid in server})
            members = descendants(found, self._roots) | server
            before, self._host, self._cores = self._host, host, host.cores
            used, self._processes = used_s(self._processes, found), found
            memory = sum(map(_resident_bytes, server))
            known = all(self._main.get(port) for port in self._ports)
            sample = _sampled(before, host, used_by(used, members) if known else math.nan, memory)
            others = _largest(used, found, members, sample.seconds) if known else ()
            self.samples.append(_on_clock(replace(sample, others=others), self._clock))

    def _server_pids(self, found: Mapping[int, ProcessTime]) -> set[int]:
        gone = [port for port in self._ports if not (main := self._main.get(port)) or not main.is_running()]
        if gone and time.monotonic() - self._looked_s >= _LOOK_AGAIN_S:
            self._looked_s = time.monotonic()
            self._main |= {port: _listener(port) for port in gone}
        server = descendants(found, [main.pid for main in self._main.values() if main and main.is_running()])
        # The harness may be a child of its server, as the server may be of it.
        return server - descendants(found, [os.getpid()]) if os.getpid() in server else server

    def _note_changes(self, server: Mapping[int, ProcessTime]) -> None:
        named = {(each.pid, each.started): each for each in server.values()}
        labels = {key: self._server.get(key) or _label(each) for key, each in named.items()}
        if self.samples:
            at = f"{(self._clock.now_ns() - self._began_ns) / 1e9:.0f} s"
            gone = [self._server[each] for each in self._server.keys() - labels.keys()]
            came = [labels[each] for each in labels.keys() - self._server.keys()]
            self.events += [f"{name} of the server ended by {at}" for name in sorted(gone)]
            self.events += [f"{name} of the server started by {at}" for name in sorted(came)]
        self._server = labels


def _leader() -> list[int]:
    """The process that started this one for a trial, such as a sign-off: it and its children are the harness too."""
    pid = os.environ.get(LEADER_VARIABLE, "")
    return [int(pid)] if pid.isdigit() else []


def _sampled(before: HostTime | None, now: HostTime, own_s: float, memory_bytes: int) -> HostSample:
    """A sample from two readings; its shares are NaN for the first, and where the host does not count its idle time."""
    at_ns, nan = round(now.at_s * 1e9), math.nan
    seconds = now.at_s - before.at_s if before else 0.0
    whole_s = seconds * now.cores
    if before is None or not 0.5 < (now.counted_s - before.counted_s) / max(whole_s, 1e-9) < 1.5:
        return HostSample(at_ns, seconds, nan, nan, nan, nan, memory_bytes)
    stolen_s, interrupts_s = now.stolen_s - before.stolen_s, now.interrupts_s - before.interrupts_s
    busy_s = min(max(whole_s - (now.idle_s - before.idle_s) - stolen_s, 0.0), whole_s)
    other_s = busy_s - interrupts_s - own_s
    return HostSample(
        at_ns, seconds, stolen_s / whole_s, busy_s / whole_s, own_s / whole_s, other_s / whole_s, memory_bytes
    )


def _on_clock(sample: HostSample, clock: Clock) -> HostSample:
    """A sample with the host's times on a server's clock; shares stay as they are."""
    return replace(sample, at_ns=clock.of_host(sample.at_ns), seconds=sample.seconds / clock.dilation)


def _largest(
    used: Mapping[int, float], found: Mapping[int, ProcessTime], members: set[int], seconds: float
) -> tuple[tuple[str, int, float], ...]:
    """Name, pid and cores of the other processes that used most."""
    if seconds <= 0:
        return ()
    others = {pid: each / seconds for pid, each in used.items() if pid not in members and each > 0}
    return tuple((found[pid].name, pid, others[pid]) for pid in heapq.nlargest(_NAMED, others, key=lambda p: others[p]))


def _listener(port: int) -> psutil.Process | None:
    """The process that listens on a port of this host; None if its owner is hidden from us, or only forwards."""
    with contextlib.suppress(psutil.Error, OSError):
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid:
                process = psutil.Process(each.pid)
                return None if process.name() in _FORWARDERS else process
    return None


def _label(process: ProcessTime) -> str:
    """``process 123 (tritonserver)``; a stage process is labelled with its model, taken from its command line."""
    words: list[str] = []
    with contextlib.suppress(psutil.Error):
        words = psutil.Process(process.pid).cmdline()
    models = [part for word in words if word.endswith("model.py") for part in word.split("/")[-3:-2]]
    return f"process {process.pid} ({models[0] if models else process.name})"


def _resident_bytes(pid: int) -> int:
    """Memory that belongs to this process alone; shared pages would be counted once per process."""
    with contextlib.suppress(psutil.Error):
        memory = psutil.Process(pid).memory_info()
        return memory.rss - memory.shared
    return 0


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None
