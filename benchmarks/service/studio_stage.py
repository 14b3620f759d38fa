"""A studio under test: frame steps of streams side by side, what tasks cost beside their frames, and runs of both."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
from harness.service.task import ENDED, TaskRecord, TaskSpec, new_id

SCRIPT = "Speaker 1: It is early, and the market has not opened yet.\nSpeaker 2: So we talk about what is new."
SEGMENT_FRAMES = 75
LADDER = (1, 2, 3, 4, 7)
SEGMENTS = 5  # of a text whose segments are spoken one by one, twice
ALONE = (1, 4, 4, 1)  # segments of tasks that run alone
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
    """Seconds of a task beside its frames and later segments, of a later segment, and there per frame spoken before."""

    task_s: float
    segment_s: float
    per_frame_s: float


@dataclass(frozen=True)
class Fitted:
    """What a prediction rests on."""

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

    async def beside_frames(self, segments: int) -> list[float]:
        """Speak a text in segments one by one; returns the seconds of each beside its frames, at its own step."""
        found, carry = [], b""
        async with SpeechClient(self.url) as client:
            for number in range(segments):
                request = request_of(new_id(), "fit", spec_of(segments * SEGMENT_FRAMES, 1), SEGMENT_FRAMES)
                request, carries = replace(request, carry=carry, keep=number < segments - 1), []
                result = await client.open(request, "closed", on_carry=carries.append).run()
                if result.error:
                    raise ServerError(result.error)
                carry = carries[0] if carries else b""
                found.append((result.ended_ns - result.sent_ns) / 1e9 - SEGMENT_FRAMES * step_s([result]))
        return found

    async def beside_segments(self, segments: int) -> float:
        """Seconds of a task of so many segments while no segment is spoken: claim, storing, and the end."""
        record = await self._ended(segments * SEGMENT_FRAMES)
        return record.ended - record.created - record.busy_s

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
        record = await self._ended(int(frames))
        return record.ended - record.created, record.started - record.created

    async def _ended(self, frames: int) -> TaskRecord:
        """Submit a task, and wait for its end."""
        task = new_id()
        await self.queue.submit(task, "benchmark", spec_of(frames, 1), 10_000, "", "")
        while True:
            record = await self.queue.record(task)
            if record and record.status in ENDED:
                if record.status != "done":
                    raise ServerError(f"a task is {record.status}: {record.error}")
                return record
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


def measure_ladder(stage: Stage, frames: int, rungs: Sequence[int], tries: int = LADDER_TRIES) -> Ladder:
    """Measure ``rungs`` of so many sessions, one after another.

    Raises InconclusiveError where they scatter too much to be fitted, ``tries`` times in a row.
    """
    found: dict[int, list[float]] = {n: [] for n in LADDER}
    for n in rungs:
        found[n].append(stage.ask(stage.rung(n, frames)))
    ladder = Ladder(LADDER, np.array([np.mean(each) for each in found.values()]))
    try:
        _step_time([ladder])
    except InconclusiveError as error:
        if tries == 1:
            raise
        common.say(f"again: {error}")
        return measure_ladder(stage, frames, rungs, tries - 1)
    return ladder


def measure_costs(stage: Stage) -> TaskCosts:
    """Measure what tasks cost alone, in ways that need no ladder: a segment is compared with its own frames.

    Least squares of a + b x (frames before) over later segments, and of c + d x (later segments) over tasks, all >= 0.
    """
    spoken_s = np.array([stage.ask(stage.beside_frames(SEGMENTS)) for _ in range(2)])
    before = np.tile(SEGMENT_FRAMES * np.arange(1, SEGMENTS), len(spoken_s))
    resumed_s, per_frame_s = _line(before, spoken_s[:, 1:].ravel())
    stored_s, again_s = _line(np.array(ALONE) - 1, np.array([stage.ask(stage.beside_segments(n)) for n in ALONE]))
    return TaskCosts(max(float(spoken_s[:, 0].mean()), 0.0) + stored_s, resumed_s + again_s, per_frame_s)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Intercept and slope, both at or above zero."""
    intercept, slope = nnls(np.column_stack([np.ones(len(x)), x]), y)[0]
    return float(intercept), float(slope)


def fit(ladders: Sequence[Ladder], costs: TaskCosts) -> Fitted:
    """The step of these ladders at their mean level, and the costs."""
    return Fitted(_step_time(ladders), costs)


def _step_time(ladders: Sequence[Ladder]) -> StepTime:
    sessions = np.concatenate([each.sessions for each in ladders]).astype(float)
    trial = np.repeat(np.arange(len(ladders)), [len(each.sessions) for each in ladders])
    rungs = Rungs(sessions, np.concatenate([each.step_s for each in ladders]), trial)
    return fit_step_time(rungs, np.random.default_rng(0), draws=10).step_time
