"""When a rung of a ladder, and the ladder itself, may end: pure decisions on observed figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import stdtrit

SETTLE_SHARE = 0.25  # of a rung's full time: sessions that just joined are still opening
MIN_READINGS = 5  # one per second, after settling
MIN_RUNGS = 3  # a step time is fitted from this many
GROWTH = 1.05  # of the audio rate over the highest before; less is noise
OVER_SATURATED = "over-saturated"
REPEATS = 2  # a disturbed rung is measured again for as long as this many rungs take
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Held:
    """A rung that was held: its number of users, and their total audio rate (audio seconds per second)."""

    users: int
    audio_s_per_s: float

    @property
    def pace(self) -> float:
        """Seconds that a user takes per second of audio, including first audio and pauses; not an RTF of a request."""
        return self.users / self.audio_s_per_s if self.audio_s_per_s > 0 else math.inf


@dataclass
class Readings:
    """The audio rates of a rung (audio seconds per second), read once a second. A sample read twice counts once."""

    rates: list[float] = field(default_factory=list)
    _samples: int = 0

    def note(self, samples: int, audio_s_per_s: float, settled: bool) -> None:
        """Note ``samples`` of audio received since the start of the test; ignored before the rung has ``settled``."""
        if settled and (samples > self._samples or not audio_s_per_s):
            self.rates.append(audio_s_per_s)
        self._samples = samples


@dataclass(frozen=True)
class Patience:
    """When a rung or the ladder ends. ``rung_s``: the longest that a rung is held.

    ``precision``: a rung may end early once the 95% interval of its audio rate has this relative half-width; None holds
    every rung for its full time.
    ``slowest_rtf``: the highest real-time factor that any class's SLO allows; None never ends the ladder early, however
    slow it gets.
    """

    rung_s: float
    precision: float | None = None
    slowest_rtf: float | None = None

    @property
    def settle_s(self) -> float:
        return settle_s(self.rung_s)

    def has_enough(self, rates: Sequence[float]) -> bool:
        """Whether a rung may end: its rate is known precisely and its two halves agree. ``rates``: one per second.

        The decision uses only deviations from the mean. For nearly normal rates these are independent of the mean, so
        stopping on them does not bias the reported rate.
        """
        if self.precision is None or len(rates) < MIN_READINGS:
            return False
        return relative_half_width(rates) <= self.precision and _halves_apart(rates) <= 2 * self.precision

    def over_saturated(self, rungs: Sequence[Held]) -> str:
        """Why higher rungs are not worth their time, or "".

        The last two rungs were slower than every class's SLO allows, and the last produced no more audio than before. A
        single slow rung may be the fault of other load on the host.
        """
        if self.slowest_rtf is None or len(rungs) < MIN_RUNGS:
            return ""
        before, last = rungs[-2:]
        most = max(rung.audio_s_per_s for rung in rungs[:-1])
        if min(before.pace, last.pace) <= self.slowest_rtf or last.audio_s_per_s >= GROWTH * most > 0:
            return ""
        slow = f"at {before.users} sessions one second of audio took {before.pace:.2f} s"
        return f"{OVER_SATURATED}: {slow}, at {last.users} sessions {last.pace:.2f} s"


@dataclass
class Repeats:
    """The time in which disturbed rungs are measured again: bounded for each, and by ``most_s`` for all of a ladder."""

    rung_s: float
    rungs: int
    spent_s: float = 0.0

    @property
    def most_s(self) -> float:
        """As long as the ladder itself takes."""
        return self.rung_s * self.rungs

    def has_time(self, held_s: float) -> bool:
        """Whether a rung that has been held for ``held_s``, all attempts together, may be measured once more."""
        extra_s = held_s - settle_s(self.rung_s)
        return extra_s <= REPEATS * self.rung_s and self.spent_s + extra_s <= self.most_s

    def note(self, held_s: float) -> None:
        """Note that a rung has ended that was held for ``held_s``, all attempts together."""
        self.spent_s += max(held_s - self.rung_s, 0.0)


def settle_s(rung_s: float) -> float:
    """Seconds at the start of a rung that are ignored, however long it is held."""
    return SETTLE_SHARE * rung_s


def slowest_rtf(slos: Sequence) -> float:
    """The highest real-time factor that any class's SLO allows; at least 1, the pace of speech."""
    return max([1.0, *(slo.limit for slo in slos if slo.metric == "rtf")])


def relative_half_width(rates: Sequence[float]) -> float:
    """Half-width of the mean's 95% interval / the mean, by Student's t; infinite below two rates, or at rate 0.

    Consecutive readings of one server are correlated: n readings with lag-1 correlation r count as n (1 - r) / (1 + r),
    as in a first-order autoregression (Law, Simulation Modeling and Analysis, 4.4). With few readings the interval is
    still slightly too narrow: with 12 readings of r = 0.5 it covers the mean 86 times in 100; uncorrected, 73 times.
    """
    values = np.asarray(rates, dtype=float)
    if len(values) < 2 or not values.mean() > 0:
        return math.inf
    quantile = stdtrit(len(values) - 1, (1 + _CONFIDENCE) / 2)
    r = _correlation(values)
    return float(quantile * values.std(ddof=1) / math.sqrt(len(values) * (1 - r) / (1 + r)) / values.mean())


def _correlation(values: np.ndarray) -> float:
    """Lag-1 autocorrelation, corrected for the -1 / n bias of its estimate, and limited to 0 to 0.9."""
    apart = values - values.mean()
    spread = float((apart**2).sum())
    r = float((apart[1:] * apart[:-1]).sum()) / spread if spread > 0 else 0.0
    return min(max(r + 1 / len(values), 0.0), 0.9)


def _halves_apart(rates: Sequence[float]) -> float:
    values, half = np.asarray(rates, dtype=float), len(rates) // 2
    return float(abs(values[:half].mean() - values[-half:].mean()) / values.mean())
