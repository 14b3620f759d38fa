"""Comparisons of synthetic runs: how often equal devices are said to differ, and how often a slower one is found.

Each repetition measures three runs: two of one device, and one of a device whose steps take 60% longer. Whole ladders
of a run differ by a factor with a relative standard deviation of 0, 5 or 10%, and so do whole runs, by a factor that
all their ladders share, as hosts and hours do; each run has as many ladders as a sign-off has of its best deployment,
and is fitted and counted as a plan is. Each pair is compared with the deviation between ladders of both runs together,
and with that of each alone, as where hosts are not alike. `harness compare` says of the first two
whether any figure differs (step times, SLO metrics, rate, counts), and whether the slower one is worse.

A false difference is a pair of equal devices of which any figure is said to be better or worse. The slower device is
found where some figure is worse and none is better.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numba_first  # noqa: F401
import numpy as np
from scipy import stats
from truth_families import UNIT, Family, linear

from harness.capacity.fitting.rate_search import steady_draws, steady_limit
from harness.capacity.models.between_ladders import ASSUMED
from harness.capacity.planning.comparison import Side, differences
from harness.capacity.planning.plan import pools_of
from harness.capacity.planning.pools import Pools
from harness.errors import HarnessError
from harness.records.comparison import BETTER, COUNT, KINDS, RATE, STEP, WORSE, Difference
from harness.records.plan import Plan, PlannedRate, PlannedTarget

CONFIDENCE, FALSE_MAX = 0.95, 0.05
FOUND_MIN, FOUND_UP_TO, WRONG_WAY_MAX, HELD_MIN = 0.9, 0.05, 0.01, 0.95
TIMES = 1.6  # as long are the steps of the slower device
DEVIATIONS = (0.0, 0.05, 0.10)
FIRST_AUDIO_S = 0.5
TARGETS = (4.0, 20.0)
SESSIONS = (1, 4, 8, 16, 24)
_PROCESSES = 2


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
    """The pairs of one deviation between ladders and between runs: of equal devices, and of one with a slower one.

    ``pooled``: compared with the deviation of both runs' ladders together.
    """

    deviation: float
    pooled: bool
    equal: tuple[Pair, ...]
    slower: tuple[Pair, ...]

    def figures(self) -> dict:
        equal, slower = ([each for each in pairs if not each.refused] for pairs in (self.equal, self.slower))
        false = [bool(each.worse or each.better) for each in equal]
        found = [bool(each.worse) and not each.better for each in slower]
        return {
            "deviation": self.deviation,
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


def family_of(deviation: float, ladders: int, times: float, run: float = 1.0) -> Family:
    """The standard family of ``truths.py`` with steps ``times`` as long and shorter ladders; ``run``: its factor."""
    name = f"compare-{deviation:g}-{ladders}-{times:g}"
    step = linear(0.02 * times * run, 0.005 * times * run)
    more = {"sessions": SESSIONS, "seconds": 8.0, "cap": 0.85, "first_audio_s": FIRST_AUDIO_S}
    return Family(name, step, host_sd=deviation, ladders=ladders, **more)


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


def repeat(task: tuple[float, int, int]) -> tuple[tuple[Pair, Pair], ...]:
    """One repetition: the pair of equal devices and the pair with the slower one, ladders pooled and not pooled."""
    deviation, ladders, seed = task
    runs = np.random.default_rng([5, seed]).lognormal(0, deviation, 3)
    families = [family_of(deviation, ladders, *each) for each in zip((1.0, 1.0, TIMES), runs.tolist(), strict=True)]
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
            f"{one['deviation']:.0%}, {'pooled' if one['pooled'] else 'each alone'}",
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


def compared(repetitions: int, ladders: int, seed: int) -> list[Case]:
    began, tasks = time.monotonic(), []
    for number in range(repetitions):
        tasks += [(deviation, ladders, seed * 10**6 + number) for deviation in DEVIATIONS]
    done: dict[tuple[float, bool], list[tuple[Pair, Pair]]] = {}
    with multiprocessing.get_context("spawn").Pool(_PROCESSES) as pool:
        for number, (task, pairs) in enumerate(zip(tasks, pool.imap(repeat, tasks), strict=True), start=1):
            for pooled, pair in zip((True, False), pairs, strict=True):
                done.setdefault((task[0], pooled), []).append(pair)
            if number % 30 == 0:
                common.say(f"{number} of {len(tasks)} repetitions, {time.monotonic() - began:.0f} s …")
    return [Case(*case, *map(tuple, zip(*pairs, strict=True))) for case, pairs in done.items()]


def is_good(figures: dict) -> bool:
    """Whether every gate is met; the slower device is sought where ladders and runs differ by up to 5%."""
    gated = ("false_differences_max", "found_share", "wrong_way_max", "held_min")
    return (
        all(figures[name] is not None for name in gated)
        and figures["false_differences_max"] <= FALSE_MAX
        and figures["found_share"] >= FOUND_MIN
        and figures["wrong_way_max"] <= WRONG_WAY_MAX
        and figures["held_min"] >= HELD_MIN
    )


def main(arguments: Sequence[str]) -> int:
    parser = common.Parser(__doc__, "python benchmarks/capacity/compare.py --repetitions 200")
    parser.add_argument("--repetitions", type=common.whole(1, 10**5), default=100, help="of each deviation")
    parser.add_argument("--ladders", type=common.whole(1, 10), default=3, help="of each run")
    parser.add_argument("--seed", type=common.whole(0, 10**6), default=1)
    options = parser.parse_args(arguments)
    began = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    cases = compared(1 if options.quick else options.repetitions, options.ladders, options.seed)
    each = [case.figures() for case in cases]
    known = [one for one in each if one["pairs"]]
    sought = [case for case in cases if case.deviation <= FOUND_UP_TO]
    found = [bool(pair.worse) and not pair.better for case in sought for pair in case.slower if not pair.refused]
    figures = {
        "false_differences_max": max((one["false_differences"] for one in known), default=None),
        "found_share": _share(found),
        "found_share_min": min((one["found_share"] for one in known), default=None),
        "wrong_way_max": max((one["wrong_way"] for one in known), default=None),
        "held_min": min((one["held"] for one in known), default=None),
        "ladders": options.ladders,
        "repetitions": len(cases[0].equal),
        "each": each,
        "seconds": time.monotonic() - began,
    }
    common.finish(show(each), figures)
    return 0 if options.quick or is_good(figures) else common.EXIT_FAILED


if __name__ == "__main__":
    common.run(main)
