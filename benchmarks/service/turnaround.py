"""Turnaround of tasks, predicted before each run by the simulator of the planner, against a real studio.

Fitted: frame steps of a few numbers of sessions, and what a segment costs beside its frames, from tasks that run alone.
Held out: runs in which tasks arrive by chance or all at once, alone or with streams, of which the simulator is told
the planned arrivals and lengths only. Compared are the median, the mean and the 95th percentile of each run.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
from queue_access import QueueAccess
from scipy.optimize import nnls

from harness import wire
from harness.capacity.models.steps import Rungs, StepTime, fit_step_time
from harness.capacity.simulator.engine import arrivals_of
from harness.capacity.simulator.pool import Pool
from harness.capacity.simulator.sessions import remembered
from harness.client.stream import SpeechClient
from harness.deploy.config import Deployment
from harness.device_profile import Profile
from harness.errors import ServerError
from harness.records.store import read_profile
from harness.service.segments import request_of
from harness.service.settings import StudioSettings
from harness.service.speech import LiveSpeech
from harness.service.studio import Studio, StudioPlan
from harness.service.task import ENDED, TaskSpec, new_id

EXAMPLE = "python benchmarks/service/turnaround.py --tasks 40 --seed 2"
SCRIPT = "Speaker 1: It is early, and the market has not opened yet.\nSpeaker 2: So we talk about what is new."
SESSIONS, PLACES, SEGMENT_FRAMES = 4, 8, 75
LADDER, RUNG_FRAMES, LADDERS = (1, 2, 3, 4, 6, 8), 150, 2
ALONE_SEGMENTS = (1, 4, 12)
FRAMES = 60, 450  # of a task; streams have a third
MOST_ERROR = 0.10
LOOK_S = 0.5  # between two looks at a task: its times are those of its record, and looks cost what is measured
PATIENCE_S = 3600.0  # of one run: a part of the studio has ended


@dataclass(frozen=True)
class Schedule:
    """A held-out run as planned: arrivals (s) and frames of tasks [n] and of streams [m]."""

    name: str
    task_s: np.ndarray
    task_frames: np.ndarray
    stream_s: np.ndarray
    stream_frames: np.ndarray


@dataclass(frozen=True)
class Fitted:
    """What was fitted: the step, seconds of a task beside its segments, and of a segment (fixed; per frame before)."""

    step_time: StepTime
    task_s: float
    between: tuple[float, float]


class Stage(QueueAccess):
    """A studio under test, with its queue; everything on one event loop."""

    def __init__(self, studio: Studio):
        super().__init__(studio.settings.redis, studio.settings.lease_s)
        self.url = studio.settings.url

    async def rung(self, sessions: int, frames: int) -> float:
        """Seconds of a frame step with this many streams side by side."""
        async with SpeechClient(self.url) as client:
            requests = [request_of(new_id(), "fit", spec_of(frames, seed), frames) for seed in range(sessions)]
            results = await asyncio.gather(*(client.speak(each, "closed") for each in requests))
        if wrong := next((each.error for each in results if each.error), ""):
            raise ServerError(wrong)
        return float(np.mean([common.frame_ms(each) for each in results])) / 1000

    async def turnarounds(self, plan: Schedule) -> np.ndarray:
        """Play a run; returns the seconds of each task [n]. Raises ServerError where it does not end."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._played(plan)
        except TimeoutError:
            raise ServerError(f"{plan.name}: its tasks have not ended within {PATIENCE_S:g} s") from None

    async def _played(self, plan: Schedule) -> np.ndarray:
        began_s = time.monotonic()
        async with SpeechClient(self.url) as client:
            streams = [
                self._listen(client, began_s, *each) for each in zip(plan.stream_s, plan.stream_frames, strict=True)
            ]
            tasks = [self._task(began_s, *each) for each in zip(plan.task_s, plan.task_frames, strict=True)]
            found = await asyncio.gather(*tasks, *streams)
        return np.array(found[: len(tasks)])

    async def _task(self, began_s: float, at_s: float, frames: float) -> float:
        await asyncio.sleep(max(0.0, began_s + at_s - time.monotonic()))
        task = new_id()
        await self.queue.submit(task, "benchmark", spec_of(int(frames), 1), 10_000, "", "")
        while True:
            record = await self.queue.record(task)
            if record and record.status in ENDED:
                if record.status != "done":
                    raise ServerError(f"a task is {record.status}: {record.error}")
                return record.ended - record.created
            await asyncio.sleep(LOOK_S)

    async def _listen(self, client: SpeechClient, began_s: float, at_s: float, frames: float) -> float:
        await asyncio.sleep(max(0.0, began_s + at_s - time.monotonic()))
        async with LiveSpeech(client, self.queue, spec_of(int(frames), 2), 60.0, "benchmark", 1000) as live:
            await live.first()
            async for _ in live.rest():
                pass
        return time.monotonic() - began_s - at_s


