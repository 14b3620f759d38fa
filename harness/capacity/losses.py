"""What a pool shows when devices of it are lost at the peak, and the spares with which it keeps its promises."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.capacity.pools import Pools
from harness.capacity.search import LARGEST_POOL, load_of, simulate_load

EARLY_S = 600.0
_MORE_SPARES = 3  # than devices lost, that are tried


@dataclass(frozen=True)
class Loss:
    """``lost`` of ``devices`` fail at once, at a rate; their sessions go on elsewhere, from the frame they had reached.

    ``worst``: the limit nearest to being broken, or broken, by the sessions that come afterwards, and ``worst_share`` =
    value / limit; ``early_share``: the same of those in the first ten minutes. ``interrupted``: sessions aboard those
    that were lost.
    """

    lost: int
    devices: int
    kept: bool
    worst: str
    worst_share: float
    early_share: float
    interrupted: int


def lose(pools: Pools, qps: float, devices: int, lost: int) -> Loss:
    """Simulate the loss; above 64 devices left, of 64 with their part of the rate (then a larger part of them is lost).

    Raises InputError where no device would be left.
    """
    left = devices - lost
    simulated_left = min(left, LARGEST_POOL)
    rate, size = qps * simulated_left / left, simulated_left + lost
    traffic = pools.traffic_for(simulated_left)  # the one that the pool without a loss was judged by
    simulated, counted = simulate_load(pools.device, traffic, rate, size, pools.limits, lost)
    lost_at_s = simulated.arrival_s[counted][0]
    aboard = (simulated.start_s < lost_at_s) & ~(simulated.end_s <= lost_at_s) & (simulated.device < lost)
    judged = pools.device, traffic, pools.limits, rate, size, simulated
    later, early = load_of(*judged, counted), load_of(*judged, counted & (simulated.arrival_s < lost_at_s + EARLY_S))
    worst_share, early_share = later.shares[later.worst], early.shares[early.worst]
    return Loss(lost, devices, later.kept, later.worst, worst_share, early_share, int(np.sum(aboard)))


def with_spares(pools: Pools, qps: float, devices: int, lost: int) -> Loss:
    """The loss from the smallest pool that keeps every promise without the lost ones; ``devices`` do without a loss."""
    tried = [lose(pools, qps, devices + lost, lost)]
    while not tried[-1].kept and len(tried) <= _MORE_SPARES:
        tried.append(lose(pools, qps, tried[-1].devices + 1, lost))
    return tried[-1]
