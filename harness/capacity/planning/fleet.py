"""Fleets of several types of device: what each type carries of each part of the traffic, and the cheapest mix."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from harness import wire
from harness.capacity.planning.closed_form import ClosedPools
from harness.capacity.planning.counted_fleets import SIZES, PoolsOfType, cheapest_counted, undivided
from harness.capacity.planning.estimated import CONFIDENCE
from harness.capacity.planning.fleet_mix import SECONDS, CheapestFleet, ChosenPool, FleetProblem, PoolOption
from harness.capacity.planning.pools import Pools
from harness.errors import InconclusiveError, InputError
from harness.records.fleet import FleetAnswer, FleetTarget, FleetType, MixedFleet, MixedPool
from harness.records.plan import Bounds, Counts
from harness.records.slo import Slo
from harness.traffic.mix import Mix

MOST_CLASSES, MOST_TYPES = 6, 12  # a type has an option for every set of classes
ESTIMATED, MEASURED, SIMULATED, EXTRAPOLATED = "estimated", "measured", "simulated", "extrapolated"


@dataclass(frozen=True)
class SimulatedPools:
    """Pools of a fitted device, as a type of a mixed fleet."""

    pools: Pools

    def rate(self, devices: int) -> tuple[float, str]:
        return self.pools.rate(devices)

    def fewest(self, qps: float) -> int | None:
        load = self.pools.fewest(qps)
        return load.devices if load else None


@dataclass(frozen=True)
class DeviceOffer:
    """A type of device for a fleet. ``pools``: its pools for a part of the mix; raises for one it cannot serve.

    ``draws``: the same for each draw of an estimate's unknowns; None for a measured type.
    """

    name: str
    device: str
    basis: str
    price: float
    pools: Callable[[Mix], PoolsOfType]
    draws: Callable[[Mix], Sequence[ClosedPools]] | None = None
    watts: float | None = None
    watts_basis: str = ""
    most: int | None = None


@dataclass(frozen=True)
class FleetTerms:
    """What a fleet is planned with. ``spares``: of each pool; ``power_w``: limit of all devices, or None."""

    preset: str
    slos: tuple[Slo, ...]
    utilisation_cap: float
    currency: str = "USD"
    power_w: float | None = None
    spares: int = 0
    seconds: float = SECONDS

    def answer(
        self, mix: Mix, *, types: tuple[FleetType, ...] = (), targets: tuple[FleetTarget, ...] = (), note: str = ""
    ) -> FleetAnswer:
        """fleet.json under these terms; ``note``: why it holds no fleet."""
        return FleetAnswer(
            preset=self.preset,
            mix=mix.record(),
            slos=self.slos,
            utilisation_cap=self.utilisation_cap,
            currency=self.currency,
            power_limit_w=self.power_w,
            spares=self.spares,
            types=types,
            targets=targets,
            note=note,
        )


def plan_fleets(
    offers: Sequence[DeviceOffer],
    mix: Mix,
    targets_qps: Sequence[float],
    terms: FleetTerms,
    progress: Callable[[str], None] = lambda what: None,
) -> FleetAnswer:
    """fleet.json: for each rate the cheapest mix of pools, and beside it the fleet of each type alone.

    A pool serves a set of classes at their relative rates, and a share of their requests. Raises InputError for more
    types or classes than can be planned, and where a power limit meets a device of unknown power.
    """
    _check(offers, mix, terms)
    found = [_Type.of(offer, mix, max(targets_qps), progress) for offer in offers]
    targets = []
    for qps in targets_qps:
        progress(f"the cheapest fleet for {qps:g} requests/s")
        targets.append(_target(found, mix, qps, terms))
    return terms.answer(mix, types=tuple(each.record() for each in found), targets=tuple(targets))


def _check(offers: Sequence[DeviceOffer], mix: Mix, terms: FleetTerms) -> None:
    if len(mix.classes) > MOST_CLASSES or len(offers) > MOST_TYPES:
        raise InputError(
            f"a fleet of {len(offers)} types for {len(mix.classes)} classes: at most {MOST_TYPES} types and "
            f"{MOST_CLASSES} classes can be planned together: leave some out, or join similar classes"
        )
    unknown = [each.name for each in offers if each.watts is None]
    if terms.power_w is not None and unknown:
        raise InputError(f"the power of {', '.join(unknown)} is not known: leave out the power limit, or these types")


@dataclass(frozen=True)
class _Type:
    """An offer with what its pools carry, by set of classes; ``ruled_out``: why others cannot be served."""

    offer: DeviceOffer
    options: tuple[PoolOption, ...]
    planners: Mapping[tuple[str, ...], PoolsOfType]
    parts: Mapping[tuple[str, ...], Mix]
    ruled_out: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, offer: DeviceOffer, mix: Mix, qps: float, progress: Callable[[str], None]) -> _Type:
        progress(f"what {offer.name} carries")
        options, planners, parts, ruled_out = [], {}, {}, {}
        shares = mix.shares()
        for classes in subsets(tuple(shares)):
            part = mix.only(lambda name, own=classes: name in own)
            try:
                planner = offer.pools(part)
                rate, binding = planner.rate(1)
                if rate <= 0:
                    raise InconclusiveError(binding)
            except (InconclusiveError, InputError) as error:
                ruled_out[", ".join(classes)] = str(error)
                continue
            planners[classes], parts[classes] = planner, part
            options.append(_option(offer, classes, planner, qps * sum(shares[name] for name in classes)))
        return cls(offer, tuple(options), planners, parts, ruled_out)

    def record(self) -> FleetType:
        offer = self.offer
        return FleetType(
            name=offer.name,
            device=offer.device,
            basis=offer.basis,
            price_per_hour=offer.price,
            watts=offer.watts,
            watts_basis=offer.watts_basis,
            most=offer.most,
            ruled_out=dict(self.ruled_out),
        )


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Every set of some of the names, small ones first."""
    return [chosen for size in range(1, len(names) + 1) for chosen in itertools.combinations(names, size)]


