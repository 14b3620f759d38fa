"""Breaks each part of a running studio in the middle of tasks: what is lost, repeated or changed of them.

Every case submits four-speaker tasks of many segments, waits until all that run have stored one, strikes somewhere in
the next, and waits for the end. Audio is compared with that of the case "none" (the same segments, no fault), and with
that of the same text spoken in one request.

worker, front, Redis, a stage, Triton   SIGKILL
stop worker   SIGSTOP for longer than the lease: its task goes to another, and what it writes afterwards must not count
duplicate     every message is put into the queue a second time
cut Redis     one worker's connections to Redis carry nothing for longer than the lease, and are then reset
cut Triton    the same for all connections to Triton
full disk     storage, Redis and logs share a tmpfs, of which no byte is free for a while (takes root to mount)

One Triton serves all cases. Each tells its result as it ends; one that breaks off counts its tasks as lost, and the
others go on. ``--cases "full disk"`` repeats one. Waits are long enough for a host that others use too.

Keys of the last line: lost, duplicated, broken_off (names), max_abs_difference (of full scale, from the case "none"),
max_abs_difference_from_one_request, segments_repeated_worst (of a fault: frames repeated / (tasks x segment); bar 1).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
import psutil
from cut_wire import CutWire, ports_of
from queue_access import QueueAccess
from redis.exceptions import RedisError
from small_disk import filled, small_disk

from harness import wire
from harness.client.stream import SpeechClient
from harness.deploy.config import Deployment
from harness.errors import HarnessError, InputError
from harness.service.audio import to_pcm
from harness.service.redis_server import RedisServer
from harness.service.scripts import GROUP, NOBODY
from harness.service.segments import request_of
from harness.service.settings import StudioSettings
from harness.service.storage import AudioStore
from harness.service.studio import Studio, StudioPlan
from harness.service.task import ENDED, TaskRecord, TaskSpec, new_id

EXAMPLE = "python benchmarks/service/job_faults.py --cases worker,Triton --tasks 4"
CASES = ("none", "worker", "stop worker", "front", "Redis", *wire.STAGES, "Triton", "duplicate")
WIRED = ("cut Redis", "cut Triton", "full disk")  # played in a second studio, behind proxies and on a small disk
QUICK = ("worker", "duplicate")
LEASE_S, PAUSE_S, PATIENCE_S = 4.0, 9.0, 600.0
TOLERANCE = 2e-4  # of full scale, against one request: a resumed prompt is read in parts, and 16 bits round
DISK_MIB = 256
SCRIPT = "\n".join(f"Speaker {1 + turn % 4}: It is early, and the market has not opened yet." for turn in range(24))


@dataclass(frozen=True)
class Struck:
    """The outcome of a case. ``repeated``: frames that were computed and lost, at the last sign of life. ``broken``:
    why it was broken off, "" where it was not."""

    case: str
    tasks: int
    done: int
    doubled: int
    repeated: float
    reclaimed: float
    difference: float
    from_whole: float
    seconds: float
    broken: str = ""


@dataclass
class Expected:
    """Samples by seed: of one request without segments, and of segments without a fault."""

    whole: dict[int, np.ndarray] = field(default_factory=dict)
    segmented: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Wiring:
    """What only the second studio has: proxies that can be cut, and a disk that can be filled (None: not mounted)."""

    redis: CutWire
    triton: CutWire
    disk: Path | None


class Scene(QueueAccess):
    """A studio with its queue, which is reached at ``redis_url``, whatever is cut."""

    def __init__(self, studio: Studio, frames: int, expected: Expected, redis_url: str, wiring: Wiring | None = None):
        super().__init__(redis_url, LEASE_S)
        self.studio, self.frames, self.expected, self.wiring = studio, frames, expected, wiring
        self.store = AudioStore(studio.settings.storage_url)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition, while the studio restarts what has ended (which has its own time limit)."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(RedisError):  # it may be the part that was killed
                if condition():
                    return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {PATIENCE_S:g} s")
            before_s = time.monotonic()
            self.studio.look()
            deadline += time.monotonic() - before_s
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

    def busiest_worker(self) -> int:
        """The process of the worker that holds the most tasks."""
        held = self.ask(self.redis.xpending("studio:queue", GROUP))["consumers"]
        names = [each["name"] for each in held for _ in range(int(each["pending"]))]
        holding = Counter(pid_of(name) for name in names if name != NOBODY)
        return max((worker.pid for worker in self.studio.workers), key=lambda pid: holding[pid])

    def forget(self, ids: Sequence[str]) -> None:
        for task in ids:
            self.ask(self.queue.cancel(task))
            self.store.remove(task)
            self.ask(self.queue.forget(task))

    def differences(self, record: TaskRecord, seed: int) -> tuple[float, float]:
        """The largest difference from the run without a fault, and from one request, as shares of full scale."""
        pieces = self.store.pieces(record.id, [(each.name, each.bytes) for each in record.segments])
        audio = np.frombuffer(b"".join(pieces), "<i2")
        if seed not in self.expected.whole:
            self.expected.whole[seed] = self.ask(self._spoken(seed))
        unbroken = self.expected.segmented.setdefault(seed, audio)  # the first case has no fault
        return _largest(audio, unbroken), _largest(audio, self.expected.whole[seed])

    async def _spoken(self, seed: int) -> np.ndarray:
        heard: list[bytes] = []
        async with SpeechClient(self.studio.settings.url) as client:
            request = request_of(f"whole-{seed}", "benchmark", self.spec(seed), self.frames)
            result = await client.speak(request, "closed", on_audio=heard.append)
        if result.error:
            raise RuntimeError(result.error)
        return np.frombuffer(b"".join(map(to_pcm, heard)), "<i2")


def pid_of(consumer: str) -> int:
    """The process of a consumer: its name is HOST-PROCESS-RANDOM-PLACE."""
    return int(consumer.rsplit("-", 3)[1])


def _largest(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other).max()) / 32768 if one.shape == other.shape else 1.0


def strike(scene: Scene, case: str, ids: Sequence[str]) -> None:
    """Do what the case is about; of the workers it hits the one that has the most tasks."""
    studio, wiring = scene.studio, scene.wiring
    if case == "worker":
        psutil.Process(scene.busiest_worker()).kill()
    elif case == "stop worker":
        worker = psutil.Process(scene.busiest_worker())
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
    elif wiring:
        broken = {
            "cut Redis": lambda: wiring.redis.cut(ports_of(scene.busiest_worker())),
            "cut Triton": wiring.triton.cut,
            "full disk": lambda: filled(wiring.disk),
        }
        with broken[case]() if case in broken else contextlib.nullcontext():
            time.sleep(PAUSE_S)


def play(scene: Scene, case: str, tasks: int) -> Struck:
    """One case, from submission to the comparison of its audio."""
    common.say(f"{case} … (load {os.getloadavg()[0]:.1f})")
    before, began_s = scene.ask(scene.queue.counts()), time.monotonic()
    ids = scene.submit(tasks)
    broken = ""
    try:
        if case != "none":
            scene.until(lambda: is_within(scene.records(ids)), f"{case}: tasks within a segment")
            strike(scene, case, ids)
        scene.until(lambda: all(record.status in ENDED for record in scene.records(ids)), f"{case}: tasks that end")
    except (TimeoutError, HarnessError) as error:
        if case == "none":
            raise  # there is nothing to compare with
        broken = str(error)
    found = outcome(scene, case, ids, before, time.monotonic() - began_s, broken)
    common.say(f"{case}: {told(found)}")
    scene.forget(ids)
    return found


def outcome(
    scene: Scene, case: str, ids: Sequence[str], before: dict[str, float], seconds: float, broken: str
) -> Struck:
    """What became of the tasks of a case. ``before``: the queue's counts before it."""
    records, counts = scene.records(ids), scene.ask(scene.queue.counts())
    done = [record for record in records if record.status == "done"]
    gained = {name: counts.get(name, 0.0) - before.get(name, 0.0) for name in ("done", "frames_repeated", "reclaimed")}
    doubled = sum(record.frames != scene.frames for record in done) + int(gained["done"]) - len(done)
    doubled += 0 if broken else scene.ask(scene.redis.xlen("studio:queue"))
    found = [scene.differences(record, ids.index(record.id)) for record in done]
    difference, from_whole = (max(each) for each in zip(*found, strict=True)) if found else (1.0, 1.0)
    return Struck(
        case, len(ids), len(done), doubled, gained["frames_repeated"], gained["reclaimed"], difference, from_whole,
        seconds, broken,
    )  # fmt: skip


