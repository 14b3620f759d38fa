"""The concurrency ladder as a Locust load shape: it holds rising numbers of users in turn."""

from __future__ import annotations

import gevent
from locust import LoadTestShape

from harness.drive.climb import Climb
from harness.drive.runners import SpeechTest


class Ladder(LoadTestShape):
    """Tells Locust once a second how many users should run: those of the rung that ``Climb`` holds."""

    abstract = True  # so that Locust does not take it for a load shape of the locustfile

    def __init__(self, test: SpeechTest):
        self._test = test
        self._climb: Climb | None = None
        super().__init__()

    def reset_time(self) -> None:
        super().reset_time()
        self._climb = None

    def begin(self) -> None:
        """Start the rung's clock: all users of the rung run."""
        if self._climb:
            self._climb.begin(self._test.clock.now_ns())

    def tick(self) -> tuple[int, float] | None:
        """The number of users that should run now; Locust calls this once a second."""
        climb = self._climb = self._climb or Climb(self._test)
        clock = self._test.clock
        gevent.sleep(clock.host_span(climb.wait_s(clock.now_ns())))
        climb.tick(clock.now_ns())
        return None if climb.users is None else (climb.users, float(self._test.settings.load.sessions[-1]))
