"""The plots of the sweep's page, one function each."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from harness.capacity.fitting.knob_effects import Effects
from harness.report import sweep_facts, words
from harness.report.facts import Point, SweptDeployment, stages_shown
from harness.report.figures import (
    BEST_COLOUR,
    LIMIT_COLOUR,
    REAL_TIME_MS,
    REST_COLOUR,
    STAGE_COLOURS,
    bar_marker,
    empty_figure,
    limit_line,
    safe,
)
from harness.report.sweep_facts import DelayBar

MAX_STEP_MS = 3 * REAL_TIME_MS  # of the throughput plot: slower windows are useless and would flatten the rest
_ROW_PX = 30


def delays(bars: Sequence[DelayBar]) -> go.Figure:
    """A frame's time, stacked by stage, at each delay of all stages, with the 133 ms line."""
    figure = empty_figure("longest wait of each stage for a fuller batch", "ms per frame", height=390, right=64)
    names = [f"{words.figure(1000 * bar.delay_s)} ms{'<br>(computed)' if bar.computed else ''}" for bar in bars]
    opacity = [0.55 if bar.computed else 1.0 for bar in bars]
    for stage in stages_shown(share for bar in bars for share in bar.stages):
        colour = STAGE_COLOURS[stage]
        for part in ("compute", "queue"):
            marker = bar_marker(colour, hatched=part == "queue") | {"opacity": opacity}
            times = [_part_ms(bar.stages, stage, part) for bar in bars]
            _stack(figure, names, times, f"{words.stage(stage)} {part}", marker)
    _stack(figure, names, [1000 * bar.hop_s for bar in bars], "hop", bar_marker(REST_COLOUR) | {"opacity": opacity})
    for name, bar in zip(names, bars, strict=True):
        late = bar.step_s > sweep_facts.FRAME_S
        figure.add_annotation(
            x=name, y=1000 * bar.step_s, text=f"<b>{words.figure(1000 * bar.step_s)} ms</b>", showarrow=False,
            yshift=11, font={"size": 13} | ({"color": LIMIT_COLOUR} if late else {}),
        )  # fmt: skip
    figure.add_hline(y=REAL_TIME_MS, line={"color": LIMIT_COLOUR, "width": 2, "dash": "dot"})
    figure.add_annotation(
        x=1, xref="paper", xanchor="left", xshift=4, y=REAL_TIME_MS, text="<b>133 ms</b>", showarrow=False,
        font={"color": LIMIT_COLOUR, "size": 12},
    )  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0.35)
    figure.update_xaxes(type="category")
    figure.update_yaxes(range=[0, 1.14 * max([REAL_TIME_MS, *(1000 * bar.step_s for bar in bars)])])
    return figure


def _stack(figure: go.Figure, names: Sequence[str], times_ms: Sequence[float], name: str, marker: dict) -> None:
    figure.add_bar(x=names, y=times_ms, name=name, marker=marker, hovertemplate=f"{name}: %{{y:.1f}} ms<extra></extra>")


def _part_ms(stages, stage: str, part: str) -> float:
    share = next((share for share in stages if share.stage == stage), None)
    if share is None:
        return 0.0
    return 1000 * (share.queue_s if part == "queue" else share.compute_s)


def effects(told: Effects, names: Sequence[str]) -> go.Figure:
    """The effect of each knob alone, and with its interactions in pairs: one bar each."""
    order = sorted(range(len(names)), key=told.total)
    labels = [safe(names[number]) for number in order]
    figure = empty_figure("share of the variance", "", height=round(110 + 1.4 * _ROW_PX * len(order)))
    together = [told.total(number) - told.main[number] for number in order]
    for said, values, colour in (
        ("alone", [told.main[number] for number in order], BEST_COLOUR),
        ("with others", together, REST_COLOUR),
    ):
        figure.add_bar(
            y=labels, x=[100 * value for value in values], name=said, orientation="h", marker={"color": colour},
            hovertemplate=f"{said}: %{{x:.1f}}%<extra></extra>",
        )  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0.4)
    figure.update_xaxes(ticksuffix="%", range=[0, 100 * max(1.0, max(map(told.total, order)))])
    figure.update_yaxes(type="category", showgrid=False)
    return figure