def told(one: Struck) -> str:
    """A case in one line."""
    if one.broken:
        return f"broken off after {one.seconds:.0f} s, {one.done} of {one.tasks} done: {one.broken}"
    return (
        f"{one.done} of {one.tasks} done, {one.doubled} doubled, {one.repeated:.0f} frames repeated, "
        f"difference {one.difference:.1e}, {one.seconds:.0f} s"
    )


def is_within(records: Sequence[TaskRecord]) -> bool:
    """Whether tasks run, each has stored a segment, and one is known to be within its next.

    Raises InputError where all ended before.
    """
    if all(record.status in ENDED for record in records):
        raise InputError("the tasks ended before the fault: give more --frames")
    running = [record for record in records if record.status == "running"]
    return all(record.segments for record in running) and any(record.live for record in running)


def play_all(settings: StudioSettings, cases: Sequence[str], tasks: int, frames: int) -> list[Struck]:
    """The cases in one studio, those with wires and a small disk in a second one that uses the first one's Triton."""
    expected, found, folder = Expected(), [], Path(settings.folder)
    common.say("starting the studio at preset tiny …")
    first = replace(settings, folder=str(folder / "studio"))
    with Studio(StudioPlan(first, Deployment(), workers=2), common.say) as studio:
        with Scene(studio, frames, expected, studio.settings.redis) as scene:
            found += [play(scene, case, tasks) for case in ("none", *cases) if case not in WIRED]
        wired = [case for case in cases if case in WIRED]
        if wired:
            studio.look()
            found += play_wired(replace(settings, url=studio.settings.url), frames, expected, wired, tasks)
    return found


