"""What a sign-off or a sweep says while it works."""

from __future__ import annotations

import threading
import time


class Watcher:
    """Hears of every step: override what you show."""

    def begin(self, total_s: float) -> None: ...

    def step(self, what: str, estimated_s: float) -> None: ...

    def done(self, note: str = "") -> None: ...

    def finish(self, what: str, estimated_s: float, took_s: float, note: str) -> None:
        """A step that ran beside others has ended: its beginning was announced by ``say``."""

    def say(self, note: str) -> None: ...


class Lane(Watcher):
    """The steps of one of several hosts, as whole lines, so that those of other hosts can stand between them."""

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
