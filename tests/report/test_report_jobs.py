"""The section of the report about tasks beside the streams, and how a run comes by it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import report_sample as sample
from report_page import Page

from harness.capacity.planning.job_fleets import BOTH, STREAMS, TASKS, FleetLoad, SharedPlan
from harness.content import content_of, read
from harness.errors import InconclusiveError, InputError, PlanError
from harness.planfile.jobs import demand_of, load_jobs, read_jobs
from harness.planfile.reading import load_plan
from harness.records.jobs import AskedTasks, JobsPlan, JudgedTurnaround, SizedFleet
from harness.records.store import Run
from harness.records.turnaround import TurnaroundSlo
from harness.report.page import write_report
from harness.runs.analysis import jobs_of
from harness.runs.opening import run_id_of, spec_of

ROOT = Path(__file__).resolve().parents[2]
SLO = TurnaroundSlo.parse("turnaround_p95", "2x")
TASKS_FILE = "per_hour: 240\nlength: {fixed: 1500}\nslos: {turnaround_p95: 2x}\nstreams_swing: 0.8\n"


def fleet(kind, devices, sessions=0):
    slos = (JudgedTurnaround(slo="turnaround p95 <= 2x", value="1.53x"),) if sessions else ()
    return SizedFleet(
        kind=kind, devices=devices, interval=(devices, None), sessions=sessions, turnarounds=slos,
        binding="rtf p95 of class short",
    )  # fmt: skip


JOBS = JobsPlan(
    qps=5.0, swing=0.8, per_hour=240.0, mean_audio_s=1500.0, segment_s=120.0, slos=("turnaround p95 <= 2x",),
    fleets=(fleet("streams", 9), fleet("tasks", 4, 30), fleet("both", 11, 80)), two_fleets=13, saved=2,
    saved_interval=(1, 3), basis="extrapolated",
)  # fmt: skip


def page_of(tmp_path, jobs=JOBS, **more):
    run = sample.make_run(tmp_path, plan=sample.outlook_record() | {"jobs": content_of(jobs)}, **more)
    assert run.plan().jobs == jobs
    return Page(write_report(run).read_text())


def fleets_of(page):
    return next(rows for rows in page.tables if rows[0][:2] == ["Fleet", "Devices"])


def test_it_shows_the_fleets_and_what_one_of_them_saves(tmp_path):
    page = page_of(tmp_path)
    assert "jobs" in page.ids and "turnaround p95 <= 2x" in page.text
    assert [row[:4] for row in fleets_of(page)[1:]] == [
        ["streams alone", "9", "at least 9", "–"],
        ["tasks alone", "4", "at least 4", "30"],
        ["both on one fleet", "11", "at least 11", "80"],
    ]
    assert fleets_of(page)[3][4] == "1.53xturnaround p95 <= 2x" and fleets_of(page)[3][6] == "extrapolated"
    assert "One fleet needs 11 devices, two fleets 13: 2 fewer (interval: 1 to 3)" in " ".join(page.text.split())
    assert "--sessions 80" in page.text


def test_a_saving_whose_interval_is_not_known_says_why(tmp_path):
    text = " ".join(page_of(tmp_path, replace(JOBS, saved_interval=(None, None))).text.split())
    assert "2 fewer (interval not known: of the slowest likely devices no number suffices)." in text


def test_figures_of_emulated_times_are_labelled(tmp_path):
    assert all(row[6] == "extrapolated emulated" for row in fleets_of(page_of(tmp_path, emulated=True))[1:])


def test_a_kind_without_a_fleet_and_a_plan_without_tasks(tmp_path):
    page = page_of(tmp_path / "a", replace(JOBS, fleets=JOBS.fleets[:1], saved=None, saved_interval=None))
    assert fleets_of(page)[3][5] == "no number of devices meets the SLOs" and "two fleets" not in page.text
    page = page_of(tmp_path / "b", replace(JOBS, fleets=(), saved=None, note="No fleet is given: too few to tell."))
    assert "No fleet is given: too few to tell." in page.text
    run = sample.make_run(tmp_path / "c", plan=sample.outlook_record())
    assert "jobs" not in Page(write_report(run).read_text()).ids


@pytest.fixture
def with_tasks(tmp_path):
    """A run that began with a file of tasks, which has been removed since, and its plan."""
    path = tmp_path / "run"
    shutil.copytree(ROOT / "results" / "sample-mixed", path)
    (tmp_path / "tasks.yaml").write_text(TASKS_FILE)
    run = Run.open(path)
    run.update_manifest(jobs=read_jobs(tmp_path / "tasks.yaml"))
    (tmp_path / "tasks.yaml").unlink()
    return Run.open(path), spec_of(run).model_copy(update={"jobs": str(tmp_path / "tasks.yaml")})


def test_a_plan_with_tasks_gets_its_fleets_at_the_rate_of_the_answer(with_tasks, monkeypatch):
    run, spec = with_tasks
    asked = []

    def shared(of, demand, qps):
        asked.append(qps)
        loads = {kind: FleetLoad(kind, 3, 8, {"rtf": 0.9}, {SLO: 1.234}) for kind in (STREAMS, TASKS, BOTH)}
        return SharedPlan(qps, loads, {kind: (3, 4) for kind in loads}, (2, 4), True)

    monkeypatch.setattr("harness.runs.analysis.shared_plan_of", shared)
    found = jobs_of(run, spec, run.plan())
    assert asked == [run.plan().headline().qps] == [found.qps]
    assert (found.per_hour, found.mean_audio_s, found.segment_s, found.basis) == (240, 1500, 120, "extrapolated")
    assert found.fleet(BOTH).turnarounds == (JudgedTurnaround(slo="turnaround p95 <= 2x", value="1.23x"),)
    assert (found.two_fleets, found.saved, found.saved_interval) == (6, 3, (2, 4))
    assert jobs_of(run, spec.model_copy(update={"jobs": None}), run.plan()) is None


def test_a_run_that_did_not_keep_its_tasks_is_not_answered_for_those_of_a_file_of_today(with_tasks):
    run, spec = with_tasks
    run.update_manifest(jobs=None)
    with pytest.raises(InputError, match="does not hold the tasks of its plan"):
        jobs_of(run, spec, run.plan())


def test_kept_tasks_are_those_of_the_file(tmp_path):
    path, lengths = tmp_path / "tasks.yaml", tmp_path / "lengths.csv"
    lengths.write_text("seconds\n30\n10\n20\n")
    for length in ("{fixed: 1500}", "{lognormal: {median: 1200, sigma: 0.6}}", "{empirical: lengths.csv}"):
        path.write_text(TASKS_FILE.replace("{fixed: 1500}", length))
        kept, demand = content_of(read_jobs(path)), load_jobs(path)
        again = demand_of(read(AskedTasks, json.loads(json.dumps(kept))))
        assert np.array_equal(again.lengths.frames, demand.lengths.frames) and again.lengths.frames.dtype == np.int64
        assert replace(again, lengths=demand.lengths) == demand and len(json.dumps(kept)) < 1000
    lengths.unlink()
    assert demand_of(read(AskedTasks, kept)).lengths.frames.tolist() == [75, 150, 225]
    with pytest.raises(InputError, match="tasks that this harness cannot read: per_day"):
        demand_of(AskedTasks(keys=kept["keys"] | {"per_day": 1}))


def test_tasks_of_which_nothing_is_known_do_not_end_a_sign_off(with_tasks, monkeypatch):
    def shared(*_):
        raise InconclusiveError("too few to tell")

    monkeypatch.setattr("harness.runs.analysis.shared_plan_of", shared)
    found = jobs_of(*with_tasks, with_tasks[0].plan())
    assert found.fleets == () and found.note == "No fleet is given: too few to tell."


def test_another_file_of_tasks_is_another_run_and_a_wrong_one_is_refused_before_it(tmp_path):
    text = (ROOT / "scenarios" / "quick.yaml").read_text() + "\njobs: tasks.yaml\n"
    plan, tasks = tmp_path / "plan.yaml", tmp_path / "tasks.yaml"
    plan.write_text(text)
    tasks.write_text(TASKS_FILE)
    first = run_id_of(plan, load_plan(plan), None)
    tasks.write_text(TASKS_FILE.replace("240", "120"))
    assert run_id_of(plan, load_plan(plan), None) != first
    tasks.write_text(TASKS_FILE.replace("2x", "soon"))
    with pytest.raises(PlanError, match="tasks.yaml: slos"):
        run_id_of(plan, load_plan(plan), None)
    tasks.unlink()
    with pytest.raises(PlanError, match="tasks.yaml"):
        run_id_of(plan, load_plan(plan), None)
