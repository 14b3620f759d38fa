"""Stand-alone plots with a title and a legend, for notebooks: those of the report, and others in more detail."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from harness import wire
from harness.capacity.fitting.rate_search import SimulatedLoad
from harness.capacity.models.scaling import Scaling
from harness.capacity.models.steps import StepTime
from harness.errors import InconclusiveError
from harness.records.fit import FittedDeployment, FittedScaling, fitted
from harness.records.metrics import begun, sessions_in_parts
from harness.records.plan import Plan
from harness.records.schema import Outcome, Result
from harness.records.slo import Slo
from harness.records.store import Run
from harness.report import figures, words
from harness.report.facts import SweptDeployment
from harness.report.figures import BEST_COLOUR, LIMIT_COLOUR, OTHER_COLOURS, REST_COLOUR

_AXIS_TITLES = {"ttfa_s": "time to first audio, s", "rtf": "real-time factor", "stall_longest_s": "longest stall, s"}
_PARTS = 120


def stand_alone(figure: go.Figure, title: str) -> go.Figure:
    """A figure of the report with a title and a legend, readable without the page."""
    shown = go.Figure(figure)
    shown.update_layout(
        template="plotly_white", title={"text": title, "x": 0.02, "font": {"size": 17}}, showlegend=True, width=None
    )
    shown.update_layout(margin={"l": 60, "r": 30, "t": 70, "b": 50}, legend={"font": {"size": 11}})
    shown.update_layout(height=max(figure.layout.height or 0, 400), paper_bgcolor="white", plot_bgcolor="white")
    shown.update_xaxes(fixedrange=False, showgrid=True)
    shown.update_yaxes(fixedrange=False, showgrid=True)
    return shown


def playback(result: Result) -> go.Figure:
    """One stream: audio received against time, and the listener's playback, which starts with the first audio."""
    at_s = (result.chunks.received_ns - result.due_ns) / 1e9
    heard_s = np.cumsum(result.chunks.samples) / wire.SAMPLE_RATE_HZ
    figure = _figure("seconds since the request was due", "seconds of audio")
    figure.add_scatter(x=at_s, y=heard_s, name="audio received", line={"color": BEST_COLOUR, "width": 3, "shape": "hv"})
    plays_s = [at_s[0], at_s[0] + heard_s[-1]]
    figure.add_scatter(
        x=plays_s, y=[0, heard_s[-1]], name="audio heard", mode="lines", line={"color": REST_COLOUR, "dash": "dash"}
    )
    first = f"first audio after {words.milliseconds(at_s[0])}"
    figure.add_vline(x=at_s[0], line={"color": LIMIT_COLOUR, "dash": "dot"}, annotation={"text": first})
    return stand_alone(
        figure, f"One {result.traffic_class} request, chunk by chunk: received above heard means no stall"
    )


def distribution(requests: pd.DataFrame, metric: str, slos: Sequence[Slo]) -> go.Figure:
    """Share of requests of each class with at most a value of ``metric``; a cross marks each SLO.

    Requests that failed count as violations, so their class's line stays below 100%.
    """
    figure = _figure(_AXIS_TITLES[metric], "share of requests with at most that", rangemode="tozero")
    requests = begun(requests) if metric == "ttfa_s" else requests
    for number, (name, own) in enumerate(requests.groupby("traffic_class")):
        colour = (BEST_COLOUR, *OTHER_COLOURS)[number % (1 + len(OTHER_COLOURS))]
        failed = own["outcome"] == Outcome.ERROR
        values = np.sort(own.loc[~failed, metric].dropna())
        count = len(values) + int(failed.sum())
        shares = np.arange(1, len(values) + 1) / max(count, 1)
        label = f"{name}: {words.plural(count, 'request')}" + (f", {failed.sum()} failed" if failed.any() else "")
        figure.add_scatter(x=values, y=shares, name=label, line={"color": colour, "width": 2.5, "shape": "hv"})
        own_slos = [each for each in slos if (each.traffic_class, each.metric) == (name, metric)]
        figure.add_scatter(
            x=[each.limit for each in own_slos],
            y=[each.quantile for each in own_slos],
            name=f"{name}: SLO",
            mode="markers",
            marker={"color": colour, "symbol": "x", "size": 13},
        )
    figure.update_yaxes(tickformat=".0%", range=[0, 1.03])
    what = _AXIS_TITLES[metric].partition(",")[0].capitalize()
    return stand_alone(figure, f"{what}: an SLO is met where the line passes above its cross")


