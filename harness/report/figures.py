"""The plots of the sign-off document, one function each; the page sets colours of text and grid, light or dark."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

import plotly.graph_objects as go

from harness import wire
from harness.records.fit import FittedStage, UnfittedStage
from harness.records.plan import SurgeRow, ValidationRow
from harness.records.slo import Slo
from harness.report import words
from harness.report.facts import Point, SweptDeployment, stages_shown

REAL_TIME_MS = 1000 * wire.SECONDS_PER_FRAME
# Hues that colour-blind readers can tell apart, of medium brightness to suit both white and near-black.
BEST_COLOUR = "#2b7fc3"
OTHER_COLOURS = ("#c2622d", "#1b9a77", "#a9639f", "#8d8423", "#7a7f87", "#4f9bb5", "#b5566b")
SYMBOLS = ("square", "diamond", "triangle-up", "x", "star", "triangle-down", "pentagon")
LIMIT_COLOUR = "#c8453a"
REST_COLOUR = "#9097a1"
_RESULTS = (
    (True, "passed", BEST_COLOUR, "circle"),
    (False, "failed", LIMIT_COLOUR, "x"),
    (None, "not decidable", REST_COLOUR, "circle-open"),
)
ADMISSION_COLOURS = ("#c2622d", "#8d8423", "#2b7fc3")  # in the order of the admission policies in plan.json
STAGE_COLOURS = {wire.LLM: "#2b7fc3", wire.DIFFUSION: "#d07c2a", wire.VOCODER: "#1b9a77", wire.ENGINE: "#6a5acd"}


class Mark(NamedTuple):
    """One point of a deployment's line."""

    valid: bool
    x: float
    y_ms: float
    hover: str


def style(swept: Sequence[SweptDeployment]) -> dict[str, tuple[str, str]]:
    """Colour and marker symbol by letter; the best deployment has its own, the others rotate through the rest."""
    others = [entry.letter for entry in swept if not entry.best]
    turns = {
        letter: (OTHER_COLOURS[i % len(OTHER_COLOURS)], SYMBOLS[i % len(SYMBOLS)]) for i, letter in enumerate(others)
    }
    return {entry.letter: turns.get(entry.letter, (BEST_COLOUR, "circle")) for entry in swept}


def throughput_latency(swept: Sequence[SweptDeployment]) -> go.Figure:
    """Step time against audio delivered per second: one line per deployment, every rung a point."""
    figure = empty_figure("audio delivered, seconds per second", "step time, ms per frame", height=430, right=34)
    look, ends = style(swept), {}
    top_ms = 1.12 * _highest_step_ms(swept)
    for entry in _best_last(swept):
        for repeat, points in enumerate(_ladders(entry.points)):
            marks = [Mark(each.valid, each.audio_s_per_s, 1000 * each.step_s, _point_words(each)) for each in points]
            _line(figure, entry, look[entry.letter], marks, repeat)
            ends.setdefault(entry.letter, marks[-1])
    limit_line(figure, REAL_TIME_MS, "real time: 133 ms a frame")
    _letters(figure, ends, top_ms)
    return figure


def stage_time(entry: SweptDeployment, top_ms: float) -> go.Figure:
    """Stacked time of a frame at each number of sessions, on a scale that all deployments share."""
    figure = empty_figure("sessions", "", height=270)
    points = [point for point in entry.points if point.stages]
    places = list(range(len(points)))  # two points with equal numbers of sessions are drawn side by side
    for name in stages_shown(share for point in points for share in point.stages):
        colour = STAGE_COLOURS[name]
        for part in ("compute", "queue"):
            times_ms = [1000 * _seconds(point, name, part) for point in points]
            figure.add_bar(
                x=places,
                y=times_ms,
                name=f"{words.stage(name)} {part}",
                marker=bar_marker(colour, hatched=part == "queue"),
                hovertemplate=f"{words.stage(name)} {part}: %{{y:.2f}} ms<extra></extra>",
            )
    figure.add_bar(
        x=places,
        y=[1000 * (point.hop_s or 0.0) for point in points],
        name="hop",
        marker=bar_marker(REST_COLOUR),
        hovertemplate="hop (the rest): %{y:.2f} ms<extra></extra>",
    )
    limit_line(figure, REAL_TIME_MS, "133 ms")
    figure.update_layout(barmode="stack", bargap=0.28)
    figure.update_xaxes(tickvals=places, ticktext=[words.figure(point.sessions, 2) for point in points])
    figure.update_yaxes(range=[0, top_ms], ticksuffix=" ms", showticksuffix="last")
    return figure


def stage_time_top_ms(swept: Sequence[SweptDeployment]) -> float:
    return 1.15 * _highest_step_ms(swept)


