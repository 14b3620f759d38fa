"""Compares open-loop runs with the model that was stored before they ran."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from harness import wire
from harness.capacity.fitting.observations import frame_rate, seconds
from harness.capacity.fitting.open_runs import step_times
from harness.capacity.models.device import Device, slo_name
from harness.capacity.models.spreads import StallTable
from harness.capacity.models.steps import StepTime
from harness.capacity.planning.prediction import flaw_of
from harness.capacity.simulator.sessions import Activity, simulate
from harness.errors import InconclusiveError
from harness.records.metrics import QUANTILES
from harness.records.plan import ValidationRow
from harness.records.prediction import Prediction
from harness.records.schema import Rung, Trial
from harness.records.slo import Slo, sample_quantile
from harness.records.summary import quantile_field

SESSIONS = "sessions"
OF_THE_DEVICE = ("step_s", SESSIONS, "frames_per_s")  # metrics of rows without an SLO
_ALTERNATIVES = 40
_LUCKS = 25
_MIN_REQUESTS = 5
_MIN_FRAMES = 8  # with fewer frames in the window an RTF is meaningless
_HARMLESS_SHARE = 0.5


@dataclass(frozen=True)
class ComparedFigure:
    """One figure of a rung's summary to compare; ``slo`` None for those of the device as a whole.

    ``key``: its name in the summary and in a prediction. ``unheard``: why ``measured`` is NaN, if that is a failure.
    """

    name: str
    key: str
    measured: float
    slo: Slo | None = None
    quantile: float = math.nan
    unheard: str = ""


def validate(
    trial: Trial,
    requests: pd.DataFrame,
    slos: Sequence[Slo],
    rng: np.random.Generator,
    *,
    confidence: float,
    max_error: float,
    predictions: Mapping[str, Prediction] | None = None,
    in_windows: pd.DataFrame | None = None,
) -> list[ValidationRow]:
    """Rows of plan.json's ``validation`` for one open-loop trial.

    ``predictions``: those recorded before each trial started, by trial; None or empty for an older run. ``in_windows``:
    metrics.in_window of each trial, with a column trial_id; without it, no quantile of RTF or stalls is compared that
    summaries have no field for.

    ``predicted_in_advance`` is the stored prediction, of nominal Poisson traffic (None if it lacks the figure), made at
    ``said_at``, with its hash. ``predicted`` is compared with the limit: the stored model is given the actual arrivals,
    because chance in the traffic is no error of the model; it is the median of its replays. ``relative_error`` =
    (predicted - measured) / measured. ``limit`` is ``max_error``, or what the variation of single requests and the
    uncertainty of the stored fit explain (all rows of the trial together with ``confidence``), whichever is larger; the
    step time at the measured sessions gets no such allowance. That whole ladders differ excuses nothing: this is what
    the run is to show.

    ``passed``: False beyond the limit; None (not decidable) within a limit above ``max_error``; else True. A row also
    passes if predicted and measured both stay below half of the SLO: the difference cannot change the answer. That of
    sessions also passes if it agrees with what these arrivals give at the step time measured, where that is within its
    own limit: sessions = rate x frames x step time, which grows with sessions, so they miss by more than the step does.
    A quantile that is missing because too many requests got no audio is a failed row, with ``measured`` None.
    Raises InconclusiveError for a trial that cannot be compared.
    """
    said, device = _prediction_of(trial, predictions or {})
    rung = _window_of(trial)
    sent = _sent_in(trial, requests)
    within = requests[:0] if in_windows is None else in_windows[in_windows["trial_id"] == trial.trial_id]
    replay = _Replay.of(sent, rung, within)
    figures = _figures(rung, slos, replay)
    fitted = replay.play(device, figures, rng, 4 * _LUCKS)
    others = list(device.same_level().alternatives())[:_ALTERNATIVES]
    plays = [replay.play(other, figures, rng, _LUCKS) for other in others] or [fitted]
    level = 1 - (1 - confidence) / len(figures)
    step = _step_row(trial, sent, device.step_time, max_error)
    rows = [step]
    explained = {SESSIONS: _sessions_by(step, replay, device, rng)} if step.passed else {}
    for figure in figures:
        known = not np.all(np.isnan(fitted[figure.name]))
        predicted = float(np.median(fitted[figure.name])) if known else math.nan
        if figure.unheard:
            row = _record(trial, figure.name, predicted, math.nan, (math.nan, math.nan), max_error)
            rows.append(replace(row, note=figure.unheard))
        elif known:
            likely = np.concatenate([play[figure.name] for play in plays])
            row = _row(trial, figure, predicted, likely, level, max_error)
            rows.append(_explained(row, explained.get(figure.name, math.nan), max_error))
    keys = {"step_s": "step_s"} | {figure.name: figure.key for figure in figures}
    return [replace(row, predicted_in_advance=said.figure(keys[row.metric])) for row in rows]


@dataclass(frozen=True)
class _Replay:
    """The arrivals of a trial, in seconds: arrays [n] in order of their due times.

    ``ttfa_s``: as measured, NaN for a request that got no audio. ``within``: metrics.in_window, from the chunks of the
    window alone as in its summary; no rows where that is not known.
    """

    due_s: np.ndarray
    ttfa_s: np.ndarray
    frames: np.ndarray
    traffic_class: np.ndarray
    window: tuple[float, float]
    within: pd.DataFrame

    @classmethod
    def of(cls, sent: pd.DataFrame, rung: Rung, within: pd.DataFrame) -> _Replay:
        broken = sent["outcome"].isin(("error", "cancelled")).to_numpy()
        delivered = np.maximum(sent["audio_s"].to_numpy(float) * wire.FRAMES_PER_SECOND, 1)
        return cls(
            seconds(sent["due_ns"]),
            sent["ttfa_s"].to_numpy(float),
            np.where(broken, delivered, sent["frames"].to_numpy(float)),
            sent["traffic_class"].to_numpy(str),
            (rung.start_ns / 1e9, rung.end_ns / 1e9),
            within,
        )

    def due_inside(self, traffic_class: str) -> np.ndarray:
        return (self.traffic_class == traffic_class) & (self.due_s >= self.window[0]) & (self.due_s < self.window[1])

    def measured(self, slo: Slo, quantile: float) -> float:
        """A quantile of the SLO's metric in the window, for one that summaries have no field for; NaN if unknown."""
        if slo.metric == "ttfa_s":
            heard = self.due_s + np.nan_to_num(self.ttfa_s, nan=math.inf) < self.window[1]
            return sample_quantile(np.where(heard, self.ttfa_s, math.nan)[self.due_inside(slo.traffic_class)], quantile)
        values = self.within.loc[self.within["traffic_class"] == slo.traffic_class, slo.metric]
        return sample_quantile(values.dropna() if slo.metric == "rtf" else values, quantile)

    def unheard(self, slo, quantile: float) -> str:
        """The problem if more than 1 - quantile of the SLO's class got no audio, else "".

        A request that was due too shortly before the end of the window counts as cut off: within the SLO on time to
        first audio, or (for other SLOs) within the longest one of its class.
        """
        inside = self.due_inside(slo.traffic_class)
        waits_s = np.nan_to_num(self.ttfa_s[inside])
        grace_s = slo.limit if slo.metric == "ttfa_s" else np.max(waits_s, initial=0.0)
        in_time = inside & (self.due_s < self.window[1] - grace_s)
        count, silent = int(in_time.sum()), int(np.isnan(self.ttfa_s[in_time]).sum())
        return f"{silent} of {count} requests got no audio" if silent > count * (1 - quantile) + 1e-9 else ""

    def play(
        self, device: Device, figures: Sequence[ComparedFigure], rng: np.random.Generator, replications: int
    ) -> dict[str, np.ndarray]:
        """Each figure [replications] as the device would produce it, by name."""
        run = simulate(self.due_s, self.frames, device.step_time, first_audio=device.first_audio, stop_s=self.window[1])
        started = ~np.isnan(run.start_s)
        ends_s = np.nan_to_num(run.end_s[started], nan=self.window[1])
        activity = Activity.between(run.start_s[started], ends_s)
        clock = frame_rate(device.step_time)
        means = {
            SESSIONS: activity.mean(lambda n: n, *self.window),
            "frames_per_s": activity.mean(lambda n: n * clock(n), *self.window),
        }
        steps_s = np.full(len(started), np.nan)
        steps_s[started] = _steps_inside(run.start_s[started], ends_s, activity, clock, self.window)
        shown = {}
        for figure in figures:
            if figure.slo is None:
                shown[figure.name] = np.full(replications, means[figure.name])
            else:
                shown[figure.name] = self._quantiles(device, figure, figure.slo, run.ttfa_s, steps_s, rng, replications)
        return shown

    def _quantiles(
        self,
        device: Device,
        figure: ComparedFigure,
        slo: Slo,
        ttfa_s: np.ndarray,
        steps_s: np.ndarray,
        rng: np.random.Generator,
        replications: int,
    ) -> np.ndarray:
        traffic_class, metric = slo.traffic_class, slo.metric
        scatter = device.ratios(traffic_class, metric)
        if metric == "ttfa_s":
            means = ttfa_s[self.due_inside(traffic_class)]
        else:
            means = steps_s[(self.traffic_class == traffic_class) & ~np.isnan(steps_s)]
        draws = rng.random((replications, len(means)))
        if not len(means):
            return np.full(replications, np.nan)
        if isinstance(scatter, StallTable):
            values = np.array([scatter.at(means, row) for row in draws])
        else:
            values = means * scatter.at(draws) / (wire.SECONDS_PER_FRAME if metric == "rtf" else 1)
        return np.quantile(values, figure.quantile, axis=1, method="inverted_cdf")


