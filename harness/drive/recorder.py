"""The ledger of a load test: every Result, what they add up to, and whether they count."""

from __future__ import annotations

import itertools
import math
import re
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from scipy.stats import theilslopes

from harness.client.replicas import ConnectionStatistics
from harness.client.target import Target
from harness.drive.generator import LoadSettings, arrival_times
from harness.drive.host_monitor import Look, Witness
from harness.drive.validity import MAX_LATENESS_P99_S, Certificate, Due, Gate, certify
from harness.errors import StoreError
from harness.host.provenance import commit, host_facts, versions
from harness.records import metrics
from harness.records.load_log import RecordsWriter, mixture
from harness.records.schema import Outcome, Result
from harness.records.slo import Promise, Verdict, judge
from harness.records.store import LOAD_TEST, replace_text, write_json

MANIFEST, REQUESTS = "manifest.json", "requests.csv"  # beside the records
ERRORS_SHOWN = 3  # kinds of them; requests.csv has all
_NS = 1e9


@dataclass(frozen=True)
class Kept:
    """A promise and what the test says of it."""

    promise: Promise
    verdict: Verdict


@dataclass(frozen=True)
class Drift:
    """The server over a long test, in equal parts of its window: float [parts] each, NaN where there was nothing."""

    part_s: float
    step_s: np.ndarray
    memory_mib: np.ndarray

    def slope_per_hour(self, values: np.ndarray) -> float:
        """Theil-Sen: the median slope between any two parts."""
        parts = np.flatnonzero(np.isfinite(values))
        slope = theilslopes(values[parts], parts).slope if len(parts) > 1 else math.nan
        return float(slope) * 3600 / self.part_s


@dataclass(frozen=True)
class Report:
    """How a test went over its window, [start_ns, end_ns)."""

    start_ns: int
    end_ns: int
    warm_up_s: float  # cut before the window
    summary: dict[str, float]
    certificate: Certificate
    promises: tuple[Kept, ...]
    machine: dict
    drift: Drift | None

    @property
    def valid(self) -> bool:
        return self.certificate.valid

    @property
    def reasons(self) -> tuple[str, ...]:
        return self.certificate.reasons


