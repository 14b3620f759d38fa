"""Exports a process's counts to its server's Prometheus page, from a thread of its own.

Each changed value is a call to the server's process, during which Triton's binding holds the interpreter. So what
serves only counts, and this thread reads the counts at intervals and tells what has changed.

A call never returns once the server has been killed, and no other thread of this process can run then, or end it.
So nothing is told to a server that is gone, and a process that hangs in a call is ended by a timer outside of the
interpreter. The thread is ended before the interpreter is: one that returns from a call after that crashes.

A metric must outlive its process: deleting it would remove the series of the same labels that other processes of the
server still use, and crash this one where the interpreter ends.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.server_metrics import (
    COUNTER,
    EXPORT_SECONDS,
    GAUGE,
    HISTOGRAM,
    KV_LIMIT,
    KV_PROMISED,
    KV_USED,
    ORPHANED,
    STAGE_SESSIONS,
    ServerMetric,
    bound,
)
from harness.vibevoice.process.hangs import ended_if_it_hangs
from harness.vibevoice.process.stubs import own_server

EVERY_S = 0.5
_END_S = 5.0  # within which the thread ends: one call on a busy host
_AGAIN = 4  # every so many updates gauges are told though they are as before: see ``Exporter.close``


@dataclass(frozen=True, slots=True)
class Reading:
    """The value of a metric: a counter's total, a gauge's value, or one observation of a histogram (None: no new one).

    ``labels`` are the values of the metric's labels, in order.
    """

    metric: ServerMetric
    value: float | None
    labels: tuple[str, ...] = ()


Source = Callable[[], Iterable[Reading]]


class Exporter:
    """Tells metric families what ``sources`` read; ``family(metric)`` creates one, as ``pb.MetricFamily``.

    ``owner``: model and process, the labels of the time that exporting takes.
    """

    def __init__(
        self, sources: Sequence[Source], family: Callable[[ServerMetric], Any], owner: tuple[str, str] | None = None
    ):
        self.sources, self.owner, self._family = sources, owner, family
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, tuple[str, ...]], Any] = {}
        for kept in (self._families, self._metrics):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))  # never deleted
        self._gauges: set[tuple[str, tuple[str, ...]]] = set()
        self._told: dict[tuple[str, tuple[str, ...]], float] = {}
        self._took_s, self._updates = 0.0, 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._server = own_server()

    def update(self, is_over: Callable[[], bool] = lambda: False) -> None:
        """Tell what has changed; stops after the call during which ``is_over`` becomes true."""
        began_s = time.perf_counter()
        try:
            with ended_if_it_hangs():
                self._tell_all(is_over)
        finally:
            self._updates += 1
            self._took_s += time.perf_counter() - began_s

    def _tell_all(self, is_over: Callable[[], bool]) -> None:
        for source in self.sources:
            for reading in source():
                self._tell(reading)
                if is_over():
                    return
        if self.owner:
            self._tell(Reading(EXPORT_SECONDS, self._took_s, self.owner))

    def keep_updated(self) -> None:
        """Update from a thread until the process ends: no thread may run while the interpreter shuts down."""

        def run() -> None:
            while not self._over.wait(EVERY_S) and self._server_lives():
                try:
                    self.update(self._over.is_set)
                except Exception as error:  # the next update includes the counts that this one missed
                    print(f"the metrics of this process could not be exported: {error}", flush=True)

        self._thread = threading.Thread(target=run, daemon=True, name="exporter")
        self._thread.start()
        atexit.register(self._must_stop)

    def close(self) -> None:
        """Tell the rest of the counts, and set the gauges to zero: Triton keeps those of a process that ended.

        Where a model is loaded again, this may overwrite the gauges of the next process, which tells them again soon.
        """
        if not self._stop():
            print(f"the last metrics of this process are lost: its exporter has not ended in {_END_S:g} s", flush=True)
            return
        self.update()
        with ended_if_it_hangs():
            for key in self._gauges:
                if self._server_lives():
                    self._metrics[key].set(0)

    def _server_lives(self) -> bool:
        return os.getppid() == self._server

    def _stop(self) -> bool:
        """End the thread; whether it has ended."""
        self._over.set()
        if self._thread:
            self._thread.join(_END_S)
        return not (self._thread and self._thread.is_alive())

    def _must_stop(self) -> None:
        """End the thread, or else the process, before its interpreter ends."""
        if not self._stop():
            sys.stdout.flush()
            os._exit(1)

    def _tell(self, reading: Reading) -> None:
        if not self._server_lives():
            return
        metric, value = reading.metric, reading.value
        key = metric.name, reading.labels
        one = self._metric(metric, reading.labels)  # also at 0: the first increase of a new series would be lost
        before = self._told.get(key)
        if value is None:
            return
        if metric.kind == HISTOGRAM:
            one.observe(value)
        elif metric.kind == GAUGE and (value != before or self._updates % _AGAIN == 0):
            one.set(value)  # first of all, also at 0: the value of an earlier process may still be there
        elif metric.kind == COUNTER and value > (before or 0.0):
            one.increment(value - (before or 0.0))
        else:
            return
        self._told[key] = value

    def _metric(self, metric: ServerMetric, labels: tuple[str, ...]):
        key = metric.name, labels
        if key not in self._metrics:
            if metric.name not in self._families:
                self._families[metric.name] = self._family(metric)
            given: dict[str, Any] = {"labels": dict(zip(metric.labels, labels, strict=True))}
            if metric.buckets:
                given["buckets"] = list(metric.buckets)
            self._metrics[key] = self._families[metric.name].Metric(**given)
            if metric.kind == GAUGE:
                self._gauges.add(key)
        return self._metrics[key]


class CountedHistogram:
    """A histogram of counters, for a Triton whose Python backend has none: the same time series.

    ``family(name, description)`` creates a family of counters.
    """

    def __init__(self, metric: ServerMetric, family: Callable[..., Any]):
        self.buckets, self.sum, self.count = (
            family(name=f"{metric.name}_{part}", description=metric.about) for part in ("bucket", "sum", "count")
        )

    def Metric(self, labels: dict[str, str], buckets: Sequence[float]) -> _CountedMetric:  # noqa: N802
        bounds = {most: {**labels, "le": bound(most)} for most in buckets} | {float("inf"): {**labels, "le": "+Inf"}}
        counters = {most: self.buckets.Metric(labels=each) for most, each in bounds.items()}
        return _CountedMetric(counters, self.sum.Metric(labels=labels), self.count.Metric(labels=labels))


@dataclass(frozen=True)
class _CountedMetric:
    buckets: dict[float, Any]
    sum: Any
    count: Any

    def observe(self, value: float) -> None:
        for most, counter in self.buckets.items():
            if value <= most:
                counter.increment(1)
        self.sum.increment(value)
        self.count.increment(1)


def session_readings(stage, owner: tuple[str, str]) -> Iterator[Reading]:
    """The sessions that a stage holds, and its KV cache if it has one; ``owner``: model and process."""
    yield Reading(STAGE_SESSIONS, len(stage.sessions), owner)
    yield Reading(ORPHANED, stage.sessions.orphaned, owner)
    if hasattr(stage, "kv_limit_bytes"):
        yield Reading(KV_USED, stage.kv_used_bytes, owner)
        yield Reading(KV_PROMISED, stage.kv_bytes, owner)
        yield Reading(KV_LIMIT, stage.kv_limit_bytes, owner)