def sessions(run: Run, trial_ids: Iterable[str]) -> go.Figure:
    """Requests in progress over the time of each trial."""
    figure = _figure("seconds since the first request was due", "requests in progress")
    for trial_id in trial_ids:
        results = run.results(trial_id)
        start_ns = min(result.due_ns for result in results)
        end_ns = max(result.ended_ns for result in results)
        at_s = np.linspace(0, (end_ns - start_ns) / 1e9, _PARTS + 1)[:-1]
        figure.add_scatter(
            x=at_s, y=sessions_in_parts(results, start_ns, end_ns, _PARTS), name=trial_id, line={"shape": "hv"}
        )
    return stand_alone(figure, "How many requests were in progress")


def host(samples: pd.DataFrame) -> go.Figure:
    """CPU use of the host over a trial; ``samples`` as ``tables.samples`` returns them."""
    figure = _figure("seconds", "CPU of the host, %")
    figure.add_scatter(x=samples["at_s"], y=samples["cpu_percent"], name="CPU", line={"color": BEST_COLOUR})
    figure.update_yaxes(range=[0, 105])
    return stand_alone(figure, "How busy the host was")


def step_time(entry: SweptDeployment) -> go.Figure:
    """Measured frame steps of a deployment with their interval, and the fitted curve, slightly extrapolated."""
    fit = fitted(_fit_of(entry).step_time)
    step, most = StepTime.of_record(fit), fit.max_sessions
    figure = _figure("sessions at once", "frame step, ms")
    for label, n, dash in (
        ("fitted", np.linspace(1, most, 80), "solid"),
        ("extrapolated", np.linspace(most, 1.5 * most, 20), "dot"),
    ):
        line = {"color": BEST_COLOUR, "width": 3, "dash": dash}
        figure.add_scatter(x=n, y=1000 * step(n), name=label, mode="lines", line=line)
    measured = pd.DataFrame([asdict(point) for point in fit.points]) * [1, 1000, 1000, 1000]
    figure.add_scatter(
        x=measured["sessions"],
        y=measured["step_s"],
        name="measured, with 95% band",
        mode="markers",
        marker={"color": OTHER_COLOURS[0], "size": 9},
        error_y={
            "array": measured["high_s"] - measured["step_s"],
            "arrayminus": measured["step_s"] - measured["low_s"],
        },
    )
    _real_time(figure)
    return stand_alone(figure, f"Frame step against sessions, deployment {entry.label}")


def scaling(entry: SweptDeployment) -> go.Figure:
    """Frames/s against sessions with the fitted Universal Scalability Law; dotted where extrapolated."""
    fit = _fit_of(entry).scaling
    figure = _figure("sessions at once", "frames per second")
    figure.add_scatter(
        x=[point.sessions for point in entry.points],
        y=[point.frames_per_s for point in entry.points],
        name="measured",
        mode="markers",
        marker={"color": OTHER_COLOURS[0], "size": 9},
    )
    if isinstance(fit, FittedScaling):
        law = Scaling.of_record(fit)
        for label, low, high, dash in (
            ("fitted", 0.0, law.largest_measured, "solid"),
            ("extrapolated", law.largest_measured, 1.5 * law.largest_measured, "dot"),
        ):
            n = np.linspace(low, high, 80)
            line = {"color": BEST_COLOUR, "width": 3, "dash": dash}
            figure.add_scatter(x=n, y=law.throughput_at_concurrency(n), name=label, mode="lines", line=line)
    return stand_alone(figure, f"Throughput against sessions, deployment {entry.label}")