class Ledger:
    """Every Result of one test, written to the records folder as it comes, and what they add up to."""

    def __init__(self, settings: LoadSettings, target: Target | str, folder: Path | None, run_s: float | None = None):
        self.settings, self.target = settings, Target.of(target)
        self.results: list[Result] = []
        self.never_sent = 0
        self.submitted = self.lost = 0
        self.lag_p99_s = math.nan  # how late the readers' own timers ran
        self.remarks: list[str] = []  # each makes the test INVALID
        self.notes: list[str] = []  # what a reader should know
        self.fared = ConnectionStatistics()  # the connections to the servers
        self.readers_see_servers_clock = is_this_host(self.target)
        self.start_ns = time.monotonic_ns()
        self.witness: Witness | None = None
        self.unwritten = 0  # records that the folder did not take
        self._rungs = 0  # that have been held
        self.ladder_ended = ""  # why before its last rung
        asked = {"url": self.target.url, "target": self.target.record(), "run_s": run_s, **settings.record()}
        self._writer, self._manifest = _opened(folder, asked) if folder else (None, None)

    def watch_host(self) -> None:
        """From now on note what else goes on here; ``close`` ends it."""
        here = [address for address in self.target.addresses if is_this_host(address)]
        self.witness = Witness([int(address.rpartition(":")[2]) for address in here])

    def take(self, result: Result) -> None:
        """Requests cut off before they were due are only counted: they were never part of the load."""
        if not result.sent_ns and result.outcome is Outcome.UNFINISHED:
            self.never_sent += 1
            return
        self.results.append(result)
        if self._writer:
            self._keep(self._writer.result, result)

    def all_users_run(self, now_ns: int) -> None:
        """The window begins; on every rung after the first it has begun."""
        if not self._rungs:
            self.start_ns = now_ns

    def rung(self, users: int, start_ns: int, end_ns: int) -> None:
        self._rungs += 1
        if self._writer:
            self._keep(self._writer.rung, {"users": users, "start_ns": start_ns, "end_ns": end_ns})

    def _keep(self, write: Callable, record: object) -> None:
        try:
            write(record)
        except StoreError as error:
            if not self.unwritten:
                self.remarks.append(str(error))
            self.unwritten += 1

    def first_error(self) -> str:
        """What the first request that failed so far failed with, or ""."""
        return next((result.error for result in self.results if result.outcome is Outcome.ERROR), "")

    def close(self, end_ns: int) -> Report:
        """Fold the Results up to ``end_ns`` into a report and end the records file."""
        end_ns = max(end_ns, self.start_ns + 1)
        start_ns = self._settled_ns(end_ns)
        if self.witness:
            self.witness.close()
        summary = metrics.summarise(self.results, start_ns, end_ns, self.settings.mix.promises)
        report = Report(
            start_ns,
            end_ns,
            (start_ns - self.start_ns) / _NS,
            summary,
            self._certificate(summary, start_ns, end_ns),
            kept_promises(self.settings.mix.promises, self.results, start_ns, end_ns),
            self.witness.account(start_ns, end_ns) if self.witness else {},
            self._drift(start_ns, end_ns),
        )
        return self._stored(report) if self._writer else report

    def _stored(self, report: Report) -> Report:
        """The report, INVALID where it cannot be stored: whoever asked for records must not find out later."""
        try:
            self._writer.end(self._end(report))
            self._manifest.conclude(self._end(report), self.results)
        except StoreError as error:
            gates = (Gate("load", False, str(error)), *report.certificate.gates)
            return replace(report, certificate=replace(report.certificate, gates=gates))
        return report

    def _settled_ns(self, end_ns: int) -> int:
        """An open loop that began empty has a warm-up; other loads hold their level from the start, or never."""
        arrivals = self.settings.arrivals
        if arrivals is None or self.settings.steady or not arrivals.is_steady:
            return self.start_ns
        return metrics.settled_ns(self.results, self.start_ns, end_ns)

    def _certificate(self, summary: dict[str, float], start_ns: int, end_ns: int) -> Certificate:
        lateness_s, notes = self._lateness_s(summary["lateness_p99_s"])
        certificate = certify(
            {**summary, "lateness_p99_s": lateness_s},
            submitted=self.submitted,
            recorded=len(self.results) + self.never_sent - self.lost - self.unwritten,
            due=self._due(start_ns, end_ns),
            promises=self.settings.mix.promises,
            unsteady=self._unsteady(),
            failures=self._failures(),
            notes=(
                *self._errors(),
                *self.notes,
                *self._of_replicas(),
                *notes,
                *(self.witness.events if self.witness else ()),
            ),
        )
        remarks = (Gate("load", False, remark) for remark in (*self.remarks, *mixture(self.results)))
        return replace(certificate, gates=(*remarks, *certificate.gates))

    def _failures(self) -> str:
        """Of all requests, in the window or not."""
        failed, requests = sum(each.outcome is Outcome.ERROR for each in self.results), len(self.results)
        return f"{failed} of {requests} requests failed ({100 * failed / requests:.3g}%)" if failed else ""

    def _errors(self) -> Iterator[str]:
        """The most frequent kinds of error, each with the first of its kind: they may differ in their numbers."""
        kinds: dict[str, list[str]] = defaultdict(list)
        for error in (each.error for each in self.results if each.outcome is Outcome.ERROR):
            kinds[re.sub(r"\d+", "", error)].append(error)
        for errors in sorted(kinds.values(), key=len, reverse=True)[:ERRORS_SHOWN]:
            yield f"{len(errors)} failed with: {errors[0]}"

    def replicas(self) -> list[dict[str, str | int]]:
        """What each server got, and how the connections to it fared."""
        sent = Counter(result.target for result in self.results)
        counts = {name: getattr(self.fared, name) for name in ("reconnects", "passed_over", "forgotten")}
        return [
            {"address": each, "requests": sent[each], **{name: count[each] for name, count in counts.items()}}
            for each in self.target.addresses
        ]

    def _of_replicas(self) -> Iterator[str]:
        replicas = self.replicas()
        if len(replicas) > 1:
            shares = ", ".join(f"{each['address']} {each['requests']}" for each in replicas)
            yield f"requests to each of {len(replicas)} servers, {self.target.balance}: {shares}"
        for each in replicas:
            if each["reconnects"]:
                yield f"connections to {each['address']} that were lost and made again: {each['reconnects']}"
            if each["passed_over"]:
                yield f"requests that passed over {each['address']} because it was down: {each['passed_over']}"
            if each["forgotten"]:
                yield (
                    f"{each['address']} does not remember {each['forgotten']} requests or more that it served: it, or "
                    "its entry, was started again meanwhile (or several servers answer there)"
                )

    def _unsteady(self) -> str:
        if self.settings.ladder:
            return "not asked for: the load of a ladder rises by design"
        arrivals = self.settings.arrivals
        if arrivals is not None and not arrivals.is_steady:
            return f"not asked for: the rate of {arrivals.kind} arrivals changes by design"
        return ""

    def _due(self, start_ns: int, end_ns: int) -> Due | None:
        arrivals, origin_ns = self.settings.arrivals, self.start_ns
        if arrivals is None:
            return None
        due_ns = (origin_ns + round(time_s * _NS) for time_s in arrival_times(self.settings))
        due_ns = list(itertools.takewhile(lambda each: each < end_ns, due_ns))
        inside = [each for each in due_ns if each >= start_ns]
        from_s, to_s = ((edge_ns - origin_ns) / _NS for edge_ns in (start_ns, end_ns))
        ended_by_count = len(due_ns) == self.settings.iterations
        expected = math.nan if ended_by_count else arrivals.expected(to_s) - arrivals.expected(from_s)
        return Due(arrivals, len(inside), expected, self._farthest_s(inside, start_ns, end_ns))

    def _farthest_s(self, due_ns: Sequence[int], start_ns: int, end_ns: int) -> float:
        """The largest difference between when a request was due and when the process has it; 0 where numbers differ."""
        own_ns = sorted(each.due_ns for each in self.results if start_ns <= each.due_ns < end_ns)
        if len(own_ns) != len(due_ns):
            return 0.0
        return max((abs(one - other) for one, other in zip(own_ns, due_ns, strict=True)), default=0) / _NS

    def _lateness_s(self, lateness_s: float) -> tuple[float, list[str]]:
        """The lateness to judge: that of chunks, or of the readers' own timers where chunks cannot tell."""
        if not self.readers_see_servers_clock:
            return self.lag_p99_s, ["chunk lateness is not known: the server has another clock than the readers"]
        if not lateness_s > MAX_LATENESS_P99_S >= self.lag_p99_s:
            return lateness_s, []
        return self.lag_p99_s, [
            f"chunks came up to {lateness_s * 1e3:.0f} ms (p99) after the server had stamped them; the readers "
            f"were on time to {self.lag_p99_s * 1e3:.1f} ms (p99), so the server delivered them late"
        ]

    def _drift(self, start_ns: int, end_ns: int) -> Drift | None:
        every_s, seconds = self.settings.every_s, (end_ns - start_ns) / _NS
        if not every_s or seconds < metrics.MIN_PARTS * every_s:
            return None
        parts = int(seconds / every_s)
        step_s = metrics.steps_in_parts(self.results, start_ns, end_ns, parts)
        looks = self.witness.looks if self.witness else []
        return Drift(seconds / parts, step_s, _memory_in_parts(looks, start_ns, end_ns, parts))

    def _end(self, report: Report) -> dict:
        return {
            "origin_ns": self.start_ns,
            "start_ns": report.start_ns,
            "end_ns": report.end_ns,
            "warm_up_s": report.warm_up_s,
            "ladder_ended": self.ladder_ended,
            "submitted": self.submitted,
            "never_sent": self.never_sent,
            "lost": self.lost,
            "lag_p99_s": self.lag_p99_s,
            "replicas": self.replicas(),
            "valid": report.valid,
            "verdict": report.certificate.verdict,
            "reasons": list(report.reasons),
            "gates": [[gate.name, gate.passed, gate.says] for gate in report.certificate.gates],
            "promises": [[str(each.promise), each.verdict.met, each.verdict.value] for each in report.promises],
            "machine": report.machine,
            "drift": _plain_drift(report.drift),
            "summary": report.summary,
        }


