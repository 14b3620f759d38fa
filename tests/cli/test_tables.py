"""What the commands print of a plan and of a simulation: how figures are known, and that it fits."""

import copy
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import report_sample as sample
from rich.table import Table

from harness.cli import measuring, tables
from harness.deploy import profiling
from harness.device_profile import Profile
from harness.errors import InputError
from harness.records.fit import Fit
from harness.records.plan import Plan
from harness.records.prediction import Prediction
from harness.records.store import Run
from harness.report import words
from harness.report.screen import Screen
from harness.runs import analysis

SAMPLE = Path(__file__).resolve().parents[2] / "results" / "sample-quick"
WIDTH = 80
NOTE = "predicted by the stage model (median error 12% on the measured deployment)"


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
    monkeypatch.setattr(tables, "out", Screen(file=text, width=WIDTH))
    return text


def widest() -> dict:
    """A plan with all that a table can hold, each cell as long as it may be."""
    plan = outlook() | {"emulated": True, "unit": "4 emulated NVIDIA H100 80GB HBM3 at preset 1.5b"}
    plan["costs"] = plan["costs"] | {"currency": "credits"}
    for target in plan["targets"]:
        target |= {"interval": [12_345, 23_456], "devices": 12_346, "cost_per_audio_hour": 0.000123456}
        target["binding"] = "longest stall p99.9 of class conversation_with_long_answers"
        for loss in target["losses"]:
            loss |= {"worst": target["binding"], "devices": target["devices"], "interrupted": 123_456}
    for row in plan["sensitivity"]:
        row["change"] = "one more instance of vibevoice_llm_encoder.preferred_batch_size_of_conversations"
    known = [{"qps": qps, "devices": 12_345, "cost_per_audio_hour": 0.000123456} for qps in sample.TARGETS]
    kind = {"device": "", "basis": "extrapolated", "note": ""}
    kind |= {"type": "NVIDIA H100 NVL", "preset": "1.5b", "rate_per_device": 12.345, "kv_sessions": 17_323.0}
    plan["device_types"] = [kind | {"targets": known}, kind | {"targets": [], "kv_sessions": None}]
    return plan


def long_fit() -> dict:
    """fit.json of deployments whose knobs have long names and many values, one of them without an answer."""
    fit = sample.fit_record(sample.np.random.default_rng(1))
    for number, each in enumerate(fit["deployments"]):
        each["deployment"] = each["deployment"] | {f"vibevoice_llm_encoder.preferred_batch_size_{number}": 1_048_576}
    return fit


def model_of(max_sessions: float) -> dict:
    """What a prediction holds as ``model``, of a step time measured up to so many sessions."""
    no = {"inconclusive": "too few requests"}
    step = sample.step_fit(sample.space()[0]) | {"max_sessions": max_sessions}
    return {"step_time": step, "first_audio": no, "rtf": no, "stalls": {}}


def measured_profile() -> Profile:
    figures = {"ms": 1234.5, "roofline_ms": 1111.1, "device_ms": 1000.0, "device_ms_from": "profiler"}
    sizes = (16, 256, 1024, 4096, 16_384, 65_536, 131_072)
    names = profiling._COORDINATES.items()
    stages = {stage: [figures | {r: n, c: m} for n in (1, 64) for m in sizes] for stage, (r, c) in names}
    model = {"hidden_size": 8, "kv_bytes_per_token": 8, "state_values": 8}
    return Profile.of({"device": "H200", "preset": "tiny", "model": model, "stages": stages})


def doctor_like() -> Table:
    """A table as the commands make it themselves: without a box, with marks, and a path longer than a line."""
    table = Table("", "what", "found", "how to fix it", box=None)
    table.add_row("[green]ok[/]", "model repository", "/opt/" + "folder/" * 20, "")
    table.add_row(
        "[red]no[/]", "shared memory", "23.5 MiB free, 96 MiB needed", "start the container with --shm-size=1g"
    )
    return table


