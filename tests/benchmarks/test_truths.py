"""benchmarks/capacity/truths.py: its judge against closed forms and the planning simulator; ladders, families, sums."""

import importlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.capacity.simulator.sessions import simulate
from harness.errors import InconclusiveError
from harness.records.plan import PlannedTarget
from harness.traffic.mix import Draw, Lengths, Mix, TrafficClass

FRAME_S = 3200 / 24_000
SHORT = Mix("short", (TrafficClass("short", 1.0, Lengths.parse({"uniform": [4, 16]})),))

LONG = Mix("long", (TrafficClass("long", 1.0, Lengths.parse({"fixed": 600})),))  # 4500 frames


def found_at_1000(mix, n, rng):
    return [Draw("long", 4500, 1, phase=1000)] * n


@pytest.fixture(scope="module")
def load():
    with pytest.MonkeyPatch.context() as patch:
        benchmarks = Path(__file__).resolve().parents[2] / "benchmarks"
        for folder in (benchmarks, benchmarks / "capacity"):
            patch.syspath_prepend(str(folder))
        yield importlib.import_module


@pytest.fixture(scope="module")
def truth_judge(load):
    return load("truth_judge")


def served(truth_judge, arrival_s, frames, step, devices=1, routing=0, context_s=0.0):
    """RTF [n] of sessions."""
    rtf, start_s = np.empty(len(frames)), np.empty(len(frames))
    step_s = np.concatenate([[0.0], step(np.arange(1.0, truth_judge.ROOM + 2))])
    arrival_s, frames = np.asarray(arrival_s, float), np.asarray(frames, float)
    assert truth_judge.serve(arrival_s, frames, step_s, context_s, devices, routing, 1, rtf, start_s)
    return rtf


@pytest.mark.parametrize("load_share", [0.3, 0.7, 0.85])
def test_a_device_that_shares_its_rate_is_processor_sharing(truth_judge, load_share):
    """M/G/1-PS: a session of x frames takes x s / (1 - load) on average, whatever the lengths."""
    step_s = 0.01
    service = truth_judge.service_of(lambda n: step_s * n, SHORT, {"short": 9.0})
    judge = truth_judge.Judge(service, sessions=150_000)
    _, rtf, _ = judge.serve(load_share / (step_s * service.mean_frames), 1, seed=3)
    assert rtf.mean() == pytest.approx(step_s / (1 - load_share) / FRAME_S, rel=0.03)


def test_sessions_that_do_not_slow_each_other_down_all_take_the_same(truth_judge):
    """M/G/infinity: RTF is the step / a frame, and the rate is without limit until the step is too slow."""
    service = truth_judge.service_of(lambda n: 0.1 + 0 * n, SHORT, {"short": 0.9})
    _, rtf, _ = truth_judge.Judge(service, sessions=5000).serve(5.0, 2, seed=1)
    assert rtf == pytest.approx(np.full(len(rtf), 0.1 / FRAME_S))


@pytest.mark.parametrize("devices", [1, 3])
def test_sessions_end_when_those_of_the_harness_do(truth_judge, devices):
    """The same sessions in the two simulators; on several devices, in round robin, each device by itself."""
    rng = np.random.default_rng(4)
    arrival_s, frames = np.cumsum(rng.exponential(1.3 / devices, 2000)), rng.integers(20, 200, 2000)
    step = lambda n: 0.02 + 0.004 * n + 0.0002 * n**2  # noqa: E731
    rtf = served(truth_judge, arrival_s, frames, step, devices, routing=1)
    for device in range(devices):
        own = slice(device, None, devices)
        expected = simulate(arrival_s[own], frames[own], step)
        assert rtf[own] == pytest.approx((expected.end_s - expected.arrival_s) / (frames[own] * FRAME_S), rel=1e-6)