def play_wired(
    settings: StudioSettings, frames: int, expected: Expected, cases: Sequence[str], tasks: int
) -> list[Struck]:
    with wired_scene(settings, frames, expected) as scene:
        if scene.wiring.disk is None and "full disk" in cases:
            common.say("full disk: left out, since this user may not mount a tmpfs")
            cases = [case for case in cases if case != "full disk"]
        return [play(scene, case, tasks) for case in cases]


@contextlib.contextmanager
def wired_scene(settings: StudioSettings, frames: int, expected: Expected) -> Iterator[Scene]:
    """A studio whose Redis and Triton are reached through proxies, and whose folder is a small disk."""
    folder = Path(settings.folder) / "disk"
    with contextlib.ExitStack() as stack:
        mounted = stack.enter_context(small_disk(folder, DISK_MIB))
        redis = RedisServer(folder / "redis").start()
        stack.callback(redis.stop)
        wiring = Wiring(
            stack.enter_context(CutWire(*_place(redis.url.rpartition("@")[2].partition("/")[0]))),
            stack.enter_context(CutWire(*_place(settings.url))),
            folder if mounted else None,
        )
        through = redis.url.replace(redis.url.rpartition("@")[2].partition("/")[0], wiring.redis.address)
        settings = replace(settings, folder=str(folder / "studio"), redis=through, url=wiring.triton.address)
        studio = stack.enter_context(Studio(StudioPlan(settings, None, workers=2), common.say))
        yield stack.enter_context(Scene(studio, frames, expected, redis.url, wiring))


def _place(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def main(arguments: Sequence[str] = ()) -> int:
    parser = common.Parser(__doc__, EXAMPLE)
    every = (*CASES, *WIRED)
    parser.add_argument("--cases", type=common.several(str), help=f"of {', '.join(every)}; default: all")
    parser.add_argument("--tasks", type=common.whole(1, 64), default=4, help="tasks of each case")
    parser.add_argument("--frames", type=common.whole(20, 40_500), default=1200, help="frames of each task")
    parser.add_argument("--segment", type=common.whole(5, 10_000), default=150, help="frames of a segment")
    given = parser.parse_args(arguments)
    cases = given.cases or (QUICK if given.quick else every)
    if unknown := set(cases) - {*every, "none"}:
        raise InputError(f"--cases {', '.join(sorted(unknown))}: use some of {', '.join(every)}")
    tasks, frames = (2, 600) if given.quick else (given.tasks, given.frames)
    with tempfile.TemporaryDirectory(prefix="job-faults-") as folder:
        settings = StudioSettings(
            folder=folder, port=0, segment_s=given.segment * wire.SECONDS_PER_FRAME, lease_s=LEASE_S, tries=20,
            jobs_at_once=4,
        )  # fmt: skip
        found = play_all(settings, [case for case in cases if case != "none"], tasks, frames)
    return show(found, frames, given.segment)


def show(found: Sequence[Struck], frames: int, segment: int) -> int:
    table = common.table(
        f"Tasks of {frames} frames in segments of {segment}, and faults in their middle",
        "fault", "tasks", "done", "doubled", "frames repeated", "claims taken over", "max difference",
        "from one request", "s",
    )  # fmt: skip
    for one in found:
        table.add_row(
            one.case, str(one.tasks), str(one.done), str(one.doubled), f"{one.repeated:.0f}", f"{one.reclaimed:.0f}",
            f"{one.difference:.1e}", f"{one.from_whole:.1e}", f"{one.seconds:.1f}",
        )  # fmt: skip
    figures = {
        "cases": len(found),
        "tasks": sum(one.tasks for one in found),
        "lost": sum(one.tasks - one.done for one in found),
        "duplicated": sum(one.doubled for one in found),
        "max_abs_difference": max(one.difference for one in found),
        "max_abs_difference_from_one_request": max(one.from_whole for one in found),
        "most_frames_repeated_by_a_fault": max(one.repeated for one in found),
        "segments_repeated_worst": max(one.repeated / (one.tasks * segment) for one in found),
        "broken_off": [one.case for one in found if one.broken],
        "segment_frames": segment,
        "difference_of": "full scale; of 16-bit samples from the same segments without a fault",
    }
    common.finish(table, figures)
    fine = not figures["lost"] and not figures["duplicated"] and not figures["broken_off"]
    fine = fine and not figures["max_abs_difference"] and figures["max_abs_difference_from_one_request"] <= TOLERANCE
    fine = fine and figures["segments_repeated_worst"] <= 1
    return 0 if fine else common.EXIT_FAILED


if __name__ == "__main__":
    common.run(main)
