"""What the stages taught: service times, hops and shared devices of measured points, and the step time of any other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import optimize

from harness import wire
from harness.capacity.service import BatchTimes
from harness.capacity.staged import Stage, Topology, rounds
from harness.records import Rung

SHARED = 0, 1, 2, 4, 8  # executions that can go on at one time; 0 = as many as there are instances
_DEFAULTS = {"delay_us": 0, "max_batch": 32, "preferred_batch": 0, "instances": 1}
_FRAMES, _WARM_UP = 48, 16  # of a simulated round: a mean within 1 to 2%
_WORST_OFF = math.log(4)


@dataclass(frozen=True)
class Taught:
    """A measured point: its rungs tell the frame-step time, and by stage the time of batches."""

    point: Mapping[str, Any]
    rungs: tuple[Rung, ...]


@dataclass(frozen=True)
class Physics:
    """Seconds (alpha, tau0) of a batch by stage; seconds of a hop; executions at one time (0 = no limit).

    ``defaults``: knobs of the deployment that a point leaves as they are. ``off``: mean square of the logarithm of
    measured over predicted step time at the points that it was fitted to.
    """

    times: tuple[tuple[str, float, float], ...]
    hop_s: float
    shared: int
    defaults: Mapping[str, Any]
    off: float = math.inf

    def step_s(self, point: Mapping[str, Any], sessions: Sequence[float]) -> np.ndarray:
        """Seconds of a frame step at each of these numbers of sessions: float [sessions]."""
        topology = self.topology(point)
        return np.array([_step_s(topology, self.shared, max(1, round(n))) for n in sessions])

    def topology(self, point: Mapping[str, Any]) -> Topology:
        """The stages with the knobs of a point. A preferred batch under a delay is the batch that goes at once."""
        stages = []
        for name, alpha_s, tau0_s in self.times:
            knobs = {knob: _knob(point, self.defaults, name, knob) for knob in _DEFAULTS}
            steps = _steps(point, self.defaults) if name == wire.DIFFUSION else 1.0
            full = knobs["max_batch"]
            if knobs["preferred_batch"] and knobs["delay_us"]:
                full = min(full, knobs["preferred_batch"])
            delay_s = knobs["delay_us"] / 1e6
            stages.append(Stage(name, steps * alpha_s, steps * tau0_s, delay_s, full, knobs["instances"]))
        return Topology(tuple(stages), self.hop_s, one_gpu=self.shared == 1)


def learn(taught: Sequence[Taught], defaults: Mapping[str, Any]) -> Physics | None:
    """The physics of some measured points, or None where the stages of none of them were counted.

    Service times by non-negative least squares of relative errors over all batches counted. Then, for each number of
    executions that may go on at one time, the hop that fits the step times best; the best of these is taken.
    """
    times = _service_times(taught, defaults)
    if times is None:
        return None
    usable = [each for each in taught if each.rungs]
    found = [_fit_hop(Physics(times, 0.0, shared, defaults), usable) for shared in SHARED]
    return min(found, key=lambda each: each.off)


def _service_times(
    taught: Sequence[Taught], defaults: Mapping[str, Any]
) -> tuple[tuple[str, float, float], ...] | None:
    times = []
    for name in wire.STAGES:
        rows = [row for each in taught for row in _batches(each, name, defaults)]
        if not rows:
            return None
        sizes, seconds, weights = map(np.array, zip(*rows, strict=True))
        scale = np.sqrt(weights) / seconds
        system = np.column_stack([sizes * scale, scale])
        (alpha_s, tau0_s), _ = optimize.nnls(system, seconds * scale)
        times.append((name, float(alpha_s), float(max(tau0_s, 1e-7))))
    return tuple(times)


def _batches(each: Taught, stage: str, defaults: Mapping[str, Any]) -> Iterable[tuple[float, float, float]]:
    """Batch size, mean seconds (of the usual number of diffusion steps), weight; points count alike."""
    windows = [window for rung in each.rungs for window in rung.stages if window.stage == stage]
    counted = BatchTimes.collect(windows)
    steps = _steps(each.point, defaults) if stage == wire.DIFFUSION else 1.0
    for size, executions, mean_s in zip(counted.batch_size, counted.executions, counted.mean_s, strict=True):
        if mean_s > 0:
            yield size, mean_s / steps, executions / counted.executions.sum()


def _fit_hop(physics: Physics, taught: Sequence[Taught]) -> Physics:
    """The hop that makes one session's rounds as long as measured, then refined over all rungs."""
    if not taught:
        return physics
    stages = len(physics.times)
    spare = [
        (rung.sessions / rung.frames_per_s - physics.topology(each.point).alone_s()) / stages
        for each in taught
        for rung in each.rungs[:1]
    ]
    start = max(0.0, float(np.median(spare)))
    tries = [replace(physics, hop_s=hop_s) for hop_s in {0.0, start / 2, start, start * 1.5}]
    return min((replace(each, off=_off(each, taught)) for each in tries), key=lambda each: each.off)


def _off(physics: Physics, taught: Sequence[Taught]) -> float:
    logs = []
    for each in taught:
        sessions = [rung.sessions for rung in each.rungs]
        measured = np.array([rung.sessions / rung.frames_per_s for rung in each.rungs])
        logs.append(np.log(measured / physics.step_s(each.point, sessions)))
    logs = np.clip(np.concatenate(logs), -_WORST_OFF, _WORST_OFF)
    return float(np.mean(logs**2))


@lru_cache(maxsize=1 << 17)
def _step_s(topology: Topology, shared: int, sessions: int) -> float:
    shown = rounds(topology, sessions, np.random.default_rng(sessions), frames=_FRAMES, warm_up=_WARM_UP)
    if shared < 2:
        return shown.step_s
    work_s = sum(
        sessions / batch * each.time_s(batch) for each, batch in zip(topology.stages, shown.mean_batch, strict=True)
    )
    return max(shown.step_s, work_s / shared)


def _knob(point: Mapping[str, Any], defaults: Mapping[str, Any], stage: str, knob: str) -> int:
    name = f"{stage}.{knob}"
    return int(point.get(name, defaults.get(name, _DEFAULTS[knob])))


def _steps(point: Mapping[str, Any], defaults: Mapping[str, Any]) -> float:
    """Diffusion steps as a multiple of the usual number."""
    steps = point.get("diffusion_steps", defaults.get("diffusion_steps", wire.DEFAULT_DIFFUSION_STEPS))
    return steps / wire.DEFAULT_DIFFUSION_STEPS
