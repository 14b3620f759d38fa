"""The rungs of a deployment's ladders as a fit uses them: without unusable and disturbed ones, at steady contexts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.capacity.fitting.contexts import ContextCost, context_cost, context_of, in_steady_state
from harness.capacity.fitting.observations import MeasuredRequests, RungOfLadder
from harness.capacity.fitting.slow_rungs import SlowRung, slow_rungs, without
from harness.capacity.models.steps import Rungs
from harness.records.fit import ExcludedTrial
from harness.records.schema import Rung, Trial


@dataclass(frozen=True)
class LadderRungs:
    """``rungs``: those that are left, at the contexts of steady state. ``slow``: those left out.

    ``cost``: of context, None where none shows; ``context_short``: frames per session by which the contexts of steady
    state are longer than those found. ``found`` [ladders][rungs of the trial]: step as found / at steady contexts.
    """

    rungs: Rungs
    slow: tuple[tuple[RungOfLadder, SlowRung], ...]
    cost: ContextCost | None
    context_short: float
    found: tuple[np.ndarray, ...]

    def excluded(self, ladders: Sequence[Trial]) -> list[ExcludedTrial]:
        """The rungs that were left out, with the reason for each."""
        by_ladder: dict[int, list[str]] = {}
        for held, slow in self.slow:
            reason = f"rung {held.place + 1} ({held.rung.sessions:.3g} sessions), a frame step {slow.times:.2f} times"
            by_ladder.setdefault(held.ladder, []).append(f"{reason} as long as the other rungs show")
        return [
            ExcludedTrial(trial_id=ladders[number].trial_id, reasons=tuple(reasons))
            for number, reasons in by_ladder.items()
        ]


def prepare(ladders: Sequence[Trial], seen: MeasuredRequests, steady_context: float) -> LadderRungs:
    """``steady_context``: mean frames that a session found in progress has spoken, in steady state."""
    held = [
        RungOfLadder(number, trial.rungs.index(rung), rung)
        for number, trial in enumerate(ladders)
        for rung in usable_rungs(trial)[0]
    ]
    every, context = _arrays(held), _contexts(ladders, held, seen)
    level, cost = _at_steady_contexts(every, context, steady_context)
    slow = slow_rungs(level) if held else []
    if slow and cost is None:  # a disturbed rung hides what context costs
        rest = np.setdiff1d(np.arange(len(held)), [each.at for each in slow])
        cost = context_cost(without(every, slow), context[rest])
        level = in_steady_state(every, context, steady_context, cost) if cost else every
    short = steady_context - float(np.sum(context) / max(np.sum(every.sessions), 1e-9))
    found = [np.ones(len(trial.rungs)) for trial in ladders]
    for each, ratio in zip(held, every.step_s / level.step_s, strict=True):
        found[each.ladder][each.place] = ratio
    named = tuple((held[each.at], each) for each in slow)
    return LadderRungs(without(level, slow), named, cost, short, tuple(found))


def usable_rungs(trial: Trial) -> tuple[list[Rung], list[str]]:
    """Rungs with enough sessions and frames, and a reason for each of the others."""
    usable, reasons = [], []
    for number, rung in enumerate(trial.rungs, start=1):
        if (
            math.isfinite(rung.sessions)
            and math.isfinite(rung.frames_per_s)
            and min(rung.sessions, rung.frames_per_s) > 0
        ):
            usable.append(rung)
        else:
            reasons.append(f"rung {number}: {rung.sessions:g} sessions made {rung.frames_per_s:g} frames a second")
    left_out = [rung for rung in trial.disturbed if not rung.repeated]
    reasons += [f"the rung of {rung.sessions:.3g} sessions: {rung.disturbed}" for rung in left_out]
    return usable, reasons


def _arrays(held: Sequence[RungOfLadder]) -> Rungs:
    sessions = np.array([each.rung.sessions for each in held], dtype=float)
    frames_per_s = np.array([each.rung.frames_per_s for each in held], dtype=float)
    return Rungs(sessions, sessions / frames_per_s, np.array([each.ladder for each in held], dtype=int))


def _contexts(ladders: Sequence[Trial], held: Sequence[RungOfLadder], seen: MeasuredRequests) -> np.ndarray:
    parts = [
        context_of([each.rung for each in held if each.ladder == number], seen.of(trial).requests)
        for number, trial in enumerate(ladders)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def _at_steady_contexts(rungs: Rungs, context: np.ndarray, steady: float) -> tuple[Rungs, ContextCost | None]:
    cost = context_cost(rungs, context)
    return (in_steady_state(rungs, context, steady, cost), cost) if cost else (rungs, None)
