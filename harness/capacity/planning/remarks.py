"""Remarks on a plan for its reader, which do not change the verdict."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from harness.capacity.fitting.observations import IN_PROGRESS
from harness.capacity.fitting.rate_search import is_of_range, range_name
from harness.capacity.models.between_ladders import Between
from harness.capacity.models.device import METRIC_NAMES
from harness.capacity.models.spreads import MIN_OF_A_CLASS
from harness.capacity.planning.cost_and_growth import price_of
from harness.capacity.planning.pools import Pools
from harness.records.fit import Fit, FittedDeployment, FittedStep, fitted
from harness.records.plan import Plan, PlannedTarget

_CLEARLY_SLOWER = 1.05  # times as long, in an open-loop run


def remarks_on(fit: Fit, chosen: FittedDeployment, pools: Pools) -> list[str]:
    """What a reader of the plan should know of the fit behind it."""
    return [
        *left_out(fit),
        *not_told_apart(fit, chosen, fit.confidence),
        *_slower_in_open_loop(chosen),
        *_pooled(pools),
        *_no_slo_binds(chosen, pools),
        *_first_audio_in_progress(chosen, pools),
    ]


def left_out(fit: Fit) -> list[str]:
    """A remark for each trial that was left out, in whole or in part."""
    used = {name for each in fit.deployments for name in each.trial_ids}
    names = ((each, f"Part of {each.trial_id}" if each.trial_id in used else each.trial_id) for each in fit.excluded)
    return [f"{name} was left out: {'; '.join(each.reasons)}." for each, name in names]


def not_told_apart(fit: Fit, chosen: FittedDeployment, confidence: float) -> list[str]:
    """A remark where other deployments may be as good as the best, and the measurement that would tell.

    Two rates differ by more than ladders of one deployment do where their ratio is beyond the interval of that. A rate
    that the most sessions measured bound is a lower bound of the true one.
    """
    others = [each for each in fit.deployments if each is not chosen and each.rate() > 0]
    alike = [each for each in others if may_be_as_good(chosen, each, confidence)]
    if not alike:
        return []
    rates = sorted(each.rate() for each in alike)
    between = f"{rates[0]:.3g}" if len(rates) == 1 else f"{rates[0]:.3g} to {rates[-1]:.3g}"
    return [
        f"The best deployment sustains {chosen.rate():.3g} requests/s by its {_ladders(chosen)}; {len(alike)} of the "
        f"{len(others)} others, with {between}, may be as fast: repeated ladders of one deployment differ by "
        "that much, or theirs ended before an SLO was violated. More ladders of each would decide. The plan uses the "
        "deployment with the most ladders."
    ]


def may_be_as_good(chosen: FittedDeployment, other: FittedDeployment, confidence: float) -> bool:
    """Whether the measurements do not tell a deployment that has a rate from the chosen one: see ``not_told_apart``."""
    differ = _may_differ_by(chosen, other, confidence)
    return is_of_range(other.binding) or chosen.rate() <= other.rate() * differ


def without_recovery(targets: Sequence[PlannedTarget]) -> list[str]:
    """A remark where the planned devices serve a rate, but do not recover from overload by themselves."""
    short = [each for each in targets if each.devices and (each.devices_that_recover or math.inf) > each.devices]
    if not short:
        return []
    each = short[-1]
    enough = f"{each.devices_that_recover} devices do" if each.devices_that_recover else "no number of devices does"
    return [
        f"Throughput falls where a device holds many sessions: {each.devices} devices serve {each.qps:g} requests/s, "
        f"but after an overload that fills them they do not recover while that rate goes on; {enough}. Limit the "
        "sessions that a device admits to the most that meet the SLOs, or plan for that count."
    ]


def without_price(plan: Plan, prices: Collection[str]) -> list[str]:
    """A remark if prices were given, but none for what was planned."""
    priced = plan.costs or any(price_of(dict.fromkeys(prices, 1.0), each.type) for each in plan.device_types)
    if priced or not prices:
        return []
    return [
        f"No cost is given: of the types that have a price ({', '.join(prices)}), none is in this device's name, "
        f"{plan.device}."
    ]


def _ladders(fit: FittedDeployment) -> str:
    count = len(fit.trial_ids)
    return f"{count} ladders" if count > 1 else "only ladder"


def _may_differ_by(first: FittedDeployment, second: FittedDeployment, confidence: float) -> float:
    """The factor by which rates of two equal deployments may differ; 1 where files do not say (older ones)."""
    steps = [each.step_time for each in (first, second)]
    known = [each.between for each in steps if isinstance(each, FittedStep) and each.between]
    if len(known) < 2:
        return 1.0
    best = max(known, key=lambda each: each.degrees or math.inf)
    between = Between(best.deviation, best.degrees or math.inf)
    return math.exp(math.hypot(*(between.reach(each.ladders, confidence) for each in known)))


def _slower_in_open_loop(chosen: FittedDeployment) -> list[str]:
    """A remark where steps were clearly longer as requests arrive than in the ladders."""
    step = chosen.step_time
    between = step.between if isinstance(step, FittedStep) else None
    if between is None or between.open_run is None or between.open_run < _CLEARLY_SLOWER:
        return []
    return [
        f"In the VALID open-loop run with the highest rate, a frame step took {between.open_run:.2f} times as long as "
        "the ladders of its deployment show. It counts as one more ladder, so the rate is lower than by the "
        "ladders alone."
    ]


def _pooled(pools: Pools) -> list[str]:
    """A remark where a class with an SLO was seen too rarely to have a variation of its own."""
    rare: dict[str, list[str]] = {}
    device = pools.device
    for slo in pools.limits.slos:
        own = {
            "ttfa_s": device.ttfa.classes,
            "rtf": device.rtf.classes,
            "stall_longest_s": device.stalls,
        }[slo.metric]
        if slo.traffic_class not in own:
            rare.setdefault(slo.traffic_class, []).append(METRIC_NAMES[slo.metric])
    return [
        f"Pooled: fewer than {MIN_OF_A_CLASS} requests of class {name} were measured for its {' and '.join(metrics)}, "
        "taken to vary as that of all classes together: measure longer rungs."
        for name, metrics in rare.items()
    ]


def _no_slo_binds(chosen: FittedDeployment, pools: Pools) -> list[str]:
    if chosen.binding != range_name(pools.limits):
        return []
    most, measured = pools.limits.most_sessions, round(pools.device.max_sessions)
    if most > measured:
        return [
            f"No SLO binds up to {most} sessions on a device, which is extrapolated from the {measured} that were "
            f"measured: a ladder up to {most} sessions would show whether the counts suffice."
        ]
    return [
        f"No SLO binds up to {most} sessions on a device, the most that were measured: the counts are on the "
        f"safe side, and a ladder beyond {most} sessions may show that fewer devices do."
    ]


def _first_audio_in_progress(chosen: FittedDeployment, pools: Pools) -> list[str]:
    of_first_audio = any(slo.metric == "ttfa_s" for slo in pools.limits.slos)
    if not of_first_audio or fitted(chosen.first_audio).starts != IN_PROGRESS:
        return []
    return [
        "Too few sessions began in the ladders: the time to first audio was fitted from sessions found in "
        "progress, which read no prompt, so it is later than predicted; judge it by the open-loop runs, or "
        "lengthen the rungs."
    ]
