"""An open-loop run as one more measurement of how fast a deployment is."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from capacity_truth import LADDER, TRUTH, bare_fit, confirmed, fit_of, ladder, open_run, plan_of

from harness.capacity.fitting.open_runs import step_times, with_open_runs
from harness.capacity.models.between_ladders import ALIKE, ASSUMED, Between
from harness.capacity.models.steps import StepTime


@pytest.fixture(scope="module")
def ladders():
    rng = np.random.default_rng(5)
    return [ladder(TRUTH, rng, LADDER, name=f"ladder-{number}") for number in range(2)]


def slower(times):
    """A device whose steps are ``times`` as long."""
    return replace(TRUTH, intercept_s=TRUTH.intercept_s * times, slope_s=TRUTH.slope_s * times)


def run_on(truth, rate=0.5, **changes):
    return open_run(truth, rate, np.random.default_rng(8), seconds=60.0, **changes)


def width(deployment):
    low, high = deployment.max_rate_interval
    return math.log(high / low)


def test_steps_of_a_run_on_the_same_device_are_those_of_its_ladders():
    trial, rows = run_on(TRUTH)
    predicted_s, measured_s = step_times(trial, rows, StepTime("linear", (TRUTH.intercept_s, TRUTH.slope_s)))
    assert measured_s == pytest.approx(predicted_s, rel=0.1)


def test_a_slower_run_lowers_the_rate_and_widens_its_interval(ladders):
    without = fit_of(*ladders).deployments[0]
    slow = fit_of(*ladders, run_on(slower(1.3))).deployments[0]
    between = slow.step_time.between
    assert between.open_run == pytest.approx(1.3, rel=0.1) and between.ladders == 2
    moved = without.step_time.intercept_s * between.open_run ** (1 / 3)
    assert slow.step_time.intercept_s == pytest.approx(moved, rel=1e-6)
    assert slow.rate() < 0.97 * without.rate() and width(slow) > width(without)


def test_a_faster_run_widens_the_interval_but_raises_nothing(ladders):
    without, fast = (fit_of(*ladders, *more).deployments[0] for more in ([], [run_on(slower(0.7))]))
    assert fast.step_time.between.open_run < 0.8
    assert fast.step_time.values == without.step_time.values
    assert width(fast) > width(without)


@pytest.mark.parametrize("times", [0.95, 1.0, 1.05])
def test_a_run_that_agrees_narrows_nothing(ladders, times):
    without, same = (fit_of(*ladders, *more).deployments[0] for more in ([], [run_on(slower(times))]))
    assert width(same) == pytest.approx(width(without), rel=0.05)
    assert same.step_time.between.deviation >= without.step_time.between.deviation


def test_the_best_is_chosen_by_ladders_alone(ladders):
    other = {"deployment": {"delay_us": 5000}}
    others = [ladder(slower(1.02), np.random.default_rng(seed), LADDER, name=f"o-{seed}", **other) for seed in (1, 2)]
    fit = fit_of(*ladders, *others, run_on(slower(1.5)))
    assert fit.best == 0 and fit.deployments[0].rate() < fit.deployments[1].rate()


@pytest.mark.parametrize("changes", [{"valid": False, "reasons": ("others",)}, {"deployment": {"delay_us": 5000}}])
def test_only_valid_runs_of_the_deployment_count(ladders, changes):
    trial, rows = run_on(slower(1.3), **changes)
    assert fit_of(*ladders, (trial, rows)).deployments[0].step_time.between.open_run is None


def test_of_several_runs_the_one_nearest_to_the_highest_rate_counts(ladders):
    low, high = run_on(slower(1.5), 0.2, name="open-low"), run_on(TRUTH, 0.5, name="open-high")
    assert fit_of(*ladders, low, high).deployments[0].step_time.between.open_run < 1.15


def test_where_ladders_are_said_not_to_differ_a_run_changes_nothing(ladders):
    fits = [fit_of(*ladders, *more, between=ALIKE).deployments[0] for more in ([], [run_on(slower(1.3))])]
    assert fits[0].step_time.values == fits[1].step_time.values
    assert with_open_runs(bare_fit(), 0.1, np.random.default_rng(1)) == bare_fit()


def test_one_more_measurement_counts_as_much_as_a_ladder():
    at_once = ASSUMED.with_ladders(np.array([0.1, -0.2, 0.3]))
    mean = (0.1 - 0.2) / 2
    one_more = ASSUMED.with_ladders(np.array([0.1, -0.2])).with_another(0.3 - mean, 2)
    assert (one_more.deviation, one_more.degrees) == pytest.approx((at_once.deviation, at_once.degrees))
    assert Between(0.0, math.inf).with_another(0.3, 2).deviation == 0


def test_the_plan_says_that_steps_were_longer_in_open_loop(ladders):
    run = run_on(slower(1.3))
    said = plan_of(fit_of(*ladders, run), *ladders, run).reasons
    assert any("times as long as the ladders of its deployment show" in each for each in said)
    agreeing = confirmed(fit_of(*ladders), TRUTH, 0.5, np.random.default_rng(4))
    assert not any(
        "times as long as the ladders" in each for each in plan_of(fit_of(*ladders, agreeing), *ladders).reasons
    )
