"""The compiled simulator: against a plain one, in small cases known by hand, and what must always hold."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_simulator import Reference

from harness import wire
from harness.capacity.simulator import engine as engine_module
from harness.capacity.simulator.compiled import ACTIVE, DONE, GAVE_UP, LOST, REFUSED, WAITING
from harness.capacity.simulator.engine import Counting, SimulationEngine, arrivals_of
from harness.capacity.simulator.pool import ON_FAILURE, ROUTINGS, Autoscaler, Planned, Pool, random_failures

OUTCOMES = {DONE: "done", REFUSED: "refused", GAVE_UP: "gave up", LOST: "lost", WAITING: "waiting", ACTIVE: "active"}


def tenth(n):
    return 0.1 + 0 * n


def play(pool, arrivals, stop_s=math.inf, counting=None):
    engine = SimulationEngine(pool, counting, keep=len(arrivals))
    engine.feed(arrivals, last=True, stop_s=stop_s)
    return engine.arrays


def fates(arrays):
    return [OUTCOMES[each] for each in arrays.kept["outcome"]]


def random_case(seed):
    """A pool of any kind, arrivals to it, and a stop; no two times are equal, so that no order is left to chance."""
    rng = np.random.default_rng(seed)
    n, devices = int(rng.integers(1, 60)), int(rng.integers(1, 5))
    arrival_s = np.cumsum(rng.exponential(rng.choice([0.05, 0.3, 1.0]), n))
    columns = {"context": np.floor(rng.exponential(50, n)), "bytes_": rng.integers(1, 50, n)}
    columns |= {"first_s": 0.1 * rng.random(n), "ttfa_ratio": rng.lognormal(0, 0.1, n), "pick": rng.random(n)}
    arrivals = arrivals_of(arrival_s, rng.exponential(10, n) + 0.01, **columns)
    span_s = float(arrival_s[-1])
    scaler = random_scaler(rng, devices) if rng.random() < 0.4 else None
    places = scaler.most if scaler else devices
    planned = [
        Planned(
            float(rng.random() * span_s),
            str(rng.choice(["fail", "repair", "drain", "raise"])),
            int(rng.integers(places)),
        )
        for _ in range(rng.integers(0, 8))
    ]
    base_s, slope_s, token_s = rng.random(3) * [0.1, 0.05, 0.002]
    pool = Pool(
        devices,
        lambda k: 0.02 + base_s + slope_s * k,
        token_s=token_s if rng.random() < 0.6 else 0.0,
        session_limit=None if rng.random() < 0.5 else int(rng.integers(1, 4)),
        memory_bytes=math.inf if rng.random() < 0.5 else float(rng.integers(20, 120)),
        routing=str(rng.choice(ROUTINGS)),
        queue_limit=None if rng.random() < 0.5 else int(rng.integers(0, 5)),
        patience_s=math.inf if rng.random() < 0.5 else float(2 * rng.random()),
        first_audio=(float(0.1 * rng.random()), float(3 * rng.random())),
        start_buffer_s=float(0.3 * rng.random()),
        on_failure=str(rng.choice(ON_FAILURE)),
        autoscaler=scaler,
        planned=tuple(planned),
    )
    stop_s = span_s * float(rng.uniform(0.3, 1.5))
    return pool, arrivals, stop_s if scaler or rng.random() < 0.6 else math.inf


def random_scaler(rng, devices):
    target = float(rng.uniform(0.6, 3))
    high, low = target * rng.uniform(1, 1.5), target * rng.uniform(0, 0.9)
    every_s, lag_s, hold_s = rng.uniform([0.1, 0, 0], [2, 3, 4])
    band = target, float(high), float(low), float(every_s), float(lag_s), float(hold_s)
    floors = sorted((float(20 * rng.random()), int(rng.integers(0, devices + 4))) for _ in range(rng.integers(0, 5)))
    stabilise_s = float(rng.choice([0.0, 3 * rng.random()]))
    ways = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    return Autoscaler(1, devices + 3, *band, stabilise_s, *ways, tuple(floors))


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_it_agrees_with_the_plain_simulator_to_the_last_bit(seed):
    pool, arrivals, stop_s = random_case(seed)
    arrays, plain = play(pool, arrivals, stop_s), Reference(pool).run(arrivals, stop_s)
    shown = arrays.kept[: len(plain.sessions)]
    assert fates(arrays._replace(kept=shown)) == [each.outcome for each in plain.sessions]
    assert np.all(arrays.kept["outcome"][len(plain.sessions) :] == -1)  # not come by the stop
    for kept_one, each in zip(shown, plain.sessions, strict=True):
        if not math.isnan(each.start_s):
            assert (kept_one["device"], kept_one["active_at_start"]) == (each.device, each.active_at_start)
            assert (kept_one["start_s"], kept_one["first_audio_s"]) == (each.start_s, each.first_audio_s)
        if each.outcome not in ("waiting", "active"):
            assert (kept_one["end_s"], kept_one["frames_done"]) == (each.end_s, each.done)
        if each.outcome == "active":
            assert kept_one["frames_done"] == each.done
        if each.outcome == "done":
            assert kept_one["stall_s"] == pytest.approx(each.stall_s, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), cuts=st.lists(st.integers(0, 60), max_size=4))
def test_neither_blocks_nor_little_room_change_anything(seed, cuts):
    pool, arrivals, stop_s = random_case(seed)
    arrivals = arrivals[arrivals["arrival_s"] <= stop_s]
    whole = play(pool, arrivals, stop_s)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "_LEAST_ROOM", 1)
        patch.setattr(engine_module, "_LEAST_SLOTS", 1)
        engine = SimulationEngine(pool, keep=len(arrivals))
    for part in np.split(arrivals, sorted(min(cut, len(arrivals)) for cut in cuts)):
        engine.feed(np.ascontiguousarray(part))
    engine.finish(stop_s)
    for name in whole.kept.dtype.names:
        assert np.array_equal(engine.arrays.kept[name], whole.kept[name], equal_nan=name.endswith("_s"))


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_arrival_has_one_fate_and_no_limit_is_passed(seed):
    pool, arrivals, stop_s = random_case(seed)
    stop_s = min(stop_s, 1e6)
    counting = Counting(("one",), stop_s, windows=6, batches=3)
    arrays = play(pool, arrivals, stop_s, counting)
    state, totals = arrays.state[0], arrays.counts.sum(axis=(0, 1))
    arrived = arrays.kept["outcome"] >= 0
    assert totals[4] == arrived.sum() == state["arrived"]
    for outcome in (DONE, REFUSED, GAVE_UP, LOST):
        assert totals[outcome] == np.sum(arrays.kept["outcome"] == outcome)
    assert state["active"] == np.sum(arrays.kept["outcome"] == ACTIVE) == arrays.devices["active"].sum()
    assert state["waiting"] == np.sum(arrays.kept["outcome"] == WAITING)
    assert totals[:4].sum() + state["active"] + state["waiting"] == totals[4]
    assert np.all(arrays.devices["active"] <= (pool.session_limit or math.inf))
    assert np.all(arrays.devices["bytes"] <= pool.memory_bytes)
    assert np.all(arrays.kept["frames_done"] <= arrivals["frames"] * (1 + 1e-9))
    assert np.all(arrays.bins[:, :, 1].sum() == np.sum(arrived) - state["waiting"] + again_waiting(arrays))


def again_waiting(arrays):
    """Waiting sessions that were heard before, on a device that failed."""
    return int(np.sum((arrays.kept["outcome"] == WAITING) & ~np.isnan(arrays.kept["start_s"])))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), routing=st.sampled_from(ROUTINGS))
def test_bytes_reserved_on_a_device_never_exceed_its_memory(seed, routing):
    rng = np.random.default_rng(seed)
    n, memory = 50, 100.0
    arrivals = arrivals_of(
        np.cumsum(rng.exponential(0.3, n)),
        rng.exponential(10, n) + 0.01,
        bytes_=rng.integers(1, 90, n),
        pick=rng.random(n),
    )
    kept_ones = play(Pool(3, tenth, memory_bytes=memory, routing=routing), arrivals).kept
    assert np.all(kept_ones["outcome"] == DONE)
    for moment in kept_ones["start_s"]:
        there = (kept_ones["start_s"] <= moment) & (kept_ones["end_s"] > moment)
        assert np.all(np.bincount(kept_ones["device"][there], arrivals["bytes"][there]) <= memory)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), devices=st.integers(1, 5))
def test_a_further_device_makes_nobody_wait_longer(seed, devices):
    """First come, first served, and sessions do not slow each other down: no start is later (Kiefer and Wolfowitz)."""
    rng = np.random.default_rng(seed)
    arrivals = arrivals_of(np.cumsum(rng.exponential(0.5, 60)), rng.exponential(10, 60) + 0.01)
    fewer, more = (play(Pool(each, tenth, session_limit=1), arrivals).kept for each in (devices, devices + 1))
    assert np.all(more["start_s"] <= fewer["start_s"] + 1e-9)


# Context


def by_steps(pool, arrivals):
    """Ends of sessions on one device in whole steps: who has come joins at the next, everyone makes a frame in each."""
    ends, there, made, now, coming = np.full(len(arrivals), np.nan), [], {}, 0.0, list(range(len(arrivals)))
    longest = 0.0
    while coming or there:
        if not there:
            now = max(now, arrivals["arrival_s"][coming[0]])
        while coming and arrivals["arrival_s"][coming[0]] <= now:
            there.append(coming.pop(0))
        tokens = sum(arrivals["context"][i] + pool.tokens_per_frame * made.get(i, 0) for i in there)
        step_s = float(pool.step_time(len(there))) + pool.token_s * tokens
        longest, now = max(longest, step_s), now + step_s
        for i in list(there):
            made[i] = made.get(i, 0) + 1
            if made[i] == arrivals["frames"][i]:
                ends[i] = now
                there.remove(i)
    return ends, longest


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), token_s=st.sampled_from([0.0, 1e-5, 1e-3]))
def test_the_continuous_clock_is_within_a_step_an_event_of_whole_steps(seed, token_s):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 8))
    arrivals = arrivals_of(np.cumsum(rng.exponential(2.0, n)), rng.integers(5, 200, n), context=rng.integers(0, 300, n))
    pool = Pool(1, lambda k: 0.02 + 0.01 * k, token_s=token_s)
    whole, longest_s = by_steps(pool, arrivals)
    assert np.all(np.abs(play(pool, arrivals).kept["end_s"] - whole) <= 2 * n * longest_s)


def test_context_makes_steps_longer_as_it_grows():
    """One session, 100 frames from 50 tokens on: 100 x 0.1 s, and 0.001 s x the integral of 50 + 2 x."""
    pool = Pool(1, tenth, token_s=0.001)
    kept_one = play(pool, arrivals_of([1.0], [100], context=50)).kept[0]
    assert kept_one["end_s"] == pytest.approx(1.0 + 10 + 0.001 * (50 * 100 + 100**2))
    assert kept_one["first_audio_s"] == pytest.approx(1.0 + 0.1 + 0.05)


def test_a_table_may_say_what_a_token_costs_at_each_number_of_sessions():
    pool = Pool(1, tenth, token_s=lambda n: 0.001 / n, tokens_per_frame=0)
    kept_ones = play(pool, arrivals_of([0.0, 0.0], [10, 10], context=[100, 300])).kept
    assert kept_ones["end_s"] == pytest.approx(10 * (0.1 + 0.0005 * 400))


def test_stalls_are_what_playback_waits_for():
    """Two share the device for the 60 frames of the second: 12 s for 8 s of audio. Playback starts 0.4 s late."""
    pool = Pool(1, lambda n: 0.1 * n, first_audio=(0.0, 1.0), start_buffer_s=0.4)
    first, second = play(pool, arrivals_of([0.0, 0.1], [200, 60])).kept["stall_s"]
    assert second == pytest.approx(12 - 8 - 0.2 - 0.4)
    assert first == pytest.approx(0.1 - wire.SECONDS_PER_FRAME + 12 - 8 - 0.1 - 0.4)


def test_playback_that_is_never_behind_never_stalls():
    kept_ones = play(Pool(1, tenth, start_buffer_s=0.0), arrivals_of([0.0, 0.1], [100, 100])).kept
    assert kept_ones["stall_s"].tolist() == [0, 0]


# Lines


def test_a_queue_is_bounded_in_number_and_in_time():
    pool = Pool(1, tenth, session_limit=1, queue_limit=2, patience_s=1.5)
    arrays = play(pool, arrivals_of([0.0, 0.1, 0.2, 0.3, 1.1], [10, 20, 5, 5, 5]))
    assert fates(arrays) == ["done", "done", "gave up", "refused", "gave up"]
    assert arrays.kept["end_s"].tolist() == pytest.approx([1.0, 3.0, 1.7, 0.3, 2.6])


def test_nobody_overtakes_one_for_whom_there_is_no_room():
    arrivals = arrivals_of([0.0, 0.1, 0.2], [10, 10, 10], bytes_=[60, 60, 10])
    kept_ones = play(Pool(1, tenth, memory_bytes=100), arrivals).kept
    assert kept_ones["start_s"].tolist() == pytest.approx([0, 1, 1])


def test_where_the_emptiest_device_lacks_bytes_another_is_found():
    arrivals = arrivals_of([0.0, 0.1, 0.2, 0.3], [99] * 4, bytes_=[90, 20, 20, 30])
    kept_ones = play(Pool(2, tenth, memory_bytes=100), arrivals).kept
    assert kept_ones["device"].tolist() == [0, 1, 1, 1]


def test_a_session_that_never_fits_is_refused_at_once():
    arrays = play(Pool(1, tenth, memory_bytes=100), arrivals_of([0.0, 0.1], [10, 10], bytes_=[101, 100]))
    assert fates(arrays) == ["refused", "done"]


@pytest.mark.parametrize(
    ("routing", "devices"), [("least_loaded", [0, 1, 2, 0]), ("round_robin", [0, 1, 2, 0]), ("random", [2, 0, 1, 2])]
)
def test_each_routing_sends_sessions_its_own_way(routing, devices):
    arrivals = arrivals_of([0.0, 0.1, 0.2, 0.3], [99] * 4, pick=[0.9, 0.1, 0.5, 0.99])
    assert play(Pool(3, tenth, routing=routing), arrivals).kept["device"].tolist() == devices


def test_in_the_queue_of_a_device_one_waits_for_that_device():
    arrivals = arrivals_of([0.0, 0.1, 0.2], [100, 1, 1])
    kept_ones = play(Pool(2, tenth, session_limit=1, routing="round_robin"), arrivals).kept
    assert kept_ones["device"].tolist() == [0, 1, 0]
    assert kept_ones["start_s"].tolist() == pytest.approx([0, 0.1, 10])


# Failures, drains, autoscaling


@pytest.mark.parametrize(
    ("on_failure", "fate", "end_s", "start_s"),
    [("lose", "lost", 0.5, 0.0), ("restart", "done", 2.6, 1.6), ("resume", "done", 2.1, 0.0)],
)
def test_a_failure_costs_what_its_kind_says(on_failure, fate, end_s, start_s):
    planned = (Planned(0.5, "fail", 0), Planned(1.6, "raise", 0))
    arrays = play(Pool(1, tenth, on_failure=on_failure, planned=planned), arrivals_of([0.0], [10]))
    assert fates(arrays) == [fate]
    assert arrays.kept["end_s"][0] == pytest.approx(end_s)
    assert arrays.kept["start_s"][0] == pytest.approx(start_s)


def test_a_session_that_is_resumed_has_stalled_for_as_long_as_it_was_away():
    planned = (Planned(2.0, "fail", 0), Planned(7.0, "raise", 0))
    pool = Pool(1, tenth, on_failure="resume", planned=planned, start_buffer_s=0.5)
    stall_s = play(pool, arrivals_of([0.0], [100])).kept["stall_s"][0]
    assert stall_s == pytest.approx(7.0 - 20 * wire.SECONDS_PER_FRAME - 0.1 - 0.5)


def test_a_device_that_drains_gets_no_more_sessions_and_goes_off_when_empty():
    pool = Pool(2, tenth, planned=(Planned(0.05, "drain", 0),))
    counting = Counting(("one",), 4.0, windows=4, batches=4)
    arrays = play(pool, arrivals_of([0.0, 0.1, 0.2], [10, 5, 5]), 4.0, counting)
    assert arrays.kept["device"].tolist() == [0, 1, 1]
    assert arrays.areas["up_s"].sum() == pytest.approx(0.05 + 4)
    assert arrays.areas["owned_s"].sum() == pytest.approx(1.0 + 4)


def test_when_all_devices_are_down_sessions_wait():
    planned = (Planned(0.0, "fail", 0), Planned(3.0, "raise", 0))
    kept_ones = play(Pool(1, tenth, planned=planned), arrivals_of([0.5, 1.0], [1, 1])).kept
    assert kept_ones["start_s"].tolist() == [3.0, 3.0]


def test_an_autoscaler_adds_devices_after_a_lag_and_drains_those_that_are_too_many():
    """Ticks at 1, 2, …: 4 sessions on 1 device at 1 s, so 4 devices, up at 3 s; one session at 5 s, so 1 device."""
    scaler = Autoscaler(1, 4, target=1.0, high=1.5, low=0.5, every_s=1.0, lag_s=2.0, hold_s=3.5)
    pool = Pool(1, tenth, session_limit=1, autoscaler=scaler)
    counting = Counting(("one",), 10.0, windows=10, batches=10)
    arrays = play(pool, arrivals_of([0.1, 0.2, 0.3, 0.4], [70, 5, 5, 5]), 10.0, counting)
    assert arrays.kept["start_s"].tolist() == pytest.approx([0.1, 3, 3, 3])
    assert arrays.areas["up_s"].tolist() == pytest.approx([1, 1, 1, 4, 4, 1, 1, 1, 1, 1])
    assert arrays.areas["owned_s"].tolist() == pytest.approx([1, 4, 4, 4, 4, 1.0, 1, 1, 1, 1])
    assert arrays.devices["state"].tolist().count(2) == 1


def test_an_autoscaler_that_stabilises_waits_for_its_recent_wishes_to_end():
    """As above, but 4 devices were wished for at 1 to 3 s: with 3 s of memory the fleet shrinks at 7 s, not at 4 s."""
    scaler = Autoscaler(1, 4, 1.0, 1.5, 0.5, every_s=1.0, lag_s=2.0, hold_s=0.0, stabilise_s=3.0)
    counting = Counting(("one",), 10.0, windows=10, batches=10)
    pool = Pool(1, tenth, session_limit=1, autoscaler=scaler)
    arrays = play(pool, arrivals_of([0.1, 0.2, 0.3, 0.4], [70, 5, 5, 5]), 10.0, counting)
    assert arrays.areas["up_s"].tolist() == pytest.approx([1, 1, 1, 4, 4, 4, 4, 1, 1, 1])


def test_floors_raise_a_fleet_before_anybody_comes_and_a_draining_device_is_not_recalled():
    """Two devices from 2 s on. Device 1, which drains a session from 4 s, does not return: device 2 starts."""
    ways = {"recalls": False, "newest": True, "floors": ((2.0, 2), (4.0, 1), (5.0, 2))}
    scaler = Autoscaler(1, 3, 9.0, 9.0, 8.0, every_s=1.0, lag_s=0.5, hold_s=0.0, **ways)
    arrays = play(Pool(1, tenth, autoscaler=scaler, routing="least_loaded"), arrivals_of([2.6, 2.7], [100, 100]), 7.0)
    assert arrays.kept["device"].tolist() == [0, 1]
    assert arrays.devices["state"].tolist() == [2, 3, 2]


def test_random_failures_come_in_pairs_and_at_their_rate():
    planned = random_failures(200, 1e6, 9e4, 1e4, np.random.default_rng(3))
    fails = [each for each in planned if each.action == "fail"]
    assert len(planned) == 2 * len(fails)
    assert len(fails) == pytest.approx(200 * 1e6 / 1e5, rel=0.1)
    assert all(a.at_s <= b.at_s for a, b in zip(planned, planned[1:], strict=False))


def test_a_device_that_is_off_neither_fails_nor_is_repaired():
    scaler = Autoscaler(1, 2, 1.0, 9.0, 0.0)
    planned = (Planned(0.5, "fail", 1), Planned(1.0, "repair", 1))
    arrays = play(Pool(1, tenth, autoscaler=scaler, planned=planned), arrivals_of([2.0, 2.1], [1, 1]), 5.0)
    assert arrays.kept["device"].tolist() == [0, 0]
    assert (arrays.state[0]["up"], arrays.state[0]["owned"]) == (1, 1)


# A closed loop


def test_in_a_closed_loop_a_user_asks_again_when_it_has_thought():
    arrivals = arrivals_of([0.0, 0.5, 2.0, 1.0], [10, 10, 10, 10])
    engine = SimulationEngine(Pool(1, tenth), keep=4, callers=2)
    engine.feed(arrivals, last=True)
    assert engine.arrays.kept["start_s"].tolist() == pytest.approx([0.0, 0.5, 2.5, 3.0])
    assert engine.arrays.state[0]["arrived"] == 4
