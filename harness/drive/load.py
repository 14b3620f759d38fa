"""The load of a test, described once for sweep trials, for Locust's command line and for the load generator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harness import wire
from harness.errors import InputError
from harness.records.load import TrialLoad
from harness.traffic.arrivals import Arrivals, RateStage

RUNG_S = 10.0  # by default
REQUEST_KNOBS = {"chunk_frames": wire.MAX_FRAMES, "diffusion_steps": wire.MAX_DIFFUSION_STEPS}
"""What every request may set, with the largest value of each; all other knobs are properties of the deployment."""


@dataclass(frozen=True)
class Load:
    """How requests are sent. There are three kinds of load:

    - an open loop (``arrivals``);
    - a concurrency ladder (``sessions``: each number of concurrent sessions is held in turn);
    - a closed loop of as many users as Locust runs.

    ``seconds``: the longest that a rung is held; without a ladder, the time limit (None: no limit; Locust takes whole
    seconds). ``seed``: of lengths, scripts and arrivals. ``steady``: how many sessions of an open loop start in
    mid-session (None: none); in a closed loop any number makes every user's first request such a session. ``asks``:
    values of REQUEST_KNOBS. ``precision``: a rung may end once its rate is known this precisely (see
    ``stop_rule.Patience``). ``until_saturated``: a ladder ends when it is over-saturated or a request failed.
    ``iterations``: requests (arrivals of an open loop) after which the test ends. Raises InputError that names the
    option.
    """

    seconds: float | None = None
    seed: int = 1
    sessions: tuple[int, ...] = ()
    arrivals: Arrivals | None = None
    steady: int | None = None
    asks: Mapping[str, int] = field(default_factory=dict)
    precision: float | None = None
    until_saturated: bool = False
    iterations: int | None = None

    def __post_init__(self) -> None:
        if self.sessions and (self.arrivals or self.iterations):
            raise InputError("--ladder holds numbers of users (a closed loop): leave out --rate, --arrivals and -i")
        if any(low >= high for low, high in itertools.pairwise((0, *self.sessions))):
            raise InputError(f"--ladder {self.sessions} must rise from rung to rung, from 1 user or more")
        if self.iterations is not None and self.iterations < 1:
            raise InputError(f"--iterations {self.iterations} must be 1 or more")
        if self.seed < 0 or (self.steady or 0) < 0:
            raise InputError("--seed and --steady must be 0 or more")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise InputError(f"{'--rung-seconds' if self.sessions else '-t'} {self.seconds:g} must be above 0")
        if self.precision is not None and not 0 < self.precision < 1:
            raise InputError(f"--precision {self.precision:g} must lie between 0 and 1")
        if (self.precision or self.until_saturated) and not self.sessions:
            raise InputError("--precision and --until-saturated need a ladder: give its rungs with --ladder")
        for knob, value in self.asks.items():
            if not 1 <= value <= REQUEST_KNOBS[knob]:
                raise InputError(f"--{knob.replace('_', '-')} {value} must lie in 1 to {REQUEST_KNOBS[knob]}")

    @classmethod
    def ladder(
        cls,
        seconds: float,
        seed: int,
        sessions: tuple[int, ...],
        *,
        asks: Mapping[str, int] | None = None,
        precision: float | None = None,
    ) -> Load:
        """The ladder of a trial: sessions start in mid-session, and it ends at over-saturation."""
        return cls(
            seconds, seed, sessions, steady=0, asks=asks or {}, precision=precision or None, until_saturated=True
        )

    @classmethod
    def poisson(
        cls, seconds: float, seed: int, rate_per_s: float, steady: int = 0, asks: Mapping[str, int] | None = None
    ) -> Load:
        """An open loop of Poisson arrivals that starts with ``steady`` sessions in progress."""
        return cls(seconds, seed, arrivals=Arrivals("poisson", rate_per_s), steady=steady, asks=asks or {})

    @property
    def kind(self) -> str:
        """The kind of load in trial records: "ladder" or "open"."""
        return "ladder" if self.sessions else "open"

    @property
    def loop(self) -> str:
        return "closed" if self.arrivals is None else "open"

    @property
    def rate_per_s(self) -> float | None:
        """Requests per second of an open loop; None where there is no single rate."""
        return self.arrivals.rate_per_s if self.arrivals else None

    @property
    def rung_s(self) -> float:
        """The longest time that a rung of a ladder is held, in seconds."""
        return self.seconds if self.sessions and self.seconds else RUNG_S

    @property
    def time_limit_s(self) -> float | None:
        """Seconds after which the whole test ends; None for a ladder, which ends with its last rung."""
        return None if self.sessions else self.seconds

    @property
    def total_s(self) -> float:
        """The longest time that the load can last, in seconds; infinite without a limit."""
        return (math.inf if self.seconds is None else self.seconds) * max(1, len(self.sessions))

    def record(self) -> TrialLoad:
        """The load as stored with its trial. Trial ids are derived from it."""
        common: dict[str, Any] = {"seconds": self.seconds, "seed": self.seed, **self.asks}
        if self.arrivals is None:
            return TrialLoad(loop="closed", sessions=self.sessions, precision=self.precision or None, **common)
        process = self.arrivals
        return TrialLoad(
            loop="open",
            arrivals=process.kind,
            rate_per_s=process.rate_per_s,
            burstiness=process.burstiness if process.kind == "gamma" else None,
            stages=process.stages,
            trace=process.trace.record(process.repeat) if process.trace else None,
            **common,
        )

    def options(self) -> list[str]:
        """The load as options of Locust's command line; ``options.load_of`` turns them back into the same load.

        Raises InputError for a trace that was not read from a file.
        """
        options = ["--seed", str(self.seed)]
        for knob, value in self.asks.items():
            options += [f"--{knob.replace('_', '-')}", str(value)]
        if self.iterations:
            options += ["--iterations", str(self.iterations)]
        if self.steady is not None:
            bare = self.arrivals is None and not self.steady
            options += ["--steady"] if bare else ["--steady", str(self.steady)]
        return [*options, *self._of_kind()]

    def _of_kind(self) -> list[str]:
        if self.sessions:
            held = [] if self.seconds is None else ["--rung-seconds", str(self.seconds)]
            early = ["--precision", str(self.precision)] if self.precision else []
            until = ["--until-saturated"] if self.until_saturated else []
            return ["--ladder", ",".join(map(str, self.sessions)), *held, *early, *until]
        limit = [] if self.seconds is None else ["-t", f"{max(round(self.seconds), 1)}s"]
        return [*limit, *(_arrival_options(self.arrivals) if self.arrivals else [])]


def _arrival_options(process: Arrivals) -> list[str]:
    """Options of an open loop. Its users only wait, so one is enough."""
    options = ["-u", "1", "--arrivals", process.kind]
    if process.rate_per_s is not None:
        options += ["--rate", str(process.rate_per_s)]
    if process.kind == "gamma":
        options += ["--burstiness", str(process.burstiness)]
    if process.stages:
        options += ["--stages", ",".join(map(_stage, process.stages))]
    if process.trace:
        if not process.trace.path:
            raise InputError(f"trace {process.trace.name} was not read from a file: no option can name it")
        options += ["--trace", process.trace.path, *(["--trace-repeat"] if process.repeat else [])]
    return options


def _stage(stage: RateStage) -> str:
    """A stage as ``--stages`` takes it: its durations must not be written with an exponent."""
    return f"{np.format_float_positional(stage.seconds)}s@{stage.rate_per_s!r}..{stage.end_rate_per_s!r}"
