"""Chooses a time dilation: the smallest with which this host carries an emulated server and its load at ease."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
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
SETTLE_S, WATCH_S = 8.0, 12.0  # of the host


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
    """The smallest time dilation with which this host serves so many sessions at ease; it serves them for seconds.

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


def _tried(deployment: Deployment, mix: Mix, sessions: int, scripts: ScriptSource) -> HostLoad | None:
    """Who used the CPU while a server spoke to so many sessions, all of them in progress."""
    with TritonServer(deployment) as server:
        pool, monitor = ReaderPool(server.target), HostMonitor([int(server.url.rpartition(":")[2])])
        try:
            fresh = requests(mix, np.random.default_rng(1), scripts, steady=True)
            for request in itertools.islice(fresh, sessions):
                pool.submit(replace(request, due_ns=pool.clock.now_ns()), "closed")
            time.sleep(SETTLE_S)
            start_ns = time.monotonic_ns()
            time.sleep(WATCH_S)
            return monitor.load(start_ns, time.monotonic_ns())
        finally:
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
