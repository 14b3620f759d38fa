import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.capacity.models.scaling import fit_scaling
from harness.errors import InconclusiveError

# Requests a second of a Cisco switch at 1 to 32 users: Gunther's data, as printed in Schwartz, Practical Scalability.
CISCO = [
    *(955.16, 1878.91, 2688.01, 3548.68, 4315.54, 5130.43, 5931.37, 6531.08),
    *(7219.8, 7867.61, 8278.71, 8646.7, 9047.84, 9426.55, 9645.37, 9897.24),
    *(10097.6, 10240.5, 10532.39, 10798.52, 11151.43, 11518.63, 11806, 12089.37),
    *(12075.41, 12177.29, 12211.41, 12158.93, 12155.27, 12118.04, 12140.4, 12074.39),
]


def test_published_coefficients_within_two_hundredths_of_a_percent():
    fit = fit_scaling(np.arange(1, 33), CISCO)
    assert fit.gamma == pytest.approx(995.6486, rel=2e-4)
    assert fit.sigma == pytest.approx(0.02671591, rel=2e-4)
    assert fit.kappa == pytest.approx(7.690945e-4, rel=2e-4)
    assert math.floor(fit.peak_concurrency()) == 35
    assert fit.throughput_at_concurrency(35) == pytest.approx(12341, rel=2e-4)


def test_what_was_measured_and_how_well_it_is_known():
    fit = fit_scaling(np.arange(1, 33), CISCO)
    assert fit.largest_measured == 32
    assert fit.sigma_interval[0] < fit.sigma < fit.sigma_interval[1]
    assert fit.r_squared > 0.99


@settings(max_examples=30, deadline=None)
@given(gamma=st.floats(0.1, 1e5), sigma=st.floats(0.0, 0.5), kappa=st.floats(0.0, 0.01))
def test_exact_data_are_found_again(gamma, sigma, kappa):
    n = np.array([1, 2, 4, 8, 16, 24, 32.0])
    x = gamma * n / (1 + sigma * (n - 1) + kappa * n * (n - 1))
    fit = fit_scaling(n, x)
    assert fit.throughput_at_concurrency(n) == pytest.approx(x, rel=1e-3)


def test_without_coherency_there_is_no_peak():
    n = np.arange(1.0, 9)
    fit = fit_scaling(n, 100 * n / (1 + 0.1 * (n - 1)))
    assert fit.sigma == pytest.approx(0.1, rel=1e-3)
    assert fit.peak_concurrency() > 1000


@pytest.mark.parametrize("n", [[1, 2, 4, 8, 16], [1, 1, 2, 2, 4, 4, 8], [1, 1.01, 4, 4.02, 8, 8.1]])
def test_refuses_fewer_than_six_points(n):
    with pytest.raises(InconclusiveError, match="needs 6 different concurrencies"):
        fit_scaling(np.array(n), np.array(n) * 10.0)


def test_refuses_a_rung_without_throughput():
    with pytest.raises(InconclusiveError, match="no positive throughput"):
        fit_scaling(np.arange(1, 8), np.array([1, 2, 3, 0, 5, 6, 7.0]))


@pytest.mark.parametrize("rate", [1e-3, 5.0, 1e5])
def test_a_throughput_that_is_exactly_flat_is_all_contention(rate):
    fit = fit_scaling(np.array([1, 2, 4, 8, 16, 32.0]), np.full(6, rate))
    assert (fit.sigma, fit.r_squared) == (pytest.approx(1, abs=1e-3), 1.0)
    assert fit.throughput_at_concurrency(64) == pytest.approx(rate, rel=0.01)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([1.0, 1.0 + 1e-15, 2.0]), min_size=6, max_size=6))
def test_nearly_flat_data_are_fitted_or_refused(x):
    try:
        assert math.isfinite(fit_scaling(np.array([1, 2, 4, 8, 16, 32.0]), np.array(x)).gamma)
    except InconclusiveError:
        pass
