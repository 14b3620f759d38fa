"""A day on static and elastic fleets: the rule and its schedule, what is counted, and closed forms."""

import math
from dataclasses import replace

import numpy as np
import pytest
from capacity_truth import MIX

from harness.capacity.fitting.rate_search import Limits, Traffic
from harness.capacity.models.device import Device
from harness.capacity.models.spreads import Sample, Spread
from harness.capacity.models.steps import StepTime
from harness.capacity.planning.day import DayStage, DayTerms, plan_day
from harness.capacity.planning.pools import Pools
from harness.capacity.planning.scaling import (
    ScalingTerms,
    autoscaler_of,
    expected_sessions,
    schedule_of,
    sessions_at_cap,
    with_schedule,
)
from harness.content import content_of, read
from harness.errors import InputError
from harness.records.day import PREDICTIVE, REACTIVE, STATIC, Day, DemandCurve, ScalingRule, ScheduledMinimum
from harness.records.plan import Drain, Plan, Price
from harness.records.slo import Slo
from harness.traffic.demand import DAY_S, diurnal

EXACT = Spread(Sample(1000, 1000.0, (1.0,) * 13), {})
DEVICE = Device(StepTime("linear", (0.012, 0.006)), 0.03, 2.5, EXACT, EXACT, {}, 30.0, ())
SLOS = tuple(
    Slo.parse(name, metric, limit)
    for name in ("short", "long")
    for metric, limit in (("ttfa_p95_s", 1.0), ("rtf_p95", 0.9))
)
PRICE = Price(device_type="one", price_per_device_hour=2.0, currency="EUR", basis="given")
DRAIN = Drain(sessions=4, p50_s=100.0, p95_s=200.0, longest_s=300.0)
RULE = ScalingRule(target_sessions_per_device=10.0, maximum=20)


@pytest.fixture(scope="module")
def pools():
    return Pools(DEVICE, Traffic.draw(MIX, np.random.default_rng(3)), Limits(SLOS, 30), 0.85)


@pytest.fixture(scope="module")
def curve(pools):
    """A day for four devices at its peak, and one at its trough; an hour long, so that it is simulated soon."""
    peak = 3.5 * pools.rate(4)[0] / 4
    return replace(diurnal(peak, 0.2 * peak), step_s=4 * 3600 / 288)


@pytest.fixture(scope="module")
def day(pools, curve):
    return plan_day(pools, MIX, curve, DayTerms(ScalingTerms(start_s=60.0), DRAIN, PRICE, gpus=2), seed=1)


# What a fleet needs over a day


def test_sessions_of_a_day_are_those_of_an_infinite_server_with_a_varying_rate():
    """For a cosine and equal lengths D: the integral of the rate over the last D seconds, in closed form."""
    curve, lasts_s, turn = diurnal(5.0, 1.0, peak_hour=0.0), 5400.0, 2 * math.pi / DAY_S
    at_s = np.arange(288) * 300.0
    expected = 3 * lasts_s + 2 * (np.sin(turn * at_s) - np.sin(turn * (at_s - lasts_s))) / turn
    assert expected_sessions(curve, np.array([lasts_s])) == pytest.approx(expected, rel=1e-3)


def test_sessions_at_a_constant_rate_are_those_of_littles_law():
    curve = DemandCurve(source="x", step_s=60.0, qps=(2.0,) * 60)
    lasts_s = np.array([3.0, 100.0, 5400.0])
    assert expected_sessions(curve, lasts_s) == pytest.approx(2.0 * lasts_s.mean())


def test_at_the_cap_a_device_holds_the_sessions_that_make_its_frames(pools):
    n = sessions_at_cap(pools, pools.rate(4)[0], 4)
    frames_per_s = pools.rate(4)[0] / 4 * pools.traffic.mean_frames
    assert float(pools.device.step_time.frames_per_s(n)) == pytest.approx(frames_per_s, rel=0.01)
    assert n < 18  # the limit of the SLOs


def test_a_schedule_has_its_devices_before_their_sessions_come():
    """60 sessions from 12:00 to 18:00, 5 otherwise: with 15 minutes to start, 6 devices from 11:30 on."""
    curve = DemandCurve(source="x", step_s=300.0, qps=(1.0,) * 288)
    hours = np.arange(288) / 12
    sessions = np.where((hours >= 12) & (hours < 18), 60.0, 5.0)
    rows = schedule_of(curve, sessions, replace(RULE, start_s=900.0))
    assert rows == tuple(ScheduledMinimum(at_s=at_s, devices=n) for at_s, n in ((0.0, 1), (41_400.0, 6), (64_800.0, 1)))


def test_a_schedule_stays_within_the_fleet():
    curve = DemandCurve(source="x", step_s=300.0, qps=(1.0,) * 288)
    rule = replace(RULE, minimum=2, maximum=5)
    assert with_schedule(rule, curve, np.full(288, 900.0)).schedule == (ScheduledMinimum(at_s=0.0, devices=5),)
    assert with_schedule(rule, curve, np.zeros(288)).schedule == (ScheduledMinimum(at_s=0.0, devices=2),)


