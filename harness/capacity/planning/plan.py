"""From fit.json and the open-loop runs to plan.json: devices per target rate, and whether that can be signed off."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from harness.capacity.fitting.fit import finite, limits_of
from harness.capacity.fitting.rate_search import Traffic, steady_draws, steady_limit
from harness.capacity.models.device import Device
from harness.capacity.planning.confirmation import confirm
from harness.capacity.planning.cost_and_growth import forecast, price_of, with_costs
from harness.capacity.planning.device_losses import Loss, lose, with_spares
from harness.capacity.planning.device_types import device_types
from harness.capacity.planning.pools import Pools, drain_times_s
from harness.capacity.planning.remarks import left_out, remarks_on, without_price, without_recovery
from harness.capacity.planning.routing import LEAST_LOADED, ROUTINGS, counts_by_routing
from harness.capacity.planning.sensitivity import sensitivity
from harness.capacity.planning.why_not import why_not
from harness.capacity.simulator.sessions import simulate
from harness.device_profile import Profile
from harness.records.estimate import VERDICT
from harness.records.fit import Fit, FittedDeployment, fitted
from harness.records.plan import Drain, Forecast, KvMemory, Plan, PlannedLoss, PlannedRate, PlannedTarget, Price
from harness.records.prediction import Prediction
from harness.records.schema import Trial
from harness.records.slo import Slo
from harness.topology import Knobs
from harness.traffic.mix import Mix

LOST = (1, 2)  # devices lost at peak load: N+1 and N+2


@dataclass(frozen=True)
class Terms:
    """The assumptions of a plan. ``confidence``: of intervals; ``max_error``: of predictions, relative.

    ``unit``, ``preset``, ``device``: what one device is; it has ``gpus`` GPUs. ``prices``: per hour of a device,
    by type, in ``currency``. ``growth_per_month`` (a share of the rate) and ``fleet`` (existing devices) are for
    a forecast; ``profiles``, by type of device, for counts of devices that were not deployed. ``routing``: how sessions
    are given to devices, a key of ``planning.routing.ROUTINGS``. ``predictions``: those
    recorded before open-loop runs started, by trial; empty for an older run. ``in_windows``: metrics.in_window of
    open-loop runs, with a column trial_id; None: not known. ``times_basis``: of emulated times that
    nobody measured (estimated or scaled); ``dilation``: how many times slower emulated GPUs ran. With these, the plan
    is an estimate, and nothing is met or missed.
    """

    utilisation_cap: float
    confidence: float
    max_error: float
    unit: str
    preset: str
    device: str
    gpus: int = 1
    emulated: bool = False
    prices: Mapping[str, float] = field(default_factory=dict)
    currency: str = "USD"
    growth_per_month: float | None = None
    fleet: int | None = None
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    routing: str = LEAST_LOADED
    predictions: Mapping[str, Prediction] = field(default_factory=dict)
    in_windows: pd.DataFrame | None = field(default=None, compare=False)
    times_basis: str = ""
    dilation: float = 1.0


def make_plan(
    fit: Fit,
    trials: Sequence[Trial],
    requests: pd.DataFrame,
    mix: Mix,
    slos: Sequence[Slo],
    targets_qps: Sequence[float],
    rng: np.random.Generator,
    terms: Terms,
    progress: Callable[[str], None] = lambda what: None,
) -> Plan:
    """plan.json: the devices that each target needs on the best deployment, the validation, and the verdict.

    ``fit``: of fit_run. ``requests``: as for fit_run, including those of open-loop trials. met: every target has a
    count inside the measured range, no open-loop run of the deployment failed (its predictions, its SLOs), and the
    one with the highest rate passed. missed: an SLO cannot be met at any rate on any deployment. inconclusive:
    anything else; ``reasons`` names the measurement that would decide. What would be met is a "planning estimate" where
    nobody measured the times, or time was dilated.
    """
    chosen = fit.best_deployment
    plan = _nothing_known(chosen, slos, targets_qps, terms)
    if chosen is None:
        return _undecided(_without_rate(plan, fit))
    judging = {"confidence": terms.confidence, "max_error": terms.max_error, "in_windows": terms.in_windows}
    confirmed = confirm(chosen.deployment, trials, requests, mix, slos, rng, **judging, predictions=terms.predictions)
    pools = pools_of(fit, chosen, mix, slos, terms.utilisation_cap, terms.routing)
    shares = steady_draws(pools.device, pools.limits, rng) / steady_limit(pools.device, pools.limits)[0]
    targets = []
    for qps in targets_qps:
        progress(f"planning {qps:g} requests a second")
        counts = pools.drawn_devices(qps, shares, rng)
        targets.append(_target(pools, qps, counts, terms.confidence, confirmed.highest_rate_per_s))
    doubts = [*confirmed.doubts, *_doubts_about(targets, pools.device.max_sessions)]
    at_most = pools.judge(chosen.rate(), 1)
    plan = replace(
        plan,
        rate_per_device=replace(plan.rate_per_device, basis=_basis(pools.has_seen(at_most.sessions_p95))),
        validation=confirmed.rows,
        open_runs=confirmed.runs,
        targets=_with_costs(targets, plan.costs, pools),
        drain=_drain(pools, rng),
    )
    progress("planning what changes would do")
    plan = replace(
        plan,
        sensitivity=sensitivity(fit, chosen, pools, targets_qps, terms.gpus),
        device_types=device_types(chosen, pools, terms.profiles, targets_qps, terms.prices),
        memory=_memory(pools),
        forecast=_growth(plan.targets, pools, terms),
        why_not=why_not(fit, slos, plan.targets, pools),
    )
    remarks = (*remarks_on(fit, chosen, pools), *without_recovery(targets), *without_price(plan, terms.prices))
    return _undecided(replace(plan, verdict="inconclusive" if doubts else "met", reasons=(*doubts, *remarks)))


def _undecided(plan: Plan) -> Plan:
    """The plan, an estimate at most where its times were never measured, or its time was dilated."""
    said = []
    if plan.times_basis:
        said.append(
            f"A planning estimate: the emulated times are {plan.times_basis}, nobody has measured such a GPU, and no "
            "interval here holds how wrong they may be (`harness plan --card` draws that)."
        )
    if plan.dilation != 1:
        said.append(
            f"Emulated, time dilated {plan.dilation:g} times: queues and batches are those of the real Triton, and "
            f"what the host took of every step was divided by {plan.dilation:g}."
        )
    if not said:
        return plan
    verdict = VERDICT if plan.verdict == "met" else "inconclusive"
    return replace(plan, verdict=verdict, reasons=(*said, *plan.reasons))


def _nothing_known(
    chosen: FittedDeployment | None, slos: Sequence[Slo], targets_qps: Sequence[float], terms: Terms
) -> Plan:
    """plan.json before anything has been planned."""
    return Plan(
        verdict="inconclusive",
        reasons=(),
        unit=terms.unit,
        preset=terms.preset,
        device=terms.device,
        gpus_per_device=terms.gpus,
        emulated=terms.emulated,
        times_basis=terms.times_basis,
        dilation=terms.dilation,
        confidence=terms.confidence,
        utilisation_cap=terms.utilisation_cap,
        routing=terms.routing,
        deployment=chosen.deployment if chosen else None,
        slos=tuple(slos),
        rate_per_device=_rate_record(chosen),
        targets=tuple(_no_target(qps) for qps in targets_qps),
        validation=(),
        costs=_price_record(terms),
    )


def _with_costs(targets: Sequence[PlannedTarget], price: Price | None, pools: Pools) -> tuple[PlannedTarget, ...]:
    """The targets with their costs, if a price was given."""
    if price is None:
        return tuple(targets)
    return tuple(with_costs(each, price.price_per_device_hour, pools.traffic.mean_frames) for each in targets)


def _growth(targets: Sequence[PlannedTarget], pools: Pools, terms: Terms) -> Forecast | None:
    """The forecast, if a growth was given."""
    return None if terms.growth_per_month is None else forecast(pools, targets, terms.growth_per_month, terms.fleet)


def pools_of(
    fit: Fit,
    chosen: FittedDeployment,
    mix: Mix,
    slos: Sequence[Slo],
    utilisation_cap: float,
    routing: str = LEAST_LOADED,
) -> Pools:
    """Pools of a fitted deployment under exactly the traffic of the fit."""
    traffic = Traffic.draw(mix, np.random.default_rng(fit.traffic_seed))
    limits = limits_of(chosen, slos, fit.session_limit, fit.extrapolation, traffic)
    limits = replace(limits, routing=ROUTINGS[routing])
    return Pools(Device.from_fit(chosen), traffic, limits, utilisation_cap)


_TOO_NEAR = "One session alone is so near to violating an SLO that no number of devices is certain to meet it."


def _target(pools: Pools, qps: float, counts: np.ndarray, confidence: float, confirmed_rate: float) -> PlannedTarget:
    """Devices for a target rate, their interval by the drawn ``counts`` [d], and their basis.

    ``confirmed_rate``: the highest rate (requests/s) that an open-loop run on one device has confirmed.
    """
    load = pools.fewest(qps)
    if load is None:
        return replace(_no_target(qps), binding=pools.binding(1), note=_TOO_NEAR)
    devices = load.devices
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(counts, tails, method="inverted_cdf")
    carried = float(pools.rates(np.array([devices]), qps)[0])
    spared = [with_spares(pools, qps, devices, lost) for lost in LOST]
    return PlannedTarget(
        qps=qps,
        devices=devices,
        interval=(int(min(low, devices)), int(max(high, devices)) if math.isfinite(high) else None),
        binding=pools.binding(devices),
        utilisation=qps / (devices * pools.steady_rate()),
        headroom_qps=max(carried - qps, 0.0),
        devices_n_plus_1=spared[0].devices if spared[0].met else None,
        devices_n_plus_2=spared[1].devices if spared[1].met else None,
        losses=tuple(_loss_record(each) for each in (*_without_spares(pools, qps, devices), *spared)),
        sessions_per_device_p95=load.sessions_p95,
        devices_by_routing=counts_by_routing(pools, qps, devices),
        devices_that_recover=pools.that_recover(qps, devices),
        basis=_basis(pools.has_seen(load.sessions_p95), devices == 1 and qps <= confirmed_rate),
        note="One device was measured; several are taken not to slow each other down." if devices > 1 else "",
    )


def _without_spares(pools: Pools, qps: float, devices: int) -> list[Loss]:
    """The losses of devices from the count without spares."""
    return [lose(pools, qps, devices, lost) for lost in LOST if lost < devices]


def _loss_record(loss: Loss) -> PlannedLoss:
    """One entry of a target's ``losses``; shares are value / limit, None where that is infinite or unknown."""
    worst_share, early_share = finite([loss.worst_share, loss.early_share])
    known: dict[str, Any] = asdict(loss) | {"worst_share": worst_share, "early_share": early_share}
    return PlannedLoss(**known)


