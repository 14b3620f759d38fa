"""The Locust user of the harness: subclass ``SpeechUser`` in a locustfile and run it with ``locust -f FILE``.

In a closed loop each Locust user sends one request after another. With ``--rate``, ``--trace`` or ``--stages``
(an open loop) requests leave on a seeded schedule that no response can delay, while users wait. Reader processes beside
Locust timestamp the chunks. Locust's "response time" is the time to first audio, in ms, from when the request was due.

``-t`` counts from when all readers of all workers can send. When the time is over, requests in progress get
``--stop-timeout`` seconds (default 10) to finish; then they are cut off as unfinished, neither success nor failure.
Ctrl-C cuts them off at once. Exit codes: 0 success, 1 requests failed (Locust's own), 2 an option or the server
cannot be used, 3 the measurement is INVALID (also if nothing was sent), for the reasons printed.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import FunctionType

import gevent
from locust import User, events, task
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

from harness import exit_codes, wire
from harness.deploy.running import local_url
from harness.deploy.server import serving
from harness.drive import web_ui
from harness.drive.distributed import MasterTest, WorkerTest
from harness.drive.generator import UserClass
from harness.drive.ladder import Ladder
from harness.drive.options import DEFAULTS, add_arguments, as_mix, defaults_of, dest, give_way, is_own, merged
from harness.drive.readers.pool import ReaderPool
from harness.drive.runners import SpeechTest
from harness.errors import HarnessError, InputError
from harness.records.load_log import check_folder
from harness.records.schema import Outcome
from harness.traffic.mix import Mix
from harness.traffic.voice_folder import BUILT_IN

GRACE_S = "10"
PAUSE_AFTER_ERROR_S = 1.0  # a server that rejects at once must not get thousands of requests a second

# Under gevent a process is started by a fork, and gRPC's own fork handlers can crash the child before its exec.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

log = logging.getLogger(__name__)


class SpeechUser(User):
    """One caller of the speech service. Set ``mix`` to a named mix or a ``Mix`` of your own.

    A locustfile may hold several classes, with Locust's own ``weight`` and ``fixed_count``. To run only some, name them
    on the command line, or pick them on the page with ``--class-picker``. In a closed loop Locust distributes the
    users. In an open loop the arrivals are one process, of which each class gets a share by its weight; a class with a
    ``fixed_count`` has no share, and is refused beside others. With several classes, records and tables name a traffic
    class CLASS/TRAFFIC_CLASS. ``--tags`` and ``--exclude-tags`` take names of traffic classes, and Locust's own tags of
    user classes (``@tag``).

    ``options``: values of this module's options where the command line gives none, such as ``{"rate": 0.5}``. --trace,
    --stages and --ladder on the command line replace a class's own rate. Classes of one test must agree on each option.
    ``preset`` and ``topology``: what to serve where neither --host nor a running `harness serve` provides a server.
    """

    abstract = True
    mix: Mix | str = "quick"
    options: Mapping[str, object] = {}
    preset = "tiny"
    topology = wire.STAGED

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.tasks = [_copied(each) for each in cls.tasks]  # tags are set on functions: copy each

    def __init__(self, environment):
        super().__init__(environment)
        self._spoke = False

    @task
    def speak(self) -> None:
        """Send one request of a closed loop; in an open loop, wait for the end of the test."""
        share = self.environment.speech.share
        if share is None or share.stopping:
            raise StopUser()
        if self.environment.speech.settings.load.loop == "open":
            share.wait_for_end()
            raise StopUser()
        result = share.speak(first=not self._spoke, user=type(self).__name__)
        self._spoke = True
        if result is None:
            raise StopUser()
        if result.outcome is Outcome.ERROR:
            gevent.sleep(PAUSE_AFTER_ERROR_S)


def _copied(function):
    """A copy of a task with attributes of its own; a TaskSet unchanged."""
    if not isinstance(function, FunctionType):
        return function
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    vars(copy).update({name: set(value) if isinstance(value, set) else value for name, value in vars(function).items()})
    return functools.update_wrapper(copy, function, updated=())


@events.init_command_line_parser.add_listener
def _add_arguments(parser) -> None:
    add_arguments(parser)
    parser.set_defaults(stop_timeout=GRACE_S)
    try:
        for user in _all_classes(SpeechUser):
            parser.set_defaults(**defaults_of(user.options))
    except HarnessError as error:
        _refuse(error)


def _all_classes(user: type[SpeechUser]) -> Iterator[type[SpeechUser]]:
    for each in user.__subclasses__():
        if not each.abstract:
            yield each
        yield from _all_classes(each)


@events.init.add_listener
def _prepare(environment, runner, **_) -> None:
    """Prepare the test once Locust has read its options: check everything that a test needs."""
    is_worker = isinstance(runner, WorkerRunner)
    environment.speech_interrupted = False
    environment.speech_dropped = []  # user classes left without traffic by the tags
    if not is_worker:
        _heed_signals(environment)
    try:
        _settle_options(environment)
        _make_test(environment)
        _take_time_limit(environment)
        if not is_worker:
            _open_page(environment)
            _find_server(environment)
            _check_before_start(environment)
    except HarnessError as error:
        _refuse(error)
    except KeyboardInterrupt:
        _ignore_signals()
        sys.exit(exit_codes.INTERRUPTED)  # nothing had started; the clean-up stops what was started for the test
    _finish_when_quitting(environment)
    if not is_worker:
        _follow_the_users(environment)
        environment.speech.prepared = True


@events.test_start.add_listener
def _start(environment, **_) -> None:
    try:
        environment.speech.start()
    except HarnessError as error:
        log.error("%s", error)
        environment.process_exit_code = exit_codes.UNUSABLE
        environment.speech.end()


@events.test_stopping.add_listener
def _stop(environment, **_) -> None:
    environment.speech.finish(0 if environment.speech_interrupted else environment.stop_timeout)


def _heed_signals(environment) -> None:
    """End a test on Ctrl-C and SIGTERM alike. Locust's SIGTERM handler is set late, and with a ladder never."""
    hub = gevent.get_hub()
    main = hub.parent

    def interrupt(*_) -> None:
        environment.speech_interrupted = True
        if gevent.getcurrent() is main:
            raise KeyboardInterrupt
        # Raised here, it would be lost where Python has nobody to hand it to: in a finalizer, in a callback.
        hub.loop.run_callback(main.throw, KeyboardInterrupt)

    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, interrupt)


