"""The script of the first minutes on a GPU host: each step under its own limit, none of them stopping the next."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "one.sh"
STEPS = "environment kernels values check profile device fused fused-streams streams signoff".split()
HELP = """
import contextlib, io, json, runpy, sys
told = {}
scripts, home = sys.argv[1:], list(sys.path)
for script in scripts:
    sys.argv, sys.path = [script, "--help"], [*script.rpartition("/")[:1], *home]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            assert not end.code, (script, end.code)
    told[script] = said.getvalue()
print(json.dumps(told))
"""
# Stands in for the Python that runs the steps: notes what it was asked, names a GPU, and fails or hangs where told to.
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"{notes}"
case "$*" in
  "-c from harness.host import nvml"*) echo "{gpu}" ;;
  -c*) ;;
  *"{fails}"*) echo "no such thing" >&2; exit 3 ;;
  *"{hangs}"*) exec sleep 60 ;;
esac
"""


def _script(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def run(tmp_path):
    """Run the script: (its answer, the lines of steps.tsv, what its Python was asked for)."""

    def of(*options, gpu="", fails="NOTHING", hangs="NOTHING", limit_s=None):
        notes, python, short = tmp_path / "notes", tmp_path / "python", tmp_path / "timeout"
        _script(python, PYTHON.format(notes=notes, gpu=gpu, fails=fails, hangs=hangs))
        if limit_s:  # of every step, whatever the script allows it
            _script(short, f'#!/bin/sh\nshift 3\nexec /usr/bin/timeout -k 1 {limit_s} "$@"\n')
        answer = subprocess.run(
            ["bash", SCRIPT, "--out", tmp_path / "out", *options],
            env={"PYTHON": str(python), "PATH": f"{tmp_path}:/usr/bin:/bin"},
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        listed = tmp_path / "out" / "steps.tsv"
        steps = [line.split("\t") for line in listed.read_text().splitlines()] if listed.exists() else []
        return answer, {name: code for name, code, _ in steps}, notes.read_text() if notes.exists() else ""

    return of


def test_on_a_cpu_every_step_runs_in_order_at_tiny(run):
    answer, steps, asked = run()
    assert answer.returncode == 0 and list(steps) == STEPS and set(steps.values()) == {"0"}
    assert "--preset tiny --device cpu" in asked and "1.5b" not in asked and "--quick" in asked


def test_on_a_gpu_the_whole_model_is_measured(run):
    answer, steps, asked = run(gpu="NVIDIA H100 80GB HBM3")
    assert answer.returncode == 0 and list(steps) == STEPS
    assert "precision.py --preset 1.5b --device cuda --positions 1500,8000,63000" in asked and "--quick" not in asked
    assert "streams.py --preset 1.5b --device gpu" in asked


def test_a_step_that_fails_is_noted_and_the_next_ones_run(run, tmp_path):
    answer, steps, _ = run(fails="harness profile")
    assert answer.returncode == 1 and list(steps) == STEPS and steps.pop("profile") == "3"
    assert set(steps.values()) == {"0"}
    assert "no such thing" in (tmp_path / "out" / "profile.log").read_text() and "no such thing" in answer.stdout


def test_a_step_that_hangs_ends_at_its_limit_and_the_next_ones_run(run):
    answer, steps, _ = run(hangs="gpu/device.py", limit_s=5)
    assert answer.returncode == 1 and list(steps) == STEPS and steps["device"] == "124" and steps["streams"] == "0"


def test_a_sign_off_that_does_not_conclude_is_no_failure_of_the_host(run):
    answer, steps, _ = run(fails="harness signoff")
    assert answer.returncode == 0 and steps["signoff"] == "3"


def test_a_step_may_take_what_its_own_budget_allows():
    limits = dict(re.findall(r"^ *step (\w+) (\d+) ", text := SCRIPT.read_text(), re.MULTILINE))
    plan = yaml.safe_load(SCRIPT.with_name("plan.yaml").read_text())
    assert int(limits["signoff"]) >= 60 * plan["budget_minutes"] + 60
    (profile_s,) = re.findall(r"echo 20 \|\| echo (\d+)", text)
    assert int(limits["profile"]) >= 1.25 * int(profile_s) + 30  # each stage keeps a quarter of its share, however late


def test_an_unknown_option_is_one_line(run):
    answer, steps, _ = run("--nonsense")
    assert (answer.returncode, steps) == (64, {})
    assert answer.stderr == "one.sh: unknown option --nonsense; see --help\n"


def test_every_step_names_a_script_and_options_that_it_has(run):
    _, _, asked = run()
    called = [line.split() for line in asked.splitlines() if line.startswith("benchmarks/")]
    told = _help_of({script for script, *_ in called})
    for script, *words in called:
        missing = [word for word in words if word.startswith("--") and word not in told[script]]
        assert not missing, (script, missing)


def _help_of(scripts):
    """What each script says to --help: all from one process, as torch and transformers are slow to import."""
    told = subprocess.run(
        [sys.executable, "-c", HELP, *scripts], cwd=SCRIPT.parents[2], capture_output=True, text=True, check=True
    )
    return json.loads(told.stdout)
