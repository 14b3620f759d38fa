"""Turnaround of tasks, predicted by the simulator of the planner, against a real studio.

Held out are runs in which tasks arrive by chance or all at once, alone or with streams, of which the simulator is told
the planned arrivals and lengths only. Compared are the median, the mean and the 95th percentile of each run.

Fitted: frame steps, from a short ladder (1 to 7 sessions) between any two runs; and what a task and a segment cost
beside their frames (claim, prompt, storing, resuming), from segments and tasks that run alone at the beginning.

A CPU host changes its speed from minute to minute, which is no error of the model. So there, runs and ladders are
short, and every run is played in up to 5 rounds, each with other draws, until 9 minutes have passed; ladders go up and
down in turn, so that the two around a run are level where the speed changes evenly. Each run is predicted twice: from
the ladder before it alone, and from the two around it. Never from the run. A run between ladders whose steps differ by
more than 10% (the limit is fixed in advance) is INVALID: it is counted, and not judged. Judged is, of each run and
figure, the median of predicted / measured - 1 over its valid rounds, by both ladders: what the host does between two
ladders is above zero in one round and below in the next, what the model gets wrong is the same in all. The errors of
single rounds are given beside it. With --emulate steps do not change: one round, all judged by the ladder before.

Keys of the last line: turnaround_error_median and _worst, of the figures that are judged (bar: median 0.10);
turnaround_bias_median, with its sign (above 0: predicted too long); single_error_median, of single valid rounds;
error_before_median and error_bracketing_median, of the same rounds by either prediction; error_any_median, of all
rounds, INVALID ones too, by what judges; drift_worst; rounds, runs, judged, invalid (of the runs played), not_judged
(names), figures; judged_by; device; tasks, of a run; step_ms by sessions, task_ms, segment_ms and
segment_ms_per_1000_frames, as first fitted; tries: each run with its errors and mean waits (s, until a worker first
takes a task: predicted from both ladders, measured).
"""

from __future__ import annotations

import math
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
from harness.errors import InconclusiveError
from harness.records.store import read_profile
from harness.service.settings import StudioSettings
from harness.service.studio import Studio, StudioPlan

EXAMPLE = "python benchmarks/service/turnaround.py --emulate scenarios/profiles/l40s-1.5b-staged-estimated.json"
SESSIONS, PLACES = 4, 8
MOST_ERROR, MOST_DRIFT, LEAST_JUDGED = 0.10, 0.10, 3
UNTIL_S = 540.0  # after which no other round begins
TASKS = 12, 40  # of a run, where --tasks does not say
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
    """How runs are made. ``tasks`` of a run: 0 for as many as there is time for in ``round_s``, all runs together;
    ``frames`` of a task: least, most (streams have a third)."""

    tasks: int
    seed: int
    frames: tuple[int, int]
    rounds: int
    round_s: float
    rung_frames: int = SEGMENT_FRAMES  # how sessions fall into batches changes as they go on, and begins anew then


