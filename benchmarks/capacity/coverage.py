"""How often 95% intervals on device counts contain the true count, on synthetic truth.

Whole ladders do not differ here, and the fit is told so: ``truths.py`` judges the part of an interval that holds that.

A device with known physics produces a ladder, with noise on every rung and variation of every request. From that alone
the fit and the plan give the devices for a rate, with an interval. The truth is a plan made from the known physics. The
rate of each repetition is drawn for 10 to 1,000 devices (uniformly in its logarithm).

Counts are whole numbers, and both ends of an interval are rounded up: the interval of counts contains the true count
whenever the interval before rounding contains the true rate of a device, and often when it just fails to. A count is
therefore covered in more than 95%, the more so the fewer devices there are: below 30, where the interval is narrower
than one device, almost always. The coverage before rounding must be 93% to 97%; that of counts must not be lower.
"""

from __future__ import annotations

import functools
import itertools
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
import pandas as pd
from scipy import stats
from testbed import capacity_truth as truth

from harness.capacity.fitting.fit import fit_run, limits_of
from harness.capacity.fitting.rate_search import Limits, Traffic, steady_draws, steady_limit
from harness.capacity.models.between_ladders import ALIKE
from harness.capacity.models.device import Device
from harness.capacity.planning.pools import Pools
from harness.errors import InconclusiveError

ALLOWED = 0.93, 0.97
CAP, CONFIDENCE = 0.85, 0.95
DEVICES = 10, 1000  # range of the true counts
BANDS = 10, 30, 100, 300, 1001
_TRUTH_SEED = 5
_PROCESSES = 2


@dataclass(frozen=True)
class Repetition:
    """One repetition: the true count, the planned one and its interval; the same for the steady rate of one device."""

    devices: int
    planned: int
    low: float
    high: float
    true_rate: float
    rate_low: float
    rate_high: float

    @property
    def held(self) -> bool:
        return self.low <= self.devices <= self.high

    @property
    def rate_held(self) -> bool:
        return self.rate_low <= self.true_rate <= self.rate_high


@functools.cache
def true_pools() -> Pools:
    limits = Limits(truth.SLOS, max(truth.LADDER))
    return Pools(truth.true_device(), Traffic.draw(truth.MIX, np.random.default_rng(_TRUTH_SEED)), limits, CAP)


def repeat(seed: int) -> Repetition | None:
    """One repetition; None where the plan is inconclusive."""
    rng = np.random.default_rng([7, seed])
    pools = true_pools()
    qps = math.exp(rng.uniform(*np.log(DEVICES))) * CAP * pools.steady_rate()
    devices = pools.fewest(qps).devices
    trial, rows = truth.ladder(truth.TRUTH, rng, truth.LADDER)
    fit = fit_run([trial], pd.DataFrame(rows), truth.MIX, truth.SLOS, rng, truth.UNIT, between=ALIKE)
    try:
        device = Device.from_fit(fit.deployments[0])
    except InconclusiveError:
        return None
    traffic = Traffic.draw(truth.MIX, np.random.default_rng(fit.traffic_seed))
    limits = limits_of(fit.deployments[0], truth.SLOS, None, 1.0, traffic)
    fitted = Pools(device, traffic, limits, CAP)
    draws, steady = steady_draws(device, limits, rng), steady_limit(device, limits)[0]
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    low, high = np.quantile(fitted.drawn_devices(qps, draws / steady, rng), tails, method="inverted_cdf")
    planned = fitted.fewest(qps).devices
    true_rate = steady_limit(pools.device, pools.limits)[0]
    interval = min(low, planned), max(high, planned)
    return Repetition(devices, planned, *interval, true_rate, *np.quantile(draws, tails))


def coverage(held: Sequence[bool]) -> tuple[float, float, float]:
    """The share, and its 95% interval (Clopper and Pearson)."""
    found = stats.binomtest(sum(held), len(held)).proportion_ci(0.95)
    return sum(held) / len(held), found.low, found.high


def show(done: Sequence[Repetition]):
    columns = "of", "repetitions", "held", "95% interval", "below", "above"
    table = common.table("How often a 95% interval contained the truth", *columns)
    parts = {"before rounding: the rate of a device": None, "the count, all": (0, math.inf)}
    parts |= {f"counts of {low} to {high - 1}": (low, high) for low, high in itertools.pairwise(BANDS)}
    for name, between in parts.items():
        own = done if between is None else [each for each in done if between[0] <= each.devices < between[1]]
        if not own:
            continue
        held = [each.rate_held if between is None else each.held for each in own]
        under = [each.rate_high < each.true_rate if between is None else each.high < each.devices for each in own]
        share, low, high = coverage(held)
        over = len(own) - sum(held) - sum(under)
        table.add_row(name, str(len(own)), f"{share:.1%}", f"{low:.1%} to {high:.1%}", str(sum(under)), str(over))
    return table


def main(arguments: Sequence[str]) -> int:
    parser = common.Parser(__doc__, "python benchmarks/capacity/coverage.py --repetitions 1000")
    parser.add_argument("--repetitions", type=common.whole(10, 10**5), default=600)
    parser.add_argument("--seed", type=common.whole(0, 10**9), default=1)
    options = parser.parse_args(arguments)
    repetitions = 12 if options.quick else options.repetitions
    began, done = time.monotonic(), []
    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(_PROCESSES) as pool:
        seeds = range(options.seed * 10**6, options.seed * 10**6 + repetitions)
        for number, each in enumerate(pool.imap(repeat, seeds, chunksize=4), start=1):
            done.append(each)
            if number % 50 == 0:
                common.say(f"{number} of {repetitions}, {time.monotonic() - began:.0f} s …")
    known = [each for each in done if each is not None]
    share, low, high = coverage([each.held for each in known])
    figures = {
        "coverage": share,
        "coverage_low": low,
        "coverage_high": high,
        "coverage_before_rounding": coverage([each.rate_held for each in known])[0],
        "repetitions": len(known),
        "refused": len(done) - len(known),
        "interval_share_median": float(np.median([(each.high - each.low) / each.devices for each in known])),
        "planned_over_true_median": float(np.median([each.planned / each.devices for each in known])),
        "seconds": time.monotonic() - began,
    }
    common.finish(show(known), figures)
    good = ALLOWED[0] <= figures["coverage_before_rounding"] <= ALLOWED[1] and share >= ALLOWED[0]
    return 0 if options.quick or good else common.EXIT_FAILED


if __name__ == "__main__":
    common.run(main)