def everything_printed() -> None:
    tables.print_plan(Plan.of(widest()))
    tables.print_plan(Plan.of(outlook()))
    tables.print_plan(Run.open(SAMPLE).plan())
    tables.print_fit(Fit.of(long_fit()))
    tables.print_fit(Fit.of(sample.fit_record(sample.np.random.default_rng(1))))
    content = {"rate_per_s": 2.2, "seconds": 60, "sessions": 34.3, "step_s": 0.1, "frames_per_s": 300.0}
    content["sessions_p95"] = 99.0
    name = "conversation_with_long_answers"
    content |= {f"{name}.{key}": 123.456 for key in ("ttfa_p50_s", "ttfa_p95_s", "rtf_p50", "rtf_p95")}
    tables.print_prediction(Prediction.of(content | {"model": model_of(48.0)}), "one GPU")
    for table in profiling.tables(measured_profile()):
        tables.out.print(table)
    tables.out.print(doctor_like())


@pytest.mark.parametrize("width", [60, WIDTH, 200])
@pytest.mark.parametrize("coloured", [False, True], ids=["in a log", "in colour"])
def test_every_table_is_whole_at_any_width(monkeypatch, width, coloured):
    text = io.StringIO()
    look = {"force_terminal": True, "color_system": "truecolor"} if coloured else {"color_system": None}
    monkeypatch.setattr(tables, "out", Screen(file=text, width=width, **look))
    everything_printed()
    shown = re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue())
    assert "…" not in shown
    assert [line for line in shown.splitlines() if len(line) > width] == []


def test_the_width_is_that_of_the_environment_at_every_print(monkeypatch):
    text = io.StringIO()
    monkeypatch.setenv("COLUMNS", "80")
    screen = Screen(file=text)
    monkeypatch.setenv("COLUMNS", "40")
    screen.print("word " * 30)
    assert max(map(len, text.getvalue().splitlines())) <= 40


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


def test_a_table_that_is_too_wide_becomes_a_block_for_each_row(printed):
    table = Table("device", "bound by", "a head that is long enough to need its own line", title="Two devices")
    table.add_row("A", "words " * 30, "x" * 70)
    table.add_row("B", "", "short")
    tables.out.print(table)
    shown = printed.getvalue()
    assert "device: A" in shown and "device: B" in shown and "bound by:" in shown
    assert squeezed("words " * 30) in squeezed(shown) and "x" * 70 in squeezed(shown)
    assert shown.count("bound by:") == 1  # an empty cell has no line


def test_every_table_of_a_command_goes_through_the_screen():
    sources = {path: path.read_text() for path in (SAMPLE.parents[1] / "harness").rglob("*.py")}
    consoles = [path.name for path, text in sources.items() for _ in re.findall(r"(?<!stderr=True\))\bConsole\(", text)]
    assert consoles in ([], ["app.py"]), "print tables by harness.cli.tables.out, which shows them whole at any width"


def test_utilisation_adds_up_for_a_reader(printed):
    """Of the sample: the rate, the count and the figure that is printed beneath give the utilisation of each row."""
    plan = Run.open(SAMPLE).plan()
    tables.print_plan(plan)
    text = " ".join(printed.getvalue().split())
    rate = float(re.search(r"requests/s / \(devices x ([\d.]+)\)", text)[1])
    for target in plan.targets:
        assert words.percent(target.qps / (target.devices * rate)) in text
        assert target.utilisation == pytest.approx(target.qps / (target.devices * rate), rel=0.005)


def test_devices_of_several_gpus_are_counted_in_gpus_beside(printed):
    plan = Run.open(SAMPLE).plan()
    assert "GPUs" not in printed.getvalue()
    tables.print_plan(replace(plan, gpus_per_device=4))
    most = max(target.devices for target in plan.targets)
    assert "GPUs" in printed.getvalue() and f" {most} " in printed.getvalue() and f" {4 * most} " in printed.getvalue()


