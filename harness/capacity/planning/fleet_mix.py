"""The cheapest mix of pools: an integer program over types of device and the classes that each pool serves.

Variables, for each option j (a type of device for a set of classes at their relative rates):

    z_j in [0, 1]       the share of its classes' requests that it serves
    b_js in {0, 1}      whether its number of devices lies in segment s, from l_s to h_s devices
    t_js in {0, 1, ...} the devices above l_s

    minimise    sum of price_j (n_j + spares b_j)      with n_j = sum of l_s b_js + t_js,   b_j = sum of b_js <= 1
    such that   z_j lambda_j <= carried_j(n_j) = sum of carried(l_s) b_js + slope_s t_js,   t_js <= (h_s - l_s) b_js
                sum of z_j over the options with class c = 1                                for each class c
                sum of n_j + spares b_j over the options of a type <= most                  for each type
                sum of watts_j (n_j + spares b_j) <= power

(multiple-choice model of a piecewise linear function: Croxton, Gendron and Magnanti, Management Science 49, 2003). What
a pool carries is convex in its devices, since larger pools balance better: a linear program would use half a pool.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import optimize, sparse

from harness.errors import InconclusiveError

SECONDS = 60.0
_GAP = 1e-8
_SIMPLER_S = 10.0  # for the search of an equally cheap fleet with fewer pools
_LIMIT_REACHED, _INFEASIBLE = 1, 2  # of scipy.optimize.milp


@dataclass(frozen=True)
class PoolOption:
    """Devices of a type for some classes: ``carried_qps[i]`` requests/s of these with ``sizes[i]`` devices.

    Linear between sizes, and in proportion to the devices above the last.
    """

    device_type: str
    classes: tuple[str, ...]
    sizes: tuple[int, ...]
    carried_qps: tuple[float, ...]
    price: float
    watts: float = 0.0

    def carried(self, devices: int) -> float:
        """Requests/s of its classes that this many devices carry."""
        if devices < self.sizes[0]:
            return 0.0
        if devices >= self.sizes[-1]:
            return self.carried_qps[-1] * devices / self.sizes[-1]
        return float(np.interp(devices, self.sizes, self.carried_qps))

    def segments(self, qps: float) -> list[_Segment]:
        """The pieces of ``carried`` up to the devices that carry ``qps``."""
        pieces = [
            _Segment(low, high, below, (above - below) / (high - low))
            for low, high, below, above in zip(
                self.sizes, self.sizes[1:], self.carried_qps, self.carried_qps[1:], strict=False
            )
        ]
        slope = self.carried_qps[-1] / self.sizes[-1]
        most = max(math.ceil(qps / slope), self.sizes[-1])
        pieces.append(_Segment(self.sizes[-1], most, self.carried_qps[-1], slope))
        needed = next((number for number, each in enumerate(pieces) if each.highest >= qps), len(pieces) - 1)
        return pieces[: needed + 1]


class _Segment(NamedTuple):
    low: int
    high: int
    carried: float
    slope: float

    @property
    def highest(self) -> float:
        return self.carried + self.slope * (self.high - self.low)


@dataclass(frozen=True)
class FleetProblem:
    """What is asked: ``qps`` requests/s of classes with these ``shares``, from these options.

    ``most``: devices of a type that can be had, if limited; ``power_w``: of the whole fleet; ``spares``: of each pool.
    """

    qps: float
    shares: Mapping[str, float]
    options: tuple[PoolOption, ...]
    most: Mapping[str, int] = field(default_factory=dict)
    power_w: float = math.inf
    spares: int = 0

    def rate_of(self, option: PoolOption) -> float:
        """Requests/s of an option's classes."""
        return self.qps * sum(self.shares[name] for name in option.classes)


@dataclass(frozen=True)
class ChosenPool:
    """A pool of the cheapest fleet: its devices without spares, and the share of its classes that it serves."""

    option: PoolOption
    devices: int
    share: float


@dataclass(frozen=True)
class CheapestFleet:
    """The pools, and their cost per hour. ``gap``: the share by which a cheaper fleet might exist; 0 if none is known.

    ``proven``: that no fleet of the program is cheaper.
    """

    pools: tuple[ChosenPool, ...]
    cost_per_hour: float
    gap: float
    proven: bool = True


def cheapest(problem: FleetProblem, seconds: float = SECONDS) -> CheapestFleet | None:
    """Solve the integer program; None where no fleet satisfies it. Of equally cheap fleets, one with few pools.

    Raises InconclusiveError where no fleet was found within ``seconds``, nor shown not to exist.
    """
    served = {name for option in problem.options for name in option.classes}
    if {*problem.shares} - served:
        return None
    program = _Program(problem)
    solved = program.solve(program.costs(), [], seconds)
    if solved.status == _INFEASIBLE:
        return None
    if solved.x is None:
        raise InconclusiveError(
            f"no fleet was found within {seconds:g} s: give fewer types of device, or fewer classes"
        )
    gap = float(solved.mip_gap or 0.0) if solved.status == _LIMIT_REACHED else 0.0
    simpler = program.solve(program.pools(), [program.no_dearer(solved.x)], min(seconds, _SIMPLER_S))
    return program.fleet(solved.x if simpler.x is None else simpler.x, gap)


