"""Kills each part of a running studio in the middle of tasks: what is lost, repeated or changed of them.

Every case submits four-speaker tasks of many segments, waits until all that run have stored one, strikes somewhere in
the next, and waits for the end. Audio is compared with that of the same text spoken in one request. "stop worker" is
SIGSTOP for longer than the lease: its task goes to another, and what it writes afterwards must not count. "duplicate"
puts every message into the queue a second time.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
import psutil
from redis.exceptions import RedisError

from harness import wire
from harness.client.stream import SpeechClient
from harness.deploy.config import Deployment
from harness.errors import InputError
from harness.service.audio import to_pcm
from harness.service.queue import TaskQueue, connect
from harness.service.segments import request_of
from harness.service.settings import StudioSettings
from harness.service.storage import AudioStore
from harness.service.studio import Studio, StudioPlan
from harness.service.task import ENDED, TaskRecord, TaskSpec, new_id

EXAMPLE = "python benchmarks/service/job_faults.py --cases worker,Triton --tasks 4"
CASES = ("none", "worker", "stop worker", "front", "Redis", *wire.STAGES, "Triton", "duplicate")
QUICK = ("none", "worker", "duplicate")
LEASE_S, PAUSE_S, PATIENCE_S = 4.0, 9.0, 300.0
TOLERANCE = 2e-4  # of full scale: a resumed prompt is computed in other batches, and 16 bits round
SCRIPT = "\n".join(f"Speaker {1 + turn % 4}: It is early, and the market has not opened yet." for turn in range(24))


@dataclass(frozen=True)
class Struck:
    """The outcome of a case. ``repeated``: frames that were computed and lost, at the last sign of life."""

    case: str
    tasks: int
    done: int
    doubled: int
    repeated: float
    reclaimed: float
    difference: float
    seconds: float


class Scene:
    """A studio with its queue; ``pause`` waits while the studio restarts what has ended."""

    def __init__(self, studio: Studio, frames: int):
        self.studio, self.frames = studio, frames
        self.loop = asyncio.new_event_loop()
        self.redis = connect(studio.settings.redis)
        self.queue = TaskQueue(self.redis, LEASE_S)
        self.store = AudioStore(studio.settings.storage_url)
        self.expected: dict[int, np.ndarray] = {}

    def ask(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    def close(self) -> None:
        self.ask(self.redis.aclose())
        self.loop.close()

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(RedisError):  # it may be the part that was killed
                if condition():
                    return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {PATIENCE_S:g} s")
            self.studio.look()
            time.sleep(0.05)

    def spec(self, seed: int) -> TaskSpec:
        return TaskSpec(script=SCRIPT, voices=(1, 2, 3, 4), frames=self.frames, estimate=self.frames, seed=seed)

    def submit(self, tasks: int) -> list[str]:
        ids = [new_id() for _ in range(tasks)]
        for seed, task in enumerate(ids):
            self.ask(self.queue.submit(task, "benchmark", self.spec(seed), 10_000, "", ""))
        return ids

    def records(self, ids: Sequence[str]) -> list[TaskRecord]:
        found = self.ask(self.queue.records(ids))
        return [record for record in found if record is not None]

    def unbroken(self, seed: int) -> np.ndarray:
        """The 16-bit samples of one request without segments."""
        if seed not in self.expected:
            self.expected[seed] = self.ask(self._spoken(seed))
        return self.expected[seed]

    async def _spoken(self, seed: int) -> np.ndarray:
        heard: list[bytes] = []
        async with SpeechClient(self.studio.settings.url) as client:
            request = request_of(f"whole-{seed}", "benchmark", self.spec(seed), self.frames)
            result = await client.speak(request, "closed", on_audio=heard.append)
        if result.error:
            raise RuntimeError(result.error)
        return np.frombuffer(b"".join(map(to_pcm, heard)), "<i2")

    def difference(self, record: TaskRecord, seed: int) -> float:
        """The largest difference from the unbroken run, as a share of full scale."""
        pieces = self.store.pieces(record.id, [(each.name, each.bytes) for each in record.segments])
        audio, expected = np.frombuffer(b"".join(pieces), "<i2"), self.unbroken(seed)
        if audio.shape != expected.shape:
            return 1.0
        return float(np.abs(audio.astype(int) - expected).max()) / 32768


def strike(scene: Scene, case: str, ids: Sequence[str]) -> None:
    """Do what the case is about."""
    studio = scene.studio
    if case == "worker":
        psutil.Process(studio.workers[0].pid).kill()
    elif case == "stop worker":
        worker = psutil.Process(studio.workers[0].pid)
        worker.send_signal(signal.SIGSTOP)
        time.sleep(PAUSE_S)
        worker.send_signal(signal.SIGCONT)
    elif case == "front":
        psutil.Process(studio.front.pid).kill()
    elif case == "Redis":
        psutil.Process(studio.redis.pid).kill()
    elif case in wire.STAGES:
        common.processes(studio.triton)[case][0].kill()
    elif case == "Triton":
        psutil.Process(studio.triton.pid).kill()
    elif case == "duplicate":
        for task in ids:
            scene.ask(scene.redis.xadd("studio:queue", {"task": task}))


def play(scene: Scene, case: str, tasks: int) -> Struck:
    """One case, from submission to the comparison of its audio."""
    common.say(f"{case} …")
    before, began_s = scene.ask(scene.queue.counts()), time.monotonic()
    ids = scene.submit(tasks)
    scene.until(lambda: is_within(scene.records(ids)), f"{case}: tasks within a segment")
    strike(scene, case, ids)
    scene.until(lambda: all(record.status in ENDED for record in scene.records(ids)), f"{case}: tasks that end")
    seconds = time.monotonic() - began_s
    records, counts = scene.records(ids), scene.ask(scene.queue.counts())
    done = [record for record in records if record.status == "done"]
    rest = scene.ask(scene.redis.xlen("studio:queue"))
    doubled = (
        sum(record.frames != scene.frames for record in done)
        + rest
        + int(counts["done"] - before.get("done", 0))
        - len(done)
    )
    gained = {name: counts.get(name, 0.0) - before.get(name, 0.0) for name in ("frames_repeated", "reclaimed")}
    difference = max((scene.difference(record, ids.index(record.id)) for record in done), default=1.0)
    return Struck(case, tasks, len(done), doubled, gained["frames_repeated"], gained["reclaimed"], difference, seconds)


def is_within(records: Sequence[TaskRecord]) -> bool:
    """Whether tasks run, and every one that does has stored a segment. Raises InputError where all ended before."""
    if all(record.status in ENDED for record in records):
        raise InputError("the tasks ended before the fault: give more --frames")
    running = [record for record in records if record.status == "running"]
    return bool(running) and all(record.segments for record in running)


def main(arguments: Sequence[str] = ()) -> int:
    parser = common.Parser(__doc__, EXAMPLE)
    parser.add_argument("--cases", type=common.several(str), help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--tasks", type=common.whole(1, 64), default=4, help="tasks of each case")
    parser.add_argument("--frames", type=common.whole(20, 40_500), default=1200, help="frames of each task")
    parser.add_argument("--segment", type=common.whole(5, 10_000), default=150, help="frames of a segment")
    given = parser.parse_args(arguments)
    cases = given.cases or (QUICK if given.quick else CASES)
    if unknown := set(cases) - set(CASES):
        raise InputError(f"--cases {', '.join(sorted(unknown))}: use some of {', '.join(CASES)}")
    tasks, frames = (2, 600) if given.quick else (given.tasks, given.frames)
    with tempfile.TemporaryDirectory(prefix="job-faults-") as folder:
        settings = StudioSettings(
            folder=folder, port=0, segment_s=given.segment * wire.SECONDS_PER_FRAME, lease_s=LEASE_S, tries=20
        )
        common.say("starting the studio at preset tiny …")
        with Studio(StudioPlan(settings, Deployment(), workers=2), common.say) as studio:
            scene = Scene(studio, frames)
            try:
                found = [play(scene, case, tasks) for case in cases]
            finally:
                scene.close()
    return show(found, frames, given.segment)


def show(found: Sequence[Struck], frames: int, segment: int) -> int:
    table = common.table(
        f"Tasks of {frames} frames in segments of {segment}, and faults in their middle",
        "fault", "tasks", "done", "doubled", "frames repeated", "claims taken over", "max difference", "s",
    )  # fmt: skip
    for one in found:
        table.add_row(
            one.case, str(one.tasks), str(one.done), str(one.doubled), f"{one.repeated:.0f}", f"{one.reclaimed:.0f}",
            f"{one.difference:.1e}", f"{one.seconds:.1f}",
        )  # fmt: skip
    figures = {
        "cases": len(found),
        "tasks": sum(one.tasks for one in found),
        "lost": sum(one.tasks - one.done for one in found),
        "duplicated": sum(one.doubled for one in found),
        "max_abs_difference": max(one.difference for one in found),
        "most_frames_repeated_by_a_fault": max(one.repeated for one in found),
        "segment_frames": segment,
        "difference_of": "full scale; of 16-bit samples from one request without segments",
    }
    common.finish(table, figures)
    fine = not figures["lost"] and not figures["duplicated"] and figures["max_abs_difference"] <= TOLERANCE
    return 0 if fine else common.EXIT_FAILED


if __name__ == "__main__":
    common.run(main)