def _steps_inside(
    starts_s: np.ndarray, ends_s: np.ndarray, activity: Activity, clock, window: tuple[float, float]
) -> np.ndarray:
    """Mean seconds per frame of each session within the window; NaN where hardly any frame falls into it."""
    low_s, high_s = np.maximum(starts_s, window[0]), np.minimum(ends_s, window[1])
    frames = activity.integral(clock, high_s) - activity.integral(clock, low_s)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((high_s > low_s) & (frames >= _MIN_FRAMES), (high_s - low_s) / frames, np.nan)


def _prediction_of(trial: Trial, written: Mapping[str, Prediction]) -> tuple[Prediction, Device]:
    prediction = trial.prediction
    if prediction is None or prediction.model is None:
        raise InconclusiveError(f"{trial.trial_id}: it ran without a prediction, so it confirms nothing")
    if flaw := flaw_of(prediction, trial, written):
        raise InconclusiveError(f"{trial.trial_id}: {flaw}, so it confirms nothing")
    return prediction, Device.from_fit(prediction.model)


def _window_of(trial: Trial) -> Rung:
    if len(trial.rungs) != 1:
        raise InconclusiveError(f"{trial.trial_id}: an open-loop trial has one window, this has {len(trial.rungs)}")
    rung = trial.rungs[0]
    if not (rung.sessions > 0 and rung.frames_per_s > 0):
        raise InconclusiveError(
            f"{trial.trial_id}: its window shows {rung.sessions:g} sessions and {rung.frames_per_s:g} frames a second: "
            "measure it again, longer"
        )
    return rung


