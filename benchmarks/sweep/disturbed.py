"""Is what a sweep measures beside other load what the quiet host gives? Rates and rankings, quiet and disturbed.

Sweeps the same small plan on a quiet host, beside others that take half a core, and beside others that take a core:
one or two processes that are busy for some seconds and idle for some. The rate of a point is compared rung by rung with
the quiet one, at as many sessions; a ranking is false where two points that are clearly apart change places.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
from first_run import others

from harness import wire
from harness.errors import HarnessError
from harness.host.process_group import end_group, spawn
from harness.records.schema import Rung, Trial
from harness.records.store import Run

HOSTS = {"quiet": 0, "half a core": 1, "a core": 2}  # processes that are busy half of the time
MAX_ERROR = 0.10
APART = 0.10  # points whose quiet rates differ by more have a true ranking
LIMIT_S = 1800.0  # of one sweep
PLAN = """
name: disturbed
preset: tiny
mix: shorts
slos: {short: {ttfa_p95_s: 5.0, rtf_p95: 2.0}}
targets_qps: [1]
space: {chunk_frames: POINTS}
search: grid
ladder: {sessions: SESSIONS, seconds: SECONDS}
budget_minutes: 25
"""


@dataclass(frozen=True)
class Sweep:
    """A sweep beside others: its ladders, and the minutes that it took."""

    host: str
    trials: tuple[Trial, ...]
    minutes: float

    def rates(self) -> dict[tuple[str, int], float]:
        """Mean audio s/s of each rung that counts, by point and rounded number of sessions."""
        found: dict[tuple[str, int], list[float]] = {}
        for trial in self.trials:
            for rung in trial.rungs if trial.valid else ():
                found.setdefault(place(trial, rung), []).append(rung.frames_per_s * wire.SECONDS_PER_FRAME)
        return {each: float(np.mean(rates)) for each, rates in found.items()}

    def rungs(self, kind: str) -> list[tuple[Trial, Rung]]:
        """The disturbed rungs that were ``repeated``, or ``excluded``."""
        every = [(trial, rung) for trial in self.trials for rung in trial.disturbed]
        return [(trial, rung) for trial, rung in every if rung.repeated == (kind == "repeated")]


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    sweeps = [
        one_sweep(host, options, number)
        for number in range(1 if options.quick else options.sweeps)
        for host in (("half a core",) if options.quick else HOSTS)
    ]
    found = figures(sweeps)
    common.finish(table(sweeps), found)
    good = found["false_rankings"] == 0 and (found["max_rate_error_disturbed"] or 0.0) <= MAX_ERROR
    return 0 if options.quick or good else common.EXIT_FAILED


def parser() -> common.Parser:
    made = common.Parser(__doc__, "python benchmarks/sweep/disturbed.py --sweeps 2 --keep /tmp/disturbed")
    made.add_argument("--sweeps", type=common.whole(1, 20), default=2, help="sweeps beside each kind of others (2)")
    made.add_argument("--keep", type=Path, help="keep the runs and their output in this folder")
    return made


def one_sweep(host: str, options, number: int) -> Sweep:
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = folder / f"{number}-{host.replace(' ', '-')}"
        results.mkdir(parents=True)
        for process in range(HOSTS[host]):  # of one seed: busy at the same times, as the threads of a build
            (results / str(process)).mkdir()
            stack.enter_context(others(number, results / str(process)))
        common.say(f"sweep {number + 1}, {host} …")
        began = time.monotonic()
        trials = swept(plan(results, options.quick), results)
        sweep = Sweep(host, tuple(trials), (time.monotonic() - began) / 60)
        repeated, excluded = (len(sweep.rungs(kind)) for kind in ("repeated", "excluded"))
        common.say(f"  {sweep.minutes:.1f} min, {repeated} rungs measured again, {excluded} left out")
        return sweep


def plan(folder: Path, quick: bool) -> Path:
    words = PLAN.replace("POINTS", "[1]" if quick else "[1, 2, 6]").replace("SECONDS", "3" if quick else "6")
    path = folder / "disturbed.yaml"
    path.write_text(words.replace("SESSIONS", "[1, 2, 3]" if quick else "[1, 4, 16, 32]"))
    return path


def swept(plan: Path, results: Path) -> list[Trial]:
    """The trials of `harness sweep`, whose output goes to a file in ``results``. Raises HarnessError if it failed."""
    log = results / "output.log"
    process = spawn([sys.executable, "-m", "harness", "sweep", str(plan), "--results", str(results)], log)
    try:
        code = process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        code = -1
    finally:
        end_group(process, grace_s=30)
    runs = sorted(results.glob("*/manifest.json"))
    if code not in (0, 1, 2) or not runs:
        raise HarnessError(f"harness sweep ended with {code}: {log.read_text(errors='replace')[-500:]}")
    return Run.open(runs[0].parent).trials()


def place(trial: Trial, rung: Rung) -> tuple[str, int]:
    return str(trial.deployment), min(trial.load.sessions, key=lambda users: abs(users - rung.sessions))


def figures(sweeps: Sequence[Sweep]) -> dict:
    quiet = quiet_rates(sweeps)
    beside = [sweep for sweep in sweeps if sweep.host != "quiet"]
    errors = [error for sweep in beside for error in point_errors(sweep.rates(), quiet).values()]
    excluded = [abs(rate_of(rung) / quiet[at] - 1) for sweep in beside for at, rung in disturbed(sweep) if at in quiet]
    alone = [sweep for sweep in sweeps if sweep.host == "quiet"]
    noise = [error for sweep in alone for error in point_errors(sweep.rates(), quiet).values()]
    return {
        "sweeps": len(sweeps),
        "max_rate_error_disturbed": max(errors, default=None),
        "max_rate_error_quiet": max(noise, default=None),
        "max_rate_error_of_disturbed_rungs": max(excluded, default=None),
        "false_rankings": sum(false_rankings(sweep.rates(), quiet) for sweep in beside),
        "measured_share": measured_share(beside),
        "repeats": {host: sum(len(each.rungs("repeated")) for each in sweeps if each.host == host) for host in HOSTS},
        "excluded": {host: sum(len(each.rungs("excluded")) for each in sweeps if each.host == host) for host in HOSTS},
        "minutes": {host: minutes(sweeps, host) for host in HOSTS},
    }


def quiet_rates(sweeps: Sequence[Sweep]) -> dict[tuple[str, int], float]:
    """The mean rates of the quiet sweeps."""
    every = [sweep.rates() for sweep in sweeps if sweep.host == "quiet"]
    return {at: float(np.mean([rates[at] for rates in every if at in rates])) for at in set().union(*every)}


def disturbed(sweep: Sweep) -> list[tuple[tuple[str, int], Rung]]:
    return [(place(trial, rung), rung) for trial in sweep.trials for rung in trial.disturbed]


def rate_of(rung: Rung) -> float:
    return rung.frames_per_s * wire.SECONDS_PER_FRAME


def point_errors(rates: Mapping[tuple[str, int], float], quiet: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """The error of each point's rate, from 0 up: of the geometric mean over its rungs that both sweeps have."""
    return {
        point: abs(float(np.exp(np.mean(logs))) - 1)
        for point in {name for name, _ in rates}
        if (logs := [np.log(rates[at] / quiet[at]) for at in rates.keys() & quiet.keys() if at[0] == point])
    }


