"""Tasks in the simulated pool: they run in segments in what the streams leave, and give way at a segment's end."""

import numpy as np
import pytest

from harness.capacity.simulator.engine import arrivals_of
from harness.capacity.simulator.pool import Planned, Pool
from harness.capacity.simulator.sessions import Activity, remembered
from harness.errors import InputError


def tenth(n):
    return 0.1 + 0 * n


def play(pool, arrival_s, frames, segment, turn=None, **more):
    turn = arrival_s if turn is None else turn
    return remembered(pool, arrivals_of(arrival_s, frames, segment=segment, turn=turn), **more)


def test_a_task_alone_takes_as_long_as_a_stream():
    run = play(Pool(1, tenth, shared_sessions=1), [0.0], [100], [30])
    assert (run.start_s[0], run.end_s[0]) == (0.0, pytest.approx(10.0))


def test_a_task_gives_way_to_a_stream_at_the_end_of_its_segment_and_goes_on_after_it():
    run = play(Pool(1, tenth, shared_sessions=1), [0.0, 5.0], [100, 20], [30, 0])
    assert run.start_s.tolist() == [0.0, 5.0], "the stream waits for nobody"
    assert run.end_s.tolist() == pytest.approx([11.0, 7.0]), "60 frames, a pause from 6 to 7, 40 frames"


def test_the_task_that_was_claimed_last_gives_way():
    run = play(Pool(1, tenth, shared_sessions=2), [0.0, 1.0, 1.5], [100, 100, 60], [30, 30, 0])
    assert run.end_s.tolist() == pytest.approx([10.0, 1.0 + 10.0 + 3.5, 7.5])


def test_tasks_start_in_the_order_of_their_turns():
    run = play(Pool(1, tenth, shared_sessions=1), [0.0, 1.0, 2.0], [50, 10, 10], [20] * 3, turn=[0, 5, 3])
    assert run.end_s.tolist() == pytest.approx([5.0, 7.0, 6.0])


def test_no_more_tasks_run_than_workers_have_places():
    run = play(Pool(1, tenth, shared_sessions=9, task_slots=2), [0.0] * 4, [10] * 4, [20] * 4)
    assert run.end_s.tolist() == pytest.approx([1.0, 1.0, 2.0, 2.0])


def test_resuming_takes_its_time_at_every_segment_but_the_first():
    run = play(Pool(1, tenth, shared_sessions=1, between_segments=(0.5, 0.01)), [0.0], [60], [20])
    assert run.end_s[0] == pytest.approx(6.0 + 2 * 0.5 + 0.01 * (20 + 40))


def test_context_is_that_of_the_frames_spoken_however_often_a_task_resumes():
    pool = Pool(1, tenth, token_s=1e-4, shared_sessions=1)
    whole, parts = (play(pool, [0.0], [400], [size]) for size in (400, 25))
    assert parts.end_s[0] == pytest.approx(whole.end_s[0]), "no time between segments"
    late = play(
        Pool(1, tenth, token_s=1e-4, shared_sessions=1, between_segments=(1.0, 0)), [0.0, 200.0], [400, 10], [25, 0]
    )
    alone = play(pool, [200.0], [10], [0])
    assert late.end_s[1] == pytest.approx(alone.end_s[0]), "nothing of the task is left on the device"


def test_a_device_that_fails_costs_a_task_its_segment_alone():
    pool = Pool(2, tenth, shared_sessions=1, planned=(Planned(5.0, "fail", 0),), on_failure="lose")
    run = play(pool, [0.0], [100], [30])
    assert run.end_s[0] == pytest.approx(5.0 + 7.0) and run.device[0] == 0, "30 frames were stored at 3.0"


def test_tasks_never_take_what_the_streams_need_for_longer_than_a_segment():
    rng = np.random.default_rng(3)
    streams, tasks, shared = 400, 60, 6
    arrival_s = np.concatenate([np.sort(rng.uniform(0, 800, streams)), np.sort(rng.uniform(0, 600, tasks))])
    frames = np.concatenate([rng.integers(20, 120, streams), rng.integers(50, 400, tasks)]).astype(float)
    segment = np.concatenate([np.zeros(streams), np.full(tasks, 30.0)])
    order = np.argsort(arrival_s, kind="stable")
    run = play(
        Pool(2, lambda n: 0.08 + 0.01 * n, shared_sessions=shared), *(x[order] for x in (arrival_s, frames, segment))
    )
    is_task = segment[order] > 0
    assert not np.isnan(run.end_s).any() and np.allclose(run.frames_done, frames[order])
    assert np.allclose(run.start_s[~is_task], run.arrival_s[~is_task])
    busy = Activity.between(run.start_s[~is_task], run.end_s[~is_task])
    began = run.start_s[is_task]
    assert (busy.at(began) < shared).all(), "none starts where streams have all of it"


def test_tasks_that_have_not_ended_say_how_far_they_are():
    run = play(Pool(1, tenth, shared_sessions=1), [0.0, 0.5], [100, 100], [30, 30], stop_s=4.5)
    assert run.frames_done.tolist() == pytest.approx([45.0, 0.0]) and np.isnan(run.end_s).all()
    assert np.isnan(run.start_s[1])


@pytest.mark.parametrize("wrong", [{"shared_sessions": -1}, {"task_slots": -1}, {"between_segments": (-1.0, 0.0)}])
def test_a_pool_of_tasks_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(InputError):
        Pool(1, tenth, **wrong)


def test_a_task_holds_its_session_from_its_claim_and_a_stream_is_not_longer_for_it():
    """The time before the first frame is waited for by all that wait behind it."""
    run = play(Pool(1, tenth, shared_sessions=1, first_audio=(1.0, 3.0)), [0.0, 0.0], [10, 10], [20, 20])
    assert run.end_s.tolist() == pytest.approx([2.2, 4.4]), "1 s and two steps more than the first frame's own, each"
    parts = play(
        Pool(1, tenth, shared_sessions=1, first_audio=(1.0, 1.0), between_segments=(0.5, 0.0)), [0.0], [40], [20]
    )
    assert parts.end_s[0] == pytest.approx(1.0 + 2.0 + 0.5 + 2.0)
    stream = play(Pool(1, tenth, shared_sessions=1, first_audio=(1.0, 3.0)), [0.0], [10], [0])
    assert (stream.first_audio_s[0], stream.end_s[0]) == pytest.approx((1.3, 1.0))


def test_a_task_that_loses_its_device_in_its_first_segment_is_started_anew():
    planned = (Planned(1.5, "fail", 0),)
    run = play(Pool(2, tenth, shared_sessions=1, first_audio=(1.0, 1.0), planned=planned), [0.0], [10], [20])
    assert run.end_s[0] == pytest.approx(1.5 + 2.0)
