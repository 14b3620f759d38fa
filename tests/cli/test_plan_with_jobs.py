"""``harness plan --jobs``: devices for streams, for tasks, and for both, from a stored run."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness.capacity.planning.job_fleets import BOTH, STREAMS, FleetLoad, SharedPlan
from harness.capacity.planning.job_fleets import TASKS as ALONE
from harness.cli.main import app
from harness.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
RUN = str(ROOT / "results" / "sample-mixed")
TASKS = "per_hour: 240\nlength: {fixed: 1500}\nslos: {turnaround_p95: 2x}\nstreams_swing: 0.8\n"


def plan(*words):
    return CliRunner().invoke(app, ["plan", *words], catch_exceptions=True, env={"COLUMNS": "200"})


def test_it_says_how_many_devices_one_fleet_saves(tmp_path):
    file = tmp_path / "tasks.yaml"
    file.write_text(TASKS)
    done = plan("--run", RUN, "--qps", "1", "--jobs", str(file))
    said = " ".join(done.output.split())
    assert done.exit_code == 0, done.output
    assert all(name in said for name in ("streams alone", "tasks alone", "both on one fleet", "simulated"))
    one, two, fewer = map(
        int, re.search(r"One fleet needs (\d+) devices, two fleets (\d+): (\d+) fewer", said).groups()
    )
    assert fewer == two - one > 0
    assert re.search(r"Run the studio with --sessions \d+", said)


SIMULATED = SharedPlan(
    1.0,
    {kind: FleetLoad(kind, devices, 4, {"rtf": 0.9}) for kind, devices in ((STREAMS, 2), (ALONE, 2), (BOTH, 3))},
    {kind: (2, 3) for kind in (STREAMS, ALONE, BOTH)},
    (0, 1),
    False,
)


@pytest.mark.parametrize(
    ("of_the_run", "said", "code"),
    [
        ({}, "(simulated)", 0),
        ({"emulated": True}, "(simulated, emulated)", 0),
        ({"emulated": True, "times_basis": "estimated"}, "(simulated, emulated, estimated)", 2),
        ({"emulated": True, "dilation": 4.0}, "(simulated, emulated, time dilated 4 times)", 2),
    ],
)
def test_what_a_run_did_not_measure_is_said_and_is_an_estimate(tmp_path, monkeypatch, of_the_run, said, code):
    monkeypatch.setattr("harness.runs.analysis.shared_plan_of", lambda *_: SIMULATED)
    run, file = tmp_path / "run", tmp_path / "tasks.yaml"
    shutil.copytree(RUN, run)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | of_the_run))
    file.write_text(TASKS)
    asked = ("--run", str(run), "--qps", "1", "--jobs", str(file))
    done, accepted = plan(*asked), plan(*asked, "--accept-estimates")
    assert said in " ".join(done.output.split()) and (done.exit_code, accepted.exit_code) == (code, 0), done.output


def test_a_fleet_that_no_number_of_devices_makes_is_no_answer(tmp_path, monkeypatch):
    without = replace(SIMULATED, loads={STREAMS: SIMULATED.loads[STREAMS]}, saved_interval=None)
    monkeypatch.setattr("harness.runs.analysis.shared_plan_of", lambda *_: without)
    file = tmp_path / "tasks.yaml"
    file.write_text(TASKS)
    assert plan("--run", RUN, "--qps", "1", "--jobs", str(file), "--accept-estimates").exit_code == 2


def test_estimates_are_accepted_only_where_there_may_be_some():
    assert "--accept-estimates is for --card and --jobs" in str(plan("--run", RUN, "--accept-estimates").exception)


def test_a_mistake_in_what_is_asked_is_said_in_words(tmp_path):
    file = tmp_path / "tasks.yaml"
    file.write_text(TASKS.replace("2x", "soon"))
    wrong = plan("--run", RUN, "--jobs", str(file))
    assert isinstance(wrong.exception, InputError) and f"{file}: slos: the limit of turnaround_p95" in str(
        wrong.exception
    )
    file.write_text(TASKS)
    of_a_card = plan("--card", "h100", "--jobs", str(file))
    assert isinstance(of_a_card.exception, InputError) and "--jobs is for --run" in str(of_a_card.exception)


@pytest.mark.parametrize("option", ["--qps", "--jobs"])
def test_without_a_run_there_is_nothing_to_plan_from(option):
    assert isinstance(plan(option, "1").exception, InputError)
