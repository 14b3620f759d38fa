"""When a rung of a ladder may end, and when its ladder may: pure decisions on what was observed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import stdtrit

SETTLE_SHARE = 0.25  # of a rung's full time: sessions that just joined are still opening
MIN_READINGS = 5  # one a second, after that
MIN_RUNGS = 3  # a step time is fitted from
GROWTH = 1.05  # of audio over the most before; less is noise
OVER_SATURATED = "over-saturated"
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Held:
    """A rung that was held: its users, and the audio that they got together (seconds per second)."""

    users: int
    audio_s_per_s: float

    @property
    def pace(self) -> float:
        """Seconds that a user takes for a second of audio, first audio and pauses counted in; no RTF of a request."""
        return self.users / self.audio_s_per_s if self.audio_s_per_s > 0 else math.inf


@dataclass
class Readings:
    """The audio rates of a rung (seconds per second), sampled each second. A sample seen twice counts once."""

    rates: list[float] = field(default_factory=list)
    _samples: int = 0

    def note(self, samples: int, audio_s_per_s: float, settled: bool) -> None:
        """``samples`` heard since the start of the test; before the rung has ``settled`` nothing counts."""
        if settled and (samples > self._samples or not audio_s_per_s):
            self.rates.append(audio_s_per_s)
        self._samples = samples


@dataclass(frozen=True)
class Patience:
    """How long a ladder goes on. ``rung_s``: the most that a rung is held.

    ``precision``: the relative half-width of the audio rate's interval with which a rung may end before; None holds
    every rung for its full time.
    ``slowest_rtf``: the highest real-time factor that an SLO of some class allows; None goes to the
    ladder's end, however slow.
    """

    rung_s: float
    precision: float | None = None
    slowest_rtf: float | None = None

    @property
    def settle_s(self) -> float:
        return settle_s(self.rung_s)

    def has_enough(self, rates: Sequence[float]) -> bool:
        """Whether a rung may end: its rate is known precisely, and its two halves agree. ``rates``: one a second.

        Only deviations from the mean decide. For rates that are near normal these say nothing of the mean itself
        (it is independent of them), so the window is not chosen by the figure that it reports.
        """
        if self.precision is None or len(rates) < MIN_READINGS:
            return False
        return relative_half_width(rates) <= self.precision and _halves_apart(rates) <= 2 * self.precision

    def over_saturated(self, rungs: Sequence[Held]) -> str:
        """Why no higher rung is worth its time, or "": two in a row were slower than any class's SLO allows,
        and the last made no more audio in all.

        One alone may have met a host that was busy with something else.
        """
        if self.slowest_rtf is None or len(rungs) < MIN_RUNGS:
            return ""
        before, last = rungs[-2:]
        most = max(rung.audio_s_per_s for rung in rungs[:-1])
        if min(before.pace, last.pace) <= self.slowest_rtf or last.audio_s_per_s >= GROWTH * most > 0:
            return ""
        slow = f"{before.users} sessions took {before.pace:.2f} s for a second of audio, {last.users} {last.pace:.2f} s"
        return f"{OVER_SATURATED}: {slow}"


def settle_s(rung_s: float) -> float:
    """Seconds at the start of a rung that count for nothing, however long it is held."""
    return SETTLE_SHARE * rung_s


def slowest_rtf(slos: Sequence) -> float:
    """The highest real-time factor that an SLO allows a class; at least 1, the pace of speech."""
    return max([1.0, *(slo.limit for slo in slos if slo.metric == "rtf")])


def relative_half_width(rates: Sequence[float]) -> float:
    """Half of the 95% interval of the mean / the mean, by Student's t; infinite below two rates, or at rate 0.

    Readings of one server follow each other: of n of them with lag-1 correlation r only n (1 - r) / (1 + r) count, as
    in a first-order autoregression (Law, Simulation Modeling and Analysis, 4.4). With few readings it is still a little
    too narrow: 12 of r = 0.5 hold their mean 86 times in 100, where it would be 73 without.
    """
    values = np.asarray(rates, dtype=float)
    if len(values) < 2 or not values.mean() > 0:
        return math.inf
    quantile = stdtrit(len(values) - 1, (1 + _CONFIDENCE) / 2)
    r = _correlation(values)
    return float(quantile * values.std(ddof=1) / math.sqrt(len(values) * (1 - r) / (1 + r)) / values.mean())


def _correlation(values: np.ndarray) -> float:
    """Of each with the one before it, without the bias of -1 / n of its estimate; from 0 to 0.9."""
    apart = values - values.mean()
    spread = float((apart**2).sum())
    r = float((apart[1:] * apart[:-1]).sum()) / spread if spread > 0 else 0.0
    return min(max(r + 1 / len(values), 0.0), 0.9)


def _halves_apart(rates: Sequence[float]) -> float:
    values, half = np.asarray(rates, dtype=float), len(rates) // 2
    return float(abs(values[:half].mean() - values[-half:].mean()) / values.mean())
