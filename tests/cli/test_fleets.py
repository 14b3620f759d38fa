"""The commands about fleets: a day on static and elastic ones, and the cheapest mix of types."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from report_page import Page
from typer.testing import CliRunner

from harness.capacity.planning.pools import Pools
from harness.cli.main import app
from harness.records.fleet import FleetAnswer
from harness.records.store import Run
from harness.runs import analysis

SAMPLE = Path(__file__).resolve().parents[2] / "results" / "sample-quick"
DAY = ["day", "--run", SAMPLE, "--peak", "5", "--trough", "1"]
FLEET = ["fleet", "--card", "h100,l4", "--price", "h100=2.5,l4=0.6", "--qps", "2"]


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "220"})


def copied(tmp_path, **changes):
    """The sample's fit and plan, unsigned, with changes of its manifest."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("manifest.json", "fit.json", "plan.json"):
        shutil.copy(SAMPLE / name, folder / name)
    Run.open(folder).update_manifest(sealed=False, **changes)
    return folder


def flat(text):
    return " ".join(text.split())


def test_a_day_is_planned_from_a_stored_fit_and_drawn(tmp_path):
    before = {path.name: path.read_bytes() for path in SAMPLE.iterdir() if path.is_file() and path.name[0] != "."}
    done = run(*DAY, "--page", tmp_path / "day.html")
    said, page = flat(done.output), Page((tmp_path / "day.html").read_text())
    assert done.exit_code == 0 and "diurnal, 1 to 5 requests/s" in said
    assert "reactive: 1 to 4 devices" in said and "predictive: 1 to 4 devices" in said
    assert "day" in page.ids and [row[0] for row in page.tables[0]][-3:] == ["static", "reactive", "predictive"]
    assert {path.name: path.read_bytes() for path in SAMPLE.iterdir() if path.name in before} == before


def test_a_day_may_be_that_of_a_trace(tmp_path):
    arrivals = np.sort(np.random.default_rng(1).random(2000) * 3600)
    (tmp_path / "calls.csv").write_text("TIMESTAMP\n" + "\n".join(f"{each:.3f}" for each in arrivals))
    rule = ["--target-sessions", "8", "--minimum", "2", "--maximum", "5"]
    done = run("day", "--run", SAMPLE, "--trace", tmp_path / "calls.csv", "--hours", 12, "--mean", 2, *rule)
    said = flat(done.output)
    assert done.exit_code == 0 and "trace calls.csv, its 1 h stretched to 12 h, scaled to 2 requests/s" in said
    assert "2 to 5 devices for 8 sessions each" in said


def test_a_day_of_an_emulated_run_is_labelled(tmp_path):
    emulated = copied(tmp_path, emulated=True, times_basis="estimated", dilation=4.0)
    done = run("day", "--run", emulated, "--peak", "5", "--trough", "1", "--target-sessions", "8")
    assert done.exit_code == 0, done.output
    assert "(simulated, emulated, time dilated 4 times, estimated)" in flat(done.output)


def test_a_peak_that_no_number_of_devices_serves_ends_with_its_own_exit_code(monkeypatch):
    monkeypatch.setattr(Pools, "fewest", lambda self, qps: None)
    done = run(*DAY)
    assert done.exit_code == 2 and "No number of devices meets the SLOs" in flat(done.output)


def test_the_cheapest_fleet_is_shown_and_written(tmp_path):
    done = run(*FLEET, "--out", tmp_path / "fleet.json", "--most", "h100=8", "--spares", 1)
    said = flat(done.output)
    found = FleetAnswer.of(json.loads((tmp_path / "fleet.json").read_text()))
    (target,) = found.targets
    assert done.exit_code == 0 and "The cheapest fleet for 2 requests/s" in said and "Power is estimated" in said
    assert target.best.cost_per_hour <= min(each.cost_per_hour for each in target.undivided.values())
    assert {pool.basis for pool in target.best.pools} == {"estimated"} and target.best.watts_basis == "estimated"
    assert target.best.devices.get("h100-sxm", 0) <= 8 and all(pool.spares == 1 for pool in target.best.pools)
    low, high = target.best.cost_interval
    assert low <= target.best.cost_per_hour <= high


