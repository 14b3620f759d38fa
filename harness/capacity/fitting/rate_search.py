"""The highest Poisson rate at which a pool of devices meets every SLO: simulation and bisection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness.capacity.models.device import METRIC_NAMES, Device, slo_name
from harness.capacity.models.memory import KvRoom
from harness.capacity.models.spreads import StallTable
from harness.capacity.simulator.pool import Planned
from harness.capacity.simulator.sessions import Activity, Simulated, simulate
from harness.errors import InconclusiveError
from harness.records.slo import Slo

SESSIONS = 24_000
SIMULATION_NOISE = 0.015  # relative standard deviation of a rate between draws of so many sessions, as found
WARM_UP_SHARE = 0.2
LARGEST_POOL = 64
_BISECTIONS = 8
_FAR = 8  # times the most sessions measured: beyond it throughput hardly changes
_OTHER_RUNS = 8
_POPULATION = 100_000
_SESSIONS_QUANTILE = 0.95
KV_MEMORY = "KV memory"
COLLAPSE = "collapse under load: throughput falls as sessions grow"
LEAST_LOADED = "shared"
_RANGE = "sessions per device, known up to "


@dataclass(frozen=True)
class Limits:
    """The constraints of a rate: the SLOs, and the sessions per device up to which the step time is known.

    ``most_sessions``: limit of the 95th percentile of sessions on a device, as arrivals find it. ``slots``: most
    sessions that it admits, or None; ``kv``: room for their KV caches, or None for unlimited; ``kv_slots``: sessions of
    average size that fill it. ``routing``: see ``simulator.pool.Pool``; "shared" is one queue in front of the pool.
    """

    slos: Sequence[Slo]
    most_sessions: int
    slots: int | None = None
    kv: KvRoom | None = None
    kv_slots: float = math.inf
    routing: str = LEAST_LOADED

    @property
    def room_name(self) -> str:
        """What limits the number of sessions that fit."""
        return KV_MEMORY if self.kv_slots <= (self.slots or math.inf) else f"at most {self.slots} sessions per device"

    @property
    def room(self) -> float:
        """Average number of sessions that fit."""
        return min(self.slots or math.inf, self.kv_slots)

    def check(self, device: Device, class_names: Sequence[str]) -> None:
        """Raise InconclusiveError for an SLO that the mix or the measured requests cannot support."""
        for slo in self.slos:
            if slo.traffic_class not in class_names:
                raise InconclusiveError(f"an SLO names class {slo.traffic_class}, which is not in the mix")
            if slo.metric not in METRIC_NAMES:
                raise InconclusiveError(f"{slo.metric} has no model; use one of {', '.join(METRIC_NAMES)}")
            if not device.ratios(slo.traffic_class, slo.metric).carries(slo.quantile):
                needed = math.ceil(1 / (1 - slo.quantile) - 1e-9)
                raise InconclusiveError(
                    f"{slo_name(slo.traffic_class, slo.metric, slo.quantile)} needs {needed} measured "
                    "requests or more: measure a longer ladder"
                )


@dataclass(frozen=True)
class Traffic:
    """Sessions of a mix at rate 1, reused for every rate and pool so that a bisection compares like with like.

    Arrays [n]: gaps (mean exactly 1), class index, frames, and the quantile draws of each session (uniform numbers,
    one row per metric). Lengths and draws are stratified, so that the sample has the means of the mix.
    ``residual_frames``: remaining frames of sessions found in progress, ``whole_frames``: their total.
    ``mean_frames``: of the mix.
    """

    class_names: tuple[str, ...]
    gaps: np.ndarray
    class_index: np.ndarray
    frames: np.ndarray
    draws: dict[str, np.ndarray]
    residual_frames: np.ndarray
    whole_frames: np.ndarray
    mean_frames: float

    @classmethod
    def draw(cls, mix, rng: np.random.Generator, sessions: int = SESSIONS) -> Traffic:
        weights = np.array([each.weight for each in mix.classes], dtype=float)
        shares = weights / weights.sum()
        index = np.repeat(np.arange(len(shares)), _apportion(shares, sessions))
        populations = [np.sort(each.length.sample(rng, _POPULATION)).astype(float) for each in mix.classes]
        frames = np.concatenate([_strata(each, int(np.sum(index == i))) for i, each in enumerate(populations)])
        order = rng.permutation(sessions)
        index, frames = index[order], frames[order]
        gaps = rng.exponential(1.0, sessions)
        residual_frames, whole_frames = _in_progress(populations, shares, rng)
        return cls(
            class_names=tuple(each.name for each in mix.classes),
            gaps=gaps / gaps.mean(),
            class_index=index,
            frames=frames,
            draws={metric: _stratified(rng.random(sessions), index) for metric in METRIC_NAMES},
            residual_frames=residual_frames,
            whole_frames=whole_frames,
            mean_frames=float(shares @ [each.mean() for each in populations]),
        )

    @property
    def mean_context(self) -> float:
        """Mean frames that a session found in progress has spoken."""
        return float(np.mean(self.whole_frames - self.residual_frames))

    def again(self, seed: int) -> Traffic:
        """The same sessions and gaps in another order."""
        rng = np.random.default_rng(seed)
        order, gaps = rng.permutation(len(self.frames)), rng.permutation(self.gaps)
        draws = {metric: values[order] for metric, values in self.draws.items()}
        return replace(self, gaps=gaps, frames=self.frames[order], class_index=self.class_index[order], draws=draws)

    def part(self, sessions: int) -> Traffic:
        """The first ``sessions`` of its sessions, repeated if there are fewer, at the same mean rate and mean work."""
        gaps, frames, index = (np.resize(each, sessions) for each in (self.gaps, self.frames, self.class_index))
        draws = {metric: _stratified(np.resize(values, sessions), index) for metric, values in self.draws.items()}
        scale = self.frames.mean() / frames.mean()
        return replace(self, gaps=gaps / gaps.mean(), class_index=index, frames=frames * scale, draws=draws)


@dataclass(frozen=True)
class SimulatedLoad:
    """A pool at a rate. ``shares``: value / limit for each limit, at most 1 where it is met; ``worst``: the largest.

    ``sessions_p95``: of a device, as arrivals find it; ``sessions``: of the simulated pool, mean over time.
    ``queued``: names of the SLOs that are violated only because sessions wait for KV memory.
    """

    rate_per_s: float
    devices: int
    shares: dict[str, float]
    sessions: float
    sessions_p95: float
    queued: frozenset[str] = frozenset()

    @property
    def met(self) -> bool:
        return all(share <= 1 for share in self.shares.values())

    @property
    def worst(self) -> str:
        return max(self.shares, key=lambda name: self.shares[name])

    @property
    def binding(self) -> str:
        """The binding constraint: an SLO, or KV memory if waiting for it causes the violation."""
        return KV_MEMORY if self.worst in self.queued else self.worst


def simulate_load(
    device: Device, traffic: Traffic, rate_per_s: float, devices: int, limits: Limits | None = None, lost: int = 0
) -> tuple[Simulated, np.ndarray]:
    """Simulate a pool at a Poisson rate, started near its steady state. Also returns which sessions count [n].

    When the first of these arrives, ``lost`` of the devices fail permanently; their sessions continue elsewhere.
    """
    gaps_s = traffic.gaps / rate_per_s
    limits = limits or Limits((), 1)
    found, whole = _found_in_progress(device, traffic, rate_per_s, devices, limits.room)
    kv = limits.kv
    arrival_s = np.concatenate([np.zeros(len(found)), np.cumsum(gaps_s)])
    counted = np.arange(len(arrival_s)) >= len(found) + WARM_UP_SHARE * len(gaps_s)
    lost_at_s = float(arrival_s[counted][0])
    simulated = simulate(
        arrival_s,
        np.concatenate([found, traffic.frames]),
        device.step_time,
        devices=devices,
        session_limit=limits.slots,
        bytes_=kv.bytes_of(np.concatenate([whole, traffic.frames])) if kv else 0,
        memory_bytes=kv.room_bytes if kv else math.inf,
        routing=limits.routing,
        first_audio=device.first_audio,
        class_index=np.concatenate([np.full(len(found), -1), traffic.class_index]),
        planned=[Planned(lost_at_s, "fail", number) for number in range(lost)],
        stop_s=float(arrival_s[-1]),
    )
    return simulated, counted


def values_of(
    device: Device, traffic: Traffic, simulated: Simulated, chosen: np.ndarray, metric: str, class_index: int
) -> np.ndarray:
    """``metric`` of the sessions of a class among the ``chosen``.

    Time to first audio is infinite for those that never started; RTF and stalls are of those that made some audio.
    """
    picked = chosen & (simulated.class_index == class_index)
    if metric != "ttfa_s":
        picked &= ~np.isnan(simulated.rtf)
    draws = traffic.draws[metric][np.flatnonzero(picked) - (len(simulated.start_s) - len(traffic.gaps))]
    scatter = device.ratios(traffic.class_names[class_index], metric)
    if isinstance(scatter, StallTable):
        return scatter.at(simulated.step_s()[picked], draws)
    if metric == "rtf":
        return simulated.rtf[picked] * scatter.at(draws)
    start_s = simulated.start_s[picked]
    heard_s = start_s + (simulated.first_audio_s[picked] - start_s) * scatter.at(draws)
    return np.nan_to_num(heard_s - simulated.arrival_s[picked], nan=np.inf)


def judge_load(device: Device, traffic: Traffic, limits: Limits, rate_per_s: float, devices: int) -> SimulatedLoad:
    """Simulate a pool and compare it with every limit."""
    simulated, counted = simulate_load(device, traffic, rate_per_s, devices, limits)
    return load_of(device, traffic, limits, rate_per_s, devices, simulated, counted)


def load_of(
    device: Device,
    traffic: Traffic,
    limits: Limits,
    rate_per_s: float,
    devices: int,
    simulated: Simulated,
    counted: np.ndarray,
) -> SimulatedLoad:
    """Compare the ``counted`` sessions [n] of a simulated pool with every limit."""
    shares, queued = {}, set()
    waiting = ~(simulated.start_s <= simulated.arrival_s)
    for slo in limits.slos:
        index = traffic.class_names.index(slo.traffic_class)
        values = values_of(device, traffic, simulated, counted, slo.metric, index)
        value = float(np.quantile(values, slo.quantile, method="higher")) if len(values) else math.inf
        name = slo_name(slo.traffic_class, slo.metric, slo.quantile)
        shares[name] = _share(value, slo.limit)
        own = waiting[counted & (simulated.class_index == index)]
        if limits.kv is not None and slo.metric == "ttfa_s" and len(own) and own.mean() > 1 - slo.quantile:
            queued.add(name)
    started = counted & ~np.isnan(simulated.start_s)
    active = simulated.active_at_start[started]
    sessions_p95 = float(np.quantile(active, _SESSIONS_QUANTILE, method="higher")) if len(active) else math.inf
    shares[range_name(limits)] = sessions_p95 / limits.most_sessions
    sessions = _mean_sessions(simulated, counted)
    return SimulatedLoad(rate_per_s, devices, shares, sessions, sessions_p95, frozenset(queued))


def range_name(limits: Limits) -> str:
    return f"{_RANGE}{limits.most_sessions}"


def is_of_range(binding: str) -> bool:
    """Whether nothing but the most sessions measured binds."""
    return binding.startswith(_RANGE)


def steady_limit(device: Device, limits: Limits, probabilities: Sequence[float] | None = None) -> tuple[float, str]:
    """Frames/s of a device with a constant number of sessions, at the most that meet every limit; and what binds.

    The rate per device of a large pool tends to it. ``probabilities`` replaces the SLOs' quantiles, one each (a
    bootstrap of their sampling error). 0 where one session alone violates an SLO.
    """
    sessions, binding = _steady(device, limits, probabilities)
    return float(np.max(device.step_time.frames_per_s(sessions), initial=0.0)), binding


def steady_sessions(device: Device, limits: Limits) -> float:
    """The most constant sessions with which a device meets every limit; 0 where one alone violates an SLO."""
    return float(np.max(_steady(device, limits, None)[0], initial=0.0))


def _steady(device: Device, limits: Limits, probabilities: Sequence[float] | None) -> tuple[np.ndarray, str]:
    """Numbers of sessions from 1 up to the most that meet every limit; and what binds there."""
    if limits.room < 1:
        return np.zeros(0), limits.room_name
    most = min(limits.most_sessions, limits.room)
    sessions = np.linspace(1, max(most, 1), 512)
    step_s = device.step_time(sessions)
    reach, binding = len(sessions), limits.room_name if limits.room == most else range_name(limits)
    for row, slo in enumerate(limits.slos):
        probability = probabilities[row] if probabilities is not None else slo.quantile
        values = device.at_constant_step(slo.traffic_class, slo.metric, probability, step_s)
        broken = np.flatnonzero(values > slo.limit)
        if len(broken) and broken[0] < reach:
            reach = int(broken[0])
            binding = slo_name(slo.traffic_class, slo.metric, slo.quantile)
    return sessions[:reach], binding


def steady_draws(device: Device, limits: Limits, rng: np.random.Generator) -> np.ndarray:
    """``steady_limit`` of every drawn alternative [d], in frames/s: the quick bootstrap of a device's rate.

    Random traffic lowers the rate below the steady limit by nearly the same share in all alternatives, so the rate is
    proportional to the limit. Besides the step time, the ratio at an SLO's quantile q of n requests is resampled: the
    rank of that quantile is Beta((n+1)q, (n+1)(1-q)).
    """
    limits_of_draws = []
    for alternative in device.alternatives():
        ranks = [drawn_rank(device, slo, rng) for slo in limits.slos]
        limits_of_draws.append(steady_limit(alternative, limits, ranks)[0])
    return np.array(limits_of_draws)


def least_throughput(device: Device, limits: Limits) -> float:
    """Frames/s, n / S(n), of a device: the least from the most sessions that meet its SLOs to all that it admits.

    A device recovers from any overload at a rate below it.
    """
    fewest = max(steady_sessions(device, limits), 1.0)
    most = min(limits.room, _FAR * device.max_sessions)
    sessions = np.geomspace(fewest, max(most, fewest), 256)
    return float(np.min(device.step_time.frames_per_s(sessions)))


def lasts(device: Device, traffic: Traffic, limits: Limits, rate_per_s: float, devices: int) -> bool:
    """Whether a pool that meets every limit in one run also does in several others.

    Asked only where it could collapse (metastability): a pool may serve a rate until chance fills one device.
    """
    if rate_per_s / devices * traffic.mean_frames <= least_throughput(device, limits):
        return True
    others = (traffic.again(seed) for seed in range(_OTHER_RUNS))
    return all(judge_load(device, each, limits, rate_per_s, devices).met for each in others)


def simulation_noise(draws: int, rng: np.random.Generator) -> np.ndarray:
    """Factors [draws] by which a simulated rate differs from that of another draw of the traffic."""
    return np.exp(SIMULATION_NOISE * rng.standard_normal(draws))


def highest_rate(
    device: Device, traffic: Traffic, limits: Limits, devices: int = 1, at_most: float = math.inf
) -> tuple[float, str]:
    """The highest rate (requests/s), up to ``at_most``, that meets every limit, and what is violated just above it.

    Bisection to within 0.4% of the steady limit, above which no pool can stay for long. Another draw of the traffic
    changes the result by 1 to 2%. 0.0 where one session alone violates an SLO.
    """
    steady, binding = steady_limit(device, limits)
    if steady <= 0:
        return 0.0, binding
    low, high = 0.0, min(devices * steady / traffic.mean_frames, at_most)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        load = judge_load(device, traffic, limits, middle, devices)
        if not load.met:
            high, binding = middle, load.binding
        elif lasts(device, traffic, limits, middle, devices):
            low = middle
        else:
            high, binding = middle, COLLAPSE
    return low, binding


def _apportion(shares: np.ndarray, sessions: int) -> np.ndarray:
    """Split ``sessions`` by share into whole numbers, each at least 1."""
    edges = np.rint(np.cumsum(shares) * sessions).astype(int)
    counts = np.maximum(np.diff(edges, prepend=0), 1)
    counts[np.argmax(counts)] += sessions - counts.sum()
    return counts


def _stratified(draws: np.ndarray, class_index: np.ndarray) -> np.ndarray:
    """Uniform numbers in the same order within each class, evenly spaced: each class has its exact quantiles."""
    even = np.empty(len(draws))
    for index in np.unique(class_index):
        own = class_index == index
        even[own] = (np.argsort(np.argsort(draws[own])) + 0.5) / np.sum(own)
    return even


def _strata(population: np.ndarray, n: int) -> np.ndarray:
    """``n`` values that represent a sorted population with its mean: the means of n equal parts."""
    edges = np.linspace(0, len(population), n + 1).astype(int)
    return np.maximum(np.add.reduceat(population, edges[:-1]) / np.diff(edges), 1.0)


def _in_progress(
    populations: list[np.ndarray], shares: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Remaining and total frames of sessions found in progress: drawn in proportion to length, at a uniform phase."""
    everyone = np.concatenate(populations)
    work = np.concatenate([share * each for share, each in zip(shares, populations, strict=True)])
    chosen = np.searchsorted(np.cumsum(work), rng.random(8192) * work.sum(), side="right")
    whole = everyone[np.minimum(chosen, len(everyone) - 1)]
    return np.maximum(whole * rng.random(8192), 1e-3), whole


