"""A rung that others disturb is measured again once they are quiet, for a bounded time; else it is left out."""

from types import SimpleNamespace

import pytest

from harness.drive.climb import Climb
from harness.drive.disturbance import HostSample
from harness.drive.generator import LoadSettings
from harness.drive.host_monitor import HostRecord
from harness.drive.load import Load
from harness.drive.readers.live_stats import Progress
from harness.drive.recorder import Recorder
from harness.drive.stop_rule import REPEATS, Repeats
from harness.traffic.mix import MIXES

SECOND = 10**9
RUNG_S, SESSIONS = 8.0, (1, 2, 3)
SETTLE_S = RUNG_S / 4
START_S = 500.0


class Host:
    """A host monitor with a clock of its own: the run uses one of two cores, and others what ``others(at_s)`` says."""

    def __init__(self, others):
        self.now_s, self._others, self._samples = START_S, others, []

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        others = self._others(self.now_s - START_S)
        at_ns, named = round(self.now_s * SECOND), (("backup", 7, others),)
        self._samples.append(HostSample(at_ns, seconds, 0.0, (1 + others) / 2, 0.5, others / 2, others=named))

    def load(self, start_ns, end_ns):
        return HostRecord(tuple(self._samples), cores=2).load(start_ns, end_ns)

    @property
    def now_ns(self) -> int:
        return round(self.now_s * SECOND)


def climbed(monkeypatch, others, error: str = "") -> tuple[Recorder, float]:
    """The recorder of a ladder beside ``others``, and the seconds that it took."""
    host, settings = Host(others), LoadSettings(MIXES["quick"], Load.ladder(RUNG_S, 1, SESSIONS))
    recorder = Recorder(settings, "127.0.0.1:1", None)
    monkeypatch.setattr(recorder, "first_error", lambda: error)
    test = SimpleNamespace(
        settings=settings, recording=recorder, monitoring=host, progress_age_s=0, progress=lambda: heard(host.now_s)
    )
    climb, users = Climb(test), None
    while climb.users:
        assert host.now_s < 1000
        if climb.users != users:  # Locust tells when all of them run, and only then
            users = climb.users
            climb.begin(host.now_ns)
        host.advance(climb.wait_s(host.now_ns) or 1.0)
        climb.tick(host.now_ns)
    return recorder, host.now_s - START_S


def heard(now_s: float) -> Progress:
    return Progress(samples=int(1 + now_s * 24000), audio_s_per_s=1.0)


def ladder_rungs(recorder: Recorder):
    return recorder.observed(1, None).rungs


def test_an_undisturbed_ladder_holds_each_rung_once(monkeypatch):
    recorder, seconds = climbed(monkeypatch, lambda at_s: 0.02)
    rungs = ladder_rungs(recorder)
    assert [rung.users for rung in rungs] == [1, 2, 3] and not any(rung.disturbed for rung in rungs)
    assert seconds == pytest.approx(3 * RUNG_S, abs=3)
    assert {round(rung.others_share, 3) for rung in rungs} == {0.01} and {rung.stolen_share for rung in rungs} == {0}


def test_a_burst_ends_a_rung_which_is_held_again_for_its_whole_window_once_it_is_over(monkeypatch):
    recorder, seconds = climbed(monkeypatch, lambda at_s: 1.0 if 12 <= at_s < 16 else 0.0)
    first, spoilt, again, third = ladder_rungs(recorder)
    assert [rung.users for rung in (first, spoilt, again, third)] == [1, 2, 2, 3]
    assert "backup, process 7" in spoilt.disturbed and not (first.disturbed or again.disturbed or third.disturbed)
    window_start_ns = again.start_ns + round(SETTLE_S * SECOND)
    assert (
        window_start_ns >= (START_S + 16) * SECOND
        and again.end_ns - window_start_ns >= (RUNG_S - SETTLE_S - 1) * SECOND
    )
    assert spoilt.end_ns <= window_start_ns and again.others_share == 0 < spoilt.others_share
    assert seconds < 3 * RUNG_S + REPEATS * RUNG_S


def test_a_burst_while_sessions_settle_costs_nothing(monkeypatch):
    recorder, _ = climbed(monkeypatch, lambda at_s: 1.0 if at_s <= 1 else 0.0)
    assert [rung.users for rung in ladder_rungs(recorder)] == [1, 2, 3]


def test_a_ladder_whose_others_are_never_quiet_ends_in_bounded_time_and_measures_nothing(monkeypatch):
    recorder, seconds = climbed(monkeypatch, lambda at_s: 1.0)
    rungs = ladder_rungs(recorder)
    assert [rung.users for rung in rungs] == [1, 2, 3] and all(rung.disturbed for rung in rungs)
    assert seconds <= 2 * 3 * RUNG_S + 3


def test_a_ladder_that_broke_is_not_held_again(monkeypatch):
    recorder, seconds = climbed(monkeypatch, lambda at_s: 1.0, error="slot 7 is gone")
    assert len(ladder_rungs(recorder)) == 1 and seconds < RUNG_S
    assert recorder.observed(1, None).ladder_ended == "a request failed: slot 7 is gone"


def test_the_time_for_repeats_is_bounded_for_each_rung_and_for_the_ladder():
    repeats = Repeats(RUNG_S, 2)
    assert repeats.has_time(RUNG_S) and repeats.has_time(REPEATS * RUNG_S)
    assert not repeats.has_time((REPEATS + 1) * RUNG_S)
    repeats.note(2 * RUNG_S)
    assert repeats.has_time(RUNG_S) and not repeats.has_time(2 * RUNG_S)
    repeats.note(RUNG_S)  # a rung that was held once takes nothing
    assert repeats.spent_s == RUNG_S
