"""What the requests of a deployment's ladders experienced: concurrent sessions, TTFA, RTF and stalls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness import wire
from harness.capacity.models.spreads import MIN_OF_A_CLASS, Spread, StallTable
from harness.capacity.models.steps import StepTime
from harness.capacity.simulator.sessions import Activity
from harness.errors import InconclusiveError
from harness.records.fit import FittedFirstAudio, FittedRtf, FittedStalls, StartPoint
from harness.records.schema import Rung, Trial

MIN_STARTS = 8
INSIDE, EVERY, IN_PROGRESS = "inside the rungs", "all", "in progress"  # requests from which TTFA is fitted
MIN_AUDIO_S = 1.0  # with less audio an RTF is meaningless
MAX_DISTURBED = 0.1  # of a request's time: more, and it says nothing about an undisturbed device
_NS_PER_S = 1e9


def activity_of(requests: pd.DataFrame) -> Activity:
    """Requests in progress (from sent to ended) over time, in seconds of the monotonic clock."""
    return Activity.between(seconds(requests["sent_ns"]), seconds(requests["ended_ns"]))


def seconds(column_ns: pd.Series) -> np.ndarray:
    return column_ns.to_numpy(dtype=float, na_value=np.nan) / _NS_PER_S


def frame_rate(step_time: StepTime) -> Callable[[np.ndarray], np.ndarray]:
    """Frames/s of one session, for an array of session counts; 0 where there is none."""
    return lambda n: np.where(n > 0, 1 / step_time(np.maximum(n, 1)), 0.0)


@dataclass(frozen=True)
class RungOfLadder:
    """A rung: the number of its ladder, its place in that ladder's trial, and itself."""

    ladder: int
    place: int
    rung: Rung


@dataclass(frozen=True)
class MeasuredRequests:
    """Rows of requests: whole, and of those that lasted through whole rungs, once per rung (see ``fit_run``)."""

    requests: pd.DataFrame
    in_rungs: pd.DataFrame | None = None

    def of(self, trial: Trial) -> MeasuredRequests:
        """Those of one trial that were sent."""
        requests, in_rungs = (_sent_in(trial, rows) for rows in (self.requests, self.in_rungs))
        return MeasuredRequests(self.requests[:0] if requests is None else requests, in_rungs)


def _sent_in(trial: Trial, rows: pd.DataFrame | None) -> pd.DataFrame | None:
    return None if rows is None else rows[(rows["trial_id"] == trial.trial_id) & (rows["sent_ns"] > 0)]


def observe(
    trials: Sequence[Trial],
    seen: MeasuredRequests,
    step_time: StepTime,
    left_out: Sequence[RungOfLadder] = (),
    found: Sequence[np.ndarray] = (),
) -> pd.DataFrame:
    """One row per request of the trials: traffic_class, ttfa_s, rtf, stall_longest_s, and the fit's values for it.

    ``sessions`` when it was sent (including itself), ``start_step_s`` at that number, ``mean_step_s`` from its first to
    its last chunk by the frame clock, ``rung``: the last that had started when it was sent, ``in_rung``: inside its
    window, ``served``: with an RTF and stalls that count. Requests that spent more than MAX_DISTURBED of their time in
    disturbed rungs, or in those ``left_out``, are not seen. ``found`` [trials][rungs]: the step as each rung found it /
    by ``step_time``.
    """
    parts = []
    for number, trial in enumerate(trials):
        if trial.rungs:
            part = _observe_trial(trial, seen.of(trial), step_time, [e.place for e in left_out if e.ladder == number])
            if found and len(part):
                at_its_rung = np.concatenate([found[number][:1], found[number]])[part["rung"]]
                part["mean_step_s"] *= at_its_rung
                part["start_step_s"] *= at_its_rung
            part["rung"] += 1000 * len(parts)
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _observe_trial(trial: Trial, seen: MeasuredRequests, step_time: StepTime, slow: Sequence[int]) -> pd.DataFrame:
    sent = seen.requests
    if not len(sent):
        return pd.DataFrame(columns=_COLUMNS)
    activity = activity_of(sent)
    sent_s = seconds(sent["sent_ns"])
    sessions = activity.at(sent_s).astype(float)
    windows = np.array([(rung.start_ns, rung.end_ns) for rung in trial.rungs], dtype=float) / _NS_PER_S
    frame = sent[["traffic_class", "ttfa_s", "rtf", "stall_longest_s"]].copy()
    frame["begun"] = sent["start_frame"] == 0  # else found in progress: its first audio was long before
    frame["sessions"], frame["start_step_s"] = sessions, step_time(sessions)
    frame["mean_step_s"] = _mean_steps(sent, activity, step_time)
    frame["rung"] = np.searchsorted(windows[:, 0], sent_s, side="right")
    frame["in_rung"] = np.any((sent_s >= windows[:, :1]) & (sent_s < windows[:, 1:]), axis=0)
    frame["served"] = (sent["audio_s"] >= MIN_AUDIO_S) & (seconds(sent["ended_ns"]) >= windows[0, 0])
    inside = seen.in_rungs
    if inside is not None and len(inside):
        frame["served"] &= ~sent["request_id"].isin(set(inside["request_id"]))
    disturbed = [*trial.disturbed, *(trial.rungs[place] for place in slow)]
    frame = frame[_disturbed_share(sent, disturbed) <= MAX_DISTURBED]
    if inside is None or not len(inside):
        return frame
    return pd.concat([frame, _observe_rungs(inside[~inside["window"].isin(slow)], activity, step_time)])