def test_a_single_device_is_bound_by_being_the_least_that_there_can_be(printed):
    tables.print_plan(Run.open(SAMPLE).plan())
    assert "Bound at 0.5, 1 req/s by: minimum of one device" in printed.getvalue()
    assert "known up to" not in printed.getvalue()


def test_growth_says_which_figures_are_months_and_which_are_devices(printed):
    tables.print_plan(Run.open(SAMPLE).plan())
    rows = printed.getvalue().partition("Growth of")[2].splitlines()
    head = " ".join(" ".join(column) for column in zip(*[row.split() for row in rows[2:4]], strict=False))
    assert "months" in head and "devices" in head
    last = Run.open(SAMPLE).plan().forecast.targets[-1]
    months = [last.months_until_too_small, last.months_until_too_small_n_plus_1]
    devices = last.devices_after_months.values()
    figures = [f"{last.qps:g}", *(f"{each:.1f}" for each in months), *map(str, devices)]
    assert re.search(" +".join(map(re.escape, figures)), "\n".join(rows))


def test_a_simulation_names_the_unit_of_each_figure(printed):
    content = {"rate_per_s": 0.8, "seconds": 60, "sessions": 2.7, "step_s": 0.02, "frames_per_s": 114.0}
    content["sessions_p95"] = 4.0
    content |= {"short.ttfa_p50_s": 0.065, "short.ttfa_p95_s": 0.0882, "short.rtf_p50": 0.172, "short.rtf_p95": None}
    tables.print_prediction(Prediction.of(content | {"model": model_of(48.0)}), "one GPU")
    text = " ".join(printed.getvalue().split())
    assert "short 65 ms 88.2 ms 0.172 –" in text and "RTF (real-time factor)" in text


def test_what_is_lost_says_how_it_is_known_and_over_what_time(printed):
    plan = outlook()
    plan["targets"][0]["losses"][0] |= {"worst_share": 43.0}
    tables.print_plan(Plan.of(plan))
    text = printed.getvalue()
    assert "judged over 16 min or more" in text and "over 10x" in text and "4300%" not in text
    rows = [line for line in text.splitlines() if "violated" in line]
    assert len(rows) == len(plan["targets"]) and all("extrapolated" in row for row in rows)


def test_the_error_of_the_model_stands_below_the_changes_that_rest_on_it(printed):
    tables.print_plan(Plan.of(outlook()))
    text = " ".join(printed.getvalue().split())
    assert f"faster: {NOTE}" in text
    assert "half the delay: the deployment has no delay" in text


@pytest.mark.parametrize("most, said", [(48.0, False), (59.0, True)])
def test_a_simulation_beyond_what_was_measured_says_so(printed, most, said):
    content = {"rate_per_s": 2.2, "seconds": 60, "sessions": 34.3, "step_s": 0.1, "frames_per_s": 300.0}
    content["sessions_p95"] = most
    content |= {"short.ttfa_p50_s": 0.1, "short.ttfa_p95_s": 0.2, "short.rtf_p50": 0.5, "short.rtf_p95": None}
    tables.print_prediction(Prediction.of(content | {"model": model_of(48.0)}), "one GPU")
    assert ("extrapolated: up to 59 sessions" in printed.getvalue()) is said


def test_a_rate_without_a_steady_state_is_refused_and_one_just_below_is_shown():
    stored = Run.open(SAMPLE)
    carried = analysis.fleet_of(stored).without_slos().steady_rate()
    assert analysis.simulation_of(stored, 0.98 * carried).sessions > 0
    with pytest.raises(InputError, match="no steady state on one device.*harness plan"):
        analysis.simulation_of(stored, 1.01 * carried)


def test_a_planning_estimate_is_no_success_unless_estimates_are_accepted():
    assert [measuring._exit_code("planning estimate", accepted) for accepted in (False, True)] == [2, 0]
    assert [measuring._exit_code(verdict, True) for verdict in ("met", "missed", "inconclusive")] == [0, 1, 2]