def spec_of(frames: int, seed: int) -> TaskSpec:
    return TaskSpec(script=SCRIPT, voices=(1, 2), frames=frames, estimate=frames, seed=seed)


def fit(stage: Stage, frames: int) -> Fitted:
    """Measure a ladder and tasks alone. Least squares of c + b (segments - 1) + a (frames before them), all >= 0."""
    common.say("measuring frame steps …")
    rows = [(n, trial, stage.ask(stage.rung(n, frames))) for trial in range(LADDERS) for n in LADDER]
    sessions, trial, step_s = (np.array(each) for each in zip(*rows, strict=True))
    step = fit_step_time(Rungs(sessions.astype(float), step_s, trial), np.random.default_rng(0), draws=10).step_time
    common.say("measuring tasks alone …")
    terms, beside_s = [], []
    for segments in ALONE_SEGMENTS * 2:
        plan = Schedule("alone", np.zeros(1), np.array([segments * SEGMENT_FRAMES]), np.zeros(0), np.zeros(0))
        took_s = stage.ask(stage.turnarounds(plan))[0]
        beside_s.append(took_s - segments * SEGMENT_FRAMES * float(step(1.0)))
        terms.append((1, segments - 1, SEGMENT_FRAMES * segments * (segments - 1) / 2))
    task_s, fixed_s, per_frame_s = nnls(np.array(terms, float), np.array(beside_s))[0]
    return Fitted(step, float(task_s), (float(fixed_s), float(per_frame_s)))


