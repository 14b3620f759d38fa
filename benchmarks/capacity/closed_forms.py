"""Pools whose figures are known from theory, and their simulation, to check the simulator."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from harness.capacity.simulator.engine import Counting, SimulationEngine, arrivals_of
from harness.capacity.simulator.pool import Pool
from harness.capacity.simulator.results import PoolResult, result_of
from harness.capacity.simulator.traffic import Varying

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

import queueing  # noqa: E402

STEP_S = 0.1
WORK = 10.0  # mean frames of a session, which takes one second alone
CLASS = "one"
WARM_UP_SHARE = 0.05
_WINDOWS = 20  # of a period

Frames = Callable[[np.random.Generator, int], np.ndarray]


def constant(n: np.ndarray) -> np.ndarray:
    """Sessions that do not slow each other down."""
    return STEP_S + 0 * np.asarray(n, dtype=float)


def shared(n: np.ndarray) -> np.ndarray:
    """Sessions that share ten frames a second."""
    return STEP_S * np.asarray(n, dtype=float)


def exponential(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.exponential(WORK, n)


def equal(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.full(n, WORK)


def two_kinds(rng: np.random.Generator, n: int) -> np.ndarray:
    """Nine in ten are short, the tenth has most of the work: squared coefficient of variation 2.25."""
    return np.where(rng.random(n) < 0.9, WORK / 2, 5.5 * WORK)


TWO_KINDS_SCV = 2.25


@dataclass(frozen=True)
class Form:
    """A figure of a pool at a rate that is known from theory (``expected``), and how to read it from a simulation."""

    name: str
    expected: float
    read: Callable[[PoolResult], float]
    pool: Pool
    rate_per_s: float
    frames: Frames = exponential
    options: Mapping = field(default_factory=dict)

    def simulated(self, sessions: int, rng: np.random.Generator) -> float:
        """The figure from a simulation of about this many sessions."""
        return self.read(serve(self.pool, self.rate_per_s, self.frames, sessions, rng, **self.options))


def serve(
    pool: Pool,
    rate_per_s: float,
    frames: Frames,
    sessions: int,
    rng: np.random.Generator,
    *,
    swing: float = 0.0,
    period_s: float = 1.0,
    windows_a_period: int = 0,
    callers: int | None = None,
) -> PoolResult:
    """A pool under Poisson arrivals, in blocks; or with ``callers``, users who think for 1 / rate seconds on average.

    The rate may vary with a period, which is then divided into windows. For a closed loop, counting lasts at least as
    long as this many sessions need if all users think.
    """
    periods = math.ceil(sessions / (rate_per_s * (callers or 1)) / period_s)
    warm_up = math.ceil(WARM_UP_SHARE * periods)
    counting = Counting((CLASS,), periods * period_s, warm_up * period_s, periods * windows_a_period or 20, 1)
    engine = SimulationEngine(pool, counting, callers=callers)
    if callers:
        thinking_s = rng.exponential(1 / rate_per_s, 2 * sessions)
        engine.feed(_drawn(thinking_s, frames, rng), last=True, stop_s=counting.stop_s)
    else:
        for times_s in _poisson(rate_per_s, swing, period_s, counting.stop_s, rng):
            engine.feed(_drawn(times_s, frames, rng))
        engine.finish(counting.stop_s)
    return result_of(engine.arrays, [CLASS], [0], counting.window_s)


def _poisson(
    rate_per_s: float, swing: float, period_s: float, stop_s: float, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    arriving = Varying.diurnal(rate_per_s, swing, peak_s=0.0, period_s=period_s)
    for times_s in arriving.blocks(rng):
        yield times_s[times_s <= stop_s]
        if times_s[-1] > stop_s:
            return


def _drawn(times_s: np.ndarray, frames: Frames, rng: np.random.Generator) -> np.ndarray:
    return arrivals_of(times_s, frames(rng, len(times_s)), pick=rng.random(len(times_s)))


def _one(result: PoolResult):
    return result.classes[CLASS]


def _mean_wait(result: PoolResult) -> float:
    return _one(result).wait_s.mean


def _mean_stay(result: PoolResult) -> float:
    return _one(result).stay_s.mean


def _refused(result: PoolResult) -> float:
    return _one(result).busy_share()


def _sessions(result: PoolResult) -> float:
    return float(result.sessions.mean())


def _rate(result: PoolResult) -> float:
    return float(_one(result).done.mean() / result.window_s)


def _at_peak(result: PoolResult) -> float:
    return float(result.sessions[::_WINDOWS].mean())


def forms() -> list[Form]:
    """All closed forms."""
    return [*_waits(), *_losses(), *_shares(), *_others()]


def _waits() -> Iterator[Form]:
    one, ten, hundred = (Pool(servers, constant, session_limit=1) for servers in (1, 10, 100))
    yield Form("M/M/1, mean wait, load 0.7", queueing.mean_wait_s(1, 0.7, 1.0), _mean_wait, one, 0.7)
    yield Form("M/D/1, mean wait, load 0.7", queueing.mean_wait_s(1, 0.7, 1.0, 1, 0), _mean_wait, one, 0.7, equal)
    mixed = queueing.mean_wait_s(1, 0.6, 1.0, 1, TWO_KINDS_SCV)
    yield Form("M/G/1, mean wait, load 0.6", mixed, _mean_wait, one, 0.6, two_kinds)
    yield Form("M/M/10, mean wait, load 0.8", queueing.mean_wait_s(10, 8.0, 1.0), _mean_wait, ten, 8.0)
    waits = queueing.erlang_c(10, 8.0)
    yield Form("M/M/10, share that waits", waits, lambda result: _one(result).wait_s.share_above(0.0), ten, 8.0)
    waits = queueing.erlang_c(100, 92.0)
    yield Form("M/M/100, share that waits", waits, lambda result: _one(result).wait_s.share_above(0.0), hundred, 92.0)
    long = queueing.wait_above(10, 8.0, 1.0, 0.5)
    yield Form("M/M/10, share that waits 0.5 s", long, lambda result: _one(result).wait_s.share_above(0.5), ten, 8.0)
    # at one device of four, a session waits as at M/M/1 with a quarter of the rate
    apart = Pool(4, constant, session_limit=1, routing="random")
    yield Form("4 x M/M/1 at random, mean wait", queueing.mean_wait_s(1, 0.6, 1.0), _mean_wait, apart, 2.4)


def _losses() -> Iterator[Form]:
    erlang = Pool(20, constant, session_limit=1, queue_limit=0)
    yield Form("M/M/20/20, share refused", queueing.erlang_b(20, 18.0), _refused, erlang, 18.0)
    yield Form("M/G/20/20, share refused", queueing.erlang_b(20, 18.0), _refused, erlang, 18.0, two_kinds)
    bounded = Pool(1, constant, session_limit=1, queue_limit=4)
    refused, wait_s = queueing.bounded_line(1, 4, 0.9, 1.0)
    yield Form("M/M/1/5, share refused", refused, _refused, bounded, 0.9)
    yield Form("M/M/1/5, mean wait", wait_s, _mean_wait, bounded, 0.9)
    impatient = Pool(5, constant, session_limit=1, patience_s=0.5)
    yield Form("M/M/5+D, share that gives up", queueing.impatient_share(5, 4.5, 1.0, 0.5), _refused, impatient, 4.5)


def _shares() -> Iterator[Form]:
    sharing = Pool(1, shared)
    yield Form("M/M/1-PS, mean stay, load 0.6", queueing.sharing_stay_s(1.0, 0.6), _mean_stay, sharing, 0.6)
    yield Form("M/G/1-PS, mean stay, load 0.6", queueing.sharing_stay_s(1.0, 0.6), _mean_stay, sharing, 0.6, two_kinds)
    device = Pool(1, lambda n: 0.03 + 0.02 * n)
    mean = queueing.sharing_sessions(1.2 * WORK, 0.03 + 0.02 * np.arange(1, 400))
    yield Form("S(n) = a + b n, mean sessions", mean, _sessions, device, 1.2, two_kinds)


def _others() -> Iterator[Form]:
    unlimited, cycle = Pool(1, constant), {"swing": 0.8, "period_s": 20.0, "windows_a_period": _WINDOWS}
    first_window = np.linspace(0, 20.0 / _WINDOWS, 1001)  # of a period, which begins at the peak of the rate
    peak = float(np.mean([queueing.sessions_by_day(50.0, 0.8, 1.0, at_s, 20.0) for at_s in first_window]))
    yield Form("M(t)/M/inf, sessions at the peak", peak, _at_peak, unlimited, 50.0, exponential, cycle)
    loop = queueing.closed_loop_rate(8, 2, 2.0, 1.0)
    pool = Pool(2, constant, session_limit=1)
    yield Form("closed loop, 8 users, 2 servers", loop, _rate, pool, 0.5, exponential, {"callers": 8})
