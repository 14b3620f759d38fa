"""Devices for streams, for tasks, and for both on one fleet."""

from dataclasses import replace

import numpy as np
import pytest
from capacity_truth import MIX

from harness.capacity.fitting.rate_search import Limits, Traffic
from harness.capacity.models.device import Device
from harness.capacity.models.spreads import Sample, Spread
from harness.capacity.models.steps import StepTime
from harness.capacity.planning.job_extent import LEAST_BEYOND, Extent, Judged, extent_of
from harness.capacity.planning.job_fleets import (
    BOTH,
    STREAMS,
    TASKS,
    FleetLoad,
    JobDemand,
    JobFleets,
    jobs_plan,
    shared_plan,
)
from harness.capacity.planning.pools import Pools
from harness.cli import job_tables
from harness.errors import InconclusiveError, PlanError
from harness.planfile.jobs import load_jobs
from harness.records.slo import Slo
from harness.records.turnaround import TurnaroundSlo
from harness.traffic.mix import Lengths

SPREAD = Spread(Sample.of(np.ones(400)))
DEVICE = Device(StepTime("linear", (0.012, 0.006)), 0.05, 1.5, SPREAD, SPREAD, {}, 40, ((0.012, 0.006),))
LIMITS = Limits((Slo("short", "rtf", 0.95, 0.9), Slo("short", "ttfa_s", 0.95, 1.0)), 40)
DEMAND = JobDemand(40, Lengths.parse({"fixed": 900}), (TurnaroundSlo.parse("turnaround_p95", "3x"),), 900, swing=0.9)
FILE = "per_hour: 40\nlength: {fixed: 900}\nslos: {turnaround_p95: 3x}\n"


@pytest.fixture(scope="module")
def fleets():
    pools = Pools(DEVICE, Traffic.draw(MIX, np.random.default_rng(1), 4000), LIMITS, 0.85)
    return JobFleets(pools, MIX, DEMAND, 2.0, seed=4)


@pytest.fixture(scope="module")
def plan(fleets):
    return shared_plan(fleets, np.array([0.9, 0.95, 1.0, 1.05, 1.1]), 0.9)


def test_one_fleet_is_smaller_than_two_where_streams_leave_valleys(plan):
    devices = {kind: load.devices for kind, load in plan.loads.items()}
    assert max(devices[STREAMS], devices[TASKS]) <= devices[BOTH] < devices[STREAMS] + devices[TASKS]
    assert plan.saved == plan.two_fleets - devices[BOTH] > 0
    assert all(low <= devices[kind] <= high for kind, (low, high) in plan.intervals.items())
    assert plan.saved_interval[0] <= plan.saved <= plan.saved_interval[1]


def test_devices_that_may_violate_an_slo_with_one_session_leave_no_upper_bound(fleets, plan):
    """A tenth of the draws is such a device: it is in the interval, not dropped from it."""
    slow = shared_plan(fleets, np.array([0.0, *[1.0] * 9]), 0.9)
    assert slow.loads == plan.loads
    assert slow.intervals == {kind: (load.devices, None) for kind, load in plan.loads.items()}
    assert slow.saved_interval == (None, None)
    assert job_tables._row(slow, BOTH)[1] == f"at least {plan.loads[BOTH].devices}"
    assert "interval not known" in job_tables._lines(slow)[0]


def test_a_kind_that_only_the_slowest_devices_cannot_serve_has_no_upper_bound(fleets, monkeypatch):
    def fewest(own, kind, at_most=100_000):
        slow = own.pools.device.step_time.values[0] > 1.1 * DEVICE.step_time.values[0]
        return None if slow and kind == BOTH else FleetLoad(kind, 10, 5, {"rtf": 0.9})

    monkeypatch.setattr(JobFleets, "fewest", fewest)
    found = shared_plan(fleets, np.array([0.8, 1.0, 1.2]), 0.9)
    assert found.intervals == {STREAMS: (10, 10), TASKS: (10, 10), BOTH: (10, None)}
    assert found.saved == 10 and found.saved_interval == (None, None)


@pytest.mark.parametrize("served", [(), (STREAMS,), (STREAMS, TASKS)])
def test_where_no_fleet_serves_both_the_answer_says_so(plan, served):
    assert jobs_plan(plan, DEMAND).note == jobs_plan(plan, DEMAND).doubt == ""
    found = jobs_plan(replace(plan, loads={kind: plan.loads[kind] for kind in served}, saved_interval=None), DEMAND)
    assert "No number of devices meets the SLOs of streams and tasks" in found.note and found.note in found.doubt


