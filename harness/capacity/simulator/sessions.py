"""Sessions that share their device's frame clock, simulated one by one and remembered each: two events a session.

For long traffic, and for queues, memory, failures and autoscaling, see ``simulator``; its compiled loop runs here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from harness import wire
from harness.capacity.simulator.engine import SimulationEngine, arrivals_of
from harness.capacity.simulator.pool import Planned, Pool, StepTime
from harness.errors import InputError

_PICKS_SEED = 0  # random routing sends equal traffic to the same devices


@dataclass(frozen=True)
class Simulated:
    """The outcome of each session, as arrays in order of arrival [n]; NaN for what had not happened at the stop.

    ``rtf``: wall time since the start / audio time, of the frames made until the end or the stop.
    ``active_at_start``: sessions on its device as it starts, including itself.
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
        """Sessions in progress at each time, including those that start exactly then."""
        return np.concatenate([[0], self.counts])[np.searchsorted(self.times_s, when_s, side="right")]

    def integral(self, of: Callable[[np.ndarray], np.ndarray], when_s: np.ndarray | float) -> np.ndarray:
        """Integral of ``of(sessions)`` from the first event to each time ``when_s``; 0 if there are no events."""
        if not len(self.times_s):
            return np.zeros(np.shape(when_s))
        heights = of(self.counts[:-1].astype(float))
        areas = np.concatenate([[0.0], np.cumsum(heights * np.diff(self.times_s))])
        return np.interp(when_s, self.times_s, areas)

    def mean(self, of: Callable[[np.ndarray], np.ndarray], start_s: float, end_s: float) -> float:
        low, high = self.integral(of, np.array([start_s, end_s]))
        return float((high - low) / (end_s - start_s))


def simulate(
    arrival_s: np.ndarray,
    frames: np.ndarray,
    step_time: StepTime,
    *,
    devices: int = 1,
    session_limit: int | None = None,
    bytes_: np.ndarray | int = 0,
    memory_bytes: float = math.inf,
    routing: str = "shared",
    first_audio: tuple[float, float] = (0.0, 1.0),
    class_index: np.ndarray | None = None,
    planned: Sequence[Planned] = (),
    stop_s: float = math.inf,
) -> Simulated:
    """Run sessions on ``devices`` equal devices; each arrival goes to one of them by ``routing`` (see ``Pool``).

    ``arrival_s`` [n], ascending; ``frames`` [n], above 0, need not be whole; ``step_time(sessions)``: seconds of a
    frame step, for an array of session counts. All sessions of a device advance one frame per step, so one ends when
    the device's frame clock passes its start + its frames. Above ``session_limit`` per device, or without room for
    their ``bytes_`` [n] in its ``memory_bytes``, arrivals wait in one queue, first come first served. First audio comes
    ``first_audio`` = (seconds, steps) after the start. ``planned``: for example devices that fail; their sessions
    resume elsewhere from the frame that they had reached. Nothing happens after ``stop_s``. Raises InputError for
    invalid arrivals or frames.
    """
    picks = np.random.default_rng(_PICKS_SEED).random(len(arrival_s)) if routing == "random" else 0.0
    block = arrivals_of(arrival_s, frames, bytes_=bytes_, pick=picks)
    if np.any(np.diff(block["arrival_s"]) < 0):
        raise InputError("arrivals are in order of time")
    pool = Pool(
        devices,
        step_time,
        session_limit=session_limit,
        memory_bytes=memory_bytes,
        routing=routing,
        first_audio=first_audio,
        on_failure="resume",
        planned=tuple(planned),
    )
    return remembered(pool, block, class_index, stop_s)


def remembered(
    pool: Pool, block: np.ndarray, class_index: np.ndarray | None = None, stop_s: float = math.inf
) -> Simulated:
    """Run a block of arrivals [n] (see ``layout.ARRIVAL``) on a pool, and return what became of each."""
    engine = SimulationEngine(pool, keep=len(block))
    engine.feed(block, last=True, stop_s=stop_s)
    kept = engine.arrays.kept
    last_s = np.where(np.isnan(kept["end_s"]), stop_s, kept["end_s"])
    with np.errstate(divide="ignore", invalid="ignore"):
        audio_s = kept["frames_done"] * wire.SECONDS_PER_FRAME
        rtf = np.where(audio_s > 0, (last_s - kept["start_s"]) / audio_s, np.nan)
    return Simulated(
        arrival_s=block["arrival_s"],
        start_s=kept["start_s"],
        first_audio_s=kept["first_audio_s"],
        end_s=kept["end_s"],
        class_index=np.zeros(len(block), int) if class_index is None else np.asarray(class_index),
        rtf=rtf,
        device=kept["device"],
        active_at_start=kept["active_at_start"],
        frames_done=kept["frames_done"],
    )