@dataclass(frozen=True)
class Try:
    """A run as it was played, as predicted from the ladder before it, and from those around it.

    ``drift``: by what share steps were longer in the ladder after it than in that before; inf: they fit no step time.
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


def schedule(number: int, turn: int, fitted: Fitted, tasks: int, given: Conditions) -> Schedule:
    """A run of ``LOADS``. The draws of a round are always the same; its gaps are those of the present speed."""
    load, rng = LOADS[number], np.random.default_rng([given.seed + turn, number])
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


def tasks_within(fitted: Fitted, given: Conditions) -> int:
    """Tasks of a run with which a round takes about as long as given."""
    carried = SESSIONS / float(fitted.step_time(SESSIONS))
    work = sum(1 / each.tasks if each.tasks else 0.5 for each in LOADS) * np.mean(given.frames)
    return int(np.clip(given.round_s * carried / work, *TASKS))


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
    """All runs of all rounds, and what was fitted first."""
    began_s = time.monotonic()
    common.say("measuring what tasks cost beside their frames …")
    stage.ask(stage.rung(2, given.rung_frames))  # the first streams of a server are slower
    costs = measure_costs(stage)
    ladder = measure_ladder(stage, given.rung_frames, LADDER)
    first, tries = fit([ladder], costs), []
    tasks = given.tasks or tasks_within(first, given)
    for turn in range(given.rounds):
        for number in range(len(LOADS)):
            rungs = LADDER if len(tries) % 2 else LADDER[::-1]
            plan = schedule(number, turn, fit([ladder], costs), tasks, given)
            found, ladder = attempt(stage, plan, ladder, costs, rungs, given.rung_frames)
            tries.append(found)
        if time.monotonic() - began_s > UNTIL_S:
            break
    return tries, first


def attempt(
    stage: Stage, plan: Schedule, ladder: Ladder, costs: TaskCosts, rungs: Sequence[int], rung_frames: int
) -> tuple[Try, Ladder]:
    """Predict a run, play it, and measure the ladder after it; returns that too."""
    before = predicted(fit([ladder], costs), plan)
    common.say(f"{plan.name}: {len(plan.task_s)} tasks, {len(plan.stream_s)} streams …")
    measured = stage.ask(stage.play(plan))
    after, bracketing, drift = ladder, before, math.inf
    try:
        after = measure_ladder(stage, rung_frames, rungs)
        bracketing, drift = predicted(fit([ladder, after], costs), plan), ladder.drift_to(after)
    except InconclusiveError as error:
        common.say(str(error))
    found = Try(plan, measured, before, bracketing, drift)
    errors = " / ".join(f"{each:+.0%}" for each in found.errors(BRACKETING))
    common.say(f"{plan.name}: {errors}, drift {found.drift:+.0%}{'' if found.is_valid else ', INVALID'}")
    return found, after


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
        return Conditions(4, seed, (60, 150), rounds=1, round_s=0.0, rung_frames=16)
    if is_emulated:
        return Conditions(tasks, seed, (60, 300), rounds=1, round_s=270.0)
    return Conditions(tasks, seed, (60, 225), rounds=5, round_s=80.0)


def _emulating(profile: Profile, path: str) -> Deployment:
    return Deployment(preset=profile.preset, emulate=path, topology=profile.topology or wire.STAGED)


def judge(tries: Sequence[Try], by: str) -> dict:
    """The figures of all runs. By the ladder before it every run is judged, by both those that are valid."""
    judged = [each for each in tries if by == BEFORE or each.is_valid]
    errors = np.concatenate([np.zeros(0), *medians_of(judged, by).values()])
    return {
        "turnaround_error_median": _median(np.abs(errors)),
        "turnaround_error_worst": float(np.max(np.abs(errors), initial=0.0)) if judged else np.nan,
        "turnaround_bias_median": _median(errors),
        "error_before_median": _median(np.abs(_errors(judged, BEFORE))),
        "error_bracketing_median": _median(np.abs(_errors(judged, BRACKETING))),
        "single_error_median": _median(np.abs(_errors(judged, by))),
        "error_any_median": _median(np.abs(_errors(tries, by))),
        "drift_worst": max((each.drift for each in tries), key=abs),
        "rounds": math.ceil(len(tries) / len(LOADS)),
        "runs": len(tries),
        "judged": len(judged),
        "invalid": len(tries) - len(judged),
        "not_judged": [each.name for each in LOADS if each.name not in {one.plan.name for one in judged}],
        "figures": len(errors),
        "judged_by": by,
        "tasks": max(len(each.plan.task_s) for each in tries),
        "tries": [_told(each) for each in tries],
    }


def medians_of(tries: Sequence[Try], by: str) -> dict[str, np.ndarray]:
    """By run: the median over its rounds of each of its errors [3]."""
    rounds: dict[str, list[np.ndarray]] = {}
    for each in tries:
        rounds.setdefault(each.plan.name, []).append(each.errors(by))
    return {name: np.median(errors, axis=0) for name, errors in rounds.items()}


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
    if (judged := len(LOADS) - len(figures["not_judged"])) < LEAST_JUDGED:
        return [
            f"inconclusive: {judged} of {len(LOADS)} runs have a round between ladders that agree within "
            f"{MOST_DRIFT:.0%}, not {LEAST_JUDGED}: repeat it on a host that nothing else uses, or with --emulate"
        ]
    if not figures["turnaround_error_median"] <= MOST_ERROR:
        return [f"the median error is {figures['turnaround_error_median']:.0%}, above {MOST_ERROR:.0%}"]
    return []


def shown(tries: Sequence[Try], figures: dict) -> common.Table:
    table = common.table(
        f"Turnaround of tasks, {figures['device']}: median / mean / p95; predicted / measured - 1, medians over rounds",
        "run", "rounds", "judged", "tasks", "streams", "measured, s", "from the ladder before", "from both ladders",
        "worst drift",
    )  # fmt: skip
    for name in dict.fromkeys(each.plan.name for each in tries):
        played = [each for each in tries if each.plan.name == name]
        judged = [each for each in played if figures["judged_by"] == BEFORE or each.is_valid]
        measured = np.median([figures_of(each.measured.turnaround_s) for each in played], axis=0)
        errors = [
            " / ".join(f"{each:+.0%}" for each in medians_of(judged, by)[name]) if judged else "INVALID"
            for by in (BEFORE, BRACKETING)
        ]
        table.add_row(
            name, str(len(played)), str(len(judged)), str(len(played[0].plan.task_s)),
            f"{np.median([len(each.plan.stream_s) for each in played]):.0f}",
            " / ".join(f"{each:.2f}" for each in measured), *errors,
            f"{max((each.drift for each in played), key=abs):+.0%}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    common.run(main)