def test_context_slows_every_step_that_follows(truth_judge):
    """Alone, x frames take a x + c x^2 / 2; a second session pays for the first one's context, until that ends."""
    a, c = 0.02, 1e-4
    (alone,) = served(truth_judge, [0.0], [100], lambda n: a + 0 * n, context_s=c)
    assert alone * 100 * FRAME_S == pytest.approx(a * 100 + c * 100**2 / 2)
    first, second = served(truth_judge, [0.0, 0.0], [100, 200], lambda n: a + 0 * n, context_s=c)
    assert first * 100 * FRAME_S == pytest.approx(a * 100 + 2 * c * 100**2 / 2)
    rest_s = (a + c * 100) * 100 + c * 100**2 / 2
    assert second * 200 * FRAME_S == pytest.approx(first * 100 * FRAME_S + rest_s)


def test_a_device_that_cannot_keep_up_has_collapsed(truth_judge):
    service = truth_judge.service_of(lambda n: 0.01 * n, SHORT, {"short": 0.9})
    assert truth_judge.Judge(service).serve(1.5 / (0.01 * service.mean_frames), 1, seed=1) is None


def test_a_knee_needs_the_devices_that_keep_it_from_falling_over(load, truth_judge):
    families = load("truth_families")
    judge = replace(families.FAMILIES["knee"].judge(), sessions=60_000)
    assert not judge.holds(28.44, 18) and judge.holds(28.44, 20)
    assert judge.highest_rate() < 0.4 * judge.service.steady_rate()  # one device alone falls over long before


def test_least_loaded_routing_needs_the_fewest_devices_and_random_the_most(load, truth_judge):
    judge = replace(load("truth_families").FAMILIES["host-0-1"].judge(), sessions=30_000)
    assert [replace(judge, routing=each).fewest(7.8) for each in truth_judge.ROUTINGS] == [10, 11, 12]


def test_the_cap_is_a_lower_bound_of_the_count(truth_judge):
    service = truth_judge.service_of(lambda n: 0.02 + 0.005 * n, SHORT, {"short": 0.9})
    capped = truth_judge.Judge(service, cap=0.5, sessions=5000).fewest(21.0)
    assert capped == math.ceil(21.0 / (0.5 * service.steady_rate()))


def test_more_sessions_begin_with_the_same_ones(truth_judge):
    service = truth_judge.service_of(lambda n: 0.1 + 0 * n, SHORT, {"short": 0.9})
    few, many = truth_judge.draw(service, 10, 2), truth_judge.draw(service, 1000, 2)
    assert all(np.array_equal(a, b[:10]) for a, b in zip(few, many, strict=True))
    assert many[2].min() >= 30 and many[2].max() <= 120


def test_a_rung_of_a_ladder_shows_the_step_times_its_factor(load):
    family = load("truth_families").Family("plain", sessions=(1, 4, 16), seconds=8.0)
    ladder = load("truth_ladders").Ladder(family.step, family.mix, family.sessions, family.seconds)
    measured = ladder.measure("one", {"delay_us": 0}, (1.0, 1.5, 2.0), np.random.default_rng(1))
    (trial,), rows = measured.trials, measured.requests
    for rung, n, factor in zip(trial.rungs, family.sessions, (1.0, 1.5, 2.0), strict=True):
        assert rung.sessions == pytest.approx(n, rel=1e-3)
        expected_s = float(family.step(np.array([float(n)]))[0]) * factor
        assert rung.sessions / rung.frames_per_s == pytest.approx(expected_s, rel=0.02)
    assert set(rows["trial_id"]) == {"one"} and (rows["sent_ns"] < rows["ended_ns"]).all()
    assert rows["request_id"].is_unique and trial.valid and not trial.disturbed


def test_sessions_go_on_through_rungs_and_are_seen_in_each_that_they_last_through(load):
    ladders = load("truth_ladders")
    ladder = ladders.Ladder(lambda n: 0.05 * n, LONG, (1, 2, 4), 5.0, found=found_at_1000)
    measured = ladder.measure("one", {}, (1.0, 1.0, 1.0), np.random.default_rng(1))
    assert len(measured.requests) == 4 and measured.in_rungs["window"].value_counts().to_dict() == {0: 1, 1: 2, 2: 4}
    first = measured.in_rungs[measured.in_rungs["request_id"] == "one-0-0"]
    assert first["rtf"].tolist() == pytest.approx([0.05 * n / FRAME_S for n in (1, 2, 4)])


