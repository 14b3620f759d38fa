"""Turnaround of tasks, predicted by the simulator of the planner, against a real studio.

Held out are runs in which tasks arrive by chance or all at once, alone or with streams, of which the simulator is told
the planned arrivals and lengths only. Compared are the median, the mean and the 95th percentile of each run.

Fitted: frame steps, from a short ladder (1 to 7 sessions) before and after each run; and what a task and a segment cost
beside their frames (claim, prompt, storing, resuming), from segments and tasks that run alone at the beginning.

A CPU host may change its speed between a ladder and a run, which is no error of the model. So each run is predicted
twice: from the ladder before it alone, and from the two ladders around it. Never from the run. A run between ladders
whose steps differ by more than 10% (the limit is fixed in advance) is INVALID: it is shown, not judged, and played
again, up to 3 times in all and until 8 minutes have passed. On a CPU the predictions from both ladders are judged. With
--emulate steps do not change: every run is played once and judged by the ladder before it.

Keys of the last line: turnaround_error_median and _worst, of the figures that are judged (bar: median 0.10);
turnaround_bias_median, with its sign (above 0: predicted too long); error_before_median and error_bracketing_median, of
the same runs, by either prediction; error_before_any_median, of all runs, INVALID ones too; drift_worst; runs,
judged, invalid, not_judged (names), figures; judged_by; device; tasks, of a run; step_ms by sessions, task_ms,
segment_ms and segment_ms_per_1000_frames, as first fitted; tries: each run with its errors and mean waits (s, until a
worker first takes a task: predicted from both ladders, measured).
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
from studio_stage import (
    LADDER,
    SEGMENT_FRAMES,
    UP_AND_DOWN,
    Fitted,
    Ladder,
    Played,
    Schedule,
    Stage,
    TaskCosts,
    fit,
    measure_costs,
    measure_ladder,
)

from harness import wire
from harness.capacity.simulator.engine import arrivals_of
from harness.capacity.simulator.pool import Pool
from harness.capacity.simulator.sessions import remembered
from harness.deploy.config import Deployment
from harness.device_profile import Profile
from harness.records.store import read_profile
from harness.service.settings import StudioSettings
from harness.service.studio import Studio, StudioPlan

EXAMPLE = "python benchmarks/service/turnaround.py --emulate scenarios/profiles/l40s-1.5b-staged-estimated.json"
SESSIONS, PLACES = 4, 8
FRAMES = 60, 300  # of a task; streams have a third
MOST_ERROR, MOST_DRIFT, LEAST_JUDGED = 0.10, 0.10, 3
MOST_TRIES, REPEAT_UNTIL_S = 3, 480.0
HELD_OUT_S, TASKS = 270.0, (12, 40)  # of all runs together, without repetitions, where --tasks does not say
BEFORE, BRACKETING = "before", "bracketing"


@dataclass(frozen=True)
class Load:
    """A run that is held out: shares of what the studio's sessions carry. ``tasks`` 0: half of them, all at once."""

    name: str
    tasks: float
    streams: float = 0.0


LOADS = (
    Load("all at once", 0.0),
    Load("by chance, 50%", 0.5),
    Load("by chance, 80%", 0.8),
    Load("40%, and streams 30%", 0.4, 0.3),
    Load("40%, and streams 50%", 0.4, 0.5),
)


@dataclass(frozen=True)
class Conditions:
    """How runs are made. ``tasks`` of a run: 0 for as many as there is time for; ``frames`` of a task: least, most."""

    tasks: int
    seed: int
    frames: tuple[int, int]
    most_tries: int
    rungs: tuple[int, ...]
    rung_frames: int = SEGMENT_FRAMES  # how sessions fall into batches changes as they go on, and begins anew then


@dataclass(frozen=True)
class Try:
    """A run as it was played, as predicted from the ladder before it, and from those around it.

    ``drift``: by what share steps were longer in the ladder after it than in that before.
    """

    plan: Schedule
    measured: Played
    before: Played
    bracketing: Played
    drift: float

    @property
    def is_valid(self) -> bool:
        return abs(self.drift) <= MOST_DRIFT

    def errors(self, by: str) -> np.ndarray:
        """Predicted / measured - 1 of the median, the mean and the 95th percentile [3]."""
        predictions = {BEFORE: self.before, BRACKETING: self.bracketing}
        return figures_of(predictions[by].turnaround_s) / figures_of(self.measured.turnaround_s) - 1


