"""The behaviour of planned devices under other traffic: surges, a ramp, an impulse, and the recovery."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness import wire
from harness.capacity.fitting.fit import finite
from harness.capacity.fitting.rate_search import LARGEST_POOL, steady_sessions
from harness.capacity.models.memory import KvRoom
from harness.capacity.planning.pools import Pools, drain_times_s
from harness.capacity.simulator.engine import LIMITED, Counting
from harness.capacity.simulator.fleet import simulate_pool
from harness.capacity.simulator.pool import Pool
from harness.capacity.simulator.results import PoolResult
from harness.capacity.simulator.traffic import Demand, Varying
from harness.errors import InputError
from harness.records.plan import Behaviour, Drain, PlannedTarget, SurgeParts, SurgeRow
from harness.traffic.mix import Mix

QUEUE_LIMIT, PATIENCE_S = 64, 30.0  # of each server, as in model_repository/vibevoice_full_pipeline
BACK_WITHIN = 0.05
_PARTS_OF_HOLD, _PARTS_BEFORE, _HOLDS_AFTER, _MOST_SHOWN = 15, 5, 20, 120
_ARRIVALS_PER_PART, _MOST_RUNS = 500, 20
_SHARES = "within_slos_before", "within_slos_during", "within_slos_worst", "busy_during"


@dataclass(frozen=True)
class Surge:
    """Traffic at ``times`` its planned rate for ``share`` of the holding time; ``ramp``: it grows linearly to that."""

    name: str
    times: float
    share: float = 1.0
    ramp: bool = False

    def factor(self, at_s: np.ndarray, hold_s: float) -> np.ndarray:
        """The factor of the rate at seconds since the surge began [n]."""
        lasts_s = self.share * hold_s
        inside = (at_s >= 0) & (at_s < lasts_s)
        risen = np.clip(at_s / lasts_s, 0, 1) if self.ramp else 1.0
        return np.where(inside, 1 + (self.times - 1) * risen, 1.0)


@dataclass(frozen=True)
class Admission:
    """Whether a device admits sessions beyond its limit, and how many of the others wait in its queue.

    A device whose KV memory is full admits none in any case.
    """

    name: str
    limited: bool
    queue: int = 0


ADMISSIONS = (
    Admission("all are admitted", limited=False, queue=QUEUE_LIMIT),
    Admission("the rest wait in a queue", limited=True, queue=QUEUE_LIMIT),
    Admission("the rest are rejected", limited=True),
)
SURGES = (
    Surge("twice the load", 2),
    Surge("five times the load", 5),
    Surge("a ramp to twice the load", 2, ramp=True),
    Surge("an impulse of five times the load", 5, share=1 / _PARTS_OF_HOLD),
)


def behaviour(pools: Pools, mix: Mix, target: PlannedTarget, rng: np.random.Generator) -> Behaviour:
    """plan.json's ``behaviour``: each surge on the devices of a target, for each admission policy.

    ``session_limit``: the most constant sessions with which a device meets every SLO. Those beyond it wait in its
    queue with the server's settings (64 of them, 30 s, then rejected), or are rejected at once. No session is admitted
    without room for its KV cache, where that is known (``kv_room_bytes``, else None). Time is divided into parts of
    1/15 of the holding time: a quarter of an hour, or twice the mean time of a session if that is longer.
    ``within_slos``: of the sessions that arrived in a part, the share that met every SLO on TTFA and real-time
    factor; a rejected one met none; None if none arrived. Above 64 devices, 64 with their part of the traffic are
    simulated.
    """
    limit, kv = max(int(steady_sessions(pools.device, pools.limits)), 1), pools.limits.kv
    hold_s = max(900.0, 2 * pools.traffic.mean_frames * float(pools.device.step_time(limit)))
    if target.devices is None:
        raise InputError(f"no count of devices is known at {target.qps:g} requests a second: plan that rate first")
    size = min(target.devices, LARGEST_POOL)
    stage = _Stage(pools, mix, size, target.qps * size / target.devices, hold_s)
    return Behaviour(
        basis="simulated",
        qps=target.qps,
        devices=target.devices,
        session_limit=limit,
        queue=QUEUE_LIMIT,
        patience_s=PATIENCE_S,
        kv_room_bytes=kv.room_bytes if kv else None,
        hold_s=hold_s,
        part_s=stage.part_s,
        max_sessions_measured=pools.device.max_sessions,
        surges=tuple(_observe(stage, surge, each, limit, rng) for surge in SURGES for each in ADMISSIONS),
        ninety=ninety_minutes(pools, limit, rng),
    )


def ninety_minutes(pools: Pools, sessions: int, rng: np.random.Generator) -> Drain:
    """Seconds until a draining device with this many 90-minute sessions, at random progress, is empty.

    If its KV memory has room for fewer, of that many. ``longest_s``: if one of them has just started.
    """
    if pools.limits.kv is not None:
        sessions = max(min(sessions, int(pools.limits.kv.slots(np.array([wire.MAX_FRAMES])))), 1)
    left = np.maximum(rng.random(4096), 1e-6) * wire.MAX_FRAMES
    times_s = drain_times_s(pools.device, replace(pools.traffic, residual_frames=left), sessions, rng)
    longest = replace(pools.traffic, residual_frames=np.array([float(wire.MAX_FRAMES)]))
    worst_s = drain_times_s(pools.device, longest, sessions, rng, runs=1)
    return Drain(
        sessions=sessions,
        p50_s=float(np.median(times_s)),
        p95_s=float(np.quantile(times_s, 0.95)),
        longest_s=float(worst_s[0]),
    )


@dataclass(frozen=True)
class _Stage:
    """The setting of a surge: devices, planned rate (requests/s), and the surge's holding time."""

    pools: Pools
    mix: Mix
    devices: int
    rate_per_s: float
    hold_s: float

    @property
    def part_s(self) -> float:
        return self.hold_s / _PARTS_OF_HOLD

    @property
    def begins_s(self) -> float:
        """Start of the surge in seconds, counted from the first part."""
        return _PARTS_BEFORE * self.part_s

    def play(self, surge: Surge, admission: Admission, limit: int, rng: np.random.Generator) -> PoolResult:
        """One run. Its last holding time only lets sessions of earlier parts end."""
        device, warm_s = self.pools.device, self.hold_s
        highest = self.rate_per_s * surge.times

        def rate(at_s: np.ndarray) -> np.ndarray:
            return self.rate_per_s * surge.factor(at_s - warm_s - self.begins_s, self.hold_s)

        demand = demand_of(self.pools, self.mix, Varying(rate, highest))
        more = {"session_limit": limit if admission.limited else None, "memory_bytes": kv_room(self.pools).room_bytes}
        more |= {"queue_limit": admission.queue, "patience_s": PATIENCE_S}
        pool = Pool.of(device, self.devices, routing="least_loaded", **more)
        parts = _PARTS_BEFORE + (1 + _HOLDS_AFTER + 1) * _PARTS_OF_HOLD
        limits = counted_limits(self.pools, demand.classes)
        counting = Counting(demand.classes, parts * self.part_s, warm_s, parts, 1, limits)
        return simulate_pool(pool, demand, counting, rng)