def _sent_in(trial: Trial, requests: pd.DataFrame) -> pd.DataFrame:
    sent = requests[(requests["trial_id"] == trial.trial_id) & (requests["sent_ns"] > 0)].sort_values("due_ns")
    if not len(sent):
        raise InconclusiveError(f"{trial.trial_id}: no request of it is stored: measure it again")
    return sent


def _figures(rung: Rung, slos: Sequence[Slo], replay: _Replay) -> list[ComparedFigure]:
    """Sessions, throughput, and the median and the SLO's quantile of each SLO that the window supports."""
    figures = [
        ComparedFigure(SESSIONS, SESSIONS, rung.sessions),
        ComparedFigure("frames_per_s", "frames_per_s", rung.frames_per_s),
    ]
    for slo in slos:
        count = int(np.sum(replay.due_inside(slo.traffic_class)))
        for quantile in (0.5, slo.quantile):
            key = f"{slo.traffic_class}.{quantile_field(slo.metric, quantile)}"
            of_summary = rung.summary.quantile(slo.traffic_class, slo.metric, quantile)
            measured = of_summary if quantile in QUANTILES else replay.measured(slo, quantile)
            known = math.isfinite(measured)
            enough = count >= _MIN_REQUESTS and count * (1 - quantile) >= 1 - 1e-9
            name = slo_name(slo.traffic_class, slo.metric, quantile)
            if known and enough:
                figures.append(ComparedFigure(name, key, measured, slo, quantile))
            elif not known and (unheard := replay.unheard(slo, quantile)):
                figures.append(ComparedFigure(name, key, math.nan, slo, quantile, unheard))
    return list({figure.name: figure for figure in figures}.values())


