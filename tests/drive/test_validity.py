"""The certificate: each gate fails alone, with its figure and its limit; what cannot be tested never fails."""

import math

import pytest

from harness.drive.validity import Due, Trend, certify
from harness.records.slo import Slo
from harness.records.summary import Summary
from harness.traffic.arrivals import Arrivals

GOOD = {
    "seconds": 180.0,
    "requests": 3600.0,
    "errors": 0.0,
    "offered_rate_per_s": 20.0,
    "achieved_rate_per_s": 20.0,
    "late_sends_share": 0.0,
    "lateness_p99_s": 0.002,
    "frames_per_s": 80.0,
    "impossible": 0.0,
    "sessions": 10.0,
    "memory_s": 0.5,
    "littles_residual": 0.001,
    "littles_error": 0.002,
    "sessions_rise": 0.2,
    "sessions_rise_seconds": 180.0,
    "sessions_variance": 10.0,
    "lengths_cv2": 0.1,
    "load_rise": 0.01,
    "step_rise": 0.01,
    "step_rise_error": 0.01,
    "short.ttfa_span_s": 0.5,
    "short.ttfa_mean_s": 0.1,
    "short.ttfa_rise_s": 0.01,
    "short.ttfa_rise_error_s": 0.003,
}
POISSON = Arrivals("poisson", 20.0)


SLO = Slo("short", "ttfa_s", 0.95, 1.0)
NOTHING = math.nan


def judged(arrivals=POISSON, count=3600, expected=3600.0, recorded=9, closed=False, farthest_s=0.0, **changes):
    words = {name: changes.pop(name, "") for name in ("unsteady", "failures")}
    due, summary = None if closed else Due(arrivals, count, expected, farthest_s), Summary.of(GOOD | changes)
    return certify(summary, submitted=9, recorded=recorded, due=due, slos=(SLO,), **words)


def gate_of(certificate, name):
    (gate,) = (each for each in certificate.gates if each.name == name)
    return gate


def failed(certificate):
    return [gate.says for gate in certificate.gates if gate.passed is False]


def test_a_run_that_keeps_every_gate_is_valid_and_says_what_was_looked_at():
    certificate = judged()
    assert certificate.valid and certificate.verdict == "VALID"
    passed = {gate.name: gate.passed for gate in certificate.gates}
    assert set(passed.values()) == {True} and len(passed) == 11 and certificate.reasons == ()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"achieved_rate_per_s": 19.7}, "19.7 requests/s were sent of 20 due: more than 1% apart"),
        ({"count": 3601}, "3600 requests were due, and the process has 3601 in the window: they must be equal"),
        ({"farthest_s": 0.25}, "in the window, at the same times to 250 ms: above 100 ms"),
        ({"expected": 2700.0}, "3600 requests were due; 2700.0 +- 207.8 were expected"),
        ({"late_sends_share": 0.011}, "1.1% of sends were later than 5 ms: above 1%"),
        ({"lateness_p99_s": 0.0105}, "chunks were stamped up to 10.5 ms late (p99): above 10 ms"),
        ({"frames_per_s": 0.0}, "0 frames were received in the window"),
        ({"recorded": 8}, "8 requests were recorded of 9 submitted: they must be equal"),
        ({"impossible": 2.0}, "2 of them ended or received audio before they were sent"),
        (
            {"littles_residual": 0.06},
            "Little's law is off by 6.0% of N over the window (standard error 0.2%): above 5%",
        ),
        (
            {"sessions_rise": 4.0},
            "sessions rose by 40.0% of their mean over the window (standard error 8.2%): above 25%",
        ),
        ({"step_rise": 0.2}, "step time rose by 20.0% of its mean over the window (standard error 1.0%): above 10%"),
        (
            {"load_rise": 0.2, "requests": 30_000.0, "count": 30_000, "expected": 30_000.0},
            "rate of arrivals rose by 20.0% of its mean",
        ),
        ({"short.ttfa_rise_s": 0.2}, "first audio of short rose by 20.0% of its SLO over the window"),
    ],
)
def test_each_gate_invalidates_with_a_figure_and_its_limit(changes, reason):
    certificate = judged(**changes)
    assert not certificate.valid and len(failed(certificate)) == 1
    assert reason in failed(certificate)[0] and certificate.reasons[0] == failed(certificate)[0]
    assert certificate.verdict == f"INVALID: {failed(certificate)[0]}"


