"""The demand of a day: its curve from a peak and a trough, and from a trace."""

import numpy as np
import pytest

from harness.content import content_of, read
from harness.errors import InputError
from harness.records.day import DemandCurve
from harness.traffic.arrivals import Trace
from harness.traffic.demand import DAY_S, diurnal, of_trace


def trace(times_s):
    return Trace("calls.csv", "0", np.asarray(times_s, dtype=float))


def test_a_day_has_its_peak_its_trough_and_their_mean():
    curve = diurnal(5.0, 1.0, peak_hour=20.0)
    assert curve.period_s == DAY_S
    assert curve.at(np.array([20.0, 8.0, 44.0]) * 3600) == pytest.approx([5, 1, 5])
    assert curve.mean_qps == pytest.approx(3.0) and curve.peak_qps == pytest.approx(5.0)
    assert "1 to 5 requests/s" in curve.source and "20:00" in curve.source


def test_a_curve_is_linear_between_its_rates_and_repeats():
    curve = DemandCurve(source="x", step_s=10.0, qps=(0.0, 4.0))
    assert curve.at(np.array([0, 5, 10, 15, 20, 25, -5])) == pytest.approx([0, 2, 4, 2, 0, 2, 2])


def test_a_trace_keeps_its_shape_when_it_is_stretched_and_scaled():
    """One hour, in whose second half four times as many call."""
    own = trace(np.concatenate([np.arange(0, 1800, 1.0), np.arange(1800, 3600, 0.25)]))
    plain = of_trace(own)
    assert plain.period_s == pytest.approx(3600, rel=0.001) and plain.mean_qps == pytest.approx(2.5, rel=0.001)
    long = of_trace(own, hours=24, mean_qps=10.0)
    assert long.period_s == pytest.approx(DAY_S) and long.mean_qps == pytest.approx(10.0)
    assert long.at(np.array([18.0]) * 3600) / long.at(np.array([6.0]) * 3600) == pytest.approx([4.0], rel=0.05)
    assert "stretched to 24 h" in long.source and "scaled to 10 requests/s" in long.source


def test_a_part_of_a_trace_holds_fifty_arrivals_on_average():
    assert len(of_trace(trace(np.arange(2000))).qps) == 40


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: diurnal(1.0, 2.0), "the trough must be 0 to the peak"),
        (lambda: diurnal(0.0, 0.0), "the trough must be 0 to the peak"),
        (lambda: of_trace(trace(np.arange(100))), "calls.csv: 100 arrivals are too few"),
        (lambda: of_trace(trace(np.zeros(5000))), "too few"),
    ],
)
def test_a_demand_that_cannot_be_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_curve_is_stored_and_read():
    curve = diurnal(2.0, 1.0)
    assert read(DemandCurve, content_of(curve)) == curve
    with pytest.raises(ValueError, match="two rates or more"):
        read(DemandCurve, {"source": "", "step_s": 1.0, "qps": [1.0]})
