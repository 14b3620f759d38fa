"""A model fitted to measured points: batch times, hops, entry, shared processors; it predicts any point's step time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import optimize

from harness import wire
from harness.records.schema import BatchStatistics, Rung, StageStatistics
from harness.sweep.optimizer.closed_queue import DEVICE, HOST, Round, Station, StepTimes, turns
from harness.topology import Knobs, frame_path, number_of, owner_of

# Tasks at full speed, and where: (cores, HOST) are shared by stages, hops and the entry, (executions, DEVICE) by stages
# alone.
ROOMS = ((math.inf, HOST), (1, HOST), (2, HOST), (3, HOST), (4, HOST), (8, HOST), (1, DEVICE), (2, DEVICE))
ENTRY_SHARES = 0.0, 0.3, 0.6, 0.9  # share of the entry in a frame's time outside its stages; the rest is hops
DRAGS = 0.0, 0.05, 0.1, 0.2
_DEFAULTS = {"delay_us": 0, "max_batch": 32, "preferred_batch": 0, "instances": 1}
_PASSES = 3
_WORST_OFF = math.log(4)
_LEAST_S = 1e-7
_DOUBT = 0.1  # of a rung's executions: a batch size seen this often gets half the weight


@dataclass(frozen=True)
class MeasuredLadder:
    """A measured point: its rungs give the frame-step time and, by stage, the time of batches."""

    point: Knobs
    rungs: tuple[Rung, ...]


@dataclass(frozen=True)
class Physics:
    """Seconds of batches of 1, 2, ... running alone, by stage; of a hop; of the entry per frame and per chunk.

    ``room``: one of ``ROOMS``; ``drag``: slowdown per task beyond it (closed_queue.py). ``defaults``: deployed
    knobs that a point does not set, and ``gpus``, on each of which a stage has its instances. ``off``: mean square of
    log(measured / predicted step time) over the fitted points. ``path``: the stages that a frame passes, which are
    those of one topology.
    """

    times: tuple[tuple[float, ...], ...]
    hop_s: float
    entry_s: float
    chunk_s: float
    room: tuple[float, int]
    drag: float
    defaults: Knobs
    off: float = math.inf
    path: tuple[str, ...] = wire.STAGES

    def step_s(self, point: Knobs, sessions: Sequence[float]) -> np.ndarray:
        """Seconds of a frame step at each of these numbers of sessions: float [sessions]."""
        if self.path == (wire.ENGINE,):
            return np.array([self._loop_s(point, max(1, round(n))) for n in sessions])
        round_ = self.round(point)
        return np.array([_step_s(round_, max(1, round(n))) for n in sessions])

    def round(self, point: Knobs) -> Round:
        """The entry and the stages with the knobs of a point."""
        entry_s = self.entry_s + self.chunk_s / _chunk(point, self.defaults)
        instances = _knob(point, self.defaults, "entry", "instances")
        stations = [Station((max(entry_s, _LEAST_S),), instances=instances)]
        room, on = self.room
        for name, times in zip(self.path, self.times, strict=True):
            steps = _steps(point, self.defaults) if name == wire.DIFFUSION else 1.0
            own = tuple(steps * each for each in times)
            stations.append(Station(own, on=on, **_batching(point, self.defaults, name)))
        return Round(tuple(stations), self.hop_s, (room, math.inf) if on == HOST else (math.inf, room), self.drag)

    def _loop_s(self, point: Knobs, sessions: int) -> float:
        """Step time of the fused engine, in seconds, at each number of sessions.

        All sessions of a process step together, in several batches if there are too many; a frame's time outside its
        stage is the loop's own.
        """
        knobs = _batching(point, self.defaults, wire.ENGINE)
        own = math.ceil(sessions / knobs["instances"])
        batch = min(own, knobs["most"])
        rest_s = self.entry_s + self.chunk_s / _chunk(point, self.defaults)
        return (float(Station(self.times[0]).table(batch + 1)[batch]) + rest_s) * own / batch


@dataclass(frozen=True)
class Observation:
    """A rung of a measured point, with equal total weight for every point.

    ``rows`` by stage: batch sizes, mean seconds (at the default number of diffusion steps) and weights.
    """

    point: Knobs
    sessions: int
    step_s: float
    rows: tuple[np.ndarray, ...]
    first: bool

    def spare_s(self, defaults: Knobs) -> float:
        """Seconds of the step beyond its stages and their delays."""
        taken_s = 0.0
        for name, (_, seconds, weights) in zip(frame_path(self.point), self.rows, strict=True):
            steps = _steps(self.point, defaults) if name == wire.DIFFUSION else 1.0
            batching = _batching(self.point, defaults, name)
            taken_s += steps * float(np.average(seconds, weights=weights))
            taken_s += batching["delay_s"] * (batching["full"] > 1)
        return self.step_s - taken_s


def fit_physics(ladders: Sequence[MeasuredLadder], defaults: Knobs) -> Physics | None:
    """Fit the physics to measured points of one topology; None where no point has counts of its stages.

    For each room, drag and entry share, the times of batches running alone are chosen so that, slowed by each other,
    they match the measured times. The physics with the best step times is kept, one parameter after the other.
    """
    observations = [observation for each in ladders for observation in _observations(each, defaults)]
    if not observations:
        return None
    frame_s, chunk_s = _outside(observations, defaults)
    path = frame_path(observations[0].point)
    times = _alone(observations, np.ones((len(path), len(observations))))
    bare = Physics(times, 0.0, 0.0, chunk_s, ROOMS[0], 0.0, defaults, path=path)
    if path == (wire.ENGINE,):
        return _of_a_loop(replace(bare, entry_s=frame_s), observations)
    start = _shared_out(bare, frame_s, ENTRY_SHARES[1])
    some = observations[::2]
    rooms = sorted((_fitted(replace(start, room=room), some) for room in ROOMS), key=_offness)[:2]
    found = min((_fitted(replace(start, room=e.room, drag=drag), some) for e in rooms for drag in DRAGS), key=_offness)
    start = replace(start, room=found.room, drag=found.drag)
    return min((_fitted(_shared_out(start, frame_s, share), observations) for share in ENTRY_SHARES), key=_offness)


def _of_a_loop(physics: Physics, observations: Sequence[Observation]) -> Physics:
    """The error of a fused engine's steps; it has no shared or waiting resources to fit."""
    shown = [physics.step_s(each.point, [each.sessions])[0] for each in observations]
    return replace(physics, off=_off([each.step_s for each in observations], shown))


