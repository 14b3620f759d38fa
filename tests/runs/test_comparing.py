"""Two stored runs compared: what is refused, what is said to differ, and what the command prints and exits with."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness.capacity.fitting.open_runs import slowed
from harness.cli import compare_tables
from harness.cli.main import app
from harness.errors import InputError
from harness.exit_codes import INCONCLUSIVE as EXIT_INCONCLUSIVE
from harness.exit_codes import WORSE as EXIT_WORSE
from harness.records.comparison import COUNT, INCONCLUSIVE, NOT_SHOWN, UNKNOWN, WORSE, Comparison
from harness.records.store import Run
from harness.report.screen import Screen
from harness.runs.comparing import compare_runs

RESULTS = Path(__file__).resolve().parents[2] / "results"
SAMPLE = RESULTS / "sample-quick"


def copied(folder: Path, sample: str = "sample-quick") -> Run:
    """A run's fit and plan, unsigned."""
    folder.mkdir()
    for name in ("manifest.json", "fit.json", "plan.json"):
        shutil.copy(RESULTS / sample / name, folder / name)
    run = Run.open(folder)
    run.update_manifest(sealed=False)
    return run


@pytest.fixture
def again(tmp_path):
    return copied(tmp_path / "again")


@pytest.fixture
def slower(tmp_path):
    """The sample on a device whose steps take 2.5 times as long, with the counts of that."""
    run, times = copied(tmp_path / "slower"), 2.5
    fit, plan = run.fit(), run.plan()
    parts = [
        replace(
            slowed(each, times),
            max_rate_per_s=each.rate() / times,
            max_rate_interval=tuple(bound / times for bound in each.max_rate_interval),
            binding=each.binding,
        )
        for each in fit.deployments
    ]
    run.write_fit(replace(fit, deployments=tuple(parts)))
    more = [(4 * each.devices, tuple(4 * n for n in each.interval)) for each in plan.targets]
    targets = [replace(e, devices=n, interval=bounds) for e, (n, bounds) in zip(plan.targets, more, strict=True)]
    run.write_plan(replace(plan, targets=tuple(targets)))
    return run


def changed_plan(run: Run, **changes) -> Run:
    run.update_manifest(plan=run.manifest.plan | changes)
    return run


def test_a_run_and_itself_show_no_difference(again):
    found = compare_runs(Run.open(SAMPLE), again)
    assert found.finding == NOT_SHOWN and found.pooled and found.differing == ()
    assert {row.change for row in found.differences} == {0.0}
    assert len(found.deployments) == 4 and (found.only_in_a, found.only_in_b) == (0, 0)


def test_a_slower_device_is_found(slower):
    found = compare_runs(Run.open(SAMPLE), slower)
    assert found.finding == WORSE
    assert {row.kind for row in found.differences if row.finding == WORSE} >= {"step time", "rate", "count"}
    assert compare_runs(slower, Run.open(SAMPLE)).finding == "better"


def test_a_comparison_is_read_as_it_was_written(slower):
    found = compare_runs(Run.open(SAMPLE), slower)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["finding"] == WORSE and Comparison.of(content) == found


def test_hosts_and_software_that_differ_are_said_and_speak_for_themselves(again):
    host = replace(again.manifest.host, cpu="Xeon", cores=64)
    again.update_manifest(host=host, versions=again.manifest.versions | {"locust": "9"})
    found = compare_runs(Run.open(SAMPLE), again)
    said = {each.fact: (each.a, each.b) for each in found.differing}
    assert said["host: cpu"] == ("AMD EPYC", "Xeon") and said["host: cores"] == ("2", "64")
    assert said["locust"][1] == "9" and not found.pooled and found.finding == NOT_SHOWN


def test_a_dilated_clock_is_said_and_its_host_is_another(again):
    again.update_manifest(dilation=4.0)
    found = compare_runs(Run.open(SAMPLE), again)
    assert ("dilation", "1", "4") in [(each.fact, each.a, each.b) for each in found.differing] and not found.pooled


