"""Open-loop runs as evidence of how fast a deployment is: steps in one, compared with those that its ladders show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from harness.capacity.fitting.observations import activity_of, frame_rate
from harness.capacity.models.between_ladders import Between
from harness.capacity.models.steps import StepTime
from harness.records.fit import FittedBetween, FittedDeployment, FittedStep, Unfitted
from harness.records.schema import Trial
from harness.topology import Knobs

_CONFIDENCE = 0.95  # at which the widths of intervals are compared


def step_times(trial: Trial, requests: pd.DataFrame, step_time: StepTime) -> tuple[float, float]:
    """Seconds of a frame step in the window of an open-loop run: by ``step_time`` at the sessions that were really in
    progress, and as measured. ``requests``: rows of this trial that were sent. NaN without sessions or frames.
    """
    rung = trial.rungs[0]
    activity, clock, window = activity_of(requests), frame_rate(step_time), (rung.start_ns / 1e9, rung.end_ns / 1e9)
    sessions, frames = activity.mean(lambda n: n, *window), activity.mean(lambda n: n * clock(n), *window)
    if not (sessions > 0 and frames > 0 and rung.sessions > 0 and rung.frames_per_s > 0):
        return math.nan, math.nan
    return sessions / frames, rung.sessions / rung.frames_per_s


def error_of_open_runs(
    deployment: Knobs, trials: Sequence[Trial], requests: pd.DataFrame, step: FittedStep | Unfitted
) -> float | None:
    """By how much longer steps were than its ladders show, as a logarithm; None without a VALID open-loop run.

    Of several VALID runs, that with the highest rate counts: it is the nearest to the rate that is planned.
    """
    runs = [each for each in trials if each.kind == "open" and each.valid and each.deployment == deployment]
    runs = [each for each in runs if len(each.rungs) == 1]
    if not runs or isinstance(step, Unfitted):
        return None
    run = max(runs, key=lambda each: each.load.rate_per_s or 0.0)
    sent = requests[(requests["trial_id"] == run.trial_id) & (requests["sent_ns"] > 0)]
    predicted_s, measured_s = step_times(run, sent, StepTime.of_record(step))
    error = math.log(measured_s / predicted_s)
    return error if math.isfinite(error) else None


def with_open_runs(fit: FittedDeployment, error: float | None, rng: np.random.Generator) -> FittedDeployment:
    """The deployment with the error of its open-loop run; its rate is not known yet.

    A slower run moves the step time, by the share that one more ladder would have in the mean; a faster one does not.
    If the run differs by more than the ladders do among themselves, the interval widens; it never narrows: a run is one
    window, often far from the highest rate.
    """
    step = fit.step_time
    if error is None or isinstance(step, Unfitted) or step.between is None or step.between.degrees is None:
        return fit
    known, ladders = Between(step.between.deviation, step.between.degrees), step.between.ladders
    between, levels = known.with_another(error, ladders), step.levels
    if between.reach(ladders, _CONFIDENCE) > known.reach(ladders, _CONFIDENCE):
        levels = tuple(float(f"{each:.6g}") for each in between.draw(ladders, rng, len(step.draws)))
    else:
        between = known
    told = FittedBetween(
        deviation=between.deviation, degrees=between.degrees, ladders=ladders, open_run=math.exp(error)
    )
    moved = replace(step, between=told, levels=levels)
    return slowed(replace(fit, step_time=moved), math.exp(max(error, 0.0) / (ladders + 1)))


def slowed(fit: FittedDeployment, times: float) -> FittedDeployment:
    """The deployment with frame steps ``times`` as long; its rate is not known yet."""
    step = fit.step_time
    if isinstance(step, Unfitted):
        return fit
    longer = replace(
        step,
        intercept_s=step.intercept_s * times,
        slope_s=step.slope_s * times,
        values=tuple(value * times for value in step.values),
        draws=tuple(tuple(value * times for value in draw) for draw in step.draws),
    )
    unknown = {"max_rate_per_s": None, "max_rate_interval": (None, None), "binding": "", "inconclusive": ""}
    return replace(fit, step_time=longer, **unknown)
