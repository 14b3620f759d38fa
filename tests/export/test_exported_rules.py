"""The plan's figures as Prometheus rules, and the alerts that compare servers with them."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from exports import SAMPLE, planned_fleet

from harness.errors import InputError
from harness.export.fleet import Accepted, fleet_of
from harness.export.prometheus import plan_rules, rule_files, sessions_query
from harness.records.slo import Slo
from harness.records.store import Run
from harness.runs.opening import spec_of
from harness.server_metrics import FIRST_AUDIO_BUCKETS

needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool, which runs rules, is not here")


@pytest.fixture(scope="module")
def fleet():
    return planned_fleet()


def test_the_rules_hold_the_plan(fleet):
    groups = {each["name"]: each["rules"] for each in yaml.safe_load(plan_rules(fleet))["groups"]}
    said = {each["record"]: each["expr"] for each in groups["vibevoice-plan"]}
    assert said["vibevoice_plan:requests_per_second"] == "vector(5)"
    assert said["vibevoice_plan:devices"] == f"vector({fleet.devices})"
    assert said["vibevoice_plan:expires_timestamp_seconds"] == f"vector({fleet.expires_unix_s})"
    assert 'le="1.5"' in said["vibevoice:first_audio_in_time_total"]  # the loosest of 1.0 and 1.5 s
    (alert,) = groups["vibevoice-plan-cap"]
    assert alert["expr"] == f"{sessions_query()} > {fleet.sessions * fleet.devices:g}"
    assert "plan exceeded" in alert["annotations"]["summary"]


@pytest.mark.parametrize(
    ("limit", "bound"), [(1.2, '"1"'), (2.0, '"2'), (0.02, '"0.1"'), (500, '"120'), (0.25, '"0.25"')]
)
def test_an_slo_between_two_bounds_is_judged_by_the_lower(fleet, limit, bound):
    text = plan_rules(replace(fleet, slos=(Slo("short", "ttfa_s", 0.95, limit),)))
    (expression,) = re.findall(r"le=(~?\"[^\"]+\")\}\)'\n +- record: vibevoice:first_audio_total", text)
    assert expression.lstrip("~").startswith(bound.rstrip('"'))
    assert ("next lower bound" in text) == (limit not in FIRST_AUDIO_BUCKETS)


ABOVE_THE_CAP = """
rule_files: [plan.yml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'vibevoice_sessions{job="triton", instance="a"}', values: '11x30 12x60'}
      - {series: 'vibevoice_sessions{job="triton", instance="b"}', values: '9x90'}
      - {series: 'vibevoice_queue_length{job="triton", instance="a"}', values: '2x90'}
    alert_rule_test:
      - {eval_time: 30m, alertname: SpeechPlanSessionsExceeded, exp_alerts: []}
      - {eval_time: 40m, alertname: SpeechPlanSessionsExceeded, exp_alerts: []}
      - eval_time: 50m
        alertname: SpeechPlanSessionsExceeded
        exp_alerts: [{exp_labels: {severity: ticket}, exp_annotations: {summary: SUMMARY, description: DESCRIPTION}}]
    promql_expr_test:
      - {expr: "vibevoice_plan:devices", eval_time: 1m, exp_samples: [{labels: "vibevoice_plan:devices", value: 2}]}
"""


@needs_promtool
def test_the_alert_fires_above_the_cap_and_not_at_it(tmp_path, fleet):
    """11 + 9 + 2 sessions are what two servers hold at their cap; 12 + 9 + 2 are more."""
    text = plan_rules(fleet)
    said = yaml.safe_load(text)["groups"][1]["rules"][0]["annotations"]
    summary = said["summary"].replace("{{ $value | humanize }}", "23")
    case = ABOVE_THE_CAP.replace("SUMMARY", json.dumps(summary)).replace("DESCRIPTION", json.dumps(said["description"]))
    (tmp_path / "test.yml").write_text(case)
    for name, content in rule_files(fleet).items():
        (tmp_path / name).write_text(content)
    for asked in (["test", "rules", "test.yml"], ["check", "rules", *rule_files(fleet)]):
        done = subprocess.run(["promtool", *asked], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def rules_tested(folder: Path, files: dict[str, str], case: str) -> str:
    """What promtool finds wrong with rules by a case of its test files, "" where nothing is."""
    for name, content in files.items():
        (folder / name).write_text(content)
    heading = f"rule_files: [{', '.join(files)}]\nevaluation_interval: 1m\ntests:\n"
    (folder / "test.yml").write_text(heading + case)
    done = subprocess.run(["promtool", "test", "rules", "test.yml"], cwd=folder, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


SCALED_DOWN = """
  - interval: 1m
    input_series:
      - {series: 'up{job="triton", instance="a"}', values: '1x120'}
      - {series: 'up{job="triton", instance="b"}', values: '1x120'}
      - {series: 'up{job="triton", instance="c"}', values: '1x10 _x30 0x4 1x80'}
      - {series: 'up{job="triton", instance="d"}', values: '1x50 0x5 1x80'}
    promql_expr_test:
      - {expr: 'ALERTS{alertstate="firing", alertname=~"SpeechServer.*"}', eval_time: 30m, exp_samples: []}
      - {expr: 'ALERTS{alertstate="firing", alertname=~"SpeechServer.*"}', eval_time: 44m, exp_samples: []}
      - {expr: 'ALERTS{alertstate="firing", alertname=~"SpeechServer.*"}', eval_time: 55m, exp_samples: []}
  - interval: 1m
    input_series: [{series: 'up{job="triton", instance="a"}', values: '1x120'}]
    promql_expr_test:
      - expr: count(ALERTS{alertstate="firing", alertname="SpeechServersBelowPlan"})
        eval_time: 30m
        exp_samples: [{labels: '{}', value: 1}]