def _price_record(terms: Terms) -> Price | None:
    """plan.json's ``costs``: the price given for this type of device; None if there is none."""
    found = price_of(terms.prices, terms.device)
    if found is None:
        return None
    kind, price = found
    return Price(device_type=kind, price_per_device_hour=price, currency=terms.currency, basis="given")


def _doubts_about(targets: Sequence[PlannedTarget], max_sessions: float) -> list[str]:
    if any(each.devices is None for each in targets):
        return [_TOO_NEAR + " Repeat the ladder, or choose a faster deployment."]
    if any(each.interval[1] is None for each in targets):
        return [
            "The ladders are too noisy to bound the counts: with some likely step time one session alone "
            "violates an SLO. Repeat the ladder, with longer rungs and more of them."
        ]
    beyond = [f"{each.qps:g}" for each in targets if each.basis == "extrapolated"]
    if not beyond:
        return []
    needed = max(each.sessions_per_device_p95 or 0.0 for each in targets)
    return [
        f"The counts for {', '.join(beyond)} requests a second put up to {needed:.0f} sessions on a device, and "
        f"{max_sessions:.0f} were measured: add a rung at {needed:.0f} sessions to the ladder."
    ]


def _without_rate(plan: Plan, fit: Fit) -> Plan:
    """The plan if no deployment has a rate: missed only if all were fitted, and all violate an SLO at any rate."""
    fits = fit.deployments
    unknown = [each for each in fits if each.inconclusive]
    if not fits:
        reasons = ["No ladder was measured: run the sweep."]
    elif unknown:
        reasons = _by_words(unknown, lambda each: f"{each.inconclusive}.", len(fits))
    else:
        reasons = _by_words(
            fits, lambda each: f"{each.binding} is violated at every rate, even with one session.", len(fits)
        )
    broken = [each for each in fits if not each.inconclusive]
    missed = bool(fits) and not unknown
    binding = broken[0].binding if broken else ""
    excluded = left_out(fit)
    return replace(
        plan,
        verdict="missed" if missed else "inconclusive",
        reasons=(*reasons, *excluded),
        deployment=broken[0].deployment if missed else None,
        rate_per_device=_rate_record(broken[0] if missed else None),
        targets=tuple(replace(each, binding=binding) for each in plan.targets),
        why_not=why_not(fit, plan.slos, ()),
    )


