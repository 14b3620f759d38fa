"""From Results to numbers: every metric, from named timestamps and counts, listed once in ``summary``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from harness import wire
from harness.records import steadiness
from harness.records.schema import Outcome, Result
from harness.records.slo import Slo, goodput_per_s, sample_quantile
from harness.records.steadiness import MIN_PARTS
from harness.records.summary import ClassSummary, Summary

NS_PER_S = 1e9
START_BUFFERS_S = {"": 0.0, "_500ms": 0.5, "_2s": 2.0}
AUDIBLE_STALL_S = 0.05
LATE_SEND_S = 0.005
WARM_UP_PARTS = 200
QUANTILES = (0.50, 0.95, 0.99)
_SCALARS = tuple(each.name for each in dataclasses.fields(Result) if each.name != "chunks")
# Stalls are computed in thirds of a nanosecond, in which a sample of 24 kHz audio is a whole number: in floating point
# a stream that is exactly on time would stall by rounding.
_THIRDS_PER_SAMPLE = 3 * 1_000_000_000 // wire.SAMPLE_RATE_HZ
_THIRDS_PER_S = 3 * NS_PER_S
_ALWAYS = (np.iinfo(np.int64).min, np.iinfo(np.int64).max)


def per_request(results: Sequence[Result], start_ns: int = _ALWAYS[0], end_ns: int = _ALWAYS[1]) -> pd.DataFrame:
    """One row per result: its scalar fields, and differences of its timestamps; NaN where undefined.

    With a window, only its chunks count: ``chunks``, ``samples``, ``audio_s``, ``rtf``, stalls and lateness are
    those of [start_ns, end_ns), and a request that ends later is unfinished; the playback clock still starts with the
    stream. ``sent_ns`` 0 is a request that was never sent. The columns of received times are nullable integers.
    """
    rows = [_row(result, start_ns, end_ns) for result in results]
    frame = pd.DataFrame(rows, columns=[*_SCALARS, *_MEASURES])
    frame["asked_s"] = frame["frames"] * wire.SECONDS_PER_FRAME
    sent = frame["sent_ns"] > 0
    frame["schedule_delay_s"] = ((frame["sent_ns"] - frame["due_ns"]) / NS_PER_S).where(sent)
    for name in ("first_received_ns", "last_received_ns"):
        frame[name] = frame[name].astype("Int64")
    return frame


def in_window(results: Sequence[Result], start_ns: int, end_ns: int) -> pd.DataFrame:
    """``per_request`` within a window, of requests that were due or served in it: what its ``summarise`` is made of."""
    return per_request([each for each in results if _is_of_window(each, start_ns, end_ns)], start_ns, end_ns)


def through_windows(results: Sequence[Result], windows: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """Requests that lasted through whole windows: a row of ``per_request`` for each, with the number ``window`` from 0.

    Their stalls and RTF differ from window to window, where one figure for the whole request is of none of them.
    """
    parts = []
    for number, (start_ns, end_ns) in enumerate(windows):
        through = [each for each in results if 0 < each.sent_ns <= start_ns and each.ended_ns >= end_ns]
        parts.append(per_request(through, start_ns, end_ns).assign(window=number))
    return pd.concat(parts, ignore_index=True) if parts else per_request([]).assign(window=0)


_STALLS = [f"{what}{buffer}" for buffer in START_BUFFERS_S for what in ("stall_longest_s", "stall_total_s", "stalls")]
_MEASURES = (
    ["chunks", "samples", "audio_s", "asked_s", "ttfa_s", "schedule_delay_s", "rtf"]
    + _STALLS
    + ["audible_stalls"]
    + ["lateness_p99_s", "first_received_ns", "last_received_ns"]
)


def _row(result: Result, start_ns: int, end_ns: int) -> dict[str, Any]:
    received = result.chunks.received_ns
    inside = slice(*np.searchsorted(received, [start_ns, end_ns]))
    samples = result.chunks.samples[inside]
    row: dict[str, Any] = {name: getattr(result, name) for name in _SCALARS}
    row["outcome"] = str(result.outcome if result.ended_ns < end_ns else Outcome.UNFINISHED)
    row |= {"chunks": len(samples), "samples": int(samples.sum()), "ttfa_s": math.nan}
    row["audio_s"] = row["samples"] / wire.SAMPLE_RATE_HZ
    if len(received):
        row["ttfa_s"] = (int(received[0]) - result.due_ns) / NS_PER_S
    row |= _stalls(result, inside, end_ns)
    if len(samples):
        lateness_s = (received[inside] - result.chunks.sent_at_ns[inside]) / NS_PER_S
        row["lateness_p99_s"] = sample_quantile(lateness_s, 0.99)
        row["first_received_ns"], row["last_received_ns"] = int(received[inside][0]), int(received[inside][-1])
        row["rtf"] = _rtf(received[inside], samples)
    return row


def _rtf(received_ns: np.ndarray, samples: np.ndarray) -> float:
    later_samples = int(samples[1:].sum())
    spread_s = int(received_ns[-1] - received_ns[0]) / NS_PER_S
    return spread_s / (later_samples / wire.SAMPLE_RATE_HZ) if later_samples else math.nan


def _stalls(result: Result, inside: slice, end_ns: int) -> dict[str, float | int]:
    """Longest, total and number of stalls within the window, for each start buffer; without one, those above 50 ms.

    A chunk's lead is its arrival minus the duration of the audio before it. Playback is late by the running maximum of
    the leads and the start buffer; each rise of that maximum is a stall. A stream that ended early waits until its end.
    """
    samples, received = result.chunks.samples[: inside.stop], result.chunks.received_ns[: inside.stop]
    if not len(samples):
        return {}
    arrivals = received - received[0]
    cut_ns = min(result.ended_ns, end_ns)
    if result.outcome != Outcome.DONE or result.ended_ns >= end_ns:
        missing = samples.sum() < result.frames * wire.SAMPLES_PER_FRAME
        if missing and cut_ns > received[-1]:
            arrivals = np.append(arrivals, cut_ns - received[0])
            samples = np.append(samples, 0)
    heard = np.cumsum(samples) - samples
    late = np.maximum.accumulate(arrivals * 3 - heard * _THIRDS_PER_SAMPLE)
    row: dict[str, float | int] = {}
    for name, buffer_s in START_BUFFERS_S.items():
        waits = np.diff(np.maximum(late, int(buffer_s * _THIRDS_PER_S)))[max(inside.start - 1, 0) :]
        row[f"stall_longest_s{name}"] = float(waits.max(initial=0)) / _THIRDS_PER_S
        row[f"stall_total_s{name}"] = float(waits.sum()) / _THIRDS_PER_S
        row[f"stalls{name}"] = int(np.count_nonzero(waits))
        if not buffer_s:
            row["audible_stalls"] = int(np.count_nonzero(waits > AUDIBLE_STALL_S * _THIRDS_PER_S))
    return row


def sessions_in_window(results: Sequence[Result], start_ns: int, end_ns: int) -> float:
    """Mean number of requests between sent and ended in [start_ns, end_ns)."""
    return float(sessions_in_parts(results, start_ns, end_ns, parts=1)[0])


def summarise(results: Sequence[Result], start_ns: int, end_ns: int, slos: Sequence[Slo] = ()) -> Summary:
    """Every metric of [start_ns, end_ns), as plain floats; NaN where undefined.

    Requests *due* in the window count for rates, outcomes and TTFA; streams *served* in it, whenever they started, for
    RTF and continuity; chunks *received* in it for throughput and lateness.
    """
    seconds = (end_ns - start_ns) / NS_PER_S
    served = [result for result in results if _is_of_window(result, start_ns, end_ns)]
    frame = per_request(served, start_ns, end_ns)
    due = frame[(frame["due_ns"] >= start_ns) & (frame["due_ns"] < end_ns)]
    figures = {"seconds": seconds, **_requests_summary(due, frame)}
    figures |= _rates(due, seconds) | _service(served, start_ns, end_ns)
    figures["goodput_per_s"] = _goodput_per_s(served, start_ns, end_ns, slos)
    summary = Summary(**_floats(figures | _steadiness(served, due, start_ns, end_ns)))
    memory_s = steadiness.slowest_memory_s(summary)
    classes = {}
    for name in sorted(set(frame["traffic_class"])):
        own_due, own = due[due["traffic_class"] == name], frame[frame["traffic_class"] == name]
        own_figures = _requests_summary(own_due, own) | _first_audio(own_due, start_ns, end_ns, memory_s)
        classes[name] = ClassSummary(**_floats(own_figures))
    return dataclasses.replace(summary, **_floats(_first_audio(due, start_ns, end_ns, memory_s)), classes=classes)


def _floats(figures: dict[str, float]) -> dict[str, Any]:
    return {key: float(value) for key, value in figures.items()}


def _is_of_window(result: Result, start_ns: int, end_ns: int) -> bool:
    return start_ns <= result.due_ns < end_ns or (result.sent_ns < end_ns and result.ended_ns >= start_ns)


def _requests_summary(due: pd.DataFrame, served: pd.DataFrame) -> dict[str, float]:
    outcomes = due["outcome"].value_counts()
    names = {"done": "done", "errors": "error", "cancelled": "cancelled", "unfinished": "unfinished"}
    summary = {"requests": len(due), **{name: outcomes.get(outcome, 0) for name, outcome in names.items()}}
    stalls = served["stall_longest_s"]
    for quantile in QUANTILES:
        percent = f"p{quantile * 100:.0f}"
        summary[f"ttfa_{percent}_s"] = sample_quantile(begun(due)["ttfa_s"], quantile)
        summary[f"rtf_{percent}"] = sample_quantile(served["rtf"].dropna(), quantile)
        summary[f"stall_{percent}_s"] = sample_quantile(stalls, quantile)
    for name, column, limit_s in (
        ("c50", "", 0.05),
        ("c100", "", 0.1),
        ("c200", "", 0.2),
        ("c100_500ms", "_500ms", 0.1),
        ("c100_2s", "_2s", 0.1),
    ):
        summary[name] = _share(served[f"stall_longest_s{column}"] < limit_s)
    return summary


def begun(requests: pd.DataFrame) -> pd.DataFrame:
    """Requests without sessions found in progress (``start_frame``), whose first audio was long before."""
    return requests[requests["start_frame"] == 0]


def _share(holds: pd.Series) -> float:
    return float(holds.mean()) if len(holds) else math.nan


def _rates(due: pd.DataFrame, seconds: float) -> dict[str, float]:
    delays = due["schedule_delay_s"]
    return {
        "offered_rate_per_s": len(due) / seconds,
        "achieved_rate_per_s": delays.notna().sum() / seconds,
        "offered_audio_s_per_s": due["asked_s"].sum() / seconds,
        "schedule_delay_p99_s": sample_quantile(delays, 0.99),
        "late_sends_share": _share(delays.dropna() > LATE_SEND_S),
    }


def _goodput_per_s(results: Sequence[Result], start_ns: int, end_ns: int, slos: Sequence[Slo]) -> float:
    """Goodput of requests completed in the window, whenever they started: each is judged by its whole stream."""
    whole = [each for each in results if each.outcome == Outcome.DONE and start_ns <= each.ended_ns < end_ns]
    if not slos:
        return len(whole) / ((end_ns - start_ns) / NS_PER_S)
    return goodput_per_s(slos, per_request(whole), (end_ns - start_ns) / NS_PER_S)


def _service(results: Sequence[Result], start_ns: int, end_ns: int) -> dict[str, float]:
    seconds = (end_ns - start_ns) / NS_PER_S
    chunks = _chunk_columns(results, start_ns, end_ns)
    lateness_s = (chunks["received_ns"] - chunks["sent_at_ns"]) / NS_PER_S
    frames_per_s = chunks["samples"].sum() / wire.SAMPLES_PER_FRAME / seconds
    sessions = sessions_in_window(results, start_ns, end_ns)
    ended = [result for result in results if result.sent_ns > 0 and result.ended_ns < end_ns]
    whole = sum(result.outcome == Outcome.DONE for result in ended)
    residence_s = np.mean([result.ended_ns - result.sent_ns for result in ended]) / NS_PER_S if ended else math.nan
    return {
        "completed_rate_per_s": whole / seconds,
        "delivered_audio_s_per_s": frames_per_s * wire.SECONDS_PER_FRAME,
        "lateness_p99_s": sample_quantile(lateness_s, 0.99),
        "sessions": sessions,
        "frames_per_s": frames_per_s,
        "step_s": sessions / frames_per_s if frames_per_s else math.nan,
        "residence_s": residence_s,
    }


def _steadiness(results: Sequence[Result], due: pd.DataFrame, start_ns: int, end_ns: int) -> dict[str, float]:
    step_rise, step_error = steadiness.step_rise(results, start_ns, end_ns)
    due_s, seconds = (due["due_ns"].to_numpy() - start_ns) / NS_PER_S, (end_ns - start_ns) / NS_PER_S
    return {
        **steadiness.OpenSessions(results, start_ns, end_ns).figures(),
        "load_rise": steadiness.load_rise(due_s, seconds),
        "step_rise": step_rise,
        "step_rise_error": step_error,
        "impossible": sum(map(_is_impossible, results)),
    }


def _is_impossible(result: Result) -> bool:
    spoke_ns = result.chunks.received_ns[0] if len(result.chunks) else result.sent_ns
    return 0 < result.sent_ns and min(result.ended_ns, spoke_ns) < result.sent_ns


def _first_audio(due: pd.DataFrame, start_ns: int, end_ns: int, memory_s: float) -> dict[str, float]:
    """TTFA over the window. A request still waiting at its end counts with its wait so far."""
    due = begun(due)
    waited_s = (due["ended_ns"].clip(upper=end_ns) - due["due_ns"]) / NS_PER_S
    waits = (due["outcome"] == str(Outcome.UNFINISHED)) & (due["sent_ns"] > 0)
    ttfa_s = due["ttfa_s"].fillna(waited_s.where(waits)).to_numpy(dtype=float)
    due_s, known = ((due["due_ns"] - start_ns) / NS_PER_S).to_numpy(), np.isfinite(ttfa_s)
    rise_s, error_s = steadiness.ttfa_rise(due_s[known], ttfa_s[known], (end_ns - start_ns) / NS_PER_S, memory_s)
    return {
        "ttfa_span_s": np.ptp(ttfa_s[known]) if known.any() else math.nan,
        "ttfa_mean_s": ttfa_s[known].mean() if known.any() else math.nan,
        "ttfa_rise_s": rise_s,
        "ttfa_rise_error_s": error_s,
    }


def rising_p_value(values: Sequence[float] | np.ndarray) -> float:
    """p-value of the Mann-Kendall test that ``values`` rise with their order; NaN for fewer than 8, 1 if equal."""
    from scipy.stats import kendalltau  # a second of CPU, and needed at the end only

    values = np.asarray(values, dtype=float)
    if len(values) < MIN_PARTS:
        return math.nan
    p_value = kendalltau(np.arange(len(values)), values, alternative="greater").pvalue
    return 1.0 if math.isnan(p_value) else float(p_value)


def warm_up_end(values: Sequence[float] | np.ndarray) -> int:
    """MSER-5: how many of ``values`` to cut from the start (White 1997); a multiple of 5, at most half of them.

    Batches of five; the cut minimises (variance of what is left) / (number of batches left).
    """
    batches = np.asarray(values[: len(values) // 5 * 5], dtype=float).reshape(-1, 5).mean(axis=1)
    scores = [batches[cut:].var() / (len(batches) - cut) for cut in range(len(batches) // 2 + 1) if len(batches)]
    return 5 * int(np.argmin(scores)) if scores else 0


def settled_ns(results: Sequence[Result], start_ns: int, end_ns: int) -> int:
    """When the number of sessions has settled: the end of its warm-up by MSER-5, independent of times to first audio.

    ``start_ns`` if the window is shorter than 8 memories of the number of sessions, too short to tell.
    """
    served = [result for result in results if _is_of_window(result, start_ns, end_ns)]
    memory_s = steadiness.OpenSessions(served, start_ns, end_ns).memory_s
    if (end_ns - start_ns) / NS_PER_S < MIN_PARTS * memory_s:
        return start_ns
    cut = warm_up_end(sessions_in_parts(results, start_ns, end_ns, WARM_UP_PARTS))
    return start_ns + (end_ns - start_ns) * cut // WARM_UP_PARTS


def steps_in_parts(results: Sequence[Result], start_ns: int, end_ns: int, parts: int) -> np.ndarray:
    """Mean time per frame and stream (s) in each of ``parts`` equal parts of the window: float [parts], NaN if idle."""
    chunks = _chunk_columns(results, start_ns, end_ns)
    edges = np.linspace(0, end_ns - start_ns, parts + 1)
    samples = np.histogram(chunks["received_ns"] - start_ns, edges, weights=chunks["samples"])[0]
    frames = samples / wire.SAMPLES_PER_FRAME
    session_s = sessions_in_parts(results, start_ns, end_ns, parts) * np.diff(edges) / NS_PER_S
    return np.divide(session_s, frames, out=np.full(parts, math.nan), where=frames > 0)


def _chunk_columns(results: Sequence[Result], start_ns: int, end_ns: int) -> dict[str, np.ndarray]:
    """The chunks received in the window, of all results concatenated."""
    names = ("received_ns", "sent_at_ns", "samples")
    empty = np.empty(0, dtype=np.int64)
    columns = {name: np.concatenate([empty, *(getattr(r.chunks, name) for r in results)]) for name in names}
    inside = (columns["received_ns"] >= start_ns) & (columns["received_ns"] < end_ns)
    return {name: column[inside] for name, column in columns.items()}


def sessions_in_parts(results: Sequence[Result], start_ns: int, end_ns: int, parts: int) -> np.ndarray:
    """Mean number of requests between sent and ended in each of ``parts`` equal parts of the window: float [parts]."""
    times = np.array([(r.sent_ns, r.ended_ns) for r in results if r.sent_ns > 0], dtype=np.int64).reshape(-1, 2)
    edges = np.linspace(0, end_ns - start_ns, parts + 1)
    sent, ended = (times - start_ns).astype(float).T
    # session time of every request up to each edge
    served = np.clip(edges[:, None] - sent, 0, np.maximum(ended - sent, 0)).sum(axis=1)
    return np.diff(served) / np.diff(edges)
