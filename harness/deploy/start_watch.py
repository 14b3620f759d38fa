"""Whether a server that starts has come to rest without being ready.

Triton (2.51) gives up a process of a stage that shows no sign of life for a second while it starts, as on a crowded
host (``ReceiveMessageFromStub``), and then waits for its end without telling it to end: for ever.
"""

from __future__ import annotations

import contextlib
import time

import psutil

_LOOK_S = 5.0
_BUSY = (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
_LEAST_SHARE = 0.02  # of a CPU: threads that wait for events use less, all together


class StartWatch:
    """Looks at a process and those below it; ``patience_s``: for which they must be at rest."""

    def __init__(self, pid: int, patience_s: float = 45.0):
        self._pid, self._patience_s = pid, patience_s
        self._look_s = min(_LOOK_S, patience_s / 5)
        self._next_s = self._since_s = time.monotonic()
        self._used_s = 0.0

    def is_at_rest(self) -> bool:
        """Whether they have used next to no CPU time for so long, and none was about to run or waited for a disk."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return False
        self._next_s = now_s + self._look_s
        used_s, is_busy = self._used()
        if is_busy or abs(used_s - self._used_s) > _LEAST_SHARE * self._patience_s:
            self._since_s, self._used_s = now_s, used_s
        return now_s - self._since_s >= self._patience_s

    def _used(self) -> tuple[float, bool]:
        """CPU seconds of all processes, and whether one of them is busy."""
        used_s, is_busy = 0.0, False
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(self._pid)
            for one in (first, *first.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    used_s += sum(one.cpu_times()[:2])
                    is_busy |= one.status() in _BUSY
        return used_s, is_busy
