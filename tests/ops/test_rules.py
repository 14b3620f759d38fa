"""The rules of ops/prometheus: each expression is PromQL over metrics that exist, and each alert can be acted on.

What they compute is tested by promtool, which `make ops-check` runs.
"""

import re
import sys
from pathlib import Path

import pytest
import yaml
from expressions import KNOWN, metrics_of

from harness.errors import HarnessError
from harness.export.prometheus import KUBERNETES_SELECTOR
from harness.server_metrics import FIRST_AUDIO_BUCKETS, bound

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks" / "ops"))
import asked  # noqa: E402
import prometheus_server  # noqa: E402

FOLDER = ROOT / "ops" / "prometheus"
CONFIG = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
GROUPS = [group for file in CONFIG["rule_files"] for group in yaml.safe_load((FOLDER / file).read_text())["groups"]]
RULES = [rule for group in GROUPS for rule in group["rules"]]
RECORDS = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
TESTS = "".join(path.read_text() for path in FOLDER.glob("tests/*.yml"))


def test_every_file_of_rules_is_configured_and_every_group_has_its_name():
    assert sorted(CONFIG["rule_files"]) == sorted(f"rules/{path.name}" for path in FOLDER.glob("rules/*.yml"))
    names = [group["name"] for group in GROUPS]
    assert len(set(names)) == len(names) and len(RECORDS) + len(ALERTS) == len(RULES)
    assert {target for each in CONFIG["scrape_configs"][0]["file_sd_configs"] for target in each["files"]} == {
        "targets/triton.yml"
    }
    assert yaml.safe_load((FOLDER / "targets" / "triton.yml").read_text())[0]["targets"]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("record") or rule["alert"])
def test_a_rule_asks_for_metrics_that_exist(rule):
    assert metrics_of(rule["expr"]) <= KNOWN | RECORDS.keys()


def test_a_recorded_series_is_named_by_level_metric_and_operation():
    plan = [name for name in RECORDS if name.startswith("vibevoice")]
    assert all(re.fullmatch(r"(job|instance|model):\w+:\w+", name) for name in RECORDS.keys() - set(plan))
    assert all(re.fullmatch(r"vibevoice(_plan)?:\w+", name) for name in plan)


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_says_what_is_wrong_and_is_tested_and_documented(alert):
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"] and rule["annotations"]["description"].endswith(".")
    assert alert in TESTS, "add a case to ops/prometheus/tests"
    page = (ROOT / "docs" / "how-to" / "operate.md").read_text()
    assert f"| `{alert}` | {rule['labels']['severity']} |" in page
    assert page.count("| `Speech") == len(ALERTS)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("tests/*.yml")), ids=lambda path: path.stem)
def test_a_test_of_rules_orders_all_of_their_groups(path):
    """promtool evaluates groups that are not in the list first, and in any order."""
    content = yaml.safe_load(path.read_text())
    files = [(path.parent / file).resolve() for file in content["rule_files"]]
    groups = [group["name"] for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    assert content["group_eval_order"] == groups


def test_the_bound_of_the_slo_is_a_bucket_of_the_histogram():
    (limit,) = re.findall(r'le="([\d.]+)"', RECORDS["vibevoice:first_audio_in_time_total"])
    assert limit in map(bound, FIRST_AUDIO_BUCKETS)


def test_what_an_alert_compares_is_asked_apart_from_its_limits():
    both = "(a > 1) and on (job) (sum by (job) (rate(b[5m])) >= 2) or c - time() < 7"
    assert [metrics_of(each) for each in asked.operands(both)] == [{"a"}, {"b"}, {"c"}]
    assert asked.operands("up == 0") == ["up"]


def test_without_prometheus_the_check_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HarnessError, match="promtool is not on the PATH.*apt-get install prometheus"):
        prometheus_server.promtool("check", "config", "prometheus.yml")


def test_a_server_of_kubernetes_is_scraped_by_one_job():
    """A pod that a job of Prometheus's chart finds by its annotations, too, would count its sessions twice."""
    (job,) = yaml.safe_load((FOLDER / "kubernetes.yml").read_text())["scrape_configs"]
    (found,) = job["kubernetes_sd_configs"]
    assert (job["job_name"], found["role"], found["namespaces"]) == ("triton", "pod", {"names": ["speech"]})
    labels = {each["target_label"] for each in job["relabel_configs"] if "target_label" in each}
    assert set(re.findall(r"(\w+)=", KUBERNETES_SELECTOR)) <= labels | {"job"}
    manifests = [*(ROOT / "ops" / "kubernetes").rglob("*.yaml")]
    assert len(manifests) > 10 and not any("prometheus.io/scrape" in path.read_text() for path in manifests)
