"""A rung ends when it has told enough, a ladder when it has no more to tell; neither chooses what it reports."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.drive.stop_rule import MIN_READINGS, Held, Patience, Readings, relative_half_width, slowest_rtf
from harness.records.slo import Slo

RATES = st.lists(st.floats(0.1, 1000), min_size=0, max_size=20)


def test_a_steady_rate_is_known_soon_and_a_rising_or_noisy_one_is_not():
    patience = Patience(12.0, precision=0.05)
    assert not patience.has_enough([20.0] * (MIN_READINGS - 1))
    assert patience.has_enough([20.0, 20.1, 19.9, 20.0, 20.1])
    assert not patience.has_enough([14.0, 17.0, 20.0, 23.0, 26.0])
    assert not patience.has_enough([10.0, 30.0, 12.0, 28.0, 15.0, 25.0])
    assert not Patience(12.0).has_enough([20.0] * 100)


def test_a_sample_that_is_seen_twice_is_one_reading_and_a_server_that_is_silent_is_one_of_zero():
    readings = Readings()
    for samples, rate, settled in ((9, 7.0, False), (9, 7.0, True), (12, 3.0, True), (12, 0.0, True)):
        readings.note(samples, rate, settled)
    assert readings.rates == [3.0, 0.0]


@given(RATES, st.floats(0.01, 100))
def test_the_decision_does_not_depend_on_the_size_of_the_rate(rates, factor):
    width = relative_half_width(rates)
    assert relative_half_width([rate * factor for rate in rates]) == pytest.approx(width, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("correlation", "least"), [(0.0, 0.94), (0.5, 0.83)])  # as independent: 0.95 and 0.73
def test_readings_that_follow_each_other_make_the_interval_wider(correlation, least):
    rng, held = np.random.default_rng(2), 0
    for _ in range(1000):
        noise = rng.normal(0, 1, 40)
        for now in range(1, 40):
            noise[now] = correlation * noise[now - 1] + math.sqrt(1 - correlation**2) * noise[now]
        rates = 20 + noise[-12:]
        held += abs(rates.mean() - 20) / rates.mean() <= relative_half_width(rates)
    assert held / 1000 > least


def test_ending_when_precise_does_not_bias_the_rate():
    rng = np.random.default_rng(1)
    patience, means, lengths = Patience(12.0, precision=0.04), [], []
    for _ in range(2000):
        rates = rng.normal(20, 1.0, 12)
        length = next((n for n in range(1, 12) if patience.has_enough(rates[:n])), 12)
        means.append(rates[:length].mean())
        lengths.append(length)
    assert np.mean(lengths) < 11
    assert np.mean(means) == pytest.approx(20, abs=4 * np.std(means) / math.sqrt(len(means)))


@pytest.mark.parametrize(
    ("rungs", "ends"),
    [
        ([(1, 10), (8, 7), (16, 7)], True),  # two rungs in a row slower than speech, and no more in all
        ([(1, 10), (8, 7), (16, 14)], False),  # slower twice, but more audio than ever
        ([(1, 10), (8, 30), (40, 20)], False),  # one may have met a busy host
        ([(1, 10), (8, 7), (16, 20)], False),  # and here did
        ([(1, 10), (8, 30), (16, 30)], False),  # no more, but fast enough for everybody
        ([(8, 7), (16, 14)], False),  # too few to fit anything to
        ([(1, 0), (2, 0), (4, 0)], True),
    ],
)
def test_a_ladder_ends_where_it_is_over_saturated(rungs, ends):
    held = [Held(users, rate) for users, rate in rungs]
    assert bool(Patience(6.0, slowest_rtf=1.0).over_saturated(held)) is ends
    assert Patience(6.0).over_saturated(held) == ""


def test_a_slo_of_a_slow_class_is_the_pace_that_counts():
    assert slowest_rtf([]) == 1.0
    assert slowest_rtf([Slo.parse("job", "rtf_p95", 2.5), Slo.parse("job", "ttfa_p95_s", 9.0)]) == 2.5