class _Manifest:
    """What a test was and how it went, for people and their tools, beside the records of every chunk."""

    def __init__(self, folder: Path, asked: dict):
        self._folder = folder
        self._content = {
            "kind": LOAD_TEST,
            "created_at": _now(),
            "finished_at": None,  # as long as it runs, and for ever where it was killed
            "commit": commit(),
            "versions": versions(),
            "host": host_facts(),
            "load": asked,
        }
        write_json(folder / MANIFEST, self._content)

    def conclude(self, end: dict, results: Sequence[Result]) -> None:
        counts = Counter(result.outcome for result in results)
        judged = ("valid", "verdict", "reasons", "gates")
        went = {
            "finished_at": _now(),
            "requests": {str(outcome): counts[outcome] for outcome in Outcome},
            "certificate": {name: end[name] for name in judged},
            "measured": {name: value for name, value in end.items() if name not in judged},
        }
        replace_text(self._folder / REQUESTS, metrics.per_request(results).to_csv(index=False))
        write_json(self._folder / MANIFEST, self._content | went)


def _opened(folder: Path, asked: dict) -> tuple[RecordsWriter, _Manifest]:
    """The records and their manifest, both or none."""
    writer = RecordsWriter(folder, asked)
    try:
        return writer, _Manifest(folder, asked)
    except StoreError:
        writer.discard()
        raise


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def kept_promises(
    promises: Sequence[Promise], results: Sequence[Result], start_ns: int, end_ns: int
) -> tuple[Kept, ...]:
    """Each promise judged by its class: first audio of requests due in the window, the rest of those served in it.

    A request that failed without audio keeps it from being met; of the others, those without an RTF are left out.
    """
    if not promises:
        return ()
    rows = metrics.per_request(results, start_ns, end_ns)
    rows = rows[rows["sent_ns"] > 0]
    due = (rows["due_ns"] >= start_ns) & (rows["due_ns"] < end_ns)
    served = (rows["sent_ns"] < end_ns) & (rows["ended_ns"] >= start_ns)
    kept = []
    for promise in promises:
        own = rows[(rows["traffic_class"] == promise.traffic_class) & (due if promise.metric == "ttfa_s" else served)]
        if promise.metric == "rtf":
            failed = (own["chunks"] == 0) & (own["outcome"] == str(Outcome.ERROR))
            own = own[own["rtf"].notna() | failed]
        kept.append(Kept(promise, judge(promise, own[promise.metric])))
    return tuple(kept)


def is_this_host(target: Target | str) -> bool:
    """Whether all servers share our clock: only an address of this host can be bound to."""
    return all(_is_ours(address.rpartition(":")[0].strip("[]")) for address in Target.of(target).addresses)


def _is_ours(host: str) -> bool:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def _memory_in_parts(looks: Sequence[Look], start_ns: int, end_ns: int, parts: int) -> np.ndarray:
    """Mean memory of the server in each part of the window, MiB: float [parts]."""
    sums, counts = np.zeros(parts), np.zeros(parts)
    for look in looks:
        if start_ns <= look.at_ns < end_ns and look.server_memory_bytes:
            part = (look.at_ns - start_ns) * parts // (end_ns - start_ns)
            sums[part] += look.server_memory_bytes / 2**20
            counts[part] += 1
    return np.divide(sums, counts, out=np.full(parts, math.nan), where=counts > 0)


def _plain_drift(drift: Drift | None) -> dict | None:
    if drift is None:
        return None
    return {"part_s": drift.part_s, "step_s": drift.step_s.tolist(), "memory_mib": drift.memory_mib.tolist()}