def _observe_rungs(inside: pd.DataFrame, activity: Activity, step_time: StepTime) -> pd.DataFrame:
    """Rows of ``observe`` for requests in each rung that they lasted through; their first audio is known elsewhere."""
    frame = inside[["traffic_class", "rtf", "stall_longest_s"]].copy()
    frame["ttfa_s"], frame["begun"], frame["in_rung"] = np.nan, False, True
    frame["sessions"] = frame["start_step_s"] = np.nan
    frame["mean_step_s"] = _mean_steps(inside, activity, step_time)
    frame["rung"] = inside["window"] + 1
    frame["served"] = inside["audio_s"] >= MIN_AUDIO_S
    return frame


def _disturbed_share(requests: pd.DataFrame, disturbed: Sequence[Rung]) -> np.ndarray:
    """The share of each request's time, from sent to ended, that lies in disturbed rungs."""
    sent_s, ended_s = seconds(requests["sent_ns"]), seconds(requests["ended_ns"])
    inside_s = np.zeros(len(requests))
    for start_s, end_s in ((rung.start_ns / _NS_PER_S, rung.end_ns / _NS_PER_S) for rung in disturbed):
        inside_s += np.maximum(np.minimum(ended_s, end_s) - np.maximum(sent_s, start_s), 0.0)
    return inside_s / np.maximum(ended_s - sent_s, 1e-9)


_COLUMNS = (
    *("traffic_class", "ttfa_s", "rtf", "stall_longest_s"),
    *("sessions", "start_step_s", "mean_step_s", "rung", "in_rung", "served", "begun"),
)


def _mean_steps(requests: pd.DataFrame, activity: Activity, step_time: StepTime) -> np.ndarray:
    first_s, last_s = seconds(requests["first_received_ns"]), seconds(requests["last_received_ns"])
    known = last_s > first_s
    clock = frame_rate(step_time)
    frames = np.full(len(requests), np.nan)
    frames[known] = activity.integral(clock, last_s[known]) - activity.integral(clock, first_s[known])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(frames > 0, (last_s - first_s) / frames, np.nan)


