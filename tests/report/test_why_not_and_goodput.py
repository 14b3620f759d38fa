"""The report's tables of options that lost, and of goodput by class."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import report_sample as sample
from report_page import read, table_with

from harness.records import metrics
from harness.records import why_not as reasons
from harness.records.slo import Slo, goodput_by_class, goodput_per_s
from harness.records.store import Run
from harness.records.why_not import RuledOut
from harness.report import facts
from harness.report.goodput import goodput
from harness.report.ruled_out import lost_options
from harness.report.seal import check_seal
from harness.runs.analysis import why_not_of

RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sample.make_run(tmp_path_factory.mktemp("met"))


def row_of(**changes) -> RuledOut:
    known = {"option": reasons.DEPLOYMENT, "topology": "staged", "knobs": {"delay_us": 5000}, "at_qps": 4.26}
    known |= {"by": reasons.BY_SLO, "limit": "rtf p95 of class long", "value": 1.18, "allowed": 0.9, "excess": 0.311}
    return RuledOut(**known | {"certain": True, "rate_per_s": 3.1, "basis": "simulated"} | changes)


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({}, ("4.26 req/s on one device", "1.18 against 0.9", "+31%", "ruled out")),
        ({"limit": "ttfa p95 of class long"}, ("4.26 req/s on one device", "1.18 against 0.9 s", "+31%", "ruled out")),
        (
            {"by": reasons.BY_RATE, "value": 4.0, "allowed": 4.26, "excess": -0.061, "certain": False},
            ("4.26 req/s on one device", "4 against 4.26 req/s", "\u22126%", "not told apart"),
        ),
        (
            {"option": reasons.DEVICES, "devices": 6, "by": reasons.BY_UTILISATION, "value": 0.73, "allowed": 0.7}
            | {"excess": 0.043, "certain": False},
            ("–", "73% against 70%", "+4%", "within the interval"),
        ),
        (
            {"value": None, "excess": None},
            ("4.26 req/s on one device", "without bound against 0.9", "–", "ruled out"),
        ),
        ({"at_qps": None}, ("one session", "1.18 against 0.9", "+31%", "ruled out")),
        (
            {"by": reasons.BY_UNKNOWN, "limit": "no ladder", "at_qps": None, "value": None, "allowed": None},
            ("–", "–", "–", "not known"),
        ),
    ],
)
def test_an_option_says_its_limit_and_by_how_much_it_is_off(changes, texts):
    (shown,) = lost_options([row_of(**changes)], {"delay_us": 0})
    assert (shown.at, shown.value, shown.excess, shown.sure) == texts


def test_a_topology_and_a_count_are_named_as_such():
    fused = row_of(option=reasons.TOPOLOGY, topology="fused", knobs={"topology": "fused"})
    few = row_of(option=reasons.DEVICES, devices=6)
    shown = lost_options([fused, few], {"delay_us": 0}, {facts.key(fused.knobs): "B"})
    assert shown[0].option.startswith("topology fused engine (B: ") and shown[1].option == "6 devices for 4.26 req/s"


def test_a_run_without_stored_reasons_gets_them_from_its_fit(run):
    shown = table_with(read(run), "Finding")
    assert len(shown) == 5  # the other deployments; its plan file cannot be simulated, so no counts
    assert [row["Finding"] for row in shown].count("? not known") == 2


def test_stored_reasons_are_shown_as_they_are(tmp_path):
    run = sample.make_run(tmp_path)
    run.write_plan(replace(run.plan(), why_not=(row_of(knobs=sample.space()[1]),)))
    assert run.plan().why_not == (row_of(knobs=sample.space()[1]),)
    (shown,) = table_with(read(run), "Finding")
    assert shown["Option"].startswith("B: ") and shown["Value"] == "1.18 against 0.9+31%"
    assert shown["Limit"] == "real-time factor of long requests (95th percentile)at 4.26 req/s on one device"


def test_a_stored_sample_keeps_its_seal_and_its_plan_and_shows_why(tmp_path):
    folder = tmp_path / "sample-quick"
    shutil.copytree(RESULTS / "sample-quick", folder)
    run = Run.open(folder)
    assert run.plan().why_not == () and "why_not" not in run.plan().to_dict()
    found = why_not_of(run)
    assert [row.option for row in found].count(reasons.DEPLOYMENT) == 3
    counts = [row for row in found if row.option == reasons.DEVICES]
    assert [(row.at_qps, row.devices) for row in counts] == [(5.0, 1), (20.0, 6)]
    assert all(row.excess and row.basis for row in counts)
    assert found == why_not_of(run) and not [each for each in check_seal(folder).problems if "expired" not in each]


def test_goodput_of_the_classes_is_that_of_all():
    rows = pd.DataFrame(
        {
            "outcome": ["done", "done", "done", "error"],
            "traffic_class": ["short", "short", "long", "long"],
            "start_frame": 0,
            "ttfa_s": [0.5, 2.0, 0.5, 0.5],
        }
    )
    slos = [Slo("short", "ttfa_s", 0.95, 1.0)]
    assert goodput_by_class(slos, rows, 2.0) == {"short": 0.5, "long": 0.5}
    assert sum(goodput_by_class(slos, rows, 2.0).values()) == goodput_per_s(slos, rows, 2.0)
    assert goodput_by_class(slos, rows[:0], 2.0) == {}


def test_goodput_by_class_adds_up_to_that_of_the_summary(run):
    trials, requests, plan = run.trials(), run.requests(), run.plan()
    swept = facts.deployments(trials, requests, run.fit(), plan)
    rows = goodput(trials, requests, plan.slos, swept)
    assert [row.trial for row in rows] == trials
    for row in rows:
        window = metrics.summarise(run.results(row.trial.trial_id), row.rung.start_ns, row.rung.end_ns, plan.slos)
        assert row.total.goodput_per_s == pytest.approx(window.goodput_per_s)
        assert row.total.completed_per_s == pytest.approx(window.completed_rate_per_s)
    shown = table_with(read(run), "All classes")
    assert len(shown) == len(trials) and {"short", "long"} <= shown[0].keys()
    assert "of" in shown[0]["short"] and shown[-1]["Window"].endswith("the whole run")
