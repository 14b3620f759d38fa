"""A speech load test inside Locust's processes: alone in one, or a master with its workers.

A process on its own has a share of the load (all of it) and the ledger. A worker has a share and sends its Results to
the master each second; the master has the ledger, and gives the word to begin when every worker is ready, so that the
shares of an open loop are one process.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import replace
from pathlib import Path

import gevent

from harness import wire
from harness.client.replicas import ConnectionStatistics
from harness.client.response_parser import BYTES_PER_SAMPLE
from harness.client.target import Target
from harness.drive.console import end_lines, progress_line, start_line
from harness.drive.generator import LoadSettings, Share, arrival_times, lead_s
from harness.drive.options import settings_of
from harness.drive.readers.live_stats import PROGRESS_EVERY_S, Progress
from harness.drive.recorder import Ledger, Report, is_this_host
from harness.errors import HarnessError, InputError, ServerError
from harness.records.load_log import check_folder, result_from_plain, result_to_plain
from harness.records.schema import Outcome, Result
from harness.traffic.mix import Mix

WORKER_REPORT_S = 1.0
WORKER_LAST_WORDS_S = 30.0
WORKERS_READY_S = 180.0  # in which all of them can send, or the test ends: a busy host takes seconds
CSV_WAIT_S = 1.2  # Locust writes its tables once a second: this brings the last results into them
WORD_S = 0.2  # in which the word to begin reaches every worker
SAME_CLOCK_NS = 100_000_000  # clocks that count from the boot of one host differ by less, those of two by more
EXIT_UNUSABLE = 2
EXIT_INVALID = 3

log = logging.getLogger(__name__)


class SpeechTest:
    """The test of a process on its own, kept in step with Locust's events. ``results`` are of the last test.

    ``look_age_s``: how old what ``progress`` says may be.
    """

    look_age_s = PROGRESS_EVERY_S

    def __init__(self, environment, mix: Mix | str):
        self._environment, self._runner, self._mix = environment, environment.runner, mix
        self.settings = self._settings()
        self.share: Share | None = None
        self.ledger: Ledger | None = None
        self._running = self._finishing = self._all_run = False
        self._finished = threading.Event()
        self._tests = 0
        self._refused = ""  # what the server says of the first request that no retry can make right
        self.prepared = False  # the server is found, the listeners are there
        self.report: Report | None = None  # of the last test, once it has ended
        self.run_s: float | None = None  # the time limit
        self._time_limit: gevent.Greenlet | None = None

    @property
    def results(self) -> list[Result]:
        return self.ledger.results if self.ledger else []

    @property
    def running(self) -> bool:
        return self._running

    def keep_time(self, run_s: float | None) -> None:
        """Take over the time limit of the test to come: Locust's own runs before anything can be sent."""
        self.run_s = run_s

    def check(self, form: dict[str, str]) -> None:
        """Raises HarnessError for what the page's form asks, before a test that cannot run is begun with it."""
        if not self.prepared:
            raise InputError("the server is still being started: press Start again in a moment")
        values = vars(self._environment.parsed_options) | form
        settings_of(values, self._mix)
        if form.get("host"):
            Target.from_options(form["host"], values)

    def target(self) -> Target:
        """The servers. Raises InputError for what cannot be used, or where none is given."""
        if not self._environment.host:
            raise InputError("no server is given: state its gRPC address with --host grpc://host:port")
        return Target.from_options(self._environment.host, vars(self._environment.parsed_options))

    def start(self) -> None:
        """Raises HarnessError when options or server cannot be used; they may have been changed on the page."""
        self.settings, target = self._settings(), self.target()
        self._environment.process_exit_code = None
        self._tests += 1
        self._all_run, self._refused = False, ""
        self._finished.clear()
        self.report = None
        self._open(target)
        self._running = True
        self._tell_start()
        self._begin()

    def all_users_run(self) -> None:
        """A closed loop's window begins when all users (of the first rung) run; an open loop's with its schedule."""
        if self._running and not self._finishing and self.ledger and self.settings.loop == "closed":
            self._all_run = True
            self.ledger.all_users_run(time.monotonic_ns())

    def finish(self, grace_s: float) -> None:
        """End the test if one is under way: every Result home, certificate printed, exit code set.

        A second call while the first still waits (Ctrl-C during the grace) shortens the grace.
        """
        if not self._running:
            return
        if self._finishing:
            self._hurry(grace_s)
            self._finished.wait(WORKER_LAST_WORDS_S)
            return
        end_ns = time.monotonic_ns()
        self._finishing = True
        self._drop_time_limit()
        try:
            self._gather(grace_s)
            self._conclude(end_ns)
        finally:
            self._running = self._finishing = False
            self._finished.set()

    def progress(self) -> Progress:
        """What all readers see now."""
        return self.share.pool.progress() if self._running else Progress()

    def end(self) -> None:
        """End the test from within: as the time limit would."""
        runner = self._environment.runner
        gevent.spawn(runner.quit if self._environment.parsed_options.headless else runner.stop)

    def _open(self, target: Target) -> None:
        if self.settings.records:  # where they cannot be kept no load may begin, and without a server no folder
            check_folder(self._folder())
        self.share = Share(self.settings, target, self._take)
        try:
            self.ledger = Ledger(self.settings, target, self._folder(), self.run_s)
        except HarnessError:
            self.share.finish(0)
            raise
        self.ledger.watch_host()

    def _begin(self) -> None:
        """All can send: an open loop's schedule begins, and the time limit runs from its start."""
        if self.settings.loop == "open":
            self.share.begin(time.monotonic_ns() + round(lead_s(self.settings) * 1e9))
        self.ledger.start_ns = self.share.start_ns
        self._limit_time(self.ledger.start_ns)

    def _limit_time(self, start_ns: int) -> None:
        if self.run_s and not self.settings.ladder:  # a ladder ends with its last rung
            seconds = max(start_ns - time.monotonic_ns(), 0) / 1e9 + self.run_s
            self._time_limit = gevent.spawn_later(seconds, self._time_is_up)

    def _drop_time_limit(self) -> None:
        if self._time_limit is not None and self._time_limit is not gevent.getcurrent():
            self._time_limit.kill(block=False)
        self._time_limit = None

    def _time_is_up(self) -> None:
        """End the test as Locust's own time limit does."""
        options, runner = self._environment.parsed_options, self._runner
        log.info("the time limit of %g s is reached", self.run_s)
        if options.headless:
            runner.quit()
            return
        runner.stop()
        if options.autostart and options.autoquit != -1:
            gevent.sleep(options.autoquit)
            runner.quit()
            self._environment.web_ui.stop()

    def _tell_start(self) -> None:
        for remark in self.settings.scripts.remarks:
            log.warning(remark)
        log.info(start_line(self.settings, self.run_s))
        if self.settings.every_s:
            threading.Thread(target=self._keep_telling, args=(self.ledger,), daemon=True).start()

    def _keep_telling(self, ledger: Ledger) -> None:
        every_s, before = self.settings.every_s, Progress()
        while not self._finished.wait(every_s) and ledger is self.ledger:
            now = self.progress()
            seconds, looks = (time.monotonic_ns() - ledger.start_ns) / 1e9, ledger.witness.looks
            memory_bytes = looks[-1].server_memory_bytes if looks else 0
            print(progress_line(seconds, every_s, before, now, memory_bytes), flush=True)
            before = now

    def _take(self, result: Result) -> None:
        self._record(result)
        self._fire(result)

    def _record(self, result: Result) -> None:
        """Into the ledger; the last of a counted test ends it."""
        ledger = self.ledger
        kept_all = not ledger.unwritten
        ledger.take(result)
        if kept_all and ledger.unwritten:
            self.end()
        if result.error.startswith(wire.REFUSED) and not self._refused:
            self._refused = result.error.removeprefix(wire.REFUSED)
            ledger.remarks.append(f"ended at the first request that the server refuses for good: {self._refused}")
            self.end()
        if self.settings.iterations and not self._finishing:
            lead_in = self.settings.steady or 0 if self.settings.loop == "open" else 0
            if len(ledger.results) + ledger.never_sent == self.settings.iterations + lead_in:
                self.end()

    def _gather(self, grace_s: float) -> None:
        self.share.finish(grace_s)
        ledger, pool = self.ledger, self.share.pool
        ledger.submitted, ledger.lost, ledger.lag_p99_s = pool.submitted, pool.lost, pool.lag_p99_s
        ledger.fared = pool.connections

    def _hurry(self, grace_s: float) -> None:
        self.share.finish(grace_s)

    def _conclude(self, end_ns: int) -> None:
        nothing = self._nothing_sent(end_ns)
        if nothing and not self.ledger.remarks:
            self.ledger.remarks.append(nothing)
        elif self.settings.loop == "closed" and not self._all_run:
            self.ledger.remarks.append(
                "the test ended before all its users had started: give it more time, or a higher -r"
            )
        report = self.report = self.ledger.close(end_ns)
        if nothing:
            log.error("; ".join(self.ledger.remarks))
        else:
            print("\n" + "\n".join(end_lines(self.ledger, report)) + "\n", flush=True)
        if getattr(self._environment.parsed_options, "csv_prefix", None):
            gevent.sleep(CSV_WAIT_S)
        locust_says = self._environment.parsed_options.exit_code_on_error if self._runner.errors else 0
        if not report.valid and not locust_says:
            self._environment.process_exit_code = EXIT_INVALID
        if self._refused:
            self._environment.process_exit_code = EXIT_UNUSABLE

    def _nothing_sent(self, end_ns: int) -> str:
        """Why no request was sent, and what to do about it; "" where one was."""
        if self.ledger.results or self.ledger.lost:
            return ""
        ran = f"no request was sent in the {(end_ns - self.ledger.start_ns) / 1e9:.1f} s that the test ran"
        if self.settings.loop == "closed":
            return f"{ran}: no user had started; give more time with -t"
        first_s = next(iter(arrival_times(self.settings)), None)
        if first_s is None:
            return f"{ran}: the schedule holds no arrival; see --stages, --trace or --iterations"
        fix = "" if self.settings.arrivals.rate_per_s is None else ", or a higher --rate"
        return f"{ran}: the first is due {first_s:.1f} s after the start; give at least -t {first_s + 1:.0f}s{fix}"

    def _settings(self) -> LoadSettings:
        return settings_of(vars(self._environment.parsed_options), self._mix)

    def _folder(self) -> Path | None:
        """A test started again from the page gets a folder of its own."""
        folder = self.settings.records
        return folder if folder is None or self._tests == 1 else folder.with_name(f"{folder.name}-{self._tests}")

    def _fire(self, result: Result) -> None:
        """Locust's own event; unfinished and cancelled requests are neither success nor failure."""
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


