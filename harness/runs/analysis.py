"""A run of a plan: its folder and manifest, and its fit and plan from stored records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from harness.capacity.fitting.fit import fit_run
from harness.capacity.fitting.rate_search import steady_draws, steady_limit
from harness.capacity.planning.day import DayTerms, plan_day
from harness.capacity.planning.job_fleets import (
    JobDemand,
    JobFleets,
    SharedPlan,
    jobs_plan,
    nothing_sized,
    shared_plan,
)
from harness.capacity.planning.plan import Terms, make_plan, pools_of
from harness.capacity.planning.pools import Pools
from harness.capacity.planning.prediction import predict_open_run
from harness.capacity.planning.scaling import ScalingTerms, sessions_at_cap
from harness.capacity.planning.surges import behaviour
from harness.capacity.planning.why_not import why_not
from harness.errors import HarnessError, InconclusiveError, InputError
from harness.planfile.jobs import demand_of
from harness.planfile.plan import PlanSpec
from harness.planfile.sections import DemandSpec
from harness.records.day import Day, DemandCurve, ScalingRule
from harness.records.fit import Fit, FittedDeployment
from harness.records.jobs import JobsPlan
from harness.records.plan import Behaviour, Plan
from harness.records.prediction import Prediction
from harness.records.schema import RunManifest
from harness.records.store import Run
from harness.records.why_not import RuledOut
from harness.runs.earlier import prior_of
from harness.runs.opening import spec_of, unit_of
from harness.runs.stages import gpus_of, kv_rooms


def fit_of(run: Run) -> Fit:
    """Build fit.json from a run's stored trials."""
    spec = spec_of(run)
    mix, slos, rng = spec.traffic_mix(), spec.slo_list(), np.random.default_rng(spec.seed)
    return fit_run(
        run.trials(),
        run.requests(),
        mix,
        slos,
        rng,
        unit_of(run.manifest),
        in_rungs=run.requests_in_rungs(),
        kv=kv_rooms(run.manifest, spec),
        confidence=spec.confidence,
        between=prior_of(run.manifest),
    )


def plan_of(run: Run, spec: PlanSpec, fit: Fit, targets_qps: Sequence[float]) -> Plan:
    """Build plan.json for these target rates (requests/s) from stored records alone."""
    mix, slos, rng = spec.traffic_mix(), spec.slo_list(), np.random.default_rng(spec.seed)
    terms = terms_of(run.manifest, spec)
    terms = replace(terms, predictions=run.predictions(), in_windows=run.requests_in_windows())
    return make_plan(fit, run.trials(), run.requests(), mix, slos, targets_qps, rng, terms)


def terms_of(manifest: RunManifest, spec: PlanSpec) -> Terms:
    """The terms of a run's plan: caps, confidence, prices and what one device is."""
    return Terms(
        utilisation_cap=spec.utilisation_cap,
        confidence=spec.confidence,
        max_error=spec.max_error,
        unit=unit_of(manifest),
        preset=manifest.preset,
        device=manifest.device,
        gpus=gpus_of(manifest, spec),
        emulated=manifest.emulated,
        prices=spec.prices,
        currency=spec.currency,
        growth_per_month=spec.growth_per_month,
        fleet=spec.fleet,
        profiles=manifest.profiles,
        routing=spec.routing,
        times_basis=manifest.times_basis,
        dilation=manifest.clock.dilation,
    )


def behaviour_of(spec: PlanSpec, fit: Fit, plan: Plan) -> Behaviour | None:
    """How the planned devices of the target behave under surges; None where no target has a device count."""
    target, best = plan.headline(), fit.best_deployment
    if target is None or best is None:
        return None
    mix = spec.traffic_mix()
    pools = pools_of(fit, best, mix, spec.slo_list(), spec.utilisation_cap, spec.routing)
    return behaviour(pools, mix, target, np.random.default_rng(spec.seed))


