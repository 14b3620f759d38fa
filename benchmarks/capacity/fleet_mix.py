"""The cheapest mix of device types: against brute force on small cases, and its time at 6 types x 4 classes.

Brute force counts up the devices of every pool, from the cheapest fleet on, and takes the first that serves all classes
(a linear program over the shares of each pool); it knows nothing of segments. Types are made up.
"""

from __future__ import annotations

import heapq
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
from scipy import optimize

from harness.capacity.planning.fleet import SIZES, subsets
from harness.capacity.planning.fleet_mix import FleetProblem, PoolOption, cheapest

CLASSES = ("short", "medium", "long", "ninety")
ALLOWED_GAP = 1e-6


def made_up(types: int, classes: int, qps: float, rng: np.random.Generator, **limits) -> FleetProblem:
    """Types that differ in speed, memory and price; a small pool carries less per device than a large one.

    A type with little memory cannot hold the longest class, and short sessions beside long ones cost it more.
    """
    names = CLASSES[:classes]
    shares = dict(zip(names, rng.dirichlet(np.full(classes, 3.0)), strict=True))
    work = 10.0 ** np.linspace(0, 1.5, classes) * rng.uniform(0.7, 1.4, classes)
    options = []
    for number in range(types):
        speed = rng.uniform(1, 10)
        price, watts = speed ** rng.uniform(0.7, 1.1) * rng.uniform(0.8, 1.2), 50 + 60 * speed
        is_small = rng.random() < 0.5
        for chosen in subsets(names):
            part = np.array([shares[name] for name in chosen])
            need = float(part @ work[[names.index(name) for name in chosen]] / part.sum())
            if number and is_small and names[-1] in chosen:
                continue
            each = speed / need * (0.85 if len(chosen) > 1 else 1.0)
            carried = [each * (n - 0.4 * math.sqrt(n)) for n in SIZES]
            options.append(PoolOption(f"type {number}", chosen, SIZES, tuple(carried), price, watts))
    return FleetProblem(qps, shares, tuple(options), **limits)


def brute_force(problem: FleetProblem, most_cost: float) -> float:
    """The cost of the cheapest fleet, by counting up; infinite where none costs at most ``most_cost``."""
    for cost, counts in _by_cost(problem, most_cost):
        if _within(problem, counts) and _serves(problem, counts):
            return cost
    return math.inf


def _by_cost(problem: FleetProblem, most_cost: float) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Every fleet in order of its cost: a fleet's successors have one device more, in no earlier pool."""
    prices = [option.price for option in problem.options]
    queue: list[tuple[float, tuple[int, ...], int]] = [(0.0, (0,) * len(prices), 0)]
    while queue:
        cost, counts, last = heapq.heappop(queue)
        yield cost, counts
        for j in range(last, len(prices)):
            first = problem.spares + 1 if not counts[j] else 1
            more = cost + prices[j] * first
            if more <= most_cost * (1 + 1e-9):
                heapq.heappush(queue, (more, (*counts[:j], counts[j] + 1, *counts[j + 1 :]), j))


def _within(problem: FleetProblem, counts: Sequence[int]) -> bool:
    """Whether a fleet with its spares is within the numbers that can be had, and the power."""
    whole = [count + problem.spares if count else 0 for count in counts]
    watts = sum(count * option.watts for count, option in zip(whole, problem.options, strict=True))
    by_type: dict[str, int] = {}
    for count, option in zip(whole, problem.options, strict=True):
        by_type[option.device_type] = by_type.get(option.device_type, 0) + count
    return watts <= problem.power_w and all(by_type.get(name, 0) <= most for name, most in problem.most.items())


def _serves(problem: FleetProblem, counts: Sequence[int]) -> bool:
    """Whether shares exist with which every class is served whole."""
    used = [j for j, count in enumerate(counts) if count]
    options = problem.options
    reach = {j: min(options[j].carried(counts[j]) / problem.rate_of(options[j]), 1.0) for j in used}
    for name in problem.shares:
        if sum(reach[j] for j in used if name in options[j].classes) < 1 - 1e-9:
            return False
    matrix = np.array([[float(name in options[j].classes) for j in used] for name in problem.shares])
    bounds = [(0.0, reach[j]) for j in used]
    return optimize.linprog(np.zeros(len(used)), A_eq=matrix, b_eq=np.ones(len(matrix)), bounds=bounds).status == 0