def _step_row(trial: Trial, sent: pd.DataFrame, step_time: StepTime, max_error: float) -> ValidationRow:
    """Step time at the sessions that were really in progress: the physics alone, without queueing feedback."""
    predicted_s, measured_s = step_times(trial, sent, step_time)
    return _record(trial, "step_s", predicted_s, measured_s, (predicted_s, predicted_s), max_error)


def _sessions_by(step: ValidationRow, replay: _Replay, device: Device, rng: np.random.Generator) -> float:
    """Mean sessions that the arrivals give on this device at the step time that ``step`` measured."""
    ratio = (step.measured or 0.0) / (step.predicted or math.inf)
    scaled = replace(device.step_time, values=tuple(ratio * value for value in device.step_time.values))
    played = replay.play(replace(device, step_time=scaled), [ComparedFigure(SESSIONS, SESSIONS, 0.0)], rng, 1)
    return float(played[SESSIONS][0])


def _explained(row: ValidationRow, by_step: float, max_error: float) -> ValidationRow:
    """The row, passed if what is predicted at the measured step time, ``by_step``, agrees; NaN: nothing explains it."""
    if row.passed is not False or row.measured is None or not abs(by_step - row.measured) <= max_error * row.measured:
        return row
    note = f"{by_step:.3g} at the step time measured, which is within its own limit"
    if row.limit > max_error:  # a smaller miss would not be decidable either
        chance = f"chance alone moves it by {row.limit:.0%}, beyond {max_error:.0%}"
        return replace(row, passed=None, note=f"{chance}; {note}")
    return replace(row, passed=True, note=note)


def _row(
    trial: Trial, figure: ComparedFigure, predicted: float, likely: np.ndarray, level: float, max_error: float
) -> ValidationRow:
    low, high = np.nanquantile(likely, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    chance = max(1 - predicted / high, predicted / low - 1) if low > 0 and math.isfinite(high) else 0.0
    interval = float(low), float(high)
    row = _record(trial, figure.name, predicted, figure.measured, interval, max(max_error, chance))
    limit = figure.slo.limit if figure.slo is not None else 0.0
    if not row.passed and max(predicted, figure.measured) < _HARMLESS_SHARE * limit:
        row = replace(row, passed=True, note="both below half of the SLO: the difference cannot change the answer")
    if row.passed and chance > max_error:
        notes = [f"chance alone moves it by {chance:.0%}, beyond {max_error:.0%}", row.note]
        row = replace(row, passed=None, note="; ".join(filter(None, notes)))
    return row


def _record(
    trial: Trial, name: str, predicted: float, measured: float, interval: tuple[float, float], limit: float
) -> ValidationRow:
    error = (predicted - measured) / measured if measured else (0.0 if predicted == measured else math.inf)
    known = math.isfinite(error)
    (low, high), said = map(_finite, interval), trial.prediction
    return ValidationRow(
        trial_id=trial.trial_id,
        rate_per_s=trial.load.rate_per_s,
        said_at=said.made_at or None if said else None,
        prediction_sha256=said.sha256 or None if said else None,
        metric=name,
        predicted=_finite(predicted),
        predicted_interval=(low, high),
        measured=_finite(measured),
        relative_error=error if known else None,
        limit=float(limit),
        passed=bool(known and abs(error) <= limit),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
