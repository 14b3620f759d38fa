"""Intervals of rates and counts on families of known truths, judged by an independent simulator: do they hold it?

A family is a device with a known step time and a way in which measuring it goes wrong: hosts that differ between
ladders, the best of identical deployments, throughput that falls under load, contexts that grow, a slow rung. Synthetic
ladders go through the fit and the plan; the truth is what ``truth_judge`` finds: the highest rate of one device, and
the fewest devices that meet the SLOs in several long runs that start empty.

Judged is what a user is told: the rate of a device and its interval from fit.json, each target's count and interval
from plan.json. Refused: no rate, no count, or a count without an upper bound; it is counted apart. In a family whose
right answer is a refusal or a remark that names the fault, only answers without that remark are judged ("silent").
An interval is optimistic if it lies wholly on the side of too few devices. The smallest coverages are of the families
with at most 10% between ladders. With few runs the smallest of many shares is low by chance: see the intervals.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numba_first  # noqa: F401
import numpy as np
import truth_judge
from scipy import stats
from truth_families import FAMILIES, TARGETS, UNIT, Family

from harness.capacity.planning import plan as planning
from harness.capacity.planning.plan import Terms, make_plan
from harness.errors import HarnessError
from harness.records.fit import Fit
from harness.records.plan import Plan, PlannedTarget

CONFIDENCE = 0.95
RATE_MIN, COUNT_MIN, OPTIMISTIC_MAX, RATIO_MAX, SILENT_MAX = 0.90, 0.93, 0.05, 1.25, 0.05
PER_RUN = 2  # targets of a run, of a family's
_PROCESSES = 2
_UNSAID = "deployment", "traffic_class", "binding", "worst", "slos", "deployments"  # no sentences


@dataclass(frozen=True)
class Truth:
    """Of a family: the highest rate (requests/s) of a device, its target rates, and the fewest devices for each."""

    rate: float
    targets: tuple[float, ...]
    needed: tuple[int, ...]


@dataclass(frozen=True)
class Count:
    """What was said of a target, and the truth; ``low`` to ``high``: the interval."""

    needed: int
    said: int
    low: int
    high: int


@dataclass(frozen=True)
class Run:
    """``rate``: said, and its interval; None if refused. ``counts``: of the targets that were not refused.

    ``refused``: reasons. ``named``: whether the remark that is right in this family was made.
    """

    family: str
    rate: tuple[float, float, float] | None
    counts: tuple[Count, ...]
    refused: tuple[str, ...]
    named: bool
    seconds: float


def truth_of(name: str) -> Truth:
    """The truth of a family, by the judge."""
    family = FAMILIES[name]
    judge = family.judge()
    rate = replace(judge, routing=truth_judge.LEAST_LOADED).highest_rate()
    targets = family.targets(rate)
    return Truth(rate, tuple(targets), tuple(judge.fewest(target) for target in targets))


def without_sensitivity() -> None:
    """Leave the table of what changes would do out of all plans of this process: most of their time, and no count."""
    if hasattr(planning, "sensitivity"):
        planning.sensitivity = lambda *_, **__: ()


def repeat(task: tuple[str, Truth, int]) -> Run:
    """One run of a family: measure, fit, plan."""
    name, truth, seed = task
    family, rng, began = FAMILIES[name], FAMILIES[name].rng(1, seed), time.monotonic()
    measured = family.measure(rng)
    chosen = range(seed % (TARGETS // PER_RUN), TARGETS, TARGETS // PER_RUN)
    targets = [truth.targets[place] for place in chosen]
    try:
        fit = family.fit(measured, rng, confidence=CONFIDENCE)
        terms = Terms(family.cap, CONFIDENCE, 0.25, UNIT, "tiny", "cpu", routing=family.routing)
        plan = make_plan(fit, measured.trials, measured.requests, family.mix, family.slos, targets, rng, terms)
    except HarnessError as error:
        return Run(name, None, (), (str(error),), False, time.monotonic() - began)
    named = bool(family.names) and bool(re.search(family.names, said_by(fit, plan), re.IGNORECASE))
    known = [_count(truth.needed[place], target) for place, target in zip(chosen, plan.targets, strict=True)]
    counts = tuple(each for each in known if isinstance(each, Count))
    refused = tuple(each for each in known if isinstance(each, str))
    rate = _rate(fit)
    if rate is None:
        refused = (*(each.inconclusive for each in fit.deployments if each.inconclusive), *refused)
    return Run(name, rate, counts, refused, named, time.monotonic() - began)


def _rate(fit: Fit) -> tuple[float, float, float] | None:
    best = fit.best_deployment
    if best is None or best.max_rate_per_s is None or None in best.max_rate_interval:
        return None
    return (best.max_rate_per_s, *best.max_rate_interval)


def _count(needed: int, target: PlannedTarget) -> Count | str:
    """The count of a target, or why there is none."""
    if target.devices is None or target.interval[0] is None:
        return target.note or "no count"
    if target.interval[1] is None:
        return "the count has no upper bound"
    return Count(needed, target.devices, *target.interval)


def said_by(fit: Fit, plan: Plan) -> str:
    """All words of fit.json and plan.json that are for the reader."""
    return "\n".join([*_words(fit.to_dict()), *_words(plan.to_dict())])


def _words(content) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            if value is True:
                yield str(key)
            elif key not in _UNSAID:
                yield from _words(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _words(value)


@dataclass(frozen=True)
class Judged:
    """The runs of a family, judged. Shares are None where no run was.

    ``optimistic``: the larger of the shares of the rate and of the count. ``ratio``: median of said / needed.
    ``silent``: share of runs that answered without the remark, in a family where it is right.
    """

    family: Family
    truth: Truth
    runs: Sequence[Run]

    @property
    def answers(self) -> list[Run]:
        """Those that are judged: in a family with a right remark, those without it."""
        return [run for run in self.runs if not run.named]

    @property
    def refusals(self) -> int:
        return sum(bool(run.refused) for run in self.runs)

    @property
    def rates(self) -> list[tuple[float, float, float]]:
        return [run.rate for run in self.answers if run.rate is not None]

    @property
    def counts(self) -> list[Count]:
        return [each for run in self.answers for each in run.counts]

    def held(self) -> tuple[list[bool], list[bool]]:
        """Whether each interval of a rate, and of a count, holds the truth."""
        rates = [low <= self.truth.rate <= high for _, low, high in self.rates]
        return rates, [each.low <= each.needed <= each.high for each in self.counts]

    def optimistic(self) -> tuple[list[bool], list[bool]]:
        """Whether each interval of a rate, and of a count, is wholly on the optimistic side."""
        return [low > self.truth.rate for _, low, _ in self.rates], [each.high < each.needed for each in self.counts]

    def ratio(self) -> float | None:
        said = [each.said / each.needed for each in self.counts]
        return float(np.median(said)) if said else None

    def silent(self) -> float | None:
        return len([run for run in self.answers if not run.refused]) / len(self.runs) if self.family.names else None

    def figures(self) -> dict:
        rates, counts = self.held()
        width = [(each.high - each.low) / each.needed for each in self.counts]
        return {
            "runs": len(self.runs),
            "refused": self.refusals,
            "named": sum(run.named for run in self.runs),
            "silent": self.silent(),
            "true_rate": self.truth.rate,
            "targets": self.truth.targets,
            "needed": self.truth.needed,
            "coverage_rate": _share(rates),
            "coverage_rate_interval": _interval(rates, len(rates)),
            "coverage_count": _share(counts),
            "coverage_count_interval": _interval(counts, len(counts) // PER_RUN),
            "optimistic": _largest(*map(_share, self.optimistic())),
            "optimistic_rate": _share(self.optimistic()[0]),
            "optimistic_count": _share(self.optimistic()[1]),
            "rate_ratio": float(np.median([rate for rate, *_ in self.rates]) / self.truth.rate) if rates else None,
            "count_ratio": self.ratio(),
            "width_median": float(np.median(width)) if width else None,
            "reasons": sorted({reason for run in self.runs for reason in run.refused})[:3],
            "run_s": float(np.mean([run.seconds for run in self.runs])),
        }


def _share(held: Sequence[bool]) -> float | None:
    return sum(held) / len(held) if held else None


def _interval(held: Sequence[bool], independent: int) -> tuple[float, float] | None:
    """The 95% interval of the share (Clopper and Pearson), where only so many are independent."""
    if not independent:
        return None
    found = stats.binomtest(round(sum(held) / len(held) * independent), independent).proportion_ci(0.95)
    return found.low, found.high


def _largest(*values: float | None) -> float | None:
    return max((each for each in values if each is not None), default=None)


def summary(judged: Sequence[Judged]) -> dict:
    """The figures over all families."""
    each = {one.family.name: one.figures() for one in judged}
    barred = [each[one.family.name] for one in judged if one.family.barred]
    ratios = [max(one["count_ratio"], 1 / one["count_ratio"]) for one in barred if one["count_ratio"]]
    known = {key: [one[key] for one in barred if one[key] is not None] for key in ("coverage_rate", "coverage_count")}
    return {
        "coverage_rate_min": min(known["coverage_rate"], default=None),
        "coverage_count_min": min(known["coverage_count"], default=None),
        "optimistic_max": _largest(*(one["optimistic"] for one in barred)),
        "count_ratio_worst": _largest(*ratios),
        "aa_optimistic_share": each["winner"]["optimistic_rate"] if "winner" in each else None,
        "silent_max": _largest(*(one["silent"] for one in barred)),
        "families": len(judged),
        "runs": sum(one["runs"] for one in each.values()),
        "refused": sum(one["refused"] for one in each.values()),
        "each": each,
    }


def failures(figures: Mapping) -> list[str]:
    """The figures that are not as required."""
    required = {
        "coverage_rate_min": (RATE_MIN, math.inf),
        "coverage_count_min": (COUNT_MIN, math.inf),
        "optimistic_max": (0, OPTIMISTIC_MAX),
        "count_ratio_worst": (0, RATIO_MAX),
        "aa_optimistic_share": (0, OPTIMISTIC_MAX),
        "silent_max": (0, SILENT_MAX),
    }
    return [
        key for key, (low, high) in required.items() if figures[key] is not None and not low <= figures[key] <= high
    ]


def show(judged: Sequence[Judged]):
    columns = ("runs", "refused", "named", "true rate", "needed", "rate held", "count held", "95% interval",
               "optimistic", "said/needed")  # fmt: skip
    table = common.table("How often 95% intervals contained the truth", "family", *columns)
    for one in judged:
        figures = one.figures()
        interval = figures["coverage_count_interval"]
        table.add_row(
            one.family.name + ("" if one.family.barred else " *"),
            str(figures["runs"]),
            str(figures["refused"]),
            str(figures["named"]) if one.family.names else "",
            f"{one.truth.rate:.3g}",
            f"{min(one.truth.needed)} to {max(one.truth.needed)}",
            _percent(figures["coverage_rate"]),
            _percent(figures["coverage_count"]),
            f"{interval[0]:.0%} to {interval[1]:.0%}" if interval else "",
            _percent(figures["optimistic"]),
            f"{figures['count_ratio']:.2f}" if figures["count_ratio"] else "",
        )
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def judge(names: Sequence[str], runs: int, seed: int) -> list[Judged]:
    """The truths of these families, then their runs, on two processes."""
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(_PROCESSES, without_sensitivity) as pool:
        truths = dict(zip(names, pool.imap(truth_of, names), strict=True))
        common.say(f"the truths of {len(names)} families, {time.monotonic() - began:.0f} s …")
        tasks = [(name, truths[name], seed * 10**6 + number) for number in range(runs) for name in names]
        done: dict[str, list[Run]] = {name: [] for name in names}
        for number, run in enumerate(pool.imap(repeat, tasks, chunksize=2), start=1):
            done[run.family].append(run)
            if number % 100 == 0:
                common.say(f"{number} of {len(tasks)} runs, {time.monotonic() - began:.0f} s …")
    return [Judged(FAMILIES[name], truths[name], done[name]) for name in names]


def main(arguments: Sequence[str]) -> int:
    parser = common.Parser(__doc__, "python benchmarks/capacity/truths.py --family winner --family knee --runs 100")
    parser.add_argument("--runs", type=common.whole(1, 10**5), default=60, help="of each family")
    parser.add_argument("--seed", type=common.whole(0, 10**6), default=1)
    parser.add_argument("--family", action="append", choices=sorted(FAMILIES), help="only this one; repeatable")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    names = options.family or (["host-10-3", "knee", "winner"] if options.quick else list(FAMILIES))
    judged = judge(names, 2 if options.quick else options.runs, options.seed)
    figures = summary(judged)
    seconds = time.monotonic() - began
    common.finish(show(judged), figures | {"seconds": seconds, "failed": failures(figures)})
    return 0 if options.quick or not failures(figures) else common.EXIT_FAILED


if __name__ == "__main__":
    common.run(main)
