"""A sign-off keeps its budget, says what it left out, and seals only what is an answer."""

import dataclasses

import pytest
import signoff_fakes
from report_sample import plan_record
from signoff_fakes import PLAN

from harness import signoff as job
from harness.errors import InputError, ServerError
from harness.records.jobs import JobsPlan, SizedFleet
from harness.records.plan import Plan
from harness.records.store import Run
from harness.report.seal import check_seal, sign
from harness.runs.analysis import plan_of
from harness.sweep.budget import Budget
from harness.sweep.progress import Watcher

plan, fakes, fitted = signoff_fakes.plan, signoff_fakes.fakes, signoff_fakes.fitted


def test_a_budget_that_is_too_small_says_what_it_leaves_out(tmp_path, fakes):
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN.replace("budget_minutes: 30", "budget_minutes: 0.5"))
    said = []
    watcher = Watcher()
    watcher.say = said.append
    job.SignOff(plan, tmp_path).execute(watcher)
    assert fakes.measured == [] and "budget of 0.5 min" in said[0]
    run = Run.open(next(tmp_path.glob("small-*")))
    assert any("ladder 1/3" in reason for reason in run.plan().reasons)
    assert not run.manifest.finished_at  # the next start goes on


@pytest.mark.parametrize("verdict", ["met", "missed"])
def test_where_the_budget_left_no_time_for_the_first_point_there_is_no_answer(tmp_path, fakes, monkeypatch, verdict):
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN.replace("budget_minutes: 30", "budget_minutes: 0.5"))
    monkeypatch.setattr(job, "plan_of", lambda *given: dataclasses.replace(plan_of(*given), verdict=verdict))
    content = job.SignOff(plan, tmp_path).execute()
    assert content.verdict == "inconclusive" and "start the sign-off again" in content.reasons[-1]


@pytest.fixture
def short_of_time(plan, tmp_path, fakes, monkeypatch):
    """A sign-off whose budget ends after one of three points, with a verdict."""
    monkeypatch.setattr(Budget, "left_s", lambda budget: 0.0 if fakes.measured else 1e6)

    def of(verdict):
        monkeypatch.setattr(job, "plan_of", lambda *given: dataclasses.replace(plan_of(*given), verdict=verdict))
        return job.SignOff(plan, tmp_path)

    return of


def test_points_that_the_budget_left_out_do_not_keep_a_confirmed_deployment_from_being_met(short_of_time):
    work = short_of_time("met")
    content = work.execute()
    assert content.verdict == "met" and work.run.manifest.finished_at
    assert content.left_out[0].what.startswith("2 of 3 points") and not content.left_out[0].decisive
    assert "2 of 3 points" in content.reasons[-1] and "budget_minutes of 31" in content.reasons[-1]
    assert work.execute() == work.run.plan()  # an answer, from its store


TASKS = "per_hour: 2\nlength: {fixed: 15}\nslos: {turnaround_p95: 2x}\n"


class Steps(Watcher):
    """Steps as they begin and end."""

    def __init__(self):
        self.seen = []

    def step(self, what, estimated_s):
        self.seen.append(what)

    def done(self, note=""):
        self.seen.append("done")


