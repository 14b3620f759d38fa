"""The job service under load: tasks per second accepted and followed to their end, and long tasks side by side.

load   200 followers, half of which poll every 0.5 s and half of which read events, while short tasks are submitted as
       fast as they are accepted; the front's own time per request is that of its log, Redis included
long   tasks of many minutes side by side: the memory of front, worker, Redis and Triton as they go on. A session's
       carry holds all frames so far (768 bytes each), so a worker's memory may grow by four copies of each, no more.
       What ends meanwhile is restarted as `harness studio` does it, and named (key ``restarted``)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
import psutil
from http_calls import Caller
from rich.table import Table

from harness import wire
from harness.deploy.config import Deployment
from harness.errors import InputError, ServerError
from harness.service.settings import StudioSettings
from harness.service.studio import Studio, StudioPlan

EXAMPLE = "python benchmarks/service/jobs.py --only long --minutes 10"
PARTS = ("load", "long")
SUBMITTERS, POLL_S, SAMPLE_S, TELL_S = 8, 0.5, 2.0, 60.0
WORDS_PER_MINUTE = 180
CARRY_BYTES, CARRY_COPIES = 768, 4  # of a frame; that a worker may hold of each task's carry
MOST_GROWTH_MIB = 40.0  # of front and Redis, and of a worker beside carries: what an allocator keeps
MOST_S_PER_TASK, PATIENCE_S = 3.0, 60.0  # of short tasks, before the run is given up
SHORT = "Speaker 1: one two three four"  # as short as it gets: the model is not what is measured
_WORDS = "It is early and the market has not opened yet so we talk about what is new since yesterday".split()


@dataclass
class Followed:
    """What the followers saw: tasks that ended, by state, and how late (s) after its end each heard of it."""

    ends: list[str] = field(default_factory=list)
    late_s: dict[str, list[float]] = field(default_factory=lambda: {"poll": [], "events": []})

    def note(self, how: str, task: dict) -> None:
        self.ends.append(task["status"])
        ended_s = datetime.fromisoformat(task["ended"].replace("Z", "+00:00")).timestamp()
        self.late_s[how].append(max(0.0, time.time() - ended_s))


def main(arguments: Sequence[str]) -> int:
    given = parser().parse_args(arguments)
    if given.quick:
        vars(given).update(tasks=20, followers=8, minutes=0.5, segment=10.0)
    parts = given.only or PARTS
    if unknown := set(parts) - set(PARTS):
        raise InputError(f"--only {', '.join(sorted(unknown))}: use some of {', '.join(PARTS)}")
    tables, figures = [], {}
    with tempfile.TemporaryDirectory(prefix="jobs-") as folder:
        settings = StudioSettings(
            folder=folder, port=0, segment_s=given.segment, jobs_at_once=4, open_tasks=1_000_000, per_minute=1_000_000
        )
        common.say("starting the studio at preset tiny …")
        with Studio(StudioPlan(settings, Deployment()), common.say) as studio:
            for part in parts:
                shown, found = {"load": load, "long": long}[part](studio, given)
                tables.append(shown)
                figures |= found
    common.finish(tables, figures)
    if problems := problems_of(figures):
        common.say(f"not as required: {', '.join(problems)}")
    return common.EXIT_FAILED if problems else 0


def problems_of(figures: Mapping) -> list[str]:
    """The names of figures that are not as required."""
    carries_mib = figures.get("long_tasks", 0) * carry_mib(figures.get("long_minutes", 0.0))
    allowed_mib = {"front": 0.0, "redis": 0.0, "worker": CARRY_COPIES * carries_mib}
    grown = [f"{name}_grew_mib" for name, carries in allowed_mib.items()
             if figures.get(f"{name}_grew_mib", 0.0) > carries + MOST_GROWTH_MIB]  # fmt: skip
    return [name for name in ("not_done", "long_not_done") if figures.get(name)] + grown


def carry_mib(minutes: float) -> float:
    return CARRY_BYTES * minutes * 60 * wire.FRAMES_PER_SECOND / 2**20


def parser() -> common.Parser:
    made = common.Parser(__doc__, EXAMPLE)
    made.add_argument("--only", type=common.several(str), help=f"of {', '.join(PARTS)}; default: both")
    made.add_argument("--tasks", type=common.whole(1, 100_000), default=600, help="short tasks")
    made.add_argument("--followers", type=common.whole(2, 2000), default=200, help="half poll, half read events")
    made.add_argument("--minutes", type=common.real(0.1, 90), default=90, help="audio of a long task")
    made.add_argument("--long-tasks", type=common.whole(1, 16), default=2, help="long tasks side by side")
    made.add_argument("--segment", type=common.real(1, 5400), default=120, help="seconds of a segment")
    return made


def load(studio: Studio, given) -> tuple[Table, dict]:
    """Short tasks, submitted at once, and followed to their ends."""
    common.say(f"{given.tasks} tasks, {given.followers} followers …")
    log = Path(studio.settings.folder) / "logs" / "front.log"
    before = log.stat().st_size
    following = _follow(studio.settings.port, given.tasks, given.followers)
    patience_s = PATIENCE_S + MOST_S_PER_TASK * given.tasks
    try:
        followed, accepted_s, seconds = asyncio.run(asyncio.wait_for(following, patience_s))
    except TimeoutError:
        must_live(studio)
        raise ServerError(f"{given.tasks} short tasks have not ended within {patience_s:g} s") from None
    own_ms = {name: 1000 * np.array(each) for name, each in requests_of(log, before).items()}
    late_s = {how: float(np.quantile(each, 0.95)) for how, each in followed.late_s.items()}
    table = common.table(
        f"{given.tasks} tasks followed by {given.followers}: front's own time", "request", "count", "p50 ms", "p99 ms"
    )
    for name, each in sorted(own_ms.items()):
        table.add_row(name, str(len(each)), *(f"{np.quantile(each, share):.1f}" for share in (0.5, 0.99)))
    figures = {
        "tasks": given.tasks,
        "not_done": given.tasks - followed.ends.count("done"),
        "accepted_per_s": given.tasks / accepted_s,
        "followed_per_s": given.tasks / seconds,
        "front_p99_ms": float(np.quantile(np.concatenate([*own_ms.values()]), 0.99)),
        "end_heard_late_p95_s": late_s,
    }
    return table, figures


async def _follow(port: int, tasks: int, followers: int) -> tuple[Followed, float, float]:
    """Returns what was followed, and the seconds until all tasks were accepted, and until all had ended."""
    made: asyncio.Queue[dict | None] = asyncio.Queue()
    followed, began_s = Followed(), time.monotonic()
    following = [
        asyncio.create_task((_polls if number % 2 else _reads)(port, made, followed)) for number in range(followers)
    ]
    numbers = iter(range(tasks))
    await asyncio.gather(*(_submits(port, numbers, made) for _ in range(SUBMITTERS)))
    accepted_s = time.monotonic() - began_s
    for _ in range(followers):
        made.put_nowait(None)
    await asyncio.gather(*following)
    return followed, accepted_s, time.monotonic() - began_s


async def _submits(port: int, numbers: Iterator[int], made: asyncio.Queue) -> None:
    async with Caller(port) as caller:
        for number in numbers:
            made.put_nowait(await _submit(caller, SHORT, number))


async def _submit(caller: Caller, script: str, seed: int) -> dict:
    """Submit a task; returns its links."""
    answer = await caller.call("POST", "/v1/tasks", {"script": script, "options": {"seed": seed}})
    if answer.status != 202:
        raise ServerError(f"a task was not accepted: {answer.status} {answer.body[:200]!r}")
    return answer.json()["links"]


async def _polls(port: int, made: asyncio.Queue, followed: Followed) -> None:
    while links := await made.get():
        async with Caller(port) as caller:  # for each task: the front closes connections that are idle for 5 s
            while (task := (await caller.call("GET", links["self"])).json())["ended"] is None:
                await asyncio.sleep(POLL_S)
        followed.note("poll", task)


async def _reads(port: int, made: asyncio.Queue, followed: Followed) -> None:
    while links := await made.get():
        async with Caller(port) as caller:
            async for task in caller.events(links["events"]):
                if task["ended"]:
                    followed.note("events", task)


def requests_of(log: Path, start: int) -> dict[str, list[float]]:
    """Seconds of each request that submitted or looked at a task, from the front's log after byte ``start``."""
    found: dict[str, list[float]] = {"submit": [], "look": []}
    for line in log.read_bytes()[start:].splitlines():
        about = json.loads(line)
        if about["message"] == "request" and not about["path"].endswith("/events"):
            found["submit" if about["method"] == "POST" else "look"].append(about["s"])
    return {name: each for name, each in found.items() if each}


