"""A new user's first hour: does the sign-off of a plan conclude, and in how many minutes?

Starts `harness signoff` repeatedly, each time with an empty results folder: on a quiet host, and beside a process that
uses a core half of the time. A start has concluded unless its verdict is inconclusive for lack of time (a required
measurement did not fit into the budget), or it ended in an error.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np

from harness.host.process_group import end_group, spawn
from harness.records.plan import Plan
from harness.records.store import Run

HOSTS = ("quiet", "disturbed")
CONCLUDED = 0.9  # minimum share of starts
LIMIT_S = 1800.0  # of one start
# busy and idle for some seconds each: half of one core on average, like a build or a backup
OTHERS = """
import random, time
draw = random.Random({seed})
while True:
    until = time.monotonic() + draw.uniform(1, 9)
    while time.monotonic() < until:
        sum(range(10_000))
    time.sleep(draw.uniform(1, 9))
"""


@dataclass(frozen=True)
class Start:
    """The end of one start: its exit code, its minutes, and the content of its plan.json."""

    host: str
    code: int
    minutes: float
    plan: Plan | None

    @property
    def verdict(self) -> str:
        return self.plan.verdict if self.plan else f"exit code {self.code}"

    @property
    def short_of_time(self) -> bool:
        left_out = self.plan.left_out if self.plan else ()
        return self.verdict == "inconclusive" and any(each.decisive for each in left_out)

    @property
    def concluded(self) -> bool:
        return self.code in (0, 1, 2) and not self.short_of_time

    @property
    def reason(self) -> str:
        return "" if self.plan is None or self.verdict == "met" else next(iter(self.plan.reasons), "")


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    count = 1 if options.quick else options.starts
    starts = [one_start(HOSTS[number % 2] if options.host == "both" else options.host, options, number)
              for number in range(count)]  # fmt: skip
    common.finish(table(starts), figures(starts))
    ended = all(start.code in (0, 1, 2) for start in starts)
    concluded = options.quick or figures(starts)["concluded_share"] >= CONCLUDED
    return 0 if ended and concluded else common.EXIT_FAILED


def parser() -> common.Parser:
    made = common.Parser(__doc__, "python benchmarks/sweep/first_run.py --starts 10 --host both")
    made.add_argument("--plan", default="scenarios/quick.yaml", help="the plan that is signed (quick.yaml)")
    made.add_argument("--starts", type=common.whole(1, 100), default=10, help="how many starts (10)")
    made.add_argument("--host", choices=(*HOSTS, "both"), default="both", help="alone, beside other load, or in turn")
    made.add_argument("--keep", type=Path, help="keep the runs and their output in this folder")
    return made


def one_start(host: str, options, number: int) -> Start:
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = folder / f"{number}-{host}"
        results.mkdir(parents=True)
        if host == "disturbed":
            stack.enter_context(others(number, results))
        common.say(f"start {number + 1} of {options.starts}, {host} …")
        began = time.monotonic()
        code = signoff(options.plan, results)
        minutes = (time.monotonic() - began) / 60
        plans = sorted(results.glob("*/plan.json"))
        start = Start(host, code, minutes, Run.open(plans[-1].parent).plan() if plans else None)
        common.say(f"  {start.verdict} after {minutes:.1f} min {start.reason}")
        return start


def signoff(plan: str, results: Path) -> int:
    """The exit code of a sign-off, whose output goes to a file in ``results``."""
    process = spawn(
        [sys.executable, "-m", "harness", "signoff", plan, "--results", str(results)], results / "output.log"
    )
    try:
        return process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        return -1
    finally:
        end_group(process, grace_s=30)


@contextlib.contextmanager
def others(seed: int, folder: Path) -> Iterator[None]:
    process = spawn([sys.executable, "-c", OTHERS.format(seed=seed)], folder / "others.log")
    try:
        yield
    finally:
        end_group(process, grace_s=0)


def figures(starts: Sequence[Start]) -> dict:
    minutes = [start.minutes for start in starts]
    return {
        "starts": len(starts),
        "concluded_share": np.mean([start.concluded for start in starts]),
        "met_share": np.mean([start.verdict == "met" for start in starts]),
        "minutes_p50": np.quantile(minutes, 0.5),
        "minutes_p90": np.quantile(minutes, 0.9),
        "by_host": {host: _of_host([start for start in starts if start.host == host]) for host in HOSTS},
        "reasons": [start.reason for start in starts if start.reason],
    }


def _of_host(starts: Sequence[Start]) -> dict:
    if not starts:
        return {"starts": 0}
    concluded = np.mean([start.concluded for start in starts])
    met = np.mean([start.verdict == "met" for start in starts])
    return {"starts": len(starts), "concluded_share": concluded, "met_share": met}


def table(starts: Sequence[Start]):
    made = common.table("Starts of the sign-off, each with an empty folder of results", "host", "verdict", "minutes",
                        "points left out", "most sessions", "devices at the last target")  # fmt: skip
    for start in starts:
        plan = start.plan
        devices = plan.targets[-1].devices if plan and plan.targets else None
        most = plan.rate_per_device.max_sessions_measured if plan else None
        left_out = "; ".join(each.what.partition(",")[0] for each in (plan.left_out if plan else ()))
        made.add_row(start.host, start.verdict, f"{start.minutes:.1f}", left_out or "none",
                     "-" if most is None else f"{most:.0f}", str(devices))  # fmt: skip
    return made


if __name__ == "__main__":
    common.run(main)
