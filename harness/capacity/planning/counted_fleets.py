"""The cheapest fleet by exact counts: the integer program interpolates, so its pools are counted again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from harness.capacity.planning.fleet_mix import SECONDS, CheapestFleet, ChosenPool, FleetProblem, PoolOption, cheapest
from harness.errors import InconclusiveError

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_ROUNDS = 12
_BELOW = 1 - 1e-6  # of a rate that was too high for a pool: what it may carry where nothing else is known


class PoolsOfType(Protocol):
    """Equal pools of a type of device under a part of the traffic."""

    def rate(self, devices: int) -> tuple[float, str]:
        """Requests/s that a pool carries, and what binds."""

    def fewest(self, qps: float) -> int | None:
        """The fewest devices at a rate; None where none suffice."""


PlannerOf = Callable[[PoolOption], PoolsOfType]


def cheapest_counted(
    problem: FleetProblem, planner_of: PlannerOf, seconds: float = SECONDS, rounds: int = _ROUNDS
) -> CheapestFleet | None:
    """The cheapest fleet whose pools are as their planners count them; None where none is found within the limits.

    Counts that differ from the program's are put into its options, and it is solved again, until none differs: the
    answer is then proven. Where they still differ after all ``rounds``, it is the cheapest fleet of any round, not
    proven. Raises InconclusiveError where the program finds no fleet in time.
    """
    best, asked, is_whole = None, problem, True
    for _ in range(rounds):
        try:
            found = cheapest(asked, seconds)
        except InconclusiveError:
            if best is None:
                raise
            break
        if found is None:
            break
        counts = [planner_of(pool.option).fewest(_rate(pool, problem)) for pool in found.pools]
        counted = _counted(found, counts, problem)
        if counted and fits(counted, problem) and (best is None or counted.cost_per_hour < best.cost_per_hour):
            best = counted
        if best and counts == [pool.devices for pool in found.pools]:
            is_same = math.isclose(best.cost_per_hour, found.cost_per_hour, rel_tol=1e-9)
            return replace(best, gap=found.gap, proven=is_whole and is_same and found.gap == 0)
        is_whole = is_whole and None not in counts
        asked = replace(asked, options=_learnt(asked, found, counts, planner_of))
    return best


def undivided(problem: FleetProblem, option: PoolOption, planner: PoolsOfType) -> CheapestFleet | None:
    """One pool for all of an option's requests, as its planner counts it; None where none is within the limits."""
    devices = planner.fewest(problem.rate_of(option))
    if devices is None:
        return None
    fleet = _fleet([ChosenPool(option, devices, 1.0)], problem, 0.0)
    return replace(fleet, proven=True) if fits(fleet, problem) else None


def fits(fleet: CheapestFleet, problem: FleetProblem) -> bool:
    """Whether a fleet, spares included, is within the devices of each type and the power."""
    owned: dict[str, int] = {}
    for pool in fleet.pools:
        name = pool.option.device_type
        owned[name] = owned.get(name, 0) + pool.devices + problem.spares
    watts = sum(pool.option.watts * (pool.devices + problem.spares) for pool in fleet.pools)
    few = all(count <= problem.most.get(name, math.inf) for name, count in owned.items())
    return few and watts <= problem.power_w * (1 + 1e-9)


def _rate(pool: ChosenPool, problem: FleetProblem) -> float:
    return pool.share * problem.rate_of(pool.option)


def _counted(found: CheapestFleet, counts: Sequence[int | None], problem: FleetProblem) -> CheapestFleet | None:
    """The fleet with the planners' counts; None where one has none. ``gap``: by which the program's is cheaper."""
    pools = [replace(pool, devices=n) for pool, n in zip(found.pools, counts, strict=True) if n is not None]
    if len(pools) < len(counts):
        return None
    fleet = _fleet(pools, problem, found.gap)
    return replace(fleet, gap=max(found.gap, 1 - found.cost_per_hour / fleet.cost_per_hour))


def _fleet(pools: Sequence[ChosenPool], problem: FleetProblem, gap: float) -> CheapestFleet:
    cost = sum(pool.option.price * (pool.devices + problem.spares) for pool in pools)
    return CheapestFleet(tuple(pools), cost, gap, proven=False)


def _learnt(
    asked: FleetProblem, found: CheapestFleet, counts: Sequence[int | None], planner_of: PlannerOf
) -> tuple[PoolOption, ...]:
    """The options with what the counts showed; without those that no number of devices serves."""
    known = {id(option): option for option in asked.options}
    for pool, devices in zip(found.pools, counts, strict=True):
        if devices is None:
            del known[id(pool.option)]
        elif devices != pool.devices:
            known[id(pool.option)] = _with(pool.option, devices, _rate(pool, asked), planner_of(pool.option))
    return tuple(known.values())


def _with(option: PoolOption, devices: int, qps: float, planner: PoolsOfType) -> PoolOption:
    """The option whose ``devices`` carry ``qps``, while one device fewer carries less."""
    below = qps * _BELOW
    if 1 < devices <= SIZES[-1] + 1:
        below = min(below, planner.rate(devices - 1)[0])
    sizes = sorted({*option.sizes, devices, max(devices - 1, 1)})
    carried = [max(option.carried(n), qps) if n >= devices else min(option.carried(n), below) for n in sizes]
    return replace(option, sizes=tuple(sizes), carried_qps=tuple(carried))
