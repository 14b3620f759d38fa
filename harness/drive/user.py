"""The Locust user of the harness: subclass ``SpeechUser`` in a locustfile and run it with ``locust -f FILE``.

Each Locust user sends one request after another (a closed loop), or, with ``--rate``, ``--trace`` or ``--stages``,
requests leave on a seeded schedule that no answer can delay (an open loop) and users are only hands. Chunks are
timed by reader processes beside Locust. Locust's "response time" is the time to first audio, in ms, from when the
request was due.

``-t`` counts from when all readers, those of all workers, can send. When the time is over, requests under way get
``--stop-timeout`` seconds (10 unless given) to finish, then they are cut off: unfinished, neither success nor failure.
Ctrl-C cuts them off at once. Exit codes: 0 all is well, 1 requests failed (Locust's own), 2 an option or the server
cannot be used, 3 the measurement is INVALID (also where nothing was sent), for the reasons printed.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack

import gevent
from locust import LoadTestShape, User, events, task
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

from harness import wire
from harness.deploy.server import local_url, serving
from harness.drive import web_ui
from harness.drive.distributed import MasterTest, WorkerTest
from harness.drive.options import add_arguments, defaults_of, give_way
from harness.drive.readers.pool import ReaderPool
from harness.drive.runners import EXIT_UNUSABLE, SpeechTest
from harness.drive.stop_rule import Held, Patience, Readings
from harness.errors import HarnessError, InputError
from harness.records.load_log import check_folder
from harness.records.schema import Outcome
from harness.traffic.mix import Mix
from harness.traffic.voice_folder import BUILT_IN

EXIT_INTERRUPTED = 130
GRACE_S = "10"
PAUSE_AFTER_ERROR_S = 1.0  # a server that refuses at once must not be asked thousands of times a second

# Under gevent a process is started by a fork, and gRPC's own fork handlers can crash the child before it becomes one.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

log = logging.getLogger(__name__)


class SpeechUser(User):
    """One caller of the speech service. Set ``mix`` to a named mix or a ``workload.Mix`` of your own.

    ``options``: values of this module's options where the command line gives none, such as ``{"rate": 0.5}``. A rate of
    its own gives way to --trace, --stages and --ladder.
    ``preset`` and ``topology``: what is served where neither --host nor a running `harness serve` gives a server.
    """

    abstract = True
    mix: Mix | str = "quick"
    options: Mapping[str, object] = {}
    preset = "tiny"
    topology = wire.STAGED

    def __init__(self, environment):
        super().__init__(environment)
        self._spoke = False

    @task
    def speak(self) -> None:
        """One request of a closed loop; in an open loop, wait for the end of the test."""
        share = self.environment.speech.share
        if share is None or share.stopping:
            raise StopUser()
        if self.environment.speech.settings.load.loop == "open":
            share.wait_for_end()
            raise StopUser()
        result = share.speak(first=not self._spoke)
        self._spoke = True
        if result is None:
            raise StopUser()
        if result.outcome is Outcome.ERROR:
            gevent.sleep(PAUSE_AFTER_ERROR_S)


class Ladder(LoadTestShape):
    """Holds each number of users in turn, counted from when all of them run, as long as the test's patience says."""

    abstract = True  # not one of a locustfile's own shapes

    def __init__(self, test: SpeechTest):
        self._test = test
        self.reset_time()

    def reset_time(self) -> None:
        super().reset_time()
        self._index, self._began_ns = 0, 0
        self._readings = Readings()
        self._held: list[Held] = []
        self._ended = False

    def begin(self) -> None:
        """All users of the rung run."""
        self._began_ns = self._began_ns or time.monotonic_ns()

    def tick(self) -> tuple[int, float] | None:
        """Locust asks once a second."""
        rungs, patience = self._test.settings.load.sessions, self._test.settings.patience
        if self._began_ns:
            self._look(patience)
            left_s = patience.rung_s - self._seconds()
            if left_s < 1 or self._broken() or patience.has_enough(self._readings.rates):
                gevent.sleep(max(left_s, 0) if left_s < 1 else 0)
                self._end_rung(rungs[self._index], patience)
        if self._index == len(rungs) or self._ended:
            return None
        return rungs[self._index], float(rungs[-1])

    def _seconds(self) -> float:
        return (time.monotonic_ns() - self._began_ns) / 1e9

    def _look(self, patience: Patience) -> None:
        seen, settled = self._test.progress(), self._seconds() > patience.settle_s + self._test.progress_age_s
        self._readings.note(seen.samples, seen.audio_s_per_s, settled)

    def _broken(self) -> str:
        error = self._test.recorder.first_error() if self._test.settings.load.until_saturated else ""
        return f"broken: a request failed: {error}" if error else ""

    def _end_rung(self, users: int, patience: Patience) -> None:
        self._test.recorder.add_rung(users, self._began_ns, time.monotonic_ns())
        if rates := self._readings.rates:  # a rung too short to be read says nothing
            self._held.append(Held(users, sum(rates) / len(rates)))
        if why := self._broken() or patience.over_saturated(self._held):
            self._test.recorder.end_ladder(why)
            self._ended = True
        self._index, self._began_ns, self._readings = self._index + 1, 0, Readings()


@events.init_command_line_parser.add_listener
def _add_arguments(parser) -> None:
    add_arguments(parser)
    parser.set_defaults(stop_timeout=GRACE_S)
    for user in SpeechUser.__subclasses__():
        try:
            parser.set_defaults(**defaults_of(user.options))
        except HarnessError as error:
            _refuse(error)


