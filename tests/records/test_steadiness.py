"""Whether a load held its level: rises of known size come out, with an error that noise and its memory explain."""

import math
from dataclasses import replace

import numpy as np
import pytest
from test_metrics import SECOND, never_sent, steady_load, stream, window

from harness.records import steadiness
from harness.records.metrics import summarise
from harness.records.schema import Outcome
from harness.records.steadiness import OpenSessions, fitted_rise
from harness.records.summary import Summary


def spans(rng, rate_per_s, seconds, residence_s, before_s=0.0):
    """Poisson arrivals from ``before_s`` before the window on, each open for a drawn time."""
    count = rng.poisson(rate_per_s * (seconds + before_s))
    for sent_s in rng.uniform(-before_s, seconds, count):
        length_ms = 1e3 * residence_s(rng)
        due_ms = round(sent_s * 1e3)
        cut = due_ms + length_ms >= seconds * 1e3
        ended_ms = seconds * 1e3 if cut else due_ms + length_ms
        outcome = Outcome.UNFINISHED if cut else Outcome.DONE
        yield stream([due_ms + 1], due_ms=due_ms, sent_ms=due_ms, ended_ms=ended_ms, outcome=outcome, frames=75)


def test_a_rise_comes_out_with_its_error_and_not_what_another_column_explains():
    rng, at = np.random.default_rng(1), np.arange(50) / 50
    other = rng.normal(8, 2, 50)
    rise, error = fitted_rise(5 + 2 * at + 3 * other + rng.normal(0, 0.1, 50), at, np.ones(50), other)
    assert abs(rise - 2) < 4 * error and 0.03 < error < 0.12
    assert fitted_rise(np.ones(50), at, np.ones(50)) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert all(map(math.isnan, fitted_rise(np.ones(7), at[:7], np.ones(7))))


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.7])
def test_the_error_of_a_rise_covers_values_that_remember_each_other(memory):
    rng, beyond, at = np.random.default_rng(2), 0, np.arange(50) / 50
    for _ in range(400):
        values = [rng.normal()]
        for _ in range(49):
            values.append(memory * values[-1] + rng.normal() * math.sqrt(1 - memory**2))
        rise, error = fitted_rise(np.array(values), at, np.ones(50))
        beyond += rise > 2.5 * error
    assert beyond / 400 < 0.02


def test_memory_is_that_of_the_sessions_found_at_a_random_moment():
    seconds = [(t, 9 if t % 2 else 1) for t in range(40)]
    results = [stream([1], sent_ms=1000 * t, ended_ms=1e3 * (t + long), frames=long) for t, long in seconds]
    sessions = OpenSessions(results, *window(20_000, 40_000))
    assert sessions.mean == pytest.approx(5, rel=0.01)  # half a request a second of 1 s, and half of 9 s
    assert sessions.memory_s == pytest.approx((81 + 1) / 10, rel=0.05)


def test_a_window_without_sessions_has_figures():
    figures = OpenSessions([never_sent(5)], *window(0, 1000)).figures()
    assert figures["memory_s"] == figures["sessions_rise"] == 0 and math.isnan(figures["littles_residual"])


def test_sessions_that_the_ends_cut_are_counted_by_their_ages():
    rng, scores = np.random.default_rng(3), []
    for _ in range(150):
        lengths = lambda rng: 30.0 if rng.random() < 0.2 else rng.uniform(1, 5)  # noqa: E731
        figures = OpenSessions(list(spans(rng, 2, 400, lengths, before_s=30)), *window(0, 400_000)).figures()
        scores.append(figures["littles_residual"] / figures["littles_error"])
    assert abs(np.mean(scores)) < 0.3 and 0.7 < np.std(scores) < 1.3


def test_sessions_that_never_end_grow_too_old():
    rng = np.random.default_rng(4)
    stuck = lambda rng: 1e4 if rng.random() < 0.05 else rng.uniform(1, 5)  # noqa: E731
    figures = OpenSessions(list(spans(rng, 2, 120, stuck, before_s=5)), *window(0, 120_000)).figures()
    assert figures["littles_residual"] > 0.1 and figures["littles_residual"] > 5 * figures["littles_error"]


