"""Whether open-loop runs confirm a deployment: its predictions, its SLOs, and its highest rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from harness import wire
from harness.capacity.models.device import slo_name
from harness.capacity.planning.validation import OF_THE_DEVICE, validate
from harness.errors import InconclusiveError
from harness.records.plan import JudgedSlo, OpenRun, ValidationRow
from harness.records.prediction import Prediction
from harness.records.schema import Outcome, Rung, Trial
from harness.records.slo import Slo, judge
from harness.topology import Knobs
from harness.traffic.mix import Mix


@dataclass(frozen=True)
class Confirmation:
    """``rows`` and ``runs`` are plan.json's ``validation`` and ``open_runs``; any ``doubts`` rule out the verdict met.

    ``highest_rate_per_s``: of a run of the deployment that passed; 0 if there is none.
    """

    rows: tuple[ValidationRow, ...]
    runs: tuple[OpenRun, ...]
    doubts: tuple[str, ...]
    highest_rate_per_s: float


def confirm(
    deployment: Knobs,
    trials: Sequence[Trial],
    requests: pd.DataFrame,
    mix: Mix,
    slos: Sequence[Slo],
    rng: np.random.Generator,
    *,
    confidence: float,
    max_error: float,
    predictions: Mapping[str, Prediction] | None = None,
    in_windows: pd.DataFrame | None = None,
) -> Confirmation:
    """Judge every VALID open-loop trial; those on ``deployment`` (``own``) decide. ``requests``: as for make_plan.

    ``predictions``, ``in_windows``: as for validate. A run's ``passed``: False where a prediction of it failed or an
    SLO was certainly violated; None where it is undecided (INVALID, without a prediction, or no SLO figure decidable;
    ``note`` says which); else True.
    """
    rows, runs = [], []
    for trial in (trial for trial in trials if trial.kind == "open"):
        run = _run_record(trial, trial.deployment == deployment, mix)
        if trial.valid:
            terms = {"confidence": confidence, "max_error": max_error, "predictions": predictions}
            found, problem = _validated(trial, requests, slos, rng, **terms, in_windows=in_windows)
            judged = _judged(trial, requests, slos, confidence)
            passed, note = _outcome(found, judged, problem)
            run = replace(run, slos=judged, passed=passed, note=note)
            rows += found
        runs.append(run)
    own = [run for run in runs if run.own]
    highest = max((run.rate_per_s for run in own if run.passed), default=0.0)
    return Confirmation(tuple(rows), tuple(runs), _doubts(own, rows), highest)


def _run_record(trial: Trial, own: bool, mix: Mix) -> OpenRun:
    """One entry of plan.json's ``open_runs``, not judged yet; nominal audio is the mean of the mix x the rate."""
    rate = trial.load.rate_per_s or 0.0
    offered = trial.rungs[0].summary.offered_audio_s_per_s if trial.rungs else math.nan
    return OpenRun(
        trial_id=trial.trial_id,
        own=own,
        valid=trial.valid,
        rate_per_s=rate,
        seconds=trial.load.seconds,
        nominal_audio_s_per_s=rate * mix.mean_frames() * wire.SECONDS_PER_FRAME,
        offered_audio_s_per_s=offered if math.isfinite(offered) else None,
        passed=None,
        note="" if trial.valid else f"INVALID: {'; '.join(trial.reasons)}",
    )


def _validated(trial: Trial, *arguments, **options) -> tuple[list[ValidationRow], str]:
    """The trial's validation rows; or none, and why it cannot be compared with a prediction."""
    try:
        return validate(trial, *arguments, **options), ""
    except InconclusiveError as error:
        return [], str(error)


def _outcome(rows: Sequence[ValidationRow], slos: Sequence[JudgedSlo], problem: str) -> tuple[bool | None, str]:
    """The ``passed`` and ``note`` of a run."""
    if any(row.passed is False for row in rows) or any(each.met is False for each in slos):
        return False, problem
    decided = [row.passed for row in rows if row.metric not in OF_THE_DEVICE] + [each.met for each in slos]
    if problem or all(each is None for each in decided):
        return None, problem or "not one figure of an SLO is decidable in it"
    return True, ""


