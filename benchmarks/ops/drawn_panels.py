"""The panels of the dashboards as one picture, drawn from what Prometheus answers: a look without Grafana."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
from asked import PanelQuery
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots
from prometheus_server import PrometheusServer

from harness.report import paper

COLUMNS, ROW_PX, WIDTH_PX = 3, 260, 1800


def draw(asked: PrometheusServer, queries: Sequence[PanelQuery], began_s: float, out: Path) -> None:
    """Draw every panel with data since ``began_s`` (Unix time) to a PNG. Raises InputError without a Chromium."""
    panels: dict[tuple[str, str], list[PanelQuery]] = {}
    for query in queries:
        panels.setdefault((query.board, query.panel), []).append(query)
    lines = {
        panel: [
            _line(query, one, began_s)
            for query in ours
            for one in asked.ask_range(query.expression, began_s, time.time())
        ]
        for panel, ours in panels.items()
    }
    rows = math.ceil(len(panels) / COLUMNS)
    titles = [_title(*panel, ours[0], empty=not lines[panel]) for panel, ours in panels.items()]
    figure = make_subplots(rows, COLUMNS, subplot_titles=titles, vertical_spacing=0.35 / rows)
    for place, drawn in enumerate(lines.values()):
        figure.add_traces(drawn, rows=place // COLUMNS + 1, cols=place % COLUMNS + 1)
    figure.update_layout(height=ROW_PX * rows, width=WIDTH_PX, showlegend=False, template="plotly_white")
    figure.update_yaxes(rangemode="tozero")
    figure.update_annotations(font_size=12)
    _photograph(figure, out, ROW_PX * rows)


def _title(board: str, panel: str, query: PanelQuery, *, empty: bool) -> str:
    unit = "" if query.unit == "none" else f" [{query.unit}]"
    why = " (needs a GPU)" if query.needs_gpu else ""
    return f"{board}: {panel}{unit}" + (f"<br>no data{why}" if empty else "")


def _line(query: PanelQuery, series: dict, began_s: float) -> go.Scatter:
    labels = series["metric"]
    name = re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), query.legend) or query.panel
    times = [at - began_s for at, _ in series["values"]]
    values = [float(value) for _, value in series["values"]]
    ends = ["" for _ in values[1:]] + [f"{name} "]
    return go.Scatter(
        x=times, y=values, name=name, mode="lines+text", text=ends, textposition="top left", textfont_size=10,
        cliponaxis=False,
    )  # fmt: skip


def _photograph(figure: go.Figure, out: Path, height: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "panels.html")
        drawn = figure.to_html(include_plotlyjs=False, full_html=False, config={"displayModeBar": False})
        page.write_text(f"<meta charset=utf-8><script>{get_plotlyjs()}</script>{drawn}")
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [paper.browser_path(), "--headless", "--no-sandbox", "--hide-scrollbars"]
        command += [f"--window-size={WIDTH_PX + 20},{height + 20}", "--virtual-time-budget=8000"]
        subprocess.run([*command, f"--screenshot={out.resolve()}", page.as_uri()], check=True, capture_output=True)
