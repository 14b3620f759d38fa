"""The Locust user of the harness: subclass ``SpeechUser`` in a locustfile and run it with ``locust -f FILE``.

Each Locust user sends one request after another (a closed loop), or, with ``--rate``, requests leave on a seeded
schedule that no answer can delay (an open loop) and users are only hands. Chunks are timed by reader processes beside
Locust. Locust's "response time" is the time to first audio, in ms, from when the request was due.

When the time is over, requests under way get ``--stop-timeout`` seconds (10 unless given) to finish, then they are cut
off: unfinished, neither success nor failure. Ctrl-C cuts them off at once. Exit codes: 0 all is well, 1 requests
failed (Locust's own), 2 an option or the server cannot be used, 3 the measurement is INVALID, for the reasons printed.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import gevent
from locust import LoadTestShape, User, events, task
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

from harness import livepage, wire
from harness.client import BYTES_PER_SAMPLE
from harness.errors import HarnessError, InputError, ServerError
from harness.loadtest import Ledger, LoadSettings, Share, settings_of
from harness.readers import ReaderPool
from harness.recording import FILE_NAME, result_from_plain, result_to_plain
from harness.records import Outcome, Result
from harness.triton import server as triton_server
from harness.watch import Progress
from harness.workload import Mix

GRACE_S = "10"
PAUSE_AFTER_ERROR_S = 1.0  # a server that refuses at once must not be asked thousands of times a second
WORKER_REPORT_S = 1.0
WORKER_LAST_WORDS_S = 30.0
EXIT_UNUSABLE = 2
EXIT_INVALID = 3
REPOSITORY = Path(__file__).resolve().parents[1]

log = logging.getLogger(__name__)


class SpeechUser(User):
    """One caller of the speech service. Set ``mix`` to a named mix or a ``workload.Mix`` of your own.

    ``preset``: the model that is served where neither --host nor a running `harness serve` gives a server.
    """

    abstract = True
    mix: Mix | str = "quick"
    preset = "tiny"

    def __init__(self, environment):
        super().__init__(environment)
        self._spoke = False

    @task
    def speak(self) -> None:
        share = self.environment.speech.share
        if share is None or share.stopping:
            raise StopUser()
        if self.environment.speech.settings.loop == "open":
            share.wait_for_end()
            raise StopUser()
        result = share.speak(first=not self._spoke)
        self._spoke = True
        if result is not None and result.outcome is Outcome.ERROR:
            gevent.sleep(PAUSE_AFTER_ERROR_S)


class Ladder(LoadTestShape):
    """Holds each number of users for the same time, counted from when all of them run."""

    abstract = True  # not one of a locustfile's own shapes

    def __init__(self, rungs: tuple[int, ...], rung_s: float, on_rung):
        super().__init__()
        self._rungs, self._rung_s, self._on_rung = rungs, rung_s, on_rung
        self.reset_time()

    def reset_time(self) -> None:
        super().reset_time()
        self._index, self._began_ns = 0, 0

    def begin(self) -> None:
        """All users of the rung run."""
        self._began_ns = self._began_ns or time.monotonic_ns()

    def tick(self) -> tuple[int, float] | None:
        left_s = self._rung_s - (time.monotonic_ns() - self._began_ns) / 1e9
        if self._began_ns and left_s < 1:  # Locust asks once a second
            gevent.sleep(max(left_s, 0))
            self._on_rung(self._rungs[self._index], self._began_ns, time.monotonic_ns())
            self._index, self._began_ns = self._index + 1, 0
        if self._index == len(self._rungs):
            return None
        return self._rungs[self._index], float(self._rungs[-1])


class SpeechTest:
    """The load test of one Locust process: it hears Locust's events and keeps share and ledger in step with them.

    A worker has a share and sends its Results to the master, which has the ledger; a process on its own has both.
    """

    def __init__(self, environment):
        self.environment, self.runner = environment, environment.runner
        self.share: Share | None = None
        self.ledger: Ledger | None = None
        self.settings = self._settings()
        self._tests = 0
        self._outbox: list[dict] = []
        self._workers: dict[str, dict] = {}  # the master's: what each worker said last

    def start(self) -> None:
        """Raises HarnessError when options or server cannot be used."""
        self.settings = self._settings()
        self._tests += 1
        self.environment.process_exit_code = None
        url = self.environment.host
        if not url:
            raise InputError("no server is given: state its gRPC address with --host")
        self._workers.clear()
        if isinstance(self.runner, WorkerRunner):
            self._start_worker(url)
            return
        self.ledger = Ledger(self.settings, url, self._folder())
        if isinstance(self.runner, MasterRunner):
            self.environment.parsed_options.speech_workers = self.runner.worker_count
        else:
            self.share = Share(self.settings, url, self._take)
            self.ledger.start_ns = self.share.start_ns

    def all_users_run(self) -> None:
        """A closed loop's window begins when all users run; an open loop's with its schedule."""
        if self.environment.shape_class is not None:
            self.environment.shape_class.begin()
        elif self.ledger and self.settings.loop == "closed":
            self.ledger.start_ns = time.monotonic_ns()

    def finish(self, grace_s: float) -> None:
        """End the test if one is under way: every Result home, certificate printed, exit code set."""
        end_ns = time.monotonic_ns()
        share, ledger, self.share, self.ledger = self.share, self.ledger, self.share, None
        if isinstance(self.runner, WorkerRunner):
            self._finish_worker(grace_s)
            return
        if ledger is None:
            return
        self._ending = ledger
        if isinstance(self.runner, MasterRunner):
            self._finish_workers(ledger, grace_s)
        else:
            share.finish(grace_s)
            ledger.submitted, ledger.lost = share.pool.submitted, share.pool.lost
        report = ledger.close(end_ns)
        print("\n" + "\n".join(report.lines) + "\n", flush=True)
        if not report.valid and not self.runner.errors:
            self.environment.process_exit_code = EXIT_INVALID

    def progress(self) -> Progress:
        """What all readers of all processes see now."""
        if self._workers:
            return sum((Progress.from_plain(said["progress"]) for said in self._workers.values()), Progress())
        return self.share.pool.progress() if self.share else Progress()

    @property
    def results(self) -> list[Result]:
        """Of the test that runs, or ran last."""
        ledger = self.ledger or getattr(self, "_ending", None)
        return ledger.results if ledger else []

    def rung(self, users: int, start_ns: int, end_ns: int) -> None:
        if self.ledger:
            self.ledger.rung(users, start_ns, end_ns)

    def _settings(self) -> LoadSettings:
        users = {user for user in self.environment.user_classes if issubclass(user, SpeechUser)}
        if len(users) != 1:
            raise InputError(
                f"a test has one SpeechUser class, not {len(users)}: "
                "state several kinds of traffic as the weighted classes of one mix"
            )
        return settings_of(vars(self.environment.parsed_options), users.pop().mix)

    def _folder(self) -> Path | None:
        """A test started again from the page gets a folder of its own."""
        folder = self.settings.records
        return folder if folder is None or self._tests == 1 else folder.with_name(f"{folder.name}-{self._tests}")

    def _take(self, result: Result) -> None:
        (self.ledger or self._ending).take(result) if self._has_ledger else self._outbox.append(result_to_plain(result))
        self._fire(result)

    @property
    def _has_ledger(self) -> bool:
        return not isinstance(self.runner, WorkerRunner)

    def _fire(self, result: Result) -> None:
        if result.outcome not in (Outcome.DONE, Outcome.ERROR):
            return
        heard = len(result.chunks) > 0
        self.environment.events.request.fire(
            request_type="SPEECH",
            name=result.traffic_class,
            response_time=(int(result.chunks.received_ns[0]) - result.due_ns) / 1e6 if heard else None,
            response_length=int(result.chunks.samples.sum()) * BYTES_PER_SAMPLE,
            exception=ServerError(result.error) if result.outcome is Outcome.ERROR else None,
            context={},
        )
