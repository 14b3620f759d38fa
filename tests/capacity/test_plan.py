"""From synthetic ladders of a device of known physics to a plan, and everything that a plan must refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from capacity_truth import (
    LADDER,
    MIX,
    OPTIONS,
    SLOS,
    TRUTH,
    UNIT,
    Truth,
    bare_fit,
    confirmed,
    fit_of,
    fit_with,
    ladder,
    open_run,
    plan_of,
    result,
    true_device,
)

from harness.capacity.fitting.fit import fit_run
from harness.capacity.fitting.observations import MeasuredRequests, observe
from harness.capacity.fitting.rate_search import Limits, Traffic, judge_load, steady_limit
from harness.capacity.models.device import Device
from harness.capacity.planning import confirmation
from harness.capacity.planning.plan import Terms, make_plan
from harness.capacity.planning.prediction import predict_open_run, sealed
from harness.capacity.planning.remarks import not_told_apart
from harness.capacity.planning.validation import ComparedFigure, _Replay, _row, validate
from harness.records.metrics import in_window, per_request, summarise
from harness.records.plan import Plan
from harness.records.prediction import Prediction
from harness.records.schema import Rung
from harness.records.slo import Slo, sample_quantile


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


# --- predictions


def test_a_prediction_names_its_figures_as_a_summary_does(fit, runs):
    trial, _ = runs[0]
    for key in ("sessions", "frames_per_s", "step_s", "short.ttfa_p95_s", "long.rtf_p50", "short.stall_p95_s"):
        assert trial.prediction.figure(key) is not None
        assert key in trial.rungs[0].summary.to_dict()
    assert trial.prediction.frames_per_s == pytest.approx(trial.load.rate_per_s * MIX.mean_frames(), rel=0.03)
    assert trial.prediction.step_s == pytest.approx(trial.prediction.sessions / trial.prediction.frames_per_s)


def test_validation_compares_what_the_window_shows(plan):
    rows = plan.validation
    assert {row.trial_id for row in rows} == {"open-0.6", "open-0.8"}
    assert {"step_s", "sessions", "frames_per_s"} <= {row.metric for row in rows}
    for row in rows:
        assert row.relative_error == pytest.approx((row.predicted - row.measured) / row.measured)
        assert row.passed is (True if row.limit == 0.25 else None)
        assert row.limit >= 0.25
    steps = [row for row in rows if row.metric == "step_s"]
    assert all(abs(row.relative_error) < 0.05 and row.limit == 0.25 for row in steps)


def test_a_quantile_that_summaries_do_not_have_is_compared_too(fit, measured, runs):
    """p80: first audio of those due in the window; RTF between the median and p95 of its summary."""
    raw: list = []
    trial, requests = confirmed(fit, TRUTH, 0.8, np.random.default_rng(20), results=raw)
    window, short = trial.rungs[0], requests[requests["traffic_class"] == "short"]
    seen = in_window(raw, window.start_ns, window.end_ns).assign(trial_id=trial.trial_id)
    slos = (Slo("short", "ttfa_s", 0.8, 1.0), Slo("short", "rtf", 0.8, 0.9), *SLOS)
    plan = plan_of(fit, measured, (trial, requests), slos=slos, in_windows=seen)
    rows = {row.metric: row for row in plan.validation}
    due = short[(short["due_ns"] >= window.start_ns) & (short["due_ns"] < window.end_ns)]
    assert rows["ttfa p80 of class short"].measured == sample_quantile(due["ttfa_s"], 0.8)
    own = window.summary.classes["short"]
    assert own.rtf_p50 <= rows["rtf p80 of class short"].measured <= own.rtf_p95
    for metric in ("ttfa", "rtf"):
        row, median = rows[f"{metric} p80 of class short"], rows[f"{metric} p50 of class short"]
        assert row.predicted >= median.predicted and row.passed is not False and row.predicted_in_advance is None
    without = {row.metric for row in plan_of(fit, measured, (trial, requests), slos=slos).validation}
    assert set(rows) - without == {"rtf p80 of class short"}  # of whole requests it would be another figure


def test_what_a_stream_did_before_the_window_is_not_measured_in_it():
    """Ten streams at 0.2 s a frame, with a gap of 3 s, until the window opens at 20 s; then at 0.1 s a frame.

    In the window each has RTF 0.75, and plays on without a stall; a whole stream's RTF and stall are above 1.
    """
    times_s = np.concatenate([np.arange(5, 12, 0.2), np.arange(15, 20, 0.2), np.arange(19.9, 59.9, 0.1)])
    raw = [result(str(n), "short", len(times_s) + 1, times_s, 4.9, 60.0) for n in range(10)]
    window = 20 * 10**9, 60 * 10**9
    summary = summarise(raw, *window)
    rung = Rung(summary.sessions, summary.frames_per_s, *window, summary)
    whole, seen = per_request(raw), in_window(raw, *window)
    assert whole["rtf"].min() > 0.8 and whole["stall_longest_s"].min() > 1
    replay = _Replay.of(whole, rung, seen)
    for metric, value in (("rtf", 0.75), ("stall_longest_s", 0.0)):
        measured = [replay.measured(Slo("short", metric, each, 0.9), each) for each in (0.5, 0.8, 0.9, 0.95)]
        assert measured == pytest.approx([value] * 4, rel=0.01)


def test_validation_tells_what_was_predicted_in_advance_from_what_the_arrivals_make_of_it(plan, runs):
    trial, _ = runs[1]
    rows = {row.metric: row for row in plan.validation if row.trial_id == trial.trial_id}
    keys = {"sessions": "sessions", "step_s": "step_s", "rtf p50 of class short": "short.rtf_p50"}
    for metric, key in keys.items():
        assert rows[metric].predicted_in_advance == trial.prediction.figure(key) != rows[metric].predicted


def test_a_figure_that_the_prediction_does_not_name_has_nothing_predicted_in_advance(fit, measured, runs):
    trial, rows = runs[1]
    silent = replace(trial, prediction=replace(trial.prediction, classes={}))
    said = {row.metric: row.predicted_in_advance for row in plan_of(fit, measured, (silent, rows)).validation}
    assert {name for name, value in said.items() if value is not None} == {"sessions", "frames_per_s", "step_s"}
    assert len(said) > 3


def test_each_open_run_gives_the_audio_that_it_was_offered_beside_the_nominal(plan, runs):
    for run, (trial, _) in zip(plan.open_runs, runs, strict=True):
        assert run.trial_id == trial.trial_id
        assert run.offered_audio_s_per_s == trial.rungs[0].summary.offered_audio_s_per_s
        assert run.nominal_audio_s_per_s == pytest.approx(trial.load.rate_per_s * MIX.mean_frames() / 7.5)
        assert run.passed and run.own and len(run.slos) == len(SLOS)


def test_what_chance_explains_is_no_proof_and_what_it_does_not_is_a_failure(runs):
    trial, _ = runs[0]
    figure = ComparedFigure("rtf p95 of class short", "short.rtf_p95", 0.7, SLOS[1], 0.95)
    narrow, wide = np.linspace(0.65, 0.75, 200), np.linspace(0.35, 1.2, 200)
    assert _row(trial, figure, 0.7, narrow, 0.95, 0.25).passed is True
    assert _row(trial, figure, 0.7, wide, 0.95, 0.25).passed is None
    assert _row(trial, figure, 2.1, 3 * wide, 0.95, 0.25).passed is False
    harmless = replace(figure, measured=0.07)
    assert _row(trial, harmless, 0.2, narrow / 3.5, 0.95, 0.25).passed is True
    assert _row(trial, harmless, 0.2, wide / 3.5, 0.95, 0.25).passed is None


def test_sessions_that_an_allowed_error_of_the_step_time_explains_are_no_failure(fit, runs):
    """Steps a third longer give more sessions than the limit allows; more with steps as predicted are a failure."""

    def judged(truth, crowd=1.0):
        trial, requests = confirmed(fit, truth, 0.8, np.random.default_rng(20))
        rung = replace(trial.rungs[0], sessions=crowd * trial.rungs[0].sessions)
        arguments = replace(trial, rungs=(rung,)), requests, SLOS, np.random.default_rng(1)
        return {row.metric: row for row in validate(*arguments, confidence=0.95, max_error=0.25)}

    slower = judged(replace(TRUTH, intercept_s=1.32 * TRUTH.intercept_s, slope_s=1.32 * TRUTH.slope_s))
    assert slower["step_s"].passed and abs(slower["sessions"].relative_error) > 0.25
    assert slower["sessions"].passed is True and "at the step time measured" in slower["sessions"].note
    for crowd in (1.5, 0.6):
        row = judged(TRUTH, crowd)["sessions"]
        assert row.passed is False and abs(row.relative_error) > 0.25


def test_a_prediction_counts_as_it_was_made_before_the_run(fit, measured, runs):
    trial, rows = runs[0]
    started = replace(trial, started_at="2026-01-01T10:00:00+00:00")
    early = sealed(trial.prediction, "2026-01-01T09:59:59+00:00")
    first = plan_of(fit, measured, (replace(started, prediction=early), rows)).validation[0]
    assert (first.said_at, first.prediction_sha256) == (early.made_at, early.sha256)

    late = sealed(trial.prediction, "2026-01-01T10:00:01+00:00")
    changed = Prediction.of(early.to_dict() | {"sessions": 1.01 * early.sessions})
    for prediction, why in ((late, "after it had started"), (changed, "its hash differs")):
        plan = plan_of(fit, measured, (replace(started, prediction=prediction), rows))
        assert plan.verdict == "inconclusive" and plan.validation == ()
        assert any(why in reason for reason in plan.reasons)


# --- the plan


def test_the_plan_is_met_and_its_counts_are_those_of_the_truth(plan):
    assert plan.verdict == "met"
    assert all(reason.startswith("Pooled: fewer than 20 requests of class") for reason in plan.reasons)
    truth, limits = true_device(), Limits(SLOS, 24)
    traffic = Traffic.draw(MIX, np.random.default_rng(77), 8000)
    steady = steady_limit(truth, limits)[0] / traffic.mean_frames
    for target in plan.targets:
        qps = target.qps
        fewest = next(
            n
            for n in range(int(qps / steady) + 1, 100)
            if qps <= 0.85 * n * steady and judge_load(truth, traffic, limits, qps, n).met
        )
        assert target.interval[0] <= fewest <= target.interval[1], target
        assert abs(target.devices - fewest) <= max(1, 0.05 * fewest)


def test_every_target_holds_together(plan):
    for target in plan.targets:
        assert target.interval[0] <= target.devices <= target.interval[1]
        assert target.devices_n_plus_1 >= target.devices + 1
        assert target.devices_n_plus_2 >= target.devices + 2
        assert [loss.lost for loss in target.losses if loss.devices > target.devices] == [1, 2]
        assert 0 < target.utilisation <= 0.85
        assert target.headroom_qps >= 0
        assert target.binding
    counts = [target.devices for target in plan.targets]
    assert counts == sorted(counts)
    assert plan.drain.p50_s < plan.drain.p95_s


def test_a_lower_utilisation_cap_asks_for_more_devices(fit, measured, plan):
    careful = plan_of(fit, measured, targets=(20,), utilisation_cap=0.5)
    assert careful.targets[0].devices > 1.5 * plan.targets[-1].devices
    assert careful.targets[0].utilisation <= 0.5


def test_the_same_seed_gives_the_same_plan(fit, measured, runs):
    assert plan_of(fit, measured, runs[0]) == plan_of(fit, measured, runs[0])
    assert fit_of(measured) == fit


def test_hundreds_of_devices_are_planned_without_simulating_them_all(fit, measured):
    target = plan_of(fit, measured, targets=(400,)).targets[0]
    rate = 0.85 * 20 / 34  # about what a device carries in the plan above
    assert target.devices == pytest.approx(400 / rate, rel=0.25)


def test_measured_is_one_device_at_a_rate_that_a_run_confirmed(fit, measured, runs):
    rate = runs[1][0].load.rate_per_s
    targets = (0.99 * rate, 1.01 * rate, 5)

    def bases(*more):
        planned = plan_of(fit, measured, *more, targets=targets).targets
        assert [target.devices == 1 for target in planned] == [True, True, False]
        return [target.basis for target in planned]

    assert bases(*runs) == ["measured", "simulated", "simulated"]
    assert bases(runs[0]) == ["simulated"] * 3
    assert bases(runs[0], (replace(runs[1][0], valid=False), runs[1][1])) == ["simulated"] * 3


# --- refusals


def test_too_few_rungs_are_inconclusive():
    short = ladder(TRUTH, np.random.default_rng(1), (1, 4))
    fit = fit_of(short)
    assert fit.best is None
    assert "needs 3 rungs" in fit.deployments[0].inconclusive
    plan = plan_of(fit, short)
    assert plan.verdict == "inconclusive"
    assert "measure a longer ladder" in plan.reasons[0]
    assert plan.targets[0].devices is None


def test_invalid_trials_are_named_and_never_fitted(measured):
    trial, rows = measured
    invalid = replace(trial, valid=False, reasons=("the recorder lost 3 requests",))
    fit = fit_of((invalid, rows))
    assert fit.deployments[0].trial_ids == ()
    assert fit.deployments[0].max_rate_per_s is None
    plan = plan_of(fit, (invalid, rows))
    assert plan.verdict == "inconclusive"
    assert any("ladder-1" in reason and "lost 3 requests" in reason for reason in plan.reasons)


def test_a_broken_rung_is_left_out_and_named(measured):
    trial, rows = measured
    dead = replace(trial.rungs[2], frames_per_s=float("nan"))
    fit = fit_of((replace(trial, rungs=(*trial.rungs[:2], dead, *trial.rungs[3:])), rows))
    assert fit.deployments[0].max_rate_per_s > 0
    assert "rung 3" in fit.excluded[0].reasons[0]


def test_a_disturbed_rung_and_its_requests_are_left_out_and_named(measured):
    trial, rows = measured
    why = "others took 0.60 of 2 cores: about 0.56 were missing (backup, process 7, took 0.60)"
    spoilt = replace(trial.rungs[2], disturbed=why, frames_per_s=trial.rungs[2].frames_per_s / 2)
    left = (*trial.rungs[:2], *trial.rungs[3:])
    disturbed = replace(trial, rungs=left, disturbed=(spoilt,))
    fit = fit_of((disturbed, rows))
    assert [point.sessions for point in fit.deployments[0].step_time.points] == [rung.sessions for rung in left]
    assert fit.excluded[0].reasons == (f"the rung of {spoilt.sessions:.3g} sessions: {why}",)
    repeated = replace(trial, disturbed=(replace(spoilt, repeated=True),))
    assert fit_of((repeated, rows)).excluded == ()
    step_time = lambda n: 0.012 + 0.006 * np.asarray(n, dtype=float)  # noqa: E731
    every, clean = (observe([each], MeasuredRequests(rows), step_time) for each in (trial, disturbed))
    inside = rows[(rows["sent_ns"] >= spoilt.start_ns) & (rows["ended_ns"] <= spoilt.end_ns)]
    assert len(inside) and len(clean) <= len(every) - len(inside)
    assert not set(inside["ttfa_s"].dropna()) & set(clean["ttfa_s"].dropna())


def test_a_slo_that_one_session_breaks_is_missed(measured):
    slos = (*SLOS, Slo("short", "rtf", 0.95, 0.05))
    fit = fit_of(measured, slos=slos)
    assert fit.deployments[0].max_rate_per_s == 0
    assert fit.best is None
    plan = plan_of(fit, measured, slos=slos)
    assert plan.verdict == "missed"
    assert "even with one session" in plan.reasons[0]
    assert plan.rate_per_device.value == 0
    assert plan.targets[0].binding == "rtf p95 of class short"


def test_what_is_said_alike_of_several_deployments_is_said_once(measured):
    other = ladder(TRUTH, np.random.default_rng(10), LADDER, name="other", deployment={"delay_us": 1000})
    slos = (Slo("short", "ttfa_s", 0.95, 0.001),)
    plan = plan_of(fit_of(measured, other, slos=slos), measured, other, slos=slos)
    assert plan.verdict == "missed"
    assert plan.reasons == (
        "2 of 2 deployments: ttfa p95 of class short is violated at every rate, even with one session.",
    )


def test_a_slo_broken_too_narrowly_to_be_sure_is_inconclusive(measured):
    free = fit_of(measured).deployments[0]
    alone = Device.from_fit(free).at_constant_step("short", "rtf", 0.95, np.array([free.step_time.points[0].step_s]))
    narrow = (Slo("short", "rtf", 0.95, float(alone[0]) * 0.995),)
    found = fit_of(measured, slos=narrow).deployments[0]
    assert found.max_rate_per_s is None
    assert "too narrowly to be sure" in found.inconclusive


def test_a_model_that_fails_its_validation_is_inconclusive(fit, measured):
    other = confirmed(fit, Truth(intercept_s=0.03, slope_s=0.012), 0.7, np.random.default_rng(30))
    plan = plan_of(fit, measured, other)
    assert plan.verdict == "inconclusive"
    assert any("step_s missed the open-loop trial open-0.7" in reason for reason in plan.reasons)
    assert any(row.passed is False for row in plan.validation)
    assert plan.targets[0].devices >= 1  # the counts are shown, and not signed


def test_without_a_confirmation_a_plan_is_inconclusive(fit, measured, runs):
    assert "No VALID open-loop run confirms" in plan_of(fit, measured).reasons[0]
    invalid = replace(runs[0][0], valid=False, reasons=("3% of sends were late",))
    assert plan_of(fit, measured, (invalid, runs[0][1])).verdict == "inconclusive"
    blind = replace(runs[0][0], prediction=None)
    assert any("without a prediction" in reason for reason in plan_of(fit, measured, (blind, runs[0][1])).reasons)


def doubts_of(plan):
    return [reason for reason in plan.reasons if not reason.startswith("Pooled")]


def test_a_run_that_breaks_a_slo_is_not_signed(fit, measured, runs):
    trial, rows = runs[0]
    short = rows["traffic_class"] == "short"
    slow = rows.assign(rtf=rows["rtf"].mask(short, 1.3))
    plan = plan_of(fit, measured, (trial, slow), runs[1])
    assert all(row.passed is not False for row in plan.validation)
    assert plan.verdict == "inconclusive"
    (reason,) = doubts_of(plan)
    assert "open-0.6" in reason and "rtf p95 of class short was 1.3, the limit is 0.9" in reason
    assert [run.passed for run in plan.open_runs] == [False, True]
    blind = replace(trial, prediction=None)
    assert any("violated an SLO" in each for each in plan_of(fit, measured, (blind, slow), runs[1]).reasons)


def test_requests_that_got_no_audio_fail_the_run_and_are_not_left_out(fit, measured, runs):
    trial, rows = runs[1]
    window = trial.rungs[0]
    own = window.summary.classes
    silenced = own | {"short": replace(own["short"], ttfa_p95_s=math.nan)}
    rung = replace(window, summary=replace(window.summary, classes=silenced))
    due = rows.index[(rows["traffic_class"] == "short") & (rows["due_ns"] >= window.start_ns)]
    silent = rows.assign(ttfa_s=rows["ttfa_s"].mask(rows.index.isin(due[:4])))
    plan = plan_of(fit, measured, (replace(trial, rungs=(rung,)), silent))
    (row,) = [row for row in plan.validation if row.metric == "ttfa p95 of class short"]
    assert row.passed is False and row.measured is None and "4 of " in row.note
    assert plan.verdict == "inconclusive"
    assert any("got no audio" in reason and "repeat that rate" in reason for reason in plan.reasons)

    late_ns = window.end_ns - int(0.5e9)  # within the promised second of the end: cut off, not unheard
    cut = rows.assign(ttfa_s=rows["ttfa_s"].mask(rows.index.isin(due[-2:])))
    cut.loc[due[-2:], "due_ns"] = late_ns
    plan = plan_of(fit, measured, (replace(trial, rungs=(rung,)), cut))
    assert "ttfa p95 of class short" not in {row.metric for row in plan.validation}


def test_a_request_that_broke_off_broke_its_slo(fit, measured, runs):
    """Four of ten streams end in an error after their first audio: no capacity is signed on that."""
    trial, rows = runs[1]
    broken = rows.assign(outcome=rows["outcome"].mask(np.arange(len(rows)) % 5 < 2, "error"))
    plan = plan_of(fit, measured, runs[0], (trial, broken))
    assert plan.verdict == "inconclusive" and plan.open_runs[1].passed is False
    assert any("was above every measured value" in reason for reason in plan.reasons)


def test_a_run_in_which_hardly_anybody_came_confirms_no_slo(fit, measured):
    best = fit.best_deployment
    rate = 0.1 * best.max_rate_per_s
    prediction = predict_open_run(best, MIX, rate, 5, np.random.default_rng(5))
    brief = open_run(TRUTH, rate, np.random.default_rng(2), seconds=5, prediction=prediction)
    plan = plan_of(fit, measured, brief)
    assert {row.metric for row in plan.validation} == {"step_s", "sessions", "frames_per_s"}
    assert plan.verdict == "inconclusive" and "longer" in plan.reasons[-1]


def test_the_highest_rate_must_pass_and_a_valid_repeat_counts_for_an_invalid_run(fit, measured, runs):
    trial, rows = runs[1]
    invalid = replace(trial, trial_id="first", valid=False, reasons=("3% of sends were late",))
    first = (invalid, rows.assign(trial_id="first"))
    plan = plan_of(fit, measured, runs[0], first)
    assert plan.verdict == "inconclusive"
    (reason,) = doubts_of(plan)
    assert "first at" in reason and "3% of sends were late" in reason and "repeat that rate" in reason
    assert plan_of(fit, measured, runs[0], first, runs[1]).verdict == "met"


def test_a_run_without_a_decidable_figure_confirms_nothing(fit, measured, runs, monkeypatch):
    def undecided(trial, *arguments, **options):
        return [replace(row, passed=None) for row in validate(trial, *arguments, **options)]

    monkeypatch.setattr(confirmation, "validate", undecided)
    plan = plan_of(fit, measured, *runs)
    assert plan.verdict == "inconclusive"
    assert any("not one figure of an SLO is" in reason and "longer" in reason for reason in plan.reasons)
    assert plan.targets[0].basis == "simulated"


def test_a_plan_over_times_that_nobody_measured_decides_nothing(fit, measured, runs):
    plan = plan_of(fit, measured, *runs, emulated=True, times_basis="estimated")
    assert plan.verdict == "planning estimate" and plan.times_basis == "estimated" and plan.targets[0].devices
    assert plan.reasons[0].startswith("A planning estimate: the emulated times are estimated")
    assert plan_of(fit, measured, *runs, emulated=True).verdict == "met"


def test_a_plan_over_dilated_time_is_an_estimate_at_best(fit, measured, runs):
    plan = plan_of(fit, measured, *runs, emulated=True, dilation=20.0)
    assert (plan.verdict, plan.dilation, plan.times_basis) == ("planning estimate", 20.0, "")
    assert plan.reasons[0].startswith("Emulated, time dilated 20 times")
    assert plan_of(fit, measured, runs[0], emulated=True, dilation=20.0).verdict in (
        "inconclusive",
        "planning estimate",
    )
    assert Plan.of(plan.to_dict()) == plan and "dilation" not in plan_of(fit, measured, *runs).to_dict()


def test_an_extrapolated_count_is_not_signed(runs):
    short = ladder(TRUTH, np.random.default_rng(10), (1, 2, 4), seconds=30)
    fit = fit_of(short, extrapolation=3.0)
    own = confirmed(fit, TRUTH, 0.5, np.random.default_rng(8))
    plan = plan_of(fit, short, own, targets=(5,))
    assert plan.targets[0].basis == "extrapolated"
    assert plan.verdict == "inconclusive"
    assert any("add a rung at" in reason for reason in plan.reasons)


def test_a_plan_says_why_fewer_devices_do_not_suffice(plan):
    several = [each for each in plan.targets if each.devices > 1]
    assert [(row.option, row.at_qps, row.devices) for row in plan.why_not] == [
        ("devices", each.qps, each.devices - 1) for each in several
    ]
    assert all(row.limit and row.basis in ("simulated", "extrapolated") for row in plan.why_not)


def test_slos_that_nothing_carries_are_refused(measured):
    for slo, words in (
        (Slo("job", "rtf", 0.95, 0.9), "which is not in the mix"),
        (Slo("short", "rtf", 0.999, 0.9), "needs 1000 measured requests"),
    ):
        assert words in fit_of(measured, slos=(slo,)).deployments[0].inconclusive


def test_no_trial_at_all_is_inconclusive(measured):
    fit = fit_run([], measured[1], MIX, SLOS, np.random.default_rng(0), UNIT)
    plan = make_plan(fit, [], measured[1], MIX, SLOS, (1,), np.random.default_rng(0), Terms(**OPTIONS))
    assert plan.verdict == "inconclusive"
    assert plan.reasons == ("No ladder was measured: run the sweep.",)


def test_deployments_that_cannot_be_told_apart_from_the_best_are_named():
    best, higher, lower = (
        bare_fit(max_rate_per_s=rate, trial_ids=("ladder",) * count) for rate, count in ((2.0, 2), (2.1, 1), (1.5, 1))
    )
    (remark,) = not_told_apart(fit_with(best, higher, lower), best, 0.95)
    assert "sustains 2 requests/s by its 2 ladders; 1 of the 2 others, with 2.1, may be as fast" in remark
    assert not_told_apart(fit_with(best, replace(higher, max_rate_per_s=None), lower), best, 0.95) == []