def day_of(
    manifest: RunManifest,
    spec: PlanSpec,
    fit: Fit,
    plan: Plan,
    asked: DemandSpec | None = None,
    curve: DemandCurve | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Day | None:
    """Static and elastic fleets over the demand of the plan, or over another ``curve`` with the rule ``asked`` for.

    None where there is no demand, or where no deployment has a rate.
    """
    asked, curve, best = asked or spec.demand, curve or manifest.demand, fit.best_deployment
    if asked is None or curve is None or best is None:
        return None
    mix = spec.traffic_mix()
    pools = pools_of(fit, best, mix, spec.slo_list(), spec.utilisation_cap, spec.routing)
    scaling = ScalingTerms(
        start_s=asked.start_seconds,
        poll_s=asked.poll_seconds,
        stabilisation_s=asked.stabilisation_seconds,
        minimum=asked.minimum,
        maximum=asked.maximum,
        target_sessions=asked.target_sessions,
    )
    terms = DayTerms(scaling, plan.drain, plan.costs, plan.gpus_per_device)
    return plan_day(pools, mix, curve, terms, spec.seed, progress)


def why_not_of(run: Run) -> tuple[RuledOut, ...]:
    """The options that lost and why: as stored in plan.json, otherwise computed from the stored fit and plan.

    Nothing is simulated where the run's plan file or fit cannot be used any more. () without a fit or a plan.
    """
    fit, plan = run.fit(), run.plan()
    if fit is None or plan is None or plan.why_not:
        return plan.why_not if plan else ()
    try:
        pools = fleet_of(run)
    except HarnessError:
        pools = None
    return why_not(fit, plan.slos, plan.targets, pools)


def simulation_of(run: Run, rate_per_s: float) -> Prediction:
    """Predict an open-loop run at a rate (requests/s) on the best deployment, from the run's stored fit.

    Raises InputError at a rate that one device cannot sustain with as many sessions as were measured, whatever its
    SLOs: there is no steady state to predict.
    """
    spec, carried = spec_of(run), fleet_of(run).without_slos().steady_rate()
    if rate_per_s >= carried:
        raise InputError(
            f"{rate_per_s:g} requests/s have no steady state on one device: with as many sessions as were "
            f"measured it sustains less than {carried:.3g}: lower --qps, or run "
            f"`harness plan --run {run.path} --qps {rate_per_s:g}`"
        )
    rng = np.random.default_rng(spec.seed)
    return predict_open_run(best_of(run), spec.traffic_mix(), rate_per_s, 60.0, rng)


def fleet_of(run: Run) -> Pools:
    """Pools of the best deployment, from the run's stored fit; they simulate any number of devices at any rate."""
    spec, (fit, best) = spec_of(run), _fit_and_best_of(run)
    return pools_of(fit, best, spec.traffic_mix(), spec.slo_list(), spec.utilisation_cap, spec.routing)


def shared_plan_of(run: Run, demand: JobDemand, qps: float) -> SharedPlan:
    """Devices for streams at a peak rate (requests/s), for tasks, and for both on one fleet."""
    spec, pools = spec_of(run), fleet_of(run)
    if pools.rate(1)[0] <= 0:
        raise InconclusiveError(f"{run.path}: one session alone violates an SLO: no number of devices serves streams")
    rng = np.random.default_rng(spec.seed)
    shares = steady_draws(pools.device, pools.limits, rng) / steady_limit(pools.device, pools.limits)[0]
    return shared_plan(JobFleets(pools, spec.traffic_mix(), demand, qps, spec.seed), shares, spec.confidence)


def jobs_of(run: Run, spec: PlanSpec, plan: Plan) -> JobsPlan | None:
    """Fleets for the streams of the headline target and the tasks that the run began with.

    None without tasks, or without a count. Raises InputError where the run did not keep its tasks.
    """
    asked, target = run.manifest.jobs, plan.headline()
    if spec.jobs is None or target is None:
        return None
    if asked is None:
        raise InputError(f"{run.path}: its manifest.json does not hold the tasks of its plan: measure with --fresh")
    demand = demand_of(asked)
    try:
        return jobs_plan(shared_plan_of(run, demand, target.qps), demand)
    except InconclusiveError as error:
        return nothing_sized(demand, target.qps, f"No fleet is given: {error}.")


def scaling_rule_of(run: Run, qps: float) -> ScalingRule:
    """The rule of an autoscaler for a rate: that of the stored day, which met its SLOs over it, if there is one.

    Otherwise its target is what a device holds at the cap, from the stored fit; no day was simulated with it. Raises
    InconclusiveError where no number of devices meets the SLOs.
    """
    plan = run.plan()
    if plan and plan.day and plan.day.rule:
        return plan.day.rule
    pools = fleet_of(run)
    load = pools.fewest(qps)
    if load is None:
        raise InconclusiveError(f"{run.path}: no number of devices meets the SLOs at {qps:g} requests/s")
    target = sessions_at_cap(pools, qps, load.devices)
    return ScalingTerms().rule(target, load.devices, plan.drain if plan else None)


def best_of(run: Run) -> FittedDeployment:
    """The stored fit of the best deployment. Raises InconclusiveError where there is none."""
    return _fit_and_best_of(run)[1]


def _fit_and_best_of(run: Run) -> tuple[Fit, FittedDeployment]:
    fit = run.fit()
    if fit is None or fit.best_deployment is None:
        raise InconclusiveError(f"{run.path} holds no deployment that meets the SLOs: nothing to simulate")
    return fit, fit.best_deployment
