"""The prediction of an open-loop run, made before it starts."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace

import numpy as np

from harness.capacity.fitting.observations import frame_rate
from harness.capacity.fitting.rate_search import Traffic, simulate_load, values_of
from harness.capacity.models.device import Device
from harness.capacity.simulator.sessions import Activity
from harness.records.fit import FittedDeployment, FittedModel, fitted
from harness.traffic.mix import Mix

SUMMARY_KEYS = {"ttfa_s": "ttfa_p{}_s", "rtf": "rtf_p{}", "stall_longest_s": "stall_p{}_s"}
"""Names of a metric's quantiles in metrics.summarise, to be prefixed with ``<class>.``."""


def predict_open_run(
    fit: FittedDeployment, mix: Mix, rate_per_s: float, seconds: float, rng: np.random.Generator
) -> dict:
    """The prediction of Poisson arrivals at ``rate_per_s`` on one device, in its steady state, as a flat dict.

    Keys as in metrics.summarise: sessions, frames_per_s, step_s, and ``<class>.ttfa_p50_s`` and so on (p50 and p95;
    None where no such metric was measured). ``sessions_p95``: as arrivals find them. ``model`` is a copy of the fit at
    that time, so that the run can be compared with exactly that. Raises InconclusiveError where the deployment has no
    fit.
    """
    device = Device.from_fit(fit)
    traffic = Traffic.draw(mix, rng)
    simulated, counted = simulate_load(device, traffic, rate_per_s, devices=1)
    stop_s = float(simulated.arrival_s[-1])
    activity = Activity.between(simulated.start_s, np.nan_to_num(simulated.end_s, nan=stop_s))
    window = float(simulated.arrival_s[counted][0]), stop_s
    sessions = activity.mean(lambda n: n, *window)
    frames_per_s = activity.mean(lambda n: n * frame_rate(device.step_time)(n), *window)
    prediction = {"rate_per_s": rate_per_s, "seconds": seconds, "sessions": sessions, "frames_per_s": frames_per_s}
    prediction["step_s"] = sessions / frames_per_s
    prediction["sessions_p95"] = float(np.quantile(simulated.active_at_start[counted], 0.95, method="higher"))
    for index, name in enumerate(traffic.class_names):
        for metric, key in SUMMARY_KEYS.items():
            if metric == "stall_longest_s" and not device.stalls:
                continue
            values = values_of(device, traffic, simulated, counted, metric, index)
            for percent in (50, 95):
                value = float(np.quantile(values, percent / 100, method="inverted_cdf"))
                prediction[f"{name}.{key.format(percent)}"] = value if math.isfinite(value) else None
    return prediction | {"model": _frozen(fit).to_dict()}


def sealed(prediction: dict, made_at: str) -> dict:
    """The prediction with ``made_at`` (ISO 8601, UTC) and ``sha256``, the hash of the rest of it as JSON."""
    whole = prediction | {"made_at": made_at}
    return whole | {"sha256": _sha256(whole)}


def flaw_of(prediction: dict, started_at: str, written: dict | None = None) -> str:
    """Why a prediction does not count for a run that started at ``started_at``; "" if it does.

    It may have been changed, or made too late. ``written``: the prediction recorded for that trial before it started
    ({} if there is none); None for an older run without such records, where a prediction without a hash is accepted.
    """
    if written is not None and (not written or prediction.get("sha256") != written.get("sha256")):
        return "its prediction is not the one that was written into predictions.jsonl"
    if "sha256" not in prediction:
        return "" if written is None else "its prediction bears no hash"
    if _sha256({name: value for name, value in prediction.items() if name != "sha256"}) != prediction["sha256"]:
        return "its prediction is not the one that was made: its hash differs"
    if started_at and prediction["made_at"] > started_at:
        return f"its prediction was made at {prediction['made_at']}, after it had started at {started_at}"
    return ""


def _sha256(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _frozen(fit: FittedDeployment) -> FittedModel:
    """Everything that Device.from_fit reads."""
    return FittedModel(
        step_time=replace(fitted(fit.step_time), points=()),
        first_audio=replace(fitted(fit.first_audio), points=()),
        rtf=fit.rtf,
        stalls=fit.stalls,
    )
