"""Two fitted deployments compared: equal ones show no difference, a slower one does, and intervals hold together."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from capacity_truth import LADDER, MIX, SLOS, TRUTH, UNIT, fit_of, ladder
from scipy import stats

from harness.capacity.fitting.fit import limits_of
from harness.capacity.fitting.rate_search import Traffic, range_name
from harness.capacity.models.between_ladders import ALIKE, ASSUMED, ASSUMED_OF_RUNS, Between
from harness.capacity.planning.comparison import Levels, Side, differences, drawn_levels, joint_reach
from harness.capacity.planning.count_difference import count_differences, interval_of_difference
from harness.records.comparison import (
    BETTER,
    COUNT,
    KINDS,
    NOT_SHOWN,
    RATE,
    SLO_METRIC,
    STEP,
    UNKNOWN,
    WORSE,
    finding_of,
)
from harness.records.plan import Plan, PlannedRate, PlannedTarget


def plan_with(*counts: tuple[int, int, int]) -> Plan:
    """A plan of counts, each with its interval, for 5 and 40 requests/s."""
    targets = tuple(
        PlannedTarget(qps=qps, devices=n, interval=(low, high))
        for qps, (n, low, high) in zip((5.0, 40.0), counts, strict=True)
    )
    known = {"verdict": "met", "reasons": (), "unit": UNIT, "confidence": 0.95, "deployment": {}, "slos": SLOS}
    return Plan(**known, rate_per_device=PlannedRate(), targets=targets, validation=())


def side_of(times: float, seed: int, ladders: int = 3, plan: Plan | None = None) -> Side:
    """A run of a device whose steps take ``times`` as long."""
    truth = replace(TRUTH, intercept_s=times * TRUTH.intercept_s, slope_s=times * TRUTH.slope_s)
    rng = np.random.default_rng(seed)
    measured = [ladder(truth, rng, LADDER, name=f"ladder-{seed}-{number}") for number in range(ladders)]
    fit = fit_of(*measured, seed=seed)
    traffic = Traffic.draw(MIX, np.random.default_rng(fit.traffic_seed))
    limits = limits_of(fit.deployments[0], SLOS, None, 1.0, traffic)
    return Side.of(fit.deployments[0], limits, ASSUMED, plan)


@pytest.fixture(scope="module")
def first():
    return side_of(1.0, 1, plan=plan_with((5, 5, 6), (40, 36, 44)))


@pytest.fixture(scope="module")
def again():
    return side_of(1.0, 2)


@pytest.fixture(scope="module")
def slower():
    return side_of(2.0, 3, plan=plan_with((10, 8, 11), (80, 72, 88)))


def compared(a: Side, b: Side, **options):
    pooled = a.between.pooled(b.between, ASSUMED)
    return differences(a, b, np.random.default_rng(1), 0.95, **{"pooled": pooled} | options)


def test_equal_devices_show_no_difference_in_any_figure(first, again):
    rows = compared(first, again)
    assert {row.finding for row in rows} == {NOT_SHOWN}
    assert all(row.interval[0] < 0 < row.interval[1] and abs(row.change) < 0.1 for row in rows)


def test_a_slower_device_is_worse_in_every_kind_of_figure_and_the_other_way_round_better(first, slower):
    rows, back = compared(first, slower), compared(slower, first)
    assert {row.kind for row in rows if row.finding == WORSE} == set(KINDS)
    assert BETTER not in {row.finding for row in rows} and WORSE not in {row.finding for row in back}
    assert {STEP, RATE, COUNT} <= {row.kind for row in back if row.finding == BETTER}
    for row in (row for row in rows if row.kind == STEP):
        assert row.interval[0] <= 1 <= row.interval[1] and row.change == pytest.approx(1.0, abs=0.1)
    (rate,) = (row for row in rows if row.kind == RATE)
    assert rate.change < -0.2 and rate.interval[1] < 0


def test_one_ladder_each_decides_less_than_three(first, again):
    few = [side_of(1.0, 4, ladders=1), side_of(1.0, 5, ladders=1)]
    widths = [row.interval[1] - row.interval[0] for row in compared(*few) if row.kind == STEP]
    more = [row.interval[1] - row.interval[0] for row in compared(first, again) if row.kind == STEP]
    assert min(widths) > 1.1 * max(more)


def test_loads_are_those_that_both_measured_and_metrics_those_near_the_limit_of_a(first):
    short = replace(first, device=replace(first.device, max_sessions=4.0))
    rows = compared(first, short)
    assert [row.at for row in rows if row.kind == STEP] == [None, 1, 2, 4]
    assert {row.at for row in rows if row.kind == SLO_METRIC} == {4}
    assert len([row for row in rows if row.kind == SLO_METRIC]) == len(SLOS)


def test_a_comparison_depends_on_its_seed_alone(first, again):
    assert compared(first, again) == compared(first, again)


def test_each_run_speaks_for_itself_where_hosts_are_not_alike(first, again):
    rows = compared(first, again, pooled=None)
    assert {row.finding for row in rows} == {NOT_SHOWN}


def test_no_finding_rests_on_a_rate_of_which_only_a_lower_bound_is_known(first, slower):
    reached = replace(slower, fit=replace(slower.fit, binding=range_name(slower.limits)))
    rows = {row.kind: row for row in compared(first, reached)}
    for kind in (RATE, COUNT):
        assert rows[kind].finding == NOT_SHOWN and "the ladder of B ended" in rows[kind].note
    assert rows[STEP].finding == WORSE


@pytest.mark.parametrize(("rate", "finding"), [(0.0, WORSE), (None, UNKNOWN)])
def test_a_device_without_a_rate(first, rate, finding):
    none = replace(first, fit=replace(first.fit, max_rate_per_s=rate, inconclusive="too few requests"))
    (row,) = (row for row in compared(first, none) if row.kind == RATE)
    assert row.finding == finding and row.change is None and row.note


def test_levels_differ_as_the_ladders_of_both_runs_say():
    a, b = Between(0.2, 6), Between(0.1, 8)
    both = a.pooled(b, ASSUMED)
    assert both.degrees == 10
    assert both.degrees * both.deviation**2 == pytest.approx(6 * 0.04 + 8 * 0.01 - 4 * 0.01)
    assert ASSUMED.pooled(a, ASSUMED) == pytest.approx(a)
    assert ALIKE.pooled(ALIKE, ALIKE) == ALIKE


@pytest.mark.parametrize("correlated", [True, False])
def test_intervals_of_many_figures_hold_together(correlated):
    rng = np.random.default_rng(7)
    draw = (lambda: np.repeat(rng.standard_normal((20_000, 1)), 8, axis=1)) if correlated else (
        lambda: rng.standard_normal((20_000, 8))
    )  # fmt: skip
    below, above = joint_reach(draw(), 0.95).T
    again = draw()
    assert np.mean(np.all((-below <= again) & (again <= above), axis=1)) == pytest.approx(0.95, abs=0.01)
    assert np.allclose([below, above], 1.96 if correlated else 2.73, atol=0.08)  # 2.73: Sidak's bound of eight


def test_a_figure_without_a_bound_does_not_widen_the_others():
    off = np.random.default_rng(1).standard_normal((5000, 2))
    off[:1000, 1] = np.nan
    assert joint_reach(off, 0.95).tolist() == [pytest.approx([1.96, 1.96], abs=0.1), [math.inf, math.inf]]


def test_an_interval_reaches_farther_on_the_side_on_which_draws_do():
    below, above = joint_reach(np.random.default_rng(2).exponential(size=(5000, 1)) - 1, 0.95)[0]
    assert above > 2 * below


def test_counts_differ_by_an_interval_from_theirs():
    assert interval_of_difference((10, 8, 12), (15, 13, 17)) == (2, 8)  # 5 -/+ hypot(2, 2), rounded outwards
    assert interval_of_difference((7, 5, 8), (9, 7, 10)) == (-1, 5)
    assert interval_of_difference((1, 1, 1), (1, 1, 1)) == (0, 0)
    assert interval_of_difference((3, 3, None), (5, 4, 6)) == (None, 3)


def test_ladders_of_one_run_do_not_make_its_hour_known(first, again):
    """However many there are: two runs differ by a factor that all ladders of each share."""
    many = [replace(side, ladders=10_000) for side in (first, again)]
    reach = 1.96 * 2**0.5 * ASSUMED.deviation
    for pooled in (ALIKE, None):
        mean = next(row for row in compared(*many, pooled=pooled) if row.kind == STEP and row.at is None)
        low, high = np.log1p(mean.interval)
        assert high - low > 1.9 * reach
    assert first.between_runs() == max(ASSUMED.deviation, first.between.deviation)
    assert replace(first, prior=ALIKE, between=ALIKE).between_runs() == 0


@pytest.mark.parametrize(("ladders", "runs"), [(0.1, 0.1), (0.02, 0.1), (0.05, 0.05)])
@pytest.mark.parametrize("law", ["normal", "skewed"])
def test_levels_of_equal_devices_seldom_differ_whatever_ladders_and_runs_do(ladders, runs, law):
    """Two components: a factor of each run, which its own ladders do not show, and one of each ladder."""
    rng, false, pairs = np.random.default_rng(7), 0, 400
    draw = rng.standard_normal if law == "normal" else lambda size: rng.exponential(1, size) - 1
    for _ in range(pairs):
        logs = runs * draw((2, 1)) + ladders * draw((2, 3))
        sides = [Side(None, None, None, ASSUMED.with_ladders(own), 3, ASSUMED) for own in logs]
        levels = drawn_levels(*sides, sides[0].between.pooled(sides[1].between, ASSUMED), rng)
        below, above = joint_reach(np.log(levels[1].steps / levels[0].steps)[:, None], 0.95)[0]
        change = float(np.diff(logs.mean(axis=1))[0])
        false += change > below or -change > above
    assert false <= 0.05 * pairs
    assert false <= 0.01 * pairs or runs > 0.05


def test_the_deviation_of_runs_is_known_no_better_than_its_degrees(first, again):
    """Beyond the quantile of a normal deviation: Student's t, with one deviation for both runs."""
    exact = [replace(side, ladders=10_000, between=ALIKE) for side in (first, again)]
    levels = drawn_levels(*exact, None, np.random.default_rng(1))
    reach = np.quantile(np.abs(np.log(levels[1].steps / levels[0].steps)), 0.95)
    expected = stats.t.ppf(0.975, ASSUMED_OF_RUNS.degrees) * 2**0.5 * ASSUMED.deviation
    assert reach == pytest.approx(expected, rel=0.1) and expected > 1.1 * 1.96 * 2**0.5 * ASSUMED.deviation