def test_a_fleet_meets_every_limit_and_one_device_less_does_not(fleets, plan):
    for kind, load in plan.loads.items():
        assert load.met and fleets.judge(kind, load.devices, load.sessions).shares == load.shares
        assert load.devices == 1 or not fleets.best(kind, load.devices - 1).met


def test_tasks_wait_longer_with_fewer_sessions_and_streams_are_not_disturbed(fleets, plan):
    load = plan.loads[BOTH]
    tight, wide = (fleets.judge(BOTH, load.devices, round(share * load.sessions)) for share in (0.25, 1.0))
    slo = DEMAND.slos[0]
    assert tight.turnarounds[slo] > 1.2 * wide.turnarounds[slo]
    rtf = "rtf p95 of class short"
    assert tight.shares[rtf] <= wide.shares[rtf] <= 1


def test_a_deadline_that_nobody_can_meet_is_not_planned_for(fleets):
    hopeless = replace(DEMAND, slos=(TurnaroundSlo.parse("turnaround_p95", 1),))
    impossible = replace(fleets, demand=hopeless, _drawn={})
    assert impossible.fewest(TASKS) is None


@pytest.mark.parametrize(("qps", "per_hour"), [(0.02, 1), (2.0, 40), (20.0, 2000), (0.05, 200)])
def test_each_kind_is_judged_by_enough_of_it_at_low_and_at_high_rates(fleets, monkeypatch, qps, per_hour):
    """At high rates a part of the fleet is simulated, with its part of the tasks; at low ones more days are."""
    monkeypatch.setattr("harness.capacity.planning.job_fleets.MOST_SESSIONS", 300_000)
    made = replace(fleets, qps=qps, demand=replace(DEMAND, per_hour=per_hour), _drawn={})
    for kind, devices in ((STREAMS, 3), (TASKS, 5), (BOTH, 5), (BOTH, 200)):
        extent = made._extent(kind, devices)
        arrived = made._arrived(kind, extent)
        tasks = arrived.counted & arrived.is_task
        streams = arrived.counted & ~arrived.is_task
        assert kind == STREAMS or tasks.sum() >= LEAST_BEYOND / (1 - DEMAND.slos[0].quantile)
        assert kind == TASKS or streams.sum() >= LEAST_BEYOND / 0.05
        segments = np.ceil(arrived.frames[arrived.is_task] / DEMAND.segment_frames)
        assert extent.part * devices == 1 or np.sum(~arrived.is_task) + np.sum(1 + segments) < 330_000


class Drawn(Exception):
    pass


@pytest.mark.parametrize("most_sessions", [40_000, 100_000, 300_000, 2_000_000])
def test_what_is_simulated_is_whole_devices_and_the_extent_that_has_enough_of_everything(
    fleets, monkeypatch, most_sessions
):
    """Not a part that is rounded to whole devices after it was found to suffice: 1.4 of 3 devices are 1."""
    monkeypatch.setattr("harness.capacity.planning.job_fleets.MOST_SESSIONS", most_sessions)
    found = []

    def arrived(own, kind, extent):
        found.append(extent)
        raise Drawn

    monkeypatch.setattr(JobFleets, "_arrived", arrived)
    for qps, devices in ((qps, devices) for qps in (0.05, 0.3, 1.0, 2.0) for devices in (1, 2, 3, 5, 7, 70)):
        made, found[:] = replace(fleets, qps=qps, _drawn={}), []
        with pytest.raises((Drawn, InconclusiveError)):
            made.judge(BOTH, devices, 20)
        for extent in found:
            simulated = extent.part * devices
            assert simulated == pytest.approx(round(simulated)) and 1 <= round(simulated) <= min(devices, 64)
            days = extent.days * round(simulated) / devices
            assert 24 * days * DEMAND.per_hour >= LEAST_BEYOND / (1 - DEMAND.slos[0].quantile)
            assert all(each.per_day * days >= each.needs - 1e-6 for each in made._judged())


def test_one_device_is_simulated_for_no_more_days_than_there_is_room_for(fleets, monkeypatch):
    """Days without end would take all memory. A single day is simulated, however many sessions a device has."""
    monkeypatch.setattr("harness.capacity.planning.job_fleets.MOST_SESSIONS", 100_000)
    rare = replace(DEMAND, per_hour=3)
    assert replace(fleets, demand=replace(DEMAND, per_hour=400), _drawn={})._extent(BOTH, 1) == Extent(1.0, 1)
    with pytest.raises(InconclusiveError, match="needs 460 tasks, and no more than about 72 can be simulated"):
        replace(fleets, demand=rare, _drawn={}).judge(BOTH, 1, 20)


