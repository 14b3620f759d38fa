"""Devices over a period of varying demand: a static fleet, and fleets that an autoscaler grows and shrinks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import special

from harness import wire
from harness.capacity.fitting.rate_search import LEAST_LOADED as SHARED
from harness.capacity.fitting.rate_search import steady_sessions
from harness.capacity.planning.pools import Pools
from harness.capacity.planning.scaling import (
    ScalingTerms,
    autoscaler_of,
    expected_sessions,
    sessions_at_cap,
    with_schedule,
)
from harness.capacity.planning.surges import PATIENCE_S, QUEUE_LIMIT, counted_limits, demand_of, kv_room
from harness.capacity.simulator.engine import LIMITED, Counting
from harness.capacity.simulator.fleet import simulate_pool
from harness.capacity.simulator.pool import Pool
from harness.capacity.simulator.results import ClassResult, MetricBins, PoolResult
from harness.capacity.simulator.traffic import Varying
from harness.records.day import PREDICTIVE, REACTIVE, STATIC, Day, DemandCurve, FleetDay, ScalingRule, SloOfDay
from harness.records.plan import Drain, Price
from harness.records.slo import Slo
from harness.traffic.mix import Mix

PARTS, WINDOWS_PER_PART = 24, 6
WINDOWS = PARTS * WINDOWS_PER_PART
_WARM_PARTS = 6
TARGET_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of the sessions at the cap, tried until every SLO is met
_ALPHA = 0.05  # the chance that any part of any SLO is said to violate it while all are just at their quantiles
_SETTLED = 2.0  # times the longest audio: what arrived in the period has ended by then
_NO_COUNT = "No number of devices meets the SLOs at the peak of {peak:.4g} requests/s."
_ADVANCE = "The predictive policy knows the rates of the period in advance, not its arrivals: no forecast is better."
_STALLS = "SLOs on stalls are not counted over a day."
_NONE_COUNTED = "No SLO is counted: whether the fleets meet the plan's is not known."


@dataclass(frozen=True)
class DayTerms:
    """What a day is planned with: the ``scaling`` that is given, the drain of a device, its price, and its GPUs."""

    scaling: ScalingTerms = ScalingTerms()
    drain: Drain | None = None
    price: Price | None = None
    gpus: int = 1


def plan_day(
    pools: Pools,
    mix: Mix,
    curve: DemandCurve,
    terms: DayTerms,
    seed: int,
    progress: Callable[[str], None] = lambda what: None,
) -> Day:
    """plan.json's ``day``: the fleets of three policies under one demand, each simulated session by session.

    Static: the devices that the peak needs, all the time. Reactive: the rule of an autoscaler by sessions per device.
    Predictive: the same rule, and a schedule of at least the devices that the demand will need. The rule's target is
    the highest share of the sessions at the cap with which every SLO is met on one simulated day, unless one is given.
    All policies are judged on another day, with equal arrivals. Sessions beyond a device's limit wait in its queue with
    the server's settings.
    """
    day = Day(
        source=curve.source,
        period_s=curve.period_s,
        window_s=curve.period_s / WINDOWS,
        peak_qps=curve.peak_qps,
        mean_qps=curve.mean_qps,
        gpus_per_device=terms.gpus,
        currency=terms.price.currency if terms.price else "",
    )
    peak = pools.fewest(curve.peak_qps)
    if peak is None:
        return replace(day, note=_NO_COUNT.format(peak=curve.peak_qps))
    stage = DayStage(pools, mix, curve, (seed, 1), terms.scaling)
    progress(f"a day on {peak.devices} static devices")
    result = stage.play(peak.devices)
    static = _fleet(STATIC, None, result, stage, terms)
    chosen_on = replace(stage, seed=(seed, 0))
    at_cap = sessions_at_cap(pools, curve.peak_qps, peak.devices)
    elastic = []
    for policy in (REACTIVE, PREDICTIVE):
        rule = _rule(policy, chosen_on, peak.devices, at_cap, terms, progress)
        elastic.append(_fleet(policy, rule, stage.play(peak.devices, rule), stage, terms))
    arrived = sum(each.arrived[:WINDOWS] for each in result.classes.values())
    return replace(
        day,
        requests=int(np.sum(arrived)),
        offered_qps=_rounded(np.asarray(arrived) / day.window_s),
        sessions=_rounded(result.sessions[:WINDOWS]),
        session_limit=stage.session_limit,
        sessions_at_cap=at_cap,
        policies=(static, *elastic),
        note=" ".join([_ADVANCE, *_no_gain(static, elastic), *_not_counted(pools.limits.slos)]),
    )


def _no_gain(static: FleetDay, elastic: Sequence[FleetDay]) -> Iterator[str]:
    if min(each.device_hours for each in elastic) >= static.device_hours:
        yield "No elastic policy takes fewer hours than the static fleet here."


def _not_counted(slos: Sequence[Slo]) -> Iterator[str]:
    """What of the SLOs is not counted, in sentences."""
    counted = [slo for slo in slos if slo.metric in LIMITED]
    if len(counted) < len(slos):
        yield _STALLS
    if not counted:
        yield _NONE_COUNTED


def _rule(
    policy: str, stage: DayStage, devices: int, at_cap: float, terms: DayTerms, progress: Callable[[str], None]
) -> ScalingRule:
    """The rule of an elastic policy with the highest target that meets every SLO; with the lowest where none does."""

    def rule_of(target: float) -> ScalingRule:
        rule = terms.scaling.rule(target, devices, terms.drain)
        return rule if policy == REACTIVE else with_schedule(rule, stage.curve, stage.expected(target))

    if terms.scaling.target_sessions:
        return rule_of(terms.scaling.target_sessions)
    *shares, lowest = TARGET_SHARES
    for share in shares:
        progress(f"a day, {policy}, {share * at_cap:.3g} sessions per device")
        rule = rule_of(share * at_cap)
        if _fleet(policy, rule, stage.play(devices, rule), stage, terms).met is not False:
            return rule
    return rule_of(lowest * at_cap)


@dataclass(frozen=True)
class DayStage:
    """The setting of a day: devices, mix and demand. ``seed``: of the arrivals, the same in every run.

    ``scaling``: how long devices take to start, and an autoscaler to shrink, for which the simulation settles.
    """

    pools: Pools
    mix: Mix
    curve: DemandCurve
    seed: int | tuple[int, ...]
    scaling: ScalingTerms = ScalingTerms()

    @property
    def part_s(self) -> float:
        return self.curve.period_s / PARTS

    @property
    def session_limit(self) -> int:
        """The most constant sessions with which a device meets every SLO."""
        return max(int(steady_sessions(self.pools.device, self.pools.limits)), 1)

    @property
    def longest_s(self) -> float:
        """Audio of the longest session, seconds."""
        return max(float(each.length.frames.max()) for each in self.mix.classes) * wire.SECONDS_PER_FRAME

    @property
    def warm_parts(self) -> int:
        """Parts before the period, in which the sessions that were found, starts and drains end."""
        settle_s = _SETTLED * self.longest_s + self.scaling.start_s + self.scaling.stabilisation_s
        return max(_WARM_PARTS, math.ceil(settle_s / self.part_s))

    @property
    def phase_s(self) -> float:
        """Where in the period a simulation begins: some parts before its start."""
        return -self.warm_parts * self.part_s % self.curve.period_s

    def expected(self, sessions_per_device: float) -> np.ndarray:
        """Mean sessions in progress at each time of the curve, with so many on each device."""
        step_s = float(self.pools.device.step_time(sessions_per_device))
        return expected_sessions(self.curve, self.pools.traffic.frames * step_s)

    def found(self, sessions_per_device: float) -> float:
        """Sessions in progress at the beginning of a simulation."""
        times_s = np.arange(len(self.curve.qps)) * self.curve.step_s
        return float(np.interp(self.phase_s, times_s, self.expected(sessions_per_device)))

    def play(self, devices: int, rule: ScalingRule | None = None) -> PoolResult:
        """Simulate the period, after some parts of it to settle, and then until its sessions have ended.

        ``devices`` all the time or, with a rule, as many as its target asks for at the beginning.
        """
        after = math.ceil(_SETTLED * self.longest_s / self.part_s)
        demand = demand_of(self.pools, self.mix, Varying(self._rate, self.curve.peak_qps * (1 + 1e-9)))
        limits = counted_limits(self.pools, demand.classes)
        parts, warm_s = PARTS + after, self.warm_parts * self.part_s
        counting = Counting(demand.classes, parts * self.part_s, warm_s, parts * WINDOWS_PER_PART, parts, limits)
        sessions = self.found(rule.target_sessions_per_device if rule else float(self.session_limit))
        scaler = autoscaler_of(rule, counting.stop_s, self.phase_s) if rule else None
        if rule and scaler:
            devices = min(max(math.ceil(sessions / scaler.target), rule.minimum), rule.maximum)
        own = self.pools.limits.routing
        pool = Pool.of(
            self.pools.device,
            devices,
            routing="least_loaded" if own == SHARED else own,
            session_limit=self.session_limit,
            memory_bytes=kv_room(self.pools).room_bytes,
            queue_limit=QUEUE_LIMIT,
            patience_s=PATIENCE_S,
            autoscaler=scaler,
        )
        return simulate_pool(pool, demand, counting, np.random.default_rng(self.seed), found=round(sessions))

    def _rate(self, at_s: np.ndarray) -> np.ndarray:
        return self.curve.at(at_s + self.phase_s)


def _fleet(policy: str, rule: ScalingRule | None, result: PoolResult, stage: DayStage, terms: DayTerms) -> FleetDay:
    """The figures of a policy, of the sessions that arrived in the period."""
    owned = result.devices_owned[:WINDOWS]
    classes = list(result.classes.values())
    arrived, good = (
        np.sum([getattr(each, name)[:WINDOWS] for each in classes], axis=0) for name in ("arrived", "good")
    )
    turned_away = sum(int((each.refused + each.gave_up)[:WINDOWS].sum()) for each in classes)
    hours = float(owned.sum() * result.window_s / 3600)
    by_part = [np.add.reduceat(each, np.arange(0, WINDOWS, WINDOWS_PER_PART)) for each in (good, arrived)]
    with_any = by_part[1] > 0
    counted = [slo for slo in stage.pools.limits.slos if slo.metric in LIMITED]
    slos = tuple(_slo_of_day(slo, result.classes, _ALPHA / (PARTS * len(counted))) for slo in counted)
    return FleetDay(
        policy=policy,
        rule=rule,
        devices=_rounded(owned),
        most_devices=int(result.most_owned[:WINDOWS].max()),
        device_hours=hours,
        cost=hours * terms.price.price_per_device_hour if terms.price else None,
        within_slos=_share(good.sum(), arrived.sum()),
        worst_part=float(np.min(by_part[0][with_any] / by_part[1][with_any])) if with_any.any() else None,
        rejected=_share(turned_away, arrived.sum()),
        slos=slos,
        met=_met(slos),
        basis="simulated" if stage.pools.has_seen(stage.session_limit) else "extrapolated",
    )


def _met(slos: Sequence[SloOfDay]) -> bool | None:
    """Whether every SLO of which sessions were counted is met; None without any."""
    known = [each.met for each in slos if each.met is not None]
    return all(known) if known else None


def _slo_of_day(slo: Slo, classes: Mapping[str, ClassResult], alpha: float) -> SloOfDay:
    """An SLO over the sessions that arrived in the period, and in each part; a rejected one is within no limit.

    Met where it holds over the period, and no part has so few sessions within that chance brings as few with a
    probability below ``alpha``, if its share were the SLO's quantile (exact binomial, one-sided).
    """
    found = classes[slo.traffic_class]
    arrived = np.add.reduceat(found.arrived[:WINDOWS], np.arange(0, WINDOWS, WINDOWS_PER_PART))
    metric: MetricBins = getattr(found, slo.metric)
    parts = [MetricBins(metric.bins[[part]], metric.sums[[part]]) for part in range(PARTS)]
    inside = np.array([(1 - each.share_above(slo.limit)) * each.count for each in parts])
    if not arrived.sum():
        return SloOfDay(**_named(slo), within=None, worst_part=None, met=None)
    within, by_part = inside.sum() / arrived.sum(), inside[arrived > 0] / arrived[arrived > 0]
    chance = special.bdtr(np.rint(inside[arrived > 0]), arrived[arrived > 0].astype(int), slo.quantile)
    met = within >= slo.quantile and bool(np.all(chance >= alpha))
    return SloOfDay(**_named(slo), within=float(within), worst_part=float(by_part.min()), met=bool(met))


def _named(slo: Slo) -> dict[str, Any]:
    return {name: getattr(slo, name) for name in ("traffic_class", "metric", "quantile", "limit")}


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(np.round(values, 3).tolist())
