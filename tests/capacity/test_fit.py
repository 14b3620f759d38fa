"""Synthetic ladders of a device of known physics: does the fit find the physics, and the rate, again?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from capacity_truth import (
    ALPHA_S,
    LADDER,
    MIX,
    SLOS,
    TAU0_S,
    TRUTH,
    Truth,
    bare_fit,
    fit_of,
    ladder,
    plan_of,
    true_device,
)

from harness.capacity.fitting.fit import best_of, limits_of
from harness.capacity.fitting.rate_search import Limits, Traffic, highest_rate, judge_load, steady_draws, steady_limit
from harness.capacity.models.between_ladders import ALIKE
from harness.capacity.models.device import Device
from harness.capacity.models.memory import KvRoom
from harness.capacity.models.spreads import Spread, StallTable
from harness.capacity.models.steps import Rungs, fit_step_time
from harness.capacity.planning.prediction import predict_open_run
from harness.errors import InconclusiveError
from harness.records.slo import Slo


@pytest.fixture(scope="module")
def measured():
    return ladder(TRUTH, np.random.default_rng(10), LADDER, seconds=15)


@pytest.fixture(scope="module")
def fit(measured):
    return fit_of(measured)


# --- the physics


def test_the_step_time_is_found_again(fit):
    step = fit.deployments[0].step_time
    device = true_device()
    assert step.kind == "linear"
    assert step.intercept_s + 10 * step.slope_s == pytest.approx(float(device.step_time(10)), rel=0.03)
    assert step.max_sessions == pytest.approx(24, rel=0.01)
    assert all(point.low_s < point.step_s < point.high_s for point in step.points)


def test_the_service_time_of_every_stage_is_found_again(fit):
    stages = fit.deployments[0].stages
    assert [stage.stage for stage in stages] == ["vibevoice_llm_encoder", "diffusion_decoder", "neural_vocoder"]
    for stage in stages:
        assert (stage.alpha_s, stage.tau0_s) == pytest.approx((ALPHA_S, TAU0_S))
        assert [point.executions for point in stage.points] == [600] * 4


def test_first_audio_and_rtf_are_found_again(fit):
    deployment, truth = fit.deployments[0], true_device()
    audio = deployment.first_audio
    at_ten = audio.base_s + audio.steps * float(truth.step_time(10))
    assert at_ten == pytest.approx(2.5 * float(TRUTH.step_s(10)), rel=0.08)
    assert audio.starts == "inside the rungs"
    assert deployment.rtf.spread.quantiles["0.5"] == pytest.approx(float(truth.rtf.everyone.at(0.5)), rel=0.05)


def test_scaling_needs_six_rungs(fit, measured):
    assert fit.deployments[0].scaling.gamma == pytest.approx(1 / float(TRUTH.step_s(1)), rel=0.1)
    few = fit_of(ladder(TRUTH, np.random.default_rng(10), LADDER[:5]))
    assert "needs 6 different concurrencies" in few.deployments[0].scaling.inconclusive


def test_a_step_that_is_no_line_is_followed_from_rung_to_rung():
    sessions = np.array([1, 2, 4, 8, 16.0])
    step_s = np.array([0.02, 0.02, 0.02, 0.02, 0.09])
    fitted = fit_step_time(Rungs(sessions, step_s, np.zeros(5, int)), np.random.default_rng(0))
    assert fitted.step_time.kind == "piecewise"
    assert fitted.step_time(sessions) == pytest.approx(step_s)
    assert fitted.step_time(12) == pytest.approx(0.055)
    assert fitted.step_time(24) == pytest.approx(0.14)  # as steep as the last three together
    assert fitted.draws.shape == (200, 5)


def test_intervals_of_the_step_time_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(4)
    sessions, hits, n = np.array([1, 2, 4, 8, 16.0]), 0, 150
    for _ in range(n):
        noisy = TRUTH.step_s(sessions) * rng.normal(1, 0.02, 5)
        fitted = fit_step_time(Rungs(sessions, noisy, np.zeros(5, int)), rng, prior=ALIKE)
        low, high = np.quantile([float(each(12)) for each in fitted.alternatives()], [0.025, 0.975])
        hits += low <= TRUTH.step_s(12) <= high
    assert 0.89 <= hits / n <= 0.995


def test_more_trials_of_a_deployment_are_fitted_together(measured):
    again = ladder(TRUTH, np.random.default_rng(11), LADDER, name="ladder-2")
    both = fit_of(measured, again)
    assert len(both.deployments) == 1
    assert both.deployments[0].trial_ids == ("ladder-1", "ladder-2")
    assert len(both.deployments[0].step_time.points) == 12


# --- the rate of a device


def test_the_highest_rate_is_that_of_the_truth(fit):
    truth = true_device()
    traffic = Traffic.draw(MIX, np.random.default_rng(99))
    rate, binding = highest_rate(truth, traffic, Limits(SLOS, 24))
    found = fit.deployments[0]
    assert found.max_rate_per_s == pytest.approx(rate, rel=0.06)
    assert found.binding == binding == "rtf p95 of class short"
    assert found.max_rate_interval[0] < found.max_rate_per_s < found.max_rate_interval[1]


def test_just_above_the_highest_rate_a_slo_breaks(fit):
    found = fit.deployments[0]
    traffic = Traffic.draw(MIX, np.random.default_rng(fit.traffic_seed))
    device, limits = Device.from_fit(found), limits_of(found, SLOS, None, 1.0, traffic)
    assert judge_load(device, traffic, limits, found.max_rate_per_s, 1).met
    assert not judge_load(device, traffic, limits, found.max_rate_per_s * 1.03, 1).met


def test_a_large_pool_comes_near_the_steady_limit():
    truth, limits = true_device(), Limits(SLOS, 24)
    traffic = Traffic.draw(MIX, np.random.default_rng(3), 12_000)
    steady = steady_limit(truth, limits)[0] / traffic.mean_frames
    per_device = [highest_rate(truth, traffic, limits, devices)[0] / devices for devices in (1, 8, 64)]
    assert per_device[0] < 0.9 * per_device[1]
    assert per_device[1:] == pytest.approx([steady, steady], rel=0.05)


def test_traffic_has_the_means_of_the_mix():
    traffic = Traffic.draw(MIX, np.random.default_rng(0))
    assert traffic.frames.mean() == pytest.approx(MIX.mean_frames(), rel=0.01)
    assert np.mean(traffic.class_index) == pytest.approx(0.3, abs=0.001)
    part = traffic.part(1000)
    assert part.frames.mean() == pytest.approx(traffic.frames.mean())
    assert part.gaps.mean() == pytest.approx(1)


def test_the_best_deployment_is_the_one_with_the_highest_rate(measured):
    slower = ladder(Truth(slope_s=0.009), np.random.default_rng(5), LADDER, name="slow", deployment={"delay_us": 9})
    both = fit_of(slower, measured)
    rates = [each.max_rate_per_s for each in both.deployments]
    assert both.best == 1
    assert rates[1] > rates[0] > 0


def test_memory_may_bind(measured):
    tight = fit_of(measured, session_limit=2).deployments[0]
    free = fit_of(measured).deployments[0]
    assert 0 < tight.max_rate_per_s < free.max_rate_per_s
    assert tight.binding.startswith("ttfa")  # arrivals wait for a slot


def test_bytes_of_kv_caches_may_bind(measured):
    """Two sessions of the mean length fit: then arrivals wait, and what binds is said by its name."""
    free = fit_of(measured).deployments[0]
    traffic = Traffic.draw(MIX, np.random.default_rng(1))
    one = float(np.mean(KvRoom(1, 1000).bytes_of(traffic.whole_frames)))
    tight = fit_of(measured, kv=KvRoom(2.5 * one, 1000))
    found = tight.deployments[0]
    assert 0 < found.max_rate_per_s < 0.7 * free.max_rate_per_s
    assert found.binding == "KV memory"
    plan = plan_of(tight, measured, targets=(4,))
    assert plan.targets[0].binding == "KV memory"
    assert plan.targets[0].devices > plan_of(fit_of(measured), measured, targets=(4,)).targets[0].devices
    assert plan.memory.sessions == pytest.approx(2.5, rel=0.02)
    assert plan.memory.longest_sessions < 1.5


def test_a_device_that_holds_not_even_one_session_carries_nothing(measured):
    traffic = Traffic.draw(MIX, np.random.default_rng(1))
    one = float(np.mean(KvRoom(1, 1000).bytes_of(traffic.whole_frames)))
    found = fit_of(measured, kv=KvRoom(0.9 * one, 1000)).deployments[0]
    assert (found.max_rate_per_s, found.binding) == (0.0, "KV memory")


def test_each_instance_of_the_llm_has_room_of_its_own(measured):
    twice = (replace(measured[0], deployment={"vibevoice_llm_encoder.instances": 2}), measured[1])
    assert fit_of(twice, kv=KvRoom(1e6, 1000)).deployments[0].kv.instances == 2


def test_the_search_stays_inside_the_measured_range():
    short = fit_of(ladder(TRUTH, np.random.default_rng(10), (1, 2, 4), seconds=30))
    found = short.deployments[0]
    assert found.binding == "sessions per device, known up to 4"
    assert found.max_rate_per_s > 0


# --- parts


def test_a_device_without_a_fit_says_why():
    fit = fit_of(ladder(TRUTH, np.random.default_rng(1), (1, 4)))
    with pytest.raises(InconclusiveError, match="needs 3 rungs"):
        predict_open_run(fit.deployments[0], MIX, 0.1, 30, np.random.default_rng(0))


def test_stalls_are_known_up_to_the_slowest_step_that_was_measured():
    rng = np.random.default_rng(0)
    steps = rng.uniform(0.02, 0.2, 200)
    table = StallTable.measure(steps, np.maximum(steps - 0.13, 0))
    again = StallTable.of_record(table.record())
    assert again == table
    assert again.at(np.array([0.03]), 0.95) == pytest.approx(0, abs=1e-9)
    assert 0.02 < again.at(np.array([0.18]), 0.95)[0] < 0.08
    assert again.at(np.array([0.25]), 0.5) == np.inf


def test_a_stall_slo_can_bind(measured):
    stalls = (Slo("short", "stall_longest_s", 0.95, 0.03),)
    found = fit_of(measured, slos=stalls).deployments[0]
    assert found.binding == "longest stall p95 of class short"
    assert found.max_rate_per_s > 0


def test_classes_with_too_few_requests_share_the_spread_of_all():
    ratios = np.linspace(0.5, 1.5, 50)
    spread = Spread.measure(ratios, np.array(["short"] * 40 + ["long"] * 10))
    assert spread.of("short").count == 40
    assert spread.of("long").count == 50
    assert Spread.of_record(spread.record()) == spread


def test_draws_of_the_rate_spread_around_one(fit):
    found = fit.deployments[0]
    traffic = Traffic.draw(MIX, np.random.default_rng(fit.traffic_seed))
    device, limits = Device.from_fit(found), limits_of(found, SLOS, None, 1.0, traffic)
    shares = steady_draws(device, limits, np.random.default_rng(6)) / steady_limit(device, limits)[0]
    assert len(shares) == 200
    assert np.median(shares) == pytest.approx(1, abs=0.03)
    assert 0.003 < shares.std() < 0.2


@pytest.mark.parametrize(
    ("rates_and_ladders", "best"),
    [
        ([], None),
        ([(0.0, 1), (None, 1)], None),
        ([(1.0, 1), (3.0, 1), (2.0, 1)], 1),
        ([(1.0, 1), (1.9, 2), (2.0, 1)], 1),  # the second ladder of what looked best came out lower
        ([(2.1, 2), (1.9, 2), (2.5, 1)], 0),
        ([(2.0, 1), (0.0, 2), (1.0, 1)], 0),  # the second one showed that an SLO is violated at any rate
    ],
)
def test_the_best_deployment_is_one_of_those_measured_most(rates_and_ladders, best):
    fits = [bare_fit(max_rate_per_s=rate, trial_ids=("ladder",) * count) for rate, count in rates_and_ladders]
    assert best_of(fits) == best