def test_kinds_that_are_simulated_whole_get_the_same_streams_and_the_same_tasks(fleets):
    streams, tasks, both = (fleets._arrived(kind, fleets._extent(kind, 7)) for kind in (STREAMS, TASKS, BOTH))
    assert np.array_equal(streams.arrival_s, both.arrival_s[~both.is_task])
    assert np.array_equal(tasks.frames, both.frames[both.is_task])


@pytest.mark.parametrize("kind", [STREAMS, TASKS, BOTH])
def test_a_fleet_four_times_as_large_carries_four_times_the_load(fleets, plan, kind):
    more = replace(fleets, qps=4 * fleets.qps, demand=replace(DEMAND, per_hour=4 * DEMAND.per_hour), _drawn={})
    load = plan.loads[kind]
    assert more.judge(kind, 4 * load.devices, 4 * load.sessions).met


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_hour": 0.1}, "turnaround p95 <= 3x needs 460 tasks"),
        ({"per_hour": 3, "slos": (TurnaroundSlo.parse("turnaround_p99.9", "3x"),)}, r"turnaround p99\.9 .* tasks"),
    ],
)
def test_tasks_too_few_for_their_percentile_are_said_to_be(fleets, changes, message):
    rare = replace(fleets, demand=replace(DEMAND, **changes), _drawn={})
    with pytest.raises(InconclusiveError, match=f"too few to tell: {message}"):
        rare.judge(BOTH, 3, 20)


def test_days_are_added_until_every_percentile_has_what_it_needs():
    streams, tasks = Judged("a", "streams", 300.0, 0.9), Judged("b", "tasks", 40.0, 0.9)
    assert streams.needs == tasks.needs == 200 + 43
    assert extent_of([streams], lambda days: 1.0) == Extent(1.0, 1)
    assert extent_of([streams, tasks], lambda days: 1.0) == Extent(1.0, 7)
    assert extent_of([tasks], lambda days: min(1.0, 20 / (days + 3))).days == 7
    with pytest.raises(InconclusiveError, match="b needs 243 tasks, and no more than about 80 can be simulated"):
        extent_of([streams, tasks], lambda days: 2 / days)


def test_a_file_of_tasks(tmp_path):
    file = tmp_path / "jobs.yaml"
    file.write_text(FILE + "segment_seconds: 60\nstreams_swing: 0.5\nresume_seconds_per_minute: 0.6\n")
    demand = load_jobs(file)
    assert (demand.per_hour, demand.segment_frames, demand.swing, demand.at_once) == (40, 450, 0.5, None)
    assert demand.slos == DEMAND.slos and demand.between == (None, pytest.approx(0.6 / 450))
    assert demand.frames_per_s == pytest.approx(40 * 900 * 7.5 / 3600) and demand.longest_s == 2700


def test_resuming_takes_as_long_as_first_audio_unless_the_file_says_otherwise(fleets, tmp_path):
    """The prompt is read again: it is never assumed to take no time."""
    file = tmp_path / "jobs.yaml"
    expected = {"": 0.05 + 0.5 * 0.018, "resume_seconds: 0\n": 0.0, "resume_seconds: 2\n": 2.0}
    for more, seconds in expected.items():
        file.write_text(FILE + more)
        made = replace(fleets, demand=load_jobs(file), _drawn={})
        assert made._between == (pytest.approx(seconds), 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FILE.replace("3x", "3 times"), "write 2x"),
        (FILE.replace("turnaround_p95", "rtf_p95"), "not an SLO of tasks"),
        (FILE + "per_day: 3\n", "unknown key"),
        (FILE.replace("per_hour: 40", "per_hour: 0"), "per_hour"),
        (FILE.replace("fixed", "fixd"), "a length must be one of"),
        (FILE.replace("{fixed: 900}", "from_script"), "give seconds of audio"),
        ("", "has no keys; start with 'per_hour:'"),
        (FILE + "streams_swing: 2\n", "streams_swing"),
    ],
)
def test_a_mistake_in_it_is_one_line_that_names_the_file(tmp_path, text, message):
    file = tmp_path / "jobs.yaml"
    file.write_text(text)
    with pytest.raises(PlanError, match=message) as caught:
        load_jobs(file)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)