def _judged(trial: Trial, requests: pd.DataFrame, slos: Sequence[Slo], confidence: float) -> tuple[JudgedSlo, ...]:
    """Every SLO in this run: ``met`` None where too few requests support a verdict; ``measured`` the quantile."""
    own, judged = requests[requests["trial_id"] == trial.trial_id], []
    for slo in slos if trial.rungs else ():
        verdict = judge(slo, _values(own, trial.rungs[0], slo), confidence)
        value = verdict.value if math.isfinite(verdict.value) else None
        judged.append(JudgedSlo(**asdict(slo), measured=value, requests=verdict.n, met=verdict.met))
    return tuple(judged)


def _values(requests: pd.DataFrame, rung: Rung, slo) -> np.ndarray:
    """The SLO's metric [n] of its class: TTFA of requests due in the window, other metrics of those served in it.

    A request that ended in an error violated its SLO, however much audio it delivered before: infinite. NaN is any
    other that got no audio; one without an RTF of its own (a single chunk) is left out.
    """
    sent = requests[(requests["traffic_class"] == slo.traffic_class) & (requests["sent_ns"] > 0)]
    due = (sent["due_ns"] >= rung.start_ns) & (sent["due_ns"] < rung.end_ns) & (sent["start_frame"] == 0)
    served = (sent["sent_ns"] < rung.end_ns) & (sent["ended_ns"] >= rung.start_ns)
    values = sent[slo.metric].mask(sent["outcome"] == Outcome.ERROR, math.inf)
    values = values[due if slo.metric == "ttfa_s" else served]
    return (values.dropna() if slo.metric == "rtf" else values).to_numpy(float)


def _doubts(own: Sequence[OpenRun], rows: Sequence[ValidationRow]) -> tuple[str, ...]:
    """Why the runs of a deployment do not confirm it, each with the measurement that would decide."""
    names = {run.trial_id for run in own}
    failed = [_failure(row) for row in rows if row.trial_id in names and row.passed is False]
    broken = [_broken(run, slo) for run in own for slo in run.slos if slo.met is False]
    absent = []
    if all(run.passed is None for run in own):
        absent = ["No VALID open-loop run confirms this deployment: run one at a share of its highest rate."]
    return (*absent, *failed, *broken, *_highest_not_passed(own))


def _highest_not_passed(own: Sequence[OpenRun]) -> list[str]:
    """A doubt where no run at the highest rate is decisive; a run that failed there is a doubt of its own."""
    top = max((run.rate_per_s for run in own), default=0.0)
    there = sorted((run for run in own if run.rate_per_s == top), key=lambda run: run.valid)
    if not there or any(run.passed is not None for run in there):
        return []
    run = there[-1]
    return [
        f"The open-loop run with the highest rate, {run.trial_id} at {top:g} requests a second, confirms nothing "
        f"({run.note}): repeat that rate{', longer' if run.valid else ''}."
    ]


def _failure(row: ValidationRow) -> str:
    if row.measured is None:
        return (
            f"In the open-loop trial {row.trial_id} {row.note}, so there is no {row.metric}: "
            "find out why, and repeat that rate."
        )
    error = f"{abs(row.relative_error):.1%}" if row.relative_error is not None else "beyond measure"
    return (
        f"The prediction of {row.metric} missed the open-loop trial {row.trial_id} by {error} "
        f"(limit {row.limit:.1%}): measure the ladder and that rate again, longer."
    )


def _broken(run: OpenRun, slo: JudgedSlo) -> str:
    name = slo_name(slo.traffic_class, slo.metric, slo.quantile)
    value = f"was {slo.measured:.3g}" if slo.measured is not None else "was above every measured value"
    return (
        f"The open-loop run {run.trial_id} at {run.rate_per_s:g} requests a second violated an SLO: {name} "
        f"{value}, the limit is {slo.limit:g}: measure the ladder and that rate again, longer."
    )