def _off(measured_s: Sequence[float], shown_s: Sequence[float]) -> float:
    logs = np.log(np.array(measured_s) / np.array(shown_s))
    return float(np.mean(np.clip(logs, -_WORST_OFF, _WORST_OFF) ** 2))


def _shared_out(physics: Physics, frame_s: float, share: float) -> Physics:
    """The physics with a frame's time outside its stages divided between the entry and the hops."""
    return replace(physics, entry_s=share * frame_s, hop_s=(1 - share) * frame_s / (1 + len(physics.path)))


def _offness(physics: Physics) -> float:
    return physics.off


def _observations(each: MeasuredLadder, defaults: Knobs) -> Iterator[Observation]:
    steps, path = _steps(each.point, defaults), frame_path(each.point)
    for at, rung in enumerate(each.rungs):
        counted = {window.stage: _counted(window) for window in rung.stages}
        if not all(counted.get(name) for name in path):
            continue
        rows = tuple(_rows(counted[name], steps if name == wire.DIFFUSION else 1.0) for name in path)
        sessions = max(1, round(rung.sessions))
        yield Observation(each.point, sessions, rung.sessions / rung.frames_per_s, rows, at == 0)


def _counted(window: StageStatistics) -> list[BatchStatistics]:
    return [each for each in window.batches if each.executions and each.compute_ns]


def _rows(batches: Sequence[BatchStatistics], steps: float) -> np.ndarray:
    """[3, batch sizes]: sizes, mean seconds, share of executions."""
    rows = np.array([(b.batch_size, b.compute_ns / b.executions / 1e9 / steps, b.executions) for b in batches]).T
    rows[2] /= rows[2].sum()
    return rows


def _outside(observations: Sequence[Observation], defaults: Knobs) -> tuple[float, float]:
    """Seconds of a frame outside its stages with one session (or the fewest measured), and seconds per chunk sent."""
    first = [each for each in observations if each.first] or observations
    scale = 1 / np.array([each.step_s for each in first])
    spare = np.array([each.spare_s(defaults) for each in first]) * scale
    parts = np.array([1 / _chunk(each.point, defaults) for each in first])
    columns = [scale, parts * scale] if len(set(parts)) > 1 else [scale]
    found, _ = optimize.nnls(np.column_stack(columns), spare)
    return float(found[0]), float(found[1]) if len(found) > 1 else 0.0


