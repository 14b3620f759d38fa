"""From the ladders of a run to fit.json: the physics of every deployment, and the rate that one device carries."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import pandas as pd

from harness.capacity.fitting.observations import fit_first_audio, fit_rtf, fit_stalls, observe
from harness.capacity.fitting.rate_search import (
    Limits,
    Traffic,
    highest_rate,
    simulation_noise,
    steady_draws,
    steady_limit,
)
from harness.capacity.models.device import Device
from harness.capacity.models.memory import KvRoom
from harness.capacity.models.scaling import fit_scaling
from harness.capacity.models.service import BatchTimes, fit_service_time
from harness.capacity.models.steps import Rungs, StepFit, band, fit_step_time
from harness.errors import InconclusiveError
from harness.records.schema import Rung, Trial
from harness.topology import kv_instances, topology_of

CONFIDENCE = 0.95


def fit_run(
    trials: Sequence[Trial],
    requests: pd.DataFrame,
    mix,
    promises: Sequence,
    rng: np.random.Generator,
    unit: str,
    *,
    session_limit: int | None = None,
    kv: KvRoom | Mapping[str, KvRoom | None] | None = None,
    extrapolation: float = 1.0,
    confidence: float = CONFIDENCE,
    progress: Callable[[str], None] | None = None,
) -> dict:
    """fit.json of a run, from its VALID ladder trials; open-loop trials are kept for validation.

    ``requests``: metrics.per_request with a column trial_id. ``session_limit``: sessions that a device lets in.
    ``kv``: room for KV caches, or that of each topology; None where it is not known, and then taken as enough.
    ``extrapolation``: the search for the highest rate goes up to this multiple of the most sessions measured on a
    device; above 1 a plan may come out *extrapolated*. A deployment that cannot be fitted says why in
    ``inconclusive``; one that breaks a promise at any rate has ``max_rate_per_s`` 0. Excluded trials and rungs are
    listed with their reasons. ``confidence``: of the intervals of rates (those of the physics have CONFIDENCE).
    ``best``: see ``best_of``. ``traffic_seed`` lets a plan simulate the same sessions again.
    """
    groups, excluded = _group(trials)
    traffic_seed = int(rng.integers(1 << 31))
    traffic = Traffic.draw(mix, np.random.default_rng(traffic_seed))
    deployments = []
    for number, (deployment, ladders) in enumerate(groups, start=1):
        if progress:
            progress(f"fitting deployment {number} of {len(groups)}")
        physics = _fit_physics(deployment, ladders, requests, rng)
        own = kv.get(topology_of(deployment)) if isinstance(kv, Mapping) else kv
        physics["kv"] = _kv_record(own, deployment)
        deployments.append(
            physics | _fit_rate(physics, traffic, promises, rng, session_limit, extrapolation, confidence)
        )
    return {
        "schema": 1,
        "unit": unit,
        "session_limit": session_limit,
        "extrapolation": extrapolation,
        "confidence": confidence,
        "traffic_seed": traffic_seed,
        "deployments": deployments,
        "best": best_of(deployments),
        "excluded": excluded,
    }


def best_of(deployments: Sequence[dict]) -> int | None:
    """The number of the deployment with the highest rate, among those with the most ladders; None where no rate is
    above 0.

    The highest of many single ladders is one that met a host at its best. A second one of it comes out lower in the
    mean, and does not show that those with a single ladder are better: they had come out lower when all had one.
    """
    rates = [each["max_rate_per_s"] or 0.0 for each in deployments]
    most = max((len(each["trial_ids"]) for each, rate in zip(deployments, rates, strict=True) if rate), default=0)
    compared = [rate if len(each["trial_ids"]) == most else 0.0 for each, rate in zip(deployments, rates, strict=True)]
    return int(np.argmax(compared)) if any(compared) else None


def limits_of(
    deployment_fit: dict, promises: Sequence, session_limit: int | None, extrapolation: float, traffic: Traffic
) -> Limits:
    """The limits that a search on this deployment holds, under this traffic."""
    most = max(round(deployment_fit["step_time"]["max_sessions"] * extrapolation), 1)
    if not deployment_fit.get("kv"):
        return Limits(tuple(promises), most, session_limit)
    kv = KvRoom(**deployment_fit["kv"])
    return Limits(tuple(promises), most, session_limit, kv, kv.slots(traffic.whole_frames))


def _kv_record(kv: KvRoom | None, deployment: dict) -> dict | None:
    """The room of a deployment, with its own instances."""
    return None if kv is None else asdict(replace(kv, instances=deployment.get(kv_instances(deployment), kv.instances)))


def usable_rungs(trial: Trial) -> tuple[list[Rung], list[str]]:
    """Rungs with sessions and frames to speak of, and a reason for each of the others."""
    usable, reasons = [], []
    for number, rung in enumerate(trial.rungs, start=1):
        if (
            math.isfinite(rung.sessions)
            and math.isfinite(rung.frames_per_s)
            and min(rung.sessions, rung.frames_per_s) > 0
        ):
            usable.append(rung)
        else:
            reasons.append(f"rung {number}: {rung.sessions:g} sessions made {rung.frames_per_s:g} frames a second")
    return usable, reasons


def _group(trials: Sequence[Trial]) -> tuple[list[tuple[dict, list[Trial]]], list[dict]]:
    """Deployments in order of their first ladder, with their VALID ladders; and what was left out, and why."""
    groups: dict[str, tuple[dict, list[Trial]]] = {}
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
            excluded.append({"trial_id": trial.trial_id, "reasons": reasons})
    return list(groups.values()), excluded


def _fit_physics(deployment: dict, ladders: list[Trial], requests: pd.DataFrame, rng: np.random.Generator) -> dict:
    fitted = {
        "deployment": deployment,
        "trial_ids": [trial.trial_id for trial in ladders],
        "stages": _fit_stages(ladders),
        "step_time": {},
        "first_audio": {"inconclusive": "the step time is not known"},
        "rtf": {"inconclusive": "the step time is not known"},
        "stalls": {},
        "scaling": _fit_scaling(ladders),
    }
    try:
        step = fit_step_time(_rungs(ladders), rng)
    except InconclusiveError as error:
        return fitted | {"step_time": {"inconclusive": str(error)}}
    fitted["step_time"] = _step_time_record(step, _rungs(ladders))
    observed = observe(ladders, requests, step.step_time)
    for name, fit in (("first_audio", fit_first_audio), ("rtf", fit_rtf)):
        try:
            fitted[name] = fit(observed)
        except InconclusiveError as error:
            fitted[name] = {"inconclusive": str(error)}
    return fitted | {"stalls": fit_stalls(observed)}


def _fit_rate(
    physics: dict,
    traffic: Traffic,
    promises: Sequence,
    rng: np.random.Generator,
    session_limit: int | None,
    extrapolation: float,
    confidence: float,
) -> dict:
    """The highest Poisson rate of one device that keeps every promise, its interval, and what binds."""
    nothing = {"max_rate_per_s": None, "max_rate_interval": [None, None], "binding": ""}
    if not physics["trial_ids"]:
        return nothing | {"inconclusive": "none of its ladders is VALID: measure one again"}
    try:
        device = Device.from_fit(physics)
        limits = limits_of(physics, promises, session_limit, extrapolation, traffic)
        limits.check(device, traffic.class_names)
    except InconclusiveError as error:
        return nothing | {"inconclusive": str(error)}
    (steady, binding), draws = steady_limit(device, limits), steady_draws(device, limits, rng)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    if steady <= 0 and np.quantile(draws, tails[1]) > 0:
        return nothing | {
            "binding": binding,
            "inconclusive": f"one session alone breaks {binding}, but too narrowly to be sure: repeat the ladder",
        }
    if steady <= 0:
        return {"max_rate_per_s": 0.0, "max_rate_interval": [0.0, 0.0], "binding": binding, "inconclusive": ""}
    rate, binding = highest_rate(device, traffic, limits)
    draws = draws * simulation_noise(len(draws), rng)
    interval = (rate * np.quantile(draws / steady, tails)).tolist()
    return {"max_rate_per_s": rate, "max_rate_interval": interval, "binding": binding, "inconclusive": ""}


def _rungs(ladders: list[Trial]) -> Rungs:
    usable = [(number, rung) for number, trial in enumerate(ladders) for rung in usable_rungs(trial)[0]]
    sessions = np.array([rung.sessions for _, rung in usable], dtype=float)
    frames_per_s = np.array([rung.frames_per_s for _, rung in usable], dtype=float)
    return Rungs(sessions, sessions / frames_per_s, np.array([number for number, _ in usable], dtype=int))


def _step_time_record(fit: StepFit, rungs: Rungs) -> dict:
    order = np.argsort(rungs.sessions, kind="stable")
    low_s, high_s = band(fit, rungs.step_s)
    columns = (rungs.sessions[order], rungs.step_s[order], low_s[order], high_s[order])
    names = ("sessions", "step_s", "low_s", "high_s")
    return {
        "intercept_s": fit.line[0],
        "slope_s": fit.line[1],
        "kind": fit.step_time.kind,
        "values": list(fit.step_time.values),
        "knots": list(fit.step_time.knots),
        "r_squared": fit.r_squared,
        "noise": fit.noise,
        "max_sessions": fit.max_sessions,
        "points": [dict(zip(names, map(float, row), strict=True)) for row in zip(*columns, strict=True)],
        "draws": [[float(f"{value:.6g}") for value in draw] for draw in fit.draws],
        "inconclusive": "",
    }


def _fit_stages(ladders: list[Trial]) -> list[dict]:
    windows = [stage for trial in ladders for rung in trial.rungs for stage in rung.stages]
    names = list(dict.fromkeys(window.stage for window in windows))
    return [_fit_stage(name, BatchTimes.collect(w for w in windows if w.stage == name)) for name in names]


def _fit_stage(name: str, times: BatchTimes) -> dict:
    columns = (times.batch_size.astype(int).tolist(), times.executions.astype(int).tolist(), times.mean_s.tolist())
    keys = ("batch_size", "executions", "mean_s")
    record = {"stage": name, "points": [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]}
    try:
        fit = fit_service_time(times, CONFIDENCE)
    except InconclusiveError as error:
        return record | {"inconclusive": str(error)}
    return record | {
        "alpha_s": fit.alpha_s,
        "tau0_s": fit.tau0_s,
        "alpha_interval_s": finite(fit.alpha_interval_s),
        "tau0_interval_s": finite(fit.tau0_interval_s),
        "r_squared": fit.r_squared,
        "worst_residual": fit.worst_residual,
        "runs_p_value": finite([fit.runs_p_value])[0],
        "inconclusive": "",
    }


def _fit_scaling(ladders: list[Trial]) -> dict:
    rungs = [rung for trial in ladders for rung in usable_rungs(trial)[0]]
    try:
        fit = fit_scaling(
            np.array([rung.sessions for rung in rungs]), np.array([rung.frames_per_s for rung in rungs]), CONFIDENCE
        )
    except InconclusiveError as error:
        return {"inconclusive": str(error)}
    return {
        "gamma": fit.gamma,
        "sigma": fit.sigma,
        "kappa": fit.kappa,
        "gamma_interval": list(fit.gamma_interval),
        "sigma_interval": list(fit.sigma_interval),
        "kappa_interval": list(fit.kappa_interval),
        "r_squared": fit.r_squared,
        "peak_sessions": finite([fit.peak_concurrency()])[0],
        "largest_measured": fit.largest_measured,
        "inconclusive": "",
    }


def finite(values: Sequence[float]) -> list[float | None]:
    """For JSON, which knows neither NaN nor infinity: they become None."""
    return [float(value) if math.isfinite(value) else None for value in values]
