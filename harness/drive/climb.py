"""The course of a ladder: which rung is held, when it ends, and whether it is measured again. It has no clock."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from harness.drive.runners import SpeechTest
from harness.drive.stop_rule import Held, Readings, Repeats
from harness.records.load_test import HeldRung

QUIET_S = 1.0  # without a disturbance, after which a disturbed rung begins again
TICK_S = 1.0  # between two ticks

log = logging.getLogger(__name__)


@dataclass
class _Rung:
    """The rung in progress. ``all_ran_ns``: when all its users ran; ``began_ns``: its present attempt; 0: not yet.

    ``spoilt``: the last attempt, while the rung waits for others to be quiet.
    """

    users: int
    all_ran_ns: int = 0
    began_ns: int = 0
    spoilt: HeldRung | None = None


class Climb:
    """Holds each number of users in turn, counted from when all of them run, for as long as ``Patience`` says.

    A rung during which others took CPU is held again once they are quiet, for as long as ``Repeats`` says.
    """

    def __init__(self, test: SpeechTest):
        load = test.settings.load
        self._test, self._patience = test, test.settings.patience
        self._left = list(load.sessions)
        self._rung: _Rung | None = _Rung(self._left.pop(0))
        self._readings = Readings()
        self._held: list[Held] = []
        self._repeats = Repeats(load.rung_s, len(load.sessions))

    @property
    def users(self) -> int | None:
        """The number of users that should run now; None when the ladder has ended."""
        return self._rung.users if self._rung else None

    def begin(self, now_ns: int) -> None:
        """Start the rung's clock: all users of the rung run."""
        if self._rung and not self._rung.began_ns:
            self._rung.all_ran_ns = self._rung.began_ns = now_ns

    def wait_s(self, now_ns: int) -> float:
        """Seconds until the rung ends, where that is before the next tick; else 0."""
        rung = self._rung
        if not rung or not rung.began_ns or rung.spoilt:
            return 0.0
        left_s = self._patience.rung_s - _s(now_ns - rung.began_ns)
        return max(left_s, 0.0) if left_s < TICK_S else 0.0

    def tick(self, now_ns: int) -> None:
        """Read how the rung goes, and end it or go on."""
        if not self._rung or not self._rung.began_ns:
            return
        self._read_progress(self._rung, now_ns)
        if self._rung.spoilt:
            self._begin_again_or_go_on(self._rung, self._rung.spoilt, now_ns)
        elif self._is_over(self._rung, now_ns):
            self._end(self._rung, now_ns)

    def _read_progress(self, rung: _Rung, now_ns: int) -> None:
        settled = _s(now_ns - rung.began_ns) > self._patience.settle_s + self._test.progress_age_s
        seen = self._test.progress()
        self._readings.note(seen.samples, seen.audio_s_per_s, settled)

    def _is_over(self, rung: _Rung, now_ns: int) -> bool:
        if _s(now_ns - rung.began_ns) >= self._patience.rung_s or self._failure():
            return True
        return self._patience.has_enough(self._readings.rates) or self._is_spoilt(rung, now_ns)

    def _is_spoilt(self, rung: _Rung, now_ns: int) -> bool:
        """Whether others have taken more already than they may in the whole rung."""
        window_s = _s(now_ns - self._window_ns(rung))
        load = self._test.monitoring.load(self._window_ns(rung), now_ns) if window_s > 0 else None
        limit = self._test.settings.max_others * (self._patience.rung_s - self._patience.settle_s)
        return load is not None and load.felt_share * window_s > limit

    def _window_ns(self, rung: _Rung) -> int:
        return rung.began_ns + _ns(self._patience.settle_s)

    def _failure(self) -> str:
        error = self._test.recording.first_error() if self._test.settings.load.until_saturated else ""
        return f"a request failed: {error}" if error else ""

    def _end(self, rung: _Rung, now_ns: int) -> None:
        load = self._test.monitoring.load(self._window_ns(rung), now_ns)
        held = HeldRung(users=rung.users, start_ns=rung.began_ns, end_ns=now_ns)
        if load:
            disturbed = load.disturbed(self._test.settings.max_others)
            held = replace(held, others_share=load.others_share, stolen_share=load.stolen_share, disturbed=disturbed)
        if held.disturbed and not self._failure():
            log.warning("the rung of %d sessions is to be measured again: %s", rung.users, held.disturbed)
            rung.spoilt = held
            return
        self._test.recording.add_rung(held)
        if rates := self._readings.rates:  # a rung with no readings is left out
            self._held.append(Held(rung.users, sum(rates) / len(rates)))
        self._go_on(rung, now_ns, self._failure() or self._patience.over_saturated(self._held))

    def _begin_again_or_go_on(self, rung: _Rung, spoilt: HeldRung, now_ns: int) -> None:
        """Begin the rung again if others are quiet: its sessions have settled. Leave it out if there is no time."""
        quiet_ns = now_ns - _ns(QUIET_S)
        load = self._test.monitoring.load(quiet_ns, now_ns)
        why, has_time = self._failure(), self._repeats.has_time(_s(now_ns - rung.all_ran_ns))
        if has_time and not why and load and load.disturbed(self._test.settings.max_others):
            return
        self._test.recording.add_rung(replace(spoilt, end_ns=max(quiet_ns, spoilt.end_ns)))
        if why or not has_time:
            log.warning("the rung of %d sessions is left out: %s", rung.users, why or "others are not quiet for long")
            self._go_on(rung, now_ns, why)
        else:
            rung.began_ns, rung.spoilt = now_ns - _ns(self._patience.settle_s), None
            self._readings = Readings()

    def _go_on(self, rung: _Rung, now_ns: int, why_ended: str = "") -> None:
        """Go on to the next rung, or end the ladder."""
        self._repeats.note(_s(now_ns - rung.all_ran_ns))
        if why_ended:
            self._test.recording.end_ladder(why_ended)
        self._rung = _Rung(self._left.pop(0)) if self._left and not why_ended else None
        self._readings = Readings()


def _s(ns: int) -> float:
    return ns / 1e9


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
