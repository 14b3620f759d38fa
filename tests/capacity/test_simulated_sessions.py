import heapq

import numpy as np
import pytest
import queueing
from capacity_truth import poisson_arrivals
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import wire
from harness.capacity.simulator.sessions import Activity, simulate
from harness.errors import InputError


def constant(n):
    return 0.1 + 0 * n


def shared(n):
    """A device that makes ten frames a second in all: processor sharing."""
    return 0.1 * n


def sample(rate: float, n: int, seed: int, frames=lambda rng, n: rng.exponential(10, n)):
    """Poisson arrivals and frames, scaled to have exactly their means: that takes most of the chance out of a load."""
    rng = np.random.default_rng(seed)
    gaps, frames = rng.exponential(1.0, n), frames(rng, n)
    return np.cumsum(gaps / gaps.mean() / rate), frames * 10 / frames.mean()


def test_one_session_alone():
    run = simulate([2.0], [30], constant, first_audio=(0.05, 3))
    assert run.start_s.tolist() == [2.0]
    assert run.end_s.tolist() == pytest.approx([5.0])
    assert run.ttfa_s.tolist() == pytest.approx([0.35])
    assert run.rtf.tolist() == pytest.approx([0.1 / wire.SECONDS_PER_FRAME])


def test_nobody_comes():
    run = simulate([], [], constant)
    assert len(run.end_s) == 0
    assert Activity.between(run.start_s, run.end_s).mean(lambda n: n, 0.0, 1.0) == 0


def test_two_sessions_share_the_frame_clock():
    run = simulate([0.0, 1.0], [20, 20], shared)
    assert run.end_s.tolist() == pytest.approx([3.0, 4.0])  # ten frames alone, ten in two seconds; then the other alone
    assert run.active_at_start.tolist() == [1, 2]


def test_arrivals_queue_at_the_limit():
    run = simulate([0.0, 0.1, 0.2], [10, 10, 10], constant, session_limit=1)
    assert run.start_s.tolist() == pytest.approx([0, 1, 2])
    assert run.ttfa_s.tolist() == pytest.approx([0.1, 1.0, 1.9])


def test_arrivals_go_to_the_least_loaded_device():
    run = simulate([0.0, 0.1, 0.2, 0.3], [100, 100, 1, 100], constant, devices=2)
    assert run.device.tolist() == [0, 1, 0, 1]


def test_a_stop_leaves_what_was_made_until_then():
    run = simulate([0.0, 0.5], [100, 3], constant, stop_s=2.0)
    assert np.isnan(run.end_s[0])
    assert run.end_s[1] == pytest.approx(0.8)
    assert run.frames_done.tolist() == pytest.approx([20, 3])
    assert run.rtf.tolist() == pytest.approx([0.75, 0.75])


@pytest.mark.parametrize("load", [0.4, 0.6])
def test_processor_sharing_with_exponential_work(load):
    run = simulate(*sample(load, 200_000, seed=12), shared)
    assert np.mean(run.end_s - run.arrival_s) == pytest.approx(1 / (1 - load), rel=0.02)


@pytest.mark.parametrize("load", [0.5, 0.7])
def test_processor_sharing_does_not_mind_the_distribution_of_work(load):
    """M/G/1-PS: mean time of a session of x frames is x s / (1 - load), whatever the distribution."""
    arrival_s, frames = sample(load, 100_000, 13, lambda rng, n: np.where(rng.random(n) < 0.9, 5.0, 55.0))
    run = simulate(arrival_s, frames, shared)
    time_s = run.end_s - run.arrival_s
    for size in np.unique(frames):
        assert np.mean(time_s[frames == size]) == pytest.approx(size * 0.1 / (1 - load), rel=0.03)


def test_sharing_with_a_step_that_depends_on_sessions_has_its_product_form():
    """P(n) ~ (rate x mean frames)^n S(1) .. S(n) / n!, seen through the mean number of sessions."""
    arrival_s, frames = sample(1.2, 60_000, 17, lambda rng, n: rng.lognormal(2, 0.8, n))
    run = simulate(arrival_s, frames, lambda k: 0.03 + 0.02 * k)
    k = np.arange(1, 200)
    weights = np.concatenate([[1], np.cumprod(1.2 * 10 * (0.03 + 0.02 * k) / k)])
    expected = weights @ np.arange(200) / weights.sum()
    mean = Activity.between(run.start_s, run.end_s).mean(lambda n: n, 0, float(run.arrival_s[-1]))
    assert mean == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("servers", "rate"), [(1, 0.6), (4, 2.4), (10, 7.0)])
