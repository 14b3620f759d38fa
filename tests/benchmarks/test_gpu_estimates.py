"""benchmarks/gpu/estimates.py: what it compares, and its last line."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from harness import wire
from harness.cards.card import card_of
from harness.cards.costs import costs_of
from harness.cards.estimate import assumptions_for, estimated_profile
from harness.records.store import read_profile, write_profile

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    for folder in (FOLDER, FOLDER / "gpu"):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("estimates")


def test_the_last_line_counts_what_lies_inside(script, capsys):
    assert script.main(["--quick"]) == 0
    told = capsys.readouterr().out
    found = json.loads(told.splitlines()[-1])
    assert found["published_total"] == 5 and 0 <= found["published_inside_interval"] <= 5
    assert found["bounds_held"] == found["bounds_total"] == 2
    assert found["h100_total"] == 76 and found["h100_inside_interval"] >= 60
    assert found["fused_from_staged_error_median"] < 0.15 and found["cross_card_error_median"] is None
    assert "audio.cpp" in told and "CosyVoice2" in told


def test_published_times_are_reckoned_from_what_was_published(script):
    """RTF 0.5 is 66.7 ms a frame; 93.9 minutes in 18.2 are 42,255 frames of 25.8 ms."""
    given = [row.given_ms for row in script.of_others(10)]
    assert given == pytest.approx(
        [66.67, 66.67, 65.7 * 60e3 / (93.6 * 60 * 7.5), 32.69, 18.2 * 60e3 / 42_255], rel=0.01
    )


def test_a_second_card_is_predicted_from_the_first_and_the_other_way_round(script, tmp_path):
    first = next(iter((FOLDER.parent / "results" / "gpu").glob("*/*-1.5b.json")))
    card, costs = card_of("h200"), costs_of("1.5b")
    made = estimated_profile(card, costs, wire.STAGED, assumptions_for(card, costs, wire.STAGED, read_profile(first)))
    write_profile(tmp_path / "h200-1.5b.json", replace(made, device="NVIDIA H200 SXM", basis="", topology=""))
    errors = script.cross_card_errors(10, [first, tmp_path / "h200-1.5b.json"])
    points = [len(read_profile(file).stages[wire.LLM]) for file in (first, tmp_path / "h200-1.5b.json")]
    assert len(errors) > sum(points) and min(errors) < 0.2
    assert script.cross_card_errors(10, [first]) == []