def test_a_session_found_in_progress_is_as_old_as_what_it_has_spoken():
    """Ten sessions of 1,000 s at even phases: none ends in the window, and their ages are those of a steady state."""
    sessions = [
        stream(np.arange(0, 20_000, 1000), ended_ms=20_000, outcome=Outcome.UNFINISHED, sent_ms=0, start_frame=phase)
        for phase in range(50, 1050, 100)
    ]
    sessions = [replace(each, frames=1000 - each.start_frame + 50) for each in sessions]
    figures = OpenSessions(sessions, *window(0, 20_000)).figures()
    assert abs(figures["littles_residual"]) < figures["littles_error"]


def test_a_queue_at_high_utilisation_remembers_longer_than_any_residence():
    summary = Summary(requests=200.0, seconds=100.0, memory_s=5.0, sessions_variance=3.0)
    assert steadiness.slowest_memory_s(summary) == 5
    assert steadiness.slowest_memory_s(replace(summary, sessions_variance=90.0)) == pytest.approx(90)
    assert steadiness.slowest_memory_s(replace(summary, requests=0.0)) == math.inf


def test_arrivals_that_rise_by_a_tenth():
    share = (np.arange(100_000) + 0.5) / 100_000
    times = 2 * share / (0.95 + np.sqrt(0.95**2 + 0.2 * share))  # of a rate from 95% to 105%
    assert steadiness.load_rise(times * 60, 60) == pytest.approx(0.1, abs=0.002)
    assert steadiness.load_rise(share * 60, 60) == pytest.approx(0, abs=1e-9)
    assert math.isnan(steadiness.load_rise(np.empty(0), 60))


def speaking(slower, of_sessions=4.0, seconds=60):
    """Streams whose chunks are 10 ms x (30 + streams) apart at first, and slower at the end; ever more of them join."""
    rng = np.random.default_rng(5)
    starts = np.sort(rng.uniform(0, seconds, int(of_sessions * seconds / 6)))
    for start_s in starts:
        at, chunks = start_s, []
        while at < min(start_s + 6, seconds):
            streams = np.count_nonzero((starts <= at) & (at < starts + 6))
            at += (0.030 + 0.006 * streams) * (1 + slower * at / seconds) * rng.normal(1, 0.05)
            chunks.append(at * 1e3)
        yield stream(chunks, sent_ms=start_s * 1e3, due_ms=start_s * 1e3)


@pytest.mark.parametrize("slower", [0.0, 0.2])
def test_a_slower_server_is_told_from_more_streams(slower):
    rise, error = steadiness.step_rise(list(speaking(slower)), *window(0, 60_000))
    assert error < 0.05 and rise == pytest.approx(slower, abs=3 * error + 0.02)


def test_first_audio_that_rises_and_that_does_not():
    rising = summarise(list(steady_load(drift_ms=2.0)), *window(1000, 19_000))
    assert rising.ttfa_rise_s == pytest.approx(0.72, rel=0.02) and rising.ttfa_rise_error_s < 0.05
    assert rising.ttfa_span_s == pytest.approx(0.72, rel=0.02)
    steady = summarise(list(steady_load()), *window(1000, 19_000))
    assert steady.ttfa_rise_s == pytest.approx(0, abs=1e-9) and steady.ttfa_span_s == pytest.approx(0, abs=1e-9)


def test_a_request_that_still_waits_has_waited_so_long_at_least():
    waits = stream([], due_ms=500, sent_ms=500, ended_ms=5000, outcome=Outcome.UNFINISHED, frames=9)
    summary = summarise([stream([100], due_ms=0), waits], *window(0, 2000))
    assert summary.ttfa_span_s == pytest.approx(1.4)
    assert math.isnan(summary.ttfa_rise_s)


def test_records_that_cannot_be_are_counted():
    true = stream([100], due_ms=0, sent_ms=1)
    false = [replace(true, ended_ns=true.sent_ns - 1), replace(true, sent_ns=true.sent_ns + SECOND)]
    assert summarise([true, *false, never_sent(5)], *window(0, 2000)).impossible == 2
