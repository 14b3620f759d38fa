"""Why each losing option of a plan lost: the limit that rules it out, and by how much, simulated at the same load."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from harness.capacity.fitting.fit import limits_of
from harness.capacity.fitting.rate_search import KV_MEMORY, SimulatedLoad, is_of_range
from harness.capacity.models.device import Device, slo_name
from harness.capacity.planning.pools import Pools
from harness.capacity.planning.remarks import may_be_as_good
from harness.errors import InconclusiveError
from harness.records import why_not as reasons
from harness.records.fit import Fit, FittedDeployment
from harness.records.plan import PlannedTarget
from harness.records.slo import Slo
from harness.records.why_not import RuledOut
from harness.topology import topology_of

_NONE_HOLDS = "the deployment with the most ladders meets the SLOs at no rate; more ladders of this one would decide"

_SIMULATED: dict[str, Any] = {"basis": "simulated"}


def why_not(
    fit: Fit, slos: Sequence[Slo], targets: Sequence[PlannedTarget], pools: Pools | None = None
) -> tuple[RuledOut, ...]:
    """Every topology, deployment and count that a plan does not use, with what rules it out.

    A deployment is judged on one device at the rate that the planned one sustains; one that sustains no rate, with one
    session alone; a count of one device fewer than planned, at its target. ``pools``: of the planned deployment.
    Without them nothing is simulated: a deployment is ruled out by its rate alone, and counts are left out.
    """
    best = fit.best_deployment
    others = sorted((each for each in fit.deployments if each is not best), key=lambda each: -each.rate())
    lost = [_deployment(each, best, fit, slos, pools) for each in others]
    return (*_topologies(lost, best), *lost, *_counts(best, targets, pools))


def _deployment(
    each: FittedDeployment, best: FittedDeployment | None, fit: Fit, slos: Sequence[Slo], pools: Pools | None
) -> RuledOut:
    lost = RuledOut(
        option=reasons.DEPLOYMENT,
        topology=topology_of(each.deployment),
        knobs=each.deployment,
        at_qps=None,
        by=reasons.BY_UNKNOWN,
        limit=each.inconclusive or _NONE_HOLDS,
        certain=False,
        rate_per_s=each.max_rate_per_s,
        basis="",
    )
    if each.max_rate_per_s is None or (best is None and each.rate() > 0):
        return lost
    if best is None or each.rate() <= 0:
        return replace(lost, certain=True, basis="simulated", **_alone(each, slos))
    lost = replace(lost, at_qps=best.rate())
    if each.rate() >= best.rate():
        ladders = _against(reasons.BY_LADDERS, "ladders", len(each.trial_ids), len(best.trial_ids))
        return replace(lost, basis="measured", **ladders)
    found = _against(reasons.BY_RATE, "rate of one device", each.rate(), best.rate()) | _SIMULATED
    try:
        own = _pools_of(each, fit, slos, pools)
    except InconclusiveError:
        own = None
    found |= _violated(own, best.rate(), 1) if own else {}
    return replace(lost, certain=not may_be_as_good(best, each, fit.confidence), **found)


def _pools_of(each: FittedDeployment, fit: Fit, slos: Sequence[Slo], pools: Pools | None) -> Pools | None:
    """Pools of another deployment under the same traffic and routing."""
    if pools is None:
        return None
    limits = limits_of(each, slos, fit.session_limit, fit.extrapolation, pools.traffic)
    return pools.changed(device=Device.from_fit(each), limits=replace(limits, routing=pools.limits.routing))


def _violated(pools: Pools, qps: float, devices: int) -> dict[str, Any]:
    """The limit that a simulated pool violates at a rate, and its basis; {} where it meets all of them."""
    load = pools.judge(qps, devices)
    basis: dict[str, Any] = {"basis": "simulated" if pools.has_seen(load.sessions_p95) else "extrapolated"}
    if not load.met:
        return _worst(pools, load) | basis
    if not pools.serves(qps, devices):
        collapse: dict[str, Any] = {"by": reasons.BY_COLLAPSE, "limit": "throughput"}
        return collapse | dict.fromkeys(("value", "allowed", "excess")) | basis
    return {}


def _worst(pools: Pools, load: SimulatedLoad) -> dict[str, Any]:
    name, share = load.worst, load.shares[load.worst]
    if is_of_range(name):
        most = float(pools.limits.most_sessions)
        return _against(reasons.BY_RANGE, name, share * most, most)
    limit = next(slo.limit for slo in pools.limits.slos if _name(slo) == name)
    value = share * limit if limit else math.inf
    return _against(reasons.BY_MEMORY if name in load.queued else reasons.BY_SLO, name, value, limit)


def _alone(each: FittedDeployment, slos: Sequence[Slo]) -> dict[str, Any]:
    """The SLO that one session alone violates most; where none is known to be violated, what binds."""
    try:
        device = Device.from_fit(each)
        step_s = device.step_time(np.array([1.0]))
        values = [
            float(device.at_constant_step(slo.traffic_class, slo.metric, slo.quantile, step_s)[0]) for slo in slos
        ]
    except InconclusiveError:
        values = []
    shares = [_share(value, slo.limit) for value, slo in zip(values, slos, strict=True)]
    if max(shares, default=0.0) <= 1:
        return {"by": reasons.BY_MEMORY if each.binding == KV_MEMORY else reasons.BY_SLO, "limit": each.binding}
    worst = int(np.argmax(shares))
    return _against(reasons.BY_SLO, _name(slos[worst]), values[worst], slos[worst].limit)


def _share(value: float, limit: float) -> float:
    """The value as a share of its limit; at most 1 where it is within."""
    return value / limit if limit else (math.inf if value > 0 else 0.0)


def _topologies(lost: Iterable[RuledOut], best: FittedDeployment | None) -> list[RuledOut]:
    """One of each topology that the plan does not use: its deployment with the highest rate."""
    first: dict[str, RuledOut] = {}
    for each in lost:
        if best and each.topology != topology_of(best.deployment):
            first.setdefault(each.topology, replace(each, option=reasons.TOPOLOGY))
    return list(first.values())


def _counts(best: FittedDeployment | None, targets: Sequence[PlannedTarget], pools: Pools | None) -> list[RuledOut]:
    """One device fewer than each target has, where that leaves any."""
    if best is None or pools is None:
        return []
    return [_count(best, each, each.devices - 1, pools) for each in targets if each.devices and each.devices > 1]


def _count(best: FittedDeployment, target: PlannedTarget, devices: int, pools: Pools) -> RuledOut:
    low = target.interval[0]
    found = _SIMULATED | (_violated(pools, target.qps, devices) or _below_the_cap(pools, target.qps, devices))
    return RuledOut(
        option=reasons.DEVICES,
        topology=topology_of(best.deployment),
        knobs=best.deployment,
        devices=devices,
        at_qps=target.qps,
        certain=low is not None and devices < low,
        rate_per_s=best.max_rate_per_s,
        **found,
    )


def _below_the_cap(pools: Pools, qps: float, devices: int) -> dict[str, Any]:
    """The cap on utilisation, where it is exceeded; otherwise the rate of so many devices, as plans interpolate it."""
    utilisation = qps / (devices * pools.steady_rate())
    if utilisation > pools.utilisation_cap:
        return _against(reasons.BY_UTILISATION, "utilisation", utilisation, pools.utilisation_cap)
    rate = float(pools.rates(np.array([devices]), qps)[0])
    return _against(reasons.BY_RATE, "rate of the devices", rate, qps)


def _against(by: str, limit: str, value: float, allowed: float) -> dict[str, Any]:
    """A value against what is allowed; what is infinite is not stored."""
    known = value if math.isfinite(value) else None
    excess = value / allowed - 1 if known is not None and allowed else None
    return {"by": by, "limit": limit, "value": known, "allowed": allowed, "excess": excess}


def _name(slo: Slo) -> str:
    return slo_name(slo.traffic_class, slo.metric, slo.quantile)