def kv_room(pools: Pools) -> KvRoom:
    """Room for the KV caches of a device's sessions; unlimited where it is unknown."""
    return pools.limits.kv or KvRoom(math.inf, 0)


def demand_of(pools: Pools, mix: Mix, arriving: Varying) -> Demand:
    """Sessions of a mix as the fitted device serves them, with the KV caches that its server reserves."""
    kv, device = kv_room(pools), pools.device
    caches = {"kv_bytes_per_token": kv.bytes_per_token, "voice_frames": kv.voice_frames, "state_bytes": 0}
    return Demand(mix, arriving, ttfa=device.ttfa, rtf=device.rtf, **caches)


def counted_limits(pools: Pools, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """The SLOs that apply to a single session: those that the simulator counts."""
    limits: dict[str, dict[str, float]] = {name: {} for name in classes}
    for slo in pools.limits.slos:
        if slo.metric in LIMITED:
            limits[slo.traffic_class][slo.metric] = slo.limit
    return limits


def _observe(stage: _Stage, surge: Surge, admission: Admission, limit: int, rng: np.random.Generator) -> SurgeRow:
    """The figures of every part; ``within_slos_before``: over all parts without any surge."""
    usual = _Seen.of(stage, replace(surge, times=1), admission, limit, rng)
    seen = _Seen.of(stage, surge, admission, limit, rng)
    begins, ends = _PARTS_BEFORE, _PARTS_BEFORE + math.ceil(surge.share * _PARTS_OF_HOLD)
    before = _share(usual.good, usual.arrived)
    within_slos = seen.within_slos
    back = _back(within_slos, before, ends)
    watched = (back if back is not None else len(within_slos)) + _PARTS_OF_HOLD
    shown = slice(0, watched, math.ceil(watched / _MOST_SHOWN))
    at_s = (np.arange(len(within_slos)) - begins) * stage.part_s
    surged = slice(begins, ends)
    during, busy = (_share(each[surged], seen.arrived[surged]) for each in (seen.good, seen.busy))
    return SurgeRow(
        surge=surge.name,
        times=surge.times,
        lasts_s=surge.share * stage.hold_s,
        admission=admission.name,
        **dict(zip(_SHARES, finite([before, during, np.fmin.reduce(within_slos), busy]), strict=True)),
        most_sessions=float(seen.sessions.max()),
        recovered_after_s=None if back is None else (back - ends) * stage.part_s,
        watched_s=(len(within_slos) - ends) * stage.part_s,
        beyond_measured=bool(seen.sessions.max() > stage.pools.device.max_sessions),
        parts=SurgeParts(
            at_s=tuple(at_s[shown].tolist()),
            rate=tuple(surge.factor(at_s[shown], stage.hold_s).tolist()),
            within_slos=tuple(finite(within_slos[shown].round(4))),
            sessions=tuple(seen.sessions[shown].round(2).tolist()),
        ),
    )


@dataclass(frozen=True)
class _Seen:
    """Counts by part [parts], over all runs: sessions that arrived, met every SLO, were rejected, and per device."""

    arrived: np.ndarray
    good: np.ndarray
    busy: np.ndarray
    sessions: np.ndarray

    @classmethod
    def of(cls, stage: _Stage, surge: Surge, admission: Admission, limit: int, rng: np.random.Generator) -> _Seen:
        """Enough runs that each part has some 500 sessions."""
        runs = min(max(math.ceil(_ARRIVALS_PER_PART / (stage.rate_per_s * stage.part_s)), 1), _MOST_RUNS)
        results = [stage.play(surge, admission, limit, each) for each in rng.spawn(runs)]
        kept = slice(-_PARTS_OF_HOLD)
        classes = [each for result in results for each in result.classes.values()]
        return cls(
            arrived=np.sum([each.arrived for each in classes], axis=0)[kept],
            good=np.sum([each.good for each in classes], axis=0)[kept],
            busy=np.sum([each.refused + each.gave_up for each in classes], axis=0)[kept],
            sessions=np.mean([result.sessions for result in results], axis=0)[kept] / stage.devices,
        )

    @property
    def within_slos(self) -> np.ndarray:
        """Share by part; NaN in a part without arrivals."""
        return np.where(self.arrived > 0, self.good / np.maximum(self.arrived, 1), np.nan)


def _share(of: np.ndarray, arrived: np.ndarray) -> float:
    """A share of all arrivals; NaN where there were none."""
    return float(of.sum() / arrived.sum()) if arrived.sum() else math.nan


def _back(within_slos: np.ndarray, before: float, ends: int) -> int | None:
    """The first part after a surge from which three in a row are within five points of the share before it.

    Parts without arrivals are skipped.
    """
    known = ends + np.flatnonzero(~np.isnan(within_slos[ends:]))
    fine = within_slos[known] >= before - BACK_WITHIN
    return next((int(known[at]) for at in range(len(fine) - 2) if fine[at : at + 3].all()), None)
