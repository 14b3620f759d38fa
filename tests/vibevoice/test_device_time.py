"""The device's part of a call: intervals joined, events sorted into kernels and copies, and no point lost."""

import contextlib
import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import DeviceType

from harness.vibevoice.profiling import device_time
from harness.vibevoice.profiling import profiler as child
from harness.vibevoice.profiling.device_time import BusyTime, DeviceTimer, activities, busy_of, busy_us, recorded
from harness.vibevoice.profiling.roofline import Cost
from harness.vibevoice.stages.presets import Weights

INTERVAL = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted)


def event(name, start, end, device=DeviceType.CUDA, **more):
    return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end), **more)


EVENTS = [
    event("cudaLaunchKernel", 0, 400, DeviceType.CPU),
    event("Memcpy HtoD (Pageable -> Device)", 0, 10),
    event("ampere_bf16_gemm", 20, 30),
    event("_attend_part", 25, 45),  # on a second stream: overlaps
    event("Memset (Device)", 50, 51),
    event("a range that someone named", 0, 400, is_user_annotation=True),
]


@given(st.lists(INTERVAL, max_size=12))
def test_busy_time_counts_each_moment_once(intervals):
    moments = {moment for start, end in intervals for moment in range(start, end)}
    assert busy_us(map(tuple, intervals)) == len(moments)
    assert busy_us(map(tuple, intervals * 2)) == len(moments)


def test_kernels_are_counted_and_overlaps_and_annotations_are_not_time():
    assert busy_of(activities(EVENTS)) == BusyTime(pytest.approx((10 + 25 + 1) / 1e3), launches=2, copies=2)


def test_newer_versions_of_torch_say_what_an_activity_is():
    kinds = ["gpu_memcpy", "kernel", "concurrent_kernel", "gpu_memset", "cuda_sync", "gpu_user_annotation", "overhead"]
    found = activities(event("anything", 0, 1, activity_type=kind) for kind in kinds)
    assert [activity.kernel for activity in found] == [False, True, True, False]


def test_events_without_any_of_the_device_are_no_measurement():
    with pytest.raises(RuntimeError, match="CUPTI"):
        busy_of(activities(EVENTS[:1]))


def timer(**ways):
    return DeviceTimer(ways)


def calls(count=9):
    return iter([lambda: None] * count)


def failing(message):
    def measure(call):
        raise RuntimeError(message)

    return measure


def test_the_middle_of_three_calls_is_taken_and_host_time_is_the_rest():
    busy = iter([BusyTime(9.0, 7, 1), BusyTime(2.0, 5, 1), BusyTime(3.0, 6, 1)])
    left = calls()
    found = timer(profiler=lambda call: next(busy)).split(left, ms=12.0, seconds=60)
    assert found == {"device_ms": 3.0, "host_ms": 9.0, "device_ms_from": "profiler", "launches": 6, "copies": 1}
    assert len(list(left)) == 6


def test_a_device_that_does_nothing_is_no_measurement():
    found = timer(profiler=lambda call: BusyTime(0.0), events=lambda call: BusyTime(3.0)).split(calls(), 4.0, 60)
    assert (found["device_ms"], found["device_ms_from"]) == (3.0, "events")


@given(st.floats(0.001, 100), st.floats(0.001, 100))
def test_the_parts_are_never_negative_and_add_up(busy_ms, ms):
    found = timer(profiler=lambda call: BusyTime(busy_ms)).split(calls(), ms, 60)
    assert 0 <= found["device_ms"] <= ms and found["host_ms"] >= 0
    assert found["device_ms"] + found["host_ms"] == pytest.approx(ms)


def test_a_cpu_is_its_own_device_and_no_call_is_made():
    untouched = calls()
    found = DeviceTimer.of(torch.device("cpu")).split(untouched, 4.0, 60)
    assert found == {"device_ms": 4.0, "host_ms": 0.0, "device_ms_from": "cpu"}
    assert len(list(untouched)) == 9