def _alone(observations: Sequence[Observation], slowed: Iterable[np.ndarray]) -> tuple[tuple[float, ...], ...]:
    """Seconds of batches of 1, 2, ... running alone, by stage: the measured times / ``slowed`` [stages]."""
    times = []
    for by, column in zip(slowed, zip(*(each.rows for each in observations), strict=True), strict=True):
        sizes = np.concatenate([rows[0] for rows in column])
        seconds = np.concatenate([rows[1] / one for rows, one in zip(column, by, strict=True)])
        weights = np.concatenate([rows[2] for rows in column])
        times.append(_curve(sizes, seconds, weights))
    return tuple(times)


def _curve(sizes: np.ndarray, seconds: np.ndarray, weights: np.ndarray) -> tuple[float, ...]:
    """A line fitted by relative errors, plus the deviations of frequently seen batch sizes; never decreasing."""
    scale = np.sqrt(weights) / seconds
    (alpha_s, tau0_s), _ = optimize.nnls(np.column_stack([sizes * scale, scale]), seconds * scale)
    most = int(sizes.max())
    line = alpha_s * np.arange(1, most + 1) + max(tau0_s, _LEAST_S)
    held = np.bincount(sizes.astype(int) - 1, weights, most)
    off = np.bincount(sizes.astype(int) - 1, weights * np.log(seconds / line[sizes.astype(int) - 1]), most)
    seen = np.flatnonzero(held)
    off = np.interp(np.arange(most), seen, off[seen] / (held[seen] + _DOUBT))
    return tuple(optimize.isotonic_regression(line * np.exp(off), weights=held + 1e-3).x.tolist())


def _fitted(physics: Physics, observations: Sequence[Observation]) -> Physics:
    for _ in range(_PASSES):
        shown = [_step_times(physics.round(each.point), each.sessions) for each in observations]
        slowed = np.array(
            [_slowed(physics.round(each.point), one) for each, one in zip(observations, shown, strict=True)]
        )
        physics = replace(physics, times=_alone(observations, slowed.T))
    shown = [_step_times(physics.round(each.point), each.sessions).step_s for each in observations]
    return replace(physics, off=_off([each.step_s for each in observations], shown))


def _slowed(round_: Round, shown: StepTimes) -> list[float]:
    """By stage: seconds of its executions / seconds when running alone."""
    found = []
    for each, executions, busy_s in zip(round_.stations[1:], shown.executions[1:], shown.busy_s[1:], strict=True):
        alone_s = float(executions @ each.table(len(executions)))
        found.append(float(busy_s.sum()) / alone_s if alone_s else 1.0)
    return found


@lru_cache(maxsize=1 << 15)
def _step_s(round_: Round, sessions: int) -> float:
    return _step_times(round_, sessions).step_s


def _step_times(round_: Round, sessions: int) -> StepTimes:
    return turns(round_, sessions, np.random.default_rng(sessions))


def _batching(point: Knobs, defaults: Knobs, stage: str) -> dict[str, Any]:
    """Batching settings of a station. With a preferred batch and a delay, a batch of that size starts at once."""
    knobs = {knob: _knob(point, defaults, stage, knob) for knob in _DEFAULTS}
    full = min(knobs["preferred_batch"] or knobs["max_batch"], knobs["max_batch"])
    instances = knobs["instances"] * number_of(defaults, "gpus", 1)
    return {"delay_s": knobs["delay_us"] / 1e6, "full": full, "most": knobs["max_batch"], "instances": instances}


def _knob(point: Knobs, defaults: Knobs, stage: str, knob: str) -> int:
    name = f"{owner_of(stage)}.{knob}"
    return number_of(point, name, number_of(defaults, name, _DEFAULTS[knob]))


def _steps(point: Knobs, defaults: Knobs) -> float:
    """Diffusion steps relative to the default number."""
    usual = number_of(defaults, "diffusion_steps", wire.DEFAULT_DIFFUSION_STEPS)
    return number_of(point, "diffusion_steps", usual) / wire.DEFAULT_DIFFUSION_STEPS


def _chunk(point: Knobs, defaults: Knobs) -> int:
    return number_of(point, "chunk_frames", number_of(defaults, "chunk_frames", 1))