@pytest.mark.parametrize(
    ("arrivals", "count", "expected", "passed"),
    [
        (Arrivals("constant", 20.0), 356, 360.0, False),  # a clock is not random
        (Arrivals("constant", 20.0), 357, 360.0, True),
        (POISSON, 290, 360.0, True),
        (Arrivals("gamma", 20.0, 4.0), 240, 360.0, True),  # twice the spread of Poisson
        (Arrivals("gamma", 20.0, 4.0), 200, 360.0, False),
        (Arrivals("gamma", 20.0, 40.0), 200, 360.0, None),  # nine bursts say nothing about a rate
        (POISSON, 360, math.nan, None),  # the count itself ended the test
    ],
)
def test_the_number_of_arrivals_is_judged_by_the_statistics_of_its_process(arrivals, count, expected, passed):
    certificate = judged(arrivals, count, expected, requests=float(count))
    assert [gate.passed for gate in certificate.gates if gate.name == "rate"] == [passed] * (not math.isnan(expected))
    assert certificate.valid == (passed is not False)


@pytest.mark.parametrize(("late", "passed"), [(0, True), (1, True), (2, False)])
def test_one_late_send_is_no_fault_of_a_short_run(late, passed):
    rates = dict.fromkeys(("achieved_rate_per_s", "offered_rate_per_s"), 40 / 18)
    certificate = judged(count=40, expected=40.0, requests=40.0, seconds=18.0, late_sends_share=late / 40, **rates)
    (gate,) = (gate for gate in certificate.gates if gate.name == "punctuality")
    assert gate.passed is passed and "1%, or one send" in gate.says


def test_punctuality_of_nothing_is_not_known():
    certificate = judged(late_sends_share=math.nan)
    assert [gate.passed for gate in certificate.gates if gate.name == "punctuality"] == [None]


def test_an_invalid_run_says_what_is_wrong_and_a_valid_one_what_could_not_be_tested():
    untested = judged(late_sends_share=math.nan)
    assert untested.valid and untested.reasons == ("punctuality: not testable: nothing was sent",)
    wrong = judged(late_sends_share=math.nan, **{"short.ttfa_rise_s": 0.2})
    assert wrong.reasons == tuple(failed(wrong)) and "first audio" in wrong.reasons[0]


def test_a_closed_loop_has_no_schedule_and_errors_are_listed_not_judged():
    failures = "3 of 360 requests failed (0.833%)"
    certificate = judged(closed=True, late_sends_share=0.5, achieved_rate_per_s=1.0, failures=failures)
    assert certificate.valid and certificate.verdict == f"VALID, but {failures}" and certificate.reasons == (failures,)
    certificate = judged(failures=failures, frames_per_s=0.0)
    assert certificate.verdict == "INVALID: 0 frames were received in the window: at least 1 is needed"
    assert certificate.reasons[1:] == (failures,)


def test_what_the_window_is_too_short_for_is_said_with_the_window_that_it_needs():
    certificate = judged(
        memory_s=30.0,
        littles_residual=0.3,
        step_rise_error=0.1,
        **{"short.ttfa_rise_s": NOTHING, "short.ttfa_rise_error_s": NOTHING},
    )
    assert certificate.valid
    untested = {gate.name: gate.says for gate in certificate.gates if gate.passed is None}
    assert "180 s is too short; finding a rise of 10% of N reliably would take about 300 s" in untested["Little's law"]
    assert "a rise of 20% of its SLO reliably would take about 240 s" in untested["first audio of short"]
    assert "a rise of 20% of its mean" in untested["step time"] and "sessions" in untested


def test_a_window_in_which_nothing_came_has_a_certificate():
    empty = dict.fromkeys(GOOD, math.nan) | dict.fromkeys(("requests", "sessions", "memory_s", "frames_per_s"), 0.0)
    empty |= {"seconds": 10.0, "sessions_variance": 0.0, "sessions_rise_seconds": 5.0, "impossible": 0.0}
    certificate = judged(**empty | {"offered_rate_per_s": 0.0, "achieved_rate_per_s": 0.0}, count=0, expected=0.0)
    assert failed(certificate) == ["0 frames were received in the window: at least 1 is needed"]


