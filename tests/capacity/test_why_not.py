"""Why options lost: each with the limit that rules it out, its value there and by how much it is off."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from capacity_truth import LADDER, MIX, SLOS, TRUTH, bare_fit, fit_of, fit_with, ladder

from harness.capacity.fitting.rate_search import KV_MEMORY
from harness.capacity.planning.plan import pools_of
from harness.capacity.planning.why_not import _worst, why_not
from harness.records import why_not as reasons
from harness.records.plan import PlannedTarget
from harness.records.slo import Slo
from harness.report import words
from harness.report.ruled_out import lost_options

FUSED = {"topology": "fused"}


@pytest.fixture(scope="module")
def measured():
    """A deployment with three ladders; one of the fused topology whose steps take twice as long."""
    rng, slow = np.random.default_rng(3), replace(TRUTH, intercept_s=0.024, slope_s=0.012)
    best = [ladder(TRUTH, rng, LADDER, name=f"ladder-{number}") for number in range(3)]
    return [*best, ladder(slow, rng, LADDER, name="slow", deployment=FUSED)]


@pytest.fixture(scope="module")
def fit(measured):
    return fit_of(*measured)


@pytest.fixture(scope="module")
def pools(fit):
    return pools_of(fit, fit.best_deployment, MIX, SLOS, 0.85)


@pytest.fixture(scope="module")
def rows(fit, pools):
    """For a target that one device serves, and for one that needs several."""
    targets = [
        PlannedTarget(qps=qps, devices=n, interval=(n, n)) for qps in (0.5, 8.0) for n in [pools.fewest(qps).devices]
    ]
    return why_not(fit, SLOS, targets, pools)


def test_a_slower_deployment_is_ruled_out_by_the_slo_that_it_violates_at_the_planned_rate(fit, rows):
    topology, deployment, _ = rows
    assert (topology.option, topology.topology) == (reasons.TOPOLOGY, "fused")
    assert replace(topology, option=reasons.DEPLOYMENT) == deployment and deployment.knobs == FUSED
    assert (deployment.by, deployment.certain) == (reasons.BY_SLO, True)
    assert deployment.at_qps == fit.best_deployment.rate() > deployment.rate_per_s
    limits = {f"rtf p95 of class {name}": 0.9 for name in ("short", "long")}
    limits |= {"ttfa p95 of class short": 1.0, "ttfa p95 of class long": 1.5}
    assert deployment.allowed == limits[deployment.limit] and deployment.value > deployment.allowed
    assert deployment.excess == pytest.approx(deployment.value / deployment.allowed - 1)


def test_one_device_fewer_than_planned_is_beyond_a_limit(pools, rows):
    *_, count = rows  # there is nothing below the one device of the first target
    fewer = pools.fewest(8.0).devices - 1
    assert (count.option, count.devices, count.at_qps, count.certain) == (reasons.DEVICES, fewer, 8.0, True)
    utilisation = 8.0 / (fewer * pools.steady_rate())
    if count.by == reasons.BY_UTILISATION:
        assert (count.value, count.allowed) == pytest.approx((utilisation, 0.85)) and utilisation > 0.85
        assert count.excess == pytest.approx(utilisation / 0.85 - 1)
    else:
        assert count.by in (reasons.BY_SLO, reasons.BY_RATE) and count.excess


def test_a_count_far_too_small_violates_an_slo(fit, pools):
    target = PlannedTarget(qps=8 * fit.best_deployment.rate(), devices=3, interval=(3, 3))
    *_, count = why_not(fit, SLOS, (target,), pools)
    assert (count.by, count.certain) == (reasons.BY_SLO, True) and (count.excess is None or count.excess > 1)
    assert count.basis == "extrapolated"


def test_without_a_simulation_an_option_is_ruled_out_by_its_rate(fit):
    (_, deployment) = why_not(fit, SLOS, ())
    best = fit.best_deployment.rate()
    assert (deployment.by, deployment.allowed, deployment.value) == (reasons.BY_RATE, best, deployment.rate_per_s)
    assert deployment.excess == pytest.approx(deployment.rate_per_s / best - 1) and deployment.excess < 0


def lost(*others, **changes):
    best = bare_fit(**{"max_rate_per_s": 2.0, "trial_ids": ("a", "b"), "deployment": {"delay_us": 0}} | changes)
    return why_not(fit_with(best, *others, best=0), SLOS, ())


def test_a_higher_rate_by_fewer_ladders_is_not_told_apart():
    (row,) = lost(bare_fit(max_rate_per_s=2.4, trial_ids=("c",), deployment={"delay_us": 5000}))
    assert (row.by, row.value, row.allowed, row.certain) == (reasons.BY_LADDERS, 1, 2, False)


def test_what_is_not_known_is_said_to_be_so():
    (row,) = lost(bare_fit(deployment={"delay_us": 5000}, inconclusive="none of its ladders is VALID"))
    assert (row.by, row.limit, row.certain) == (reasons.BY_UNKNOWN, "none of its ladders is VALID", False)


def test_a_deployment_that_meets_the_slos_at_no_rate_is_judged_with_one_session(measured):
    tight = (Slo("short", "rtf", 0.95, 0.05), *SLOS[2:])
    trials, frames = zip(*measured[:1], strict=True)
    fit = fit_of((trials[0], frames[0]), slos=tight)
    assert fit.best is None
    (row,) = why_not(fit, tight, ())
    assert (row.by, row.limit, row.certain, row.at_qps) == (reasons.BY_SLO, "rtf p95 of class short", True, None)
    assert row.value == pytest.approx(TRUTH.step_s(1) * 7.5, rel=0.2) and row.allowed == 0.05


def test_a_deployment_without_room_for_one_session_is_ruled_out_by_its_memory(fit):
    """One session alone would meet every SLO; there is no memory for it."""
    none = replace(fit.best_deployment, max_rate_per_s=0.0, binding=KV_MEMORY)
    (row,) = why_not(replace(fit, deployments=(none,), best=None), SLOS, ())
    assert (row.by, row.limit, row.certain) == (reasons.BY_MEMORY, KV_MEMORY, True)
    assert (row.value, row.allowed, row.excess) == (None, None, None)
    (shown,) = lost_options([row], None)
    assert (shown.at, shown.limit, shown.value) == ("one session", "KV memory", words.ABSENT)


def test_a_limit_of_zero_has_no_value_that_is_not_a_number(pools):
    silent = pools.changed(limits=replace(pools.limits, slos=(Slo("short", "rtf", 0.95, 0.0),)))
    name = "rtf p95 of class short"
    load = replace(pools.judge(1.0, 1), shares={name: math.inf})
    assert _worst(silent, load) | {"by": ""} == {"by": "", "limit": name, "value": None, "allowed": 0.0, "excess": None}


def test_options_are_ordered_by_their_rates_and_the_planned_one_is_not_among_them():
    rates = (1.0, 1.8, 0.5)
    rows = lost(*(bare_fit(max_rate_per_s=rate, deployment={"delay_us": 1 + i}) for i, rate in enumerate(rates)))
    assert [row.rate_per_s for row in rows] == [1.8, 1.0, 0.5]