def _fit_of(entry: SweptDeployment) -> FittedDeployment:
    if entry.fit is None:
        raise InconclusiveError(f"deployment {entry.label} has no fit: it has no VALID ladder, or was not fitted yet")
    return entry.fit


def slos_by_rate(loads: Sequence[SimulatedLoad]) -> go.Figure:
    """Each SLO's limit utilisation against the rate of one device; above 1 the SLO is violated."""
    figure = _figure("requests per second on one device", "value / limit")
    for name in loads[0].shares:
        shares = [min(load.shares[name], 3.0) for load in loads]
        figure.add_scatter(
            x=[load.rate_per_s for load in loads], y=shares, name=words.metric(name), mode="lines+markers"
        )
    limit = {"text": "limit", "font": {"color": LIMIT_COLOUR}}
    figure.add_hline(y=1, line={"color": LIMIT_COLOUR, "dash": "dot"}, annotation=limit)
    figure.update_yaxes(range=[0, 2])
    return stand_alone(figure, "SLO limit utilisation (simulated)")


def devices(plan: Plan, rates_per_s: Sequence[float] = (), counts: Sequence[int] = ()) -> go.Figure:
    """Devices for each target rate with their interval; ``counts`` at ``rates_per_s`` as a line between them."""
    known = [(each.qps, each.devices, each.interval) for each in plan.targets if each.devices is not None]
    counted = [count for _, count, _ in known]
    figure = _figure("requests per second", "devices", rangemode="tozero")
    if len(rates_per_s):
        line = {"color": REST_COLOUR, "shape": "vh"}
        figure.add_scatter(x=rates_per_s, y=counts, name="fewest devices (simulated)", mode="lines", line=line)
    figure.add_scatter(
        x=[qps for qps, _, _ in known],
        y=counted,
        name=f"planned, with {words.level(plan.confidence)} interval",
        mode="markers",
        marker={"color": BEST_COLOUR, "size": 11},
        error_y={
            "array": [(high or count) - count for _, count, (_, high) in known],
            "arrayminus": [count - (low or count) for _, count, (low, _) in known],
        },
    )
    return stand_alone(figure, f"Devices for each rate. One device is {plan.unit}")


def surge(plan: Plan, name: str) -> go.Figure:
    """One surge of plan.json's ``behaviour``: the share of callers whose SLOs are met, by arrival time."""
    rows = [row for row in (plan.behaviour.surges if plan.behaviour else ()) if row.surge == name]
    colours = dict(zip((row.admission for row in rows), figures.ADMISSION_COLOURS, strict=False))
    drawn = figures.surge(rows, colours)
    drawn.update_yaxes(title={"text": "requests that meet their SLOs"})
    return stand_alone(drawn, f"{name.capitalize()} (simulated): share of requests that meet their SLOs")


def stage_times(entry: SweptDeployment) -> go.Figure:
    """Stacked time of a frame at each number of sessions of a deployment."""
    bars = figures.stage_time(entry, figures.stage_time_top_ms([entry]))
    bars.update_yaxes(title={"text": "ms of one frame"})
    return stand_alone(bars, f"Where a frame's time went, deployment {entry.label}")


def _real_time(figure: go.Figure) -> None:
    text = {"text": "133 ms: slower than speech", "font": {"color": LIMIT_COLOUR}}
    figure.add_hline(y=figures.REAL_TIME_MS, line={"color": LIMIT_COLOUR, "dash": "dot"}, annotation=text)


def _figure(x_title: str, y_title: str, **axis) -> go.Figure:
    figure = go.Figure()
    figure.update_xaxes(title={"text": x_title}, **axis)
    figure.update_yaxes(title={"text": y_title}, rangemode="tozero")
    return figure
