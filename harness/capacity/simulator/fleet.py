"""Simulate a pool, or a fleet of pools that classes are split over, under a demand: one call each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness.capacity.simulator.engine import Counting, SimulationEngine
from harness.capacity.simulator.pool import Pool
from harness.capacity.simulator.results import Estimate, PoolResult, result_of
from harness.capacity.simulator.traffic import Demand
from harness.errors import InputError


@dataclass(frozen=True)
class Split:
    """Pools by name, and the name of the pool that each class goes to."""

    pools: Mapping[str, Pool]
    pool_of: Mapping[str, str]


def simulate_pool(
    pool: Pool, demand: Demand, counting: Counting, rng: np.random.Generator, *, found: int = 0
) -> PoolResult:
    """Simulate a pool under a demand until the end of counting; memory does not grow with the number of sessions.

    ``found`` sessions are in progress at the start, as in a steady state.
    """
    everyone = Split({"": pool}, dict.fromkeys(demand.classes, ""))
    return simulate_split(everyone, demand, counting, rng, found={"": found})[""]


def simulate_split(
    split: Split,
    demand: Demand,
    counting: Counting,
    rng: np.random.Generator,
    *,
    found: Mapping[str, int] | None = None,
) -> dict[str, PoolResult]:
    """Pools that share nothing but the demand: each serves its own classes, and its result holds those alone.

    ``found``: sessions in progress at the start, by pool, each of a class of its own.
    """
    numbers = _classes_of(split, demand, counting)
    engines = {name: SimulationEngine(pool, counting) for name, pool in split.pools.items()}
    for name, sessions in (found or {}).items():
        engines[name].feed(demand.found(sessions, numbers[name], rng))
    for block in demand.blocks(rng, counting.stop_s):
        for name, engine in engines.items():
            engine.feed(block if len(engines) == 1 else block[np.isin(block["class_index"], numbers[name])])
    results = {}
    for name, engine in engines.items():
        engine.finish(counting.stop_s)
        own = [counting.classes[number] for number in numbers[name]]
        results[name] = result_of(engine.arrays, own, numbers[name], counting.window_s)
    return results


def _classes_of(split: Split, demand: Demand, counting: Counting) -> dict[str, list[int]]:
    """Class numbers of each pool. Raises InputError for a class without a pool, or a pool without a class."""
    if counting.classes != demand.classes:
        raise InputError(f"the demand is of {', '.join(demand.classes)}, counted are {', '.join(counting.classes)}")
    unknown = {*split.pool_of.values()} - {*split.pools}
    if {*split.pool_of} != {*demand.classes} or unknown:
        raise InputError(f"every class ({', '.join(demand.classes)}) goes to a pool of {', '.join(split.pools)}")
    return {
        name: [number for number, each in enumerate(demand.classes) if split.pool_of[each] == name]
        for name in split.pools
    }


def replicate(once: Callable[[np.random.Generator], PoolResult], replications: int, seed: int) -> list[PoolResult]:
    """Independent runs of the same simulation, with generators spawned from one seed."""
    if replications < 1:
        raise InputError(f"at least one replication, not {replications}")
    return [once(np.random.default_rng(each)) for each in np.random.SeedSequence(seed).spawn(replications)]


def over(results: Sequence[PoolResult], figure: Callable[[PoolResult], float], confidence: float = 0.95) -> Estimate:
    """The mean of a figure over replications, with its interval by Student's t."""
    values = [figure(result) for result in results]
    return Estimate.of(float(np.mean(values)), values, confidence)
