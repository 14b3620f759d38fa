"""Live statistics count what a listener hears, on given times."""

import math

import numpy as np
import pytest

from harness import wire
from harness.drive.readers.live_stats import History, Lag, LiveStats, Progress, Running
from harness.records.schema import Chunks, Outcome, Request, Result

REQUEST = Request("r", "short", "Speaker 1: Hi.", (0,), frames=9, due_ns=1_000_000_000)
FRAME_NS = 133_333_333


def heard(*arrivals_ns: int) -> LiveStats:
    live = LiveStats(now_ns=0)
    for now_ns in arrivals_ns:
        live.chunk("stream", REQUEST, now_ns, 3200)
    return live


def test_a_stream_is_seen_while_it_runs_and_forgotten_when_it_ends():
    live = heard(1_500_000_000, 1_600_000_000, 1_700_000_000)
    now = live.progress(active=1, waiting=4, now_ns=2_000_000_000)
    (running,) = now.running
    assert (now.active, now.waiting, now.samples, now.stalls) == (1, 4, 9600, 0)
    assert (running.request_id, running.traffic_class, running.ttfa_s, running.stalls) == ("r", "short", 0.5, 0)
    assert running.rtf == pytest.approx(0.2 / (6400 / 24000)) and running.audio_s == pytest.approx(0.4)
    assert now.audio_s_per_s == pytest.approx(0.2)
    live.forget("stream")
    later = live.progress(active=0, waiting=0, now_ns=3_000_000_000)
    assert (later.running, later.audio_s_per_s, later.samples) == ((), 0.0, 9600)


@pytest.mark.parametrize("late_ns, stalls", [(0, 0), (49_000_000, 0), (51_000_000, 1)])
def test_a_stall_is_a_wait_of_more_than_50_ms(late_ns, stalls):
    now = heard(0, FRAME_NS + late_ns, 2 * FRAME_NS + late_ns).progress(1, 0, 10**9)
    assert now.stalls == now.running[0].stalls == stalls


def test_a_stream_with_one_chunk_has_no_rtf():
    assert math.isnan(heard(5).progress(1, 0, 10**9).running[0].rtf)


def test_progress_of_several_readers_adds_up_and_travels():
    running = Running("long", 0.5, 0.8, 1, 3.0, "r")
    now = Progress(1, 2, 3200, 1, 1.5, (running,))
    both = now + Progress.from_plain(now.to_plain())
    assert both == Progress(2, 4, 6400, 2, 3.0, (running, running))


def test_lag_is_the_p99_of_late_timers():
    lag = Lag()
    assert math.isnan(lag.p99_s())
    for late_ns in range(0, 101_000_000, 1_000_000):
        lag.note(1000, 1000 + late_ns)
    assert lag.p99_s() == pytest.approx(0.099)


def running(name: str, ttfa_s: float, rtf: float = float("nan"), stalls: int = 0) -> Running:
    return Running("short", ttfa_s, rtf, stalls, 1.0, name)


def ended(name: str, ttfa_s: float, rtf: float) -> Result:
    """Two chunks of a frame: the first after ttfa_s, the second rtf x its audio later."""
    first = round(ttfa_s * 1e9)
    times = np.array([first, first + round(rtf * wire.SECONDS_PER_FRAME * 1e9)])
    return Result(
        request_id=name, traffic_class="short", speakers=1, script_words=1, frames=2, start_frame=0, chunk_frames=1,
        loop="open", due_ns=0, sent_ns=1, ended_ns=int(times[1]), outcome=Outcome.DONE,
        chunks=Chunks(times, times, np.full(2, wire.SAMPLES_PER_FRAME)),
    )  # fmt: skip


def test_the_charts_show_each_first_audio_once_and_forget_it_after_the_window():
    history, results = History(window_s=10), []
    history.add(1, Progress(active=2, running=(running("a", 0.2, 0.5), running("b", 0.4))), results)
    assert (history.points[0].ttfa_p50_s, history.points[0].rtf_p95) == (0.3, 0.5)
    results.append(ended("a", 0.2, 0.5))
    history.add(2, Progress(active=1, running=(running("a", 0.2, 0.5), running("b", 0.4, 0.7))), results)
    assert (history.points[1].ttfa_p50_s, history.points[1].rtf_p50) == (0.3, 0.6)
    history.add(30, Progress(active=1, running=(running("b", 0.4, 0.7),)), results)
    assert (history.points[2].ttfa_p50_s, history.points[2].rtf_p50) == (None, 0.7)


def test_the_charts_count_the_stalls_of_the_window():
    history = History(window_s=2)
    for second, stalls in enumerate((0, 3, 3, 3, 5, 5), start=1):
        history.add(second, Progress(stalls=stalls), [])
    assert [point.stalls for point in history.points] == [0, 3, 3, 0, 2, 2]


def test_a_long_test_has_no_more_points_than_a_chart_can_show():
    history = History(most=10)
    for second in range(1000):
        history.add(second, Progress(active=second), [])
    times = [point.at_s for point in history.points]
    assert 5 <= len(times) <= 10 and times[0] == 0 and times[-1] >= 800
    assert len(set(np.diff(times))) == 1
