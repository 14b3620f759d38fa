"""The live look counts what a listener hears, on given times."""

import math

import pytest

from harness.records import Request
from harness.watch import Lag, Progress, Running, Watch

REQUEST = Request("r", "short", "Speaker 1: Hi.", (0,), frames=9, due_ns=1_000_000_000)
FRAME_NS = 133_333_333


def heard(*arrivals_ns: int) -> Watch:
    watch = Watch(now_ns=0)
    for now_ns in arrivals_ns:
        watch.chunk("stream", REQUEST, now_ns, 3200)
    return watch


def test_a_stream_is_seen_while_it_runs_and_forgotten_when_it_ends():
    watch = heard(1_500_000_000, 1_600_000_000, 1_700_000_000)
    look = watch.look(active=1, waiting=4, now_ns=2_000_000_000)
    (running,) = look.running
    assert (look.active, look.waiting, look.samples, look.stalls) == (1, 4, 9600, 0)
    assert (running.request_id, running.traffic_class, running.ttfa_s, running.stalls) == ("r", "short", 0.5, 0)
    assert running.rtf == pytest.approx(0.2 / (6400 / 24000)) and running.audio_s == pytest.approx(0.4)
    assert look.audio_s_per_s == pytest.approx(0.2)
    watch.forget("stream")
    later = watch.look(active=0, waiting=0, now_ns=3_000_000_000)
    assert (later.running, later.audio_s_per_s, later.samples) == ((), 0.0, 9600)


@pytest.mark.parametrize("late_ns, stalls", [(0, 0), (49_000_000, 0), (51_000_000, 1)])
def test_a_stall_is_a_wait_of_more_than_50_ms(late_ns, stalls):
    look = heard(0, FRAME_NS + late_ns, 2 * FRAME_NS + late_ns).look(1, 0, 10**9)
    assert look.stalls == look.running[0].stalls == stalls


def test_a_stream_with_one_chunk_has_no_rtf():
    assert math.isnan(heard(5).look(1, 0, 10**9).running[0].rtf)


def test_looks_of_several_readers_add_up_and_travel():
    running = Running("long", 0.5, 0.8, 1, 3.0, "r")
    look = Progress(1, 2, 3200, 1, 1.5, (running,))
    both = look + Progress.from_plain(look.to_plain())
    assert both == Progress(2, 4, 6400, 2, 3.0, (running, running))


def test_lag_is_the_p99_of_late_timers():
    lag = Lag()
    assert math.isnan(lag.p99_s())
    for late_ns in range(0, 101_000_000, 1_000_000):
        lag.note(1000, 1000 + late_ns)
    assert lag.p99_s() == pytest.approx(0.099)