def _option(offer: DeviceOffer, classes: tuple[str, ...], planner: PoolsOfType, qps: float) -> PoolOption:
    """What pools of some sizes carry, up to one that carries all; a larger pool carries no less per device."""
    sizes, carried = [], []
    for size in SIZES:
        sizes.append(size)
        carried.append(planner.rate(size)[0])
        if carried[-1] >= qps:
            break
    per_device = np.maximum.accumulate(np.array(carried) / sizes)
    rates = tuple((per_device * sizes).tolist())
    return PoolOption(offer.name, classes, tuple(sizes), rates, offer.price, offer.watts or 0.0)


def _target(types: Sequence[_Type], mix: Mix, qps: float, terms: FleetTerms) -> FleetTarget:
    shares, by_name = mix.shares(), {each.offer.name: each for each in types}
    problem = FleetProblem(
        qps,
        shares,
        tuple(option for each in types for option in each.options),
        {each.offer.name: each.offer.most for each in types if each.offer.most is not None},
        math.inf if terms.power_w is None else terms.power_w,
        terms.spares,
    )
    found = cheapest_counted(
        problem, lambda option: by_name[option.device_type].planners[option.classes], terms.seconds
    )
    alone = _alone(types, problem)
    cheaper = min(alone.values(), key=lambda each: each.cost_per_hour, default=None)
    if cheaper and (found is None or cheaper.cost_per_hour < found.cost_per_hour * (1 - 1e-9)):
        found = replace(cheaper, proven=False)
    whole = {name: _fleet(each, problem, by_name, mix) for name, each in alone.items()}
    if found is None:
        return FleetTarget(qps=qps, best=None, undivided=whole, note=_nothing(types, shares))
    return FleetTarget(qps=qps, best=_fleet(found, problem, by_name, mix), undivided=whole)


def _alone(types: Sequence[_Type], problem: FleetProblem) -> dict[str, CheapestFleet]:
    """By type, the fleet that has no other and does not divide the traffic."""
    found = {}
    for each in types:
        for option in each.options:
            if option.classes == tuple(problem.shares):
                found[each.offer.name] = undivided(problem, option, each.planners[option.classes])
    return {name: fleet for name, fleet in found.items() if fleet}


def _nothing(types: Sequence[_Type], shares: Mapping[str, float]) -> str:
    served = {name for each in types for classes in each.planners for name in classes}
    if missing := [name for name in shares if name not in served]:
        return f"No type of device can serve {', '.join(missing)} within the SLOs."
    return "No fleet serves it within the numbers of devices and the power that are given."


