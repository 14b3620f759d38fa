"""Live figures of the streams in progress, which the load test's page shows before any request has ended.

These figures are for watching. Verdicts come from the records (``metrics``), which hold every chunk.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from harness import wire
from harness.records.schema import Request, Result

PROGRESS_EVERY_S = 1.0  # between two samples of a reader
STALL_NS = 50_000_000  # shorter pauses are not counted here


class Running(NamedTuple):
    """A stream in progress that has received audio. ``rtf`` is NaN until its second chunk.

    A tuple, not a dataclass: collecting a thousand of them must not delay the timestamps of chunks.
    """

    traffic_class: str
    ttfa_s: float
    rtf: float
    stalls: int
    audio_s: float
    request_id: str


@dataclass(frozen=True, slots=True)
class Progress:
    """The streams in progress at one moment. ``samples`` and ``stalls`` count from the start of the test."""

    active: int = 0
    waiting: int = 0  # submitted ahead, not yet due
    samples: int = 0
    stalls: int = 0
    audio_s_per_s: float = 0.0
    running: tuple[Running, ...] = ()

    def __add__(self, other: Progress) -> Progress:
        return Progress(
            active=self.active + other.active,
            waiting=self.waiting + other.waiting,
            samples=self.samples + other.samples,
            stalls=self.stalls + other.stalls,
            audio_s_per_s=self.audio_s_per_s + other.audio_s_per_s,
            running=self.running + other.running,
        )

    def to_plain(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Progress:
        given: dict[str, Any] = {**plain, "running": tuple(Running(*each) for each in plain["running"])}
        return cls(**given)


class _Playback:
    """One stream as a listener hears it who starts playback at its first chunk."""

    __slots__ = ("request", "first_ns", "last_ns", "first_samples", "samples", "plays_until_ns", "stalls")

    def __init__(self, request: Request, now_ns: int, samples: int):
        self.request = request
        self.first_ns = self.plays_until_ns = now_ns
        self.first_samples, self.samples, self.stalls = samples, 0, 0
        self.hear(now_ns, samples)

    def hear(self, now_ns: int, samples: int) -> bool:
        """Add a chunk of audio. Return whether playback had stalled before it."""
        stalled = now_ns - self.plays_until_ns > STALL_NS
        self.stalls += stalled
        self.last_ns = now_ns
        self.samples += samples
        self.plays_until_ns = max(self.plays_until_ns, now_ns) + round(samples * 1e9 / wire.SAMPLE_RATE_HZ)
        return stalled

    def running(self) -> Running:
        later_s = (self.samples - self.first_samples) / wire.SAMPLE_RATE_HZ
        return Running(
            traffic_class=self.request.traffic_class,
            ttfa_s=(self.first_ns - self.request.due_ns) / 1e9,
            rtf=(self.last_ns - self.first_ns) / 1e9 / later_s if later_s else math.nan,
            stalls=self.stalls,
            audio_s=self.samples / wire.SAMPLE_RATE_HZ,
            request_id=self.request.request_id,
        )


class LiveStats:
    """Counts chunks as they arrive, in constant time each."""

    def __init__(self, now_ns: int):
        self._playbacks: dict[Hashable, _Playback] = {}
        self._samples = self._stalls = 0
        self._samples_before, self._before_ns = 0, now_ns

    def chunk(self, stream: Hashable, request: Request, now_ns: int, samples: int) -> None:
        self._samples += samples
        playback = self._playbacks.get(stream)
        if playback is None:
            self._playbacks[stream] = _Playback(request, now_ns, samples)
        else:
            self._stalls += playback.hear(now_ns, samples)

    def forget(self, stream: Hashable) -> None:
        """Drop a stream that has ended; its Result holds its figures."""
        self._playbacks.pop(stream, None)

    def progress(self, active: int, waiting: int, now_ns: int) -> Progress:
        """The streams that run now; ``audio_s_per_s`` is the mean since the previous call."""
        audio_s = (self._samples - self._samples_before) / wire.SAMPLE_RATE_HZ
        seconds = (now_ns - self._before_ns) / 1e9
        self._samples_before, self._before_ns = self._samples, now_ns
        running = tuple(playback.running() for playback in self._playbacks.values())
        rate = audio_s / seconds if seconds > 0 else 0.0
        return Progress(active, waiting, self._samples, self._stalls, rate, running)


class ChartPoint(NamedTuple):
    """The charts' figures at ``at_s`` after the start; None where there is no figure.

    Quantiles and stalls cover the last ``History.window_s``: TTFA of requests whose first audio came in it; RTF of
    streams that run or that ended in it.
    """

    at_s: float
    active: int
    audio_s_per_s: float
    ttfa_p50_s: float | None
    ttfa_p95_s: float | None
    rtf_p50: float | None
    rtf_p95: float | None
    stalls: int


class History:
    """At most ``most`` points of one test; beyond that every second point is dropped."""

    def __init__(self, window_s: float = 10.0, most: int = 600):
        self.window_s, self._most = window_s, most
        self.points: list[ChartPoint] = []
        self._every = 1  # one of this many calls of ``add`` becomes a point
        self._added = self._folded = 0
        self._heard: set[str] = set()
        self._ended: set[str] = set()
        self._ttfa_s: deque[tuple[float, float]] = deque()
        self._rtf: deque[tuple[float, float]] = deque()
        self._stalls: deque[tuple[float, int]] = deque([(0.0, 0)])

    def add(self, at_s: float, progress: Progress, results: Sequence[Result]) -> None:
        """Add the progress at ``at_s`` after the start; ``results`` are all Results so far."""
        for result in results[self._folded :]:
            self._fold(at_s, result)
        self._folded = len(results)
        running = [each for each in progress.running if each.request_id not in self._ended]
        for each in running:
            self._hear(at_s, each.request_id, each.ttfa_s)
        self._stalls.append((at_s, progress.stalls))
        for kept in (self._ttfa_s, self._rtf, self._stalls):
            while len(kept) > 1 and kept[0][0] < at_s - self.window_s:
                kept.popleft()
        rtf = [each.rtf for each in running if not math.isnan(each.rtf)]
        self._add(self._point(at_s, progress, rtf))

    def _fold(self, at_s: float, result: Result) -> None:
        self._ended.add(result.request_id)
        times, samples = result.chunks.received_ns, result.chunks.samples
        if len(times):
            self._hear(at_s, result.request_id, (int(times[0]) - result.due_ns) / 1e9)
        if later := int(samples[1:].sum()):
            self._rtf.append((at_s, int(times[-1] - times[0]) / 1e9 / (later / wire.SAMPLE_RATE_HZ)))

    def _hear(self, at_s: float, request_id: str, ttfa_s: float) -> None:
        if request_id not in self._heard:
            self._heard.add(request_id)
            self._ttfa_s.append((at_s, ttfa_s))

    def _point(self, at_s: float, progress: Progress, running_rtf: list[float]) -> ChartPoint:
        since_s = at_s - self.window_s
        ttfa_s = [value for when_s, value in self._ttfa_s if when_s >= since_s]
        rtf = [value for when_s, value in self._rtf if when_s >= since_s] + running_rtf
        stalls = max(progress.stalls - self._stalls[0][1], 0)
        quantiles = [_quantile(values, share) for values in (ttfa_s, rtf) for share in (0.5, 0.95)]
        return ChartPoint(round(at_s, 2), progress.active, round(progress.audio_s_per_s, 2), *quantiles, stalls)

    def _add(self, point: ChartPoint) -> None:
        if self._added % self._every == 0:
            self.points.append(point)
        self._added += 1
        if len(self.points) > self._most:
            self.points = self.points[::2]
            self._every *= 2


def _quantile(values: Sequence[float], share: float) -> float | None:
    return round(float(np.quantile(values, share)), 4) if values else None


class Lag:
    """How late the process that timestamps chunks runs: its timers against the times they were due.

    A chunk stamped long after the server sent it was either delayed on the way or stamped late; this tells which.
    """

    def __init__(self):
        self._late_ns = array("q")

    def note(self, due_ns: int, now_ns: int) -> None:
        self._late_ns.append(now_ns - due_ns)

    def p99_s(self) -> float:
        """The 99th percentile, in seconds; NaN before the first timer."""
        return float(np.quantile(self._late_ns, 0.99)) / 1e9 if self._late_ns else math.nan
