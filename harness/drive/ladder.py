"""The concurrency ladder as a Locust load shape: it holds rising numbers of users in turn."""

from __future__ import annotations

import time

import gevent
from locust import LoadTestShape

from harness.drive.runners import SpeechTest
from harness.drive.stop_rule import Held, Patience, Readings


class Ladder(LoadTestShape):
    """Holds each number of users in turn, counted from when all of them run, for as long as ``Patience`` says."""

    abstract = True  # so that Locust does not take it for a load shape of the locustfile

    def __init__(self, test: SpeechTest):
        self._test = test
        self.reset_time()

    def reset_time(self) -> None:
        super().reset_time()
        self._index, self._began_ns = 0, 0
        self._readings = Readings()
        self._held: list[Held] = []
        self._ended = False

    def begin(self) -> None:
        """Start the rung's clock: all users of the rung run."""
        self._began_ns = self._began_ns or time.monotonic_ns()

    def tick(self) -> tuple[int, float] | None:
        """The number of users that should run now; Locust calls this once a second."""
        rungs, patience = self._test.settings.load.sessions, self._test.settings.patience
        if self._began_ns:
            self._read_progress(patience)
            left_s = patience.rung_s - self._seconds()
            if left_s < 1 or self._failure() or patience.has_enough(self._readings.rates):
                gevent.sleep(max(left_s, 0) if left_s < 1 else 0)
                self._end_rung(rungs[self._index], patience)
        if self._index == len(rungs) or self._ended:
            return None
        return rungs[self._index], float(rungs[-1])

    def _seconds(self) -> float:
        return (time.monotonic_ns() - self._began_ns) / 1e9

    def _read_progress(self, patience: Patience) -> None:
        seen, settled = self._test.progress(), self._seconds() > patience.settle_s + self._test.progress_age_s
        self._readings.note(seen.samples, seen.audio_s_per_s, settled)

    def _failure(self) -> str:
        error = self._test.recorder.first_error() if self._test.settings.load.until_saturated else ""
        return f"a request failed: {error}" if error else ""

    def _end_rung(self, users: int, patience: Patience) -> None:
        self._test.recorder.add_rung(users, self._began_ns, time.monotonic_ns())
        if rates := self._readings.rates:  # a rung with no readings is left out
            self._held.append(Held(users, sum(rates) / len(rates)))
        if why := self._failure() or patience.over_saturated(self._held):
            self._test.recorder.end_ladder(why)
            self._ended = True
        self._index, self._began_ns, self._readings = self._index + 1, 0, Readings()