@pytest.mark.parametrize("ladders", [1, 2, 3, 5, 10])
def test_what_requests_saw_varies_as_the_slowest_ladder_does(ladders):
    rng = np.random.default_rng(1)
    of = rng.standard_normal((200_000, ladders))
    singles = np.exp(0.1 * rng.standard_normal((2, 200_000)))
    levels = Levels.of(np.ones(200_000), ladders, singles)
    for found, truth in ((levels.steps, of.mean(1)), (levels.requests, of.max(1))):
        assert np.log(found).std() == pytest.approx(0.1 * truth.std(), rel=0.03)


def test_a_rate_that_changes_by_more_than_that_of_steady_arrivals_has_a_wider_interval(first, again):
    faster = replace(again, fit=replace(again.fit, max_rate_per_s=1.5 * again.fit.rate()))
    found = [next(row for row in compared(first, side) if row.kind == RATE) for side in (again, faster)]
    widths = [float(np.diff(np.log1p(row.interval))[0]) for row in found]
    assert widths[1] - widths[0] == pytest.approx(2 * math.log(1.5), rel=0.2)
    assert found[1].finding == NOT_SHOWN


def test_counts_differ_only_where_the_rates_of_all_figures_together_do(first, slower):
    """Their own intervals are apart; what is not known of the two runs may be as much."""
    narrow, wide = (list(count_differences(first.plan, slower.plan, np.full(2, each))) for each in (0.0, 0.8))
    assert [row.finding for row in narrow] == [WORSE, WORSE] and [row.finding for row in wide] == [NOT_SHOWN] * 2
    assert all(own.interval[0] >= other.interval[0] for own, other in zip(narrow, wide, strict=True))
    (row, _) = count_differences(first.plan, slower.plan, np.array([np.inf, 0.1]))
    assert row.interval[1] is None