def _by_words(fits: Sequence[FittedDeployment], words_of: Callable[[FittedDeployment], str], total: int) -> list[str]:
    """Remarks on fitted deployments, with one sentence for all deployments that share it."""
    groups: dict[str, list[FittedDeployment]] = {}
    for each in fits:
        groups.setdefault(words_of(each), []).append(each)

    def who(alike: list[FittedDeployment]) -> str:
        return _knobs(alike[0].deployment) if len(alike) == 1 else f"{len(alike)} of {total} deployments"

    return [f"{who(alike)}: {said}" for said, alike in groups.items()]


def _rate_record(chosen: FittedDeployment | None) -> PlannedRate:
    if chosen is None:
        return PlannedRate()
    step = fitted(chosen.step_time)
    return PlannedRate(
        value=chosen.max_rate_per_s,
        interval=chosen.max_rate_interval,
        binding=chosen.binding,
        max_sessions_measured=step.max_sessions,
        ladders=step.between.ladders if step.between else None,
        between_ladders=step.between.deviation if step.between else None,
        basis="simulated",
    )


def _basis(in_range: bool, confirmed: bool = False) -> str:
    """The basis of a figure: measured (one device, at a rate that a run confirmed), simulated, or extrapolated."""
    if not in_range:
        return "extrapolated"
    return "measured" if confirmed else "simulated"


