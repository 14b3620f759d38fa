"""Tests whether a load stayed level over a window: how far it rose, and how far chance could make it seem to.

A rise is that of a straight line fitted over the window. Its error is one standard deviation without a real rise,
including the correlation of the values: a queue stays high or low for long, and shows trends that do not exist.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri, stdtrit

from harness import wire
from harness.records.schema import Outcome, Result
from harness.records.summary import Summary

MIN_PARTS = 8  # of a window that is tested for a trend
MAX_PARTS = 50
_MOMENTS = 1000  # at which the number of sessions is counted
_FRAMES_PER_PART, _REQUESTS_PER_PART = 40, 3
_STEP_PART_S = 2.0  # shorter parts are correlated through the host
_TAIL = 0.003  # one gate's share of the false alarms, where Student's t is matched
_MAX_CORRELATION = 0.95
_NS = 1e9


class OpenSessions:
    """The requests between sent and ended over [start_ns, end_ns).

    A request that did not complete counts with the residence R expected at the pace of completed ones; a session found
    in progress (``start_frame``) as open since its first frame, at that pace too.
    """

    def __init__(self, results: Sequence[Result], start_ns: int, end_ns: int):
        own = [each for each in results if 0 < each.sent_ns < end_ns]
        self.seconds = (end_ns - start_ns) / _NS
        times = np.array([(each.sent_ns, each.ended_ns) for each in own], dtype=np.int64).reshape(-1, 2)
        self._sent, self._ended = ((times - start_ns) / _NS).T
        self._frames, self._before = np.array([(r.frames, r.start_frame) for r in own], float).reshape(-1, 2).T
        whole = np.array([each.outcome == Outcome.DONE for each in own], dtype=bool) & (self._ended < self.seconds)
        self._pace_s = _pace_s(own, self._ended - self._sent, whole, end_ns)
        asked_s = self._frames * self._pace_s
        self._residence_s = np.where(whole, self._ended - self._sent, asked_s) + self._before * self._pace_s
        self._inside_s = (np.minimum(self._ended, self.seconds) - self._sent.clip(0)).clip(0)
        self.mean = float(self._inside_s.sum()) / self.seconds

    def figures(self) -> dict[str, float]:
        """The figures by their names in a summary."""
        rise, variance = self._line()
        age_s, expected_s, error_s = self._open_ages()
        whole_s = self.mean * self.seconds
        return {
            "memory_s": self.memory_s,
            "sessions_rise": rise,
            "sessions_rise_seconds": (1 - self._fitted_from) * self.seconds,
            "sessions_variance": variance,
            "lengths_cv2": self._lengths_cv2(),
            "littles_residual": (age_s - expected_s) / whole_s if whole_s else math.nan,
            "littles_error": error_s / whole_s if whole_s else math.nan,
        }

    @property
    def memory_s(self) -> float:
        """E[R^2] / E[R] of the residence R: correlation time of the number of sessions in an M/G/infinity queue.

        It is the integral of that queue's autocorrelation over both sides, and the mean of R over the sessions found at
        a random moment.
        """
        inside_s = self._inside_s.sum()
        return float(self._inside_s @ self._residence_s / inside_s) if inside_s > 0 else 0.0

    @property
    def _fitted_from(self) -> float:
        """Share of the window after which sessions are judged: half of it where it started empty, to fill up."""
        began = np.count_nonzero((self._sent <= 0) & (self._ended > 0))
        return 0.0 if began else 0.5

    def _line(self) -> tuple[float, float]:
        """The rise of a line through the number of sessions at many moments, and their variance about it."""
        share = (np.arange(_MOMENTS) + 0.5) / _MOMENTS
        moments = (self._fitted_from + (1 - self._fitted_from) * share) * self.seconds
        count = np.searchsorted(np.sort(self._sent), moments, side="right").astype(float)
        count -= np.searchsorted(np.sort(self._ended), moments, side="right")
        slope, level = np.polyfit(share, count, 1)
        return float(slope), float(np.var(count - level - slope * share))

    def _lengths_cv2(self) -> float:
        """Squared coefficient of variation of the requested frames, 1 for fewer than two requests."""
        frames = self._frames + self._before
        return float(np.var(frames) / np.mean(frames) ** 2) if len(frames) > 1 else 1.0

    def _open_ages(self) -> tuple[float, float, float]:
        """Total age of the sessions open at the end; its expected value, and its standard error.

        A session found at a random moment has the mean age E[R^2] / 2E[R], and the mean squared age E[R^3] / 3E[R].
        Both are means over the session time of the window, of R / 2 and R^2 / 3; their own error is that of this many
        sessions of unequal weight.
        """
        is_open = self._ended >= self.seconds
        ages_s = (self.seconds - self._sent + self._before * self._pace_s)[is_open]
        mean_s = self.memory_s / 2
        if not len(ages_s):
            return 0.0, 0.0, 0.0
        square = float(self._inside_s @ self._residence_s**2 / self._inside_s.sum())
        sessions = self._inside_s.sum() ** 2 / (self._inside_s @ self._inside_s)  # effective number
        variance = (square / 3 - mean_s**2) + len(ages_s) * (square / 4 - mean_s**2) / sessions
        return float(ages_s.sum()), len(ages_s) * mean_s, math.sqrt(len(ages_s) * max(variance, 0.0))


def _pace_s(own: Sequence[Result], residence_s: np.ndarray, whole: np.ndarray, end_ns: int) -> float:
    """Seconds per frame, opening included: the median of completed requests, otherwise of all requests."""
    if whole.any():
        frames = np.array([max(each.frames, 1) for each in own], dtype=float)
        return float(np.median(residence_s[whole] / frames[whole]))
    heard = [each.chunks.samples[each.chunks.received_ns < end_ns].sum() for each in own]
    open_s = sum(min(each.ended_ns, end_ns) - each.sent_ns for each in own) / _NS
    return open_s / (sum(heard) / wire.SAMPLES_PER_FRAME) if sum(heard) else 0.0


def slowest_memory_s(summary: Summary, burstiness: float = 1.0) -> float:
    """The longer of two correlation times, in seconds: of the residences, and of a queue with this spread of sessions.

    Sessions that arrive and leave at random increase the variance by (1 + burstiness) x rate per second; for the
    measured variance the restoring time constant must be 2 x variance / that, and the integral of the autocorrelation
    is twice that. At high utilisation it is far longer than any residence: 1 / (1 - utilisation) times.
    """
    comings_per_s = (1 + burstiness) * summary.requests / summary.seconds
    queue_s = 4 * summary.sessions_variance / comings_per_s if comings_per_s else math.inf
    return max(summary.memory_s, queue_s)


def load_rise(due_s: np.ndarray, seconds: float) -> float:
    """Rise of the arrival rate as a share of its mean: 12 x (mean of time / window - 1/2), Laplace's statistic."""
    return 12 * (float(np.mean(due_s)) / seconds - 0.5) if len(due_s) else math.nan