def service_time(stage: str, swept: Sequence[SweptDeployment]) -> go.Figure:
    """Compute time of one batch against its size: points of every deployment, and each one's fitted line."""
    figure = empty_figure("batch size", "", height=270)
    look = style(swept)
    for entry in _best_last(swept):
        fit = stage_fit(entry, stage)
        if fit is None:
            continue
        colour, symbol = look[entry.letter]
        batches = [point.batch_size for point in fit.points]
        _service_points(figure, entry, fit, colour, symbol)
        if isinstance(fit, FittedStage) and batches:
            ends = [min(batches), max(batches)]
            figure.add_scatter(
                x=ends,
                y=[1000 * (fit.alpha_s * batch + fit.tau0_s) for batch in ends],
                name=f"{entry.letter}, fitted",
                showlegend=False,
                mode="lines",
                line={"color": colour, "width": 2.6 if entry.best else 1.1},
                opacity=1 if entry.best else 0.75,
                hoverinfo="skip",
            )
    figure.update_yaxes(rangemode="tozero", ticksuffix=" ms", showticksuffix="last")
    return figure


def stage_fit(entry: SweptDeployment, stage: str) -> FittedStage | UnfittedStage | None:
    """The stored batch service-time fit of one stage of a deployment, or None."""
    fits = entry.fit.stages if entry.fit else ()
    return next((fit for fit in fits if fit.stage == stage), None)


def has_service_points(swept: Sequence[SweptDeployment], stage: str) -> bool:
    """Whether executions of a stage by batch size were counted on any deployment."""
    return any(fit is not None and fit.points for fit in (stage_fit(entry, stage) for entry in swept))


def first_audio(swept: Sequence[SweptDeployment], slos: Sequence[Slo]) -> go.Figure:
    """Time to first audio against sessions: medians of every deployment, the 95th percentile of the best."""
    figure = empty_figure("sessions", "first audio, ms", height=400, right=34)
    look, ends, limits = style(swept), {}, _first_audio_limits(slos)
    highest_s = [limit_s for limit_s, _ in limits]
    for entry in _best_last(swept):
        heard = [point for point in entry.points if point.first_audio_count]
        highest_s += [_known_s(each.first_audio_p95_s if entry.best else each.first_audio_p50_s) for each in heard]
        for repeat, points in enumerate(_ladders(heard)):
            marks = [_heard_mark(point) for point in points]
            _line(figure, entry, look[entry.letter], marks, repeat)
            ends.setdefault(entry.letter, marks[-1])
            if entry.best:
                _p95_line(figure, entry, points, repeat)
    for limit_s, classes in limits:
        limit_line(figure, 1000 * limit_s, f"SLO, {safe(classes)}: {words.figure(1000 * limit_s)} ms")
    _letters(figure, ends, top_ms=1.12 * 1000 * max(highest_s))
    return figure


def _known_s(seconds: float | None) -> float:
    """A quantile of TTFA; NaN, which figures leave out, where there is none."""
    return math.nan if seconds is None else seconds


def _heard_mark(point: Point) -> Mark:
    counted = words.plural(point.first_audio_count, "request")
    return Mark(point.valid, point.sessions, 1000 * _known_s(point.first_audio_p50_s), f"median of {counted}")


def _ladders(points: Sequence[Point]) -> list[list[Point]]:
    """The points of each trial, by sessions. A deployment measured twice has two separate curves."""
    return [[each for each in points if each.trial_id == name] for name in dict.fromkeys(p.trial_id for p in points)]


def _p95_line(figure: go.Figure, entry: SweptDeployment, heard: list[Point], repeat: int) -> None:
    figure.add_scatter(
        x=[point.sessions for point in heard],
        y=[1000 * _known_s(point.first_audio_p95_s) for point in heard],
        name=f"{entry.letter}, 95th percentile",
        mode="lines",
        line={"color": BEST_COLOUR, "width": 1.2 if repeat else 2, "dash": "dash"},
        hovertemplate=f"{entry.letter}, 95th percentile: %{{y:.0f}} ms<extra></extra>",
    )