def long(studio: Studio, given) -> tuple[Table, dict]:
    """Long tasks side by side, with the memory of every part as they go on."""
    common.say(f"{given.long_tasks} tasks of {given.minutes:g} minutes …")
    began_s, before = time.monotonic(), pids_of(studio)
    samples, tasks = asyncio.run(_speak(studio, given))
    restarted = [name for name, pid in pids_of(studio).items() if pid != before[name]]
    seconds = time.monotonic() - began_s
    names = list(samples[0])
    table = common.table(
        f"{given.long_tasks} tasks of {given.minutes:g} min at tiny: private MiB", "part", "first third", "last third"
    )
    third = max(1, len(samples) // 3)
    ends = {
        name: [float(np.max([each[name] for each in part])) for part in (samples[:third], samples[-third:])]
        for name in names
    }
    for name, values in ends.items():
        table.add_row(name, *(f"{value:.0f}" for value in values))
    figures = {
        "long_tasks": given.long_tasks,
        "long_minutes": given.minutes,
        "long_not_done": sum(task["status"] != "done" for task in tasks),
        "long_rtf": seconds / (60 * given.minutes * given.long_tasks),
        "restarted": restarted,
        **{f"{name}_grew_mib": last - first for name, (first, last) in ends.items()},
    }
    return table, figures


async def _speak(studio: Studio, given) -> tuple[list[dict[str, float]], list[dict]]:
    """Submit long tasks and wait for them; returns samples of memory, and the tasks as they ended."""
    words = round(given.minutes * WORDS_PER_MINUTE)
    lines = (" ".join(_WORDS[number % len(_WORDS)] for number in range(30)) for _ in range(max(1, words // 30)))
    script = "\n".join(f"Speaker {1 + turn % 4}: {line}" for turn, line in enumerate(lines))
    samples, told_s = [], time.monotonic()
    async with Caller(studio.settings.port) as caller:
        made = [await _submit(caller, script, seed) for seed in range(given.long_tasks)]
    while True:
        studio.look()
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            samples.append(memory_mib(studio))
            async with Caller(studio.settings.port) as caller:  # a restart may take longer than one is kept
                tasks = [(await caller.call("GET", links["self"])).json() for links in made]
            if all(task["ended"] for task in tasks):
                return samples, tasks
            if time.monotonic() > told_s + TELL_S:
                told_s = time.monotonic()
                common.say(f"{', '.join(_progress(task) for task in tasks)}; MiB: {_rounded(samples[-1])}")
        await asyncio.sleep(SAMPLE_S)


def _progress(task: dict) -> str:
    return f"{task['status']} {task['frames']} of {task['of_frames']} frames"


def _rounded(sample: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {mib:.0f}" for name, mib in sample.items())


def pids_of(studio: Studio) -> dict[str, int]:
    parts = {"redis": studio.redis, "triton": studio.triton, "front": studio.front, "worker": studio.workers[0]}
    return {name: part.pid for name, part in parts.items()}


def must_live(studio: Studio) -> None:
    """Raise ServerError where a part of the studio has ended: nobody restarts it, and its tasks would never end."""
    parts = {"Redis": studio.redis, "Triton": studio.triton, "the front": studio.front, "the worker": studio.workers[0]}
    if gone := [name for name, part in parts.items() if not part.alive()]:
        raise ServerError(f"{', '.join(gone)} ended in the middle of the run: see the messages above")


def memory_mib(studio: Studio) -> dict[str, float]:
    """MiB of private memory of each part."""
    parts = {"front": studio.front, "worker": studio.workers[0], "redis": studio.redis}
    found = {name: _private_mib(part.pid) for name, part in parts.items()}
    return {**found, "triton": sum(common.memory_mib(studio.triton).values())}


def _private_mib(pid: int) -> float:
    memory = psutil.Process(pid).memory_info()
    return (memory.rss - memory.shared) / 2**20


if __name__ == "__main__":
    common.run(main)
