"""A studio under test: frame steps of streams side by side, what tasks cost beside their frames, and runs of both."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import common
import numpy as np
from queue_access import QueueAccess
from scipy.optimize import nnls

from harness.capacity.models.steps import Rungs, StepTime, fit_step_time
from harness.client.stream import SpeechClient
from harness.errors import InconclusiveError, ServerError
from harness.records.schema import Result
from harness.service.segments import request_of
from harness.service.speech import LiveSpeech
from harness.service.studio import Studio
from harness.service.task import ENDED, TaskSpec, new_id

SCRIPT = "Speaker 1: It is early, and the market has not opened yet.\nSpeaker 2: So we talk about what is new."
SEGMENT_FRAMES = 75
LADDER = (1, 2, 3, 4, 7)  # each once upwards and once downwards: a host that changes evenly shifts all of them alike
ALONE_FRAMES = (75, 80, 300, 305, 305, 300, 80, 75)  # pairs that differ by a segment and by hardly any frames
LADDER_TRIES = 3
LOOK_S = 0.5  # between two looks at a task: its times are those of its record, and looks cost what is measured
PATIENCE_S = 3600.0  # of one run: a part of the studio has ended


@dataclass(frozen=True)
class Schedule:
    """A run as planned: arrivals (s) and frames of tasks [n] and of streams [m]."""

    name: str
    task_s: np.ndarray
    task_frames: np.ndarray
    stream_s: np.ndarray
    stream_frames: np.ndarray


@dataclass(frozen=True)
class Played:
    """What became of the tasks [n] of a run: seconds until they were done, and until a worker took them first."""

    turnaround_s: np.ndarray
    wait_s: np.ndarray


@dataclass(frozen=True)
class Ladder:
    """Seconds of a frame step [rungs] with so many streams side by side."""

    sessions: tuple[int, ...]
    step_s: np.ndarray

    def drift_to(self, later: Ladder) -> float:
        """By what share steps are longer in a later ladder: geometric mean over the rungs."""
        return math.exp(float(np.mean(np.log(later.step_s / self.step_s)))) - 1


@dataclass(frozen=True)
class TaskCosts:
    """Seconds of a task beside its frames and later segments, of a later segment, and there per frame spoken before.

    ``at_step_s``: a frame step of one session as they were measured.
    """

    task_s: float
    segment_s: float
    per_frame_s: float
    at_step_s: float


@dataclass(frozen=True)
class Fitted:
    """What a prediction rests on: the step, and the costs of tasks on the host as it was then."""

    step_time: StepTime
    costs: TaskCosts


class Stage(QueueAccess):
    """A studio under test, with its queue; everything on one event loop."""

    def __init__(self, studio: Studio):
        super().__init__(studio.settings.redis, studio.settings.lease_s)
        self.url = studio.settings.url

    async def rung(self, sessions: int, frames: int) -> float:
        """Seconds of a frame step while this many streams run side by side."""
        async with SpeechClient(self.url) as client:
            requests = [request_of(new_id(), "fit", spec_of(frames, seed), frames) for seed in range(sessions)]
            results = await asyncio.gather(*(client.speak(each, "closed") for each in requests))
        if wrong := next((each.error for each in results if each.error), ""):
            raise ServerError(wrong)
        return step_s(results)

    async def play(self, plan: Schedule) -> Played:
        """Play a run. Raises ServerError where it does not end."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._played(plan)
        except TimeoutError:
            raise ServerError(f"{plan.name}: its tasks have not ended within {PATIENCE_S:g} s") from None

    async def _played(self, plan: Schedule) -> Played:
        began_s = time.monotonic()
        async with SpeechClient(self.url) as client:
            streams = [
                self._listen(client, began_s, *each) for each in zip(plan.stream_s, plan.stream_frames, strict=True)
            ]
            tasks = [self._task(began_s, *each) for each in zip(plan.task_s, plan.task_frames, strict=True)]
            found = await asyncio.gather(*tasks, *streams)
        turnaround_s, wait_s = np.array(found[: len(tasks)]).T
        return Played(turnaround_s, wait_s)

    async def _task(self, began_s: float, at_s: float, frames: float) -> tuple[float, float]:
        await asyncio.sleep(max(0.0, began_s + at_s - time.monotonic()))
        task = new_id()
        await self.queue.submit(task, "benchmark", spec_of(int(frames), 1), 10_000, "", "")
        while True:
            record = await self.queue.record(task)
            if record and record.status in ENDED:
                if record.status != "done":
                    raise ServerError(f"a task is {record.status}: {record.error}")
                return record.ended - record.created, record.started - record.created
            await asyncio.sleep(LOOK_S)

    async def _listen(self, client: SpeechClient, began_s: float, at_s: float, frames: float) -> None:
        await asyncio.sleep(max(0.0, began_s + at_s - time.monotonic()))
        async with LiveSpeech(client, self.queue, spec_of(int(frames), 2), 60.0, "benchmark", 1000) as live:
            await live.first()
            async for _ in live.rest():
                pass