def prediction(validation: Sequence[ValidationRow]) -> go.Figure:
    """Relative error of each prediction, with its limit as a band: one group per metric, one row per prediction."""
    rows = [row for row in validation if words.known(row.relative_error)]
    lanes, ticks = _lanes(rows)
    figure = empty_figure("error of the prediction", "", height=round(90 + 17 * (max(lanes) + 1)))
    for lane, row in zip(lanes, rows, strict=True):
        _band(figure, lane, 100 * row.limit)
    for passed, said, colour, symbol in _RESULTS:
        shown = [(lane, row) for lane, row in zip(lanes, rows, strict=True) if row.passed is passed]
        figure.add_scatter(
            x=[100 * signed_error(row) for _, row in shown],
            y=[lane for lane, _ in shown],
            name=said,
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 10},
            customdata=[f"{words.figure(row.rate_per_s)} requests/s" for _, row in shown],
            hovertemplate=f"%{{customdata}}: %{{x:+.1f}}%, {said}<extra></extra>",
        )
    reach = 112 * max([row.limit for row in rows] + [abs(signed_error(row)) for row in rows])
    figure.update_xaxes(range=[-reach, reach], ticksuffix="%", zeroline=True)
    figure.update_yaxes(tickvals=list(ticks.values()), ticktext=[safe(name) for name in ticks], showgrid=False)
    figure.update_yaxes(range=[max(lanes) + 1, -1])
    return figure


def surge(rows: Sequence[SurgeRow], colours: dict[str, str]) -> go.Figure:
    """Share of callers whose SLOs are met, by arrival time: one line per admission policy.

    ``rows``: those of one surge in plan.json's ``behaviour``; ``colours`` by admission. The grey band is the surge.
    """
    figure = empty_figure("minutes since it began", "", height=230)
    for row in rows:
        share = [None if share is None else 100 * share for share in row.parts.within_slos]
        figure.add_scatter(
            x=_middles_min(row.parts.at_s),
            y=share,
            name=row.admission,
            mode="lines",
            line={"color": colours[row.admission], "width": 2.2},
            hovertemplate=f"{safe(row.admission)}: %{{y:.0f}}% at %{{x:.0f}} min<extra></extra>",
        )
    band = {"x0": 0, "x1": rows[0].lasts_s / 60, "y0": 0, "y1": 100}
    figure.add_shape(type="rect", **band, fillcolor=REST_COLOUR, opacity=0.18, line_width=0, layer="below")
    figure.update_yaxes(range=[0, 104], ticksuffix="%")
    figure.update_xaxes(rangemode="normal")
    return figure


def _middles_min(begins_s: Sequence[float]) -> list[float]:
    """The middle of each interval, in minutes; all intervals have the same length."""
    half_s = (begins_s[1] - begins_s[0]) / 2 if len(begins_s) > 1 else 0.0
    return [(begin_s + half_s) / 60 for begin_s in begins_s]


def _lanes(rows: Sequence[ValidationRow]) -> tuple[list[float], dict[str, float]]:
    """The height of each row, with rows of one metric together, and the middle height of each metric by its name."""
    names = [words.metric_briefly(row.metric) for row in rows]
    lanes, ticks, height = [0.0] * len(rows), {}, 0.0
    for name in dict.fromkeys(names):
        members = [place for place, other in enumerate(names) if other == name]
        for place in members:
            lanes[place] = height
            height += 1
        ticks[name] = (lanes[members[0]] + lanes[members[-1]]) / 2
        height += 0.9
    return lanes, ticks


def _band(figure: go.Figure, lane: float, limit: float) -> None:
    edges = {"x0": -limit, "x1": limit, "y0": lane - 0.5, "y1": lane + 0.5}
    figure.add_shape(type="rect", **edges, fillcolor=BEST_COLOUR, opacity=0.16, line_width=0, layer="below")


def signed_error(row: ValidationRow) -> float:
    """The stored relative error; positive where the prediction exceeds the measurement."""
    if row.relative_error is None or row.predicted is None or row.measured is None:
        return math.nan
    return math.copysign(abs(row.relative_error), row.predicted - row.measured)


def empty_figure(x_title: str, y_title: str, height: int, right: int = 14) -> go.Figure:
    """An empty plot that fills its container; ``right`` (pixels) leaves room for letters at the ends of lines."""
    figure = go.Figure()
    axis = {"automargin": True, "zeroline": False, "showline": False, "ticks": "", "fixedrange": True}
    figure.update_layout(
        template="none",
        height=height,
        autosize=True,
        showlegend=False,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 12, "r": right, "t": 12, "b": 12},
        hovermode="closest",
        xaxis=axis | {"title": {"text": x_title, "standoff": 8}, "rangemode": "tozero"},
        yaxis=axis | {"title": {"text": y_title, "standoff": 8}},
    )
    return figure


