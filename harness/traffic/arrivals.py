"""Arrival processes: due times of requests, as iterators of seconds since the start; no clock, no sleep."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.errors import InputError
from harness.records.load import TraceRecord
from harness.traffic.csv_columns import read_bytes, read_column

MAX_RATE_PER_S = 100_000
MIN_RATE_PER_S = 1e-9  # one in 30 years; at far lower rates rounding loses the earlier time
TIMESTAMP = "TIMESTAMP"  # name of a trace's column, in any case
_BLOCK = 1024
_NEEDS = {
    "constant": {"rate"},
    "poisson": {"rate"},
    "gamma": {"rate", "burstiness"},
    "trace": {"trace"},
    "stages": {"stages"},
}
_MAY_HAVE = {"trace": {"rate", "trace-repeat"}}
KINDS = tuple(_NEEDS)
_DURATION = re.compile(r"(?=.)(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?")


class RateStage(NamedTuple):
    """A stage of ``seconds`` in which the rate changes linearly between two values; both 0 is a pause."""

    seconds: float
    rate_per_s: float
    end_rate_per_s: float


@dataclass(frozen=True, eq=False)
class Trace:
    """The arrivals of a file. ``times_s``: float64 [n], sorted, the first at 0.

    ``form``: how its times were read, such as "epoch milliseconds". ``path``: of the file, as given; "" without one.
    """

    name: str
    sha256: str
    times_s: np.ndarray
    form: str = ""
    path: str = ""

    @classmethod
    def read(cls, path: Path | str) -> Trace:
        """Read a CSV file's column ``TIMESTAMP`` (any case), or its only column: dates and times, seconds or an epoch.

        Rows may come in any order. Raises InputError naming the line (see ``columns``).
        """
        path = Path(path)
        content = read_bytes(path)
        times_s, form = read_column(path, TIMESTAMP, content).times()
        times_s = np.sort(times_s)
        return cls(path.name, hashlib.sha256(content).hexdigest(), times_s - times_s[0], form, str(path))

    @property
    def rate_per_s(self) -> float:
        """The mean rate: gaps / time. Raises InputError where all arrivals have one time."""
        if self.times_s[-1] == 0:
            raise InputError(f"{self.name}: all arrivals have the same time, so there is no rate")
        return (len(self.times_s) - 1) / float(self.times_s[-1])

    def record(self, repeat: bool) -> TraceRecord:
        """The figures that identify the file of the trace."""
        count, seconds = len(self.times_s), float(self.times_s[-1])
        return TraceRecord(file=self.name, sha256=self.sha256, arrivals=count, seconds=seconds, repeat=repeat)


@dataclass(frozen=True)
class Arrivals:
    """An arrival process with all its parameters, checked when built; ``chosen`` says which go together.

    ``rate_per_s`` is None for stages, and for a trace with its own times.
    """

    kind: str
    rate_per_s: float | None = None
    burstiness: float = 1.0
    stages: tuple[RateStage, ...] = ()
    trace: Trace | None = None
    repeat: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"arrivals {self.kind!r} are not known; known: {', '.join(KINDS)}")
        self.times(np.random.default_rng(0))  # refuses an impossible process

    def times(self, rng: np.random.Generator) -> Iterator[float]:
        """Seconds of every arrival since the start, in order."""
        match self.kind:
            case "constant":
                return constant(_checked_rate(self.rate_per_s))
            case "stages":
                return stages(self.stages, rng)
            case "trace":
                return self._replayed()
            case _:
                return gamma(_checked_rate(self.rate_per_s), self.burstiness, rng)

    @property
    def is_steady(self) -> bool:
        """Whether its rate is meant to be constant."""
        return self.kind in ("constant", "poisson", "gamma")

    @property
    def ends_s(self) -> float:
        """Time of its end, in seconds: infinite except for a trace without repeat, and stages that end at 0."""
        if self.kind == "trace" and not self.repeat:
            return float(self._source.times_s[-1]) * self._stretch
        if self.kind == "stages" and not self.stages[-1].end_rate_per_s:
            return sum(stage.seconds for stage in self.stages)
        return math.inf

    def expected(self, seconds: float) -> float:
        """The mean number of arrivals in the first ``seconds``; for a trace the number itself."""
        if self.kind == "stages":
            return float(_work_by(self.stages, seconds))
        if self.kind == "trace":
            return float(sum(1 for _ in itertools.takewhile(lambda time: time < seconds, self._replayed())))
        return _checked_rate(self.rate_per_s) * seconds

    def __str__(self) -> str:
        rate = "" if self.rate_per_s is None else f" at {self.rate_per_s:g} requests/s"
        match self.kind:
            case "gamma":
                return f"gamma of burstiness {self.burstiness:g}{rate}"
            case "stages":
                low, high = min(map(_lowest, self.stages)), max(map(_highest, self.stages))
                return f"{len(self.stages)} stages of {low:g} to {high:g} requests/s"
            case "trace":
                source = self._source
                count, span_s = len(source.times_s), float(source.times_s[-1]) * self._stretch
                stretched = ", stretched" if self.rate_per_s else ""
                again = ", again and again" if self.repeat else ""
                form = f", read as {source.form}" if source.form.startswith("epoch") else ""
                return f"trace {source.name} ({count} arrivals in {span_s:.0f} s{form}{stretched}{again})"
        return f"{self.kind}{rate}"

    @property
    def _stretch(self) -> float:
        return 1.0 if self.rate_per_s is None else self._source.rate_per_s / self.rate_per_s

    @property
    def _source(self) -> Trace:
        if self.trace is None:
            raise InputError("arrivals trace have no trace: give one with --trace")
        return self.trace

    def _replayed(self) -> Iterator[float]:
        return _replay(self._source, self.rate_per_s, self.repeat)


def chosen(
    kind: str | None = None,
    *,
    rate_per_s: float | None = None,
    burstiness: float | None = None,
    trace: Path | str | None = None,
    repeat: bool = False,
    stages: str | None = None,
) -> Arrivals | None:
    """The process that options describe, or None where they describe none (a closed loop).

    Without ``kind``: trace, stages or gamma if their own option is given, otherwise Poisson. Raises InputError that
    names the options where one is missing or two exclude each other.
    """
    options = {"rate": rate_per_s, "burstiness": burstiness, "trace": trace, "trace-repeat": repeat, "stages": stages}
    given = {name for name, value in options.items() if value is not None and value is not False and value != ""}
    if not kind and not given:
        return None
    kind = kind or _implied(given)
    _check_together(kind, given)
    return Arrivals(
        kind,
        rate_per_s,
        1.0 if burstiness is None else burstiness,
        parse_stages(stages) if stages else (),
        Trace.read(trace) if trace else None,
        repeat,
    )


def _implied(given: set[str]) -> str:
    for name, kind in (("trace", "trace"), ("trace-repeat", "trace"), ("stages", "stages"), ("burstiness", "gamma")):
        if name in given:
            return kind
    return "poisson"


def _check_together(kind: str, given: set[str]) -> None:
    if kind not in KINDS:
        raise InputError(f"--arrivals {kind!r} is not known; known: {', '.join(KINDS)}")
    for name in sorted(_NEEDS[kind] - given):
        raise InputError(f"--arrivals {kind} needs --{name}")
    for name in sorted(given - _NEEDS[kind] - _MAY_HAVE.get(kind, set())):
        owners = [each for each in KINDS if name in _NEEDS[each] | _MAY_HAVE.get(each, set())]
        raise InputError(
            f"--{name} does not work with --arrivals {kind} (only with {', '.join(owners)}): leave out one of them"
        )


def parse_stages(text: str) -> tuple[RateStage, ...]:
    """Parse ``60s@0.5, 2m@0.5..3, 30s@0``: durations (s, m, h) at a rate, or on a ramp of two. Raises InputError."""
    return tuple(_parse_stage(part.strip()) for part in str(text).split(","))


def _parse_stage(part: str) -> RateStage:
    duration, at, rates = part.partition("@")
    low, dots, high = rates.partition("..")
    matched = _DURATION.fullmatch(duration.strip())
    try:
        if not (matched and at):
            raise ValueError
        units = zip(matched.groups(), (3600, 60, 1), strict=True)
        seconds = sum(float(number) * unit for number, unit in units if number)
        return RateStage(seconds, float(low), float(high if dots else low))
    except ValueError:
        raise InputError(
            f"--stages {part!r} is not DURATION@RATE or DURATION@RATE..RATE: write 60s@0.5,2m@0.5..3,30s@0"
        ) from None


def constant(rate_per_s: float) -> Iterator[float]:
    """One arrival every 1 / rate seconds, the first after one such gap."""
    rate = _checked_rate(rate_per_s)
    return (number / rate for number in itertools.count(1))


def poisson(rate_per_s: float, rng: np.random.Generator) -> Iterator[float]:
    """A Poisson process: exponential gaps of mean 1 / rate."""
    return gamma(rate_per_s, 1.0, rng)


def gamma(rate_per_s: float, burstiness: float, rng: np.random.Generator) -> Iterator[float]:
    """Gamma gaps of mean 1 / rate with squared coefficient of variation ``burstiness``.

    1 is Poisson, above 1 is bursty, below 1 is more regular (shape 1 / burstiness, scale burstiness / rate).
    """
    rate = _checked_rate(rate_per_s)
    if not 0.001 <= burstiness <= 1000:
        raise InputError(f"burstiness {burstiness!r} must lie between 0.001 and 1000 (1 is Poisson)")
    return _running_sum(rng, shape=1 / burstiness, scale=burstiness / rate)


def trace(path: Path | str, rate_per_s: float | None = None, *, repeat: bool = False) -> Iterator[float]:
    """The arrivals of a CSV file (see ``Trace.read``), in order, the first at 0 s.

    ``rate_per_s`` scales time to this mean rate; the pattern is unchanged. ``repeat`` starts again one mean gap after
    the last arrival; without it the iterator ends there.
    """
    return _replay(Trace.read(path), rate_per_s, repeat)


def stages(plan: Sequence[RateStage | tuple[float, ...]], rng: np.random.Generator) -> Iterator[float]:
    """Poisson arrivals with a varying rate: ``plan`` is [(seconds, rate_per_s[, end_rate_per_s]), …].

    The last rate continues for ever; if it is 0, the arrivals end with the plan.
    """
    plan = [RateStage(*stage) if len(stage) == 3 else RateStage(*stage, stage[1]) for stage in plan]
    if not plan or any(not 0 < stage.seconds < math.inf for stage in plan):
        raise InputError(f"stages {[list(stage) for stage in plan]}: needs one or more of (seconds above 0, rate)")
    for stage in plan:
        for rate in stage[1:]:
            rate and _checked_rate(rate)
    if not any(map(_highest, plan)):
        raise InputError("stages: a rate must be above 0 in at least one of them")
    return _through_stages(plan, rng)


def _lowest(stage: RateStage) -> float:
    return min(stage[1:])


def _highest(stage: RateStage) -> float:
    return max(stage[1:])


def _checked_rate(rate_per_s: float | None) -> float:
    if not isinstance(rate_per_s, int | float) or isinstance(rate_per_s, bool) or not 0 < rate_per_s <= MAX_RATE_PER_S:
        raise InputError(f"rate {rate_per_s!r} must be above 0 and at most {MAX_RATE_PER_S:,} requests per second")
    if rate_per_s < MIN_RATE_PER_S:
        raise InputError(f"rate {rate_per_s!r} is below {MIN_RATE_PER_S:g} requests per second: write 0 for none")
    return float(rate_per_s)


def _running_sum(rng: np.random.Generator, shape: float, scale: float) -> Iterator[float]:
    start = 0.0
    while True:
        times = start + np.cumsum(rng.gamma(shape, scale, size=_BLOCK))
        block: list[float] = times.tolist()
        yield from block
        start = float(times[-1])


def _replay(source: Trace, rate_per_s: float | None, repeat: bool) -> Iterator[float]:
    stretch = 1.0
    if rate_per_s is not None:
        stretch = source.rate_per_s / _checked_rate(rate_per_s)
    times_s = source.times_s * stretch
    if not repeat:
        return iter(times_s.tolist())
    period_s = times_s[-1] + stretch / source.rate_per_s
    return itertools.chain.from_iterable((times_s + turn * period_s).tolist() for turn in itertools.count())


def _through_stages(plan: list[RateStage], rng: np.random.Generator) -> Iterator[float]:
    """A unit Poisson process in "work" (the integral of the rate), mapped to time by the stages."""
    plan = [*plan, RateStage(math.inf, plan[-1].end_rate_per_s, plan[-1].end_rate_per_s)]
    begins_s = list(itertools.accumulate((stage.seconds for stage in plan[:-1]), initial=0.0))
    begins_work = list(itertools.accumulate((_work(stage, stage.seconds) for stage in plan[:-1]), initial=0.0))
    for work in _running_sum(rng, shape=1.0, scale=1.0):
        index = int(np.searchsorted(begins_work, work, side="left")) - 1
        if index == len(plan) - 1 and not plan[-1].rate_per_s:
            return
        yield begins_s[index] + _time_of(plan[index], work - begins_work[index])


def _work(stage: RateStage, seconds: float) -> float:
    """The integral of the rate over the first ``seconds`` of a stage."""
    slope = 0.0 if math.isinf(stage.seconds) else (stage.end_rate_per_s - stage.rate_per_s) / stage.seconds
    return seconds * (stage.rate_per_s + slope * seconds / 2)


def _time_of(stage: RateStage, work: float) -> float:
    """When a stage has done ``work``: the root of slope t^2 / 2 + rate t = work, in the form without cancellation."""
    slope = 0.0 if math.isinf(stage.seconds) else (stage.end_rate_per_s - stage.rate_per_s) / stage.seconds
    return 2 * work / (stage.rate_per_s + math.sqrt(max(stage.rate_per_s**2 + 2 * slope * work, 0.0)))


def _work_by(plan: Sequence[RateStage], seconds: float) -> float:
    work = 0.0
    for stage in (*plan, RateStage(math.inf, plan[-1].end_rate_per_s, plan[-1].end_rate_per_s)):
        work += _work(stage, min(stage.seconds, seconds))
        seconds -= min(stage.seconds, seconds)
    return work