def test_where_the_profiler_fails_events_are_taken_and_the_point_says_why():
    found = timer(profiler=failing("CUPTI_ERROR_NOT_INITIALIZED\nmore"), events=lambda call: BusyTime(10.0))
    found = found.split(calls(), 12.0, 60)
    assert (found["device_ms"], found["host_ms"], found["device_ms_from"]) == (10.0, 2.0, "events")
    assert found["device_ms_note"] == "profiler: CUPTI_ERROR_NOT_INITIALIZED"


def test_where_all_fails_the_wall_time_is_kept():
    found = timer(profiler=failing("a"), events=failing("b")).split(calls(), 12.0, 60)
    assert found == {
        "device_ms": 12.0,
        "host_ms": 0.0,
        "device_ms_from": "wall",
        "device_ms_note": "profiler: a; events: b",
    }
    assert timer(profiler=failing("a")).split(iter(()), 12.0, 60)["device_ms_from"] == "wall"


def test_no_time_left_costs_no_call():
    untouched = calls()
    found = timer(profiler=failing("a")).split(untouched, 12.0, 0.0)
    assert (found["device_ms_from"], found["device_ms_note"]) == ("wall", "no time was left")
    assert len(list(untouched)) == 9


def test_a_way_that_keeps_failing_is_given_up_and_one_that_failed_once_is_not():
    tried = []

    def measure(call):
        tried.append(1)
        if len(tried) != 2:
            raise RuntimeError("no")
        return BusyTime(1.0)

    one = timer(profiler=measure)
    assert [one.split(calls(1), 2.0, 60)["device_ms_from"] for _ in range(8)] == ["wall", "profiler", *["wall"] * 6]
    assert len(tried) == 5


def test_a_failing_profiler_loses_no_point_of_a_profile():
    profiler = child.Profiler(Weights(), budget_s=60, quick=True, say=print)
    profiler.speed = {"bandwidth_gb_s": 1.0, "tflop_s": 1.0}
    profiler.device_timer = timer(profiler=failing("CUPTI is missing"))
    profiler.sampler = child.Sampler(60, 3, lambda: None, timed_share=0.5)
    point = profiler._measured(lambda bench: (itertools.repeat(lambda: None), Cost(1e6, 1e6)), None, {})
    assert point.ms == point.device_ms and point.roofline_ms == 1.0
    assert "CUPTI is missing" in point.device_ms_note


def test_passes_beside_the_timed_calls_come_out_of_the_points_own_seconds():
    sampler = child.Sampler(40.0, 4, lambda: None, timed_share=0.75)
    taken = sampler.sample(iter([lambda: None] * 9))
    assert len(taken) and 0 < sampler.seconds_beside() <= 0.25 * 5.0
    sampler = child.Sampler(40.0, 1, lambda: None, timed_share=0.75)
    for _ in range(3):  # more points than were announced
        assert len(sampler.sample(iter([lambda: None] * 9))) and 0 < sampler.seconds_beside() <= 0.25 * 5.0
    spent = child.Sampler(0.0, 4, lambda: None, timed_share=0.75)
    spent.sample(iter([lambda: None] * 9), needed=True)
    assert spent.seconds_beside() <= 0


def test_the_profiler_is_asked_to_keep_its_events_where_torch_knows_how(monkeypatch):
    """Else torch warns at every point that it clears them."""
    asked = []

    def profile(*, activities, acc_events=False):
        asked.append(acc_events)
        return contextlib.nullcontext(SimpleNamespace(events=lambda: EVENTS))

    def older(*, activities):
        return profile(activities=activities)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for one in (profile, older):
        monkeypatch.setattr(torch.profiler, "profile", one)
        assert len(recorded(lambda: None)) == 4
    assert asked == [True, False]


def test_recording_twice_says_nothing_and_keeps_calls_apart(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler.ProfilerActivity, "CUDA", torch.profiler.ProfilerActivity.CPU, raising=False)
    seen = []
    monkeypatch.setattr(device_time, "activities", lambda events: seen.append([event.name for event in events]) or [])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        recorded(lambda: torch.ones(2) + 1)
        recorded(lambda: torch.ones(2) * 2)
    assert not [one for one in told if "clears events" in str(one.message)]
    assert "aten::add" in seen[0] and "aten::mul" not in seen[0]
    assert "aten::mul" in seen[1] and "aten::add" not in seen[1]
