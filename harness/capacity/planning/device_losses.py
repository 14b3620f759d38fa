"""The behaviour of a pool when devices are lost at peak load, and the spares with which it meets its SLOs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from harness.capacity.fitting.rate_search import (
    LARGEST_POOL,
    WARM_UP_SHARE,
    SimulatedLoad,
    Traffic,
    load_of,
    simulate_load,
    steady_sessions,
)
from harness.capacity.planning.pools import Pools
from harness.errors import InputError

EARLY_S = 600.0
OVERLOAD = "sustained rate of the remaining devices"
_RESIDENCES = 5  # simulated after a loss, in addition to the first ten minutes
_MOST_SESSIONS = 400_000  # largest simulated traffic
_EARLY_DRAWS = 5
_MORE_SPARES = 3  # most spares that are tried, in addition to the devices lost


@dataclass(frozen=True)
class Loss:
    """``lost`` of ``devices`` fail at once, at a rate; their sessions resume elsewhere from the frame they had reached.

    ``worst``: the limit nearest to violation, or violated, by the sessions that arrive in the ``judged_s`` seconds
    afterwards, and ``worst_share`` = value / limit. ``early_share``: the same for the first ten minutes, the largest of
    several draws of the traffic; NaN where less was judged. Never ``met`` at a rate that the remaining devices cannot
    sustain, however slowly an SLO comes to be violated. ``interrupted``: sessions on the lost devices. ``basis``:
    simulated, or extrapolated where a device holds more sessions (95th percentile) than were measured.
    """

    lost: int
    devices: int
    met: bool
    worst: str
    worst_share: float
    early_share: float
    judged_s: float
    interrupted: int
    basis: str


def lose(pools: Pools, qps: float, devices: int, lost: int) -> Loss:
    """Simulate the loss. With more than 64 devices left, simulate 64 with their part of the rate.

    The same number is then lost from a smaller pool, a larger share of it. Raises InputError where no device would be
    left.
    """
    left = devices - lost
    if left < 1:
        raise InputError(f"cannot simulate the loss of {lost} of {devices} devices: at least one must be left")
    simulated_left = min(left, LARGEST_POOL)
    rate, size = qps * simulated_left / left, simulated_left + lost
    traffic = _lasting(pools, rate)
    simulated, counted = simulate_load(pools.device, traffic, rate, size, pools.limits, lost)
    lost_at_s, end_s = simulated.arrival_s[counted][0], simulated.arrival_s[-1]
    aboard = (simulated.start_s < lost_at_s) & ~(simulated.end_s <= lost_at_s) & (simulated.device < lost)
    judged = pools.device, traffic, pools.limits, rate, size, simulated
    later = load_of(*judged, counted)
    shares = later.shares | _overload(qps / (left * pools.steady_rate()))
    worst = max(shares, key=lambda name: shares[name])
    return Loss(
        lost,
        devices,
        met=later.met and OVERLOAD not in shares,
        worst=worst,
        worst_share=shares[worst],
        early_share=_early_share(pools, rate, size, lost) if end_s - lost_at_s >= EARLY_S else math.nan,
        judged_s=float(end_s - lost_at_s),
        interrupted=int(np.sum(aboard)),
        basis=_basis(pools, later),
    )


def _early_share(pools: Pools, rate_per_s: float, devices: int, lost: int) -> float:
    """The largest value / limit of the sessions that arrive in the ten minutes after the loss, of several draws.

    So few sessions differ much from draw to draw. Draws in which a class with an SLO has none say nothing; NaN if all.
    """
    needed = min(math.ceil(rate_per_s * EARLY_S / (1 - WARM_UP_SHARE) * 1.05), _MOST_SESSIONS)
    shares = []
    for seed in range(_EARLY_DRAWS):
        traffic = pools.traffic.again(seed).part(needed)
        simulated, counted = simulate_load(pools.device, traffic, rate_per_s, devices, pools.limits, lost)
        early = counted & (simulated.arrival_s < simulated.arrival_s[counted][0] + EARLY_S)
        load = load_of(pools.device, traffic, pools.limits, rate_per_s, devices, simulated, early)
        shares.append(load.shares[load.worst])
    return max((each for each in shares if math.isfinite(each)), default=math.nan)


def _lasting(pools: Pools, rate_per_s: float) -> Traffic:
    """The traffic, repeated until it lasts ten minutes and some mean residence times after the loss."""
    sessions = max(steady_sessions(pools.device, pools.limits), 1.0)
    residence_s = pools.traffic.mean_frames * float(pools.device.step_time(sessions))
    needed = math.ceil(rate_per_s * (EARLY_S + _RESIDENCES * residence_s) / (1 - WARM_UP_SHARE) * 1.02)
    drawn = len(pools.traffic.gaps)
    return pools.traffic if needed <= drawn else pools.traffic.part(min(needed, max(_MOST_SESSIONS, drawn)))


def _overload(utilisation: float) -> dict[str, float]:
    return {OVERLOAD: utilisation} if utilisation >= 1 else {}


def _basis(pools: Pools, load: SimulatedLoad) -> str:
    return "simulated" if pools.has_seen(load.sessions_p95) else "extrapolated"


def with_spares(pools: Pools, qps: float, devices: int, lost: int) -> Loss:
    """The loss from the smallest pool that meets every SLO in spite of it; ``devices`` suffice without a loss."""
    tried = [lose(pools, qps, devices + lost, lost)]
    while not tried[-1].met and len(tried) <= _MORE_SPARES:
        tried.append(lose(pools, qps, tried[-1].devices + 1, lost))
    return tried[-1]
