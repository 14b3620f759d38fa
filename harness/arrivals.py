"""Arrival processes: when requests are due, as endless iterators of seconds since the start; no clock, no sleep."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from harness.errors import InputError

MAX_RATE_PER_S = 100_000
_BLOCK = 1024


def constant(rate_per_s: float) -> Iterator[float]:
    """One arrival every 1 / rate seconds, the first at one such gap."""
    rate = _checked_rate(rate_per_s)
    return (number / rate for number in itertools.count(1))


def poisson(rate_per_s: float, rng: np.random.Generator) -> Iterator[float]:
    """A Poisson process: exponential gaps of mean 1 / rate."""
    return gamma(rate_per_s, 1.0, rng)


def gamma(rate_per_s: float, burstiness: float, rng: np.random.Generator) -> Iterator[float]:
    """Gamma gaps of mean 1 / rate with squared coefficient of variation ``burstiness``.

    1 is Poisson, above 1 comes in bursts, below 1 is more even (shape 1 / burstiness, scale burstiness / rate).
    """
    rate = _checked_rate(rate_per_s)
    if not 0.001 <= burstiness <= 1000:
        raise InputError(f"burstiness {burstiness!r} must lie between 0.001 and 1000 (1 is Poisson)")
    return _running_sum(rng, shape=1 / burstiness, scale=burstiness / rate)


def trace(path: Path | str, rate_per_s: float | None = None) -> Iterator[float]:
    """The arrivals of a CSV file, in order, the first at 0 s; finite.

    Its column ``TIMESTAMP`` (any case; dates and times, or seconds), or else its first column of seconds.
    ``rate_per_s`` stretches time so that this is the mean rate; the pattern stays. Raises InputError.
    """
    times_s = np.sort(_read_times(Path(path)))
    times_s -= times_s[0]
    if rate_per_s is not None:
        rate = _checked_rate(rate_per_s)
        if times_s[-1] == 0:
            raise InputError(f"{path}: all arrivals are at one time, so no rate can be given to them")
        times_s *= (len(times_s) - 1) / (times_s[-1] * rate)
    return iter(times_s.tolist())


def stages(plan: Sequence[tuple[float, float]], rng: np.random.Generator) -> Iterator[float]:
    """Poisson arrivals whose rate changes: ``plan`` is [(seconds, rate_per_s), …]; the last rate goes on forever.

    A rate of 0 is a pause, but not as the last. A ramp is many short stages.
    """
    if not plan or any(not 0 < seconds < math.inf for seconds, _ in plan):
        raise InputError(f"stages {plan!r}: needs one or more of (seconds above 0, rate)")
    rates = [rate and _checked_rate(rate) for _, rate in plan]
    if not rates[-1]:
        raise InputError("the last stage goes on forever, so its rate must be above 0")
    return _through_stages([seconds for seconds, _ in plan], rates, rng)


def _checked_rate(rate_per_s: float) -> float:
    is_number = isinstance(rate_per_s, int | float) and not isinstance(rate_per_s, bool)
    if not is_number or not 0 < rate_per_s <= MAX_RATE_PER_S:
        raise InputError(f"rate {rate_per_s!r} must be above 0 and at most {MAX_RATE_PER_S:,} requests per second")
    return float(rate_per_s)


def _running_sum(rng: np.random.Generator, shape: float, scale: float) -> Iterator[float]:
    start = 0.0
    while True:
        times = start + np.cumsum(rng.gamma(shape, scale, size=_BLOCK))
        yield from times.tolist()
        start = float(times[-1])


def _through_stages(durations: list[float], rates: list[float], rng: np.random.Generator) -> Iterator[float]:
    """A unit Poisson process in "work" (rate x time), read back through the piecewise-linear clock."""
    ends_s = np.cumsum([0.0, *durations])
    ends_work = np.cumsum([0.0, *(seconds * rate for seconds, rate in zip(durations, rates, strict=True))])
    for work in _running_sum(rng, shape=1.0, scale=1.0):
        stage = min(int(np.searchsorted(ends_work, work, side="left")) - 1, len(rates) - 1)
        yield float(ends_s[stage] + (work - ends_work[stage]) / rates[stage])


def _read_times(path: Path) -> np.ndarray:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a CSV file of arrival times") from None
    names = [name.strip().lower() for name in rows[0]] if rows else []
    column = names.index("timestamp") if "timestamp" in names else 0
    has_header = bool(rows) and _seconds_of(rows[0][column]) is None
    return _times_of(path, rows[has_header:], column, first_line=1 + has_header)


def _times_of(path: Path, rows: Iterable[list[str]], column: int, first_line: int) -> np.ndarray:
    times = []
    for number, row in enumerate(rows, start=first_line):
        seconds = _seconds_of(row[column]) if column < len(row) else None
        if seconds is None:
            raise InputError(f"{path}: row {number} has no time in column {column + 1}: {','.join(row)[:60]!r}")
        times.append(seconds)
    if not times:
        raise InputError(f"{path}: holds no arrivals; give a CSV file with a TIMESTAMP column, or one of seconds")
    return np.array(times)


def _seconds_of(text: str) -> float | None:
    """Seconds as a number, or of an ISO date and time (fractions of any length), else None."""
    try:
        seconds = float(text)
        return seconds if math.isfinite(seconds) else None
    except ValueError:
        pass
    whole, _, rest = text.strip().partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    try:
        moment = datetime.fromisoformat(whole + rest[len(digits) :])
    except ValueError:
        return None
    # Taken from a fixed day, not from 1970 in local time: a change to summer time is not a gap in traffic.
    start = datetime(2000, 1, 1, tzinfo=moment.tzinfo)
    return (moment - start).total_seconds() + float(f"0.{digits or 0}")
