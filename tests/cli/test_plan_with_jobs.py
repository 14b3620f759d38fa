"""``harness plan --jobs``: devices for streams, for tasks, and for both, from a stored run."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

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
