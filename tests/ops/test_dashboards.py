"""The dashboards of ops/grafana: the stored JSON is what the script makes, and asks for metrics that exist."""

import importlib.util
import json
from pathlib import Path

import pytest
from expressions import KNOWN, metrics_of
from test_rules import RECORDS, asked

ROOT = Path(__file__).resolve().parents[2]
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(asked.DASHBOARDS.glob("*.json"))}
QUERIES = asked.panel_queries()


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make_dashboards", ROOT / "ops" / "grafana" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_stored_dashboards_are_those_of_the_panels(make):
    assert {board.uid: json.loads(make.made(board)) for board in make.BOARDS} == BOARDS


def test_there_are_three_and_each_asks_something():
    assert set(BOARDS) == {"speech-service", "speech-stages", "speech-capacity"}
    assert all(board["uid"] == name for name, board in BOARDS.items())
    assert len({query.board for query in QUERIES}) == 3 and len(QUERIES) > 40


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.panel}: {query.legend}")
def test_a_panel_asks_for_metrics_that_exist(query):
    assert metrics_of(query.expression) <= KNOWN | RECORDS.keys()


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_panels_say_what_they_show_ask_the_chosen_source_and_do_not_overlap(board):
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    places = set()
    for panel in panels:
        assert panel["description"].endswith(".") and panel["fieldConfig"]["defaults"]["unit"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${source}"}
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & places and at["x"] + at["w"] <= 24, panel["title"]
        places |= cells
    assert [variable["type"] for variable in board["templating"]["list"]] == ["datasource"]
