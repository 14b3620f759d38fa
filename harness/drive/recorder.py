"""The recorder of a load test: it collects every Result and writes it to the records folder at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from harness.client.target import Target
from harness.clock import HOST, Clock
from harness.drive.generator import LoadSettings
from harness.drive.host_monitor import HostRecord
from harness.drive.load_report import LoadReport
from harness.drive.observed import Observed, ReaderTotals
from harness.errors import StoreError
from harness.host.provenance import commit, host_facts, versions
from harness.records import metrics
from harness.records.load_log import RecordsWriter
from harness.records.load_test import HeldRung, TestEnd, TestManifest, TestRun
from harness.records.schema import Outcome, Result
from harness.records.store import replace_text, write_load_test

MANIFEST, REQUESTS = "manifest.json", "requests.csv"  # beside the records


class Recorder:
    """The Results of one test, in order, with the timestamps and faults that its report needs.

    Its times are those of ``clock``. ``folder`` None keeps the records in memory only. Raises
    StoreError where the records cannot be created.
    """

    def __init__(self, settings: LoadSettings, target: Target | str, folder: Path | None, clock: Clock = HOST):
        self.settings, self.target = settings, Target.of(target)
        self.results: list[Result] = []
        self.never_sent = self.unwritten = 0
        self.start_ns, self._dilation = clock.now_ns(), clock.dilation
        self._faults: list[str] = []
        self._ladder_ended = ""
        self._rungs: list[HeldRung] = []
        url, run_s = self.target.url, settings.load.time_limit_s
        run = TestRun(
            url=url, target=self.target.record(), run_s=run_s, dilation=clock.dilation, asked=settings.record()
        )
        self._writer, self._manifest = _opened(folder, run) if folder else (None, None)

    @property
    def faults(self) -> tuple[str, ...]:
        """Reasons why the test is INVALID whatever its gates say."""
        return tuple(self._faults)

    def begin(self, start_ns: int) -> None:
        """Note that the load starts at ``start_ns``."""
        self.start_ns = start_ns

    def all_users_run(self, now_ns: int) -> None:
        """Start the window of a closed loop; calls for later rungs of a ladder change nothing."""
        if not self._rungs:
            self.start_ns = now_ns

    def take(self, result: Result) -> None:
        """Record a Result. Requests cut off before they were due are only counted: they were never part of the load."""
        if not result.sent_ns and result.outcome is Outcome.UNFINISHED:
            self.never_sent += 1
            return
        self.results.append(result)
        if self._writer:
            self._write(self._writer.result, result)

    def add_rung(self, rung: HeldRung) -> None:
        """Note that a rung of the ladder was held."""
        self._rungs.append(rung)
        if self._writer:
            self._write(self._writer.rung, rung)

    def end_ladder(self, why: str) -> None:
        """Note why the ladder ended before its last rung."""
        self._ladder_ended = why

    def add_fault(self, fault: str) -> None:
        """Make the test INVALID because of ``fault``."""
        self._faults.append(fault)

    def first_error(self) -> str:
        """The error of the first request that failed, or ""."""
        return next((result.error for result in self.results if result.outcome is Outcome.ERROR), "")

    def observed(self, end_ns: int, readers: ReaderTotals, host: HostRecord | None = None) -> Observed:
        """Everything that the test observed until ``end_ns``."""
        return Observed(
            settings=self.settings,
            target=self.target,
            results=self.results,
            start_ns=self.start_ns,
            end_ns=max(end_ns, self.start_ns + 1),
            never_sent=self.never_sent,
            unwritten=self.unwritten,
            faults=self.faults,
            ladder_ended=self._ladder_ended,
            rungs=tuple(self._rungs),
            readers=readers,
            host=host or HostRecord(),
            dilation=self._dilation,
        )

    def store(self, observed: Observed, report: LoadReport) -> LoadReport:
        """Close the records. Return the report, which is INVALID if it could not be stored."""
        if not self._writer or not self._manifest:
            return report
        end = _end_record(observed, report)
        try:
            self._writer.end(end)
            self._manifest.conclude(end, observed.results)
        except StoreError as error:
            return report.with_fault(str(error))
        return report

    def _write(self, write: Callable, record: object) -> None:
        try:
            write(record)
        except StoreError as error:
            if not self.unwritten:
                self.add_fault(str(error))
            self.unwritten += 1


def _end_record(observed: Observed, report: LoadReport) -> TestEnd:
    """The last record of a test, as stored."""
    return TestEnd(
        origin_ns=observed.start_ns,
        start_ns=report.start_ns,
        end_ns=report.end_ns,
        warm_up_s=report.warm_up_s,
        ladder_ended=observed.ladder_ended,
        submitted=observed.readers.submitted,
        never_sent=observed.never_sent,
        lost=observed.readers.lost,
        lag_p99_s=observed.readers.lag_p99_s,
        replicas=tuple(observed.by_server()),
        valid=report.valid,
        verdict=report.certificate.verdict,
        reasons=report.reasons,
        gates=tuple((gate.name, gate.passed, gate.says) for gate in report.certificate.gates),
        slos=tuple((str(each.slo), each.verdict.met, each.verdict.value) for each in report.slos),
        machine=report.machine,
        drift=report.drift.record() if report.drift else None,
        summary=report.summary,
    )


class _Manifest:
    """The settings and the outcome of a test as JSON beside the records of every chunk."""

    def __init__(self, folder: Path, run: TestRun):
        self._folder = folder
        self._started = TestManifest(
            created_at=_now(), commit=commit(), versions=versions(), host=host_facts(), run=run
        )
        write_load_test(folder / MANIFEST, self._started)

    def conclude(self, end: TestEnd, results: Sequence[Result]) -> None:
        counts = Counter(result.outcome for result in results)
        requests = {str(outcome): counts[outcome] for outcome in Outcome}
        replace_text(self._folder / REQUESTS, metrics.per_request(results).to_csv(index=False))
        ended = replace(self._started, finished_at=_now(), requests=requests, end=end)
        write_load_test(self._folder / MANIFEST, ended)


def _opened(folder: Path, run: TestRun) -> tuple[RecordsWriter, _Manifest]:
    """Open the records and their manifest; both or neither."""
    writer = RecordsWriter(folder, run)
    try:
        return writer, _Manifest(folder, run)
    except StoreError:
        writer.discard()
        raise


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
