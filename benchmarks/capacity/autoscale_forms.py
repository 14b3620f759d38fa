"""Elastic fleets whose figures are known: sessions and devices of a day, and the rule of Kubernetes alone."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy import stats
from testbed import queueing

from harness.capacity.planning.scaling import autoscaler_of, expected_sessions
from harness.capacity.simulator.engine import Counting, SimulationEngine, arrivals_of
from harness.capacity.simulator.pool import Autoscaler, Pool
from harness.capacity.simulator.results import PoolResult, result_of
from harness.capacity.simulator.traffic import DAY_S, Varying
from harness.records.day import DemandCurve, ScalingRule, ScheduledMinimum
from harness.traffic.demand import diurnal

STEP_S = 0.1
LASTS_S = 5400.0  # every session: 90 minutes at any load
WINDOWS = 144
MEAN_QPS, SWING = 0.02, 0.6
FLEET_DAYS = 200  # of a static fleet, for each day of the others


@dataclass(frozen=True)
class DayForm:
    """A figure by theory and by simulation; ``error``: relative, the largest over windows where there are many.

    ``standard_error``: of what was simulated, relative, from the variation of its days; the largest over windows.
    """

    name: str
    expected: float
    simulated: float
    error: float
    standard_error: float = 0.0


def forms(days: int, seed: int) -> list[DayForm]:
    """Every closed form; ``days`` are simulated and averaged for each."""
    return [_sessions(days, seed), _devices(days, seed + 1), _erlang(days, seed + 2), _expectation()]


def cosine_sessions(mean_qps: float, swing: float, lasts_s: float, at_s: np.ndarray, peak_s: float) -> np.ndarray:
    """Mean sessions of Mt/D/infinity with the rate mean (1 + swing cos g (t - peak)), g = 2 pi / day.

    The integral of the rate over the last D seconds: mean (D + swing (sin g(t - peak) - sin g(t - peak - D)) / g).
    """
    turn = 2 * np.pi / DAY_S
    since = turn * (at_s - peak_s)
    return mean_qps * (lasts_s + swing * (np.sin(since) - np.sin(since - turn * lasts_s)) / turn)


def constant(n: np.ndarray) -> np.ndarray:
    """Sessions that do not slow each other down."""
    return STEP_S + 0 * np.asarray(n, dtype=float)


def played(pool: Pool, days: int, rng: np.random.Generator, scale: float = 1.0, windows: int = WINDOWS) -> PoolResult:
    """Whole days, after one to settle, of sessions that all last 90 minutes."""
    counting = Counting(("one",), days * DAY_S, DAY_S, days * windows, 1)
    engine = SimulationEngine(pool, counting)
    for times_s in Varying.diurnal(scale * MEAN_QPS, SWING, peak_s=0.0).blocks(rng):
        inside = times_s[times_s <= counting.stop_s]
        engine.feed(arrivals_of(inside, np.full(len(inside), LASTS_S / STEP_S)))
        if len(inside) < len(times_s):
            break
    engine.finish(counting.stop_s)
    return result_of(engine.arrays, ["one"], [0], counting.window_s)


def by_window(values: np.ndarray, windows: int = WINDOWS) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each window of the day over days, and its standard error."""
    days = values.reshape(-1, windows)
    return days.mean(axis=0), days.std(axis=0, ddof=1) / math.sqrt(len(days))


def ratio_error(parts: np.ndarray, wholes: np.ndarray) -> float:
    """Relative standard error of sum(parts) / sum(wholes), each [n], of independent days (Cochran, 2.11)."""
    share = parts.sum() / wholes.sum()
    left = parts - share * wholes
    return math.sqrt(len(parts) / (len(parts) - 1) * float(left @ left)) / float(parts.sum())


def _middles() -> np.ndarray:
    return (np.arange(WINDOWS) + 0.5) * DAY_S / WINDOWS


def _sessions(days: int, seed: int) -> DayForm:
    """Sessions by the time of the day, against Mt/G/infinity."""
    result = played(Pool(1, constant), days, np.random.default_rng(seed), scale=20.0)
    expected = cosine_sessions(20 * MEAN_QPS, SWING, LASTS_S, _middles(), 0.0)
    simulated, errors = by_window(result.sessions)
    name = "sessions by time of day, Mt/G/infinity (largest error)"
    error = float(np.max(np.abs(simulated / expected - 1)))
    return DayForm(name, expected.mean(), simulated.mean(), error, float(np.max(errors / expected)))


def _devices(days: int, seed: int) -> DayForm:
    """Mean devices of a rule without lag, memory or tolerance: E[max(ceil(N / target), 1)], N Poisson of mean m(t)."""
    target, most = 10.0, 200
    scaler = Autoscaler(1, most, target, high=target, low=target * (1 - 1e-9), every_s=5.0, lag_s=0.0, hold_s=0.0)
    result = played(Pool(1, constant, autoscaler=scaler), days, np.random.default_rng(seed))
    means = cosine_sessions(MEAN_QPS, SWING, LASTS_S, _middles(), 0.0)
    counts = np.arange(2000)
    chances = stats.poisson.pmf(counts[None, :], means[:, None])
    expected = float((chances @ np.maximum(np.ceil(counts / target), 1)).mean())
    (simulated,), (error,) = by_window(result.devices_up.reshape(days, -1).mean(axis=1), 1)
    name = "devices up, reactive without lag: mean of ceil(N / target)"
    return DayForm(name, expected, float(simulated), float(simulated) / expected - 1, float(error) / expected)