def test_counts_of_a_plan_with_another_cap_are_not_known_to_differ(again):
    found = compare_runs(Run.open(SAMPLE), changed_plan(again, utilisation_cap=0.6))
    assert {row.finding for row in found.differences if row.kind == COUNT} == {UNKNOWN}
    assert found.finding == INCONCLUSIVE


def test_another_topology_is_allowed_and_named(again):
    fit = again.fit()
    knobs = {"topology": "fused", "engine.max_batch": 8}
    fused = tuple(
        replace(each, deployment=knobs | {"engine.instances": i}) for i, each in enumerate(fit.deployments, 1)
    )
    again.write_fit(replace(fit, deployments=fused))
    said = {each.fact: (each.a, each.b) for each in compare_runs(Run.open(SAMPLE), again).differing}
    assert said["topology"] == ("staged", "fused") and said["engine.max_batch"] == ("", "8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: run.update_manifest(preset="1.5b"), r"their models differ \(preset tiny and 1.5b\)"),
        (lambda run: changed_plan(run, slos={"short": {"rtf_p95": 0.8}}), r"their SLOs differ \(only A: .*only B: rtf"),
        (lambda run: (run.path / "fit.json").unlink(), "holds no fit yet: run `harness fit --run"),
    ],
)
def test_runs_that_answer_other_questions_are_refused(again, change, words):
    change(again)
    with pytest.raises(InputError, match=words):
        compare_runs(Run.open(SAMPLE), again)


def test_another_mix_is_refused(tmp_path):
    with pytest.raises(InputError, match="their traffic differs .*; give two runs of one mix"):
        compare_runs(Run.open(SAMPLE), copied(tmp_path / "mixed", "sample-mixed"))


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_comparison_fits_its_terminal(monkeypatch, slower, width):
    text = io.StringIO()
    monkeypatch.setattr(compare_tables, "out", Screen(file=text, width=width))
    compare_tables.print_comparison(compare_runs(Run.open(SAMPLE), slower))
    shown = text.getvalue()
    assert max(map(len, shown.splitlines()[:-1])) <= width and "…" not in shown
    assert "B is worse than A at 95% confidence: step time; " in " ".join(shown.split())


def test_a_figure_that_only_one_run_knows_makes_it_inconclusive(again):
    fit = again.fit()
    unknown = [replace(each, max_rate_per_s=None, inconclusive="too few requests") for each in fit.deployments]
    again.write_fit(replace(fit, deployments=tuple(unknown)))
    done = CliRunner().invoke(app, ["compare", str(SAMPLE), str(again.path)])
    said = " ".join(done.output.split())
    assert done.exit_code == EXIT_INCONCLUSIVE and "No difference shown" not in said
    assert "Inconclusive: not known in both runs: requests/s of one device. Nothing else is shown to be worse." in said


def test_what_is_worse_is_so_whatever_else_is_not_known(slower):
    plan = slower.plan()
    slower.write_plan(
        replace(plan, targets=tuple(replace(e, devices=None, interval=(None, None)) for e in plan.targets))
    )
    found = compare_runs(Run.open(SAMPLE), slower)
    assert found.finding == WORSE and "Not known in both runs: devices." in compare_tables.conclusion(found)
    back = compare_runs(slower, Run.open(SAMPLE))
    assert back.finding == INCONCLUSIVE and "Better at 95% confidence: step time" in compare_tables.conclusion(back)


def test_the_command_exits_for_ci(again, slower):
    runner = CliRunner()
    same = runner.invoke(app, ["compare", str(SAMPLE), str(again.path)])
    assert same.exit_code == 0 and "No difference shown at 95% confidence" in " ".join(same.output.split())
    worse = runner.invoke(app, ["compare", str(SAMPLE), str(slower.path), "--json"])
    assert worse.exit_code == EXIT_WORSE and json.loads(worse.stdout)["finding"] == WORSE
