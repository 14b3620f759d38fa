"""The settings of a speech load test, and one process's share of it; nothing here depends on Locust."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.client.target import Target
from harness.drive.load import Load
from harness.drive.readers.pool import ReaderPool
from harness.drive.stop_rule import Patience, slowest_rtf
from harness.errors import HarnessError, InputError
from harness.planfile.sections import MAX_OTHERS
from harness.records.load_test import AskedLoad, UserRecord
from harness.records.schema import Request, Result
from harness.traffic.mix import Mix, ScriptSource, requests

AHEAD_NS = 500_000_000  # a request is handed to its reader this long before it is due
LEAD_IN_NS = 1_000_000_000  # the sessions of a steady open loop start over this time, before its window
_ARRIVALS = 1 << 20  # seeds the arrivals, with the seed; shares of a test use smaller numbers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UserClass:
    """A SpeechUser class of a locustfile. Locust distributes users by ``weight``, or runs ``fixed_count`` of them.

    ``tags``: Locust's own tags of the class's tasks.
    """

    name: str
    mix: Mix
    weight: float = 1
    fixed_count: int = 0
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LoadSettings:
    """A load test: its traffic and its load, and how this process generates it.

    ``users``: the user classes of the test. With several, ``mix`` is ``Mix.combined`` of theirs, by weight.
    ``readers``: number of stream-reader processes. ``records``: the folder of the records. ``every_s``: seconds between
    two progress lines. ``max_others``: the CPU that others may take, as a share of the cores that the test needs.
    """

    mix: Mix
    load: Load = Load()
    scripts: ScriptSource = field(default_factory=ScriptSource)
    readers: int = 1
    records: Path | None = None
    every_s: float | None = None
    users: tuple[UserClass, ...] = ()
    max_others: float = MAX_OTHERS

    def __post_init__(self) -> None:
        if self.readers < 1:
            raise InputError(f"--readers {self.readers} must be 1 or more")
        if self.every_s is not None and not 0 < self.every_s < math.inf:
            raise InputError(f"--every {self.every_s:g} must be above 0")
        if not 0 < self.max_others < math.inf:
            raise InputError(f"--max-others {self.max_others:g} must be above 0")

    def mix_of(self, user: str) -> Mix:
        """The traffic mix of one user class of the test."""
        mine = f"{user}/"
        return self.mix if len(self.users) < 2 else self.mix.only(lambda name: name.startswith(mine))

    @property
    def patience(self) -> Patience:
        """The rules by which the rungs of a ladder, and the ladder itself, end."""
        slowest = slowest_rtf(self.mix.slos) if self.load.until_saturated else None
        return Patience(self.load.rung_s, self.load.precision, slowest)

    def record(self) -> AskedLoad:
        """The settings. Processes with equal records send shares of the same load."""
        load, sent, mix = self.load, self.load.record(), self.mix
        return AskedLoad(
            loop=sent.loop,
            arrivals=sent.arrivals or None,
            rate_per_s=sent.rate_per_s,
            burstiness=sent.burstiness,
            stages=sent.stages,
            trace=sent.trace,
            mix=mix.name,
            users={u.name: UserRecord(mix=u.mix.name, weight=u.weight, fixed_count=u.fixed_count) for u in self.users},
            classes=mix.record(),
            mean_audio_s=mix.mean_audio_s(),
            chunk_frames=mix.chunk_frames,
            diffusion_steps=mix.diffusion_steps,
            seed=load.seed,
            steady=load.steady,
            iterations=load.iterations,
            readers=self.readers,
            sessions=load.sessions,
            rung_s=load.rung_s,
            precision=load.precision,
            until_saturated=load.until_saturated,
        )


class Share:
    """One process's share of a load test: its readers, its requests and, in an open loop, its arrivals.

    This is share ``index`` of ``of``. ``on_result`` gets every Result, from a reader's thread. An open loop starts
    with ``begin``.
    """

    def __init__(
        self,
        settings: LoadSettings,
        target: Target | str,
        on_result: Callable[[Result], None],
        index: int = 0,
        of: int = 1,
    ):
        self._settings, self._on_result, self._index, self._of = settings, on_result, index, of
        self._stopping = threading.Event()
        self._gate = threading.Lock()  # so that no submit overlaps the pool's close
        self._requests = _request_streams(settings, np.random.default_rng([settings.load.seed, index]))
        if settings.load.loop == "closed" and settings.load.iterations is not None:
            self._left = iter(range(index, settings.load.iterations, of))
        else:
            self._left = itertools.count()
        self.pool = ReaderPool(target, settings.readers, index * settings.readers, of * settings.readers)
        self.clock = self.pool.clock  # of the servers, and of every time of a request
        self.start_ns = self.clock.now_ns()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def begin(self, start_ns: int) -> None:
        """Start an open loop: arrivals count from ``start_ns``; sessions in progress start one second before it."""
        self.start_ns = start_ns
        threading.Thread(target=self._keep_schedule, daemon=True).start()

    def speak(self, first: bool = False, user: str = "") -> Result | None:
        """Closed loop: send the next request of a user class now and wait for its Result.

        Returns None when the test has no more requests for it.
        """
        streams = self._requests.get(user) or self._requests.get("")
        if streams is None or next(self._left, None) is None:
            return None
        request = next(streams.steady if first and self._settings.load.steady is not None else streams.new)
        ticket = self._submit(replace(request, due_ns=self.clock.now_ns()), "closed")
        if ticket is None:
            return None
        try:
            return ticket.wait()
        except BaseException:  # Locust stopped the user: cancel its request too
            ticket.cancel()
            raise

    def wait_for_end(self) -> None:
        """Open loop: wait until the test ends. Arrivals come from the schedule, not from users."""
        self._stopping.wait()

    def finish(self, grace_s: float) -> None:
        """Send nothing more; requests in progress get ``grace_s`` seconds. Every Result is delivered on return."""
        with self._gate:
            self._stopping.set()
        self.pool.close(grace_s)

    def _submit(self, request: Request, loop: str):
        with self._gate:
            return None if self.stopping else self.pool.submit(request, loop, self._on_result)

    def _keep_schedule(self) -> None:
        try:
            for request in self._scheduled():
                wait_s = self.clock.host_span(request.due_ns - AHEAD_NS - self.clock.now_ns()) / 1e9
                if wait_s > 0:
                    self._stopping.wait(wait_s)
                else:
                    time.sleep(0)  # behind schedule, or a burst: yield to other threads
                if self._submit(request, "open") is None:
                    return
        except HarnessError as error:
            log.error("the schedule of arrivals ended: %s", error)

    def _scheduled(self) -> Iterator[Request]:
        streams = self._requests[""]
        sources = (
            (streams.steady, lead_in(self._settings, self._index, self._of)),
            (streams.new, arrival_times(self._settings, self._index, self._of)),
        )
        for fresh, due in sources:
            for due_s in due:
                yield replace(next(fresh), due_ns=self.start_ns + round(due_s * 1e9))


class _Streams(NamedTuple):
    """Endless streams of requests: new ones, and sessions already in progress."""

    new: Iterator[Request]
    steady: Iterator[Request]


def _request_streams(settings: LoadSettings, rng: np.random.Generator) -> dict[str, _Streams]:
    """Requests by user class, each with its own random stream; key "" is all traffic.

    In an open loop, and with a single class, "" is the only key.
    """
    several = len(settings.users) > 1 and settings.load.loop == "closed"
    mixes = {each.name: settings.mix_of(each.name) for each in settings.users} if several else {"": settings.mix}
    rngs = iter(rng.spawn(2 * len(mixes)))
    return {
        name: _Streams(
            requests(mix, next(rngs), settings.scripts), requests(mix, next(rngs), settings.scripts, steady=True)
        )
        for name, mix in mixes.items()
    }


def arrival_times(settings: LoadSettings, index: int = 0, of: int = 1) -> Iterator[float]:
    """One share's arrivals of an open loop, in seconds from its start; a closed loop has none.

    Share i of n has every n-th arrival of the one process that the seed gives, so together they are that process.
    """
    rng = np.random.default_rng([settings.load.seed, _ARRIVALS])
    times = settings.load.arrivals.times(rng) if settings.load.arrivals else iter(())
    return itertools.islice(itertools.islice(times, settings.load.iterations), index, None, of)


def lead_in(settings: LoadSettings, index: int = 0, of: int = 1) -> Iterator[float]:
    """Start times of one share's sessions in progress: evenly spaced over the second before 0 s."""
    sessions = settings.load.steady or 0
    return ((number / sessions - 1) * LEAD_IN_NS / 1e9 for number in range(index, sessions, of))


def lead_s(settings: LoadSettings) -> float:
    """Seconds from the order to start to the start of an open loop's arrivals."""
    return (AHEAD_NS + (LEAD_IN_NS if settings.load.steady else 0)) / 1e9
