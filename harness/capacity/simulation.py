"""Discrete-event simulation at session level: sessions share their device's frame clock; two events a session."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from harness import wire
from harness.errors import InputError

StepTime = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Simulated:
    """What became of each session, as arrays in order of arrival [n]; NaN where it had not happened at the stop.

    ``rtf``: wall time since the start over audio time, of the frames made until the end or the stop.
    ``active_at_start``: sessions on its device as it starts, itself among them.
    """

    arrival_s: np.ndarray
    start_s: np.ndarray
    first_audio_s: np.ndarray
    end_s: np.ndarray
    class_index: np.ndarray
    rtf: np.ndarray
    device: np.ndarray
    active_at_start: np.ndarray
    frames_done: np.ndarray

    @property
    def ttfa_s(self) -> np.ndarray:
        return self.first_audio_s - self.arrival_s

    def step_s(self) -> np.ndarray:
        """Mean seconds per frame of each session."""
        return self.rtf * wire.SECONDS_PER_FRAME


@dataclass(frozen=True)
class Activity:
    """Sessions in progress over time: ``counts[i]`` of them from ``times_s[i]`` to ``times_s[i + 1]``."""

    times_s: np.ndarray
    counts: np.ndarray

    @classmethod
    def between(cls, starts_s: np.ndarray, ends_s: np.ndarray) -> Activity:
        times = np.concatenate([starts_s, ends_s])
        changes = np.concatenate([np.ones(len(starts_s), int), -np.ones(len(ends_s), int)])
        order = np.lexsort((changes, times))
        return cls(times[order], np.cumsum(changes[order]))

    def at(self, when_s: np.ndarray) -> np.ndarray:
        """Sessions in progress at each time, a session that starts just then among them."""
        return np.concatenate([[0], self.counts])[np.searchsorted(self.times_s, when_s, side="right")]

    def integral(self, of: Callable[[np.ndarray], np.ndarray], when_s: np.ndarray | float) -> np.ndarray:
        """Integral of ``of(sessions)`` from the first event to each time ``when_s``; 0 where nothing ever happens."""
        if not len(self.times_s):
            return np.zeros(np.shape(when_s))
        heights = of(self.counts[:-1].astype(float))
        areas = np.concatenate([[0.0], np.cumsum(heights * np.diff(self.times_s))])
        return np.interp(when_s, self.times_s, areas)

    def mean(self, of: Callable[[np.ndarray], np.ndarray], start_s: float, end_s: float) -> float:
        low, high = self.integral(of, np.array([start_s, end_s]))
        return float((high - low) / (end_s - start_s))


def poisson_arrivals(rate_per_s: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """Times in seconds of the first ``n`` arrivals of a Poisson process."""
    return np.cumsum(rng.exponential(1 / rate_per_s, n))


def simulate(
    arrival_s: np.ndarray,
    frames: np.ndarray,
    step_time: StepTime,
    *,
    devices: int = 1,
    session_limit: int | None = None,
    first_audio: tuple[float, float] = (0.0, 1.0),
    class_index: np.ndarray | None = None,
    stop_s: float = math.inf,
) -> Simulated:
    """Run sessions on ``devices`` equal devices; each arrival goes to the one with the fewest sessions.

    ``arrival_s`` [n], ascending; ``frames`` [n], above 0, need not be whole; ``step_time(sessions)``: seconds of
    a frame step, for an array of session counts. All sessions of a device advance one frame a step, so one ends
    when the device's frame clock passes its start + its frames. Above ``session_limit`` a device, arrivals wait
    in one line, first come first served. First audio comes ``first_audio`` = (seconds, steps) after the start.
    Nothing happens after ``stop_s``. Raises InputError for arrivals or frames that make no sense.
    """
    arrival_s, frames = np.asarray(arrival_s, dtype=float), np.asarray(frames, dtype=float)
    _check(arrival_s, frames, devices, session_limit)
    step_s = _tabulate(step_time, len(arrival_s), session_limit)
    pool = _Pool(step_s, devices, session_limit or len(arrival_s), len(frames))
    _run(pool, arrival_s.tolist(), frames.tolist(), stop_s)
    pool.stop(stop_s)
    start_s, active = np.array(pool.start_s), np.array(pool.active_at_start, dtype=int)
    step_at_start = np.array(pool.step_s)[active]
    last_s = np.where(np.isnan(pool.end_s), stop_s, pool.end_s)
    done = np.array(pool.frames_done)
    with np.errstate(divide="ignore", invalid="ignore"):
        rtf = np.where(done > 0, (last_s - start_s) / (done * wire.SECONDS_PER_FRAME), np.nan)
    return Simulated(
        arrival_s=arrival_s,
        start_s=start_s,
        first_audio_s=start_s + first_audio[0] + first_audio[1] * step_at_start,
        end_s=np.array(pool.end_s),
        class_index=np.zeros(len(frames), int) if class_index is None else np.asarray(class_index),
        rtf=rtf,
        device=np.array(pool.device),
        active_at_start=active,
        frames_done=done,
    )


def _check(arrival_s: np.ndarray, frames: np.ndarray, devices: int, session_limit: int | None) -> None:
    if arrival_s.shape != frames.shape or arrival_s.ndim != 1:
        raise InputError(f"one number of frames per arrival: {frames.shape} against {arrival_s.shape}")
    if not (np.all(np.isfinite(arrival_s)) and np.all(np.diff(arrival_s) >= 0)):
        raise InputError("arrivals are finite and in order of time")
    if not np.all(np.isfinite(frames) & (frames > 0)):
        raise InputError("every session has more than 0 frames")
    if devices < 1 or (session_limit is not None and session_limit < 1):
        raise InputError("a pool has 1 device or more, with room for 1 session or more")


def _tabulate(step_time: StepTime, sessions: int, session_limit: int | None) -> list[float]:
    most = min(sessions, session_limit or sessions)
    steps = np.asarray(step_time(np.arange(1, most + 1, dtype=float)), dtype=float)
    if not np.all(np.isfinite(steps) & (steps > 0)):
        raise InputError("a frame step takes more than 0 seconds, at any number of sessions")
    return [math.nan, *steps.tolist()]


def _run(pool: _Pool, arrival_s: list[float], frames: list[float], stop_s: float) -> None:
    """Take arrivals and ends in order of time; at the same time, the end first."""
    waiting: deque[int] = deque()
    arrivals = iter([*enumerate(arrival_s), (-1, math.inf)])
    index, at_s = next(arrivals)
    while True:
        end_s = pool.next_end_s()
        if min(at_s, end_s) > stop_s or (index < 0 and end_s == math.inf):
            return
        if end_s <= at_s:
            device = pool.finish()
            if waiting:
                pool.start(waiting[0], frames[waiting.popleft()], end_s, device)
            continue
        device = pool.least_loaded()
        if pool.active[device] < pool.session_limit:
            pool.start(index, frames[index], at_s, device)
        else:
            waiting.append(index)
        index, at_s = next(arrivals)


class _Pool:
    """Devices and their frame clocks. ``ends`` holds (time, version, device); an entry of an old version is stale."""

    def __init__(self, step_s: list[float], devices: int, session_limit: int, sessions: int) -> None:
        self.step_s = step_s
        self.session_limit = session_limit
        self.active = [0] * devices
        self.clock = [0.0] * devices
        self.moved_s = [0.0] * devices
        self.targets: list[list[tuple[float, int]]] = [[] for _ in range(devices)]
        self.version = [0] * devices
        self.ends: list[tuple[float, int, int]] = []
        self.start_s = [math.nan] * sessions
        self.end_s = [math.nan] * sessions
        self.device = [-1] * sessions
        self.active_at_start = [0] * sessions
        self.frames_done = [0.0] * sessions

    def least_loaded(self) -> int:
        return self.active.index(min(self.active))

    def next_end_s(self) -> float:
        ends, version = self.ends, self.version
        while ends and version[ends[0][2]] != ends[0][1]:
            heappop(ends)
        return ends[0][0] if ends else math.inf

    def start(self, index: int, frames: float, at_s: float, device: int) -> None:
        self._advance(device, at_s)
        self.active[device] += 1
        heappush(self.targets[device], (self.clock[device] + frames, index))
        self.start_s[index], self.device[index] = at_s, device
        self.active_at_start[index] = self.active[device]
        self.frames_done[index] = frames
        self._schedule(device)

    def finish(self) -> int:
        at_s, _, device = heappop(self.ends)
        target, index = heappop(self.targets[device])
        self.clock[device], self.moved_s[device] = target, at_s
        self.active[device] -= 1
        self.end_s[index] = at_s
        self._schedule(device)
        return device

    def stop(self, at_s: float) -> None:
        """Take back the frames that sessions still in progress have not made."""
        for device, targets in enumerate(self.targets):
            self._advance(device, at_s)
            for target, index in targets:
                self.frames_done[index] -= target - self.clock[device]

    def _advance(self, device: int, at_s: float) -> None:
        if active := self.active[device]:
            self.clock[device] += (at_s - self.moved_s[device]) / self.step_s[active]
        self.moved_s[device] = at_s

    def _schedule(self, device: int) -> None:
        self.version[device] += 1
        if targets := self.targets[device]:
            left = max(targets[0][0] - self.clock[device], 0.0)
            end_s = self.moved_s[device] + left * self.step_s[self.active[device]]
            heappush(self.ends, (end_s, self.version[device], device))
