"""From synthetic ladders of a device of known physics to a plan, and everything that a plan must refuse."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from capacity_truth import ALPHA_S, MIX, TAU0_S, UNIT, Truth, ladder, open_run

from harness.capacity.device import Device
from harness.capacity.fit import fit_run, limits_of
from harness.capacity.plan import make_plan
from harness.capacity.predict import predict_open_run
from harness.capacity.search import Limits, Traffic, highest_rate, judge_load, steady_draws, steady_limit
from harness.capacity.spreads import Sample, Spread, StallTable
from harness.capacity.steps import Rungs, StepTime, fit_step_time
from harness.errors import InconclusiveError
from harness.slo import Promise

TRUTH = Truth()
LADDER = (1, 2, 4, 8, 16, 24)
PROMISES = (
    Promise("short", "ttfa_s", 0.95, 1.0),
    Promise("short", "rtf", 0.95, 0.9),
    Promise("long", "ttfa_s", 0.95, 1.5),
    Promise("long", "rtf", 0.95, 0.9),
)
OPTIONS = {
    "utilisation_cap": 0.85,
    "confidence": 0.95,
    "max_error": 0.25,
    "unit": UNIT,
    "preset": "tiny",
    "device": "cpu",
}


def true_device(truth: Truth = TRUTH) -> Device:
    """What a perfect fit would know: a session of x frames takes prefill + x steps, the frames alone count for RTF."""
    one = Spread(Sample.of(np.ones(100)))
    mean_frames = MIX.mean_frames()
    scale = 1 + truth.prefill / mean_frames
    step = StepTime("linear", (truth.intercept_s * scale, truth.slope_s * scale))
    rtf = Spread(Sample.of(np.full(100, 1 / scale)))
    return Device(step, 0.0, (truth.prefill + 1) / scale, one, rtf, {}, max(LADDER), ())


def fit_of(*measured, promises=PROMISES, seed=1, **options) -> dict:
    trials, frames = zip(*measured, strict=True)
    fit = fit_run(trials, pd.concat(frames), MIX, promises, np.random.default_rng(seed), UNIT, **options)
    return json.loads(json.dumps(fit, allow_nan=False))  # as the store would give it back


def plan_of(fit: dict, *measured, promises=PROMISES, targets=(0.5,), **options) -> dict:
    trials, frames = zip(*measured, strict=True)
    rng = np.random.default_rng(2)
    plan = make_plan(fit, trials, pd.concat(frames), MIX, promises, targets, rng, **(OPTIONS | options))
    return json.loads(json.dumps(plan, allow_nan=False))


def confirmed(fit: dict, truth: Truth, share: float, rng: np.random.Generator, **changes):
    """An open-loop run at a share of the highest rate, with its prediction."""
    best = fit["deployments"][fit["best"]]
    rate = share * best["max_rate_per_s"]
    prediction = json.loads(json.dumps(predict_open_run(best, MIX, rate, 30, rng), allow_nan=False))
    return open_run(truth, rate, rng, name=f"open-{share}", prediction=prediction, **changes)


@pytest.fixture(scope="module")
def measured():
    return ladder(TRUTH, np.random.default_rng(10), LADDER)


@pytest.fixture(scope="module")
def fit(measured):
    return fit_of(measured)


@pytest.fixture(scope="module")
def runs(fit):
    return [confirmed(fit, TRUTH, share, np.random.default_rng(20)) for share in (0.6, 0.8)]


@pytest.fixture(scope="module")
def plan(fit, measured, runs):
    return plan_of(fit, measured, *runs, targets=(0.5, 1, 5, 20))


# --- the physics


def test_the_step_time_is_found_again(fit):
    step = fit["deployments"][0]["step_time"]
    device = true_device()
    assert step["kind"] == "linear"
    assert step["intercept_s"] + 10 * step["slope_s"] == pytest.approx(float(device.step_time(10)), rel=0.03)
    assert step["max_sessions"] == pytest.approx(24, rel=0.01)
    assert all(point["low_s"] < point["step_s"] < point["high_s"] for point in step["points"])


def test_the_service_time_of_every_stage_is_found_again(fit):
    stages = fit["deployments"][0]["stages"]
    assert [stage["stage"] for stage in stages] == ["vibevoice_llm_encoder", "diffusion_decoder", "neural_vocoder"]
    for stage in stages:
        assert (stage["alpha_s"], stage["tau0_s"]) == pytest.approx((ALPHA_S, TAU0_S))
        assert [point["executions"] for point in stage["points"]] == [600] * 4


def test_first_audio_and_rtf_are_found_again(fit):
    deployment, truth = fit["deployments"][0], true_device()
    audio = deployment["first_audio"]
    at_ten = audio["base_s"] + audio["steps"] * float(truth.step_time(10))
    assert at_ten == pytest.approx(2.5 * float(TRUTH.step_s(10)), rel=0.08)
    assert audio["starts"] == "inside the rungs"
    assert deployment["rtf"]["spread"]["quantiles"]["0.5"] == pytest.approx(float(truth.rtf.everyone.at(0.5)), rel=0.05)


def test_scaling_needs_six_rungs(fit, measured):
    assert fit["deployments"][0]["scaling"]["gamma"] == pytest.approx(1 / float(TRUTH.step_s(1)), rel=0.1)
    few = fit_of(ladder(TRUTH, np.random.default_rng(10), LADDER[:5]))
    assert "needs 6 different concurrencies" in few["deployments"][0]["scaling"]["inconclusive"]


def test_a_step_that_is_no_line_is_followed_from_rung_to_rung():
    sessions = np.array([1, 2, 4, 8, 16.0])
    step_s = np.array([0.02, 0.02, 0.02, 0.02, 0.09])
    fitted = fit_step_time(Rungs(sessions, step_s, np.zeros(5, int)), np.random.default_rng(0))
    assert fitted.step_time.kind == "piecewise"
    assert fitted.step_time(sessions) == pytest.approx(step_s)
    assert fitted.step_time(12) == pytest.approx(0.055)
    assert fitted.step_time(24) > 0.15  # as steep as the last part
    assert fitted.draws.shape == (200, 5)


def test_intervals_of_the_step_time_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(4)
    sessions, hits, n = np.array([1, 2, 4, 8, 16.0]), 0, 150
    for _ in range(n):
        noisy = TRUTH.step_s(sessions) * rng.normal(1, 0.02, 5)
        fitted = fit_step_time(Rungs(sessions, noisy, np.zeros(5, int)), rng)
        low, high = np.quantile([float(each(12)) for each in fitted.alternatives()], [0.025, 0.975])
        hits += low <= TRUTH.step_s(12) <= high
    assert 0.89 <= hits / n <= 0.995


def test_more_trials_of_a_deployment_are_fitted_together(measured):
    again = ladder(TRUTH, np.random.default_rng(11), LADDER, name="ladder-2")
    both = fit_of(measured, again)
    assert len(both["deployments"]) == 1
    assert both["deployments"][0]["trial_ids"] == ["ladder-1", "ladder-2"]
    assert len(both["deployments"][0]["step_time"]["points"]) == 12


# --- the rate of a device


def test_the_highest_rate_is_that_of_the_truth(fit):
    truth = true_device()
    traffic = Traffic.draw(MIX, np.random.default_rng(99))
    rate, binding = highest_rate(truth, traffic, Limits(PROMISES, 24))
    found = fit["deployments"][0]
    assert found["max_rate_per_s"] == pytest.approx(rate, rel=0.06)
    assert found["binding"] == binding == "rtf p95 of class short"
    assert found["max_rate_interval"][0] < found["max_rate_per_s"] < found["max_rate_interval"][1]


def test_just_above_the_highest_rate_a_promise_breaks(fit):
    found = fit["deployments"][0]
    device, limits = Device.from_fit(found), limits_of(found, PROMISES, None, 1.0)
    traffic = Traffic.draw(MIX, np.random.default_rng(fit["traffic_seed"]))
    assert judge_load(device, traffic, limits, found["max_rate_per_s"], 1).kept
    assert not judge_load(device, traffic, limits, found["max_rate_per_s"] * 1.03, 1).kept


def test_a_large_pool_comes_near_the_steady_limit():
    truth, limits = true_device(), Limits(PROMISES, 24)
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
    rates = [each["max_rate_per_s"] for each in both["deployments"]]
    assert both["best"] == 1
    assert rates[1] > rates[0] > 0


def test_memory_may_bind(measured):
    tight = fit_of(measured, session_limit=2)["deployments"][0]
    free = fit_of(measured)["deployments"][0]
    assert 0 < tight["max_rate_per_s"] < free["max_rate_per_s"]
    assert tight["binding"].startswith("ttfa")  # arrivals wait for a slot


def test_the_search_stays_inside_the_measured_range():
    short = fit_of(ladder(TRUTH, np.random.default_rng(10), (1, 2, 4), seconds=30))
    found = short["deployments"][0]
    assert found["binding"] == "sessions per device, known up to 4"
    assert found["max_rate_per_s"] > 0


# --- predictions


def test_a_prediction_names_its_figures_as_a_summary_does(fit, runs):
    trial, _ = runs[0]
    for key in ("sessions", "frames_per_s", "step_s", "short.ttfa_p95_s", "long.rtf_p50", "short.stall_p95_s"):
        assert key in trial.prediction
        assert key in trial.rungs[0].summary
    assert trial.prediction["frames_per_s"] == pytest.approx(trial.load["rate_per_s"] * MIX.mean_frames(), rel=0.03)
    assert trial.prediction["step_s"] == pytest.approx(trial.prediction["sessions"] / trial.prediction["frames_per_s"])


def test_validation_compares_what_the_window_shows(plan):
    rows = plan["validation"]
    assert {row["trial_id"] for row in rows} == {"open-0.6", "open-0.8"}
    assert {"step_s", "sessions", "frames_per_s"} <= {row["metric"] for row in rows}
    for row in rows:
        assert row["relative_error"] == pytest.approx((row["predicted"] - row["measured"]) / row["measured"])
        assert row["passed"]
        assert row["limit"] >= 0.25
    steps = [row for row in rows if row["metric"] == "step_s"]
    assert all(abs(row["relative_error"]) < 0.05 and row["limit"] == 0.25 for row in steps)


# --- the plan


def test_the_plan_is_met_and_its_counts_are_those_of_the_truth(plan):
    assert plan["verdict"] == "met"
    assert plan["reasons"] == []
    truth, limits = true_device(), Limits(PROMISES, 24)
    traffic = Traffic.draw(MIX, np.random.default_rng(77), 8000)
    steady = steady_limit(truth, limits)[0] / traffic.mean_frames
    for target in plan["targets"]:
        qps = target["qps"]
        fewest = next(
            n
            for n in range(int(qps / steady) + 1, 100)
            if qps <= 0.85 * n * steady and judge_load(truth, traffic, limits, qps, n).kept
        )
        assert target["interval"][0] <= fewest <= target["interval"][1], target
        assert abs(target["devices"] - fewest) <= max(1, 0.05 * fewest)


def test_every_target_holds_together(plan):
    for target in plan["targets"]:
        assert target["interval"][0] <= target["devices"] <= target["interval"][1]
        assert target["devices_n_plus_1"] == target["devices"] + 1
        assert target["devices_n_plus_2"] == target["devices"] + 2
        assert 0 < target["utilisation"] <= 0.85
        assert target["headroom_qps"] >= 0
        assert target["basis"] == "measured"
        assert target["binding"]
    counts = [target["devices"] for target in plan["targets"]]
    assert counts == sorted(counts)
    assert plan["drain"]["p50_s"] < plan["drain"]["p95_s"]


def test_a_lower_utilisation_cap_asks_for_more_devices(fit, measured, plan):
    careful = plan_of(fit, measured, targets=(20,), utilisation_cap=0.5)
    assert careful["targets"][0]["devices"] > 1.5 * plan["targets"][-1]["devices"]
    assert careful["targets"][0]["utilisation"] <= 0.5


def test_the_same_seed_gives_the_same_plan(fit, measured, runs):
    assert plan_of(fit, measured, runs[0]) == plan_of(fit, measured, runs[0])
    assert fit_of(measured) == fit


def test_hundreds_of_devices_are_planned_without_simulating_them_all(fit, measured):
    target = plan_of(fit, measured, targets=(400,))["targets"][0]
    rate = 0.85 * 20 / 34  # about what a device carries in the plan above
    assert target["devices"] == pytest.approx(400 / rate, rel=0.25)


# --- refusals


def test_too_few_rungs_are_inconclusive():
    short = ladder(TRUTH, np.random.default_rng(1), (1, 4))
    fit = fit_of(short)
    assert fit["best"] is None
    assert "needs 3 rungs" in fit["deployments"][0]["inconclusive"]
    plan = plan_of(fit, short)
    assert plan["verdict"] == "inconclusive"
    assert "measure a longer ladder" in plan["reasons"][0]
    assert plan["targets"][0]["devices"] is None


def test_invalid_trials_are_named_and_never_fitted(measured):
    trial, rows = measured
    invalid = replace(trial, valid=False, reasons=("the recorder lost 3 requests",))
    fit = fit_of((invalid, rows))
    assert fit["deployments"][0]["trial_ids"] == []
    assert fit["deployments"][0]["max_rate_per_s"] is None
    plan = plan_of(fit, (invalid, rows))
    assert plan["verdict"] == "inconclusive"
    assert any("ladder-1" in reason and "lost 3 requests" in reason for reason in plan["reasons"])


def test_a_broken_rung_is_left_out_and_named(measured):
    trial, rows = measured
    dead = replace(trial.rungs[2], frames_per_s=float("nan"))
    fit = fit_of((replace(trial, rungs=(*trial.rungs[:2], dead, *trial.rungs[3:])), rows))
    assert fit["deployments"][0]["max_rate_per_s"] > 0
    assert "rung 3" in fit["excluded"][0]["reasons"][0]


def test_a_promise_that_one_session_breaks_is_missed(measured):
    promises = (*PROMISES, Promise("short", "rtf", 0.95, 0.05))
    fit = fit_of(measured, promises=promises)
    assert fit["deployments"][0]["max_rate_per_s"] == 0
    assert fit["best"] is None
    plan = plan_of(fit, measured, promises=promises)
    assert plan["verdict"] == "missed"
    assert "not even one session" in plan["reasons"][0]
    assert plan["rate_per_device"]["value"] == 0
    assert plan["targets"][0]["binding"] == "rtf p95 of class short"


def test_a_model_that_fails_its_validation_is_inconclusive(fit, measured):
    other = confirmed(fit, Truth(intercept_s=0.03, slope_s=0.012), 0.7, np.random.default_rng(30))
    plan = plan_of(fit, measured, other)
    assert plan["verdict"] == "inconclusive"
    assert any("step_s missed the open-loop trial open-0.7" in reason for reason in plan["reasons"])
    assert not all(row["passed"] for row in plan["validation"])
    assert plan["targets"][0]["devices"] >= 1  # the counts are shown, and not signed


def test_without_a_confirmation_a_plan_is_inconclusive(fit, measured, runs):
    assert "No VALID open-loop run confirms" in plan_of(fit, measured)["reasons"][0]
    invalid = replace(runs[0][0], valid=False, reasons=("3% of sends were late",))
    assert plan_of(fit, measured, (invalid, runs[0][1]))["verdict"] == "inconclusive"
    blind = replace(runs[0][0], prediction=None)
    assert any("without a prediction" in reason for reason in plan_of(fit, measured, (blind, runs[0][1]))["reasons"])


def test_an_extrapolated_count_is_not_signed(runs):
    short = ladder(TRUTH, np.random.default_rng(10), (1, 2, 4), seconds=30)
    fit = fit_of(short, extrapolation=3.0)
    own = confirmed(fit, TRUTH, 0.5, np.random.default_rng(8))
    plan = plan_of(fit, short, own, targets=(5,))
    assert plan["targets"][0]["basis"] == "extrapolated"
    assert plan["verdict"] == "inconclusive"
    assert any("add a rung at" in reason for reason in plan["reasons"])


def test_promises_that_nothing_carries_are_refused(measured):
    for promise, words in (
        (Promise("job", "rtf", 0.95, 0.9), "which the mix lacks"),
        (Promise("short", "rtf", 0.999, 0.9), "needs 1000 measured requests"),
    ):
        assert words in fit_of(measured, promises=(promise,))["deployments"][0]["inconclusive"]


def test_no_trial_at_all_is_inconclusive(measured):
    fit = fit_run([], measured[1], MIX, PROMISES, np.random.default_rng(0), UNIT)
    plan = make_plan(fit, [], measured[1], MIX, PROMISES, (1,), np.random.default_rng(0), **OPTIONS)
    assert plan["verdict"] == "inconclusive"
    assert plan["reasons"] == ["No ladder was measured: run the sweep."]


# --- parts


def test_a_device_without_a_fit_says_why():
    fit = fit_of(ladder(TRUTH, np.random.default_rng(1), (1, 4)))
    with pytest.raises(InconclusiveError, match="needs 3 rungs"):
        predict_open_run(fit["deployments"][0], MIX, 0.1, 30, np.random.default_rng(0))


def test_stalls_are_known_up_to_the_slowest_step_that_was_measured():
    rng = np.random.default_rng(0)
    steps = rng.uniform(0.02, 0.2, 200)
    table = StallTable.measure(steps, np.maximum(steps - 0.13, 0))
    again = StallTable.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again == table
    assert again.at(np.array([0.03]), 0.95) == pytest.approx(0, abs=1e-9)
    assert 0.02 < again.at(np.array([0.18]), 0.95)[0] < 0.08
    assert again.at(np.array([0.25]), 0.5) == np.inf


def test_a_stall_promise_can_bind(measured):
    stalls = (Promise("short", "stall_longest_s", 0.95, 0.03),)
    found = fit_of(measured, promises=stalls)["deployments"][0]
    assert found["binding"] == "longest stall p95 of class short"
    assert found["max_rate_per_s"] > 0


def test_classes_with_too_few_requests_share_the_spread_of_all():
    ratios = np.linspace(0.5, 1.5, 50)
    spread = Spread.measure(ratios, np.array(["short"] * 40 + ["long"] * 10))
    assert spread.of("short").count == 40
    assert spread.of("long").count == 50
    assert Spread.from_dict(json.loads(json.dumps(spread.to_dict()))) == spread


def test_draws_of_the_rate_spread_around_one(fit):
    found = fit["deployments"][0]
    shares = steady_draws(Device.from_fit(found), limits_of(found, PROMISES, None, 1.0), np.random.default_rng(6))
    assert len(shares) == 200
    assert np.median(shares) == pytest.approx(1, abs=0.03)
    assert 0.003 < shares.std() < 0.2
