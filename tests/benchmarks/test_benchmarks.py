"""The scripts in benchmarks/: each says how it is used, refuses nonsense, and the oracle agrees with Triton."""

import importlib
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_sample import plan_record

from harness.errors import InputError
from harness.records.plan import LeftOut, Plan

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
GROUPS = [folder for folder in (FOLDER, *sorted(FOLDER.glob("*/"))) if folder.name != "gpu"]
PATHS = {path.stem: path for folder in GROUPS for path in folder.glob("*.py")}
SCRIPTS = sorted(name for name, path in PATHS.items() if "__main__" in path.read_text())


@pytest.fixture
def load(monkeypatch):
    """``load(name)``: a script as a module, found as it is when it runs."""

    def load(name):
        monkeypatch.syspath_prepend(str(PATHS[name].parent))
        return importlib.import_module(name)

    return load


def test_the_simulated_rule_is_that_of_kubernetes(load):
    """Sync by sync over a day, against the algorithm written down again."""
    forms = load("autoscale").autoscale_forms
    assert [forms.rule_mismatches(forms.small(), 1, rule) for rule in forms.RULES] == [(0, 2880)] * 4


def test_the_day_benchmark_fails_without_its_trace(load):
    script = load("autoscale")
    figures = {"closed_form_error_max": 0.0, "closed_form_standard_error_max": 0.005, "fleet_cpu_s": 1.0}
    figures |= {"rule_mismatches": 0, "trace": False, "fleet_s": 100.0}  # the host was busy with other things
    assert not script.is_good(figures, quick=False) and script.is_good(figures, quick=True)
    assert script.is_good(figures | {"trace": True}, quick=False)
    assert not script.is_good(figures | {"rule_mismatches": 1}, quick=True)
    for worse in ({"fleet_cpu_s": 61.0}, {"closed_form_error_max": 0.04}, {"closed_form_standard_error_max": 0.02}):
        assert not script.is_good(figures | {"trace": True} | worse, quick=False)


def test_the_days_of_a_closed_form_tell_its_error_from_chance(load):
    """Two of the 40 days by default: the standard error falls with the root of the days."""
    forms = load("autoscale").autoscale_forms
    found = forms._erlang(2, 3)
    assert 0 < found.standard_error * math.sqrt(2 / 40) < 0.01
    assert abs(found.error) < 4 * found.standard_error


def test_the_standard_error_of_a_share_is_that_of_repeated_samples(load):
    """Days whose chance of a rejection differs: far more than a binomial's."""
    forms, rng = load("autoscale").autoscale_forms, np.random.default_rng(5)
    arrived = rng.poisson(300.0, (400, 60))
    refused = rng.binomial(arrived, rng.beta(2.0, 18.0, arrived.shape))
    shares = refused.sum(axis=1) / arrived.sum(axis=1)
    said = np.mean([forms.ratio_error(*each) for each in zip(refused, arrived, strict=True)])
    assert said == pytest.approx(shares.std() / shares.mean(), rel=0.1)


@pytest.mark.parametrize(
    "worse",
    [
        {"false_differences_max": 0.06},
        {"levels_false_max": 0.06},
        {"found_share": 0.8},
        {"found_share": None},
        {"wrong_way_max": 0.02},
        {"held_min": 0.9},
        {"all_refused": True},
    ],
)
def test_the_comparison_benchmark_has_a_gate_for_every_figure(load, worse):
    script = load("compare")
    fine = {"false_differences_max": 0.0, "levels_false_max": 0.0, "found_share": 1.0, "wrong_way_max": 0.0}
    fine |= {"held_min": 1.0, "all_refused": False, "sought": True}
    assert script.is_good(fine) and not script.is_good(fine | worse)
    assert script.is_good(fine | {"found_share": None, "sought": False})


def test_a_small_fleet_is_as_cheap_as_brute_force_finds(load):
    gaps, _ = load("fleet_mix").compared(cases=8, seed=5)
    assert gaps and max(gaps) < 1e-9


