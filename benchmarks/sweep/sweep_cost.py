"""The cost of a sweep on the real server: each kind of configuration change, a trial's own overhead, and the whole.

change  from one deployment to the next by reloading what differs, until a request has been served
trial   a ladder through Locust and its records: wall time beyond the seconds in which load was held
answer  from the start of a run to its signed answer, from stored runs (--run; default: the sample run)
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common

from harness import wire
from harness.client.stream import SpeechClient
from harness.deploy.config import Deployment
from harness.deploy.server import TritonServer
from harness.drive.load import Load
from harness.errors import ServerError
from harness.host.places import ROOT
from harness.planfile.reading import load_plan
from harness.records.schema import Outcome
from harness.records.store import Run
from harness.sweep.trial import Driver, TrialRequest

PLAN = ROOT / "scenarios" / "quick.yaml"
SAMPLE = ROOT / "results" / "sample-quick"
BASE: dict = {}
CHANGES: Mapping[str, dict] = {
    "delay of one stage": {f"{wire.DIFFUSION}.delay_us": 2000},
    "delay of all three stages": {f"{stage}.delay_us": 2000 for stage in wire.STAGES},
    "largest batch of one stage": {f"{wire.DIFFUSION}.max_batch": 16},
    "instances of one stage, 1 to 2": {f"{wire.DIFFUSION}.instances": 2},
    "instances of the entry, 1 to 2": {"entry.instances": 2},
    "chunk frames (asked for, not deployed)": {"chunk_frames": 4},
    "none: the same point again": {},
}


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    repeats = options.repeats or (1 if options.quick else 3)
    names = list(CHANGES)[:1] if options.quick else list(CHANGES)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        with common.served() as server:
            start_s = time.monotonic() - began
            driver = Driver(server, PLAN, load_plan(PLAN), Path(scratch), Deployment())
            changes = {name: [change_s(driver, name) for _ in range(repeats)] for name in names}
            overheads = [overhead_s(driver, repeat, options.quick) for repeat in range(repeats)]
    answer = answer_of(Run.open(options.run))
    common.finish([table(start_s, changes, overheads, answer)], figures(start_s, changes, overheads, answer))
    return 0


def parser() -> common.Parser:
    made = common.Parser(__doc__, "python benchmarks/sweep/sweep_cost.py --repeats 5")
    made.add_argument("--repeats", type=common.whole(1, 99), help="of each change; their median counts (default: 3)")
    made.add_argument("--run", type=Path, default=SAMPLE, help="a finished run whose total time is reported")
    return made


def change_s(driver: Driver, name: str) -> float:
    """Seconds from the base to another deployment, until a request has been served."""
    common.say(f"{name} …")
    driver.deploy(BASE)
    speak(driver.server)
    began = time.monotonic()
    driver.deploy(CHANGES[name])
    speak(driver.server)
    return time.monotonic() - began


def speak(server: TritonServer) -> None:
    async def once():
        async with SpeechClient(server.url) as client:
            return await client.speak(common.request("one", 2), "closed")

    result = asyncio.run(once())
    if result.outcome is not Outcome.DONE:
        raise ServerError(f"the server does not speak after a change: {result.error}")


def overhead_s(driver: Driver, repeat: int, quick: bool) -> float:
    """Wall seconds of a ladder's trial beyond those in which it held its load."""
    load = Load.ladder(2.0 if quick else 4.0, seed=repeat + 1, sessions=(1, 4))
    common.say(f"a trial of {load.total_s:g} s …")
    driver.deploy(BASE)
    return driver.run(TrialRequest(BASE, load)).trial.wall_s - load.total_s


def answer_of(run: Run) -> dict[str, float]:
    """Total duration of a stored run, how much of it was load, in seconds, and its number of trials."""
    if not run.manifest.finished_at:
        raise ServerError(f"{run.path} is not finished: start it again to resume, or give another with --run")
    times = [datetime.fromisoformat(at) for at in (run.manifest.created_at, run.manifest.finished_at)]
    trials = run.trials()
    held = sum((rung.end_ns - rung.start_ns) / 1e9 for trial in trials for rung in trial.rungs)
    return {"wall_s": (times[1] - times[0]).total_seconds(), "measured_s": held, "trials": len(trials)}


def table(start_s: float, changes: Mapping[str, list], overheads: Sequence[float], answer: Mapping[str, float]):
    shown = common.table("What a sweep costs, seconds", "what", "median", "lowest", "highest")
    shown.add_row("start of the server, all models", f"{start_s:.1f}", "", "")
    for name, values in {**changes, "a ladder's trial beyond its load": list(overheads)}.items():
        shown.add_row(name, *(f"{value:.1f}" for value in (statistics.median(values), min(values), max(values))))
    label = f"stored run, start to answer: {answer['trials']} trials, {answer['measured_s']:.0f} s of windows"
    shown.add_row(label, f"{answer['wall_s']:.0f}", "", "")
    return shown


def figures(start_s: float, changes: Mapping[str, list], overheads: Sequence[float], answer: Mapping) -> dict:
    return {
        "server_start_s": start_s,
        "change_s": {name: statistics.median(values) for name, values in changes.items()},
        "trial_overhead_s": statistics.median(overheads),
        "answer_s": answer["wall_s"],
        "answer_windows_s": answer["measured_s"],
        "answer_trials": answer["trials"],
    }


if __name__ == "__main__":
    common.run(main)