def test_a_rung_that_others_were_seen_to_disturb_is_measured_again(load):
    family = load("truth_families").Family("plain", sessions=(1, 4, 16), seconds=8.0)
    ladder = load("truth_ladders").Ladder(family.step, family.mix, family.sessions, family.seconds)
    (trial,) = ladder.measure("one", {}, (1.0,) * 3, np.random.default_rng(1), seen=(1.0, 1.5, 1.0)).trials
    steps = [rung.sessions / rung.frames_per_s for rung in (*trial.rungs, *trial.disturbed)]
    assert steps == pytest.approx([0.025, 0.04, 0.1, 0.06], rel=0.02)
    assert trial.disturbed[0].repeated and trial.disturbed[0].end_ns < trial.rungs[1].start_ns


def test_contexts_slow_a_rung_and_grow_with_its_frames(load):
    ladders = load("truth_ladders")
    ladder = ladders.Ladder(lambda n: 0.05 + 0 * n, LONG, (2, 3, 4), 5.0, context_s=1e-5, found=found_at_1000)
    measured = ladder.measure("one", {}, (1.0, 1.0, 1.0), np.random.default_rng(1))
    steps = [rung.sessions / rung.frames_per_s for rung in measured.trials[0].rungs]
    expected, spoken = [], [0.0, 0.0, 0.0, 0.0]
    for n in (2, 3, 4):  # 7 s a rung, of which the first 2 settle
        frames, began = 7 / (0.05 + 1e-5 * n * 1050), sum(spoken[:n]) / n
        expected.append(0.05 + 1e-5 * n * (1000 + began + frames * 4.5 / 7))
        spoken = [each + frames * (k < n) for k, each in enumerate(spoken)]
    assert steps == pytest.approx(expected, rel=0.02)
    assert set(measured.requests["start_frame"]) == {1000}


