"""From the ladders of a run to fit.json: the physics of every deployment, and the rate that one device sustains."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from harness.capacity.fitting.observations import MeasuredRequests, fit_first_audio, fit_rtf, fit_stalls, observe
from harness.capacity.fitting.open_runs import error_of_open_runs, slowed, with_open_runs
from harness.capacity.fitting.rate_search import (
    Limits,
    Traffic,
    highest_rate,
    simulation_noise,
    steady_draws,
    steady_limit,
)
from harness.capacity.fitting.rungs import LadderRungs, prepare, usable_rungs
from harness.capacity.fitting.winner import selection_bias
from harness.capacity.models.between_ladders import ASSUMED, Between
from harness.capacity.models.device import Device
from harness.capacity.models.memory import KvRoom
from harness.capacity.models.scaling import fit_scaling
from harness.capacity.models.service import BatchTimes, fit_service_time
from harness.capacity.models.steps import StepFit, band, fit_step_time
from harness.errors import InconclusiveError
from harness.records.fit import (
    ExcludedTrial,
    Fit,
    FittedBetween,
    FittedDeployment,
    FittedKv,
    FittedScaling,
    FittedStage,
    FittedStep,
    Part,
    ServicePoint,
    StepPoint,
    Unfitted,
    UnfittedStage,
    fitted,
)
from harness.records.schema import Trial
from harness.records.slo import Slo
from harness.topology import Knobs, topology_of
from harness.traffic.mix import Mix

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Level:
    """What determines the level of a step time. ``chosen``: its first ladder was the best of several deployments'.

    ``steady_context``: mean frames that a session found in progress has spoken, in steady state.
    """

    between: Between
    chosen: bool
    steady_context: float


def fit_run(
    trials: Sequence[Trial],
    requests: pd.DataFrame,
    mix: Mix,
    slos: Sequence[Slo],
    rng: np.random.Generator,
    unit: str,
    *,
    in_rungs: pd.DataFrame | None = None,
    session_limit: int | None = None,
    kv: KvRoom | Mapping[str, KvRoom | None] | None = None,
    extrapolation: float = 1.0,
    confidence: float = CONFIDENCE,
    between: Between = ASSUMED,
    progress: Callable[[str], None] | None = None,
) -> Fit:
    """fit.json of a run, from its VALID ladder trials; a VALID open-loop trial may lower the rate (``open_runs``).

    ``requests``: metrics.per_request with a column trial_id. ``in_rungs``: of those that lasted through whole rungs,
    metrics.through_windows with a column trial_id; without them, a request has one RTF and one longest stall.
    ``session_limit``: most sessions that a device admits.
    ``kv``: room for KV caches, or that of each topology; None where unknown, which counts as unlimited.
    ``extrapolation``: the search for the highest rate goes up to this multiple of the most sessions measured on a
    device; above 1 a plan may come out *extrapolated*. A deployment that cannot be fitted has the reason in
    ``inconclusive``; one that violates an SLO at any rate has ``max_rate_per_s`` 0. Excluded trials and rungs are
    listed with their reasons. ``confidence``: of the intervals of rates (those of the physics have CONFIDENCE).
    ``between``: how far ladders of one deployment are taken to differ, before any was repeated.
    ``best``: see ``best_of``, by the ladders alone; its first one, the highest of many, does not count for its level.
    ``traffic_seed`` lets a plan simulate the same sessions again.
    """
    groups, excluded = _group(trials)
    traffic_seed = int(rng.integers(1 << 31))
    traffic = Traffic.draw(mix, np.random.default_rng(traffic_seed))
    seen, deployments = MeasuredRequests(requests, in_rungs), []

    def rated(physics: FittedDeployment) -> FittedDeployment:
        return _fit_rate(physics, traffic, slos, rng, session_limit, extrapolation, confidence)

    for number, (deployment, ladders) in enumerate(groups, start=1):
        if progress:
            progress(f"fitting deployment {number} of {len(groups)}")
        level = Level(between, len(groups) > 1 and len(ladders) > 1, traffic.mean_context)
        physics, slow = _fit_physics(deployment, ladders, seen, rng, level)
        excluded += slow
        deployments.append(rated(replace(physics, kv=_kv_record(kv, deployment))))
    best = best_of(deployments)
    if best is not None and (bias := selection_bias(deployments, best, between, rng)) > 1:
        deployments[best] = rated(slowed(deployments[best], bias))
    deployments = [_by_open_runs(each, trials, requests, rated, rng) for each in deployments]
    best = best if best is not None and deployments[best].rate() > 0 else None
    return Fit(
        unit=unit,
        session_limit=session_limit,
        extrapolation=extrapolation,
        confidence=confidence,
        traffic_seed=traffic_seed,
        deployments=tuple(deployments),
        best=best,
        excluded=tuple(excluded),
    )


def _by_open_runs(
    fit: FittedDeployment,
    trials: Sequence[Trial],
    requests: pd.DataFrame,
    rated: Callable[[FittedDeployment], FittedDeployment],
    rng: np.random.Generator,
) -> FittedDeployment:
    error = error_of_open_runs(fit.deployment, trials, requests, fit.step_time)
    return fit if error is None else rated(with_open_runs(fit, error, rng))


def best_of(deployments: Sequence[FittedDeployment]) -> int | None:
    """The number of the deployment with the highest rate among those with the most ladders; None if no rate is above 0.

    The highest of many single ladders is biased upwards. A second ladder of it is lower on average, which does not show
    that deployments with a single ladder are better: their single ladders were lower than its first.
    """
    most = max((len(each.trial_ids) for each in deployments if each.rate()), default=0)
    compared = [each.rate() if len(each.trial_ids) == most else 0.0 for each in deployments]
    return int(np.argmax(compared)) if any(compared) else None


def limits_of(
    fit: FittedDeployment,
    slos: Sequence[Slo],
    session_limit: int | None,
    extrapolation: float,
    traffic: Traffic,
) -> Limits:
    """The limits of a rate search on this deployment, under this traffic.

    Raises InconclusiveError where its step time is not known.
    """
    most = max(round(fitted(fit.step_time).max_sessions * extrapolation), 1)
    if fit.kv is None:
        return Limits(tuple(slos), most, session_limit)
    kv = KvRoom.of_record(fit.kv)
    return Limits(tuple(slos), most, session_limit, kv, kv.slots(traffic.whole_frames))


def _kv_record(kv: KvRoom | Mapping[str, KvRoom | None] | None, deployment: Knobs) -> FittedKv | None:
    """The KV room of a deployment, of its topology and with its own number of instances."""
    own = kv.get(topology_of(deployment)) if isinstance(kv, Mapping) else kv
    return None if own is None else own.of(deployment).record()


def _group(trials: Sequence[Trial]) -> tuple[list[tuple[Knobs, list[Trial]]], list[ExcludedTrial]]:
    """Deployments in order of their first ladder, with their VALID ladders; and the excluded trials with reasons."""
    groups: dict[str, tuple[Knobs, list[Trial]]] = {}
    excluded = []
    for trial in trials:
        ladders = None
        if trial.kind == "ladder":
            ladders = groups.setdefault(json.dumps(trial.deployment, sort_keys=True), (trial.deployment, []))[1]
        reasons = list(trial.reasons) or ["INVALID, without a reason"]
        if trial.valid:
            reasons = usable_rungs(trial)[1]
            if ladders is not None:
                ladders.append(trial)
        if reasons:
            excluded.append(ExcludedTrial(trial_id=trial.trial_id, reasons=tuple(reasons)))
    return list(groups.values()), excluded


def _fit_physics(
    deployment: Knobs, ladders: list[Trial], seen: MeasuredRequests, rng: np.random.Generator, level: Level
) -> tuple[FittedDeployment, list[ExcludedTrial]]:
    """All of a deployment but its rate and its room for KV caches; and the rungs that were left out as too slow."""
    no_step = Unfitted(inconclusive="the step time is not known")
    physics = FittedDeployment(
        deployment=deployment,
        trial_ids=tuple(trial.trial_id for trial in ladders),
        stages=_fit_stages(ladders),
        step_time=no_step,
        first_audio=no_step,
        rtf=no_step,
        stalls={},
        scaling=_fit_scaling(ladders),
        max_rate_per_s=None,
        max_rate_interval=(None, None),
        binding="",
        inconclusive="",
    )
    held = prepare(ladders, seen, level.steady_context)
    try:
        not_of_the_level = 0 if level.chosen else None
        step = fit_step_time(held.rungs, rng, prior=level.between, not_of_the_level=not_of_the_level)
    except InconclusiveError as error:
        return replace(physics, step_time=Unfitted(inconclusive=str(error))), []
    step = with_context(step, held, rng)
    observed = observe(ladders, seen, step.step_time, [each for each, _ in held.slow], held.found)
    physics = replace(
        physics,
        step_time=_step_time_record(step, held),
        first_audio=_or_unfitted(fit_first_audio, observed),
        rtf=_or_unfitted(fit_rtf, observed),
        stalls=fit_stalls(observed),
    )
    return physics, held.excluded(ladders)


def _or_unfitted(fit: Callable[[pd.DataFrame], Part], observed: pd.DataFrame) -> Part | Unfitted:
    try:
        return fit(observed)
    except InconclusiveError as error:
        return Unfitted(inconclusive=str(error))


def _fit_rate(
    physics: FittedDeployment,
    traffic: Traffic,
    slos: Sequence[Slo],
    rng: np.random.Generator,
    session_limit: int | None,
    extrapolation: float,
    confidence: float,
) -> FittedDeployment:
    """Add the highest Poisson rate of one device that meets every SLO, its interval, and the binding constraint."""
    if not physics.trial_ids:
        return replace(physics, inconclusive="none of its ladders is VALID: measure one again")
    try:
        device = Device.from_fit(physics)
        limits = limits_of(physics, slos, session_limit, extrapolation, traffic)
        limits.check(device, traffic.class_names)
    except InconclusiveError as error:
        return replace(physics, inconclusive=str(error))
    (steady, binding), draws = steady_limit(device, limits), steady_draws(device, limits, rng)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    if steady <= 0 and np.quantile(draws, tails[1]) > 0:
        why = f"one session alone violates {binding}, but too narrowly to be sure: repeat the ladder"
        return replace(physics, binding=binding, inconclusive=why)
    if steady <= 0:
        return replace(physics, max_rate_per_s=0.0, max_rate_interval=(0.0, 0.0), binding=binding)
    rate, binding = highest_rate(device, traffic, limits)
    draws = draws * simulation_noise(len(draws), rng)
    low, high = (rate * np.quantile(draws / steady, tails)).tolist()
    return replace(physics, max_rate_per_s=rate, max_rate_interval=(low, high), binding=binding)


def with_context(step: StepFit, held: LadderRungs, rng: np.random.Generator) -> StepFit:
    """The fit with the uncertainty of what context costs in its draws: by Student's t, with the contexts not found."""
    if held.cost is None:
        return step
    off_s = held.cost.error_s * rng.standard_t(held.cost.degrees, len(step.draws)) * held.context_short
    at = np.array(step.step_time.knots) if step.step_time.kind == "piecewise" else np.array([0.0, 1.0])
    draws = step.draws + off_s[:, None] * at
    return replace(step, draws=np.maximum(draws, 0.2 * step.draws))


