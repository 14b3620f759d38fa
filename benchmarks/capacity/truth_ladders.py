"""Closed-loop ladders of a device whose step time is known: trials and rows per request, as a sweep would store them.

All sessions of a rung get a frame at the end of each step; a user whose session has ended asks again at once. Rungs
begin with sessions found in progress, at their contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from testbed import capacity_truth

from harness import wire
from harness.records import metrics
from harness.records.load import TrialLoad
from harness.records.schema import Chunks, Outcome, Result, Rung, Trial
from harness.traffic.mix import Draw, Mix

SETTLE_S = 2.0  # from the start of a rung to its window
PAUSE_S = 1.0
FIRST_S = 1000.0
_LATE_NS = 1000  # from the last frame of a session to its end, and to the next request


@dataclass(frozen=True)
class Ladder:
    """How a ladder is measured. ``found``: (mix, sessions, rng) to the sessions in progress at the start of a rung.

    ``step``: seconds of a step at n sessions; ``context_s``: more per frame spoken by all; ``jitter``: relative
    standard deviation of single steps.
    """

    step: Callable[[np.ndarray], np.ndarray]
    mix: Mix
    sessions: tuple[int, ...]
    seconds: float
    context_s: float = 0.0
    jitter: float = 0.0
    found: Callable[[Mix, int, np.random.Generator], list[Draw]] | None = None

    def measure(
        self, name: str, deployment: dict, factors: Sequence[float], rng: np.random.Generator
    ) -> tuple[Trial, pd.DataFrame]:
        """A VALID ladder whose rungs' steps take ``factors`` times as long as they should; and its rows per request."""
        results, rungs, start_s = [], [], FIRST_S
        for n, factor in zip(self.sessions, factors, strict=True):
            end_s = start_s + SETTLE_S + self.seconds
            own = self._rung(f"{name}-{n}", n, factor, start_s, end_s, rng)
            window = round((start_s + SETTLE_S) * 1e9), round(end_s * 1e9)
            summary = metrics.summarise(own, *window)
            rungs.append(Rung(summary.sessions, summary.frames_per_s, *window, summary, capacity_truth.stages()))
            results += own
            start_s = end_s + PAUSE_S
        load = TrialLoad(loop="closed", sessions=self.sessions, seconds=self.seconds, seed=1)
        trial = Trial(name, "ladder", deployment, load, "", start_s - FIRST_S, True, (), tuple(rungs))
        return trial, metrics.per_request(results).assign(trial_id=name)

    def _rung(self, name: str, n: int, factor: float, start_s: float, end_s: float, rng) -> list[Result]:
        found = (self.found or found_in_progress)(self.mix, n, rng)
        users = [_User(f"{name}-{number}", draw) for number, draw in enumerate(found)]
        context = np.array([float(draw.phase) for draw in found])
        base_s, ticks = float(self.step(np.array([float(n)]))[0]), [start_s]
        while ticks[-1] < end_s:
            step_s = (base_s + self.context_s * context.sum()) * factor * rng.lognormal(0, self.jitter)
            ticks.append(ticks[-1] + step_s)
            context += 1
            for place in np.flatnonzero(context >= [user.whole for user in users]):
                users[place].next(self.mix.sample(rng), len(ticks))
                context[place] = 0
        times_ns = np.round(np.array(ticks) * 1e9).astype(np.int64)
        return [result for user in users for result in user.results(times_ns, round(end_s * 1e9))]


class _User:
    """One user of a rung: the sessions that it asked for, each from the tick after which it began."""

    def __init__(self, name: str, first: Draw):
        self.name, self.asked = name, [(first, 0)]

    @property
    def whole(self) -> int:
        return self.asked[-1][0].frames

    def next(self, draw: Draw, ticks: int) -> None:
        self.asked.append((draw, ticks - 1))

    def results(self, times_ns: np.ndarray, end_ns: int) -> list[Result]:
        """``times_ns`` [ticks]: the start of the rung, then the end of each step."""
        return [
            _result(f"{self.name}-{number}", draw, times_ns[tick], times_ns[tick + 1 :], end_ns, late=tick > 0)
            for number, (draw, tick) in enumerate(self.asked)
            if times_ns[tick] + _LATE_NS * (tick > 0) < end_ns
        ]


def _result(name: str, draw: Draw, asked_ns: int, times_ns: np.ndarray, end_ns: int, late: bool) -> Result:
    """A session that was sent with the frame before its first; looked at until ``end_ns``."""
    received_ns = times_ns[: draw.frames - draw.phase]
    received_ns = received_ns[received_ns < end_ns]
    whole = len(received_ns) == draw.frames - draw.phase
    sent_ns = int(asked_ns) + 2 * _LATE_NS * late
    return Result(
        request_id=name,
        traffic_class=draw.traffic_class,
        speakers=draw.speakers,
        script_words=draw.frames,
        frames=draw.frames - draw.phase,
        start_frame=draw.phase,
        chunk_frames=1,
        loop="closed",
        due_ns=sent_ns,
        sent_ns=sent_ns,
        ended_ns=int(received_ns[-1]) + _LATE_NS if whole else end_ns,
        outcome=Outcome.DONE if whole else Outcome.UNFINISHED,
        chunks=Chunks(received_ns, received_ns, np.full(len(received_ns), wire.SAMPLES_PER_FRAME)),
    )


def found_in_progress(mix: Mix, n: int, rng: np.random.Generator) -> list[Draw]:
    """Sessions found at a random moment: lengths in proportion to length, phases uniform."""
    return [mix.sample_in_progress(rng) for _ in range(n)]


def stratified(mix: Mix, n: int, rng: np.random.Generator) -> list[Draw]:
    """As ``found_in_progress``, with a phase in each of n equal parts of a session."""
    drawn = found_in_progress(mix, n, rng)
    parts = (rng.permutation(n) + rng.random(n)) / n
    return [Draw(each.traffic_class, each.frames, each.speakers, int(part * each.frames))
            for each, part in zip(drawn, parts, strict=True)]  # fmt: skip
