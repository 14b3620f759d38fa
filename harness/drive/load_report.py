"""The report of one load test: the figures of its window, its SLOs, its certificate, the host, and drift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness.drive.certificate import certificate_of, window_start_ns
from harness.drive.disturbance import HostSample
from harness.drive.observed import Observed
from harness.drive.validity import Certificate, Gate
from harness.records import metrics
from harness.records.load_test import DriftRecord, HostSummary
from harness.records.schema import Outcome, Result
from harness.records.slo import Slo, Verdict, judge
from harness.records.summary import Summary

_NS = 1e9


@dataclass(frozen=True)
class SloResult:
    """An SLO and its verdict in this test."""

    slo: Slo
    verdict: Verdict


@dataclass(frozen=True)
class Drift:
    """The server over a long test, in equal parts of its window: float [parts] each, NaN in parts without data."""

    part_s: float
    step_s: np.ndarray
    memory_mib: np.ndarray

    def slope_per_hour(self, values: np.ndarray) -> float:
        """Theil-Sen: the median slope between any two parts."""
        from scipy.stats import theilslopes  # a second of CPU, and needed at the end only

        parts = np.flatnonzero(np.isfinite(values))
        slope = theilslopes(values[parts], parts).slope if len(parts) > 1 else math.nan
        return float(slope) * 3600 / self.part_s

    def record(self) -> DriftRecord:
        return DriftRecord(
            part_s=self.part_s, step_s=tuple(self.step_s.tolist()), memory_mib=tuple(self.memory_mib.tolist())
        )


@dataclass(frozen=True)
class LoadReport:
    """The report over the window [start_ns, end_ns)."""

    start_ns: int
    end_ns: int
    warm_up_s: float  # cut before the window
    summary: Summary
    certificate: Certificate
    slos: tuple[SloResult, ...]
    machine: HostSummary | None
    drift: Drift | None

    @property
    def valid(self) -> bool:
        return self.certificate.valid

    @property
    def reasons(self) -> tuple[str, ...]:
        return self.certificate.reasons

    def with_fault(self, fault: str) -> LoadReport:
        """The report with one more fault, which makes it INVALID."""
        gates = (Gate("load", False, fault), *self.certificate.gates)
        return replace(self, certificate=replace(self.certificate, gates=gates))


def report_of(observed: Observed) -> LoadReport:
    """Build the report of what a test observed."""
    start_ns, end_ns = window_start_ns(observed), observed.end_ns
    slos = observed.settings.mix.slos
    summary = metrics.summarise(observed.results, start_ns, end_ns, slos)
    return LoadReport(
        start_ns,
        end_ns,
        (start_ns - observed.start_ns) / _NS,
        summary,
        certificate_of(observed, summary, start_ns),
        judge_slos(slos, observed.results, start_ns, end_ns),
        observed.host.summary(start_ns, end_ns) if observed.host.samples else None,
        _drift(observed, start_ns, end_ns),
    )


def judge_slos(slos: Sequence[Slo], results: Sequence[Result], start_ns: int, end_ns: int) -> tuple[SloResult, ...]:
    """Judge each SLO per class: TTFA of requests due in the window, all other metrics of requests served in it.

    A request that failed without audio counts as a violation. Other requests without an RTF are left out.
    """
    if not slos:
        return ()
    rows = metrics.per_request(results, start_ns, end_ns)
    rows = rows[rows["sent_ns"] > 0]
    due = (rows["due_ns"] >= start_ns) & (rows["due_ns"] < end_ns)
    served = (rows["sent_ns"] < end_ns) & (rows["ended_ns"] >= start_ns)
    judged = []
    for slo in slos:
        of_class = rows["traffic_class"] == slo.traffic_class
        own = metrics.begun(rows[of_class & due]) if slo.metric == "ttfa_s" else rows[of_class & served]
        if slo.metric == "rtf":
            failed = (own["chunks"] == 0) & (own["outcome"] == str(Outcome.ERROR))
            own = own[own["rtf"].notna() | failed]
        judged.append(SloResult(slo, judge(slo, own[slo.metric])))
    return tuple(judged)


def _drift(observed: Observed, start_ns: int, end_ns: int) -> Drift | None:
    every_s, seconds = observed.settings.every_s, (end_ns - start_ns) / _NS
    if not every_s or seconds < metrics.MIN_PARTS * every_s:
        return None
    parts = int(seconds / every_s)
    step_s = metrics.steps_in_parts(observed.results, start_ns, end_ns, parts)
    return Drift(seconds / parts, step_s, _memory_in_parts(observed.host.samples, start_ns, end_ns, parts))


def _memory_in_parts(samples: Sequence[HostSample], start_ns: int, end_ns: int, parts: int) -> np.ndarray:
    """Mean memory of the server in each part of the window, MiB: float [parts]."""
    sums, counts = np.zeros(parts), np.zeros(parts)
    for sample in samples:
        if start_ns <= sample.at_ns < end_ns and sample.server_memory_bytes:
            part = (sample.at_ns - start_ns) * parts // (end_ns - start_ns)
            sums[part] += sample.server_memory_bytes / 2**20
            counts[part] += 1
    return np.divide(sums, counts, out=np.full(parts, math.nan), where=counts > 0)
