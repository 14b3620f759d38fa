"""The summary of a window: every metric with its formula and unit, of all requests and of each traffic class."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.content import Figure, read

_FORMULA, _UNIT, _NOTE = "formula", "unit", "note"
_TTFA = "first chunk received - due", "s", "requests due in the window; no audio counts as infinitely late"
_RTF = "(last - first chunk) / audio after the first", "1", "chunks in the window; below 1 = in time"
_STALL = "longest wait of playback for audio", "s", "no start buffer; no audio = longer than any"
QUANTILE_FIELDS = {"ttfa_s": "ttfa_p{}_s", "rtf": "rtf_p{}", "stall_longest_s": "stall_p{}_s"}
"""Names of the fields that hold a metric's quantiles, by metric; ``{}``: the percent."""


@dataclass(frozen=True)
class Metric:
    """One field of a summary. With ``per_class``, every class has it, too."""

    name: str
    formula: str
    unit: str
    note: str
    per_class: bool = False


def metric(formula: str, unit: str, note: str = "") -> Any:
    """The field of a metric; NaN where it is unknown, or newer than the stored summary."""
    return field(default=math.nan, metadata={_FORMULA: formula, _UNIT: unit, _NOTE: note})


def quantile_field(metric: str, quantile: float) -> str:
    """The field that holds a quantile of a metric of requests, such as "ttfa_p95_s"."""
    return QUANTILE_FIELDS[metric].format(f"{quantile * 100:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassSummary:
    """The metrics of the requests of one traffic class, or of all requests."""

    requests: Figure = metric("count of requests due in the window", "1")
    done: Figure = metric("count of them that completed", "1", "by the end of the window")
    errors: Figure = metric("count of them that failed", "1")
    cancelled: Figure = metric("count of them that the client cancelled", "1")
    unfinished: Figure = metric("count of them still running at the end of the window", "1", "censored")
    ttfa_p50_s: Figure = metric(*_TTFA)
    ttfa_p95_s: Figure = metric(*_TTFA)
    ttfa_p99_s: Figure = metric(*_TTFA)
    rtf_p50: Figure = metric(*_RTF)
    rtf_p95: Figure = metric(*_RTF)
    rtf_p99: Figure = metric(*_RTF)
    stall_p50_s: Figure = metric(*_STALL)
    stall_p95_s: Figure = metric(*_STALL)
    stall_p99_s: Figure = metric(*_STALL)
    ttfa_span_s: Figure = metric("largest - smallest TTFA", "s", "no audio yet = as long as it waited")
    ttfa_mean_s: Figure = metric("mean TTFA", "s", "of the same")
    ttfa_rise_s: Figure = metric("rise of a line fitted to TTFA by due", "s", "over the window, in 8 to 50 parts")
    ttfa_rise_error_s: Figure = metric("standard error of ttfa_rise_s", "s", "parts longer than the memory")
    c50: Figure = metric(
        "share of streams whose longest stall is under 50 ms", "1", "without audio counts as not continuous"
    )
    c100: Figure = metric("share of streams whose longest stall is under 100 ms", "1")
    c200: Figure = metric("share of streams whose longest stall is under 200 ms", "1")
    c100_500ms: Figure = metric("share of streams with stalls under 100 ms", "1", "start buffer of 0.5 s")
    c100_2s: Figure = metric("share of streams with stalls under 100 ms", "1", "start buffer of 2 s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary(ClassSummary):
    """Every metric of a window, of all its requests; ``classes``: of each traffic class that was in it."""

    seconds: Figure = metric("window end - window start", "s")
    offered_rate_per_s: Figure = metric("requests due in the window / seconds", "1/s")
    achieved_rate_per_s: Figure = metric("those of them that were sent / seconds", "1/s")
    completed_rate_per_s: Figure = metric("requests done in the window / seconds", "1/s")
    goodput_per_s: Figure = metric("completed requests that met every SLO of their class / seconds", "1/s")
    offered_audio_s_per_s: Figure = metric(
        "audio seconds requested by requests due in the window / seconds", "1", "offered load"
    )
    delivered_audio_s_per_s: Figure = metric("audio seconds received in the window / seconds", "1", "audio throughput")
    schedule_delay_p99_s: Figure = metric(
        "p99 of sent - due", "s", "an error of the client; requests due in the window"
    )
    late_sends_share: Figure = metric("share of sends later than 5 ms", "1", "requests due in the window")
    lateness_p99_s: Figure = metric(
        "p99 of chunk received - server's sent_at", "s", "all chunks of the window; same host"
    )
    sessions: Figure = metric("mean number of requests between sent and ended", "1")
    frames_per_s: Figure = metric("frames received in the window / seconds", "1/s")
    step_s: Figure = metric("sessions / frames per second", "s", "mean time per frame and stream")
    residence_s: Figure = metric("mean of ended - sent", "s", "requests that ended in the window")
    memory_s: Figure = metric("E[R^2] / E[R] of the residence R", "s", "correlation time of the number of sessions")
    littles_residual: Figure = metric(
        "(ages of sessions open at the end - mean) / (N x seconds)", "1", "0 in steady state"
    )
    littles_error: Figure = metric("its standard deviation in steady state", "1")
    sessions_rise: Figure = metric("rise of a line fitted to the number of sessions", "1", "over its seconds")
    sessions_rise_seconds: Figure = metric("time that the line is fitted to", "s", "half of a window that begins empty")
    sessions_variance: Figure = metric("variance of the number of sessions about that line", "1")
    lengths_cv2: Figure = metric("variance / mean^2 of the frames requested", "1")
    load_rise: Figure = metric("12 x (mean of due / window - 1/2)", "1", "share by which the rate of arrivals rose")
    step_rise: Figure = metric("rise of the time from chunk to chunk / its mean", "1", "at an equal number of streams")
    step_rise_error: Figure = metric("standard error of step_rise", "1", "includes correlation of neighbours")
    impossible: Figure = metric(
        "count of requests that ended, or received audio, before they were sent", "1", "0 in true records"
    )
    classes: Mapping[str, ClassSummary] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Mapping[str, float | None]) -> Summary:
        """Read its content, which is flat: ``<class>.<name>`` is a figure of a class. Names of earlier versions that no
        metric has now are ignored. Raises ValueError."""
        own: dict[str, Any] = {}
        classes: dict[str, dict[str, float | None]] = {}
        for name, value in content.items():
            traffic_class, _, figure = name.rpartition(".")
            (classes.setdefault(traffic_class, {}) if traffic_class else own)[figure] = value
        return read(cls, own | {"classes": classes})

    def to_dict(self) -> dict[str, float]:
        """The content: flat, as it is stored."""
        figures = {each.name: float(getattr(self, each.name)) for each in METRICS}
        for name, own in self.classes.items():
            figures |= {f"{name}.{each.name}": float(getattr(own, each.name)) for each in METRICS if each.per_class}
        return figures

    def figure(self, name: str) -> float:
        """The figure of this name in plans: ``<class>.<name>``, or the name alone; NaN where there is none."""
        traffic_class, _, figure = name.rpartition(".")
        of = self.classes.get(traffic_class) if traffic_class else self
        return getattr(of, figure, math.nan)

    def quantile(self, traffic_class: str, metric: str, quantile: float) -> float:
        """A quantile of a metric of a class's requests; NaN where there is none."""
        return getattr(self.classes.get(traffic_class), quantile_field(metric, quantile), math.nan)


def _metrics() -> Iterator[Metric]:
    of_class = {each.name for each in dataclasses.fields(ClassSummary)}
    for each in dataclasses.fields(Summary):
        if _FORMULA in each.metadata:
            yield Metric(each.name, **each.metadata, per_class=each.name in of_class)


METRICS = tuple(_metrics())
"""Every figure of a summary."""
