"""Surges on planned devices: who is served, who is rejected (busy), and how long the recovery takes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from capacity_truth import MIX

from harness import wire
from harness.capacity.fitting.rate_search import Limits, Traffic, steady_sessions
from harness.capacity.models.device import Device
from harness.capacity.models.memory import KvRoom
from harness.capacity.models.spreads import Sample, Spread
from harness.capacity.models.steps import StepTime
from harness.capacity.planning.pools import Pools
from harness.capacity.planning.surges import (
    ADMISSIONS,
    PATIENCE_S,
    QUEUE_LIMIT,
    SURGES,
    Surge,
    _back,
    _Seen,
    behaviour,
    ninety_minutes,
)
from harness.content import content_of
from harness.records.plan import PlannedTarget
from harness.records.slo import Slo

ROOT = Path(__file__).resolve().parents[2]
ALL, WAIT, BUSY = (each.name for each in ADMISSIONS)
EXACT = Spread(Sample(1000, 1000.0, (1.0,) * 13), {})
DEVICE = Device(StepTime("linear", (0.012, 0.006)), 0.03, 2.5, EXACT, EXACT, {}, 30.0, ())
SLOS = tuple(
    Slo.parse(name, metric, limit)
    for name in ("short", "long")
    for metric, limit in (("ttfa_p95_s", 1.0), ("rtf_p95", 0.9))
)


@pytest.fixture(scope="module")
def pools():
    return Pools(DEVICE, Traffic.draw(MIX, np.random.default_rng(3)), Limits(SLOS, 30), 0.85)


@pytest.fixture(scope="module")
def seen(pools):
    target = PlannedTarget(qps=0.8 * 4 * pools.steady_rate(), devices=4)
    return behaviour(pools, MIX, target, np.random.default_rng(1))


def of(seen, surge, admission):
    (row,) = [each for each in seen.surges if (each.surge, each.admission) == (surge, admission)]
    return row


@pytest.mark.parametrize(
    "surge, at_s, factor",
    [
        (Surge("step", 3), [-1, 0, 99, 100, 500], [1, 3, 3, 1, 1]),
        (Surge("ramp", 3, ramp=True), [-1, 0, 50, 99.99, 100], [1, 1, 2, 3, 1]),
        (Surge("impulse", 5, share=0.1), [-1, 0, 9.9, 10], [1, 5, 5, 1]),
    ],
)
def test_a_surge_multiplies_the_rate_for_its_time(surge, at_s, factor):
    assert surge.factor(np.array(at_s, dtype=float), 100.0) == pytest.approx(factor, abs=0.001)


def test_the_limit_is_the_most_sessions_that_keep_every_slo_for_good(seen, pools):
    # RTF = step / 133 ms <= 0.9: 0.012 + 0.006 n <= 0.12, n = 18
    assert steady_sessions(pools.device, pools.limits) == pytest.approx(18, abs=0.1)
    assert seen.session_limit in (17, 18)


def test_every_surge_is_played_for_every_admission(seen):
    assert len(seen.surges) == len(SURGES) * len(ADMISSIONS)
    assert seen.basis == "simulated"
    assert all(row.within_slos_before > 0.97 for row in seen.surges)


@pytest.mark.parametrize("surge, times", [("twice the load", 2), ("five times the load", 5)])
def test_those_let_in_keep_their_slos_and_the_others_are_as_many_as_arithmetic_says(seen, surge, times):
    row = of(seen, surge, BUSY)
    assert row.within_slos_during + row.busy_during == pytest.approx(1, abs=0.02)
    carried = 1 / (0.8 * times)  # of the callers, by a pool that is always full
    assert 1 - row.busy_during == pytest.approx(carried, rel=0.08)
    assert row.most_sessions <= seen.session_limit and not row.beyond_measured
    assert row.recovered_after_s <= 2 * seen.part_s


def test_whoever_lets_all_in_keeps_no_slo_and_recovers_last(seen):
    every, some = of(seen, "five times the load", ALL), of(seen, "five times the load", BUSY)
    assert every.within_slos_during < 0.05 and every.busy_during == 0
    assert every.beyond_measured and every.most_sessions > seen.max_sessions_measured
    assert every.recovered_after_s is None or every.recovered_after_s > some.recovered_after_s


def test_a_queue_longer_than_the_slo_on_first_audio_keeps_few(seen):
    waiting, busy = of(seen, "twice the load", WAIT), of(seen, "twice the load", BUSY)
    assert waiting.within_slos_during < 0.2 < busy.within_slos_during


def test_the_parts_show_the_surge_and_the_way_back(seen):
    for row in seen.surges:
        parts = row.parts
        assert len({len(values) for values in content_of(parts).values()}) == 1
        assert 0.9 * row.times < max(parts.rate) <= row.times and len(parts.rate) <= 120
        assert parts.within_slos[0] == pytest.approx(row.within_slos_before, abs=0.05)
        if row.recovered_after_s is not None:
            assert parts.within_slos[-1] > row.within_slos_before - 0.1


def test_parts_in_which_nobody_came_say_nothing():
    seen = _Seen(*np.array([[4, 0, 2, 0, 2, 2], [4, 0, 0, 0, 2, 2], [0] * 6, [1] * 6]))
    assert seen.within_slos == pytest.approx([1, math.nan, 0, math.nan, 1, 1], nan_ok=True)
    nobody, fine, bad = math.nan, 1.0, 0.2
    assert _back(np.array([fine, nobody, nobody, nobody]), 1.0, 0) is None
    assert _back(np.array([bad, bad, nobody, fine, nobody, fine, fine]), 1.0, 1) == 3


def test_hardly_any_traffic_is_no_traffic_that_breaks_slos(pools):
    """Of one session an hour on one device, most parts see none; the plan is JSON all the same."""
    seen = behaviour(pools, MIX, PlannedTarget(qps=1 / 3600, devices=1), np.random.default_rng(1))
    parts = [share for row in seen.surges for share in row.parts.within_slos]
    assert None in parts and 0.0 not in parts
    assert all(row.within_slos_worst == 1 for row in seen.surges)
    json.dumps(content_of(seen), allow_nan=False)


def test_the_same_seed_shows_the_same(pools, seen):
    target = PlannedTarget(qps=seen.qps, devices=4)
    assert behaviour(pools, MIX, target, np.random.default_rng(1)) == seen


def test_a_device_full_of_90_minute_sessions_takes_as_long_as_its_frames(pools):
    drained = ninety_minutes(pools, 10, np.random.default_rng(2))
    whole_s = wire.MAX_FRAMES * 0.072  # all ten to the end together
    assert drained.longest_s == pytest.approx(whole_s, rel=1e-6)
    assert drained.p50_s < drained.p95_s < drained.longest_s


def test_nobody_is_let_in_without_room_for_the_kv_cache(pools, seen):
    """Beyond the room callers wait in a queue, and are rejected (busy) after 30 s, whichever are admitted."""
    frames = pools.traffic.frames
    kv = KvRoom(float(20 * np.mean(KvRoom(1, 512).bytes_of(frames))), 512)  # for 20 sessions as they come
    full = pools.changed(limits=replace(pools.limits, kv=kv, kv_slots=kv.slots(pools.traffic.whole_frames)))
    target = PlannedTarget(qps=0.8 * 4 * full.steady_rate(), devices=4)
    every = of(behaviour(full, MIX, target, np.random.default_rng(1)), "five times the load", ALL)
    assert every.busy_during > 0.5 and not every.beyond_measured
    assert every.most_sessions < 25 < 100 < of(seen, "five times the load", ALL).most_sessions


def test_no_more_90_minute_sessions_are_drained_than_the_kv_memory_holds(pools):
    kv = KvRoom(float(3.5 * KvRoom(1, 512).bytes_of(np.array([wire.MAX_FRAMES]))[0]), 512)
    full = pools.changed(limits=replace(pools.limits, kv=kv, kv_slots=30.0))
    assert ninety_minutes(full, 10, np.random.default_rng(2)).sessions == 3


def test_the_queue_is_that_of_the_server():
    text = (ROOT / "model_repository" / "vibevoice_full_pipeline" / "config.pbtxt").read_text()
    assert f'"waiting_limit" value {{ string_value: "{QUEUE_LIMIT}" }}' in text
    assert f'"waiting_seconds" value {{ string_value: "{PATIENCE_S:g}" }}' in text
