"""Closed-loop ladders of a device whose step time is known: trials and rows per request, as a sweep would store them.

All sessions get a frame at the end of each step; a user whose session has ended asks again at once. Each rung has more
users than the last; each begins with a session found in progress, at its context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from testbed import capacity_truth

from harness import wire
from harness.records import metrics
from harness.records.load import TrialLoad
from harness.records.schema import Chunks, Outcome, Result, Rung, Trial
from harness.traffic.mix import Draw, Mix

SETTLE_S = 2.0  # from the start of a rung to its window
FIRST_S = 1000.0
_LATE_NS = 1000  # from the last frame of a session to its end, and to the next request


@dataclass(frozen=True)
class Measured:
    """What a run stored: its trials, rows per request, and rows of requests that lasted through whole rungs."""

    trials: list[Trial]
    requests: pd.DataFrame
    in_rungs: pd.DataFrame

    @classmethod
    def together(cls, parts: Sequence[Measured]) -> Measured:
        rows = (
            pd.concat(each, ignore_index=True) for each in zip(*((p.requests, p.in_rungs) for p in parts), strict=True)
        )
        return cls([trial for part in parts for trial in part.trials], *rows)


@dataclass(frozen=True)
class Ladder:
    """How a ladder is measured. ``found``: (mix, sessions, rng) to the sessions in progress with which users begin.

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
        self,
        name: str,
        deployment: dict,
        factors: Sequence[float],
        rng: np.random.Generator,
        seen: Sequence[float] | None = None,
    ) -> Measured:
        """A VALID ladder whose rungs' steps take ``factors`` [rungs] times as long as they should.

        ``seen`` [rungs]: above 1, others were seen to slow a rung by this factor, and it was measured again.
        """
        climb = _Climb(self, name, rng)
        seen = np.ones(len(factors)) if seen is None else seen
        held = []
        for n, factor, slowed in zip(self.sessions, factors, seen, strict=True):
            if slowed > 1:
                held.append((*climb.hold(n, factor * slowed), "others took 1.00 of 2 cores"))
            held.append((*climb.hold(n, factor), ""))
        results = climb.results()
        rungs = [_rung(results, start_ns, end_ns, disturbed) for start_ns, end_ns, disturbed in held]
        kept = tuple(rung for rung in rungs if not rung.disturbed)
        load = TrialLoad(loop="closed", sessions=self.sessions, seconds=self.seconds, seed=1)
        trial = Trial(name, "ladder", deployment, load, "", climb.now_s - FIRST_S, True, (), kept)
        trial = replace(trial, disturbed=tuple(rung for rung in rungs if rung.disturbed))
        through = metrics.through_windows(results, [(rung.start_ns, rung.end_ns) for rung in kept])
        return Measured([trial], *(each.assign(trial_id=name) for each in (metrics.per_request(results), through)))


class _Climb:
    """The users of a ladder: more with each rung, each asking again at once."""

    def __init__(self, ladder: Ladder, name: str, rng: np.random.Generator):
        self.ladder, self.name, self.rng = ladder, name, rng
        self.ticks = [FIRST_S]  # the start, then the end of each step
        self.users: list[_User] = []

    @property
    def now_s(self) -> float:
        return self.ticks[-1]

    def hold(self, n: int, factor: float) -> tuple[int, int]:
        """Hold ``n`` users; the window of the rung, in ns."""
        ladder, rng = self.ladder, self.rng
        more = (ladder.found or found_in_progress)(ladder.mix, n - len(self.users), rng)
        self.users += [
            _User(f"{self.name}-{len(self.users) + k}", draw, len(self.ticks)) for k, draw in enumerate(more)
        ]
        start_s, end_s = self.now_s + SETTLE_S, self.now_s + SETTLE_S + ladder.seconds
        base_s = float(ladder.step(np.array([float(n)]))[0])
        context = np.array([user.spoken(len(self.ticks)) for user in self.users], dtype=float)
        whole = np.array([user.whole for user in self.users])
        while self.now_s < end_s:
            step_s = (base_s + ladder.context_s * context.sum()) * factor * rng.lognormal(0, ladder.jitter)
            self.ticks.append(self.now_s + step_s)
            context += 1
            for place in np.flatnonzero(context >= whole):
                self.users[place].ask(ladder.mix.sample(rng), len(self.ticks))
                context[place], whole[place] = 0, self.users[place].whole
        return round(start_s * 1e9), round(end_s * 1e9)

    def results(self) -> list[Result]:
        times_ns = np.round(np.array(self.ticks) * 1e9).astype(np.int64)
        return [result for user in self.users for result in user.results(times_ns)]


class _User:
    """One user: the sessions that it asked for, each with the place of the tick at which its first frame comes."""

    def __init__(self, name: str, first: Draw, tick: int):
        self.name, self.asked = name, [(first, tick)]

    @property
    def whole(self) -> int:
        return self.asked[-1][0].frames

    def spoken(self, ticks: int) -> int:
        """Frames of its present session after so many ticks."""
        draw, first = self.asked[-1]
        return draw.phase + ticks - first

    def ask(self, draw: Draw, tick: int) -> None:
        self.asked.append((draw, tick))

    def results(self, times_ns: np.ndarray) -> list[Result]:
        known = [(draw, tick) for draw, tick in self.asked if tick < len(times_ns)]
        return [_result(f"{self.name}-{k}", draw, times_ns, tick) for k, (draw, tick) in enumerate(known)]


def _result(name: str, draw: Draw, times_ns: np.ndarray, tick: int) -> Result:
    """A session that was sent with the frame before its first; looked at until the end of the ladder."""
    received_ns = times_ns[tick : tick + draw.frames - draw.phase]
    whole = len(received_ns) == draw.frames - draw.phase
    sent_ns = int(times_ns[tick - 1]) + 2 * _LATE_NS
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
        ended_ns=int(received_ns[-1]) + _LATE_NS,
        outcome=Outcome.DONE if whole else Outcome.UNFINISHED,
        chunks=Chunks(received_ns, received_ns, np.full(len(received_ns), wire.SAMPLES_PER_FRAME)),
    )


def _rung(results: Sequence[Result], start_ns: int, end_ns: int, disturbed: str) -> Rung:
    own = [each for each in results if each.sent_ns < end_ns and each.ended_ns >= start_ns]
    summary = metrics.summarise(own, start_ns, end_ns)
    rung = Rung(summary.sessions, summary.frames_per_s, start_ns, end_ns, summary, capacity_truth.stages())
    return replace(rung, disturbed=disturbed, repeated=bool(disturbed))


def found_in_progress(mix: Mix, n: int, rng: np.random.Generator) -> list[Draw]:
    """Sessions found at a random moment: lengths in proportion to length, phases uniform."""
    return [mix.sample_in_progress(rng) for _ in range(n)]


def stratified(mix: Mix, n: int, rng: np.random.Generator) -> list[Draw]:
    """As ``found_in_progress``, with a phase in each of n equal parts of a session."""
    drawn = found_in_progress(mix, n, rng)
    parts = (rng.permutation(n) + rng.random(n)) / n
    return [Draw(each.traffic_class, each.frames, each.speakers, int(part * each.frames))
            for each, part in zip(drawn, parts, strict=True)]  # fmt: skip