class MasterTest(SpeechTest):
    """The ledger of all workers' Results."""

    look_age_s = PROGRESS_EVERY_S + WORKER_REPORT_S

    def __init__(self, environment, mix: Mix | str):
        super().__init__(environment, mix)
        self._said: dict[str, dict] = {}  # what each worker said last
        self._shift_ns: dict[str, int] = {}  # from the clock of each worker to ours
        self._begun = False
        environment.parsed_options.speech_workers = 1
        environment.runner.register_message("speech", self._hear)

    def progress(self) -> Progress:
        return sum((Progress.from_plain(said["progress"]) for said in self._said.values()), Progress())

    def _open(self, target: Target) -> None:
        self._said.clear()
        self._begun = False
        self._wall_ns = wall_ns()
        self._expected = {client.id for client in self._runner.clients.all}
        self._environment.parsed_options.speech_workers = max(len(self._expected), 1)
        self.ledger = Ledger(self.settings, target, self._folder(), self.run_s)
        self.ledger.watch_host()
        gevent.spawn_later(WORKERS_READY_S, self._give_up, self._tests)

    def _begin(self) -> None:
        """Not yet: when all workers can send."""

    def _give_up(self, test: int) -> None:
        if self._running and not self._finishing and not self._begun and test == self._tests:
            late = ", ".join(sorted(self._expected - self._said.keys()))
            self.ledger.remarks.append(f"after {WORKERS_READY_S:.0f} s these workers could not send yet: {late}")
            self.end()

    def _hear(self, environment, msg) -> None:
        if not self._running:
            return
        said = msg.data
        self._shift_ns[msg.node_id] = _shift_ns(said["wall_ns"], self._wall_ns)
        for plain in said.pop("results"):
            self._record(_shifted(result_from_plain(plain), self._shift_ns[msg.node_id]))
        self._said[msg.node_id] = said
        self._begin_when_all_are_ready()

    def _begin_when_all_are_ready(self) -> None:
        here = self._expected & set(self._runner.clients)
        if self._begun or self._finishing or not here <= self._said.keys():
            return
        self._begun = True
        if self.settings.loop == "open":
            self.ledger.start_ns = time.monotonic_ns() + round((lead_s(self.settings) + WORD_S) * 1e9)
            word = {"start_ns": self.ledger.start_ns, "wall_ns": self._wall_ns}
            self._runner.send_message("speech_begin", word)
        self._limit_time(max(self.ledger.start_ns, time.monotonic_ns()))

    def _gather(self, grace_s: float) -> None:
        self._hurry(grace_s)
        deadline_s = time.monotonic() + grace_s + WORKER_LAST_WORDS_S
        while self._silent() & set(self._runner.clients) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        said = self._said.values()
        self.ledger.submitted = sum(each["submitted"] for each in said)
        self.ledger.lost = sum(each["lost"] for each in said)
        self.ledger.lag_p99_s = max((each["lag_p99_s"] for each in said), default=math.nan)
        self.ledger.fared = sum(
            (ConnectionStatistics.from_plain(each["fared"]) for each in said), ConnectionStatistics()
        )
        one_clock = len(set(self._shift_ns.values())) < 2
        self.ledger.readers_see_servers_clock = one_clock and all(each["sees_servers_clock"] for each in said)
        self.ledger.remarks += self._remarks()
        self.ledger.notes += self._notes()

    def _hurry(self, grace_s: float) -> None:
        self._runner.send_message("speech_finish", {"grace_s": grace_s})

    def _silent(self) -> set[str]:
        return {worker for worker in self._expected if not self._said.get(worker, {}).get("done")}

    def _remarks(self) -> list[str]:
        own = self.settings.record()
        remarks = [f"worker {worker} never reported its last results" for worker in sorted(self._silent())]
        remarks += sorted({said["failed"] for said in self._said.values() if said["failed"]})
        for worker, said in sorted(self._said.items()):
            other = [key for key, value in said["record"].items() if value != own[key]]
            if other:
                remarks.append(f"worker {worker} has another {', '.join(other)}: give all the same options and files")
        return remarks

    def _notes(self) -> list[str]:
        shifted = sum(shift_ns != 0 for shift_ns in self._shift_ns.values())
        if not shifted:
            return []
        return [
            f"{shifted} of {len(self._shift_ns)} workers ran on other hosts: their times were brought to ours by the "
            "wall clocks of both; time to first audio, RTF and stalls are differences on one host"
        ]


