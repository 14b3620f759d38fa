"""Comparisons of synthetic runs: how often equal devices are said to differ, and how often a slower one is found.

Each repetition measures three runs: two of one device, and one of a device whose steps take 60% longer. Whole ladders
of a run differ by a factor, and so do whole runs, by a factor that all their ladders share, as hosts and hours do. A
case says by which relative standard deviations, and whether the factors are lognormal: by default 0, 5 and 10% of
both. Each run has as many ladders as a sign-off has of its best deployment,
and is fitted and counted as a plan is. Each pair is compared with the deviation between ladders of both runs together,
and with that of each alone, as where hosts are not alike. `harness compare` says of the first two
whether any figure differs (step times, SLO metrics, rate, counts), and whether the slower one is worse.

A false difference is a pair of equal devices of which any figure is said to be better or worse. The slower device is
found where some figure is worse and none is better.

A second table has every case with many pairs of levels alone: as if each ladder were one exact figure. It shows whether
what is assumed of ladders and runs holds for deviations and distributions that it was not made for.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numba_first  # noqa: F401
import numpy as np
from scipy import stats
from truth_families import UNIT, Family, linear

from harness.capacity.fitting.rate_search import steady_draws, steady_limit
from harness.capacity.models.between_ladders import ASSUMED, ASSUMED_OF_RUNS
from harness.capacity.planning.comparison import Side, differences, drawn_levels, joint_reach
from harness.capacity.planning.plan import pools_of
from harness.capacity.planning.pools import Pools
from harness.errors import HarnessError
from harness.records.comparison import BETTER, COUNT, KINDS, RATE, STEP, WORSE, Difference
from harness.records.plan import Plan, PlannedRate, PlannedTarget

CONFIDENCE, FALSE_MAX = 0.95, 0.05
FOUND_MIN, FOUND_UP_TO, WRONG_WAY_MAX, HELD_MIN = 0.9, 0.05, 0.01, 0.95
TIMES = 1.6  # as long are the steps of the slower device
FIRST_AUDIO_S = 0.5
TARGETS = (4.0, 20.0)
SESSIONS = (1, 4, 8, 16, 24)
LEVEL_PAIRS = 2000
_PROCESSES = 2

Law = Callable[[np.random.Generator, int], np.ndarray]  # logarithms of factors, with a mean of 0 and a variance of 1
LAWS: dict[str, Law] = {
    "lognormal": lambda rng, count: rng.standard_normal(count),
    "heavy tails": lambda rng, count: rng.standard_t(3, count) / math.sqrt(3),
    "skewed": lambda rng, count: rng.exponential(1, count) - 1,
    "uniform": lambda rng, count: rng.uniform(-1, 1, count) * math.sqrt(3),
    "two values": lambda rng, count: rng.choice((-1.0, 1.0), count),
}


@dataclass(frozen=True)
class Truth:
    """Relative standard deviations between the ladders of a run and between runs, and their distribution."""

    ladders: float
    runs: float
    law: str = "lognormal"

    @property
    def assumed(self) -> bool:
        """Whether runs differ by no more than is assumed of them: only then false differences are held."""
        return self.runs <= ASSUMED_OF_RUNS.deviation

    def factors(self, deviation: float, rng: np.random.Generator, count: int) -> np.ndarray:
        return np.exp(deviation * LAWS[self.law](rng, count))


STANDARD = {f"{each:.0%}": Truth(each, each) for each in (0.0, 0.05, 0.10)}
CASES = STANDARD | {
    "7%": Truth(0.07, 0.07),
    "2%, runs 10%": Truth(0.02, 0.10),
    "5%, runs 10%": Truth(0.05, 0.10),
    "15%, runs 5%": Truth(0.15, 0.05),
    "10%, heavy tails": Truth(0.10, 0.10, "heavy tails"),
    "10%, skewed": Truth(0.10, 0.10, "skewed"),
    "10%, uniform": Truth(0.10, 0.10, "uniform"),
    "10%, two values": Truth(0.10, 0.10, "two values"),
    "12%": Truth(0.12, 0.12),
    "15%": Truth(0.15, 0.15),
}


@dataclass(frozen=True)
class Ladders(Family):
    """A family whose ladders differ by factors of a distribution."""

    truth: Truth = STANDARD["0%"]

    def factors(self, ladder: int, rng: np.random.Generator) -> np.ndarray:
        noise = rng.lognormal(0, self.rung_sd, len(self.sessions))
        return self.truth.factors(self.truth.ladders, rng, 1) * noise


@dataclass(frozen=True)
class Pair:
    """A comparison: the kinds of figures that are worse and better, and whether the intervals hold the truth.

    ``held``: of all step times together. ``refused``: why there is none.
    """

    worse: frozenset[str] = frozenset()
    better: frozenset[str] = frozenset()
    rows: int = 0
    differing: int = 0
    held: bool = True
    rate_width: float = math.nan
    refused: str = ""


@dataclass(frozen=True)
class Case:
    """The pairs of a case, by its name: of equal devices, and of one with a slower one.

    ``pooled``: compared with the deviation of both runs' ladders together.
    """

    name: str
    pooled: bool
    equal: tuple[Pair, ...]
    slower: tuple[Pair, ...]

    def figures(self) -> dict:
        equal, slower = ([each for each in pairs if not each.refused] for pairs in (self.equal, self.slower))
        false = [bool(each.worse or each.better) for each in equal]
        found = [bool(each.worse) and not each.better for each in slower]
        return {
            "case": self.name,
            "pooled": self.pooled,
            "pairs": len(equal),
            "refused": len(self.equal) + len(self.slower) - len(equal) - len(slower),
            "false_differences": _share(false),
            "false_differences_interval": _interval(false),
            "false_rows": sum(each.differing for each in equal) / max(sum(each.rows for each in equal), 1),
            "found_share": _share(found),
            "found_share_interval": _interval(found),
            **{f"found_by_{kind.replace(' ', '_').lower()}": _share([kind in each.worse for each in slower])
               for kind in KINDS},
            "wrong_way": _share([bool(each.better) for each in slower]),
            "held": _share([each.held for each in (*equal, *slower)]),
            "rate_width_median": float(np.median([each.rate_width for each in equal])) if equal else None,
        }  # fmt: skip


def family_of(case: str, ladders: int, times: float, run: float = 1.0) -> Family:
    """The standard family of ``truths.py`` with steps ``times`` as long and shorter ladders; ``run``: its factor."""
    name = f"compare-{case}-{ladders}-{times:g}"
    step = linear(0.02 * times * run, 0.005 * times * run)
    more = {"sessions": SESSIONS, "seconds": 8.0, "cap": 0.85, "first_audio_s": FIRST_AUDIO_S}
    return Ladders(name, step, ladders=ladders, truth=CASES[case], **more)


def run_of(family: Family, seed: Sequence[int]) -> Side:
    """A run: measured and fitted, with the counts of a plan."""
    rng = family.rng(*seed)
    fit = family.fit(family.measure(rng), rng, confidence=CONFIDENCE)
    chosen = fit.deployments[0]
    pools = pools_of(fit, chosen, family.mix, family.slos, family.cap, family.routing)
    shares = steady_draws(pools.device, pools.limits, rng) / steady_limit(pools.device, pools.limits)[0]
    plan = Plan(
        verdict="met",
        reasons=(),
        unit=UNIT,
        confidence=CONFIDENCE,
        deployment=chosen.deployment,
        slos=family.slos,
        rate_per_device=PlannedRate(),
        targets=tuple(_counted(pools, qps, shares, rng) for qps in TARGETS),
        validation=(),
    )
    return Side.of(chosen, pools.limits, ASSUMED, plan)


def _counted(pools: Pools, qps: float, shares: np.ndarray, rng: np.random.Generator) -> PlannedTarget:
    """The count of a target and its interval, as a plan has them."""
    load, counts = pools.fewest(qps), pools.drawn_devices(qps, shares, rng)
    low, high = np.quantile(counts, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], method="inverted_cdf")
    if load is None:
        return PlannedTarget(qps=qps)
    most = int(max(high, load.devices)) if math.isfinite(high) else None
    return PlannedTarget(qps=qps, devices=load.devices, interval=(int(min(low, load.devices)), most))


def repeat(task: tuple[str, int, int]) -> tuple[tuple[Pair, Pair], ...]:
    """One repetition: the pair of equal devices and the pair with the slower one, ladders pooled and not pooled."""
    case, ladders, seed = task
    runs = CASES[case].factors(CASES[case].runs, np.random.default_rng([5, seed]), 3)
    families = [family_of(case, ladders, *each) for each in zip((1.0, 1.0, TIMES), runs.tolist(), strict=True)]
    try:
        first, second, slower = (run_of(each, (number, seed)) for number, each in enumerate(families, start=1))
    except HarnessError as error:
        return ((Pair(refused=str(error)),) * 2,) * 2
    return tuple(
        (pair_of(first, second, 1.0, seed, pooled=pooled), pair_of(first, slower, TIMES, seed, pooled=pooled))
        for pooled in (True, False)
    )


def pair_of(a: Side, b: Side, times: float, seed: int, *, pooled: bool) -> Pair:
    rng = np.random.default_rng([4, seed])
    rows = differences(a, b, rng, CONFIDENCE, a.between.pooled(b.between, ASSUMED) if pooled else None)
    kinds = {finding: frozenset(row.kind for row in rows if row.finding == finding) for finding in (WORSE, BETTER)}
    rate = next(row for row in rows if row.kind == RATE)
    return Pair(
        worse=kinds[WORSE],
        better=kinds[BETTER],
        rows=len(rows),
        differing=sum(row.finding in (WORSE, BETTER) for row in rows),
        held=all(_holds(row, times) for row in rows if row.kind == STEP),
        rate_width=rate.interval[1] - rate.interval[0] if None not in rate.interval else math.nan,
    )


def _holds(row: Difference, times: float) -> bool:
    low, high = row.interval
    return (low is None or low <= times - 1) and (high is None or times - 1 <= high)


def _share(holds: Sequence[bool]) -> float | None:
    return sum(holds) / len(holds) if holds else None


def _interval(holds: Sequence[bool]) -> tuple[float, float] | None:
    """The 95% interval of the share (Clopper and Pearson)."""
    if not holds:
        return None
    found = stats.binomtest(sum(holds), len(holds)).proportion_ci(0.95)
    return found.low, found.high


def show(each: Sequence[dict]):
    columns = ("pairs", "false differences", "95% interval", f"{TIMES - 1:.0%} slower found", "95% interval",
               "by step", "by rate", "by counts", "intervals held")  # fmt: skip
    table = common.table(
        "Two runs compared: equal devices, and one with a slower one", "between ladders and runs", *columns
    )
    for one in each:
        table.add_row(
            f"{one['case']}, {'pooled' if one['pooled'] else 'each alone'}",
            str(one["pairs"]),
            _percent(one["false_differences"]),
            _range(one["false_differences_interval"]),
            _percent(one["found_share"]),
            _range(one["found_share_interval"]),
            *(_percent(one[f"found_by_{kind.replace(' ', '_').lower()}"]) for kind in (STEP, RATE, COUNT)),
            _percent(one["held"]),
        )
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _range(bounds: tuple[float, float] | None) -> str:
    return f"{bounds[0]:.1%} to {bounds[1]:.1%}" if bounds else ""


def compared(cases: Sequence[str], repetitions: int, ladders: int, seed: int) -> list[Case]:
    began, tasks = time.monotonic(), []
    for number in range(repetitions):
        tasks += [(case, ladders, seed * 10**6 + number) for case in cases]
    done: dict[tuple[str, bool], list[tuple[Pair, Pair]]] = {}
    with multiprocessing.get_context("spawn").Pool(_PROCESSES) as pool:
        for number, (task, pairs) in enumerate(zip(tasks, pool.imap(repeat, tasks), strict=True), start=1):
            for pooled, pair in zip((True, False), pairs, strict=True):
                done.setdefault((task[0], pooled), []).append(pair)
            if number % 30 == 0:
                common.say(f"{number} of {len(tasks)} repetitions, {time.monotonic() - began:.0f} s …")
    return [Case(*case, *map(tuple, zip(*pairs, strict=True))) for case, pairs in done.items()]


def of_levels(name: str, ladders: int, seed: int, pairs: int) -> dict:
    """Shares of false differences and of slower devices found, where each ladder is one exact figure."""
    truth, rng = CASES[name], np.random.default_rng([6, seed, zlib.crc32(name.encode())])
    false, found = 0, 0
    for _ in range(pairs):
        sides, means = zip(*(_of_exact_ladders(truth, ladders, rng) for _ in range(2)), strict=True)
        levels = drawn_levels(*sides, sides[0].between.pooled(sides[1].between, ASSUMED), rng)
        below, above = joint_reach(np.log(levels[1].steps / levels[0].steps)[:, None], CONFIDENCE)[0]
        change = means[1] - means[0]
        false += change > below or -change > above
        found += change + math.log(TIMES) > below
    return {
        "case": name,
        "assumed": truth.assumed,
        "pairs": pairs,
        "false_differences": false / pairs,
        "found": found / pairs,
    }


def _of_exact_ladders(truth: Truth, ladders: int, rng: np.random.Generator) -> tuple[Side, float]:
    """A run of ladders without noise, and the logarithm of their mean."""
    logs = np.log(truth.factors(truth.runs, rng, 1) * truth.factors(truth.ladders, rng, ladders))
    unused: Any = None
    return Side(unused, unused, unused, ASSUMED.with_ladders(logs), ladders, ASSUMED), float(logs.mean())


def show_levels(each: Sequence[dict]):
    columns = ("pairs", "false differences", f"{TIMES - 1:.0%} slower found")
    table = common.table("Levels alone", "between ladders and runs", *columns)
    for one in each:
        name = one["case"] if one["assumed"] else f"{one['case']} (more than assumed)"
        table.add_row(name, str(one["pairs"]), *(_percent(one[key]) for key in ("false_differences", "found")))
    return table


def is_good(figures: dict) -> bool:
    """Whether every gate is met by what was run; the slower device is sought where runs differ by up to 5%."""
    return (
        (figures["false_differences_max"] or 0.0) <= FALSE_MAX
        and figures["levels_false_max"] <= FALSE_MAX
        and (not figures["sought"] or (figures["found_share"] or 0.0) >= FOUND_MIN)
        and (figures["wrong_way_max"] or 0.0) <= WRONG_WAY_MAX
        and (figures["held_min"] or 0.0) >= HELD_MIN
        and not figures["all_refused"]
    )


def main(arguments: Sequence[str]) -> int:
    parser = common.Parser(__doc__, "python benchmarks/capacity/compare.py --case 10% --repetitions 200")
    parser.add_argument(
        "--case",
        action="append",
        dest="cases",
        choices=CASES,
        help="a case to measure, may be repeated (default: 0%%, 5%% and 10%%); levels alone are always of all",
    )
    parser.add_argument("--repetitions", type=common.whole(1, 10**5), default=100, help="of each case")
    parser.add_argument("--ladders", type=common.whole(1, 10), default=3, help="of each run")
    parser.add_argument("--seed", type=common.whole(0, 10**6), default=1)
    options = parser.parse_args(arguments)
    began = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    chosen = list(dict.fromkeys(options.cases or STANDARD))
    cases = compared(chosen, 1 if options.quick else options.repetitions, options.ladders, options.seed)
    levels = [of_levels(name, options.ladders, options.seed, 50 if options.quick else LEVEL_PAIRS) for name in CASES]
    each = [case.figures() for case in cases]
    known = [one for one in each if one["pairs"]]
    held = [one for one in known if CASES[one["case"]].assumed]
    sought = [case for case in cases if CASES[case.name].runs <= FOUND_UP_TO]
    found = [bool(pair.worse) and not pair.better for case in sought for pair in case.slower if not pair.refused]
    figures = {
        "false_differences_max": max((one["false_differences"] for one in held), default=None),
        "found_share": _share(found),
        "sought": bool(sought),
        "found_share_min": min((one["found_share"] for one in known), default=None),
        "wrong_way_max": max((one["wrong_way"] for one in known), default=None),
        "held_min": min((one["held"] for one in known), default=None),
        "all_refused": not known,
        "levels_false_max": max(one["false_differences"] for one in levels if one["assumed"]),
        "levels": levels,
        "ladders": options.ladders,
        "repetitions": len(cases[0].equal),
        "each": each,
        "seconds": time.monotonic() - began,
    }
    common.finish([show(each), show_levels(levels)], figures)
    return 0 if options.quick or is_good(figures) else common.EXIT_FAILED


if __name__ == "__main__":
    common.run(main)