class _Program:
    """Columns of the program: for each option its z, then for each of its segments b and t."""

    def __init__(self, problem: FleetProblem):
        self.problem = problem
        self.segments = [option.segments(problem.rate_of(option)) for option in problem.options]
        starts = np.cumsum([0] + [1 + 2 * len(pieces) for pieces in self.segments])
        self.first, self.size = starts[:-1], int(starts[-1])

    def z(self, j: int) -> int:
        return int(self.first[j])

    def b(self, j: int, s: int) -> int:
        return int(self.first[j]) + 1 + 2 * s

    def t(self, j: int, s: int) -> int:
        return self.b(j, s) + 1

    def _devices(self, j: int, weight: float = 1.0) -> dict[int, float]:
        """Coefficients of weight x (n_j + spares b_j)."""
        row: dict[int, float] = {}
        for s, piece in enumerate(self.segments[j]):
            row[self.b(j, s)] = weight * (piece.low + self.problem.spares)
            row[self.t(j, s)] = weight
        return row

    def costs(self) -> np.ndarray:
        costs = np.zeros(self.size)
        for j, option in enumerate(self.problem.options):
            for column, value in self._devices(j, option.price).items():
                costs[column] = value
        return costs

    def pools(self) -> np.ndarray:
        """One for each pool that has devices."""
        counted = np.zeros(self.size)
        for j, pieces in enumerate(self.segments):
            counted[[self.b(j, s) for s in range(len(pieces))]] = 1
        return counted

    def no_dearer(self, x: np.ndarray) -> optimize.LinearConstraint:
        """A fleet costs no more than this one."""
        costs = self.costs()
        return optimize.LinearConstraint(costs[None, :], -np.inf, float(costs @ np.round(x, 9)) * (1 + 1e-9))

    def solve(self, objective: np.ndarray, more: list[optimize.LinearConstraint], seconds: float):
        return optimize.milp(
            objective,
            constraints=[self.constraints(), *more],
            bounds=self.bounds(),
            integrality=self.integrality(),
            options={"time_limit": seconds, "mip_rel_gap": _GAP},
        )

    def integrality(self) -> np.ndarray:
        whole = np.ones(self.size)
        whole[self.first] = 0
        return whole

    def bounds(self) -> optimize.Bounds:
        high = np.ones(self.size)
        for j, pieces in enumerate(self.segments):
            for s, piece in enumerate(pieces):
                high[self.t(j, s)] = piece.high - piece.low
        return optimize.Bounds(np.zeros(self.size), high)

    def constraints(self) -> optimize.LinearConstraint:
        rows: list[tuple[dict[int, float], float, float]] = []
        for j, option in enumerate(self.problem.options):
            rows += self._of_option(j, option)
        for name in self.problem.shares:
            serving = {self.z(j): 1.0 for j, option in enumerate(self.problem.options) if name in option.classes}
            rows.append((serving, 1.0, 1.0))
        rows += self._of_types()
        if math.isfinite(self.problem.power_w):
            watts: dict[int, float] = {}
            for j, option in enumerate(self.problem.options):
                watts |= self._devices(j, option.watts)
            rows.append((watts, -np.inf, self.problem.power_w))
        places = [(number, column, value) for number, (row, _, _) in enumerate(rows) for column, value in row.items()]
        numbers, columns, values = zip(*places, strict=True)
        matrix = sparse.csr_array((values, (numbers, columns)), shape=(len(rows), self.size))
        return optimize.LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows])

    def _of_option(self, j: int, option: PoolOption) -> list[tuple[dict[int, float], float, float]]:
        """Its capacity, at most one segment, and the devices within it."""
        rate, pieces = self.problem.rate_of(option), self.segments[j]
        capacity = {self.z(j): 1.0}
        for s, piece in enumerate(pieces):
            capacity[self.b(j, s)] = -piece.carried / rate
            capacity[self.t(j, s)] = -piece.slope / rate
        one = {self.b(j, s): 1.0 for s in range(len(pieces))}
        inside = [
            ({self.t(j, s): 1.0, self.b(j, s): float(piece.low - piece.high)}, -np.inf, 0.0)
            for s, piece in enumerate(pieces)
        ]
        return [(capacity, -np.inf, 0.0), (one, -np.inf, 1.0), *inside]

    def _of_types(self) -> list[tuple[dict[int, float], float, float]]:
        rows = []
        for name, most in self.problem.most.items():
            row: dict[int, float] = {}
            for j, option in enumerate(self.problem.options):
                if option.device_type == name:
                    row |= self._devices(j)
            if row:
                rows.append((row, -np.inf, float(most)))
        return rows

    def fleet(self, x: np.ndarray, gap: float) -> CheapestFleet:
        pools, cost = [], 0.0
        for j, option in enumerate(self.problem.options):
            pieces = enumerate(self.segments[j])
            devices = sum(piece.low * round(x[self.b(j, s)]) + round(x[self.t(j, s)]) for s, piece in pieces)
            if devices:
                pools.append(ChosenPool(option, devices, float(min(x[self.z(j)], 1.0))))
                cost += option.price * (devices + self.problem.spares)
        return CheapestFleet(tuple(pools), cost, gap, proven=gap == 0)