@events.init.add_listener
def _prepare(environment, runner, **_) -> None:
    roles = {MasterRunner: MasterTest, WorkerRunner: WorkerTest}
    environment.speech, environment.speech_interrupted = None, False
    if not isinstance(runner, WorkerRunner):
        _heed_signals(environment)
    try:
        user = _only_user(environment)
        _take_tags(environment.parsed_options)
        give_way(vars(environment.parsed_options))
        environment.speech = roles.get(type(runner), SpeechTest)(environment, user.mix)
        _take_time_limit(environment)
        if isinstance(runner, WorkerRunner):
            _finish_when_quitting(environment)
            return
        if environment.web_ui:  # before anything that waits: whoever opens the page meanwhile must not find half of it
            web_ui.install(environment)
        _find_server(environment, user)
        _check_before_start(environment)
    except HarnessError as error:
        _refuse(error)
    except KeyboardInterrupt:
        _ignore_signals()
        sys.exit(EXIT_INTERRUPTED)  # nothing had begun; what was started for the test is stopped
    environment.events.spawning_complete.add_listener(lambda **_: environment.speech.all_users_run())
    _finish_when_quitting(environment)
    if environment.speech.settings.load.sessions:
        _install_ladder(environment)
    environment.speech.prepared = True


@events.test_start.add_listener
def _start(environment, **_) -> None:
    try:
        environment.speech.start()
    except HarnessError as error:
        log.error("%s", error)
        environment.process_exit_code = EXIT_UNUSABLE
        environment.speech.end()


@events.test_stopping.add_listener
def _stop(environment, **_) -> None:
    environment.speech.finish(0 if environment.speech_interrupted else environment.stop_timeout)


def _heed_signals(environment) -> None:
    """Ctrl-C and a polite kill end a test alike. Locust's handler of the latter comes late, and for a ladder never."""

    def interrupt(*_) -> None:
        environment.speech_interrupted = True
        raise KeyboardInterrupt

    hub = gevent.get_hub()
    hub.NOT_ERROR = (*hub.NOT_ERROR, KeyboardInterrupt)  # else it prints a stack, and then ends the test all the same
    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, interrupt)


def _only_user(environment) -> type[SpeechUser]:
    users = [user for user in environment.user_classes if issubclass(user, SpeechUser)]
    if len(users) != 1:
        raise InputError(
            f"a test has one SpeechUser class, not {len(users)}: "
            "state several kinds of traffic as the weighted classes of one mix"
        )
    return users[0]


def _take_tags(options) -> None:
    """A tag is a class of the mix: Locust itself would look for it on tasks, and leave none."""
    options.speech_tags, options.tags = options.tags, None
    options.speech_exclude_tags, options.exclude_tags = options.exclude_tags, None


def _take_time_limit(environment) -> None:
    """-t counts from when all can send: Locust's own clock starts before the readers and the workers are there."""
    options = environment.parsed_options
    if options.worker or not (options.headless or options.autostart):
        return  # a test that the page starts says its own
    environment.speech.keep_time(options.run_time)
    if options.run_time and not environment.speech.settings.load.sessions:
        logging.getLogger("locust.main").addFilter(_SaysTimeLimit(options.run_time))
        options.run_time = None


class _SaysTimeLimit(logging.Filter):
    """What Locust says where it has no time limit of its own, as it is."""

    def __init__(self, run_s: float):
        super().__init__()
        self._words = f"The test ends {run_s:g} s after all can send"

    def filter(self, record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("No run time limit set"):
            record.msg, record.args = self._words, ()
        return True


def _find_server(environment, user: type[SpeechUser]) -> None:
    """--host or --url, or a running `harness serve`, or a server of our own for as long as Locust runs."""
    urls = environment.parsed_options.url
    if urls and environment.host:
        raise InputError("--url and --host mean the same: give one of them (several servers with commas between)")
    environment.host = ",".join(urls or ()) or environment.host or user.host
    if environment.host:
        return
    if found := local_url():
        environment.host = found
        log.info("No --host is given: the `harness serve` of this host is asked, at %s", found)
        return
    if unknown := [voice for voice in environment.speech.settings.mix.voices if voice > BUILT_IN]:
        raise InputError(
            f"voices {', '.join(map(str, unknown))}: a server that Locust starts has voices 1 to {BUILT_IN}: use "
            "these, or start a server with `harness serve --voices DIR`"
        )
    log.info("No --host is given and no `harness serve` runs: starting Triton with preset %s", user.preset)
    stack = ExitStack()
    server = stack.enter_context(serving(preset=user.preset, topology=user.topology))
    atexit.register(_close_in_peace, stack)
    environment.host = server.url
    log.info("Triton is ready at %s; it stops with Locust", server.url)


def _close_in_peace(stack: ExitStack) -> None:
    _ignore_signals()
    stack.close()


def _ignore_signals() -> None:
    """A second Ctrl-C would cut the clean-up short, which is soon over."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)


def _check_before_start(environment) -> None:
    """What a headless test would stumble over, found before it begins."""
    if environment.speech.settings.records:
        check_folder(environment.speech.settings.records)
    target = environment.speech.target()
    if environment.parsed_options.headless:
        ReaderPool(target).close()


def _finish_when_quitting(environment) -> None:
    """Locust calls these listeners in reverse: added now, this one comes before a worker takes leave of its master."""
    environment.events.quitting.add_listener(lambda **_: environment.speech.finish(0))


def _install_ladder(environment) -> None:
    test = environment.speech
    ladder = Ladder(test)
    ladder.runner = environment.runner
    environment.shape_class = ladder
    environment.events.spawning_complete.add_listener(lambda **_: ladder.begin())


def _refuse(error: HarnessError) -> None:
    sys.stderr.write(f"locust: error: {error}\n")
    sys.stderr.flush()
    sys.exit(EXIT_UNUSABLE)