def main_effect(told: Effects, factor: int, unit: str) -> go.Figure:
    """The mean answer at each level of one factor, over all others; the dotted line is the overall mean."""
    figure = empty_figure("", unit, height=250)
    names = [sweep_facts.level_name(level) for level in told.factors[factor].levels]
    figure.add_scatter(
        x=names, y=told.means[factor].tolist(), mode="lines+markers", line={"color": BEST_COLOUR, "width": 2.5},
        marker={"size": 9}, hovertemplate="%{x}: %{y:.3g}<extra></extra>",
    )  # fmt: skip
    figure.add_hline(y=told.mean, line={"color": REST_COLOUR, "width": 1.2, "dash": "dot"})
    low = min(float(means.min()) for means in told.means)
    high = max(float(means.max()) for means in told.means)
    room = 0.12 * (high - low)
    figure.update_xaxes(type="category")
    figure.update_yaxes(range=[max(0, low - room) if low >= 0 else low - room, high + room])
    return figure


def throughput_latency(
    swept: Sequence[SweptDeployment], front: Sequence[tuple[SweptDeployment, Point]], best: SweptDeployment | None
) -> go.Figure:
    """Every window of the sweep as a dot, the Pareto front as a line, the best deployment circled."""
    figure = empty_figure("audio delivered, seconds per second", "step time, ms per frame", height=430, right=24)
    marks = [(entry, point) for entry in swept for point in entry.points]
    _dots(figure, [mark for mark in marks if mark[1].valid], "VALID", REST_COLOUR, "circle")
    _dots(figure, [mark for mark in marks if not mark[1].valid], "INVALID", LIMIT_COLOUR, "x")
    _dots(figure, [mark for mark in marks if best and mark[0].letter == best.letter], "best", BEST_COLOUR, "circle", 10)
    figure.add_scatter(
        x=[point.audio_s_per_s for _, point in front], y=[1000 * point.step_s for _, point in front],
        mode="lines", name="Pareto front", line={"color": BEST_COLOUR, "width": 2, "shape": "vh"}, hoverinfo="skip",
    )  # fmt: skip
    limit_line(figure, REAL_TIME_MS, "real time: 133 ms a frame")
    slowest_ms = max([1.0, *(1000 * point.step_s for _, point in marks)])
    figure.update_yaxes(range=[0, 1.08 * min(slowest_ms, MAX_STEP_MS)])
    return figure


def _dots(figure: go.Figure, marks, name: str, colour: str, symbol: str, size: int = 7) -> None:
    figure.add_scatter(
        x=[point.audio_s_per_s for _, point in marks], y=[1000 * point.step_s for _, point in marks],
        mode="markers", name=name, marker={"color": colour, "symbol": symbol, "size": size},
        customdata=[f"{safe(entry.label)}<br>{words.plural(point.sessions, 'session')}" for entry, point in marks],
        hovertemplate="<b>%{customdata}</b><br>%{x:.1f} audio s/s, %{y:.1f} ms a frame<extra></extra>",
    )  # fmt: skip


def frame_time(shown: Sequence[tuple[SweptDeployment, Point]]) -> go.Figure:
    """Where a frame's time went in each deployment at one load: one stacked bar each, the shortest on top."""
    order = sorted(shown, key=lambda pair: -pair[1].step_s)
    labels = [f"<b>{safe(entry.letter)}</b>" for entry, _ in order]
    figure = empty_figure("ms per frame", "", height=round(110 + _ROW_PX * len(order)))
    for stage in stages_shown(share for _, point in order for share in point.stages):
        colour = STAGE_COLOURS[stage]
        for part in ("compute", "queue"):
            times = [_part_ms(point.stages, stage, part) for _, point in order]
            _lie(figure, labels, times, f"{words.stage(stage)} {part}", bar_marker(colour, hatched=part == "queue"))
    _lie(figure, labels, [1000 * (point.hop_s or 0.0) for _, point in order], "hop", bar_marker(REST_COLOUR))
    figure.add_vline(
        x=REAL_TIME_MS, line={"color": LIMIT_COLOUR, "width": 1.5, "dash": "dot"},
        annotation={"text": "133 ms", "font": {"color": LIMIT_COLOUR, "size": 12}}, annotation_position="top left",
    )  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0.3)
    figure.update_xaxes(range=[0, 1.08 * max([REAL_TIME_MS, *(1000 * point.step_s for _, point in order)])])
    figure.update_yaxes(type="category", showgrid=False)
    return figure


def _lie(figure: go.Figure, labels: Sequence[str], times_ms: Sequence[float], name: str, marker: dict) -> None:
    figure.add_bar(
        y=labels, x=times_ms, name=name, orientation="h", marker=marker,
        hovertemplate=f"{name}: %{{x:.1f}} ms<extra></extra>",
    )  # fmt: skip
