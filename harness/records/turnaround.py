"""SLOs on the turnaround of tasks: the time from submission to the end, in seconds or in lengths of the audio."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.errors import PlanError

_KEY = re.compile(r"turnaround_p(\d{1,2}(?:\.\d+)?)")
_TIMES = re.compile(r"(\d+(?:\.\d+)?)x")


@dataclass
class SubmittedTask:
    """A task that was submitted at ``began_s`` for about ``audio_s`` seconds of audio.

    ``turnaround_s``: None while it goes on, infinite where it ended without audio.
    """

    began_s: float
    audio_s: float
    turnaround_s: float | None = None


@dataclass(frozen=True)
class TurnaroundSlo:
    """``quantile`` of the turnaround is at most ``limit``: seconds, or ``per_audio`` times the length of the audio."""

    quantile: float
    limit: float
    per_audio: bool

    @classmethod
    def parse(cls, key: str, limit: Any) -> TurnaroundSlo:
        """Parse ``turnaround_p95`` with a limit such as ``2x`` or 14400 (seconds). Raises PlanError."""
        found = _KEY.fullmatch(key)
        if found is None or not 0 < float(found[1]) < 100:
            raise PlanError(f"{key!r} is not an SLO of tasks; write turnaround_p95 (p1 to p99.9)")
        times = _TIMES.fullmatch(limit.strip()) if isinstance(limit, str) else None
        value = float(times[1]) if times else limit
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise PlanError(f"the limit of {key} is {limit!r}; write 2x (of the audio's length), or seconds")
        return cls(float(found[1]) / 100, float(value), times is not None)

    def measured(self, turnaround_s: np.ndarray, audio_s: np.ndarray) -> np.ndarray:
        """What is compared with the limit, for each task [n]."""
        return turnaround_s / audio_s if self.per_audio else turnaround_s

    def deadline_s(self, audio_s: np.ndarray) -> np.ndarray:
        """Seconds after submission by which a task of this length is to have ended."""
        return self.limit * audio_s if self.per_audio else np.full(np.shape(audio_s), self.limit)

    def value(self, turnaround_s: np.ndarray, audio_s: np.ndarray) -> float:
        """The quantile of tasks [n], infinite where it falls among those that did not end; NaN without tasks."""
        values = np.sort(self.measured(turnaround_s, audio_s))
        return float(values[max(math.ceil(self.quantile * len(values) - 1e-9), 1) - 1]) if len(values) else math.nan

    def of(self, tasks: Sequence[SubmittedTask], now_s: float) -> float:
        """The quantile of the tasks whose end is known, or whose deadline has passed before it; NaN without any."""
        counted = [
            (math.inf if task.turnaround_s is None else task.turnaround_s, task.audio_s)
            for task in tasks
            if task.turnaround_s is not None or now_s - task.began_s > self.deadline_s(np.array(task.audio_s))
        ]
        turnaround_s, audio_s = np.array(counted, dtype=float).reshape(-1, 2).T
        return self.value(turnaround_s, audio_s)

    def shown(self, value: float) -> str:
        return f"{value:.3g}x" if self.per_audio else f"{value:.4g} s"

    def __str__(self) -> str:
        return f"turnaround p{self.quantile * 100:g} <= {self.shown(self.limit)}"
