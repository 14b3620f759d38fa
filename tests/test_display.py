"""What the commands print of a plan and of a simulation: how figures are known, and that it fits."""

import copy
import io
from pathlib import Path

import pytest
import report_sample as sample
from rich.console import Console

from harness import display, runs
from harness.errors import InputError
from harness.store import Run

SAMPLE = Path(__file__).resolve().parents[1] / "results" / "sample-quick"
NOTE = "by the model of the stages, which is off by 12% in the median on the deployment as it is"


def outlook() -> dict:
    """The sample's plan, as a run without spares sees it: the loss is of the devices that the target has."""
    plan = copy.deepcopy(sample.outlook_record())
    for target in plan["targets"]:
        target["losses"] = [loss | {"devices": target["devices"]} for loss in target["losses"]]
    plan["sensitivity"].append(plan["sensitivity"][1] | {"basis": "extrapolated", "note": NOTE, "change": "faster"})
    return plan | {"device_types": [], "memory": None, "utilisation_cap": 0.85}


@pytest.fixture
def printed(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(display, "out", Console(file=text, width=80))
    return text


def test_what_is_lost_says_how_it_is_known_and_over_what_time(printed):
    plan = outlook()
    plan["targets"][0]["losses"][0] |= {"worst_share": 43.0}
    display.print_plan(plan)
    text = printed.getvalue()
    assert "judged over 16 min or more" in text and "over 10x" in text and "4300%" not in text
    rows = [line for line in text.splitlines() if "broken" in line]
    assert len(rows) == len(plan["targets"]) and all("extrapolated" in row for row in rows)


def test_the_error_of_the_model_stands_below_the_changes_that_rest_on_it(printed):
    display.print_plan(outlook())
    text = " ".join(printed.getvalue().split())
    assert f"faster: {NOTE}" in text
    assert "half the delay: the deployment has no delay" in text


@pytest.mark.parametrize("most, said", [(48.0, False), (59.0, True)])
def test_a_simulation_beyond_what_was_measured_says_so(printed, most, said):
    content = {"rate_per_s": 2.2, "sessions": 34.3, "step_s": 0.1, "frames_per_s": 300.0, "sessions_p95": most}
    content |= {"short.ttfa_p50_s": 0.1, "short.ttfa_p95_s": 0.2, "short.rtf_p50": 0.5, "short.rtf_p95": None}
    display.print_prediction(content | {"model": {"step_time": {"max_sessions": 48.0}}}, "one GPU")
    assert ("extrapolated: up to 59 sessions" in printed.getvalue()) is said


def test_a_rate_without_a_steady_state_is_refused_and_one_just_below_is_shown():
    stored = Run.open(SAMPLE)
    carried = runs.fleet_of(stored).unpromised().steady_rate()
    assert runs.simulation_of(stored, 0.98 * carried)["sessions"] > 0
    with pytest.raises(InputError, match="have no steady state on one device.*harness plan"):
        runs.simulation_of(stored, 1.01 * carried)