def ttfa_rise(due_s: np.ndarray, ttfa_s: np.ndarray, seconds: float, memory_s: float) -> tuple[float, float]:
    """Rise of TTFA over the window and its error, in seconds; NaN below 8 parts of ``memory_s`` each."""
    known = np.isfinite(ttfa_s)
    due_s, ttfa_s = due_s[known], ttfa_s[known]
    parts = int(min(seconds / memory_s if memory_s > 0 else 0, len(due_s) / _REQUESTS_PER_PART, MAX_PARTS))
    if parts < MIN_PARTS:
        return math.nan, math.nan
    part = (due_s / seconds * parts).astype(int)
    count = np.bincount(part, minlength=parts)
    sums = np.bincount(part, ttfa_s, minlength=parts)
    filled = count > 0
    return fitted_rise(sums[filled] / count[filled], np.arange(parts)[filled] / parts, count[filled])


def step_rise(results: Sequence[Result], start_ns: int, end_ns: int) -> tuple[float, float]:
    """Rise of the step time at an equal number of streams, as a share of its mean, and its error.

    A step is the time from chunk to chunk of a stream, per frame; the opening of a stream is not included. Over parts
    of the window it is fitted as a + b x (streams) + c x (time), and the rise is c. NaN below 8 parts with enough
    frames.
    """
    gaps, seconds = _gaps(results, start_ns, end_ns), (end_ns - start_ns) / _NS
    parts = int(min(MAX_PARTS, gaps[2].sum() / _FRAMES_PER_PART, seconds / _STEP_PART_S))
    fits = [_step_rise(*gaps, seconds, number) for number in (parts, parts // 2, parts // 4) if number >= MIN_PARTS]
    if not fits:
        return math.nan, math.nan
    # short parts underestimate host effects that last for many steps
    return fits[0][0], max(error for _, error in fits)


def _step_rise(
    at_s: np.ndarray, gap_s: np.ndarray, frames: np.ndarray, seconds: float, parts: int
) -> tuple[float, float]:
    part = (at_s / seconds * parts).astype(int)
    time_s, count = (np.bincount(part, each, minlength=parts) for each in (gap_s, frames))
    known = count > 0
    step_s, streams = time_s[known] / count[known], time_s[known] * parts / seconds
    rise, error = fitted_rise(step_s, np.arange(parts)[known] / parts, count[known], streams)
    mean_s = time_s.sum() / count.sum()
    return rise / mean_s, error / mean_s


def _gaps(results: Sequence[Result], start_ns: int, end_ns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arrival (s), time since the previous chunk (s) and frames of each chunk in the window; no first chunks."""
    columns = [np.empty((3, 0))]
    for each in results:
        received = each.chunks.received_ns
        if len(received) > 1 and received[-1] >= start_ns and received[0] < end_ns:
            frames = each.chunks.samples[1:] / wire.SAMPLES_PER_FRAME
            columns.append(np.stack([(received[1:] - start_ns) / _NS, np.diff(received) / _NS, frames]))
    gaps = np.concatenate(columns, axis=1)
    inside = (gaps[0] >= 0) & (gaps[0] < (end_ns - start_ns) / _NS)
    return tuple(gaps[:, inside])


def fitted_rise(
    values: np.ndarray, at: np.ndarray, weights: np.ndarray, other: np.ndarray | None = None
) -> tuple[float, float]:
    """The rise of ``values`` while ``at`` goes from 0 to 1, at equal ``other``, and its error; NaN below 8 values.

    Weighted least squares. The error includes the lag-1 correlation r of the residuals by (1 + r) / (1 - r), and the
    uncertainty of a spread from few values (Student's t).
    """
    if len(values) < MIN_PARTS:
        return math.nan, math.nan
    columns = [np.ones_like(at), at] + ([] if other is None or np.ptp(other) == 0 else [other])
    root = np.sqrt(weights / np.mean(weights))
    design = np.stack(columns, axis=1) * root[:, None]
    inverse = np.linalg.pinv(design)
    fit = inverse @ (values * root)
    left = values * root - design @ fit
    free = len(values) - len(columns)
    error = math.sqrt(float(left @ left) / free * float(inverse[1] @ inverse[1]))
    r = _correlation(left, len(columns))
    return float(fit[1]), error * math.sqrt((1 + r) / (1 - r)) * stdtrit(free, _TAIL) / ndtri(_TAIL)


def _correlation(left: np.ndarray, fitted: int) -> float:
    """Lag-1 correlation of the residuals, at least 0, corrected for the bias of a fit with so many parameters."""
    spread = float(left @ left)
    r = float(left[1:] @ left[:-1]) / spread if spread > 0 else 0.0
    return min(max(r + (fitted + r) / len(left), 0.0), _MAX_CORRELATION)