def compared(cases: int, seed: int) -> tuple[list[float], int]:
    """The relative gap of each small case that has a fleet; and how many have none, by both."""
    gaps, none = [], 0
    for number, rng in enumerate(np.random.default_rng(seed).spawn(cases)):
        types, classes = (2, 2) if number % 3 else (3, 2)
        limits: dict = {"spares": number % 2}
        problem = made_up(types, classes, float(rng.uniform(0.1, 1.5)), rng, **limits)
        if number % 4 == 0:
            limits |= {"most": {"type 0": 1}, "power_w": float(rng.uniform(300, 3000))}
            problem = FleetProblem(problem.qps, problem.shares, problem.options, **limits)
        found = cheapest(problem)
        bound = found.cost_per_hour if found else 12.0
        counted = brute_force(problem, bound)
        if found is None and math.isinf(counted):
            none += 1
            continue
        gaps.append(math.inf if found is None else abs(found.cost_per_hour / counted - 1))
    return gaps, none


def timed(types: int, classes: int, qps: float, seed: int, **limits) -> tuple[tuple[float, float], float, int, float]:
    """Seconds of the clock and of this process, cost, options and the gap that is left, of one large case.

    The solver waits for nothing: on a busy host only the seconds of its process are its own.
    """
    problem = made_up(types, classes, qps, np.random.default_rng(seed), **limits)
    began = time.perf_counter(), time.process_time()
    found = cheapest(problem, seconds=300.0)
    took_s = time.perf_counter() - began[0], time.process_time() - began[1]
    assert found is not None
    return took_s, found.cost_per_hour, len(problem.options), found.gap


def main(arguments: Sequence[str]) -> int:
    parser = common.Parser(__doc__, "python benchmarks/capacity/fleet_mix.py --cases 200")
    parser.add_argument("--cases", type=common.whole(1, 10**5), default=120, help="small cases beside brute force")
    parser.add_argument("--types", type=common.whole(1, 12), default=6)
    parser.add_argument("--classes", type=common.whole(1, 4), default=4)
    parser.add_argument("--seed", type=common.whole(0, 10**9), default=1)
    options = parser.parse_args(arguments)
    cases, rates = (6, (2.0,)) if options.quick else (options.cases, (2.0, 20.0, 200.0))
    gaps, none = compared(cases, options.seed)
    table = common.table(
        f"{options.types} types x {options.classes} classes",
        "requests/s",
        "pools to choose from",
        "cost/h",
        "s",
        "CPU s",
        "gap left",
    )
    times, cpu = {}, {}
    for qps in rates:
        took_s, cost, count, gap = timed(options.types, options.classes, qps, options.seed)
        times[f"{qps:g}"], cpu[f"{qps:g}"] = took_s
        table.add_row(f"{qps:g}", str(count), f"{cost:,.2f}", *(f"{each:.2f}" for each in took_s), f"{gap:.3%}")
    small = common.table("Against brute force", "cases", "without any fleet, by both", "largest gap")
    small.add_row(str(cases), str(none), f"{max(gaps, default=0):.2e}")
    worst = max(gaps, default=0.0)
    figures = {
        "gap_to_brute_force": 0 if worst <= ALLOWED_GAP else worst,
        "cases": cases,
        "cases_without_a_fleet": none,
        "types": options.types,
        "classes": options.classes,
        "seconds_by_qps": times,
        "seconds_max": max(times.values()),
        "cpu_seconds_by_qps": cpu,
        "cpu_seconds_max": max(cpu.values()),
    }
    common.finish([small, table], figures)
    return 0 if figures["gap_to_brute_force"] == 0 else common.EXIT_FAILED


if __name__ == "__main__":
    common.run(main)