def _step_time_record(fit: StepFit, held: LadderRungs) -> FittedStep:
    rungs = held.rungs
    order = np.argsort(rungs.sessions, kind="stable")
    low_s, high_s = band(fit, rungs.step_s)
    columns = (each[order].tolist() for each in (rungs.sessions, rungs.step_s, low_s, high_s))
    points = zip(*columns, strict=True)
    return FittedStep(
        intercept_s=fit.line[0],
        slope_s=fit.line[1],
        kind=fit.step_time.kind,
        values=fit.step_time.values,
        knots=fit.step_time.knots,
        r_squared=fit.r_squared,
        noise=fit.noise,
        between=FittedBetween(
            deviation=fit.between.deviation,
            degrees=fit.between.degrees if math.isfinite(fit.between.degrees) else None,
            ladders=fit.ladders,
        ),
        max_sessions=fit.max_sessions,
        points=tuple(StepPoint(sessions=n, step_s=s, low_s=low, high_s=high) for n, s, low, high in points),
        context_frame_s=held.cost.frame_s if held.cost else None,
        draws=tuple(tuple(float(f"{value:.6g}") for value in draw) for draw in fit.draws),
        levels=tuple(float(f"{value:.6g}") for value in fit.levels),
    )


def _fit_stages(ladders: list[Trial]) -> tuple[FittedStage | UnfittedStage, ...]:
    windows = [stage for trial in ladders for rung in trial.rungs for stage in rung.stages]
    names = list(dict.fromkeys(window.stage for window in windows))
    return tuple(_fit_stage(name, BatchTimes.collect(w for w in windows if w.stage == name)) for name in names)