def schedule(number: int, fitted: Fitted, tasks: int, given: Conditions) -> Schedule:
    """A run of ``LOADS``. Its draws are always the same; its gaps are those of the present speed."""
    load, rng = LOADS[number], np.random.default_rng([given.seed, number])
    carried = SESSIONS / float(fitted.step_time(SESSIONS))
    low, high = given.frames

    def by_chance(count: int, share: float, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        frames = rng.integers(low, high, count).astype(float)
        return np.cumsum(rng.exponential(1.0, count)) * frames.mean() / (share * carried), frames

    if not load.tasks:
        frames = rng.integers(low, high, tasks // 2).astype(float)
        return Schedule(load.name, np.zeros(len(frames)), frames, np.zeros(0), np.zeros(0))
    task_s, task_frames = by_chance(tasks, load.tasks, low, high)
    if not load.streams:
        return Schedule(load.name, task_s, task_frames, np.zeros(0), np.zeros(0))
    streams = by_chance(2 * tasks, load.streams, low // 3, high // 3)
    kept = streams[0] < task_s[-1]
    return Schedule(load.name, task_s, task_frames, streams[0][kept], streams[1][kept])


def tasks_within(fitted: Fitted, frames: tuple[int, int]) -> int:
    """Tasks of a run with which all runs together take about HELD_OUT_S."""
    carried = SESSIONS / float(fitted.step_time(SESSIONS))
    work = sum(1 / each.tasks if each.tasks else 0.5 for each in LOADS) * np.mean(frames)
    return int(np.clip(HELD_OUT_S * carried / work, *TASKS))


def predicted(fitted: Fitted, plan: Schedule) -> Played:
    """What the simulator makes of the tasks of a run as planned."""
    at_s, frames = np.concatenate([plan.task_s, plan.stream_s]), np.concatenate([plan.task_frames, plan.stream_frames])
    is_task = np.arange(len(at_s)) < len(plan.task_s)
    order = np.argsort(at_s, kind="stable")
    pool = Pool(
        1,
        fitted.step_time,
        first_audio=(fitted.costs.task_s, 1.0),
        shared_sessions=SESSIONS,
        task_slots=PLACES,
        between_segments=(fitted.costs.segment_s, fitted.costs.per_frame_s),
        tokens_per_frame=0,
    )
    segment = np.where(is_task, float(SEGMENT_FRAMES), 0.0)
    run = remembered(pool, arrivals_of(at_s[order], frames[order], segment=segment[order], turn=at_s[order]))
    start_s, end_s = np.empty(len(order)), np.empty(len(order))
    start_s[order], end_s[order] = run.start_s, run.end_s
    return Played((end_s - at_s)[is_task], (start_s - at_s)[is_task])


def play(stage: Stage, given: Conditions) -> tuple[list[Try], Fitted]:
    """All runs with their repetitions, and what was fitted first."""
    began_s = time.monotonic()
    common.say("measuring what tasks cost beside their frames …")
    stage.ask(stage.rung(2, given.rung_frames))  # the first streams of a server are slower
    costs = measure_costs(stage)
    ladder = measure_ladder(stage, given.rung_frames, given.rungs)
    first, tries = fit([ladder], costs), []
    tasks = given.tasks or tasks_within(first, given.frames)
    for number in range(len(LOADS)):
        for _ in range(given.most_tries):
            found, ladder = attempt(stage, number, tasks, ladder, costs, given)
            tries.append(found)
            if found.is_valid or time.monotonic() - began_s > REPEAT_UNTIL_S:
                break
    return tries, first


def attempt(
    stage: Stage, number: int, tasks: int, ladder: Ladder, costs: TaskCosts, given: Conditions
) -> tuple[Try, Ladder]:
    """Predict a run, play it, and measure the ladder after it; returns that too."""
    fitted = fit([ladder], costs)
    plan = schedule(number, fitted, tasks, given)
    before = predicted(fitted, plan)
    common.say(f"{plan.name}: {len(plan.task_s)} tasks, {len(plan.stream_s)} streams …")
    measured = stage.ask(stage.play(plan))
    after = measure_ladder(stage, given.rung_frames, given.rungs)
    bracketing = predicted(fit([ladder, after], costs), plan)
    return Try(plan, measured, before, bracketing, ladder.drift_to(after)), after


def figures_of(turnaround_s: np.ndarray) -> np.ndarray:
    """What is compared of a run: median, mean, 95th percentile."""
    return np.array([np.median(turnaround_s), turnaround_s.mean(), np.quantile(turnaround_s, 0.95)])


def main(arguments: Sequence[str]) -> int:
    parser = common.Parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--tasks", type=common.whole(4, 1000), default=0, help="tasks of a run; default: as many as there is time for"
    )
    parser.add_argument("--seed", type=common.whole(0, 2**31), default=1)
    parser.add_argument("--emulate", default="", help="emulate the GPU of a profile; default: tiny, on this CPU")
    given = parser.parse_args(arguments)
    emulated = read_profile(Path(given.emulate)) if given.emulate else None
    deployment = _emulating(emulated, given.emulate) if emulated else Deployment()
    with tempfile.TemporaryDirectory(prefix="turnaround-") as folder:
        settings = StudioSettings(
            folder=folder, port=0, segment_s=SEGMENT_FRAMES * wire.SECONDS_PER_FRAME, jobs_at_once=PLACES,
            sessions=SESSIONS,
        )  # fmt: skip
        common.say("starting the studio …")
        with Studio(StudioPlan(settings, deployment), common.say) as studio, Stage(studio) as stage:
            tries, first = play(stage, _conditions(given.tasks, given.seed, given.quick, bool(emulated)))
    device = (
        f"{emulated.device} at {emulated.preset} (emulated, {emulated.known_as})" if emulated else "this CPU at tiny"
    )
    figures = judge(tries, BEFORE if emulated else BRACKETING) | described(first) | {"device": device}
    common.finish(shown(tries, figures), figures)
    problems = problems_of(figures)
    for each in problems:
        common.say(each)
    return 0 if given.quick or not problems else common.EXIT_FAILED


def _conditions(tasks: int, seed: int, is_quick: bool, is_emulated: bool) -> Conditions:
    if is_quick:
        return Conditions(4, seed, (60, 150), 1, LADDER, 16)
    if is_emulated:
        return Conditions(tasks, seed, FRAMES, 1, LADDER)
    return Conditions(tasks, seed, FRAMES, MOST_TRIES, UP_AND_DOWN)


def _emulating(profile: Profile, path: str) -> Deployment:
    return Deployment(preset=profile.preset, emulate=path, topology=profile.topology or wire.STAGED)


def judge(tries: Sequence[Try], by: str) -> dict:
    """The figures of all runs. By the ladder before it every run is judged, by both those that are valid."""
    judged = [each for each in tries if by == BEFORE or each.is_valid]
    errors = _errors(judged, by)
    return {
        "turnaround_error_median": _median(np.abs(errors)),
        "turnaround_error_worst": float(np.max(np.abs(errors), initial=0.0)) if judged else np.nan,
        "turnaround_bias_median": _median(errors),
        "error_before_median": _median(np.abs(_errors(judged, BEFORE))),
        "error_bracketing_median": _median(np.abs(_errors(judged, BRACKETING))),
        "error_before_any_median": _median(np.abs(_errors(tries, BEFORE))),
        "drift_worst": max((each.drift for each in tries), key=abs),
        "runs": len(tries),
        "judged": len(judged),
        "invalid": len(tries) - len(judged),
        "not_judged": [each.name for each in LOADS if each.name not in {one.plan.name for one in judged}],
        "figures": len(errors),
        "judged_by": by,
        "tasks": max(len(each.plan.task_s) for each in tries),
        "tries": [_told(each) for each in tries],
    }


def _errors(tries: Sequence[Try], by: str) -> np.ndarray:
    return np.concatenate([np.zeros(0), *(each.errors(by) for each in tries)])


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else np.nan


def _told(one: Try) -> dict:
    return {
        "run": one.plan.name,
        "drift": one.drift,
        BEFORE: list(one.errors(BEFORE)),
        BRACKETING: list(one.errors(BRACKETING)),
        "wait_s": [float(each.wait_s.mean()) for each in (one.bracketing, one.measured)],
    }


def described(first: Fitted) -> dict:
    return {
        "step_ms": {str(n): 1000 * float(first.step_time(n)) for n in LADDER},
        "task_ms": 1000 * first.costs.task_s,
        "segment_ms": 1000 * first.costs.segment_s,
        "segment_ms_per_1000_frames": 1e6 * first.costs.per_frame_s,
    }


def problems_of(figures: dict) -> list[str]:
    """Why the figures do not show what they must."""
    if figures["judged"] < LEAST_JUDGED:
        return [
            f"inconclusive: {figures['judged']} runs lie between ladders that agree within {MOST_DRIFT:.0%}, not "
            f"{LEAST_JUDGED}: repeat it on a host that nothing else uses, or with --emulate"
        ]
    if not figures["turnaround_error_median"] <= MOST_ERROR:
        return [f"the median error is {figures['turnaround_error_median']:.0%}, above {MOST_ERROR:.0%}"]
    return []


def shown(tries: Sequence[Try], figures: dict) -> common.Table:
    table = common.table(
        f"Turnaround of tasks, {figures['device']}: median / mean / p95, and predicted / measured - 1",
        "run",
        "tasks",
        "streams",
        "measured, s",
        "from the ladder before",
        "from both ladders",
        "drift",
        "",
    )
    for one in tries:
        measured = " / ".join(f"{each:.2f}" for each in figures_of(one.measured.turnaround_s))
        errors = [" / ".join(f"{each:+.0%}" for each in one.errors(by)) for by in (BEFORE, BRACKETING)]
        is_judged = figures["judged_by"] == BEFORE or one.is_valid
        counts = str(len(one.plan.task_s)), str(len(one.plan.stream_s))
        table.add_row(
            one.plan.name, *counts, measured, *errors, f"{one.drift:+.0%}", "judged" if is_judged else "INVALID"
        )
    return table


if __name__ == "__main__":
    common.run(main)