def test_a_load_that_changes_by_design_is_not_asked_to_be_steady():
    certificate = judged(unsteady="not required: the rate changes", littles_residual=0.3, step_rise=0.5)
    assert certificate.valid and certificate.reasons == ()
    assert certificate.gates[-1].says == "not required: the rate changes"


@pytest.mark.parametrize(
    ("rise", "error", "passed"),
    [
        (0.30, 0.01, False),  # large and certain
        (0.30, 0.20, None),  # large, but as likely chance; one of 20% would be missed
        (0.05, 0.01, True),  # certain, but it does not matter
        (0.00, 0.07, None),  # too uncertain to find twice the limit in nine of ten runs
        (-0.30, 0.01, True),  # what falls is no fault
        (0.30, 0.00, False),
        (0.30, NOTHING, None),
        (NOTHING, NOTHING, None),
    ],
)
def test_a_rise_counts_where_it_is_certain_and_matters(rise, error, passed):
    gate = Trend("step time", rise, error, 0.10, "its mean").judged(60.0, sigmas=2.7)
    assert gate.passed is passed
    assert ("10%" in gate.says) if passed is not None else gate.says.startswith("not testable")


@pytest.mark.parametrize(
    ("memory_s", "said"), [(3.0, "of 5 s is"), (61.0, "about 10 min"), (2181.1, "about 6 h"), (1e6, "about 2,778 h")]
)
def test_a_window_of_more_than_ten_minutes_is_said_in_minutes_or_hours(memory_s, said):
    trend = Trend("sessions", 0.0, NOTHING, 0.25, "their mean", needed_s=10 * memory_s)
    assert said in trend.judged(5.0, sigmas=2.7).says


@pytest.mark.parametrize(("error", "shrinks"), [(0.06, 0.5), (0.2, 0.5), (0.2, 1.0)])
def test_the_window_that_it_would_need_is_testable(error, shrinks):
    trend = Trend("x", 0.0, error, 0.1, "its mean", shrinks=shrinks)
    gate, needed_s = trend.judged(60.0, sigmas=2.7), trend.window_s(60.0, sigmas=2.7) + 1
    later = Trend("x", 0.0, error * (60 / needed_s) ** shrinks, 0.1, "its mean", shrinks=shrinks)
    assert gate.passed is None and later.judged(needed_s, sigmas=2.7).passed


def test_first_audio_that_rises_far_below_its_slo_is_no_fault_and_needs_no_long_window():
    """As seen: first audio of 0.08 s against an SLO of 1 s, in a window too short for any trend."""
    seen = {"short.ttfa_span_s": 0.06, "short.ttfa_rise_s": 0.03, "short.ttfa_rise_error_s": 0.001}
    gate = gate_of(judged(**seen), "first audio of short")
    assert gate.passed and gate.says == "first audio of short stayed within 0.06 s (limit 10% of its SLO, 1 s)"
    untestable = seen | {"short.ttfa_rise_s": NOTHING, "short.ttfa_rise_error_s": NOTHING}
    assert gate_of(judged(**untestable), "first audio of short").passed


def test_without_an_slo_first_audio_is_judged_by_its_own_mean():
    rising = {"short.ttfa_rise_s": 0.03, "short.ttfa_span_s": 0.05}
    certificate = certify(Summary.of(GOOD | rising), submitted=9, recorded=9, due=Due(POISSON, 3600, 3600.0))
    assert failed(certificate)[0].startswith("first audio of short rose by 30.0% of its mean")


def test_sessions_of_few_memories_may_stray_as_a_queue_at_rest_does():
    strays = {"memory_s": 30.0, "sessions_rise": 20.0, "sessions": 30.0}
    assert gate_of(judged(**strays), "sessions").passed is None
    assert gate_of(judged(**strays | {"sessions_rise": 400.0}), "sessions").passed is False


def test_the_more_is_tested_the_more_certain_each_must_be():
    edge = {"step_rise": 0.265, "step_rise_error": 0.1}
    one = judged(**edge)
    short = {key.partition(".")[2]: value for key, value in GOOD.items() if "." in key}
    more = judged(**edge, **{f"{name}.{key}": value for name in "abcdef" for key, value in short.items()})
    assert gate_of(one, "step time").passed is False and gate_of(more, "step time").passed is None