def _found_in_progress(
    device: Device, traffic: Traffic, rate_per_s: float, devices: int, room: float
) -> tuple[np.ndarray, np.ndarray]:
    """Remaining and total frames of the sessions that a pool starts with: its mean number in steady state.

    Processor sharing with a rate that depends on the number of sessions is insensitive to their lengths:
    P(n) ~ (rate x mean frames)^n x S(1) S(2) .. S(n) / n! (Kelly, Reversibility and Stochastic Networks, 3.3).
    Where throughput falls with more sessions, P has a second mode in collapse: the start is in the lower one.
    """
    n = np.arange(1, math.ceil(4 * device.max_sessions) + 2, dtype=float)
    offered = rate_per_s / devices * traffic.mean_frames
    rises = np.log(offered * device.step_time(n) / n)
    weights = np.concatenate([[0.0], np.cumsum(rises)])[: _end_of_the_lower_mode(rises)]
    chances = np.exp(weights - weights.max())
    mean = float(chances @ np.arange(len(chances)) / chances.sum())
    count = round(devices * min(mean, room))
    return np.resize(traffic.residual_frames, count), np.resize(traffic.whole_frames, count)


def _end_of_the_lower_mode(rises: np.ndarray) -> int:
    """The number of sessions at which chances, by their logarithmic ``rises``, rise again after they fell."""
    falling = np.flatnonzero(rises <= 0)
    if not len(falling):
        return len(rises) + 1
    again = np.flatnonzero(rises[falling[0] :] > 0)
    return int(falling[0] + again[0] + 1) if len(again) else len(rises) + 1


def _mean_sessions(simulated: Simulated, counted: np.ndarray) -> float:
    """Mean sessions in progress from the first counted arrival to the end."""
    start_s, end_s = float(simulated.arrival_s[counted][0]), float(simulated.arrival_s[-1])
    started = ~np.isnan(simulated.start_s)
    ends_s = np.nan_to_num(simulated.end_s[started], nan=end_s)
    return Activity.between(simulated.start_s[started], ends_s).mean(lambda n: n, start_s, end_s)


def drawn_rank(device: Device, slo, rng: np.random.Generator) -> float:
    scatter = device.ratios(slo.traffic_class, slo.metric)
    parts = scatter.samples if isinstance(scatter, StallTable) else (scatter,)
    count = min(each.independent for each in parts)
    return float(rng.beta((count + 1) * slo.quantile, (count + 1) * (1 - slo.quantile)))


def _share(value: float, limit: float) -> float:
    if limit > 0:
        return value / limit
    return math.inf if value > 0 else 0.0
