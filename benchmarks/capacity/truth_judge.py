"""The judge of ``truths.py``: a discrete-event simulation of its own, and the counts that meet the SLOs in it.

It shares no code with the simulator that plans. All sessions of a device advance by one frame per step; a step takes
``step_s[n] + context_s x (frames spoken by all n sessions)``. Arrivals are Poisson, each goes to a device by
``routing`` (least loaded: ties at random). Every run starts empty. The time of a step is followed continuously: between
two events a device makes steps whose time grows by context_s x n with each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numba_first  # noqa: F401

# isort: split
import numba
import numpy as np

LEAST_LOADED, ROUND_ROBIN, RANDOM = "least_loaded", "round_robin", "random"
ROUTINGS = LEAST_LOADED, ROUND_ROBIN, RANDOM
FRAME_S = 3200 / 24_000
ROOM = 400  # sessions on one device, above which it has collapsed
MOST_DEVICES = 400
_BISECTIONS = 11
_WARM_UP, _COUNTED, _TAIL = 4.0, 10.0, 2.0  # least lengths of the parts of a run, in longest sessions


@dataclass(frozen=True)
class Service:
    """A device and its traffic. ``step``: seconds of a step at n sessions [n]; ``context_s``: more per frame spoken.

    ``shares`` [c] of the classes, ``lengths`` [c][k] their equally likely frames. ``limits`` [c]: of RTF at p95; no
    limit: infinite. ``ratios`` [c]: RTF of a class / that of the frame clock. ``jitter``: relative standard deviation
    of single steps. ``first_audio``: (class, steps from arrival to first audio, limit of its p95 in seconds), or None.
    """

    step: Callable[[np.ndarray], np.ndarray]
    shares: tuple[float, ...]
    lengths: tuple[np.ndarray, ...] = field(hash=False)
    limits: tuple[float, ...]
    ratios: tuple[float, ...]
    context_s: float = 0.0
    jitter: float = 0.0
    first_audio: tuple[int, float, float] | None = None

    @property
    def mean_frames(self) -> float:
        return float(np.dot(self.shares, [each.mean() for each in self.lengths]))

    @property
    def mean_context(self) -> float:
        """Mean frames spoken by a session found in progress: E[x^2] / (2 E[x])."""
        squares = np.dot(self.shares, [np.mean(each.astype(float) ** 2) for each in self.lengths])
        return float(squares / (2 * self.mean_frames))

    def steady_rate(self) -> float:
        """Requests/s of a device with a constant number of sessions, the most that meets every RTF."""
        n = np.arange(1.0, ROOM)
        step_s = self.step(n) + self.context_s * n * self.mean_context
        slowest = min(limit / ratio for limit, ratio in zip(self.limits, self.ratios, strict=True)) * FRAME_S
        late = np.flatnonzero(step_s > slowest * (1 + 1e-9))
        kept = slice(0, late[0] if len(late) else len(n))
        return float(np.max((n / step_s)[kept], initial=0.0)) / self.mean_frames

    def top_rate(self) -> float:
        """Requests/s that a device completes at its best number of sessions, whatever their RTF."""
        n = np.arange(1.0, ROOM)
        return float(np.max(n / (self.step(n) + self.context_s * n * self.mean_context))) / self.mean_frames


@dataclass(frozen=True)
class Judge:
    """Long runs of a service: ``runs`` of them, each with ``sessions`` or more that count, judged together."""

    service: Service
    routing: str = LEAST_LOADED
    cap: float = 1.0
    runs: int = 4
    sessions: int = 60_000

    def holds(self, rate: float, devices: int) -> bool:
        """Whether every SLO is met at ``rate`` requests/s by all runs together; not if a device collapses in one."""
        parts = []
        for seed in range(self.runs):
            served = self.serve(rate, devices, seed)
            if served is None:
                return False
            parts.append(served)
        index, rtf, start_s = (np.concatenate(each) for each in zip(*parts, strict=True))
        of_class = {c: index == c for c in range(len(self.service.shares))}
        late = any(_p95(rtf[of_class[c]]) > limit for c, limit in enumerate(self.service.limits))
        if late or self.service.first_audio is None:
            return not late
        concerned, steps, limit_s = self.service.first_audio
        return _p95(steps * start_s[of_class[concerned]]) <= limit_s

    def serve(self, rate: float, devices: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """One run: class, RTF and step time at the start (s) of each session that counts; None where one collapses."""
        longest_s = max(int(each[-1]) for each in self.service.lengths) * FRAME_S
        warm_up, counted, tail = (math.ceil(rate * part * longest_s) for part in (_WARM_UP, _COUNTED, _TAIL))
        warm_up, counted = max(warm_up, self.sessions // 5), max(counted, self.sessions)
        gaps, index, frames = draw(self.service, warm_up + counted + tail, seed)
        rtf, start_s = np.empty(len(gaps)), np.empty(len(gaps))
        step_s = np.concatenate([[0.0], self.service.step(np.arange(1.0, ROOM + 2))])
        kept = serve(
            np.cumsum(gaps) / rate, frames, step_s, self.service.context_s, devices, ROUTINGS.index(self.routing), seed,
            rtf, start_s,
        )  # fmt: skip
        if not kept:
            return None
        chosen = slice(warm_up, warm_up + counted)
        noise = np.random.default_rng([9, seed]).standard_normal(counted) * self.service.jitter
        measured = rtf[chosen] * np.array(self.service.ratios)[index[chosen]] * (1 + noise / np.sqrt(frames[chosen]))
        return index[chosen], measured, start_s[chosen]

    def highest_rate(self, devices: int = 1) -> float:
        """The highest rate (requests/s) at which the SLOs hold, by bisection."""
        low, high = 0.0, devices * self.service.top_rate()
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.holds(middle, devices) else (low, middle)
        return low

    def fewest(self, rate: float) -> int:
        """The fewest devices that meet the SLOs at ``rate``, and whose utilisation is at most the cap."""
        low = max(math.ceil(rate / (self.cap * self.service.steady_rate()) - 1e-9), 1)
        if self.holds(rate, low):
            return low
        high = low + max(low // 8, 1)
        while not self.holds(rate, high):
            low, high = high, high + max(high // 4, 1)
            if high > MOST_DEVICES:
                raise ValueError(f"{rate:g} requests/s need more than {MOST_DEVICES} devices")
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.holds(rate, middle) else (middle, high)
        return high


def service_of(
    step: Callable, mix, slos: Mapping[str, float], ratios: Mapping[str, float] | None = None, **more
) -> Service:
    """The service of a traffic mix; ``slos`` and ``ratios`` by class."""
    names = [each.name for each in mix.classes]
    return Service(
        step,
        tuple(mix.shares()[name] for name in names),
        tuple(each.length.frames for each in mix.classes),
        tuple(slos.get(name, math.inf) for name in names),
        tuple((ratios or {}).get(name, 1.0) for name in names),
        **more,
    )


@functools.lru_cache(maxsize=4)
def _streams(seed: int) -> tuple[int, ...]:
    return tuple(np.random.SeedSequence([31, seed]).generate_state(3).tolist())


def draw(service: Service, sessions: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gaps (mean 1), classes and frames of sessions [n]; more of them begin with the same."""
    gaps, kinds, places = (np.random.default_rng(each) for each in _streams(seed))
    index = np.searchsorted(np.cumsum(service.shares)[:-1], kinds.random(sessions), side="right")
    sizes = np.array([len(each) for each in service.lengths])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    place = (places.random(sessions) * sizes[index]).astype(np.int64)
    frames = np.concatenate(service.lengths)[starts[index] + place].astype(float)
    return gaps.standard_exponential(sessions), index, frames


