"""How long a device is busy with a call, as against the wall time of the call: kernels and copies, joined.

On a CUDA device torch.profiler (CUPTI) says when each kernel and copy ran. Where it cannot, CUDA events around the call
say how long the device took from the first to the last of them, gaps included. A CPU is its own device.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd import DeviceType

CPU, PROFILER, EVENTS, WALL = "cpu", "profiler", "events", "wall"
_CALLS = 3  # of one point, measured one by one
_FAILURES = 3  # in a row, after which a way of measuring is not tried again
_COPIES = ("memcpy", "memset")

Call = Callable[[], object]


class DeviceActivity(NamedTuple):
    """A kernel or a copy on the device, microseconds of one clock."""

    name: str
    kernel: bool
    start_us: float
    end_us: float


@dataclass(frozen=True)
class BusyTime:
    """Milliseconds in which the device was busy, with so many kernels and copies (None: not counted)."""

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
    """Kernels, copies and fills among torch.profiler's events; annotations and waits that it draws there are left out.

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
    """What the activities of one call add up to. Raises RuntimeError where there are none."""
    if not found:
        raise RuntimeError("the profiler saw no kernel: CUPTI may be missing, or closed to this user")
    kernels = sum(activity.kernel for activity in found)
    busy = busy_us((activity.start_us, activity.end_us) for activity in found)
    return BusyTime(busy / 1e3, kernels, len(found) - kernels)


def recorded(call: Call) -> list[DeviceActivity]:
    """What the device does in a call, by torch.profiler."""
    from torch.profiler import ProfilerActivity, profile

    # With acc_events, torch does not warn at each profile that it would clear the events of an earlier cycle.
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
    """Splits the wall time of calls into the device's part and the host's; ``ways`` are tried in their order.

    Without any, as on a CPU, the device is the host: all of the time is the device's.
    """

    def __init__(self, ways: dict[str, Measure]):
        self._ways, self._failures = ways, dict.fromkeys(ways, 0)

    @classmethod
    def of(cls, device: torch.device) -> DeviceTimer:
        return cls(CUDA_WAYS if device.type == "cuda" else {})

    def split(self, calls: Iterator[Call], ms: float, seconds: float) -> dict:
        """``device_ms``, ``host_ms`` and where they come from, of calls whose wall time is ``ms``; raises nothing.

        At most so many ``seconds`` are spent after the first call, and none where there are none left.
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
        return _parts(ms, BusyTime(ms), WALL, *(why or ["no way of measuring works here"]))


def _median(measure: Measure, calls: Iterator[Call], seconds: float) -> BusyTime:
    """The middle one of a few calls, by its busy time."""
    until, found = time.monotonic() + seconds, []
    while len(found) < _CALLS and not (found and time.monotonic() > until):
        call = next(calls, None)  # taken outside of what is measured: it may have to open sessions first
        if call is None:
            break
        found.append(measure(call))
    if any(busy.ms <= 0 for busy in found):
        raise RuntimeError("it shows a device that does nothing")
    if not found:
        raise RuntimeError("no call is left to measure")
    return sorted(found, key=lambda busy: busy.ms)[len(found) // 2]


def _parts(ms: float, busy: BusyTime, source: str, *why: str) -> dict:
    device_ms = min(busy.ms, ms)  # profiled calls may run longer than those that were timed
    parts = {"device_ms": device_ms, "host_ms": ms - device_ms, "device_ms_from": source}
    counts = {"launches": busy.launches, "copies": busy.copies}
    parts |= {name: count for name, count in counts.items() if count is not None}
    return parts | ({"device_ms_note": "; ".join(why)} if why else {})


def _words(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
