"""A day on static and elastic fleets: the rule and its schedule, what is counted, and closed forms."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from capacity_truth import MIX
from scipy import stats

from harness.capacity.fitting.rate_search import Limits, Traffic
from harness.capacity.models.device import Device
from harness.capacity.models.spreads import Sample, Spread
from harness.capacity.models.steps import StepTime
from harness.capacity.planning.day import DayStage, DayTerms, _met, _not_counted, _slo_of_day, plan_day
from harness.capacity.planning.pools import Pools
from harness.capacity.planning.scaling import (
    ScalingTerms,
    autoscaler_of,
    expected_sessions,
    schedule_of,
    sessions_at_cap,
    with_schedule,
)
from harness.capacity.simulator.engine import Counting, SimulationEngine, arrivals_of
from harness.capacity.simulator.pool import Pool
from harness.capacity.simulator.results import MetricBins, result_of
from harness.capacity.simulator.structures import BINS
from harness.content import content_of, read
from harness.errors import InputError
from harness.records.day import PREDICTIVE, REACTIVE, STATIC, Day, DemandCurve, ScalingRule, ScheduledMinimum
from harness.records.plan import Drain, Plan, Price
from harness.records.slo import Slo
from harness.traffic.demand import DAY_S, diurnal
from harness.traffic.mix import Lengths, Mix, TrafficClass

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
    assert reactive.rule.target_sessions_per_device == 16.0


def test_the_maximum_counts_devices_that_serve_or_start_and_others_drain_beside_them():
    """Two devices hold four sessions; two of these end, one device drains; three more come: a third device starts."""
    rows = sorted([(0.1, 100), (0.2, 9000), (0.3, 9000), (0.4, 100), (200.0, 9000), (200.1, 9000), (200.2, 9000)])
    arrivals = arrivals_of(*map(np.array, zip(*[(at_s, float(frames)) for at_s, frames in rows], strict=True)))
    scaler = autoscaler_of(
        ScalingRule(target_sessions_per_device=2.0, start_s=0.0, stabilisation_s=0.0, poll_s=20.0, maximum=2), 600.0
    )
    most = {}
    for places in (2, scaler.places):
        pool = Pool(2, lambda n: 0.1 + 0 * n, autoscaler=replace(scaler, places=places), routing="least_loaded")
        engine = SimulationEngine(pool, Counting(("one",), 600.0, 0.0, 60, 1))
        engine.feed(arrivals, last=True, stop_s=600.0)
        result = result_of(engine.arrays, ["one"], [0], 10.0)
        most[places] = (result.devices_up[30:40].max(), result.most_owned.max())
    assert most == {2: (1, 2), 8: (2, 3)}


def test_a_day_settles_for_as_long_as_its_sessions_and_drains_last(pools):
    """An hour with sessions of 90 minutes: six parts of it are 15 minutes."""
    long = Mix("long", (TrafficClass("long", 1.0, Lengths.parse({"fixed": 5400})),))
    curve = DemandCurve(source="x", step_s=60.0, qps=(1.0,) * 60)
    stage = DayStage(pools, long, curve, 1, ScalingTerms(start_s=900.0, stabilisation_s=600.0))
    assert stage.longest_s == pytest.approx(5400, abs=1)
    assert stage.warm_parts * stage.part_s == pytest.approx(2 * 5400 + 900 + 600, abs=stage.part_s)
    assert 0 <= stage.phase_s < 3600
    assert DayStage(pools, MIX, diurnal(1.0, 0.5), 1).warm_parts == 6


def parts_of(inside, arrived, slo):
    """A class of which so many sessions of each part were within the SLO."""
    metric = MetricBins(np.zeros((24, BINS), np.int64), np.zeros(24))
    metric.bins[:, 500], metric.bins[:, -1] = inside, np.array(arrived) - inside
    windows = np.zeros((24, 6), np.int64)
    windows[:, 0] = arrived
    return {slo.traffic_class: SimpleNamespace(arrived=windows.ravel(), **{slo.metric: metric})}


def test_parts_are_judged_together_so_that_chance_seldom_fails_one():
    """16 of 20 is 1.6% likely at 95%: in one of 24 parts that is no violation, and 10 of 20 is."""
    slo, alpha = Slo.parse("short", "rtf_p95", 0.9), 0.05 / 24
    chance, low = ([few, *[20] * 23] for few in (16, 10))
    assert _slo_of_day(slo, parts_of(chance, [20] * 24, slo), alpha).met is True
    assert _slo_of_day(slo, parts_of(low, [20] * 24, slo), alpha).met is False
    rng = np.random.default_rng(5)
    failed = [np.any(stats.binom.cdf(rng.binomial(200, 0.95, 24), 200, 0.95) < alpha) for _ in range(2000)]
    assert np.mean(failed) <= 0.06


def test_slos_on_stalls_alone_are_not_said_to_be_met(pools):
    silent = pools.changed(limits=replace(pools.limits, slos=(Slo("short", "stall_longest_s", 0.95, 0.1),)))
    assert _met(()) is None
    notes = " ".join(_not_counted(silent.limits.slos))
    assert "SLOs on stalls are not counted" in notes and "not known" in notes
    assert list(_not_counted(SLOS)) == []


def test_a_rule_is_chosen_on_one_day_and_all_are_judged_on_another(pools, curve, monkeypatch):
    seen, play = [], DayStage.play

    def watched(stage, devices, rule=None):
        seen.append((stage.seed, rule.target_sessions_per_device if rule else None))
        return play(stage, devices, rule)

    monkeypatch.setattr(DayStage, "play", watched)
    day = plan_day(pools, MIX, curve, DayTerms(ScalingTerms(start_s=60.0)), seed=1)
    judged = [target for seed, target in seen if seed == (1, 1)]
    assert judged == [None, *(day.policy(name).rule.target_sessions_per_device for name in (REACTIVE, PREDICTIVE))]
    assert {seed for seed, _ in seen} == {(1, 0), (1, 1)} and len(seen) > len(judged)


def test_the_most_devices_are_those_of_any_time(day):
    for each in day.policies:
        assert each.most_devices >= max(each.devices) - 1e-3


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