def _no_target(qps: float) -> PlannedTarget:
    return PlannedTarget(qps=qps, note="No rate per device is known.")


def _drain(pools: Pools, rng: np.random.Generator) -> Drain:
    """Seconds that a device takes to empty, with the sessions that it holds at its highest rate.

    ``longest_s``: if the longest session of the traffic has just started.
    """
    rate, _ = pools.rate(1)
    sessions = max(round(pools.judge(rate, 1).sessions), 1)
    times_s = drain_times_s(pools.device, pools.traffic, sessions, rng)
    longest = np.append(pools.traffic.residual_frames[: sessions - 1], pools.traffic.frames.max())
    return Drain(
        sessions=sessions,
        p50_s=float(np.median(times_s)),
        p95_s=float(np.quantile(times_s, 0.95)),
        longest_s=float(simulate(np.zeros(sessions), longest, pools.device.step_time).end_s.max()),
        basis=_basis(pools.has_seen(sessions)),
    )


def _memory(pools: Pools) -> KvMemory | None:
    """plan.json's ``memory``: room for KV caches on a device, and how many sessions fill it; None if unknown.

    ``sessions``: of those found in progress; ``longest_sessions``: if all are as long as the longest of the traffic.
    """
    kv = pools.limits.kv
    if kv is None:
        return None
    return KvMemory(
        room_bytes=kv.room_bytes,
        bytes_per_token=kv.bytes_per_token,
        sessions=pools.limits.kv_slots,
        longest_sessions=kv.slots(np.array([pools.traffic.frames.max()])),
        basis="computed",
    )


def _knobs(deployment: Knobs) -> str:
    return ", ".join(f"{knob} {value}" for knob, value in deployment.items()) or "the deployment"