def _fleet(found: CheapestFleet, problem: FleetProblem, types: Mapping[str, _Type], mix: Mix) -> MixedFleet:
    """The record of a fleet: its pools, its cost, and its energy."""
    drawn = [_drawn(types[pool.option.device_type], pool, problem) for pool in found.pools]
    pools = tuple(
        _pool(pool, counts, problem, types[pool.option.device_type])
        for pool, counts in zip(found.pools, drawn, strict=True)
    )
    devices: dict[str, int] = {}
    for pool in pools:
        devices[pool.device_type] = devices.get(pool.device_type, 0) + pool.devices
    cost = sum(types[name].offer.price * count for name, count in devices.items())
    audio_s = problem.qps * mix.mean_frames() * wire.SECONDS_PER_FRAME
    watts = [(types[name].offer.watts, count) for name, count in devices.items()]
    known = [each * count for each, count in watts if each is not None]
    total_w = sum(known) if len(known) == len(watts) else None
    bases = {types[name].offer.watts_basis for name in devices}
    return MixedFleet(
        pools=pools,
        devices=devices,
        cost_per_hour=cost,
        cost_interval=_cost_interval(pools, drawn, types, cost),
        cost_per_audio_hour=cost / audio_s,
        watts=total_w,
        joules_per_audio_s=None if total_w is None else total_w / audio_s,
        watts_basis=ESTIMATED if ESTIMATED in bases else next(iter(sorted(bases)), ""),
        proven=found.proven,
        gap=found.gap,
    )


def _pool(chosen: ChosenPool, drawn: np.ndarray | None, problem: FleetProblem, kind: _Type) -> MixedPool:
    option = chosen.option
    qps = chosen.share * problem.rate_of(option)
    count = chosen.devices
    return MixedPool(
        device_type=option.device_type,
        classes=option.classes,
        share=chosen.share,
        qps=qps,
        devices=count + problem.spares,
        spares=problem.spares,
        interval=(None, None) if drawn is None else _interval(drawn, count + problem.spares),
        basis=_basis(kind.offer, len(option.classes) == len(problem.shares)),
    )


def _basis(offer: DeviceOffer, is_whole: bool) -> str:
    """The basis of a pool: of a device that was measured with all classes it is simulated, with some extrapolated."""
    if offer.draws is not None:
        return offer.basis
    if offer.basis == MEASURED:
        return SIMULATED if is_whole else EXTRAPOLATED
    return offer.basis if is_whole or offer.basis == EXTRAPOLATED else f"{offer.basis}, {EXTRAPOLATED}"


def _drawn(kind: _Type, chosen: ChosenPool, problem: FleetProblem) -> np.ndarray | None:
    """The devices of a pool, spares included, for each draw of the unknowns: infinite where none suffice.

    None if the type was measured.
    """
    if kind.offer.draws is None:
        return None
    qps = chosen.share * problem.rate_of(chosen.option)
    counts = (pools.fewest(qps) for pools in kind.offer.draws(kind.parts[chosen.option.classes]))
    return np.array([math.inf if each is None else each + problem.spares for each in counts])


def _tails() -> list[float]:
    return [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]


def _interval(drawn: np.ndarray, count: int) -> Counts:
    low, high = np.quantile(drawn, _tails(), method="inverted_cdf")
    return int(min(low, count)), int(max(high, count)) if math.isfinite(high) else None


def _cost_interval(
    pools: Sequence[MixedPool], drawn: Sequence[np.ndarray | None], types: Mapping[str, _Type], cost: float
) -> Bounds:
    """The cost of an hour over the draws; unknowns that types share are drawn together."""
    if all(each is None for each in drawn):
        return None, None
    prices = [types[pool.device_type].offer.price for pool in pools]
    counts = [pool.devices if each is None else each for pool, each in zip(pools, drawn, strict=True)]
    costs = [price * np.asarray(count, dtype=float) for price, count in zip(prices, counts, strict=True)]
    total = np.sum(np.broadcast_arrays(*costs), axis=0)
    low, high = np.quantile(total, _tails(), method="inverted_cdf")
    return float(min(low, cost)), float(max(high, cost)) if math.isfinite(high) else None
