"""The frame loop through stages with delays, batches and instances."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from capacity_truth import bare_fit, fastest_s, fitted_stage
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import wire
from harness.capacity.planning.staged import StageModel, Topology, rounds, staged_step_time, step_knots
from harness.capacity.simulator.sessions import simulate
from harness.errors import InconclusiveError, InputError
from harness.records.fit import UnfittedStage


def exactly(topology, sessions, seed=1, **more):
    return rounds(topology, sessions, np.random.default_rng(seed), **more)


def topology(*stages, **more):
    return Topology(tuple(stages), **({"noise": 0.0} | more))


THREE = (StageModel("llm", 0.001, 0.008), StageModel("diffusion", 0.0005, 0.010), StageModel("vocoder", 0.0003, 0.004))


def test_one_session_alone_waits_for_nobody():
    shown = exactly(topology(*THREE, hop_s=0.0003), 1)
    assert shown.step_s == pytest.approx(0.009 + 0.0105 + 0.0043 + 3 * 0.0003)
    assert shown.mean_batch == (1, 1, 1)


def test_a_delay_is_paid_at_every_stage_of_every_frame():
    late = [StageModel(each.name, each.alpha_s, each.tau0_s, delay_s=0.1) for each in THREE]
    shown = exactly(topology(*late), 1)
    assert shown.step_s == pytest.approx(0.0238 + 0.3)
    assert np.all(shown.gaps_s > wire.SECONDS_PER_FRAME)  # no frame of 133 ms keeps up with three delays of 100 ms


def test_a_full_batch_does_not_wait_for_the_delay():
    stage = StageModel("llm", 0.001, 0.01, delay_s=10.0, max_batch=4)
    shown = exactly(topology(stage), 4)
    assert shown.step_s == pytest.approx(0.014)
    assert shown.mean_batch == (4,)


def test_instances_serve_side_by_side_and_one_gpu_lets_them_take_turns():
    one_by_one = StageModel("llm", 0.0, 0.01, max_batch=1, instances=2)
    assert exactly(topology(one_by_one), 4).step_s == pytest.approx(0.02)
    assert exactly(topology(one_by_one, one_gpu=True), 4).step_s == pytest.approx(0.04)


def test_what_is_batched_makes_more_sessions_nearly_free():
    steps = [exactly(topology(*THREE), n).step_s for n in (1, 8, 32)]
    assert steps[1] < 2.1 * steps[0] and steps[2] < 3.1 * steps[0]


def plainly(around, sessions, starts_s, frames, apart=()):
    """The same loop with lists that are searched. Times at which each session's frames are made.

    ``apart``: times between the sessions of a batch that leave the last stage, used one after another; none: no time.
    """
    stages, hop_s, one_gpu = around.stages, around.hop_s, around.one_gpu
    draws = itertools.cycle(apart or [0.0])
    queues, running, made = [[] for _ in stages], [], [[] for _ in range(sessions)]
    coming = [(at_s, 0, k) for k, at_s in enumerate(starts_s)]
    gpu_s = 0.0
    while min(map(len, made)) < frames:
        timers = [
            queue[0][0] + max(stage.delay_s, around.wake_s)
            for number, (stage, queue) in enumerate(zip(stages, queues, strict=True))
            if queue and sum(each[1] == number for each in running) < stage.instances
        ]
        now = min([each[0] for each in coming + running] + timers)
        for each in sorted((each for each in running if each[0] == now), key=lambda each: (each[1], each[3])):
            running.remove(each)
            at_s, last = now + hop_s, each[1] + 1 == len(stages)
            for k in each[2]:
                if last:
                    made[k].append(now)
                coming.append((at_s, (each[1] + 1) % len(stages), k))
                at_s += next(draws) if last else 0.0
        for each in [each for each in coming if each[0] == now]:
            coming.remove(each)
            queues[each[1]].append((now, each[2]))
        for number, stage in enumerate(stages):
            queue = queues[number]
            while queue and sum(each[1] == number for each in running) < stage.instances:
                if len(queue) < stage.max_batch and queue[0][0] + max(stage.delay_s, around.wake_s) > now:
                    break
                batch = [queue.pop(0)[1] for _ in range(min(len(queue), stage.max_batch))]
                gpu_s = (max(now, gpu_s) if one_gpu else now) + stage.time_s(len(batch))
                taken = [each[3] for each in running if each[1] == number]
                running.append((gpu_s, number, batch, min(set(range(stage.instances)) - set(taken))))
    return np.array([times[:frames] for times in made])


stage_values = st.builds(
    StageModel,
    st.just("stage"),
    st.sampled_from([0.0, 0.0011, 0.0023]),
    st.sampled_from([0.0031, 0.0077, 0.0203]),
    st.sampled_from([0.0, 0.0047, 0.0531]),
    st.integers(1, 5),
    st.integers(1, 3),
)


@settings(max_examples=150, deadline=None)
@given(
    stages=st.lists(stage_values, min_size=1, max_size=3),
    sessions=st.integers(1, 7),
    one_gpu=st.booleans(),
    apart_s=st.sampled_from([0.0, 0.00041, 0.0067]),
    wake_s=st.sampled_from([0.0, 0.00053, 0.0091]),
    seed=st.integers(0, 999),
)
def test_it_agrees_with_the_plain_loop(stages, sessions, one_gpu, apart_s, wake_s, seed):
    around = topology(*stages, hop_s=0.000317, one_gpu=one_gpu, apart_s=apart_s, wake_s=wake_s)
    shown = exactly(around, sessions, seed, frames=20, warm_up=2)
    rng = np.random.default_rng(seed)
    starts_s = np.sort(rng.random(sessions)) * around.alone_s()
    plain = plainly(around, sessions, starts_s, 22, (apart_s * rng.exponential(1.0, 4096)).tolist())
    assert shown.gaps_s == pytest.approx(np.diff(plain)[:, 1:], abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(stages=st.lists(stage_values, min_size=1, max_size=3), sessions=st.integers(1, 40), one_gpu=st.booleans())
def test_no_round_beats_its_busiest_stage(stages, sessions, one_gpu):
    around = topology(*stages, hop_s=0.0003, one_gpu=one_gpu)
    shown = exactly(around, sessions, frames=100)
    assert shown.step_s >= fastest_s(around, sessions) * 0.97  # a window of 100 rounds may cut one
    assert all(1 <= batch <= each.max_batch for batch, each in zip(shown.mean_batch, stages, strict=True))


@pytest.mark.parametrize("times", [(0.0, 0.0), (1e-169, 0.0), (0.0, 1e169), (0.0, 0.01, 1e169)])
def test_a_stage_whose_times_lose_those_of_others_is_refused(times):
    with pytest.raises(InputError, match="a batch of one at least 1e-09 s"):
        StageModel("llm", *times)


def test_a_batch_that_was_taken_ahead_grows_no_more():
    """Those that come while a batch waits ahead are one after it, where otherwise they would have joined."""
    stage = StageModel("llm", 0.0, 0.01)
    joined, ahead = (exactly(topology(stage, stage, prefetch=prefetch, one_gpu=True), 6) for prefetch in (False, True))
    assert max(ahead.mean_batch) < max(joined.mean_batch)
    assert ahead.step_s > joined.step_s
    full = StageModel("llm", 0.001, 0.01, delay_s=10.0, max_batch=4)
    assert exactly(topology(full, prefetch=True), 4).step_s == pytest.approx(0.014)


def test_sessions_that_leave_one_after_another_do_not_stay_one_batch():
    """A delay in one stage alone would otherwise gather all of them for ever: the others wait for nobody."""
    llm, vocoder = StageModel("llm", 0.001, 0.003), StageModel("vocoder", 0.0012, 0.003)
    around = topology(
        llm, StageModel("diffusion", 0.0008, 0.005, 0.015), vocoder, hop_s=0.0012, one_gpu=True, prefetch=True
    )
    gathered, apart = exactly(around, 8), exactly(replace(around, apart_s=0.0003, wake_s=0.0003), 8)
    assert min(gathered.mean_batch) > 7
    assert max(apart.mean_batch) < 4 and apart.step_s > 1.05 * gathered.step_s
    collected = exactly(topology(THREE[0], apart_s=0.0005, wake_s=0.02), 8)
    assert collected.mean_batch[0] > 7 > exactly(topology(THREE[0], apart_s=0.0005), 8).mean_batch[0]


def test_the_hosts_work_around_a_turn_leaves_the_gpu_to_others():
    stage = StageModel("llm", 0.0, 0.01, max_batch=1)
    alone = exactly(topology(stage, host_s=0.002, host_each_s=0.001, one_gpu=True), 1)
    assert alone.step_s == pytest.approx(0.013)
    two = StageModel("llm", 0.0, 0.01, max_batch=1, instances=2)
    assert exactly(topology(two, host_s=0.002, one_gpu=True), 4).step_s == pytest.approx(0.04)


def test_the_host_of_a_stage_leaves_the_gpu_to_others_too():
    """Two stages of 12 ms of host and 2 ms of GPU: a round takes 28 ms, for 1 session and for 10 in batches of 1."""
    stages = [StageModel(name, 0.0, 0.002, max_batch=1, host_s=0.011, host_each_s=0.001) for name in ("llm", "vocoder")]
    around = topology(*stages, one_gpu=True)
    assert exactly(around, 1).step_s == pytest.approx(around.alone_s()) == pytest.approx(0.028)
    # One at each stage: host times overlap, and of two that ask for the GPU at once one waits for the other's turn.
    assert exactly(around, 2).step_s == pytest.approx(0.032)
    many = topology(*(replace(each, instances=10) for each in stages), one_gpu=True)
    assert exactly(many, 10).step_s == pytest.approx(fastest_s(many, 10)) == pytest.approx(0.040)  # 20 turns of the GPU


def test_its_step_time_drives_a_device():
    around = topology(*THREE, hop_s=0.0003)
    step_time = staged_step_time(around, 64, np.random.default_rng(1))
    assert float(step_time(1)) == pytest.approx(around.alone_s())
    run = simulate([0.0] * 20, [100] * 20, step_time)
    assert run.end_s == pytest.approx(100 * float(step_time(20)))


def test_a_fitted_deployment_may_be_asked_what_other_knobs_would_do():
    services = tuple(
        fitted_stage(name, alpha_s=each.alpha_s, tau0_s=each.tau0_s)
        for name, each in zip(wire.STAGES, THREE, strict=True)
    )
    fit = bare_fit(stages=services, deployment={f"{wire.LLM}.delay_us": 2000, f"{wire.DIFFUSION}.instances": 2})
    as_it_was, turned = (Topology.of_fit(fit, knobs) for knobs in (None, {f"{wire.LLM}.delay_us": 0}))
    assert as_it_was.stages[1] == StageModel(wire.DIFFUSION, 0.0005, 0.010, instances=2)
    assert as_it_was.alone_s() == pytest.approx(turned.alone_s() + 0.002)
    unfitted = UnfittedStage(stage=wire.VOCODER, points=(), inconclusive="only 1 batch size")
    with pytest.raises(InconclusiveError, match="neural_vocoder: only 1 batch size"):
        Topology.of_fit(replace(fit, stages=(*services[:2], unfitted)))


def test_noise_moves_a_round_by_a_little():
    quiet, noisy = topology(*THREE), topology(*THREE, noise=0.1)
    assert exactly(noisy, 1, frames=2000).step_s == pytest.approx(exactly(quiet, 1).step_s, rel=0.01)
    assert exactly(noisy, 1).gaps_s.std() > 0


def test_a_step_time_of_one_session_is_level():
    step_time = staged_step_time(topology(*THREE), 1, np.random.default_rng(1))
    assert step_time.kind == "linear" and float(step_time(7)) == pytest.approx(0.0238)


def test_knots_stand_on_both_sides_of_full_batches():
    knots = step_knots(64, [16])
    assert {1, 2, 3, 8, 16, 17, 32, 33, 64} <= set(knots) and len(knots) < 32
    assert step_knots(1, [16]) == [1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: StageModel("llm", -0.1, 0.2),
        lambda: StageModel("llm", 0.0, 0.0),
        lambda: StageModel("llm", 0.1, math.inf),
        lambda: StageModel("llm", 0.1, 0.1, max_batch=0),
        lambda: StageModel("llm", 0.1, 0.1, host_s=-0.1),
        lambda: Topology(()),
        lambda: topology(*THREE, hop_s=-1.0),
        lambda: exactly(topology(*THREE), 0),
    ],
)
def test_stages_that_cannot_be_are_refused(make):
    with pytest.raises(InputError):
        make()