def _erlang(days: int, seed: int) -> DayForm:
    """Sessions that a static fleet rejects at a constant rate: Erlang's B, whatever the lengths.

    A full fleet stays full for a while, and rejections come in bursts: 8,000 days are known to 0.3%, 800 to 1%.
    """
    servers, rate = 100, 0.0175
    pool = Pool(servers, constant, session_limit=1, queue_limit=0)
    days *= FLEET_DAYS
    counting = Counting(("one",), days * DAY_S, DAY_S, days, 1)
    engine, rng = SimulationEngine(pool, counting), np.random.default_rng(seed)
    for times_s in Varying.constant(rate).blocks(rng):
        inside = times_s[times_s <= counting.stop_s]
        engine.feed(arrivals_of(inside, np.full(len(inside), LASTS_S / STEP_S)))
        if len(inside) < len(times_s):
            break
    engine.finish(counting.stop_s)
    found = result_of(engine.arrays, ["one"], [0], counting.window_s).classes["one"]
    simulated, error = found.busy_share(), ratio_error(found.refused + found.gave_up, found.arrived)
    expected = queueing.erlang_b(servers, rate * LASTS_S)
    name = "rejected by a static fleet without a queue: Erlang B"
    return DayForm(name, expected, simulated, simulated / expected - 1, error)


def _expectation() -> DayForm:
    """The planner's own expectation of sessions, by which the predictive schedule is made, against the cosine's."""
    curve = diurnal(MEAN_QPS * (1 + SWING), MEAN_QPS * (1 - SWING), peak_hour=20.0)
    found = expected_sessions(curve, np.array([LASTS_S]))
    at_s = np.arange(len(curve.qps)) * curve.step_s
    expected = cosine_sessions(MEAN_QPS, SWING, LASTS_S, at_s, 20 * 3600.0)
    error = float(np.max(np.abs(found / expected - 1)))
    return DayForm(
        "expected sessions of the schedule, Mt/G/infinity (largest error)", expected.mean(), found.mean(), error
    )


def rule_of_kubernetes(rule: ScalingRule, sessions: np.ndarray, replicas: int, floors: np.ndarray) -> np.ndarray:
    """Replicas after each sync [n], by the algorithm of HorizontalPodAutoscaler written down again.

    desired = ceil(sum / target) unless |sum / (target x replicas) - 1| <= tolerance; below the present number the
    largest desired number of the stabilisation window; within minimum and maximum (kubernetes.io, Horizontal Pod
    Autoscaling, Algorithm details). ``sessions`` [n]: the sum of the metric at each sync; ``floors`` [n]: what a second
    metric, the schedule, desires then: the largest desired number of all metrics counts.
    """
    recent = deque([replicas], maxlen=int(rule.stabilisation_s // rule.poll_s) + 1)
    after = []
    for total, floor in zip(sessions, floors, strict=True):
        ratio = total / (rule.target_sessions_per_device * replicas)
        desired = replicas if abs(ratio - 1) <= rule.tolerance else math.ceil(total / rule.target_sessions_per_device)
        desired = max(desired, int(floor))
        recent.append(desired)
        if desired < replicas:
            desired = min(replicas, max(recent))
        replicas = min(max(desired, rule.minimum), rule.maximum)
        after.append(replicas)
    return np.array(after)


def ready_of(replicas: np.ndarray, before: int, lag_syncs: int) -> np.ndarray:
    """Ready replicas after each sync [n]: each is ready so many syncs after it was created; the newest go first."""
    ready_at, found = [-1] * before, []
    for sync, wanted in enumerate(replicas):
        del ready_at[wanted:]
        ready_at += [sync + lag_syncs] * (wanted - len(ready_at))
        found.append(sum(each <= sync for each in ready_at))
    return np.array(found)


SCHEDULE = tuple(ScheduledMinimum(at_s=at_s, devices=n) for at_s, n in ((0.0, 2), (20_005.0, 60), (61_005.0, 9)))
RULE = ScalingRule(target_sessions_per_device=8.0, start_s=0.0, stabilisation_s=600.0, minimum=2, maximum=2000)
RULES = (RULE, replace(RULE, start_s=300.0), replace(RULE, start_s=300.0, schedule=SCHEDULE), replace(RULE, maximum=10))


def rule_mismatches(curve: DemandCurve, seed: int, rule: ScalingRule = RULE) -> tuple[int, int]:
    """Syncs of a day at which the simulated rule has other devices than Kubernetes' algorithm; and all syncs.

    Sessions do not slow each other down, so that those present at a sync follow from the arrivals alone.
    """
    rng, seconds = np.random.default_rng(seed), curve.period_s
    arriving = Varying(curve.at, curve.peak_qps * (1 + 1e-9))
    times_s = next(arriving.blocks(rng))
    times_s = times_s[times_s <= seconds]
    frames = rng.integers(100, 54_000, len(times_s)).astype(float) + 0.5
    syncs = int(seconds // rule.poll_s)
    at_s = (np.arange(syncs) + 1) * rule.poll_s
    present = np.searchsorted(times_s, at_s) - np.searchsorted(np.sort(times_s + frames * STEP_S), at_s)
    floors = np.zeros(syncs)
    for row in rule.schedule:
        floors[at_s >= row.at_s] = row.devices
    wished = rule_of_kubernetes(rule, present, rule.minimum, floors)
    expected = ready_of(wished, rule.minimum, round(rule.start_s / rule.poll_s))
    counting = Counting(("one",), (syncs + 1) * rule.poll_s, 0.0, syncs + 1, 1)
    engine = SimulationEngine(Pool(rule.minimum, constant, autoscaler=autoscaler_of(rule, seconds)), counting)
    engine.feed(arrivals_of(times_s, frames), last=True, stop_s=counting.stop_s)
    up = result_of(engine.arrays, ["one"], [0], counting.window_s).devices_up[1:]
    return int(np.sum(np.rint(up) != expected)), syncs


small = partial(diurnal, 0.05, 0.01)