def false_rankings(rates: Mapping[tuple[str, int], float], quiet: Mapping[tuple[str, int], float]) -> int:
    """Pairs of points, clearly apart at as many sessions on the quiet host, that changed places."""
    count = 0
    for one, other in itertools.combinations(sorted(rates.keys() & quiet.keys()), 2):
        if one[1] == other[1] and abs(np.log(quiet[one] / quiet[other])) > APART:
            count += (rates[one] > rates[other]) != (quiet[one] > quiet[other])
    return int(count)


def measured_share(sweeps: Sequence[Sweep]) -> float | None:
    """Of the points, those with a VALID ladder."""
    points = [(number, str(trial.deployment)) for number, sweep in enumerate(sweeps) for trial in sweep.trials]
    valid = {(number, str(trial.deployment)) for number, sweep in enumerate(sweeps) for trial in sweep.trials
             if trial.valid}  # fmt: skip
    return len(valid) / len(set(points)) if points else None


def minutes(sweeps: Sequence[Sweep], host: str) -> float | None:
    own = [sweep.minutes for sweep in sweeps if sweep.host == host]
    return float(np.mean(own)) if own else None


def table(sweeps: Sequence[Sweep]):
    quiet = quiet_rates(sweeps)
    made = common.table("Sweeps of one plan, each with its own Triton", "others", "minutes", "rungs that count",
                        "measured again", "left out", "largest error of a rate", "false rankings")  # fmt: skip
    for sweep in sweeps:
        rates = sweep.rates()
        errors = point_errors(rates, quiet).values()
        made.add_row(sweep.host, f"{sweep.minutes:.1f}", str(len(rates)), str(len(sweep.rungs("repeated"))),
                     str(len(sweep.rungs("excluded"))), f"{max(errors):.1%}" if errors else "-",
                     str(false_rankings(rates, quiet)))  # fmt: skip
    return made


if __name__ == "__main__":
    common.run(main)
