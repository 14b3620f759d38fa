"""The prediction of an open-loop run, made before it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from harness.capacity.fitting.observations import frame_rate
from harness.capacity.fitting.rate_search import Traffic, simulate_load, values_of
from harness.capacity.models.device import Device
from harness.capacity.simulator.sessions import Activity
from harness.records.fit import FittedDeployment, FittedModel, fitted
from harness.records.prediction import ClassPrediction, Prediction, hash_of
from harness.records.schema import Trial
from harness.records.summary import QUANTILE_FIELDS
from harness.traffic.mix import Mix


def predict_open_run(
    fit: FittedDeployment, mix: Mix, rate_per_s: float, seconds: float, rng: np.random.Generator
) -> Prediction:
    """The prediction of Poisson arrivals at ``rate_per_s`` on one device, in its steady state.

    ``model`` is a copy of the fit at that time, so that the run can be compared with exactly that. Raises
    InconclusiveError where the deployment has no fit.
    """
    device = Device.from_fit(fit)
    traffic = Traffic.draw(mix, rng)
    simulated, counted = simulate_load(device, traffic, rate_per_s, devices=1)
    stop_s = float(simulated.arrival_s[-1])
    activity = Activity.between(simulated.start_s, np.nan_to_num(simulated.end_s, nan=stop_s))
    window = float(simulated.arrival_s[counted][0]), stop_s
    sessions = activity.mean(lambda n: n, *window)
    frames_per_s = activity.mean(lambda n: n * frame_rate(device.step_time)(n), *window)
    classes = {}
    for index, name in enumerate(traffic.class_names):
        figures: dict[str, float] = {}
        for metric, key in QUANTILE_FIELDS.items():
            if metric == "stall_longest_s" and not device.stalls:
                continue
            values = values_of(device, traffic, simulated, counted, metric, index)
            for percent in (50, 95):
                value = float(np.quantile(values, percent / 100, method="inverted_cdf"))
                figures[key.format(percent)] = value if math.isfinite(value) else math.nan
        classes[name] = ClassPrediction(**figures)
    return Prediction(
        rate_per_s=rate_per_s,
        seconds=seconds,
        sessions=sessions,
        frames_per_s=frames_per_s,
        step_s=sessions / frames_per_s,
        sessions_p95=float(np.quantile(simulated.active_at_start[counted], 0.95, method="higher")),
        classes=classes,
        model=_frozen(fit),
    )


def sealed(prediction: Prediction, made_at: str) -> Prediction:
    """The prediction with ``made_at`` (ISO 8601, UTC) and ``sha256``, the hash of the rest of its content."""
    whole = Prediction.of(replace(prediction, made_at=made_at).to_dict()).to_dict()  # its numbers as they will be read
    return Prediction.of(whole | {"sha256": hash_of(whole)})


def flaw_of(prediction: Prediction, trial: Trial, written: Mapping[str, Prediction]) -> str:
    """Why a prediction does not count for its trial; "" if it does.

    It may have been changed, or made too late. ``written``: the predictions of the run that were recorded before their
    trials started, by trial; empty for an older run without such records, where a prediction without a hash is
    accepted.
    """
    before = written.get(trial.trial_id)
    if written and (before is None or prediction.sha256 != before.sha256):
        return "its prediction is not the one that was written into predictions.jsonl"
    if not prediction.sha256:
        return "its prediction bears no hash" if written else ""
    if prediction.content_sha256 != prediction.sha256:
        return "its prediction is not the one that was made: its hash differs"
    if trial.started_at and prediction.made_at > trial.started_at:
        return f"its prediction was made at {prediction.made_at}, after it had started at {trial.started_at}"
    return ""


def _frozen(fit: FittedDeployment) -> FittedModel:
    """Everything that Device.from_fit reads."""
    return FittedModel(
        step_time=replace(fitted(fit.step_time), points=()),
        first_audio=replace(fitted(fit.first_audio), points=()),
        rtf=fit.rtf,
        stalls=fit.stalls,
    )