def test_stratified_contexts_cover_the_sessions(load):
    drawn = load("truth_ladders").stratified(LONG, 8, np.random.default_rng(2))
    assert sorted(each.phase * 8 // each.frames for each in drawn) == list(range(8))


def test_the_families_of_the_issue_and_five_more_are_there(load):
    families = load("truth_families").FAMILIES
    wanted = {"host-10-1", "host-10-3", "winner", "knee", "stairs", "last-rung", "context", "rung-100x", "class-unseen",
              "round-robin", "disturbed-1"}  # fmt: skip
    assert wanted <= families.keys() and len(families) >= len(wanted) + 5


def test_a_host_slows_whole_ladders_and_a_slow_rung_one(load):
    families = load("truth_families")
    rng = np.random.default_rng(1)
    host = families.Family("host", host_sd=0.2, rung_sd=0.0)
    factors = np.array([host.factors(0, rng) for _ in range(400)])
    assert np.ptp(factors, axis=1).max() < 1e-12 and np.log(factors[:, 0]).std() == pytest.approx(0.2, rel=0.15)
    slow = families.OneRung("slow", times=100.0, rung=None, rung_sd=0.0)
    assert sorted(slow.factors(0, rng))[-2:] == [1.0, 100.0] and set(slow.factors(1, rng)) == {1.0}


def test_a_class_that_no_ladder_saw_is_in_none_of_its_rows(load):
    family = load("truth_families").FAMILIES["class-unseen"]
    rows = family.measure(np.random.default_rng(1)).requests
    assert set(rows["traffic_class"]) == {"short", "long"} and "rare" in {slo.traffic_class for slo in family.slos}


def test_the_best_of_many_is_measured_again(load):
    family = load("truth_families").Winner("few", host_sd=0.1, deployments=3)
    measured = family.measure(np.random.default_rng(1))
    ladders = [trial.deployment["delay_us"] for trial in measured.trials]
    assert len(ladders) == 5 and sorted(map(ladders.count, set(ladders))) == [1, 1, 3]
    assert set(measured.requests["trial_id"]) == {trial.trial_id for trial in measured.trials}


def runs_of(truths, *said, family="plain", named=()):
    """Runs that said (low, high) of a rate, and of a count; None: refused."""
    return [
        truths.Run(
            family,
            each and (sum(each[0]) / 2, *each[0]),
            (truths.Count(10, sum(each[1]) // 2, *each[1]),) if each else (),
            () if each else ("too noisy",),
            number in named,
            1.0,
        )
        for number, each in enumerate(said)
    ]


def test_shares_are_of_the_runs_that_answered(load):
    truths, families = load("truths"), load("truth_families")
    held, optimistic, pessimistic = ((0.9, 1.1), (9, 11)), ((1.1, 1.3), (7, 9)), ((0.7, 0.9), (11, 13))
    runs = runs_of(truths, held, optimistic, pessimistic, held, None)
    judged = truths.Judged(families.Family("plain"), truths.Truth(1.0, (10.0,), (10,)), runs)
    figures = judged.figures()
    assert figures["coverage_rate"] == figures["coverage_count"] == 0.5
    assert figures["optimistic"] == 0.25 and figures["refused"] == 1 and figures["count_ratio"] == 1.0
    assert figures["silent"] is None
    assert truths.failures(truths.summary([judged])) == ["coverage_rate_min", "coverage_count_min", "optimistic_max"]


def test_a_named_fault_is_not_judged_and_a_silent_answer_fails(load):
    truths, families = load("truths"), load("truth_families")
    wrong = (2.0, 3.0), (1, 2)
    family, truth = families.Family("odd", names="outlier"), truths.Truth(1.0, (10.0,), (10,))
    right = truths.Judged(family, truth, runs_of(truths, wrong, wrong, None, named=(0, 1)))
    assert right.figures()["silent"] == 0 and right.figures()["coverage_rate"] is None
    assert truths.failures(truths.summary([right])) == []
    silent = truths.Judged(family, truth, runs_of(truths, wrong, wrong, named=(0,)))
    assert silent.figures()["silent"] == 0.5 and "silent_max" in truths.failures(truths.summary([silent]))


def test_families_beyond_ten_percent_do_not_count(load):
    truths, families = load("truths"), load("truth_families")
    family = families.Family("wild", host_sd=0.2, barred=False)
    wild = truths.Judged(family, truths.Truth(1.0, (10.0,), (10,)), runs_of(truths, ((2.0, 3.0), (1, 2))))
    figures = truths.summary([wild])
    assert figures["coverage_rate_min"] is None and figures["each"]["wild"]["coverage_rate"] == 0


def test_a_count_without_an_upper_bound_is_a_refusal(load):
    truths = load("truths")
    assert truths._count(5, PlannedTarget(qps=1.0, devices=4, interval=(3, None))) == "the count has no upper bound"
    assert truths._count(5, PlannedTarget(qps=1.0, note="why")) == "why"
    assert truths._count(5, PlannedTarget(qps=1.0, devices=4, interval=(3, 6))) == truths.Count(5, 4, 3, 6)


def test_a_fit_that_refuses_is_a_run(load, monkeypatch):
    truths = load("truths")

    def refuse(*_, **__):
        raise InconclusiveError("noise of 40%")

    monkeypatch.setattr(load("truth_families"), "fit_run", refuse)
    truth = truths.Truth(1.0, tuple(range(6)), tuple(range(6)))
    run = truths.repeat(("host-0-1", truth, 1))
    assert run.rate is None and run.refused == ("noise of 40%",)


def test_the_words_for_a_reader_hold_remarks_and_no_names(load):
    truths = load("truths")
    content = {"reasons": ["a rung is an outlier"], "binding": "rtf of class rare", "pooled": True, "extra": False}
    assert list(truths._words(content)) == ["a rung is an outlier", "pooled"]