def test_counts_of_plans_with_other_terms_are_not_compared(first, slower):
    rows = list(count_differences(first.plan, slower.plan, np.zeros(2), "utilisation_cap"))
    assert {row.finding for row in rows} == {UNKNOWN} and {row.change for row in rows} == {None}
    assert rows[0].note == "the plans differ in utilisation_cap: so may their counts"


def test_counts_are_compared_at_common_targets_in_gpus_where_devices_have_several(first, slower):
    a, b = first.plan, replace(slower.plan, gpus_per_device=2, targets=slower.plan.targets[1:])
    (row,) = count_differences(a, b, np.zeros(2))
    assert (row.name, row.at, row.a, row.b) == ("GPUs", 40, a.targets[1].devices, 2 * b.targets[0].devices)
    unknown = replace(b, targets=(replace(b.targets[0], devices=None, interval=(None, None)),))
    (row,) = count_differences(a, unknown, np.zeros(2))
    assert row.finding == UNKNOWN and row.note == "no count is known in B"


@pytest.mark.parametrize(
    ("interval", "finding"),
    [
        ((0.1, 0.3), WORSE),
        ((-0.3, -0.1), BETTER),
        ((-0.1, 0.1), NOT_SHOWN),
        ((0, 0), NOT_SHOWN),
        ((None, 0.1), NOT_SHOWN),
    ],
)
def test_an_interval_without_zero_shows_a_difference(interval, finding):
    assert finding_of(interval) == finding
    other = {WORSE: BETTER, BETTER: WORSE}.get(finding, finding)
    assert finding_of(interval, less_is_better=False) == other