def _fit_stage(name: str, times: BatchTimes) -> FittedStage | UnfittedStage:
    columns = (times.batch_size.astype(int).tolist(), times.executions.astype(int).tolist(), times.mean_s.tolist())
    rows = zip(*columns, strict=True)
    points = tuple(ServicePoint(batch_size=size, executions=n, mean_s=mean_s) for size, n, mean_s in rows)
    try:
        fit = fit_service_time(times, CONFIDENCE)
    except InconclusiveError as error:
        return UnfittedStage(stage=name, points=points, inconclusive=str(error))
    return FittedStage(
        stage=name,
        points=points,
        alpha_s=fit.alpha_s,
        tau0_s=fit.tau0_s,
        alpha_interval_s=_finite_pair(fit.alpha_interval_s),
        tau0_interval_s=_finite_pair(fit.tau0_interval_s),
        r_squared=fit.r_squared,
        worst_residual=fit.worst_residual,
        runs_p_value=finite([fit.runs_p_value])[0],
    )


def _fit_scaling(ladders: list[Trial]) -> FittedScaling | Unfitted:
    rungs = [rung for trial in ladders for rung in usable_rungs(trial)[0]]
    try:
        fit = fit_scaling(
            np.array([rung.sessions for rung in rungs]), np.array([rung.frames_per_s for rung in rungs]), CONFIDENCE
        )
    except InconclusiveError as error:
        return Unfitted(inconclusive=str(error))
    return FittedScaling(
        gamma=fit.gamma,
        sigma=fit.sigma,
        kappa=fit.kappa,
        gamma_interval=fit.gamma_interval,
        sigma_interval=fit.sigma_interval,
        kappa_interval=fit.kappa_interval,
        r_squared=fit.r_squared,
        peak_sessions=finite([fit.peak_concurrency()])[0],
        largest_measured=fit.largest_measured,
    )


def _finite_pair(bounds: Sequence[float]) -> tuple[float | None, float | None]:
    low, high = finite(bounds)
    return low, high


def finite(values: Iterable[float]) -> list[float | None]:
    """Replace NaN and infinity, which JSON lacks, by None."""
    return [float(value) if math.isfinite(value) else None for value in values]
