"""The certificate: each gate fails alone, with its figure and its limit; what cannot be tested never fails."""

import math

import pytest

from harness.arrivals import Arrivals
from harness.certificate import Due, certify

GOOD = {
    "seconds": 18.0,
    "requests": 360.0,
    "errors": 0.0,
    "offered_rate_per_s": 20.0,
    "achieved_rate_per_s": 20.0,
    "late_sends_share": 0.0,
    "lateness_p99_s": 0.002,
    "frames_per_s": 80.0,
    "residence_s": 0.139,
    "littles_residual": 0.01,
    "memory_s": 0.2,
    "sessions_trend_p": 0.5,
    "ttfa_trend_p": 0.5,
}
POISSON = Arrivals("poisson", 20.0)


def judged(arrivals=POISSON, count=360, expected=360.0, recorded=9, closed=False, unsteady="", failures="", **changes):
    due, summary = None if closed else Due(arrivals, count, expected), {**GOOD, **changes}
    return certify(summary, submitted=9, recorded=recorded, due=due, unsteady=unsteady, failures=failures)


def failed(certificate):
    return [gate.says for gate in certificate.gates if gate.passed is False]


def test_a_run_that_keeps_every_gate_is_valid_and_says_what_was_looked_at():
    certificate = judged()
    assert certificate.valid and certificate.reasons == () and certificate.verdict == "VALID"
    assert {gate.passed for gate in certificate.gates} == {True} and len(certificate.gates) == 10


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"achieved_rate_per_s": 19.7}, "19.7 requests/s were sent of 20 due: more than 1% apart"),
        ({"count": 361}, "360 requests were due, and the process has 361 in the window: they must be equal"),
        ({"expected": 270.0}, "360 requests were due where 270.0 within 65.7 were to be expected"),
        ({"late_sends_share": 0.011}, "1.1% of sends were later than 5 ms: above 1%"),
        ({"lateness_p99_s": 0.0105}, "chunks were stamped up to 10.5 ms late (p99): above 10 ms"),
        ({"frames_per_s": 0.0}, "0 frames were received in the window"),
        ({"littles_residual": 0.06}, "Little's law is off by 6.0%: above 5%"),
        ({"sessions_trend_p": 0.001}, "sessions kept rising (Mann-Kendall p = 0.001): below 0.01"),
        ({"ttfa_trend_p": 0.001}, "times to first audio kept rising"),
        ({"recorded": 8}, "8 requests were recorded of 9 submitted: they must be equal"),
    ],
)
def test_each_gate_invalidates_with_a_figure_and_its_limit(changes, reason):
    certificate = judged(**changes)
    assert not certificate.valid and len(failed(certificate)) == 1
    assert reason in failed(certificate)[0] and certificate.reasons[0] == failed(certificate)[0]


@pytest.mark.parametrize(
    ("arrivals", "count", "expected", "passed"),
    [
        (Arrivals("constant", 20.0), 356, 360.0, False),  # a clock has no luck
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
    certificate = judged(count=40, expected=40.0, requests=40.0, late_sends_share=late / 40, **rates)
    (gate,) = (gate for gate in certificate.gates if gate.name == "punctuality")
    assert gate.passed is passed and "1%, or one send" in gate.says


def test_punctuality_of_nothing_is_not_known():
    certificate = judged(late_sends_share=math.nan)
    assert [gate.passed for gate in certificate.gates if gate.name == "punctuality"] == [None]


def test_a_closed_loop_has_no_schedule_and_errors_are_listed_not_judged():
    failures = "3 of 360 requests failed (0.833%)"
    certificate = judged(closed=True, late_sends_share=0.5, achieved_rate_per_s=1.0, failures=failures)
    assert certificate.valid and certificate.verdict == f"VALID, but {failures}" and certificate.reasons == (failures,)
    certificate = judged(failures=failures, frames_per_s=0.0)
    assert certificate.verdict == "INVALID: 0 frames were received in the window: at least 1 is needed"
    assert certificate.reasons[1:] == (failures,)


def test_what_the_window_is_too_short_for_is_said_and_no_fault():
    nothing = math.nan
    certificate = judged(
        residence_s=4.0, littles_residual=0.3, memory_s=6.0, sessions_trend_p=nothing, ttfa_trend_p=nothing
    )
    assert certificate.valid
    assert certificate.reasons == (
        "Little's law: not testable: window too short (18 s, it would need 80 s)",
        "sessions: not testable: window too short (18 s, it would need 48 s)",
        "times to first audio: not testable: window too short (18 s, it would need 48 s)",
    )


def test_a_load_that_changes_by_design_is_not_asked_to_be_steady():
    certificate = judged(unsteady="not asked for: the rate changes", littles_residual=0.3, sessions_trend_p=0.0)
    assert certificate.valid and certificate.reasons == ()
    assert certificate.gates[-1].says == "not asked for: the rate changes"
