"""Chooses a time dilation: the smallest with which this host carries an emulated server and its load at ease."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from harness import wire
from harness.clock import MOST_DILATION
from harness.deploy.config import Deployment
from harness.deploy.server import TritonServer
from harness.device_profile import Profile
from harness.drive.disturbance import HostLoad
from harness.drive.host_monitor import HostMonitor
from harness.drive.readers.pool import ReaderPool
from harness.drive.validity import MAX_BUSY
from harness.errors import ServerError
from harness.records.schema import Outcome, Request, Result
from harness.traffic.mix import Mix, ScriptSource, requests

FACTORS = (
    1,
    1.5,
    2,
    2.5,
    3,
    4,
    5,
    6,
    8,
    10,
    12,
    15,
    20,
    25,
    30,
    40,
    50,
    60,
    80,
    100,
    150,
    200,
    300,
    500,
    MOST_DILATION,
)
AIM = 0.85 * MAX_BUSY  # a window may be busier than the seconds that were tried
LEAST_ROOM = 0.15  # of the host, however much others use
SATURATED = 0.9  # of what others leave; beyond it the host, and not the emulated GPU, sets the pace
UNNOTICED = 0.3  # of the host: so much gets its time beside any others
FIRST, FARTHER, TRIES = 10.0, 5.0, 3
OPEN_S = 20.0  # of dilated time, until every session speaks or the frame rate is steady
STEADY_READINGS, STEADY = 4, 0.05  # of the audio rate, one a dilated second: their largest distance from their mean
WATCH_S = 12.0  # of the host


def smallest_factor(load: HostLoad, dilation: float) -> float:
    """The smallest of FACTORS with which the host is at most AIM busy, from its ``load`` at another dilation.

    What harness and server use is taken to be inversely proportional to the dilation (a part is not: the factor is
    rather too large than too small); what others use stays.
    """
    room = max(AIM - load.others_share - load.stolen_share, LEAST_ROOM)
    needed = dilation * load.own / load.cores / room
    return next((float(each) for each in FACTORS if each >= needed), MOST_DILATION)


def choose_dilation(
    deployment: Deployment, mix: Mix, sessions: int, scripts: ScriptSource | None = None, say: Callable = print
) -> float:
    """The smallest time dilation with which this host serves so many sessions at ease; it serves them for a while.

    Raises ServerError where that does not tell.
    """
    dilation = FIRST
    for _ in range(TRIES):
        load = _tried(replace(deployment, dilation=dilation), mix, sessions, scripts or ScriptSource())
        if load is None:
            raise ServerError("who uses this host's CPU is not known, so no dilation can be chosen: give --dilate N")
        own_share = load.own / load.cores
        say(f"with time dilated {dilation:g} times, {sessions} sessions use {own_share:.0%} of this host")
        if own_share < SATURATED * (1 - load.others_share - load.stolen_share) or own_share < UNNOTICED:
            return smallest_factor(load, dilation)
        dilation *= FARTHER
    raise ServerError(
        f"this host is busy even with time dilated {dilation / FARTHER:g} times: stop what else runs here, or deploy "
        "fewer GPUs or sessions"
    )


class Crowd:
    """As many users as a rung has, each with a session in progress and then one new request after another."""

    def __init__(self, pool: ReaderPool, mix: Mix, scripts: ScriptSource):
        self._pool, self._lock, self._ending = pool, threading.RLock(), False
        one, other = np.random.default_rng(1).spawn(2)
        self._first, self._new = requests(mix, one, scripts, steady=True), requests(mix, other, scripts)
        self._silent: set[str] = set()  # first requests without audio so far
        self._failed = ""

    def begin(self, sessions: int) -> None:
        """Send the first requests of so many users."""
        first = list(itertools.islice(self._first, sessions))
        self._silent = {each.request_id for each in first}
        for each in first:
            self._send(each)

    def all_speak(self) -> bool:
        """Whether every first request that was admitted has sent audio. Raises ServerError where one failed."""
        running = {each.request_id for each in self._pool.progress().running}
        with self._lock:
            if self._failed:
                raise ServerError(f"no dilation can be chosen, since a request failed: {self._failed}")
            self._silent -= running
            return not self._silent

    @property
    def silent(self) -> int:
        """Sessions that have sent no audio so far."""
        return len(self._silent)

    def end(self) -> None:
        """Send no further requests."""
        with self._lock:
            self._ending = True

    def _send(self, request: Request) -> None:
        with self._lock:  # results come in another thread
            self._pool.submit(replace(request, due_ns=self._pool.clock.now_ns()), "closed", self._ended)

    def _ended(self, result: Result) -> None:
        with self._lock:
            if self._ending:
                return
            self._silent.discard(result.request_id)
            if result.outcome is Outcome.ERROR:  # no room: its user is not admitted
                self._failed = self._failed or ("" if wire.BUSY in result.error else result.error)
                return
            request = next(self._new)
        self._send(request)


def await_speech(crowd: Crowd, pool: ReaderPool) -> None:
    """Return once every session speaks, or frames come at a steady rate. Raises ServerError after OPEN_S."""
    rates: deque[float] = deque(maxlen=STEADY_READINGS)
    second = pool.clock.host_span(1.0)
    for _ in range(round(OPEN_S)):
        time.sleep(second)
        if crowd.all_speak():
            return
        rates.append(pool.progress().audio_s_per_s)
        if is_steady(rates):
            return
    raise ServerError(
        f"no dilation can be chosen: after {OPEN_S:.0f} s of time dilated {pool.clock.dilation:g} times, "
        f"{crowd.silent} sessions have sent no audio, and frames come at no steady rate: give a factor (--dilate N)"
    )


def is_steady(rates: Sequence[float]) -> bool:
    """Whether enough readings of an audio rate lie near their mean."""
    mean = sum(rates) / max(len(rates), 1)
    return len(rates) >= STEADY_READINGS and mean > 0 and all(abs(each - mean) <= STEADY * mean for each in rates)


def _tried(deployment: Deployment, mix: Mix, sessions: int, scripts: ScriptSource) -> HostLoad | None:
    """Who used the CPU while a server spoke to so many sessions, all of them in progress."""
    with TritonServer(deployment) as server:
        pool, monitor = ReaderPool(server.target), HostMonitor([int(server.url.rpartition(":")[2])])
        crowd = Crowd(pool, mix, scripts)
        try:
            crowd.begin(sessions)
            await_speech(crowd, pool)
            start_ns = time.monotonic_ns()
            time.sleep(WATCH_S)
            return monitor.load(start_ns, time.monotonic_ns())
        finally:
            crowd.end()
            monitor.close()
            pool.close()


def real_time_sessions(profile: Profile) -> int:
    """The largest measured batch whose frame takes no longer than it lasts, stage after stage; at least 1."""
    ms: list[dict[int, float]] = []
    for stage in wire.STAGES:
        usual = [each for each in profile.timed(stage) if each.steps in (None, wire.DEFAULT_DIFFUSION_STEPS)]
        ms.append({round(each.at("batch")): each.ms for each in sorted(usual, key=lambda each: -each.ms)})
    common = set.intersection(*map(set, ms))
    in_pace = [batch for batch in common if sum(each[batch] for each in ms) <= 1e3 * wire.SECONDS_PER_FRAME]
    return max(in_pace, default=1)
