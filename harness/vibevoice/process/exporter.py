"""Exports a process's counts to its server's Prometheus page, from a thread of its own.

Each changed value is a call to the server's process. So what serves only counts, and this thread reads the counts at
intervals and tells what has changed.
"""

from __future__ import annotations

import atexit
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

EVERY_S = 0.5


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

    ``owner``: model and process, the labels of the CPU time that exporting takes.
    """

    def __init__(
        self, sources: Sequence[Source], family: Callable[[ServerMetric], Any], owner: tuple[str, str] | None = None
    ):
        self.sources, self.owner, self._family = sources, owner, family
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._told: dict[tuple[str, tuple[str, ...]], float] = {}
        self._took_s = 0.0

    def update(self) -> None:
        began_s = time.thread_time()
        try:
            for source in self.sources:
                for reading in source():
                    self._tell(reading)
            if self.owner:
                self._tell(Reading(EXPORT_SECONDS, self._took_s, self.owner))
        finally:
            self._took_s += time.thread_time() - began_s

    def keep_updated(self) -> None:
        """Update from a thread until the process ends: no thread may run while the interpreter shuts down."""
        over = threading.Event()

        def run() -> None:
            while not over.wait(EVERY_S):
                try:
                    self.update()
                except Exception as error:  # the next update includes the counts that this one missed
                    print(f"the metrics of this process could not be exported: {error}", flush=True)

        thread = threading.Thread(target=run, daemon=True, name="exporter")
        thread.start()
        atexit.register(thread.join, 2 * EVERY_S)
        atexit.register(over.set)  # registered last, called first

    def _tell(self, reading: Reading) -> None:
        metric, value = reading.metric, reading.value
        key = metric.name, reading.labels
        one = self._metric(metric, reading.labels)  # also at 0: the first increase of a new series would be lost
        before = self._told.get(key)
        if value is None:
            return
        if metric.kind == HISTOGRAM:
            one.observe(value)
        elif metric.kind == GAUGE and value != before:
            one.set(value)  # once even at 0: the value of an earlier process may still be there
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
        return self._metrics[key]


class CountedHistogram:
    """A histogram of counters, for a Triton whose Python backend has none (before 24.12): the same time series.

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
