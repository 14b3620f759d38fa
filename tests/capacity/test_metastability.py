"""Devices whose throughput falls as sessions grow: where simulations start, and what recovers from overload."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from capacity_truth import true_device

from harness.capacity.fitting.rate_search import Limits, Traffic, _end_of_the_lower_mode, simulate_load, steady_limit
from harness.capacity.models.steps import StepTime
from harness.capacity.planning.pools import Pools
from harness.capacity.planning.remarks import without_recovery
from harness.capacity.planning.routing import ROUTINGS, counts_by_routing
from harness.records.plan import PlannedTarget
from harness.records.slo import Slo
from harness.traffic.mix import Lengths, Mix, TrafficClass

MIX = Mix(
    "both",
    (
        TrafficClass("short", 0.7, Lengths.parse({"uniform": [4, 16]}), (1, 1)),
        TrafficClass("long", 0.3, Lengths.parse({"uniform": [30, 90]}), (1, 1)),
    ),
)
SLOS = tuple(Slo(name, "rtf", 0.95, 0.9) for name in ("short", "long"))
RATE = 28.44
SESSIONS = np.array([1, 4, 8, 16, 24, 32, 48.0])


def pools_of(step, most=48, cap=1.0, **limits):
    fitted = StepTime("piecewise", tuple(step(SESSIONS)), tuple(SESSIONS))
    device = replace(true_device(), step_time=fitted, max_sessions=48, draws=())
    return Pools(device, Traffic.draw(MIX, np.random.default_rng(3)), Limits(SLOS, most, **limits), cap)


def knee(n):
    return 0.04 + 0.001 * n + 0.03 * np.maximum(n - 20, 0)


def line(n):
    return 0.02 + 0.002 * n


def test_the_lower_mode_ends_where_chances_rise_again():
    assert _end_of_the_lower_mode(np.array([1.0, 0.5, -0.5, -1.0])) == 5  # one mode: all of it
    assert _end_of_the_lower_mode(np.array([1.0, -0.5, -0.1, 0.2, 0.9])) == 4  # 0 to 3 sessions
    assert _end_of_the_lower_mode(np.array([1.0, 2.0])) == 3  # overload has no lower mode


def test_a_pool_that_could_collapse_starts_in_the_mode_that_serves():
    pools = pools_of(knee)
    simulated, _ = simulate_load(pools.device, pools.traffic, RATE, 20, pools.limits)
    at_start = int(np.sum(simulated.arrival_s == 0))
    assert at_start < 20 * 20


def test_a_knee_is_not_sized_for_recovery_from_collapse():
    pools = pools_of(knee)
    found = pools.fewest(RATE)
    assert 19 <= found.devices <= 23
    recovering = pools.that_recover(RATE, found.devices)
    assert recovering > 1.3 * found.devices  # 32 frames/s beyond the knee, where 333 served
    (remark,) = without_recovery([PlannedTarget(qps=RATE, devices=found.devices, devices_that_recover=recovering)])
    assert f"{recovering} devices do" in remark and "Limit the sessions" in remark


def test_admission_limits_the_overload_that_a_device_has_to_recover_from():
    limited = pools_of(knee, slots=16)
    devices = limited.fewest(RATE).devices
    assert limited.that_recover(RATE, devices) == devices
    assert limited.that_recover(RATE, devices) < pools_of(knee).that_recover(RATE, devices)


def test_a_line_recovers_from_any_overload():
    pools = pools_of(line)
    devices = pools.fewest(RATE).devices
    assert pools.that_recover(RATE, devices) == devices
    assert without_recovery([PlannedTarget(qps=RATE, devices=devices, devices_that_recover=devices)]) == []


def test_each_routing_has_its_count_and_none_is_below_the_least_loaded():
    pools = pools_of(line)
    devices = pools.fewest(RATE).devices
    counts = counts_by_routing(pools, RATE, devices)
    assert list(counts) == list(ROUTINGS) and counts["least_loaded"] == devices
    assert devices <= counts["round_robin"] <= counts["random"] <= 1.5 * devices + 1
    assert counts["random"] > devices
    under_random = pools.changed(limits=replace(pools.limits, routing="random"))
    assert not under_random.judge(RATE, devices).met and under_random.judge(RATE, counts["random"]).met


@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_one_device_needs_no_routing(rate):
    assert set(counts_by_routing(pools_of(line), rate, 1).values()) == {1}


def test_a_session_limit_is_named_as_what_binds():
    pools = pools_of(line, slots=6)
    assert pools.limits.room_name == "at most 6 sessions per device"
    assert steady_limit(pools.device, pools.limits)[1] == "at most 6 sessions per device"
