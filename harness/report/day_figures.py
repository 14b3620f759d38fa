"""The picture of a day: requests/s above, and below the devices of each policy, hour by hour."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from harness.records.day import PREDICTIVE, REACTIVE, STATIC, Day
from harness.report import words
from harness.report.figures import REST_COLOUR, empty_figure, safe

POLICY_COLOURS = {STATIC: "#c2622d", REACTIVE: "#2b7fc3", PREDICTIVE: "#1b9a77"}
_DASHES = {STATIC: "dash", REACTIVE: "solid", PREDICTIVE: "solid"}
_GAP = 0.62, 0.70  # of the height: devices below, requests above


def day(found: Day) -> go.Figure:
    """Demand and devices over the period; devices are means of windows, in steps."""
    figure = empty_figure("hours", "devices paid for", height=430)
    hours = [window * found.window_s / 3600 for window in range(len(found.offered_qps) + 1)]
    figure.add_scatter(
        x=hours,
        y=_closed(found.offered_qps),
        yaxis="y2",
        name="requests/s",
        mode="lines",
        fill="tozeroy",
        line={"color": REST_COLOUR, "width": 1.4, "shape": "hv"},
        hovertemplate="%{y:.3g} requests/s at %{x:.1f} h<extra></extra>",
    )
    for each in found.policies:
        figure.add_scatter(
            x=hours,
            y=_closed(each.devices),
            name=each.policy,
            mode="lines",
            line={
                "color": POLICY_COLOURS[each.policy],
                "width": 2.2,
                "dash": _DASHES[each.policy],
                "shape": "hv",
            },
            hovertemplate=f"{safe(each.policy)}: %{{y:.3g}} devices at %{{x:.1f}} h<extra></extra>",
        )
    upper = figure.layout.yaxis.to_plotly_json() | {"domain": [_GAP[1], 1], "rangemode": "tozero"}
    upper["title"] = {"text": "requests/s", "standoff": 8}
    figure.update_layout(yaxis={"domain": [0, _GAP[0]], "rangemode": "tozero"}, yaxis2=upper)
    figure.update_xaxes(range=[0, hours[-1]], rangemode="normal", **_ticks(hours[-1]))
    return figure


def _closed(values: Sequence[float]) -> list[float]:
    """Values of windows with the last one repeated, so that its step has a width."""
    return [*values, *values[-1:]]


def _ticks(hours: float) -> dict:
    return {"tickvals": list(range(0, 25, 4))} if abs(hours - 24) < 1e-6 else {}


def saving(found: Day, name: str) -> str:
    """Device hours of a policy against the static fleet, as text; "" for the static one."""
    static, own = found.policy(STATIC), found.policy(name)
    if static is None or own is None or name == STATIC or not static.device_hours:
        return ""
    return words.signed_percent(own.device_hours / static.device_hours - 1)
