"""The demand of a day as a curve of rates: from its peak and trough, or from a trace of arrivals."""

from __future__ import annotations

import math

import numpy as np

from harness.errors import InputError
from harness.records.day import DemandCurve
from harness.traffic.arrivals import Trace

DAY_S = 86_400.0
PARTS = 288  # rates of a curve: five minutes of a day
_ARRIVALS_PER_PART, _FEWEST_PARTS = 50, 24


def diurnal(peak_qps: float, trough_qps: float, peak_hour: float = 20.0) -> DemandCurve:
    """A cosine over 24 hours with its peak at ``peak_hour`` and its trough twelve hours from it."""
    if not 0 <= trough_qps <= peak_qps or not 0 < peak_qps < math.inf:
        raise InputError(f"a day of {trough_qps:g} to {peak_qps:g} requests/s: the trough must be 0 to the peak")
    at_s = np.arange(PARTS) * DAY_S / PARTS
    turn = 2 * np.pi * (at_s / DAY_S - peak_hour / 24)
    qps = trough_qps + (peak_qps - trough_qps) * (1 + np.cos(turn)) / 2
    source = f"diurnal, {trough_qps:g} to {peak_qps:g} requests/s, highest at {_clock(peak_hour)}"
    return DemandCurve(source=source, step_s=DAY_S / PARTS, qps=tuple(qps.tolist()))


def of_trace(trace: Trace, hours: float | None = None, mean_qps: float | None = None) -> DemandCurve:
    """The rates of a trace's arrivals in equal parts of its time: at most 288, of 50 arrivals on average or more.

    ``hours``: its time is stretched to so many; ``mean_qps``: its rates are multiplied to this mean. Raises InputError
    for a trace that is too short for a curve.
    """
    count, own_s = len(trace.times_s), float(trace.times_s[-1])
    parts = min(PARTS, count // _ARRIVALS_PER_PART)
    if parts < _FEWEST_PARTS or own_s <= 0:
        fewest = _FEWEST_PARTS * _ARRIVALS_PER_PART
        raise InputError(f"{trace.name}: {count} arrivals are too few for a demand over time: give {fewest} or more")
    period_s = own_s if hours is None else hours * 3600
    counts = np.histogram(trace.times_s, bins=parts, range=(0.0, own_s))[0]
    mean = count / period_s if mean_qps is None else mean_qps
    said = [] if hours is None else [f"its {own_s / 3600:.3g} h stretched to {hours:g} h"]
    said += [] if mean_qps is None else [f"scaled to {mean_qps:g} requests/s on average"]
    qps = mean * counts / counts.mean()
    source = f"trace {trace.name}{', ' if said else ''}{', '.join(said)}"
    return DemandCurve(source=source, step_s=period_s / parts, qps=tuple(qps.tolist()))


def _clock(hour: float) -> str:
    minutes = round(60 * hour)
    return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"
