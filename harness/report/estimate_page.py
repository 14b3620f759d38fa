"""The page of a planning estimate: GPUs per target on each card, and which unknown costs most of them."""

from __future__ import annotations

import plotly.graph_objects as go

from harness.records.estimate import EstimatedCard, PlanningEstimate, UnknownEffect
from harness.report import figures, words
from harness.report.page import script_json, template

_ROW_PX, _EDGES_PX = 26, 70


def render(found: PlanningEstimate) -> str:
    """The whole page as HTML, self-contained."""
    counted = [card for card in found.cards if not card.problem]
    return template("estimate.html.j2").render(
        found=found,
        counted=counted,
        emulated=False,
        level=words.level(found.confidence),
        plots={f"tornado-{number}": script_json(tornado(card)) for number, card in enumerate(counted)},
    )


def tornado(card: EstimatedCard) -> go.Figure:
    """Devices at the highest target over the range of each unknown, the one that costs most on top."""
    rows = [row for row in card.unknowns if _ends(row)[0] != _ends(row)[1]][::-1]
    target = card.targets[-1]
    height = _EDGES_PX + _ROW_PX * max(len(rows), 1)
    figure = figures.empty_figure(f"GPUs at {target.qps:g} requests/s", "", height=height)
    ends = [_ends(row) for row in rows]
    figure.add_bar(
        orientation="h",
        y=[figures.safe(row.unknown) for row in rows],
        base=[low for low, _ in ends],
        x=[high - low for low, high in ends],
        marker={"color": figures.BEST_COLOUR},
        hovertext=[figures.safe(_hover(row)) for row in rows],
        hoverinfo="text",
    )
    if target.devices is not None:
        figure.add_vline(x=target.devices, line={"color": figures.REST_COLOUR, "dash": "dot"})
    figure.update_layout(xaxis={"rangemode": "normal"})
    return figure


def _ends(row: UnknownEffect) -> tuple[int, int]:
    """The fewest and the most devices; an end without a count is left out of the bar."""
    known = [each for each in (row.devices_at_low, row.devices_at_high) if each is not None]
    return (min(known), max(known)) if known else (0, 0)


def _hover(row: UnknownEffect) -> str:
    counts = (words.figure(each) for each in (row.devices_at_low, row.devices_at_high))
    low, high = counts
    return f"{row.unknown} {row.low:.3g}: {low}; {row.high:.3g}: {high}; likely {row.likely:.3g}"