def test_every_script_that_must_be_shown_is_there():
    assert {"hops", "ninety_minutes", "oracle", "sessions", "stage_speed"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_its_help_ends_with_an_example_of_options_that_it_has(script, load, capsys):
    with pytest.raises(SystemExit, match="0"):
        load(script).main(["--help"])
    explained, _, example = capsys.readouterr().out.partition("Example:\n")
    assert example.startswith(f"  python {PATHS[script].relative_to(ROOT)}") and example.count("\n") == 1
    assert "--quick" in explained
    assert all(f"{option} " in explained for option in re.findall(r"--[a-z-]+", example))


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_option_is_a_mistake_in_one_line(script, load, capsys):
    with pytest.raises(SystemExit, match="64"):
        load(script).main(["--nonsense"])
    said = capsys.readouterr().err
    assert "--nonsense" in said and "--help" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("oracle", ["--sessions", "0"], "--sessions: '0' is not a whole number from 1"),
        ("oracle", ["--guidance", "1.3,nan"], "'nan' is not a number"),
        ("oracle", ["--steps", "ten"], "'ten' is not a whole number"),
        ("oracle", ["--checkpoint", "x", "--hidden", "96"], "leave --as-checkpoint and sizes out"),
        ("ninety_minutes", ["--frames", "40501"], "from 20 to 40500"),
        ("sessions", ["--only", "leak,leek"], "'leek' is none of admission, cancellation, leak, warm"),
        ("hops", ["--streams", "1,,4"], "'' is not a whole number"),
        ("kernels", ["--arch", "sm_90,sm_70"], "'sm_70' is none of sm_80, sm_89, sm_90"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(script, arguments, message, load, capsys):
    with pytest.raises(SystemExit, match="64"):
        load(script).main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("oracle", ["--hidden", "97"], "heads times an even number"),
        ("oracle", ["--depths", "1,1"], "depths has 7 numbers"),
        ("oracle", ["--preset", "2b"], "unknown preset"),
        ("oracle", ["--checkpoint", "/nowhere"], "config.json"),
        ("ninety_minutes", ["--script", "/nowhere.txt"], "/nowhere.txt cannot be read"),
        ("hops", ["--preset", "2b"], "unknown preset"),
        ("kernels", ["--preset", "1.5b,2b"], "unknown preset"),
    ],
)
def test_what_cannot_be_served_is_refused_before_a_server_starts(script, arguments, message, load):
    with pytest.raises(InputError, match=message):
        load(script).main(arguments)


def test_the_figures_are_plain_numbers_on_the_last_line(load, capsys):
    common = load("common")
    shown = common.table("Two", "what", "figure")
    common.finish(shown, {"a": 1.23456789, "b": float("inf"), "c": 7})
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"a": 1.2346, "b": None, "c": 7}


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


def test_a_mistake_ends_the_script_with_its_reason_alone():
    answer = run("benchmarks/model/ninety_minutes.py", "--script", "/nowhere.txt")
    assert answer.returncode == 64 and answer.stdout == ""
    assert "/nowhere.txt" in answer.stderr and "Traceback" not in answer.stderr


@pytest.mark.server
def test_the_oracle_finds_no_difference_between_triton_and_generate():
    answer = run("benchmarks/model/oracle.py", "--quick")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    figures = json.loads(answer.stdout.splitlines()[-1])
    assert figures["max_abs_difference"] <= 1e-4
    assert figures["sessions"] == 8 and figures["failed"] == 0
    assert figures["loudest_sample"] > 0.1 and figures["frames"] > 20


def plan_with(verdict: str, *left_out: LeftOut) -> Plan:
    return replace(Plan.of(plan_record(verdict)), left_out=left_out)


@pytest.mark.parametrize(
    ("code", "plan", "concluded"),
    [
        (0, plan_with("met", LeftOut("2 of 6 points", 60.0, decisive=False)), True),
        (2, plan_with("inconclusive"), True),  # for a reason of its own
        (2, plan_with("inconclusive", LeftOut("open loop", 60.0, decisive=True)), False),
        (70, None, False),
        (-1, None, False),  # it never ended
    ],
)
def test_a_first_start_concludes_unless_it_wants_for_time(code, plan, concluded, load):
    first_run = load("first_run")
    start = first_run.Start("quiet", code, 8.0, plan)
    assert start.concluded == concluded
    assert first_run.figures([start])["concluded_share"] == concluded


def test_a_dilation_that_shows_nothing_does_not_agree(load):
    bench = load("dilation")
    rungs, ttfa_s = (1, 3), np.array([0.2, 0.3])

    def judged(*slower, quick=False, plain=None):
        plain = plain or bench.Figures(1.0, {1: 0.6, 3: 0.7}, ttfa_s, 0.1, ())
        lacking = [why for each in (plain, *slower) for why in bench.missing(each, rungs)]
        figures = bench.compared(plain, slower) | {"missing": len(lacking)}
        return bench.is_good(figures, quick)

    good = bench.Figures(5.0, {1: 0.6, 3: 0.7}, ttfa_s, 0.1, ())
    assert judged(good) and judged(good, good)
    worse = (
        replace(good, invalid=("others took CPU",)),
        replace(good, step_s={1: 0.6}),
        replace(good, step_s={1: 0.6, 3: math.nan}),
        replace(good, ttfa_s=np.array([])),
    )
    for one in worse:
        assert not judged(good, one) and not judged(one, good) and not judged(one, quick=True)
        assert not judged(good, plain=replace(one, dilation=1.0))
    slow = replace(good, step_s={1: 0.66, 3: 0.7})
    assert not judged(slow) and judged(slow, quick=True)
