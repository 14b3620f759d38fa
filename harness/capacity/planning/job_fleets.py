"""Devices for streams, for tasks, and for both on one fleet: tasks fill what streams leave over a day.

A fleet is simulated with the arrivals of at least a day: streams come first, tasks run in segments in what they leave
of the sessions that both share, and give way at the end of a segment. Streams are judged at the peak of the day, tasks
over all of it, and both by enough of them for their percentiles (see ``job_extent``); a task that has not ended by the
end of the simulation has missed its deadline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from harness import wire
from harness.capacity.fitting.rate_search import LARGEST_POOL, Limits, Traffic, load_of, steady_limit, steady_sessions
from harness.capacity.models.device import METRIC_NAMES, slo_name
from harness.capacity.planning.job_extent import Extent, Judged, extent_of
from harness.capacity.planning.pools import LEAST_SHARE, Pools
from harness.capacity.simulator.engine import arrivals_of
from harness.capacity.simulator.pool import Pool
from harness.capacity.simulator.sessions import Simulated, remembered
from harness.capacity.simulator.traffic import DAY_S, Varying
from harness.records.jobs import JobsPlan, JudgedTurnaround, SizedFleet
from harness.records.plan import Counts
from harness.records.turnaround import TurnaroundSlo
from harness.traffic.mix import Lengths, Mix

WARM_UP_S = 6 * 3600.0
MOST_SESSIONS = 2_000_000  # of one simulation, and segments; above, a part of the fleet is simulated with its load
_PEAK_SHARE = 0.9  # of the highest rate: streams that arrive then are judged
_SHARED = (1.0, 0.85, 0.7, 0.5)  # of the sessions with which streams meet their SLOs: what streams and tasks may share
_ALONE = (1.0, 0.75, 0.5, 0.3, 0.15)  # of the sessions that were measured: what tasks alone may have
_UNSERVED = "No number of devices meets the SLOs of streams and tasks on one fleet."
STREAMS, TASKS, BOTH = KINDS = ("streams", "tasks", "both")


@dataclass(frozen=True)
class JobDemand:
    """Tasks that arrive by chance, ``per_hour`` of them, and how the studio runs them.

    ``at_once``: places of all workers, None for as many as there is room for. ``between``: seconds, and seconds per
    frame spoken before, that resuming takes; None seconds: as long as to first audio, as the prompt is read again.
    ``swing``: of the rate of streams over a day, 0 to 1.
    """

    per_hour: float
    lengths: Lengths
    slos: tuple[TurnaroundSlo, ...]
    segment_frames: int
    at_once: int | None = None
    between: tuple[float | None, float] = (None, 0.0)
    swing: float = 0.0

    @property
    def frames_per_s(self) -> float:
        return self.per_hour / 3600 * self.lengths.mean_frames()

    @property
    def segments(self) -> float:
        """Segments of a task, on average."""
        return float(np.ceil(self.lengths.frames / self.segment_frames).mean())

    @property
    def longest_s(self) -> float:
        """The latest deadline of any task, seconds after its submission."""
        audio_s = np.array([self.lengths.frames.max() * wire.SECONDS_PER_FRAME])
        return max(float(slo.deadline_s(audio_s)[0]) for slo in self.slos)


@dataclass(frozen=True)
class FleetLoad:
    """A fleet of a kind as simulated. ``sessions``: what streams and tasks share, as the studio's ``--sessions``.

    ``shares``: value / limit of every SLO and of the utilisation, at most 1 where it is met. ``turnarounds``: the value
    of each SLO of tasks.
    """

    kind: str
    devices: int
    sessions: int
    shares: dict[str, float]
    turnarounds: dict[TurnaroundSlo, float] = field(default_factory=dict)
    tasks: int = 0
    sessions_p95: float = 0.0

    @property
    def met(self) -> bool:
        return all(share <= 1 for share in self.shares.values())

    @property
    def binding(self) -> str:
        return max(self.shares, key=lambda name: self.shares[name])


@dataclass(frozen=True)
class Arrived:
    """The arrivals of a simulation in order of time [n]; class -1 is a task. ``counted``: by whom it is judged."""

    arrival_s: np.ndarray
    frames: np.ndarray
    class_index: np.ndarray
    counted: np.ndarray
    draws: dict[str, np.ndarray]
    stop_s: float

    @property
    def is_task(self) -> np.ndarray:
        return self.class_index < 0


@dataclass(frozen=True)
class JobFleets:
    """Fleets of devices as ``pools`` describes them, at the peak rate ``qps`` of streams of ``mix``, and with tasks."""

    pools: Pools
    mix: Mix
    demand: JobDemand
    qps: float
    seed: int = 0
    _drawn: dict[str, tuple[Extent, Arrived]] = field(default_factory=dict, repr=False)  # the last of each kind

    def fewest(self, kind: str) -> FleetLoad | None:
        """The smallest fleet that meets every limit, as simulated.

        None where none does that has up to 8 times the devices that the work alone needs, and 64 more.
        """
        least = self._least(kind)
        if not math.isfinite(least):
            return None
        low = max(1, math.ceil(least - 1e-9))
        at_most = 8 * low + 64
        tried: dict[int, FleetLoad] = {}

        def load(devices: int) -> FleetLoad:
            if devices not in tried:
                tried[devices] = self.best(kind, devices)
            return tried[devices]

        high, step = low, 1
        while not load(high).met:
            low, high, step = high + 1, high + step, 2 * step
            if low > at_most:
                return None
        return load(_first(lambda devices: load(devices).met, low, high))

    def best(self, kind: str, devices: int) -> FleetLoad:
        """The fleet with the shared sessions that suit it best: the first that meet every limit, else the nearest."""
        found = []
        for sessions in self._choices(kind, devices):
            found.append(self.judge(kind, devices, sessions))
            if found[-1].met:
                return found[-1]
        return min(found, key=lambda load: max(load.shares.values()))

    def judge(self, kind: str, devices: int, sessions: int) -> FleetLoad:
        """Simulate a fleet of a kind with this many shared sessions, and compare it with every limit."""
        extent = self._extent(kind, devices)
        simulated_devices = round(extent.part * devices)
        arrived = self._arrived(kind, extent)
        shared = max(0, round(sessions * simulated_devices / devices))
        simulated = self._simulated(arrived, simulated_devices, shared)
        shares = dict(self._utilisation(kind, devices, sessions))
        sessions_p95, turnarounds = 0.0, {}
        streams = arrived.counted & ~arrived.is_task
        if streams.any():
            load = load_of(
                self.pools.device, _traffic(self.mix, arrived), self._limits, self.qps, devices, simulated, streams
            )
            shares, sessions_p95 = shares | load.shares, load.sessions_p95
        tasks = arrived.counted & arrived.is_task
        for slo in self.demand.slos if kind != STREAMS else ():
            turnaround_s = np.nan_to_num(simulated.end_s - arrived.arrival_s, nan=np.inf)[tasks]
            value = slo.value(turnaround_s, arrived.frames[tasks] * wire.SECONDS_PER_FRAME)
            turnarounds[slo], shares[str(slo)] = value, value / slo.limit
        return FleetLoad(kind, devices, sessions, shares, turnarounds, int(tasks.sum()), sessions_p95)

    @property
    def _limits(self) -> Limits:
        return self.pools.limits

    def _least(self, kind: str) -> float:
        """Devices below which the utilisation is above its cap."""
        return max(share for _, share in self._utilisation(kind, 1, math.floor(self._most(kind))))

    def _most(self, kind: str) -> float:
        """The most sessions of a device: with which streams meet their SLOs, or for tasks those that were measured."""
        limits = self._limits
        if kind == TASKS:
            return max(1.0, min(limits.most_sessions, limits.room))
        return max(1.0, steady_sessions(self.pools.device, limits))

    def _choices(self, kind: str, devices: int) -> list[int]:
        if kind == STREAMS:
            return [0]
        shares = _SHARED if kind == BOTH else _ALONE
        return sorted({max(1, math.floor(share * self._most(kind) * devices)) for share in shares}, reverse=True)

    def _utilisation(self, kind: str, devices: int, sessions: int) -> Iterable[tuple[str, float]]:
        """Work / what the devices carry within the cap: of streams at their peak, and of everything over a day.

        That of tasks holds the time in which they start and resume, as the frames of the session that they hold.
        """
        cap, device = self.pools.utilisation_cap, self.pools.device
        streams = self.qps * self.pools.traffic.mean_frames if kind != TASKS else 0.0
        if streams:
            steady = steady_limit(device, self._limits)[0]
            yield f"utilisation {cap:g} at the peak", streams / (cap * devices * steady) if steady else math.inf
        if kind != STREAMS:
            each = max(sessions / devices, 1.0)
            carried = float(device.step_time.frames_per_s(each))
            held = self._held_s(float(device.step_time(each))) * carried / each
            work = streams / (1 + self.demand.swing) + self.demand.frames_per_s + held
            yield f"utilisation {cap:g} over the day", work / (cap * devices * carried)

    def _held_s(self, step_s: float) -> float:
        """Seconds of sessions that tasks hold in each second before they speak: at their start and as they resume."""
        base_s, steps = self.pools.device.first_audio
        seconds, per_frame_s = self._between
        resumed_s = seconds + per_frame_s * self.demand.lengths.mean_frames() / 2
        start_s = base_s + max(steps - 1, 0.0) * step_s
        return self.demand.per_hour / 3600 * (start_s + (self.demand.segments - 1) * resumed_s)

    def _extent(self, kind: str, devices: int) -> Extent:
        """What is simulated of a fleet. All kinds need what the SLOs of both need, so that they get the same arrivals.

        The part is one of whole devices: one of them for a day, however many sessions it has, and none for longer.
        Raises InconclusiveError where an SLO would be judged by too few.
        """
        streams = self.qps if kind != TASKS else 0.0
        tasks = self.demand.per_hour / 3600 * (1 + self.demand.segments) if kind != STREAMS else 0.0

        def part_over(days: int) -> float:
            events = (streams + tasks) * self._stop_s(days)
            within = math.floor(min(devices, LARGEST_POOL, devices * MOST_SESSIONS / max(events, 1.0)))
            return (within or int(days == 1)) / devices

        return extent_of(self._judged(), part_over)

    def _judged(self) -> list[Judged]:
        """What each SLO is judged by: streams of its class near the peak, and tasks."""
        swing, weights = self.demand.swing, {each.name: each.weight for each in self.mix.classes}
        rates = (1 + swing * np.cos(np.linspace(0, 2 * np.pi, 1000, endpoint=False))) / (1 + swing)
        at_peak = self.qps * DAY_S * float(np.mean(rates * (rates >= _PEAK_SHARE))) / sum(weights.values())
        judged = []
        for slo in self._limits.slos:
            name = slo_name(slo.traffic_class, slo.metric, slo.quantile)
            judged.append(Judged(name, STREAMS, at_peak * weights[slo.traffic_class], slo.quantile))
        return judged + [Judged(str(slo), TASKS, 24 * self.demand.per_hour, slo.quantile) for slo in self.demand.slos]

    def _stop_s(self, days: int) -> float:
        return WARM_UP_S + DAY_S * days + min(self.demand.longest_s, DAY_S)

    def _arrived(self, kind: str, extent: Extent) -> Arrived:
        last, arrived = self._drawn.get(kind, (None, None))
        if arrived is None or last != extent:
            arrived = self._draw(kind, extent)
            self._drawn[kind] = extent, arrived  # not all of them: one may take 100 MB
        return arrived

    def _draw(self, kind: str, extent: Extent) -> Arrived:
        """Streams and tasks, each from a generator of its own: a fleet of both gets the very same ones."""
        streams, tasks = (np.random.default_rng([self.seed, number]) for number in (0, 1))
        part, stop_s, swing = extent.part, self._stop_s(extent.days), self.demand.swing
        rate = Varying.diurnal(part * self.qps / (1 + swing), swing, peak_s=WARM_UP_S + DAY_S / 2)
        stream_s = _times(rate, streams, stop_s) if kind != TASKS else np.zeros(0)
        task_s = _times(Varying.constant(part * self.demand.per_hour / 3600), tasks, stop_s)
        task_s = task_s if kind != STREAMS else np.zeros(0)
        weights = np.array([each.weight for each in self.mix.classes], dtype=float)
        index = streams.choice(len(weights), len(stream_s), p=weights / weights.sum())
        frames = np.zeros(len(stream_s))
        for number, each in enumerate(self.mix.classes):
            frames[index == number] = each.length.sample(streams, int(np.sum(index == number)))
        frames = np.concatenate([frames, self.demand.lengths.sample(tasks, len(task_s))])
        arrival_s = np.concatenate([stream_s, task_s])
        at_peak = rate.rate_per_s(stream_s) >= _PEAK_SHARE * rate.highest_per_s
        is_within = (arrival_s >= WARM_UP_S) & (arrival_s < WARM_UP_S + extent.counted_s)
        counted = is_within & np.concatenate([at_peak, np.ones(len(task_s), bool)])
        order = np.argsort(arrival_s, kind="stable")
        draws = {metric: streams.random(len(order)) for metric in METRIC_NAMES}
        index = np.concatenate([index, np.full(len(task_s), -1)])
        return Arrived(arrival_s[order], frames[order], index[order], counted[order], draws, stop_s)

    @property
    def _between(self) -> tuple[float, float]:
        """What resuming takes: seconds, and seconds per frame spoken before."""
        seconds, per_frame_s = self.demand.between
        if seconds is None:
            base_s, steps = self.pools.device.first_audio
            seconds = base_s + max(steps - 1, 0.0) * float(self.pools.device.step_time(1.0))
        return seconds, per_frame_s

    def _simulated(self, arrived: Arrived, devices: int, shared: int) -> Simulated:
        limits, demand = self._limits, self.demand
        kv = limits.kv
        pool = Pool(
            devices,
            self.pools.device.step_time,
            session_limit=limits.slots,
            memory_bytes=kv.room_bytes if kv else math.inf,
            routing=limits.routing,
            first_audio=self.pools.device.first_audio,
            on_failure="resume",
            shared_sessions=shared,
            task_slots=demand.at_once,
            between_segments=self._between,
        )
        block = arrivals_of(
            arrived.arrival_s,
            arrived.frames,
            bytes_=kv.bytes_of(arrived.frames) if kv else 0,
            pick=np.random.default_rng(self.seed).random(len(arrived.frames)),
            segment=np.where(arrived.is_task, float(demand.segment_frames), 0.0),
            turn=arrived.arrival_s,
        )
        return remembered(pool, block, arrived.class_index, arrived.stop_s)


@dataclass(frozen=True)
class SharedPlan:
    """Fleets for one peak rate of streams: ``loads`` by kind, and the interval of each count and of what is saved.

    Intervals are of the step time's: the counts with the fastest and the slowest likely devices. None: a bound that is
    not known, as no fleet of the slowest devices meets the SLOs. A kind whose SLOs no fleet meets is left out.
    """

    qps: float
    loads: dict[str, FleetLoad]
    intervals: dict[str, Counts]
    saved_interval: Counts | None
    extrapolated: bool

    @property
    def two_fleets(self) -> int | None:
        """Devices of two separate fleets."""
        known = [self.loads[kind].devices for kind in (STREAMS, TASKS) if kind in self.loads]
        return sum(known) if len(known) == 2 else None

    @property
    def saved(self) -> int | None:
        """By how many devices one fleet is smaller than two."""
        two = self.two_fleets
        return two - self.loads[BOTH].devices if two is not None and BOTH in self.loads else None


def shared_plan(fleets: JobFleets, shares: np.ndarray, confidence: float) -> SharedPlan:
    """Plan for both kinds of demand; ``shares`` [d]: drawn alternatives of a device's rate, as shares of the fitted.

    A share of 0 is a device of which one session violates an SLO: no number of those suffices.
    """
    loads = _loads(fleets)
    tails = np.quantile(shares, [(1 + confidence) / 2, (1 - confidence) / 2], method="inverted_cdf")
    others = [_loads(_faster(fleets, float(share))) if share >= LEAST_SHARE else {} for share in tails]
    intervals = {
        kind: _range(load.devices, [each[kind].devices if kind in each else None for each in others])
        for kind, load in loads.items()
    }
    plan = SharedPlan(fleets.qps, loads, intervals, None, _is_extrapolated(fleets, loads))
    if plan.saved is None:
        return plan
    saved = [replace(plan, loads=each).saved for each in others]
    is_known = None not in saved
    return replace(plan, saved_interval=_range(plan.saved, saved) if is_known else (None, None))


def jobs_plan(plan: SharedPlan, demand: JobDemand) -> JobsPlan:
    """The fleets as plan.json holds them."""
    fleets = [
        SizedFleet(
            kind=kind,
            devices=load.devices,
            interval=plan.intervals[kind],
            sessions=load.sessions,
            turnarounds=tuple(
                JudgedTurnaround(slo=str(slo), value=slo.shown(value)) for slo, value in load.turnarounds.items()
            ),
            binding=load.binding,
        )
        for kind, load in plan.loads.items()
    ]
    return replace(
        nothing_sized(demand, plan.qps, "" if BOTH in plan.loads else _UNSERVED),
        fleets=tuple(fleets),
        two_fleets=plan.two_fleets,
        saved=plan.saved,
        saved_interval=plan.saved_interval,
        basis="extrapolated" if plan.extrapolated else "simulated",
    )


def nothing_sized(demand: JobDemand, qps: float, note: str = "") -> JobsPlan:
    """What is asked for, before any fleet is known; ``note``: why none serves streams and tasks."""
    return JobsPlan(
        qps=qps,
        swing=demand.swing,
        per_hour=demand.per_hour,
        mean_audio_s=demand.lengths.mean_frames() * wire.SECONDS_PER_FRAME,
        segment_s=demand.segment_frames * wire.SECONDS_PER_FRAME,
        slos=tuple(map(str, demand.slos)),
        note=note,
    )


def _loads(fleets: JobFleets) -> dict[str, FleetLoad]:
    found = ((kind, fleets.fewest(kind)) for kind in KINDS)
    return {kind: load for kind, load in found if load is not None}


def _range(value: int, others: Sequence[int | None]) -> Counts:
    """From the least to the most; no upper end where one of the others is not known, as no number suffices."""
    known = [value, *(each for each in others if each is not None)]
    return min(known), None if None in others else max(known)


def _faster(fleets: JobFleets, share: float) -> JobFleets:
    """The fleets with devices that make ``share`` times the frames."""
    device = fleets.pools.device
    step = replace(device.step_time, values=tuple(value / share for value in device.step_time.values))
    return replace(fleets, pools=fleets.pools.changed(device=replace(device, step_time=step)))


def _is_extrapolated(fleets: JobFleets, loads: dict[str, FleetLoad]) -> bool:
    return any(not fleets.pools.has_seen(load.sessions_p95) for load in loads.values())


def _first(is_met: Callable[[int], bool], low: int, high: int) -> int:
    """The first number of ``low`` to ``high`` at which a limit is met that is met at ``high``."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_met(middle) else (middle + 1, high)
    return high


def _times(rate: Varying, rng: np.random.Generator, stop_s: float) -> np.ndarray:
    found = []
    for block in rate.blocks(rng):
        found.append(block[block < stop_s])
        if len(found[-1]) < len(block):
            return np.concatenate(found)
    return np.zeros(0)


def _traffic(mix: Mix, arrived: Arrived) -> Traffic:
    """The arrivals as what ``load_of`` compares with SLOs: names, classes and quantile draws."""
    nobody = np.zeros(0)
    return Traffic(
        class_names=tuple(each.name for each in mix.classes),
        gaps=arrived.arrival_s,
        class_index=arrived.class_index,
        frames=arrived.frames,
        draws=arrived.draws,
        residual_frames=nobody,
        whole_frames=nobody,
        mean_frames=math.nan,
    )
