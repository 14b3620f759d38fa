"""Separates the time in which a device is busy with a call from the call's wall time.

On a CUDA device torch.profiler (CUPTI) reports when each kernel and copy ran. Where it cannot, CUDA events around the
call measure the time from the first to the last of them, gaps included. A CPU is its own device.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd import DeviceType

from harness.device_profile import CPU, EVENTS, PROFILER, WALL

_CALLS = 3  # per point, measured one by one
_FAILURES = 3  # in a row, after which a method is not tried again
_COPIES = ("memcpy", "memset")

Call = Callable[[], object]


class DeviceActivity(NamedTuple):
    """A kernel or a copy on the device, in microseconds of one clock."""

    name: str
    kernel: bool
    start_us: float
    end_us: float


@dataclass(frozen=True)
class BusyTime:
    """Milliseconds in which the device was busy, and the number of kernels and copies (None: not counted)."""

    ms: float
    launches: int | None = None
    copies: int | None = None


Measure = Callable[[Call], BusyTime]


def busy_us(intervals: Iterable[tuple[float, float]]) -> float:
    """Microseconds that lie in at least one of the (start, end) intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def activities(events: Iterable) -> list[DeviceActivity]:
    """Kernels, copies and fills among torch.profiler's events, without its annotations and waits.

    An event has ``name``, ``device_type``, ``time_range``, ``is_user_annotation`` and, in newer versions of torch,
    ``activity_type``.
    """
    found = []
    for event in events:
        if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        kind = (getattr(event, "activity_type", "") or event.name).lower()
        copy = any(word in kind for word in _COPIES)
        if copy or "kernel" in kind or not getattr(event, "activity_type", ""):
            found.append(DeviceActivity(event.name, not copy, event.time_range.start, event.time_range.end))
    return found


def busy_of(found: Sequence[DeviceActivity]) -> BusyTime:
    """The busy time of one call's activities. Raises RuntimeError where there are none."""
    if not found:
        raise RuntimeError("the profiler saw no kernel: CUPTI may be missing, or not permitted for this user")
    kernels = sum(activity.kernel for activity in found)
    busy = busy_us((activity.start_us, activity.end_us) for activity in found)
    return BusyTime(busy / 1e3, kernels, len(found) - kernels)


def recorded(call: Call) -> list[DeviceActivity]:
    """The device's activities in a call, from torch.profiler."""
    from torch.profiler import ProfilerActivity, profile

    # without acc_events, torch warns at each profile that it clears earlier events
    quiet = {"acc_events": True} if "acc_events" in inspect.signature(profile).parameters else {}
    with profile(activities=[ProfilerActivity.CUDA], **quiet) as profiler:
        call()
        torch.cuda.synchronize()
    return activities(profiler.events())


def profiled(call: Call) -> BusyTime:
    """Measure a call by torch.profiler."""
    return busy_of(recorded(call))


def between_events(call: Call) -> BusyTime:
    """Measure a call by CUDA events around it: gaps between its kernels count as busy."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begun.record()
    call()
    ended.record()
    torch.cuda.synchronize()
    return BusyTime(begun.elapsed_time(ended))


CUDA_WAYS = {PROFILER: profiled, EVENTS: between_events}


class DeviceTimer:
    """Splits the wall time of calls into device time and host time; ``ways`` are methods, tried in order.

    Without any, as on a CPU, the device is the host: all of the time is device time.
    """

    def __init__(self, ways: dict[str, Measure]):
        self._ways, self._failures = ways, dict.fromkeys(ways, 0)

    @classmethod
    def of(cls, device: torch.device) -> DeviceTimer:
        return cls(CUDA_WAYS if device.type == "cuda" else {})

    def split(self, calls: Iterator[Call], ms: float, seconds: float) -> dict:
        """``device_ms``, ``host_ms`` and their source, for calls whose wall time is ``ms``; raises nothing.

        At most ``seconds`` are spent after the first call, and none if there are none left.
        """
        if not self._ways:
            return _parts(ms, BusyTime(ms), CPU)
        if seconds <= 0:
            return _parts(ms, BusyTime(ms), WALL, "no time was left")
        why = []
        for way, measure in self._ways.items():
            if self._failures[way] < _FAILURES:
                try:
                    found = _parts(ms, _median(measure, calls, seconds), way, *why)
                    self._failures[way] = 0
                    return found
                except Exception as error:  # of the profiler, of CUPTI, of a call under them: the point has its ms
                    self._failures[way] += 1
                    why.append(f"{way}: {_words(error)}")
        return _parts(ms, BusyTime(ms), WALL, *(why or ["no method of measurement works here"]))


def _median(measure: Measure, calls: Iterator[Call], seconds: float) -> BusyTime:
    """The median of a few calls, by busy time."""
    until, found = time.monotonic() + seconds, []
    while len(found) < _CALLS and not (found and time.monotonic() > until):
        call = next(calls, None)  # outside of the measurement: it may have to open sessions first
        if call is None:
            break
        found.append(measure(call))
    if any(busy.ms <= 0 for busy in found):
        raise RuntimeError("it reported an idle device")
    if not found:
        raise RuntimeError("no call is left to measure")
    return sorted(found, key=lambda busy: busy.ms)[len(found) // 2]


def _parts(ms: float, busy: BusyTime, source: str, *why: str) -> dict:
    device_ms = min(busy.ms, ms)  # profiled calls may take longer than timed ones
    parts = {"device_ms": device_ms, "host_ms": ms - device_ms, "device_ms_from": source}
    counts = {"launches": busy.launches, "copies": busy.copies}
    parts |= {name: count for name, count in counts.items() if count is not None}
    return parts | ({"device_ms_note": "; ".join(why)} if why else {})


def _words(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