def fit_first_audio(observed: pd.DataFrame) -> FittedFirstAudio:
    """Least squares of relative errors: time to first audio = base_s + steps x step time at the start.

    Uses requests that started inside rungs which kept pace with speech: on slower rungs requests queue, and their waits
    say nothing about a device planned to keep pace. With fewer than 20 of those: all inside the rungs; with fewer than
    20 of these: all that started at any time. If fewer than 8 started (long sessions), sessions found in progress are
    used too (``starts`` says so); they read no prompt, so their first audio is early. Raises InconclusiveError below 8
    in all.
    """
    heard = observed[observed["ttfa_s"] > 0]
    begun = heard[heard["begun"].astype(bool)]
    within = begun[begun["in_rung"].astype(bool)]
    in_pace = within[within["start_step_s"] <= wire.SECONDS_PER_FRAME]
    known = begun if len(begun) >= MIN_STARTS else heard
    starts = next((each for each in (in_pace, within) if len(each) >= MIN_OF_A_CLASS), known)
    if len(starts) < MIN_STARTS:
        raise InconclusiveError(
            f"the time to first audio needs {MIN_STARTS} requests or more, not {len(starts)}: "
            "lengthen the rungs of the ladder"
        )
    groups = starts.groupby("sessions").agg(
        step_s=("start_step_s", "mean"), ttfa_s=("ttfa_s", "mean"), count=("ttfa_s", "size")
    )
    base_s, steps = _base_and_steps(*(groups[name].to_numpy(dtype=float) for name in groups))
    ratios = starts["ttfa_s"].to_numpy(float) / (base_s + steps * starts["start_step_s"].to_numpy(float))
    spread = Spread.measure(ratios, starts["traffic_class"].to_numpy(str), starts["rung"].to_numpy(int)).record()
    return FittedFirstAudio(
        base_s=base_s,
        steps=steps,
        starts=INSIDE if len(within) >= MIN_OF_A_CLASS else EVERY if known is begun else IN_PROGRESS,
        residual_quantiles=spread.quantiles,
        spread=spread,
        points=tuple(StartPoint(sessions=float(n), **row) for n, row in groups.to_dict("index").items()),
    )


def _base_and_steps(step_s: np.ndarray, ttfa_s: np.ndarray, count: np.ndarray) -> tuple[float, float]:
    """Both at or above zero; proportional to the step time where step times hardly differ, to be on the safe side."""
    weight = count / ttfa_s**2
    through_origin = float(weight @ (step_s * ttfa_s) / (weight @ step_s**2))
    if step_s.max() < 1.2 * step_s.min():
        return 0.0, through_origin
    step_mean, ttfa_mean = np.average(step_s, weights=weight), np.average(ttfa_s, weights=weight)
    steps = float(weight @ ((step_s - step_mean) * (ttfa_s - ttfa_mean)) / (weight @ (step_s - step_mean) ** 2))
    if steps < 0:
        return float(ttfa_mean), 0.0
    base_s = float(ttfa_mean - steps * step_mean)
    return (base_s, steps) if base_s >= 0 else (0.0, through_origin)


def fit_rtf(observed: pd.DataFrame) -> FittedRtf:
    """Distribution of RTF / (mean step time / seconds of a frame). Raises InconclusiveError below 8 requests."""
    known = observed[observed["served"].astype(bool) & (observed["rtf"] > 0) & (observed["mean_step_s"] > 0)]
    if len(known) < MIN_STARTS:
        raise InconclusiveError(
            f"the RTF needs {MIN_STARTS} requests with {MIN_AUDIO_S:g} s of audio or more, not {len(known)}: "
            "lengthen the rungs of the ladder"
        )
    ratios = known["rtf"].to_numpy(float) * wire.SECONDS_PER_FRAME / known["mean_step_s"].to_numpy(float)
    spread = Spread.measure(ratios, known["traffic_class"].to_numpy(str), known["rung"].to_numpy(int))
    return FittedRtf(spread=spread.record())


def fit_stalls(observed: pd.DataFrame) -> dict[str, FittedStalls]:
    """A StallTable of all requests, under "", and one per class with 20 or more; empty if no stall is known."""
    known = observed[observed["served"].astype(bool) & observed["stall_longest_s"].notna()]
    known = known[known["mean_step_s"] > 0]
    tables = {}
    for name in ["", *sorted(set(known["traffic_class"]))]:
        own = known if name == "" else known[known["traffic_class"] == name]
        if len(own) >= MIN_OF_A_CLASS:
            steps, stalls = own["mean_step_s"].to_numpy(float), own["stall_longest_s"].to_numpy(float)
            tables[name] = StallTable.measure(steps, stalls).record()
    return tables
