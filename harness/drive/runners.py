"""A speech load test in a single Locust process, driven by Locust's events; ``distributed`` is for several.

It generates the load (its ``Share``), records every Result (``Recorder``), samples the host (``HostMonitor``), and
builds the report at the end.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import gevent

from harness import exit_codes, wire
from harness.client.response_parser import BYTES_PER_SAMPLE
from harness.client.target import Target, is_this_host
from harness.clock import HOST, Clock
from harness.drive.console import end_lines, progress_line, start_line
from harness.drive.generator import LoadSettings, Share, UserClass, arrival_times, lead_s
from harness.drive.host_monitor import HostMonitor
from harness.drive.load_report import LoadReport, report_of
from harness.drive.observed import ReaderTotals
from harness.drive.options import settings_for
from harness.drive.readers.live_stats import PROGRESS_EVERY_S, Progress
from harness.drive.recorder import Recorder
from harness.errors import HarnessError, InputError, ServerError
from harness.records.load_log import check_folder
from harness.records.schema import Outcome, Result

FINISH_S = 30.0  # the longest that finishing a test takes
CSV_WAIT_S = 1.2  # Locust writes its tables once a second; waiting this long gets the last results into them

Part = TypeVar("Part")
FindUsers = Callable[[Sequence[str]], Sequence[UserClass]]  # no names: what Locust would run

log = logging.getLogger(__name__)


class SpeechTest:
    """The test of a single process, driven by Locust's events. ``results`` are those of the last test.

    ``progress_age_s``: how old ``progress`` may be.
    """

    progress_age_s = PROGRESS_EVERY_S

    def __init__(self, environment, find_users: FindUsers):
        self._environment, self._runner, self._find_users = environment, environment.runner, find_users
        self._run_s: float | None = None  # the time limit of the next test
        self.settings = self._settings()
        self.share: Share | None = None
        self.recorder: Recorder | None = None
        self.host_monitor: HostMonitor | None = None
        self._running = self._finishing = self._all_run = False
        self._finished = threading.Event()
        self._tests = 0
        self._refused = ""  # the server's message for the first request that no retry can fix
        self.prepared = False  # the server is found and the listeners are added
        self.report: LoadReport | None = None  # of the last test, once it has ended
        self._time_limit: gevent.Greenlet | None = None

    @property
    def results(self) -> list[Result]:
        return self.recorder.results if self.recorder else []

    @property
    def running(self) -> bool:
        return self._running

    @property
    def recording(self) -> Recorder:
        """The recorder of the present test, or of the last one. Raises HarnessError before the first."""
        return _begun(self.recorder)

    @property
    def monitoring(self) -> HostMonitor:
        """The monitor of this host in the present test, or in the last one. Raises HarnessError before the first."""
        return _begun(self.host_monitor)

    @property
    def clock(self) -> Clock:
        """The clock of the servers of the present test, or of the last one: that of every time in its records."""
        return self.share.clock if self.share else HOST

    @property
    def sending(self) -> Share:
        """This process's share of the present test, or of the last one. Raises HarnessError before the first."""
        return _begun(self.share)

    def keep_time(self, run_s: float | None) -> None:
        """Take over the time limit of the next test, since Locust's own clock starts before anything can be sent."""
        self._run_s = run_s

    def check(self, form: dict[str, str], user_classes: Sequence[str] = ()) -> None:
        """Raise HarnessError where a test with the page's form could not run."""
        if not self.prepared:
            raise InputError("the server is still being started: press Start again in a moment")
        values = vars(self._environment.parsed_options) | form
        settings_for(values, self._find_users(user_classes))
        if form.get("host"):
            Target.from_options(form["host"], values)

    def target(self) -> Target:
        """The servers. Raises InputError where none is given or one is unusable."""
        if not self._environment.host:
            raise InputError("no server is given: give its gRPC address with --host grpc://host:port")
        return Target.from_options(self._environment.host, vars(self._environment.parsed_options))

    def start(self) -> None:
        """Start a test. Raises HarnessError when options (which the page may have changed) or server cannot be used."""
        self.settings, target = self._settings(), self.target()
        self._environment.process_exit_code = None
        self._tests += 1
        self._all_run, self._refused = False, ""
        self._finished.clear()
        self.report = None
        self._open(target)
        self._running = True
        self._announce()
        self._begin()

    def all_users_run(self) -> None:
        """Start a closed loop's window: all users (of the first rung) run. An open loop starts with its schedule."""
        if self._running and not self._finishing and self.recorder and self.settings.load.loop == "closed":
            self._all_run = True
            self.recorder.all_users_run(self.clock.now_ns())

    def finish(self, grace_s: float) -> None:
        """End the test, if one runs: collect every Result, print the certificate, set the exit code.

        A second call while the first still waits (Ctrl-C during the grace) shortens the grace.
        """
        if not self._running:
            return
        if self._finishing:
            self._hurry(grace_s)
            self._finished.wait(FINISH_S)
            return
        end_ns = self.clock.now_ns()
        self._finishing = True
        self._drop_time_limit()
        try:
            self._conclude(end_ns, self._gather(grace_s))
        finally:
            self._running = self._finishing = False
            self._finished.set()

    def progress(self) -> Progress:
        """The streams in progress in all readers."""
        return self.sending.pool.progress() if self._running else Progress()

    def end(self) -> None:
        """End the test from within, as the time limit would."""
        runner = self._environment.runner
        gevent.spawn(runner.quit if self._environment.parsed_options.headless else runner.stop)

    def _open(self, target: Target) -> None:
        if folder := self._folder():  # before any load, but not without a server
            check_folder(folder)
        share = self.share = Share(self.settings, target, self._take)
        try:
            self._open_records(target)
        except HarnessError:
            share.finish(0)
            raise

    def _open_records(self, target: Target) -> None:
        self.recorder = Recorder(self.settings, target, self._folder(), self.clock)
        here = [address for address in target.addresses if is_this_host(address)]
        ports = [int(address.rpartition(":")[2]) for address in here]
        self.host_monitor = HostMonitor(ports, clock=self.clock)

    def _begin(self) -> None:
        """Start the load: everything can send. The schedule of an open loop and the time limit count from here."""
        share = self.sending
        if self.settings.load.loop == "open":
            share.begin(self.clock.now_ns() + round(lead_s(self.settings) * 1e9))
        self.recording.begin(share.start_ns)
        self._limit_time(share.start_ns)

    def _limit_time(self, start_ns: int) -> None:
        if limit_s := self.settings.load.time_limit_s:
            seconds = self.clock.host_span(max(start_ns - self.clock.now_ns(), 0) / 1e9 + limit_s)
            self._time_limit = gevent.spawn_later(seconds, self._time_is_up)

    def _drop_time_limit(self) -> None:
        if self._time_limit is not None and self._time_limit is not gevent.getcurrent():
            self._time_limit.kill(block=False)
        self._time_limit = None

    def _time_is_up(self) -> None:
        """End the test as Locust's own time limit does."""
        options, runner = self._environment.parsed_options, self._runner
        log.info("the time limit of %g s is reached", self.settings.load.time_limit_s)
        if options.headless:
            runner.quit()
            return
        runner.stop()
        if options.autostart and options.autoquit != -1:
            gevent.sleep(options.autoquit)
            runner.quit()
            self._environment.web_ui.stop()

    def _announce(self) -> None:
        for remark in self.settings.scripts.remarks:
            log.warning(remark)
        log.info(start_line(self.settings))
        if every_s := self.settings.every_s:
            arguments = self.recorder, self.monitoring, every_s
            threading.Thread(target=self._keep_reporting_progress, args=arguments, daemon=True).start()

    def _keep_reporting_progress(self, recorder: Recorder, host: HostMonitor, every_s: float) -> None:
        before = Progress()
        while not self._finished.wait(self.clock.host_span(every_s)) and recorder is self.recorder:
            now, seconds = self.progress(), (self.clock.now_ns() - recorder.start_ns) / 1e9
            print(progress_line(seconds, every_s, before, now, host.server_memory_bytes), flush=True)
            before = now

    def _take(self, result: Result) -> None:
        self._record(result)
        self._fire(result)

    def _record(self, result: Result) -> None:
        """Record a Result; end the test after the last iteration, or if the server permanently rejects requests."""
        recorder = self.recording
        wrote_all = not recorder.unwritten
        recorder.take(result)
        if wrote_all and recorder.unwritten:
            self.end()
        if result.error.startswith(wire.REFUSED) and not self._refused:
            self._refused = result.error.removeprefix(wire.REFUSED)
            recorder.add_fault(f"ended at the first request that the server rejects permanently: {self._refused}")
            self.end()
        if self.settings.load.iterations and not self._finishing:
            lead_in = self.settings.load.steady or 0 if self.settings.load.loop == "open" else 0
            if len(recorder.results) + recorder.never_sent == self.settings.load.iterations + lead_in:
                self.end()

    def _gather(self, grace_s: float) -> ReaderTotals:
        """End the load; every Result is recorded on return."""
        self.sending.finish(grace_s)
        pool = self.sending.pool
        return ReaderTotals(pool.submitted, pool.lost, pool.lag_p99_s, pool.connections, is_this_host(pool.target))

    def _hurry(self, grace_s: float) -> None:
        self.sending.finish(grace_s)

    def _conclude(self, end_ns: int, readers: ReaderTotals) -> None:
        """Judge the test, store and print its report, and set the exit code."""
        nothing_sent = self._why_nothing_was_sent(end_ns, readers)
        self._add_faults(nothing_sent, readers)
        observed = self.recording.observed(end_ns, readers, self.monitoring.close())
        report = self.report = self.recording.store(observed, report_of(observed))
        if nothing_sent:
            log.error("; ".join((*observed.faults, *readers.faults)))
        else:
            print("\n" + "\n".join(end_lines(observed, report)) + "\n", flush=True)
        if getattr(self._environment.parsed_options, "csv_prefix", None):
            gevent.sleep(CSV_WAIT_S)
        self._set_exit_code(report)

    def _add_faults(self, nothing_sent: str, readers: ReaderTotals) -> None:
        if nothing_sent and not (self.recording.faults or readers.faults):
            self.recording.add_fault(nothing_sent)
        elif self.settings.load.loop == "closed" and not self._all_run:
            self.recording.add_fault(
                "the test ended before all its users had started: give it more time, or a higher -r"
            )

    def _set_exit_code(self, report: LoadReport) -> None:
        """Set the exit code of an INVALID test, unless requests failed: then Locust sets its own."""
        failures_count = self._runner.errors and self._environment.parsed_options.exit_code_on_error
        if not report.valid and not failures_count:
            self._environment.process_exit_code = exit_codes.INVALID
        if self._refused:
            self._environment.process_exit_code = exit_codes.UNUSABLE

    def _why_nothing_was_sent(self, end_ns: int, readers: ReaderTotals) -> str:
        """Why no request was sent and how to fix it; "" if one was sent."""
        if self.recording.results or readers.lost:
            return ""
        ran = f"no request was sent in the {(end_ns - self.recording.start_ns) / 1e9:.1f} s that the test ran"
        arrivals = self.settings.load.arrivals
        if arrivals is None:
            return f"{ran}: no user had started; give more time with -t"
        first_s = next(iter(arrival_times(self.settings)), None)
        if first_s is None:
            return f"{ran}: the schedule holds no arrival; see --stages, --trace or --iterations"
        fix = "" if arrivals.rate_per_s is None else ", or a higher --rate"
        return f"{ran}: the first is due {first_s:.1f} s after the start; give at least -t {first_s + 1:.0f}s{fix}"

    def _settings(self) -> LoadSettings:
        values = {**vars(self._environment.parsed_options), "run_time": self._run_s}
        return settings_for(values, self._find_users(self._picked()))

    def _picked(self) -> Sequence[str]:
        """Names of the test's user classes; empty for the classes that Locust would run."""
        return ()

    def _folder(self) -> Path | None:
        """The records folder; a test started again from the page gets a new one."""
        folder = self.settings.records
        return folder if folder is None or self._tests == 1 else folder.with_name(f"{folder.name}-{self._tests}")

    def _fire(self, result: Result) -> None:
        """Fire Locust's request event; unfinished and cancelled requests are neither success nor failure."""
        if result.outcome not in (Outcome.DONE, Outcome.ERROR):
            return
        heard = len(result.chunks) > 0
        self._environment.events.request.fire(
            request_type="SPEECH",
            name=result.traffic_class,
            response_time=(int(result.chunks.received_ns[0]) - result.due_ns) / 1e6 if heard else None,
            response_length=int(result.chunks.samples.sum()) * BYTES_PER_SAMPLE,
            exception=ServerError(result.error) if result.outcome is Outcome.ERROR else None,
            context={},
        )


def _begun(part: Part | None) -> Part:
    if part is None:
        raise HarnessError("no load test has started yet: start one first")
    return part