class WorkerTest(SpeechTest):
    """One share of the load; its Results go to the master."""

    def __init__(self, environment, mix: Mix | str):
        super().__init__(environment, mix)
        self._outbox: list[dict] = []
        environment.runner.register_message("speech_begin", self._begin_on_request, concurrent=True)
        environment.runner.register_message("speech_finish", self._finish_on_request, concurrent=True)

    def start(self) -> None:
        try:
            super().start()
        except HarnessError as error:
            self._say(done=True, failed=str(error))
            raise

    def _tell_start(self) -> None:
        """The master does."""

    def _begin(self) -> None:
        """When the master says so."""

    def _open(self, target: Target) -> None:
        options = self._environment.parsed_options
        self._wall_ns, self._sees_servers_clock = wall_ns(), is_this_host(target)
        self.share = Share(self.settings, target, self._take, self._runner.worker_index, options.speech_workers)
        threading.Thread(target=self._keep_reporting, args=(self.share,), daemon=True).start()

    def _take(self, result: Result) -> None:
        self._outbox.append(result_to_plain(result))
        self._fire(result)

    def _conclude(self, end_ns: int) -> None:
        self._say(done=True)

    def _gather(self, grace_s: float) -> None:
        self.share.finish(grace_s)

    def _begin_on_request(self, environment, msg) -> None:
        if self.share and not self.share.stopping:
            self.share.begin(msg.data["start_ns"] - _shift_ns(self._wall_ns, msg.data["wall_ns"]))

    def _finish_on_request(self, environment, msg) -> None:
        self.finish(msg.data["grace_s"])

    def _keep_reporting(self, share: Share) -> None:
        while not share.stopping:
            self._say()
            time.sleep(WORKER_REPORT_S)

    def _say(self, *, done: bool = False, failed: str = "") -> None:
        results, self._outbox = self._outbox, []
        share = self.share
        message = {
            "results": results,
            "progress": (share.pool.progress() if share and not done else Progress()).to_plain(),
            "submitted": share.pool.submitted if share else 0,
            "lost": share.pool.lost if share else 0,
            "lag_p99_s": share.pool.lag_p99_s if share else math.nan,
            "fared": (share.pool.connections if share else ConnectionStatistics()).to_plain(),
            "wall_ns": self._wall_ns if share else wall_ns(),
            "sees_servers_clock": self._sees_servers_clock if share else True,
            "record": self.settings.record(),
            "done": done,
            "failed": failed,
        }
        self._runner.send_message("speech", message)


def wall_ns() -> int:
    """What to add to this host's monotonic clock to have the time of day: it tells hosts apart."""
    return time.time_ns() - time.monotonic_ns()


def _shift_ns(their_wall_ns: int, our_wall_ns: int) -> int:
    """What to add to a monotonic time of theirs to have it by our clock; 0 on one host."""
    shift_ns = their_wall_ns - our_wall_ns
    return 0 if abs(shift_ns) < SAME_CLOCK_NS else shift_ns


def _shifted(result: Result, by_ns: int) -> Result:
    """A Result as if it had been timed by a clock that reads ``by_ns`` more; 0 is a request that was never sent."""
    if not by_ns:
        return result
    sent_ns = result.sent_ns and result.sent_ns + by_ns
    chunks = result.chunks
    chunks = replace(chunks, received_ns=chunks.received_ns + by_ns, sent_at_ns=chunks.sent_at_ns + by_ns)
    return replace(
        result, due_ns=result.due_ns + by_ns, sent_ns=sent_ns, ended_ns=result.ended_ns + by_ns, chunks=chunks
    )