"""


@needs_promtool
def test_an_autoscaler_that_does_its_work_raises_no_alert(tmp_path, fleet):
    """Fewer servers than the plan needs at its peak, one that loads its models, and one that starts again."""
    busier = replace(fleet, devices=5, replicas=6)
    assert rules_tested(tmp_path, rule_files(busier, elastic=True), SCALED_DOWN) == ""
    assert "SpeechServersBelowPlan" in rules_tested(tmp_path, rule_files(busier), SCALED_DOWN)


BURNING = """
  - interval: 1m
    input_series:
      - series: vibevoice_first_audio_seconds_bucket{{job="triton", instance="a", le="1"}}
        values: 0+{in_time}x100
      - {{series: 'vibevoice_first_audio_seconds_bucket{{job="triton", instance="a", le="+Inf"}}', values: '0+100x100'}}
      - {{series: 'vibevoice_requests_total{{job="triton", instance="a", outcome="failed"}}', values: '0x100'}}
    promql_expr_test:
      - expr: count by (alertname) (ALERTS{{alertstate="firing", alertname=~"SpeechSloBurns|SpeechSloBurnsFast"}})
        eval_time: 90m
        exp_samples: [{fired}]
"""


@needs_promtool
@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.95, 0.99])
def test_an_outage_burns_the_budget_of_any_quantile_fast(tmp_path, fleet, quantile):
    """14.4 budgets of an SLO on p90 are more than all requests; within the budget nothing fires."""
    files = rule_files(replace(fleet, slos=(Slo("short", "ttfa_s", quantile, 1.0),)))
    names = ("SpeechSloBurnsFast", "SpeechSloBurns")
    every = ", ".join(f"{{labels: '{{alertname=\"{name}\"}}', value: 1}}" for name in names)
    cases = BURNING.format(in_time=0, fired=every) + BURNING.format(in_time=round(100 * quantile), fired="")
    assert rules_tested(tmp_path, files, cases) == ""


def test_the_load_of_the_plan_is_audio_and_not_requests(fleet):
    mean_s = spec_of(Run.open(SAMPLE)).traffic_mix().mean_audio_s()
    text = plan_rules(replace(fleet, qps=2.0, steady_rate=4.0))
    assert f"record: vibevoice_plan:audio_seconds_per_second\n        expr: vector({2 * mean_s:.7g})" in text
    assert f"record: vibevoice_plan:audio_seconds_per_second_per_device\n        expr: vector({4 * mean_s:.7g})" in text


@pytest.mark.parametrize("name", ["sample-quick", "sample-mixed", "sample-h100"])
def test_a_fleet_at_its_planned_load_has_the_utilisation_of_the_plan_and_raises_no_alert(name):
    """The alert and the plan mean the same by utilisation, also where a fleet carries more than its devices alone."""
    run, every = Run.open(SAMPLE.parent / name), Accepted(force=True, inconclusive=True)
    for target in (each for each in run.plan().targets if each.devices):
        text = plan_rules(fleet_of(run.path, target.qps, every))
        said = {name: float(value) for name, value in re.findall(r"plan:(\w+)\n +expr: vector\((.+)\)", text)}
        servers = said["devices"] * said["audio_seconds_per_second_per_device"]
        assert said["audio_seconds_per_second"] / servers == pytest.approx(target.utilisation, rel=1e-5)
        assert target.utilisation <= said["utilisation_cap"] * (1 + 1e-9)


def test_series_of_the_plan_that_other_rules_use_are_exported(fleet):
    ours = set(re.findall(r"record: (\S+)", plan_rules(fleet)))
    others = rule_files(fleet)
    used = {name for text in others.values() for name in re.findall(r"vibevoice_plan:\w+", text)}
    assert used <= ours and list(others)[-1] == "plan.yml"


def test_without_an_slo_on_first_audio_there_is_none_to_burn(fleet):
    text = plan_rules(replace(fleet, slos=()))
    assert "first_audio" not in text.replace("first audio", "") and yaml.safe_load(text)["groups"]


@pytest.mark.parametrize("selector", ["job='a'", 'a="b"}', "a\nb"])
def test_a_selector_that_breaks_a_query_is_refused(selector):
    with pytest.raises(InputError, match="--selector"):
        sessions_query(selector + "{")