def test_the_device_of_a_run_is_a_type_of_its_own():
    done = run("fleet", "--run", SAMPLE, "--price", "cpu=0.2", "--qps", "1,3")
    said = flat(done.output)
    assert done.exit_code == 0 and "cpu" in said and "simulated" in said and "estimated" not in said


def test_a_rate_without_a_fleet_ends_with_its_own_exit_code():
    done = run(*FLEET, "--power-kw", "0.1")
    assert done.exit_code == 2 and "No fleet serves it within" in flat(done.output)


@pytest.mark.parametrize("named", ["h100", "H100 80GB"])
def test_a_card_that_is_the_device_of_the_run_is_refused(tmp_path, named):
    of_h100 = copied(tmp_path, device="NVIDIA H100 80GB HBM3")
    done = run("fleet", "--run", of_h100, "--card", "l4,h100", "--price", f"{named}=2,l4=1")
    assert "--card h100-sxm: that is" in str(done.exception) and "leave it out" in str(done.exception)


def test_limits_count_gpus_where_a_device_has_several(tmp_path):
    of_two = copied(tmp_path, device="2 NVIDIA H100 80GB HBM3")
    done = run(
        "fleet", "--run", of_two, "--price", "h100=2", "--qps", "1", "--most", "h100-sxm=5", "--out", tmp_path / "f"
    )
    assert done.exit_code == 0, done.output
    (kind,) = FleetAnswer.of(json.loads((tmp_path / "f").read_text())).types
    assert (kind.name, kind.most, kind.price_per_hour) == ("2 x h100", 2, 4.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["day", "--run", SAMPLE], "the run's plan has no demand: give --peak 5 --trough 1, or --trace FILE"),
        (["day", "--run", SAMPLE, "--trough", "1"], "--trough needs --peak"),
        (["day", "--run", SAMPLE, "--hours", "3", "--peak", "1"], "--hours and --mean are for --trace"),
        (["day", "--run", SAMPLE, "--peak", "1", "--trough", "2"], "trough_qps 2 is above peak_qps 1"),
        (["day", "--run", SAMPLE, "--peak", "1", "--trace", "x.csv"], "needs either diurnal"),
        (["day", "--run", SAMPLE, "--trace", "x.csv"], "demand.trace: x.csv"),
        ([*DAY, "--minimum", "0"], "the demand: minimum: Input should be greater than or equal to 1"),
        ([*DAY, "--minimum", "5", "--maximum", "2"], "maximum 2 is below minimum 5"),
        (["fleet", "--price", "h100=2"], "give the types: --card h100,l40s,l4, or --run DIR"),
        (["fleet", "--card", "h100", "--price", "h100"], "--price 'h100': give TYPE=NUMBER"),
        (["fleet", "--card", "h100", "--price", "h100=-1"], "--price 'h100=-1': give TYPE=NUMBER"),
        (["fleet", "--card", "h100,l4", "--price", "h100=2"], "--price has none for l4: add l4=PRICE"),
        (["fleet", "--run", SAMPLE, "--price", "cpu=2", "--mix", "shorts"], "are those of the run's plan"),
        ([*FLEET, "--most", "b200=3"], "--most b200: there is no such type here; known: h100-sxm, l4"),
        ([*FLEET, "--most", "h100=3,H100=4"], "--most gives H100 twice: leave one out"),
        ([*FLEET, "--most", "h100=3,h100-sxm=4"], "--most gives h100 and h100-sxm, which are one type: leave one out"),
        ([*FLEET, "--power-kw", "0"], "--power-kw 0: give a limit above 0"),
    ],
)
def test_a_usage_error_is_one_sentence(arguments, says):
    done = run(*arguments)
    assert isinstance(done.exception, Exception) and says in str(done.exception), done.exception
    assert "\n" not in str(done.exception)


def test_the_rule_of_a_run_without_a_day_is_that_of_its_fit():
    stored = Run.open(SAMPLE)
    rule = analysis.scaling_rule_of(stored, 5.0)
    assert (rule.minimum, rule.maximum, rule.schedule) == (1, 4, ())
    assert rule.drain_s == stored.plan().drain.longest_s
    pools = analysis.fleet_of(stored)
    frames_per_s = float(pools.device.step_time.frames_per_s(rule.target_sessions_per_device))
    assert frames_per_s <= 0.85 * pools.steady_rate() * pools.traffic.mean_frames * 1.01