def test_the_simulated_rule_is_the_stored_one():
    rule = replace(RULE, schedule=(ScheduledMinimum(at_s=0.0, devices=3), ScheduledMinimum(at_s=50_000.0, devices=7)))
    scaler = autoscaler_of(rule, seconds=DAY_S, phase_s=60_000.0)
    assert (scaler.target, scaler.high, scaler.low) == pytest.approx((10, 11, 9))
    assert (scaler.every_s, scaler.lag_s, scaler.stabilise_s, scaler.hold_s) == (30, 300, 300, 0)
    assert (scaler.least, scaler.most, scaler.recalls, scaler.newest) == (1, 20, False, True)
    assert [row for row in scaler.floors if row[0] <= 0][-1] == (-10_000.0, 7)
    assert (DAY_S - 60_000.0, 3) in scaler.floors and (DAY_S - 10_000.0, 7) in scaler.floors


def test_a_rule_has_room_for_draining_devices_and_a_maximum_that_is_possible():
    rule = ScalingTerms().rule(10.0, 4, DRAIN)
    assert (rule.maximum, rule.minimum, rule.drain_s) == (8, 1, 300.0)
    with pytest.raises(InputError, match="raise its maximum"):
        ScalingTerms(minimum=9, maximum=3).rule(10.0, 4)


# The day


def test_every_policy_meets_the_slos_and_the_elastic_ones_take_fewer_hours(day):
    static, reactive, predictive = (day.policy(name) for name in (STATIC, REACTIVE, PREDICTIVE))
    assert all(each.met for each in day.policies)
    assert static.devices == (static.most_devices,) * 144 and static.rule is None
    assert max(reactive.device_hours, predictive.device_hours) < 0.95 * static.device_hours
    assert predictive.worst_part >= 0.9


def test_hours_and_costs_follow_from_the_devices(day):
    static = day.policy(STATIC)
    assert static.device_hours == pytest.approx(static.most_devices * day.period_s / 3600)
    for each in day.policies:
        assert each.device_hours == pytest.approx(np.mean(each.devices) * day.period_s / 3600, rel=1e-3)
        assert each.cost == pytest.approx(2 * each.device_hours)
    assert day.currency == "EUR" and day.gpus_per_device == 2


def test_what_is_offered_is_the_demand(day, curve):
    assert day.requests == pytest.approx(curve.mean_qps * curve.period_s, rel=0.05)
    assert np.mean(day.offered_qps) == pytest.approx(curve.mean_qps, rel=0.05)
    assert np.argmax(np.convolve(day.offered_qps, np.ones(24), "same")) == pytest.approx(120, abs=15)  # 20:00


def test_the_rule_to_export_is_of_the_cheaper_policy_that_meets_every_slo(day):
    cheaper = min((day.policy(REACTIVE), day.policy(PREDICTIVE)), key=lambda each: each.device_hours)
    assert day.rule == cheaper.rule
    assert replace(day, policies=tuple(replace(each, met=False) for each in day.policies)).rule is None


def test_a_fleet_that_starts_too_slowly_loses_sessions_and_says_so(pools, curve):
    terms = DayTerms(ScalingTerms(start_s=1800.0, target_sessions=16.0, maximum=4))
    reactive = plan_day(pools, MIX, curve, terms, seed=1).policy(REACTIVE)
    assert not reactive.met and any(slo.met is False for slo in reactive.slos)
    assert reactive.worst_part < 0.9 and reactive.rejected > 0
    assert reactive.rule.target_sessions_per_device == 16.0 and reactive.most_devices <= 4


def test_a_day_without_a_valley_gains_nothing_and_says_so(pools):
    curve = DemandCurve(source="flat", step_s=60.0, qps=(0.8 * pools.rate(1)[0],) * 60)
    day = plan_day(pools, MIX, curve, DayTerms(), seed=1)
    assert "No elastic policy takes fewer hours" in day.note


def test_a_peak_that_no_fleet_carries_is_a_note(pools, curve):
    strict = pools.changed(limits=replace(pools.limits, slos=(Slo.parse("short", "ttfa_p95_s", 1e-6),)))
    day = plan_day(strict, MIX, curve, DayTerms(), seed=1)
    assert day.policies == () and "No number of devices" in day.note and day.rule is None


def test_the_same_seed_gives_the_same_day_and_a_stored_one_is_read(pools, curve, day):
    again = plan_day(pools, MIX, curve, DayTerms(ScalingTerms(start_s=60.0), DRAIN, PRICE, gpus=2), seed=1)
    assert again == day == read(Day, content_of(day))


def test_a_plan_without_a_day_is_stored_as_before(day):
    plan = Plan(
        verdict="met", reasons=(), unit="", confidence=0.95, deployment=None, slos=(), rate_per_device={}, targets=(),
        validation=(),
    )  # fmt: skip
    assert "day" not in content_of(plan)
    assert content_of(replace(plan, day=day))["day"]["source"] == day.source


def test_a_static_day_is_its_stage_alone(pools, curve):
    result = DayStage(pools, MIX, curve, seed=1).play(3)
    assert set(result.devices_up.tolist()) == {3.0}