def _p95(values: np.ndarray) -> float:
    return float(np.quantile(values, 0.95, method="higher")) if len(values) else 0.0


@numba.njit(cache=True, nogil=True)
def _steps_in(seconds, first_s, rise_s):
    """Steps that are made in some seconds, where the first takes first_s and each rise_s more than the one before."""
    return 2 * seconds / (first_s + math.sqrt(first_s * first_s + 2 * rise_s * seconds))


@numba.njit(cache=True, nogil=True)
def _push(keys, ids, size, key, one):
    place = size
    while place > 0 and keys[(place - 1) // 2] > key:
        keys[place], ids[place] = keys[(place - 1) // 2], ids[(place - 1) // 2]
        place = (place - 1) // 2
    keys[place], ids[place] = key, one


@numba.njit(cache=True, nogil=True)
def _pop(keys, ids, size):
    """Remove the smallest of ``size`` keys, at 0."""
    key, one = keys[size - 1], ids[size - 1]
    place, last = 0, size - 1
    while 2 * place + 1 < last:
        child = 2 * place + 1
        if child + 1 < last and keys[child + 1] < keys[child]:
            child += 1
        if keys[child] >= key:
            break
        keys[place], ids[place] = keys[child], ids[child]
        place = child
    keys[place], ids[place] = key, one


@numba.njit(cache=True, nogil=True)
def _choose(counts, routing, turn):
    """The device of an arrival."""
    devices = len(counts)
    if routing == 1:
        return turn % devices
    if routing == 2:
        return int(np.random.random() * devices)
    chosen, ties = 0, 0
    for device in range(devices):
        if counts[device] < counts[chosen]:
            chosen, ties = device, 1
        elif counts[device] == counts[chosen]:
            ties += 1
            if np.random.random() * ties < 1:
                chosen = device
    return chosen


@numba.njit(cache=True, nogil=True)
def serve(arrival_s, frames, step_s, context_s, devices, routing, seed, rtf, start_s):
    """Serve all sessions [n]; fills ``rtf`` and ``start_s`` (step time at the start). False where a device collapses.

    ``step_s`` [n + 1]: seconds of a step at n sessions without context.
    """
    np.random.seed(seed)
    room = len(step_s) - 2
    keys, ids = np.empty((devices, room)), np.empty((devices, room), np.int64)
    counts, next_s = np.zeros(devices, np.int64), np.full(devices, np.inf)
    clock, at_s, context = np.zeros(devices), np.zeros(devices), np.zeros(devices)
    arrived, sessions, active = 0, len(arrival_s), 0
    while arrived < sessions or active > 0:
        one = np.argmin(next_s)
        ends = arrived == sessions or next_s[one] <= arrival_s[arrived]
        now = next_s[one] if ends else arrival_s[arrived]
        if not ends:
            one = _choose(counts, routing, arrived)
        n = counts[one]
        if n > 0:
            steps = _steps_in(now - at_s[one], step_s[n] + context_s * context[one], context_s * n)
            if ends:
                steps = keys[one, 0] - clock[one]
            clock[one] += steps
            context[one] += n * steps
        at_s[one] = now
        if ends:
            done = ids[one, 0]
            rtf[done] = (now - arrival_s[done]) / (frames[done] * FRAME_S)
            context[one] = max(context[one] - frames[done], 0.0)
            _pop(keys[one], ids[one], n)
            counts[one], active = n - 1, active - 1
        else:
            if n == room:
                return False
            _push(keys[one], ids[one], n, clock[one] + frames[arrived], arrived)
            counts[one], active = n + 1, active + 1
            start_s[arrived] = step_s[n + 1] + context_s * context[one]
            arrived += 1
        n = counts[one]
        if n == 0:
            clock[one], context[one], next_s[one] = 0.0, 0.0, np.inf
        else:
            steps, first_s = keys[one, 0] - clock[one], step_s[n] + context_s * context[one]
            next_s[one] = now + steps * first_s + context_s * n * steps * steps / 2
    return True