def _settle_options(environment) -> None:
    """Merge the options and tags of the test's user classes; Locust itself knows only tags of tasks."""
    options = environment.parsed_options
    options.speech_tags, options.tags = options.tags, None
    options.speech_exclude_tags, options.exclude_tags = options.exclude_tags, None
    values = vars(options)
    give_way(values)
    classes = _speech_classes(environment)
    given = [name for name, value in values.items() if not is_own(value)]
    own = {each.__name__: {k: v for k, v in each.options.items() if dest(f"--{k}") not in given} for each in classes}
    chosen = defaults_of(merged(own))
    for name, value in list(values.items()):
        if is_own(value):  # set by a class that may not run
            values[name] = chosen.get(name, DEFAULTS.get(name))


def _make_test(environment) -> None:
    """Create this process's test; user classes left without traffic by the tags are removed from Locust."""
    roles = {MasterRunner: MasterTest, WorkerRunner: WorkerTest}
    test = roles.get(type(environment.runner), SpeechTest)
    environment.speech = test(environment, lambda names: _user_classes(environment, names))
    if environment.speech.settings.load.sessions and getattr(environment.parsed_options, "class_picker", False):
        raise InputError("--ladder does not go with --class-picker: name the user classes on the command line")
    left = {each.name for each in environment.speech.settings.users}
    dropped = environment.speech_dropped = [each for each in _speech_classes(environment) if each.__name__ not in left]
    environment.user_classes[:] = [each for each in environment.user_classes if each not in dropped]
    for each in dropped:
        (environment.available_user_classes or {}).pop(each.__name__, None)


def _speech_classes(environment, names: Sequence[str] = ()) -> list[type[SpeechUser]]:
    """The classes of these names, or those that Locust would run; in the same order in every process."""
    known = environment.user_classes
    if names:
        available = {each.__name__: each for each in known} | (environment.available_user_classes or {})
        known = [available[name] for name in names if name in available]
    users = [user for user in known if issubclass(user, SpeechUser)]
    if not users:
        raise InputError("no SpeechUser class is left to run: a locustfile needs one, such as scenarios/podcast.py")
    return sorted(users, key=lambda user: user.__name__)


def _user_classes(environment, names: Sequence[str]) -> list[UserClass]:
    return [
        UserClass(user.__name__, as_mix(user.mix), user.weight, user.fixed_count, _tags_of(user))
        for user in (*_speech_classes(environment, names), *environment.speech_dropped)  # tags name dropped ones too
    ]