@pytest.mark.parametrize(("served", "verdict"), [(("streams", "tasks", "both"), "met"), (("streams",), "inconclusive")])
def test_tasks_that_no_fleet_serves_beside_the_streams_keep_a_plan_from_being_met(
    plan, tmp_path, fakes, monkeypatch, served, verdict
):
    note = "" if "both" in served else "No number of devices meets the SLOs of both."
    sized = [SizedFleet(kind=each, devices=2, interval=(2, 3), sessions=4, binding="rtf") for each in served]
    jobs = JobsPlan(
        qps=1.0, swing=0.0, per_hour=2.0, mean_audio_s=15.0, segment_s=5.0, slos=(), fleets=tuple(sized), note=note
    )  # fmt: skip
    monkeypatch.setattr(job, "jobs_of", lambda *given: jobs)
    monkeypatch.setattr(job, "plan_of", lambda *given: dataclasses.replace(plan_of(*given), verdict="met"))
    (tmp_path / "tasks.yaml").write_text(TASKS)
    plan.write_text(PLAN + "jobs: tasks.yaml\n")
    steps = Steps()
    content = job.SignOff(plan, tmp_path / "results").execute(steps)
    doubts = (f"Tasks beside the streams: {note}",) if note else ()
    assert content.verdict == verdict and content.doubts == doubts and set(doubts) <= set(content.reasons)
    assert steps.seen[-4:] == ["planning", "done", "simulating fleets for streams and tasks", "done"]
    assert steps.seen[1::2] == ["done"] * (len(steps.seen) // 2)


def test_a_sweep_of_a_sealed_run_measures_nothing_more(short_of_time, fakes, monkeypatch):
    work = short_of_time("met")
    work.execute()
    monkeypatch.setattr(Budget, "left_s", lambda budget: 1e6)
    measured = len(fakes.measured)
    work.execute(ladders_only=True)
    assert len(fakes.measured) == measured and not check_seal(work.run.path).problems


def test_what_a_kill_before_the_seal_left_still_names_what_the_budget_left_out(short_of_time, plan, tmp_path):
    work = short_of_time("met")
    content = work.execute()
    work.run.update_manifest(sealed=False)
    (work.run.path / "signoff.json").unlink()
    assert job.SignOff(plan, tmp_path).execute().left_out == content.left_out != ()


def test_going_on_without_a_server_leaves_the_seal(short_of_time, plan, tmp_path, monkeypatch):
    short_of_time("met").execute()

    def gone(base):
        raise ServerError("there is no Triton")

    monkeypatch.setattr(job, "TritonServer", gone)
    work = job.SignOff(plan, tmp_path)
    with pytest.raises(ServerError, match="no Triton"):
        work.execute(go_on=True)
    assert not check_seal(work.run.path).problems and work.run.manifest.finished_at


def test_while_no_ladder_is_valid_less_of_the_budget_is_reserved(plan, tmp_path, fakes):
    work = job.SignOff(plan, tmp_path)
    fakes.valid = False
    first = work.campaign.later_s()
    work.execute(ladders_only=True)
    assert len(fakes.measured) == 6 and work.campaign.later_s() == pytest.approx(first, rel=0.3)
    again = job.SignOff(plan, tmp_path / "valid")
    fakes.valid = True
    again.execute(ladders_only=True)
    assert again.campaign.later_s() > work.campaign.later_s()


@pytest.mark.parametrize("kind", ["ladder", "open"])
def test_an_invalid_trial_that_an_answer_needs_and_no_time_for_its_repeat_is_no_end(
    plan, tmp_path, fakes, fitted, monkeypatch, kind
):
    """Neither a loop without an end, nor a sealed answer that no later start could better."""
    fitted(best_of=lambda looks: 0)
    after = {"ladder": 4, "open": 6}[kind]  # trials: three ladders, two more of the best, an open run
    monkeypatch.setattr(Budget, "left_s", lambda budget: 1e6 if len(fakes.measured) < after else 0.0)
    run = fakes.run

    def invalid_at_last(self, *given, **more):
        fakes.valid = len(fakes.measured) < after - 1
        return run(self, *given, **more)

    monkeypatch.setattr(fakes, "run", invalid_at_last)
    work = job.SignOff(plan, tmp_path)
    work.execute()
    assert {"ladder": [True, False, True], "open": [True]}[kind] == [each.decisive for each in work.campaign.left_out]
    told = work._with_what_was_left_out(Plan.of(plan_record("met")))
    assert told.verdict == "inconclusive" and "start the sign-off again" in told.doubts[0]


def test_points_that_the_budget_left_out_keep_missed_from_being_said(short_of_time):
    work = short_of_time("missed")
    content = work.execute()
    assert content.verdict == "inconclusive" and not work.run.manifest.finished_at
    assert "2 of 3 points" in content.reasons[-1] and "start the sign-off again" in content.reasons[-1]


def test_a_signed_answer_goes_on_with_what_its_budget_left_out_and_is_signed_anew(
    short_of_time, plan, tmp_path, fakes, monkeypatch
):
    work = short_of_time("met")
    work.execute()
    monkeypatch.setattr(Budget, "left_s", lambda budget: 1e6)
    work = job.SignOff(plan, tmp_path)
    content = work.execute(go_on=True)
    assert len(fakes.measured) == len(set(fakes.measured)) == 3 and content.left_out == ()
    assert work.run.manifest.finished_at and not check_seal(work.run.path).problems
    assert work.execute(go_on=True) == work.run.plan() and len(fakes.measured) == 3  # nothing is left to go on with


def test_a_finished_run_answers_only_as_long_as_it_can_be_relied_on(plan, tmp_path, fakes):
    work = job.SignOff(plan, tmp_path)
    work.execute()
    stored = work.run.path / "plan.json"
    as_signed = stored.read_text()
    stored.write_text(as_signed.replace("inconclusive", "met"))
    with pytest.raises(InputError, match="plan.json was changed after"):
        job.SignOff(plan, tmp_path).execute()
    stored.write_text(as_signed)
    work.run.update_manifest(finished_at="2026-01-01T00:00:00+00:00")
    sign(work.run)
    with pytest.raises(InputError, match="it expired at .* --fresh"):
        job.SignOff(plan, tmp_path).execute()


@pytest.mark.parametrize(("search", "verdict"), [("grid", "missed"), ("{kind: random, trials: 2}", "inconclusive")])
def test_a_search_that_left_points_untried_does_not_say_that_none_keeps_the_slos(
    tmp_path, fakes, monkeypatch, search, verdict
):
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN + f"search: {search}\n")
    monkeypatch.setattr(job, "plan_of", lambda *given: dataclasses.replace(plan_of(*given), verdict="missed"))
    content = job.SignOff(plan, tmp_path).execute()
    assert content.verdict == verdict
    assert any("1 of the 3 points" in reason for reason in content.reasons) == (verdict != "missed")


def test_a_budget_that_ends_before_the_second_try_of_an_invalid_trial_ends_the_sweep(
    plan, tmp_path, fakes, monkeypatch
):
    fakes.valid = False
    monkeypatch.setattr(Budget, "left_s", lambda budget: 1e6 if len(fakes.measured) < 3 else 0.0)
    work = job.SignOff(plan, tmp_path)
    work.execute(ladders_only=True)
    assert len(work.run.trials()) == 3
    assert [each.what for each in work.campaign.left_out] == [
        "2 of 3 points, from ladder 2/3: diffusion_decoder.delay_us 1000"
    ]
