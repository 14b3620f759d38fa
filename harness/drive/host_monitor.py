"""What else happened on the host of a test: CPU stolen or used by others, the server's memory, its restarts.

A sample reads /proc in a thread of the load generator and takes some milliseconds; it sends the server nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import psutil

from harness.records.load_test import HostSummary

INTERVAL_S = 5.0


@dataclass(frozen=True)
class HostSample:
    """The host at one moment. Shares are of all cores since the previous sample; NaN in the first sample."""

    at_ns: int
    stolen_share: float  # by the hypervisor
    busy_share: float
    other_share: float  # busy with neither the harness nor the server
    server_memory_bytes: int  # of the server and its children; 0 if it runs on another host


@dataclass(frozen=True)
class HostRecord:
    """The samples of one test, and its events: server processes that ended or started."""

    samples: tuple[HostSample, ...] = ()
    events: tuple[str, ...] = ()

    def summary(self, start_ns: int, end_ns: int) -> HostSummary:
        """Means and maxima of the samples in [start_ns, end_ns], as shares of the host's cores, and all events."""
        inside = [each for each in self.samples if start_ns <= each.at_ns <= end_ns and not math.isnan(each.busy_share)]
        return HostSummary(
            samples=len(inside),
            cores=os.cpu_count(),
            stolen_share=_mean(each.stolen_share for each in inside),
            stolen_share_max=max((each.stolen_share for each in inside), default=None),
            busy_share=_mean(each.busy_share for each in inside),
            other_share=_mean(each.other_share for each in inside),
            other_share_max=max((each.other_share for each in inside), default=None),
            server_memory_bytes=inside[-1].server_memory_bytes if inside else 0,
            server_events=self.events,
        )


class HostMonitor:
    """Samples this host until ``close()``. ``ports``: ports of the servers on this host; empty if there are none."""

    def __init__(self, ports: Sequence[int], interval_s: float = INTERVAL_S):
        self.samples: list[HostSample] = []
        self.events: list[str] = []
        self._ports = ports
        self._began_ns = time.monotonic_ns()
        self._host: tuple[float, float, float] | None = None
        self._used: dict[psutil.Process, float] = {}
        self._main: dict[int, psutil.Process | None] = {}  # by port
        self._server: dict[psutil.Process, str] = {}
        self._sampling, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._run, args=(interval_s,), daemon=True).start()

    @property
    def server_memory_bytes(self) -> int:
        """The server's memory at the last sample; 0 before the first."""
        return self.samples[-1].server_memory_bytes if self.samples else 0

    def close(self) -> HostRecord:
        """Take a last sample and stop."""
        if not self._closed.is_set():
            self._closed.set()
            self._sample()
        return HostRecord(tuple(self.samples), tuple(self.events))

    def _run(self, interval_s: float) -> None:
        while not self._closed.is_set():
            self._sample()
            self._closed.wait(interval_s)

    def _sample(self) -> None:
        with self._sampling:
            own, server = _tree(psutil.Process()), self._server_tree()
            if psutil.Process() in server:  # the harness may be a child of its server, as the server may be of it
                server = {process: name for process, name in server.items() if process not in own}
            self._note_changes(server)
            stolen, busy, other = self._shares({process: _cpu_s(process) for process in {*own, *server}})
            memory = sum(map(_resident_bytes, server))
            self.samples.append(HostSample(time.monotonic_ns(), stolen, busy, other, memory))

    def _server_tree(self) -> dict[psutil.Process, str]:
        tree = {}
        for port in self._ports:
            main = self._main.get(port)
            if not (main and main.is_running()):
                main = self._main[port] = _listener(port)
            tree |= _tree(main)
        return tree

    def _shares(self, used: dict[psutil.Process, float]) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        idle = times.idle + times.iowait
        busy = times.user + times.nice + times.system + times.irq + times.softirq
        before, self._host = self._host, (times.steal, busy, idle + busy + times.steal)
        ours = sum(seconds - self._used.get(process, seconds) for process, seconds in used.items())
        self._used = used
        if before is None or self._host[2] <= before[2]:
            return math.nan, math.nan, math.nan
        stolen, busy, total = (now - then for now, then in zip(self._host, before, strict=True))
        return stolen / total, busy / total, max(busy - ours, 0.0) / total

    def _note_changes(self, server: dict[psutil.Process, str]) -> None:
        if self.samples:
            at = f"{(time.monotonic_ns() - self._began_ns) / 1e9:.0f} s"
            gone = [self._server[each] for each in self._server.keys() - server.keys()]
            came = [server[each] for each in server.keys() - self._server.keys()]
            self.events += [f"{name} of the server ended by {at}" for name in sorted(gone)]
            self.events += [f"{name} of the server started by {at}" for name in sorted(came)]
        self._server = server


def _listener(port: int) -> psutil.Process | None:
    """The process that listens on a port of this host; None if its owner is hidden from us."""
    with contextlib.suppress(psutil.Error, OSError):
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid:
                return psutil.Process(each.pid)
    return None


def _tree(root: psutil.Process | None) -> dict[psutil.Process, str]:
    """A process and its descendants, each with a label for the report."""
    tree = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in [root, *root.children(recursive=True)] if root else ():
            with contextlib.suppress(psutil.Error):
                tree[each] = _label(each)
    return tree


def _label(process: psutil.Process) -> str:
    """``process 123 (tritonserver)``; a stage process is labelled with its model, taken from its command line."""
    models = [part for word in process.cmdline() if word.endswith("model.py") for part in word.split("/")[-3:-2]]
    return f"process {process.pid} ({models[0] if models else process.name()})"


def _cpu_s(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        return sum(process.cpu_times()[:2])
    return 0.0


def _resident_bytes(process: psutil.Process) -> int:
    """Memory that belongs to this process alone; shared pages would be counted once per process."""
    with contextlib.suppress(psutil.Error):
        memory = process.memory_info()
        return memory.rss - memory.shared
    return 0


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None
