"""How sessions are given to devices, and what a count of devices becomes under each way."""

from __future__ import annotations

from dataclasses import replace

from harness.capacity.planning.pools import Pools

LEAST_LOADED = "least_loaded"
ROUTINGS = {LEAST_LOADED: "shared", "round_robin": "round_robin", "random": "random"}  # as the simulator names them
_MOST_SHARE = 1.5  # times the planned count that is tried


def counts_by_routing(pools: Pools, qps: float, devices: int) -> dict[str, int | None]:
    """The fewest devices, at least the planned ones, that meet every limit at ``qps`` under each routing.

    None where half as many again do not. Balance matters to several devices only: one is enough for any routing.
    """
    counts: dict[str, int | None] = {}
    for name, routing in ROUTINGS.items():
        own = pools if routing == pools.limits.routing else pools.changed(limits=replace(pools.limits, routing=routing))
        counts[name] = devices if devices == 1 or own is pools else _fewest(own, qps, devices)
    return counts


def _fewest(pools: Pools, qps: float, devices: int) -> int | None:
    """By bisection: more devices serve a rate at least as well."""
    low, high = devices - 1, int(_MOST_SHARE * devices) + 1
    if not pools.serves(qps, high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pools.serves(qps, middle) else (middle, high)
    return high
