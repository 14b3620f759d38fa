import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import wire
from harness.capacity.models.service import BatchTimes, fit_service_time, runs_test
from harness.errors import InconclusiveError
from harness.records.schema import BatchStatistics, StageStatistics


def times(sizes, seconds, executions=None) -> BatchTimes:
    sizes = np.array(sizes, dtype=float)
    counts = np.full(len(sizes), 100.0) if executions is None else np.array(executions, dtype=float)
    return BatchTimes(sizes, counts, np.array(seconds, dtype=float))


def window(*batches: tuple[int, int, int]) -> StageStatistics:
    return StageStatistics(wire.DIFFUSION, 0, 0, 0, 0, tuple(BatchStatistics(*batch) for batch in batches))


def test_collect_adds_windows_up_and_leaves_out_what_never_ran():
    collected = BatchTimes.collect(
        [window((1, 2, 10_000_000), (4, 0, 0)), window((2, 1, 9_000_000), (1, 2, 14_000_000))]
    )
    assert collected.batch_size.tolist() == [1, 2]
    assert collected.executions.tolist() == [4, 1]
    assert collected.mean_s.tolist() == pytest.approx([0.006, 0.009])


@given(
    alpha=st.floats(1e-6, 1e-2),
    tau0=st.floats(1e-6, 1e-1),
    sizes=st.lists(st.integers(1, 128), min_size=3, max_size=10, unique=True),
)
def test_an_exact_line_is_found(alpha, tau0, sizes):
    fit = fit_service_time(times(sizes, alpha * np.array(sizes) + tau0))
    assert fit.alpha_s == pytest.approx(alpha, rel=1e-5, abs=1e-9)
    assert fit.tau0_s == pytest.approx(tau0, rel=1e-5, abs=1e-8)
    assert fit.worst_residual < 1e-5


def test_rate_is_batch_over_time():
    fit = fit_service_time(times([1, 2, 4], [0.003, 0.004, 0.006]))
    assert fit.rate_per_s(4) == pytest.approx(4 / 0.006)
    assert fit.r_squared == pytest.approx(1)


def test_executions_are_weights():
    fit = fit_service_time(times([1, 2, 4], [0.003, 0.004, 0.060], executions=[1e6, 1e6, 1e-3]))
    assert fit.alpha_s == pytest.approx(0.001, rel=1e-3)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    sizes, hits = np.array([1, 2, 3, 4, 6, 8]), 0
    for _ in range(300):
        fit = fit_service_time(times(sizes, 0.002 * sizes + 0.005 + rng.normal(0, 0.0002, 6)))
        hits += fit.alpha_interval_s[0] <= 0.002 <= fit.alpha_interval_s[1]
    assert 0.91 <= hits / 300 <= 0.99


def test_two_batch_sizes_give_a_line_without_an_interval():
    fit = fit_service_time(times([1, 2], [0.003, 0.004]))
    assert fit.alpha_s == pytest.approx(0.001)
    assert fit.alpha_interval_s == (-math.inf, math.inf)


@pytest.mark.parametrize("sizes", [[], [3]])
def test_refuses_fewer_than_two_batch_sizes(sizes):
    with pytest.raises(InconclusiveError, match="two or more are needed"):
        fit_service_time(times(sizes, [0.01] * len(sizes)))


@pytest.mark.parametrize(
    ("seconds", "name"), [([0.010, 0.008, 0.006, 0.004], "alpha"), ([0.001, 0.011, 0.021, 0.031], "tau0")]
)
def test_refuses_what_no_service_time_can_be(seconds, name):
    with pytest.raises(InconclusiveError, match=f"{name} = .* is negative"):
        fit_service_time(times([1, 2, 3, 4], seconds))


def test_a_slope_below_zero_by_chance_is_held_at_zero():
    fit = fit_service_time(times([1, 2, 3, 4], [0.0101, 0.0099, 0.0101, 0.0099]))
    assert fit.alpha_s == 0
    assert fit.tau0_s == pytest.approx(0.01)


def test_stair_steps_show_in_the_residuals():
    sizes = np.arange(1, 33)
    stairs = fit_service_time(times(sizes, 0.004 + 0.008 * np.ceil(sizes / 16)))
    noise = np.random.default_rng(3).normal(1, 0.01, 32)
    line = fit_service_time(times(sizes, (0.004 + 0.001 * sizes) * noise))
    assert stairs.runs_p_value < 0.01 < line.runs_p_value
    assert stairs.worst_residual > 0.1 > line.worst_residual


def test_runs_test_needs_six_residuals():
    assert math.isnan(runs_test(np.array([1, -1, 1, -1, 1.0])))
    assert runs_test(np.array([1.0] * 10 + [-1.0] * 10)) < 0.001
