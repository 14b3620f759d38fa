"""Writes dashboards/*.json from panels.py: ``python ops/grafana/make.py`` (needs ``pip install -e '.[ops]'``)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueColorMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, GridPos

sys.path.insert(0, str(Path(__file__).resolve().parent))
from panels import BOARDS, STAT, Board, View  # noqa: E402

FOLDER = Path(__file__).resolve().parent / "dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
COLUMNS, HEIGHT, LOW = 24, 8, 5  # Grafana's grid: columns, and rows of a graph and of a number


def made(board: Board) -> str:
    """A dashboard as JSON text."""
    builder = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.about)
        .tags(["speech"])
        .editable()
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .with_variable(dashboard.DatasourceVariable("source").label("Prometheus").type("prometheus"))
    )
    top = 0
    for section in board.sections:
        builder.with_row(dashboard.Row(section.title).grid_pos(GridPos(h=1, w=COLUMNS, x=0, y=top)))
        top += 1
        for view, place in _placed(section.views, top):
            builder.with_panel(_panel(view, place))
            top = max(top, place.y + place.h)
    return JSONEncoder(sort_keys=True, indent=2).encode(builder.build()) + "\n"


def _placed(views: tuple[View, ...], top: int) -> Iterator[tuple[View, GridPos]]:
    """Each view with its place, from left to right."""
    left, height = 0, 0
    for view in views:
        if left + view.width > COLUMNS:
            left, top, height = 0, top + height, 0
        place = GridPos(h=LOW if view.kind == STAT else HEIGHT, w=view.width, x=left, y=top)
        left, height = left + view.width, max(height, place.h)
        yield view, place


def _panel(view: View, place: GridPos) -> stat.Panel | timeseries.Panel:
    panel = stat.Panel().color_mode(BigValueColorMode.NONE) if view.kind == STAT else timeseries.Panel()
    panel = panel.title(view.title).description(view.about).datasource(SOURCE).unit(view.unit).grid_pos(place)
    panel = panel.min(0) if view.kind != STAT else panel
    panel = panel if view.highest is None else panel.max(view.highest)
    for number, query in enumerate(view.queries):
        asked = prometheus.Dataquery().expr(query.expression).ref_id(chr(ord("A") + number)).datasource(SOURCE)
        panel = panel.with_target(asked.legend_format(query.legend) if query.legend else asked)
    return panel


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in BOARDS:
        path = FOLDER / f"{each.uid}.json"
        path.write_text(made(each))
        print(path)
