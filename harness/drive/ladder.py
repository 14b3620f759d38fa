"""The concurrency ladder as a Locust load shape: it holds rising numbers of users in turn."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import gevent
from locust import LoadTestShape

from harness.drive.runners import SpeechTest
from harness.drive.stop_rule import Held, Patience, Readings, Repeats
from harness.records.load_test import HeldRung

QUIET_S = 1.0  # without a disturbance, after which a disturbed rung begins again

log = logging.getLogger(__name__)


class Ladder(LoadTestShape):
    """Holds each number of users in turn, counted from when all of them run, for as long as ``Patience`` says.

    A rung during which others took CPU is held again once they are quiet, for as long as ``Repeats`` says.
    """

    abstract = True  # so that Locust does not take it for a load shape of the locustfile

    def __init__(self, test: SpeechTest):
        self._test = test
        self.reset_time()

    def reset_time(self) -> None:
        super().reset_time()
        self._index, self._held, self._ended = 0, list[Held](), False
        self._repeats = Repeats(self._test.settings.load.rung_s, len(self._test.settings.load.sessions))
        self._reset_rung()

    def _reset_rung(self) -> None:
        self._all_ran_ns = self._began_ns = 0
        self._readings = Readings()
        self._spoilt: HeldRung | None = None  # waiting for others to be quiet

    def begin(self) -> None:
        """Start the rung's clock: all users of the rung run."""
        self._began_ns = self._began_ns or time.monotonic_ns()
        self._all_ran_ns = self._all_ran_ns or self._began_ns

    def tick(self) -> tuple[int, float] | None:
        """The number of users that should run now; Locust calls this once a second."""
        rungs, patience = self._test.settings.load.sessions, self._test.settings.patience
        if self._began_ns:
            self._read_progress(patience)
            if self._spoilt:
                self._begin_again_or_go_on(self._spoilt, patience)
            else:
                self._hold(rungs[self._index], patience)
        if self._index == len(rungs) or self._ended:
            return None
        return rungs[self._index], float(rungs[-1])

    def _hold(self, users: int, patience: Patience) -> None:
        left_s = patience.rung_s - _since_s(self._began_ns)
        if left_s < 1 or self._failure() or patience.has_enough(self._readings.rates):
            gevent.sleep(max(left_s, 0) if left_s < 1 else 0)
            self._end_rung(users, patience)
        elif self._is_spoilt(patience):
            self._end_rung(users, patience)

    def _read_progress(self, patience: Patience) -> None:
        settled = _since_s(self._began_ns) > patience.settle_s + self._test.progress_age_s
        seen = self._test.progress()
        self._readings.note(seen.samples, seen.audio_s_per_s, settled)

    def _failure(self) -> str:
        error = self._test.recorder.first_error() if self._test.settings.load.until_saturated else ""
        return f"broken: a request failed: {error}" if error else ""

    def _is_spoilt(self, patience: Patience) -> bool:
        """Whether others have taken more already than they may in the whole rung."""
        window_s = _since_s(self._began_ns) - patience.settle_s
        load = self._test.host_monitor.load(self._window_ns(patience), time.monotonic_ns()) if window_s > 0 else None
        limit = self._test.settings.max_others * (patience.rung_s - patience.settle_s)
        return load is not None and load.felt_share * window_s > limit

    def _window_ns(self, patience: Patience) -> int:
        return self._began_ns + round(patience.settle_s * 1e9)

    def _end_rung(self, users: int, patience: Patience) -> None:
        end_ns = time.monotonic_ns()
        load = self._test.host_monitor.load(self._window_ns(patience), end_ns)
        disturbed = load.disturbed(self._test.settings.max_others) if load else ""
        shares = {"others_share": load.others_share, "stolen_share": load.stolen_share} if load else {}
        rung = HeldRung(users=users, start_ns=self._began_ns, end_ns=end_ns, disturbed=disturbed, **shares)
        if disturbed and not self._failure():
            log.warning("%s: rung %d is to be measured again", disturbed, self._index + 1)
            self._spoilt = rung
            return
        self._test.recorder.add_rung(rung)
        if rates := self._readings.rates:  # a rung with no readings is left out
            self._held.append(Held(users, sum(rates) / len(rates)))
        self._go_on(self._failure() or patience.over_saturated(self._held))

    def _begin_again_or_go_on(self, spoilt: HeldRung, patience: Patience) -> None:
        """Begin the rung again if others are quiet: its sessions have settled. Leave it out if there is no time."""
        now_ns = time.monotonic_ns()
        quiet_ns = now_ns - round(QUIET_S * 1e9)
        load = self._test.host_monitor.load(quiet_ns, now_ns)
        why, has_time = self._failure(), self._repeats.has_time(_since_s(self._all_ran_ns))
        if has_time and not why and load and load.disturbed(self._test.settings.max_others):
            return
        self._test.recorder.add_rung(replace(spoilt, end_ns=max(quiet_ns, spoilt.end_ns)))
        if why or not has_time:
            log.warning("rung %d is left out: %s", self._index + 1, why or "others are not quiet for long enough")
            self._go_on(why)
        else:
            self._began_ns = now_ns - round(patience.settle_s * 1e9)
            self._readings, self._spoilt = Readings(), None

    def _go_on(self, why_ended: str = "") -> None:
        """Go on to the next rung, or end the ladder."""
        self._repeats.note(_since_s(self._all_ran_ns))
        if why_ended:
            self._test.recorder.end_ladder(why_ended)
            self._ended = True
        self._index += 1
        self._reset_rung()


def _since_s(then_ns: int) -> float:
    return (time.monotonic_ns() - then_ns) / 1e9
