"""Whether a plan's windows hold enough requests to conclude, before anything is measured."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from harness import signoff as job
from harness import wire
from harness.cli.main import app
from harness.clock import Clock
from harness.errors import InputError
from harness.planfile.plan import PlanSpec
from harness.planfile.reading import load_plan
from harness.records.slo import judge
from harness.runs.expected import ExpectedServer, expected_server
from harness.runs.rungs import sessions_that_fit
from harness.sweep.budget import START_SERVER_S
from harness.sweep.outlook import PlanOutlook, WindowOutlook, least_s
from harness.sweep.progress import Watcher

SCENARIOS = Path(__file__).resolve().parents[2] / "scenarios"
GPUS = ("h100", "h200", "l40s")


def dry_run(*arguments):
    done = CliRunner().invoke(app, ["signoff", "--dry-run", *map(str, arguments)], env={"COLUMNS": "200"})
    return done.exit_code, " ".join(done.output.split())


def scenario(folder, name="h100", **changes):
    """A copy of a scenario with other lines, beside its profile."""
    text = (SCENARIOS / f"{name}.yaml").read_text().replace("profiles/", f"{SCENARIOS}/profiles/")
    for key, line in changes.items():
        text, count = re.subn(rf"(?m)^{key}:.*$", line, text)
        assert count == 1, key
    (folder / "plan.yaml").write_text(text)
    return folder / "plan.yaml"


def outlook(path):
    return outlook_of(load_plan(path))


def outlook_of(spec):
    return PlanOutlook.of_plan(spec, sessions_that_fit(spec))


@pytest.mark.parametrize("name", GPUS)
def test_a_scenario_for_a_laptop_can_conclude_within_its_budget(name):
    """Two cores need a time dilation of 5 for an H100, and in proportion to the frames/s of the highest rung."""
    found = outlook(SCENARIOS / f"{name}.yaml")
    assert found.problems() == [] and found.most_dilation > {"h100": 6, "h200": 12, "l40s": 2}[name]
    assert all(each.is_decidable for each in found.window.slos if each.slo.traffic_class == "short")


def test_requests_in_a_window_are_held_against_those_that_an_slo_needs(tmp_path):
    """0.32 requests/s for 36 s: 11.4 of 10-second lines, where 29 without a breach decide a p90, and 11 a p75."""
    slos = "slos: {short: {ttfa_p90_s: 1.0}, long: {rtf_p90: 0.9}}\nx:"
    plan = scenario(tmp_path, slos=slos, confirm="confirm: {seconds: 12}")
    text = plan.read_text()
    plan.write_text(text[: text.index("\nx:")] + text[text.index("\ntargets_qps") :])
    spec = load_plan(plan)
    found = WindowOutlook.of(spec, spec.traffic_mix(), 0.32)
    assert found.seconds == 36 and [each.needed for each in found.slos] == [29, 29]
    assert found.slos[0].expected == pytest.approx(0.32 * 0.99 * 36)
    assert "about 11 requests of class short, and 29 are needed for ttfa p90" in found.problem
    assert "give confirm.seconds 42 or more, or an SLO of p75" in found.problem
    longer = spec.model_copy(update={"confirm": spec.confirm.model_copy(update={"seconds": 42.0})})
    enough = WindowOutlook.of(longer, spec.traffic_mix(), 0.32)
    assert not enough.problem and enough.slos[0].is_decidable
    assert judge(enough.slos[0].slo, np.zeros(enough.slos[0].needed)).met


@pytest.mark.parametrize("is_expected", [True, False])
@pytest.mark.parametrize("dilation", [1.0, 5.0])
def test_times_are_those_that_the_sign_off_reserves(tmp_path, dilation, is_expected):
    work = job.SignOff(scenario(tmp_path), tmp_path / "results", dilate=dilation)
    if not is_expected:
        work.campaign.expected = None
    found = PlanOutlook.of(work.spec, work.campaign.expected, work.campaign.room)
    assert found.least_s == pytest.approx(START_SERVER_S + work.campaign.least_s())


def test_the_highest_dilation_is_that_whose_least_time_is_the_budget(tmp_path):
    work = job.SignOff(scenario(tmp_path), tmp_path / "results", dilate=5.0)
    found = PlanOutlook.of(work.spec, work.campaign.expected, work.campaign.room)
    at_most = least_s(work.spec, found.window.seconds, work.campaign.room, Clock(found.most_dilation))
    assert at_most == pytest.approx(60 * work.spec.budget_minutes)


def test_a_sign_off_refuses_windows_that_are_too_short_before_it_starts_a_server(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "TritonServer", lambda base: pytest.fail("a server was started"))
    plan = scenario(tmp_path, confirm="confirm: {load_share: [0.7], seconds: 5}")
    work = job.SignOff(plan, tmp_path / "results", dilate=5.0)
    with pytest.raises(InputError, match=r"confirm: 15 s .* are needed for .* give confirm.seconds \d+ or more"):
        work._measure(Watcher(), ladders_only=False)
    assert not work.run.trials()
    work, said, watcher = job.SignOff(plan, tmp_path / "results", dilate=1.0), [], Watcher()
    watcher.say = said.append
    work._check_windows(watcher)  # at full speed an inconclusive answer costs little: a warning
    assert len(said) == 1 and said[0].startswith("warning: confirm: 15 s")


def test_one_slow_point_of_a_space_does_not_refuse_a_plan_that_another_may_conclude(tmp_path):
    space = "currency: USD\nspace: {diffusion_decoder.delay_us: [20000, 0]}"
    plan = scenario(tmp_path, currency=space, confirm="confirm: {load_share: [0.7], seconds: 5}")
    work, said, watcher = job.SignOff(plan, tmp_path / "results", dilate=5.0), [], Watcher()
    watcher.say = said.append
    assert work.search.size == 2
    work._check_windows(watcher)
    assert len(said) == 1 and "with the first value of each knob" in said[0]
    code, said = dry_run(plan)
    assert code == 0 and "with the first value of each knob" in said and "Nothing rules out" in said


def test_a_space_too_large_to_write_out_has_an_expected_server_at_once(tmp_path, monkeypatch):
    """10^8 points: none but the first is made."""
    points = PlanSpec.points
    monkeypatch.setattr(PlanSpec, "points", lambda spec: points(spec) if spec.size() == 1 else pytest.fail("all"))
    spec = load_plan(SCENARIOS / "h100.yaml")
    knobs = [f"{stage}.{knob}" for stage in wire.STAGES for knob in ("delay_us", "max_batch", "instances")][:8]
    large = spec.model_copy(update={"space": {knob: tuple(range(20, 30)) for knob in knobs}})
    assert large.size() == 10**8 and outlook_of(large).server.rate_per_s > 0


def test_a_dry_run_says_what_each_window_holds_and_exits_with_whether_the_plan_can_conclude(tmp_path):
    code, said = dry_run(SCENARIOS / "h100.yaml")
    assert code == 0 and "The plan can conclude" in said and "suffices up to a time dilation of" in said
    code, said = dry_run(scenario(tmp_path, confirm="confirm: {load_share: [0.7], seconds: 5}"))
    assert code == 2 and "give confirm.seconds" in said and "can conclude" not in said
    code, said = dry_run(scenario(tmp_path, ladder="ladder: {sessions: [1, 6, 12, 17], seconds: 2}"))
    assert code == 2 and "ladder: about" in said and "give ladder.seconds" in said
    code, said = dry_run(scenario(tmp_path), "--dilate", "20")
    assert code == 2 and "with time dilated 20 times: give budget_minutes" in said


def test_without_an_emulated_gpu_a_dry_run_says_from_which_rate_the_plan_decides(tmp_path):
    """quick: 59 requests decide a p95, 74.4 come but for chance; 70% of them short, in 90 s at 85% of the rate."""
    code, said = dry_run(SCENARIOS / "quick.yaml")
    spec = load_plan(SCENARIOS / "quick.yaml")
    rate = (59 + 2 * math.sqrt(59)) / 0.7 / (3 * spec.confirm.seconds) / max(spec.confirm.load_share)
    assert code == 0 and "is not known before a ladder" in said and f"{rate:.2g} requests/s" in said
    assert "Nothing rules out that the plan concludes" in said
    assert list(tmp_path.iterdir()) == []


def test_a_rate_of_none_a_profile_that_does_not_tell_and_no_profile_are_told_apart(tmp_path):
    """No emulated GPU makes speech 100 times as fast as it is spoken."""
    plan = scenario(tmp_path)
    plan.write_text(plan.read_text().replace("rtf_p80: 0.9", "rtf_p80: 0.01"))
    code, said = dry_run(plan)
    assert code == 0 and "no rate meets the SLOs, by real-time factor of short requests" in said
    assert "not known" not in said and "The plan can conclude" not in said
    profile = json.loads((SCENARIOS / "profiles" / "h100-sxm-1.5b-staged-estimated.json").read_text())
    profile["stages"]["diffusion_decoder"] = profile["stages"]["diffusion_decoder"][:1]
    (tmp_path / "one-point.json").write_text(json.dumps(profile))
    code, said = dry_run(scenario(tmp_path, emulate="emulate: one-point.json"))
    assert code == 0 and "is not known before a ladder is measured: the profile" in said and "does not tell: " in said
    code, said = dry_run(SCENARIOS / "quick.yaml")
    assert code == 0 and "is not known before a ladder is measured: only emulated GPUs have an expected one" in said


def test_what_begins_on_a_rung_is_what_its_frames_complete():
    """Two GPUs of 4 sessions each at 0.1 s: 80 frames/s, of requests of 40 frames."""
    server = ExpectedServer(1.0, np.full(8, 0.1), 2, 40.0)
    assert server.begun_per_s(8) == pytest.approx(2.0)
    assert replace(server, step_s=np.linspace(0.1, 0.8, 8)).begun_per_s(8) == pytest.approx(0.5)


def test_a_plan_that_emulates_nothing_expects_nothing():
    assert expected_server(load_plan(SCENARIOS / "quick.yaml")) is None