def schedules(fitted: Fitted, tasks: int, rng: np.random.Generator) -> list[Schedule]:
    """The runs that are held out; loads are shares of what the studio's sessions carry."""
    carried = SESSIONS / float(fitted.step_time(SESSIONS))

    def by_chance(count: int, share: float, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        frames = rng.integers(low, high, count).astype(float)
        gaps_s = rng.exponential(1.0, count)
        return np.cumsum(gaps_s) * frames.mean() / (share * carried), frames

    low, high = FRAMES
    nobody = np.zeros(0), np.zeros(0)
    frames = rng.integers(low, high, tasks // 2).astype(float)
    made = [Schedule("all at once", np.zeros(len(frames)), frames, *nobody)]
    made += [Schedule(f"by chance, {share:.0%}", *by_chance(tasks, share, low, high), *nobody) for share in (0.5, 0.8)]
    for share in (0.3, 0.5):
        task_s, task_frames = by_chance(tasks, 0.4, low, high)
        streams = by_chance(2 * tasks, share, low // 3, high // 3)
        kept = streams[0] < task_s[-1]
        made.append(Schedule(f"40%, and streams {share:.0%}", task_s, task_frames, streams[0][kept], streams[1][kept]))
    return made


def predicted(fitted: Fitted, plan: Schedule) -> np.ndarray:
    """Seconds of each task [n] of a run as planned."""
    at_s, frames = np.concatenate([plan.task_s, plan.stream_s]), np.concatenate([plan.task_frames, plan.stream_frames])
    is_task = np.arange(len(at_s)) < len(plan.task_s)
    order = np.argsort(at_s, kind="stable")
    pool = Pool(
        1,
        fitted.step_time,
        shared_sessions=SESSIONS,
        task_slots=PLACES,
        between_segments=fitted.between,
        tokens_per_frame=0,
    )
    segment = np.where(is_task, float(SEGMENT_FRAMES), 0.0)
    run = remembered(pool, arrivals_of(at_s[order], frames[order], segment=segment[order], turn=at_s[order]))
    ended_s = np.empty(len(order))
    ended_s[order] = run.end_s
    return (ended_s - at_s)[is_task] + fitted.task_s


def figures_of(turnaround_s: np.ndarray) -> np.ndarray:
    """What is compared of a run: median, mean, 95th percentile."""
    return np.array([np.median(turnaround_s), turnaround_s.mean(), np.quantile(turnaround_s, 0.95)])


def main(arguments: Sequence[str]) -> int:
    parser = common.Parser(__doc__, EXAMPLE)
    parser.add_argument("--tasks", type=common.whole(4, 1000), default=40, help="tasks of a run")
    parser.add_argument("--seed", type=common.whole(0, 2**31), default=1)
    parser.add_argument("--emulate", default="", help="emulate the GPU of a profile; default: tiny, on this CPU")
    given = parser.parse_args(arguments)
    emulated = read_profile(Path(given.emulate)) if given.emulate else None
    deployment = _emulating(emulated, given.emulate) if emulated else Deployment()
    tasks, rung = (4, 30) if given.quick else (given.tasks, RUNG_FRAMES)
    with tempfile.TemporaryDirectory(prefix="turnaround-") as folder:
        settings = StudioSettings(
            folder=folder, port=0, segment_s=SEGMENT_FRAMES * wire.SECONDS_PER_FRAME, jobs_at_once=PLACES,
            sessions=SESSIONS,
        )  # fmt: skip
        common.say("starting the studio …")
        with Studio(StudioPlan(settings, deployment), common.say) as studio, Stage(studio) as stage:
            fitted = fit(stage, rung)
            rows = []
            for plan in schedules(fitted, tasks, np.random.default_rng(given.seed)):
                before = figures_of(predicted(fitted, plan))
                common.say(f"{plan.name}: {len(plan.task_s)} tasks, {len(plan.stream_s)} streams …")
                rows.append((plan, before, figures_of(stage.ask(stage.turnarounds(plan)))))
    device = (
        f"{emulated.device} at {emulated.preset} (emulated, {emulated.known_as})" if emulated else "this CPU at tiny"
    )
    return show(rows, fitted, given.quick, device)


def _emulating(profile: Profile, path: str) -> Deployment:
    return Deployment(preset=profile.preset, emulate=path, topology=profile.topology or wire.STAGED)


def show(rows: Sequence[tuple[Schedule, np.ndarray, np.ndarray]], fitted: Fitted, is_quick: bool, device: str) -> int:
    table = common.table(
        f"Turnaround of tasks in seconds, {device}: predicted / measured",
        "run",
        "tasks",
        "streams",
        "median",
        "mean",
        "p95",
    )
    errors = []
    for plan, before, measured in rows:
        errors += list(np.abs(before / measured - 1))
        shown = (f"{one:.2f} / {other:.2f}" for one, other in zip(before, measured, strict=True))
        table.add_row(plan.name, str(len(plan.task_s)), str(len(plan.stream_s)), *shown)
    figures = {
        "turnaround_error_median": float(np.median(errors)),
        "turnaround_error_worst": float(np.max(errors)),
        "figures": len(errors),
        "runs": len(rows),
        "device": device,
        "step_ms": {str(n): 1000 * float(fitted.step_time(n)) for n in LADDER},
        "between_segments_ms": 1000 * fitted.between[0],
        "between_segments_ms_per_1000_frames": 1e6 * fitted.between[1],
    }
    common.finish(table, figures)
    return 0 if is_quick or figures["turnaround_error_median"] <= MOST_ERROR else common.EXIT_FAILED


if __name__ == "__main__":
    common.run(main)
