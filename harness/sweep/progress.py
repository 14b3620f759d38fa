"""Progress messages of a sign-off or a sweep."""

from __future__ import annotations

import threading
import time


class Watcher:
    """Receives every step. Override the methods for what you want to show."""

    def begin(self, total_s: float) -> None: ...

    def step(self, what: str, estimated_s: float) -> None: ...

    def done(self, note: str = "") -> None: ...

    def finish(self, what: str, estimated_s: float, took_s: float, note: str) -> None:
        """A step that ran concurrently with others has ended; ``say`` announced its start."""

    def say(self, note: str) -> None: ...


class Lane(Watcher):
    """The steps of one of several hosts, as whole lines, so that lines of other hosts can come between them."""

    def __init__(self, watcher: Watcher, host: str, lock: threading.RLock):
        self._watcher, self._host, self._lock = watcher, host, lock

    def step(self, what: str, estimated_s: float) -> None:
        self._what, self._estimated_s, self._began_s = f"{what} on {self._host}", estimated_s, time.monotonic()
        self.say(f"{self._what} …")

    def done(self, note: str = "") -> None:
        with self._lock:
            self._watcher.finish(self._what, self._estimated_s, time.monotonic() - self._began_s, note)

    def say(self, note: str) -> None:
        with self._lock:
            self._watcher.say(note)