def test_servers_without_sharing_are_erlang(servers, rate):
    run = simulate(*sample(rate, 150_000, seed=6), constant, devices=servers, session_limit=1)
    waited_s = run.start_s - run.arrival_s
    assert np.mean(waited_s > 0) == pytest.approx(queueing.erlang_c(servers, rate), rel=0.02)
    assert np.mean(waited_s) == pytest.approx(queueing.mean_wait_s(servers, rate, 1.0), rel=0.03)


def test_servers_without_sharing_follow_kiefer_and_wolfowitz():
    """In a pool with one queue, the k-th arrival starts when the first server of all is free: exactly so."""
    rng = np.random.default_rng(29)
    arrival_s, frames = poisson_arrivals(3.2, 5000, rng), rng.exponential(10, 5000)
    run = simulate(arrival_s, frames, constant, devices=4, session_limit=1)
    free_s = [0.0] * 4
    for k, at_s in enumerate(arrival_s):
        start_s = max(heapq.heappop(free_s), at_s)
        heapq.heappush(free_s, start_s + 0.1 * frames[k])
        assert run.start_s[k] == pytest.approx(start_s, abs=1e-6)


def test_deterministic_service_halves_the_wait():
    run = simulate(*sample(0.7, 100_000, 23, lambda rng, n: np.ones(n)), constant, session_limit=1)
    expected = queueing.mean_wait_s(1, 0.7, 1.0, service_scv=0.0)
    assert np.mean(run.start_s - run.arrival_s) == pytest.approx(expected, rel=0.02)


traffic = st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 50)), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(
    sessions=traffic,
    devices=st.integers(1, 4),
    limit=st.none() | st.integers(1, 3),
    slope=st.floats(0, 0.1),
    stop_s=st.none() | st.floats(0, 60),
)
def test_nothing_is_lost_and_no_effect_precedes_its_cause(sessions, devices, limit, slope, stop_s):
    gaps, frames = np.array(sessions).T
    stop_s = np.inf if stop_s is None else stop_s
    arrival_s = np.cumsum(gaps)

    def step_time(n):
        return 0.05 + slope * n

    run = simulate(arrival_s, frames, step_time, devices=devices, session_limit=limit, stop_s=stop_s)
    started, ended = ~np.isnan(run.start_s), ~np.isnan(run.end_s)
    assert np.all(started >= ended)
    assert np.all(run.start_s[started] >= arrival_s[started])
    assert np.all(run.end_s[ended] - run.start_s[ended] >= frames[ended] * step_time(1) * (1 - 1e-9))
    assert np.all(run.first_audio_s[started] > run.start_s[started])
    assert run.frames_done[ended] == pytest.approx(frames[ended])
    assert np.all((run.frames_done >= -1e-9) & (run.frames_done <= frames * (1 + 1e-9)))
    assert np.all(np.diff(run.start_s[started]) >= 0)  # first come, first served
    if stop_s == np.inf:
        assert np.all(ended)
        assert np.all(run.active_at_start <= (limit or len(frames)))
        for device in range(devices):
            here = run.device == device
            if np.any(here):
                made = Activity.between(run.start_s[here], run.end_s[here]).integral(
                    lambda n: np.where(n > 0, n / step_time(n), 0.0), 1e9
                )
                assert made == pytest.approx(frames[here].sum(), rel=1e-6)  # no idle step while a session is there


def test_the_same_seed_gives_the_same_run():
    def once():
        rng = np.random.default_rng(42)
        return simulate(poisson_arrivals(3, 500, rng), rng.exponential(10, 500), shared, devices=4)

    first, second = once(), once()
    for name in ("start_s", "end_s", "device", "rtf"):
        assert np.array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize(
    ("arrival_s", "frames", "options", "message"),
    [
        ([1.0, 0.5], [1, 1], {}, "in order of time"),
        ([0.0], [0], {}, "more than 0 frames"),
        ([0.0], [1, 2], {}, "one number of frames"),
        ([0.0], [1], {"devices": 0}, "1 device or more"),
        ([0.0], [1], {"session_limit": 0}, "1 session or more"),
    ],
)
def test_refuses_nonsense(arrival_s, frames, options, message):
    with pytest.raises(InputError, match=message):
        simulate(arrival_s, frames, constant, **options)


def test_refuses_a_step_without_duration():
    with pytest.raises(InputError, match="more than 0 seconds"):
        simulate([0.0], [1], lambda n: 0 * n)


def test_activity_counts_and_integrates():
    activity = Activity.between(np.array([0.0, 1.0]), np.array([3.0, 2.0]))
    assert activity.at(np.array([-1, 0, 1.5, 2.5, 9])).tolist() == [0, 1, 2, 1, 0]
    assert activity.mean(lambda n: n, 0.0, 4.0) == pytest.approx(1.0)