def _tags_of(user: type[SpeechUser]) -> frozenset[str]:
    return frozenset().union(*(getattr(each, "locust_tag_set", ()) for each in user.tasks))


def _take_time_limit(environment) -> None:
    """Take -t over from Locust, whose own clock starts before the readers and the workers are ready."""
    options = environment.parsed_options
    if options.worker or not (options.headless or options.autostart):
        return  # a test started from the page brings its own
    environment.speech.keep_time(options.run_time)
    if options.run_time and not environment.speech.settings.load.sessions:
        logging.getLogger("locust.main").addFilter(_TimeLimitMessage(options.run_time))
        options.run_time = None


class _TimeLimitMessage(logging.Filter):
    """Corrects Locust's message about a time limit that the harness enforces instead of Locust."""

    def __init__(self, run_s: float):
        super().__init__()
        self._message = f"The test ends {run_s:g} s after all can send"

    def filter(self, record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("No run time limit set"):
            record.msg, record.args = self._message, ()
        return True


def _open_page(environment) -> None:
    """Add our parts to Locust's page before anything that waits, so that nobody sees an incomplete page."""
    if environment.web_ui:
        web_ui.install(environment)


def _find_server(environment) -> None:
    """Find the server: --host or --url, a running `harness serve`, or one started for as long as Locust runs."""
    urls = environment.parsed_options.url
    if urls and environment.host:
        raise InputError("--url and --host mean the same: give one of them (several servers with commas between)")
    classes = _speech_classes(environment)
    environment.host = ",".join(urls or ()) or environment.host or _agreed(classes, "host", "give --host")
    if environment.host:
        return
    if found := local_url():
        environment.host = found
        log.info("No --host is given: using the `harness serve` of this host, at %s", found)
        return
    _start_server(environment, classes)


def _start_server(environment, classes: Sequence[type[SpeechUser]]) -> None:
    if unknown := [voice for voice in environment.speech.settings.mix.voices if voice > BUILT_IN]:
        raise InputError(
            f"voices {', '.join(map(str, unknown))}: a server that Locust starts has voices 1 to {BUILT_IN}: give "
            "these, or start a server with `harness serve --voices DIR`"
        )
    fix = "start a server with `harness serve`"
    preset, topology = (_agreed(classes, name, fix) for name in ("preset", "topology"))
    log.info("No --host is given and no `harness serve` runs: starting Triton with preset %s", preset)
    stack = ExitStack()
    server = stack.enter_context(serving(preset=preset, topology=topology))
    atexit.register(_close_in_peace, stack)
    environment.host = server.url
    log.info("Triton is ready at %s; it stops with Locust", server.url)


def _agreed(classes: Sequence[type[SpeechUser]], name: str, fix: str):
    """The attribute's value, the same for all classes. Raises InputError where they differ."""
    values = {getattr(each, name): each.__name__ for each in classes}
    if len(values) > 1:
        different = ", ".join(f"{value!r} in {user}" for value, user in values.items())
        raise InputError(f"user classes of one test need the same {name} ({different}): {fix}")
    return next(iter(values))


def _close_in_peace(stack: ExitStack) -> None:
    _ignore_signals()
    stack.close()


def _ignore_signals() -> None:
    """Ignore a second Ctrl-C, which would interrupt the clean-up; it is short."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)


def _check_before_start(environment) -> None:
    """Find before a headless test starts what would make it fail."""
    if environment.speech.settings.records:
        check_folder(environment.speech.settings.records)
    target = environment.speech.target()
    if environment.parsed_options.headless:
        ReaderPool(target).close()


def _finish_when_quitting(environment) -> None:
    """Finish before Locust quits. Listeners run in reverse: added now, this runs before a worker leaves its master."""
    environment.events.quitting.add_listener(lambda **_: environment.speech.finish(0))


def _follow_the_users(environment) -> None:
    """Start the window of a closed loop, and each rung of a ladder, when all its users run."""
    test, listen = environment.speech, environment.events.spawning_complete.add_listener
    listen(lambda **_: test.all_users_run())
    if test.settings.load.sessions:
        ladder = Ladder(test)
        ladder.runner = environment.runner
        environment.shape_class = ladder
        listen(lambda **_: ladder.begin())


def _refuse(error: HarnessError) -> None:
    sys.stderr.write(f"locust: error: {error}\n")
    sys.stderr.flush()
    sys.exit(exit_codes.UNUSABLE)