def spec_of(frames: int, seed: int) -> TaskSpec:
    return TaskSpec(script=SCRIPT, voices=(1, 2), frames=frames, estimate=frames, seed=seed)


def step_s(results: Sequence[Result]) -> float:
    """Mean seconds between two frames, from when the last stream has begun to when the first one ends."""
    received_s = [each.chunks.received_ns / 1e9 for each in results]
    start_s, end_s = max(each[0] for each in received_s), min(each[-1] for each in received_s)
    within = [each[(each >= start_s) & (each <= end_s)] for each in received_s]
    if min(map(len, within)) < 2:
        raise ServerError(f"{len(results)} streams were never in progress at once: use more frames")
    return float(np.mean([np.ptp(each) / (len(each) - 1) for each in within]))


def measure_ladder(stage: Stage, frames: int, tries: int = LADDER_TRIES) -> Ladder:
    """Raises InconclusiveError where rungs scatter too much to be fitted, ``tries`` times in a row."""
    found: dict[int, list[float]] = {n: [] for n in LADDER}
    for n in (*LADDER, *reversed(LADDER)):
        found[n].append(stage.ask(stage.rung(n, frames)))
    ladder = Ladder(LADDER, np.array([np.mean(each) for each in found.values()]))
    try:
        _step_time([ladder])
    except InconclusiveError as error:
        if tries == 1:
            raise
        common.say(f"again: {error}")
        return measure_ladder(stage, frames, tries - 1)
    return ladder


def measure_costs(stage: Stage, lengths: Sequence[int] = ALONE_FRAMES) -> TaskCosts:
    """Run tasks of these lengths (frames) alone, and fit c + step x frames + b (segments - 1) + a (frames before them).

    Least squares of relative errors, all >= 0. The step is that of these tasks, whatever a ladder found.
    """
    rows, took_s = [], []
    for frames in lengths:
        plan = Schedule("alone", np.zeros(1), np.array([float(frames)]), np.zeros(0), np.zeros(0))
        took_s.append(float(stage.ask(stage.play(plan)).turnaround_s[0]))
        later = math.ceil(frames / SEGMENT_FRAMES) - 1
        rows.append((1, frames, later, SEGMENT_FRAMES * later * (later + 1) / 2))
    relative = np.array(rows, float) / np.array(took_s)[:, None]
    task_s, at_step_s, segment_s, per_frame_s = nnls(relative, np.ones(len(rows)))[0]
    return TaskCosts(float(task_s), float(segment_s), float(per_frame_s), float(at_step_s))


def fit(ladders: Sequence[Ladder], costs: TaskCosts) -> Fitted:
    """The step of these ladders at their mean level, and the costs on a host that is as fast as it was for them."""
    step_time = _step_time(ladders)
    speed = float(step_time(1.0)) / costs.at_step_s if costs.at_step_s else 1.0
    scaled = (speed * each for each in (costs.task_s, costs.segment_s, costs.per_frame_s, costs.at_step_s))
    return Fitted(step_time, TaskCosts(*scaled))


def _step_time(ladders: Sequence[Ladder]) -> StepTime:
    sessions = np.concatenate([each.sessions for each in ladders]).astype(float)
    trial = np.repeat(np.arange(len(ladders)), [len(each.sessions) for each in ladders])
    rungs = Rungs(sessions, np.concatenate([each.step_s for each in ladders]), trial)
    return fit_step_time(rungs, np.random.default_rng(0), draws=10).step_time