def _line(figure: go.Figure, entry: SweptDeployment, look: tuple[str, str], marks: list[Mark], repeat: int) -> None:
    """Draw one ladder of a deployment as a line with markers; INVALID trials get hollow markers.

    ``repeat``: 0 for its first ladder; lines of later ones are thin and dotted.
    """
    colour, symbol = look
    label = safe(entry.label) + (f", measured again ({repeat + 1})" if repeat else "")
    widest = 3.2 if entry.best else 1.5
    symbols = [symbol if mark.valid else f"{symbol}-open" for mark in marks]
    figure.add_scatter(
        x=[mark.x for mark in marks],
        y=[mark.y_ms for mark in marks],
        name=label,
        mode="lines+markers",
        line={"color": colour, "width": 1.2 if repeat else widest, "dash": "dot" if repeat else "solid"},
        marker={"color": colour, "symbol": symbols, "size": 9 if entry.best else 7},
        opacity=1 if entry.best else 0.85,
        customdata=[mark.hover for mark in marks],
        hovertemplate=f"<b>{label}</b><br>%{{customdata}}<br>%{{y:.1f}} ms<extra></extra>",
        cliponaxis=False,
    )


def _letters(figure: go.Figure, ends: dict[str, Mark], top_ms: float) -> None:
    """Set the plot's height to ``top_ms`` and write each line's letter at its end, moved up to avoid overlaps.

    Letters have the colour of text, since colours of lines are too faint for them.
    """
    pixels_per_ms = (figure.layout.height - 70) / top_ms
    widest = max((end.x for end in ends.values()), default=0)
    placed: list[tuple[float, float]] = []
    for letter, end in sorted(ends.items(), key=lambda item: item[1].y_ms):
        height = end.y_ms * pixels_per_ms
        for x, taken in placed:
            if abs(x - end.x) < 0.05 * widest and height < taken + 16:
                height = taken + 16
        placed.append((end.x, height))
        figure.add_annotation(
            x=end.x,
            y=end.y_ms,
            text=f"<b>{letter}</b>",
            font={"size": 14},
            showarrow=False,
            xshift=15,
            yshift=height - end.y_ms * pixels_per_ms,
        )
    figure.update_yaxes(range=[0, top_ms])


def _service_points(
    figure: go.Figure, entry: SweptDeployment, fit: FittedStage | UnfittedStage, colour: str, symbol: str
) -> None:
    figure.add_scatter(
        x=[point.batch_size for point in fit.points],
        y=[1000 * point.mean_s for point in fit.points],
        name=safe(entry.label),
        mode="markers",
        marker={"color": colour, "symbol": symbol, "size": 9 if entry.best else 5},
        opacity=1 if entry.best else 0.6,
        customdata=[point.executions for point in fit.points],
        hovertemplate=(
            f"<b>{safe(entry.label)}</b><br>batch of %{{x}}: %{{y:.2f}} ms<br>%{{customdata}} executions<extra></extra>"
        ),
    )


def limit_line(figure: go.Figure, level_ms: float, label: str) -> None:
    figure.add_hline(
        y=level_ms,
        line={"color": LIMIT_COLOUR, "width": 1.5, "dash": "dot"},
        annotation={"text": label, "font": {"color": LIMIT_COLOUR, "size": 12}},
        annotation_position="top left",
    )


def bar_marker(colour: str, hatched: bool = False) -> dict:
    marker = {"color": colour, "line": {"width": 0}}
    if hatched:
        marker["pattern"] = {"shape": "/", "fillmode": "replace", "fgcolor": colour, "size": 5, "solidity": 0.42}
    return marker


def _best_last(swept: Sequence[SweptDeployment]) -> list[SweptDeployment]:
    """The best deployment last, so that it is drawn on top."""
    return sorted(swept, key=lambda entry: entry.best)


def _seconds(point: Point, stage: str, part: str) -> float:
    share = next((share for share in point.stages if share.stage == stage), None)
    if share is None:
        return 0.0
    return share.queue_s if part == "queue" else share.compute_s


def _point_words(point: Point) -> str:
    return (
        f"{words.plural(point.sessions, 'session')}, {words.figure(point.frames_per_s)} frames/s, "
        f"RTF {words.figure(point.real_time_factor)}"
    )


def _highest_step_ms(swept: Sequence[SweptDeployment]) -> float:
    return max([REAL_TIME_MS] + [1000 * point.step_s for entry in swept for point in entry.points])


def _first_audio_limits(slos: Sequence[Slo]) -> list[tuple[float, str]]:
    """Each SLO limit on TTFA once, with the classes that share it."""
    classes: dict[float, list[str]] = {}
    for slo in slos:
        if slo.metric.startswith("ttfa"):
            classes.setdefault(slo.limit, []).append(slo.traffic_class)
    return [(limit_s, ", ".join(names)) for limit_s, names in sorted(classes.items())]


def safe(text: str) -> str:
    """Escape text that Plotly would read as HTML: a name from a plan must not become a tag or a link."""
    return html.escape(str(text), quote=False)
