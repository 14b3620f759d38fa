"""A pool of equal devices in closed form: whether it meets SLOs at a rate, without simulation or compilation.

Sessions arrive as a Poisson process and share their device's frame steps. With one queue in front of c devices and
sessions spread evenly, the number n of sessions in the pool is a birth-death process; for processor sharing it is
insensitive to the sessions' lengths (Kelly, Reversibility and Stochastic Networks, 3.3):

    P(n) ~ product over k <= n of  offered x S(k' / c) / k',   k' = min(k, s)

with ``offered`` in frames/s, S(x) the step time of a device with x sessions, and s the sessions that the pool's memory
admits; beyond them sessions wait. The tests hold its counts against those of the simulator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from harness import wire
from harness.capacity.models.device import slo_name
from harness.capacity.models.memory import KvRoom, prompt_tokens
from harness.records.slo import Slo
from harness.traffic.mix import Mix

LARGEST_POOL = 64  # above it, devices per rate are held: larger pools only balance better
MEMORY_QUANTILE_Z = 1.645  # 95% of the sums of sessions' bytes fit
KV_MEMORY, SESSION_LIMIT = "KV memory", "sessions per device"
MOST_DEVICES = 1_000_000
_TAIL = 200  # sessions beyond those admitted that are looked at


@dataclass(frozen=True)
class ClassDemand:
    """One traffic class: its share of the requests, and its lengths in frames, all equally likely."""

    name: str
    share: float
    frames: np.ndarray


@dataclass(frozen=True)
class MixDemand:
    """A mix as the closed form needs it. ``in_progress``: lengths and weights of sessions found at a random moment."""

    classes: tuple[ClassDemand, ...]
    voice_frames: int = 150

    @classmethod
    def of(cls, mix: Mix) -> MixDemand:
        """From a mix. Raises InputError for lengths that are not known before scripts are read."""
        shares = mix.shares()
        for each in mix.classes:
            each.length.mean_frames()  # raises
        return cls(tuple(ClassDemand(c.name, shares[c.name], c.length.frames.astype(float)) for c in mix.classes))

    @property
    def mean_frames(self) -> float:
        return float(sum(each.share * each.frames.mean() for each in self.classes))

    def in_progress(self) -> tuple[np.ndarray, np.ndarray]:
        """Lengths [n] of sessions found in progress, and their probabilities: in proportion to length."""
        frames = np.concatenate([each.frames for each in self.classes])
        weights = np.concatenate([each.share * each.frames / len(each.frames) for each in self.classes])
        return frames, weights / weights.sum()

    @property
    def mean_context(self) -> float:
        """Positions in both branches of a session found in progress: its prompt, and half of its frames twice."""
        frames, weights = self.in_progress()
        return float(weights @ (prompt_tokens(frames, self.voice_frames) + frames))

    @property
    def longest_frames(self) -> float:
        return max(float(each.frames.max()) for each in self.classes)


class MemoryNeed(NamedTuple):
    """Bytes of KV cache of a session found in progress: mean and standard deviation; and of the longest session."""

    mean: float
    deviation: float
    longest: float

    @classmethod
    def of(cls, demand: MixDemand, bytes_per_token: int) -> MemoryNeed:
        kv = KvRoom(0.0, bytes_per_token, voice_frames=demand.voice_frames)
        frames, weights = demand.in_progress()
        each = kv.bytes_of(frames).astype(float)
        mean = float(weights @ each)
        deviation = math.sqrt(max(float(weights @ (each - mean) ** 2), 0.0))
        return cls(mean, deviation, float(kv.bytes_of(np.array([demand.longest_frames]))[0]))


@dataclass(frozen=True)
class ClosedDevice:
    """One device. ``step_s`` [n]: seconds of a frame step with 1 to n sessions, openings included.

    ``audio_base_s`` by class: seconds from admission to first audio beside ``first_steps`` frame steps.
    ``session_limit``: sessions that it admits, whatever their size.
    """

    step_s: np.ndarray
    audio_base_s: dict[str, float]
    first_steps: dict[str, float]
    room_bytes: float
    session_limit: int

    def step_at(self, sessions: np.ndarray | float) -> np.ndarray:
        return np.interp(sessions, np.arange(1, len(self.step_s) + 1), self.step_s)


@dataclass(frozen=True)
class ClosedPools:
    """Pools of a device under a demand and SLOs (on time to first audio and real-time factor)."""

    device: ClosedDevice
    demand: MixDemand
    need: MemoryNeed
    slos: Sequence[Slo]
    utilisation_cap: float

    def admitted(self, devices: int) -> int:
        """Sessions that the memory of ``devices`` admits together.

        While the pool has the longest session free on every device but one, some device has room for any session.
        """
        room, need = self.device.room_bytes, self.need
        if room < need.longest:
            return 0
        usable = devices * (room - need.longest) + need.longest if devices > 1 else room
        mean = usable / need.mean
        by_bytes = mean - MEMORY_QUANTILE_Z * math.sqrt(mean) * need.deviation / need.mean
        return max(min(int(by_bytes), devices * self.device.session_limit), 1)

    def steady_rate(self) -> tuple[float, str]:
        """Requests/s of a device with the best constant number of sessions that meets the SLOs; and what binds."""
        room, need = self.device.room_bytes, self.need
        most = min(self.device.session_limit, room / need.mean if room >= need.longest else 0.0)
        if most < 1:
            return 0.0, KV_MEMORY
        count = min(int(most), len(self.device.step_s))
        step_s = self.device.step_s[:count]
        binding = KV_MEMORY if most < self.device.session_limit else SESSION_LIMIT
        for slo in self.slos:
            broken = np.flatnonzero(self._value(slo, step_s) > slo.limit)
            if len(broken) and broken[0] < len(step_s):
                step_s, binding = step_s[: broken[0]], _name(slo)
        if not len(step_s):
            return 0.0, binding
        rates = np.arange(1, len(step_s) + 1) / step_s
        return float(rates.max()) / self.demand.mean_frames, binding

    def violated(self, qps: float, devices: int) -> str:
        """The constraint that a pool violates at a rate; "" where it meets all."""
        if devices > LARGEST_POOL:
            qps, devices = qps * LARGEST_POOL / devices, LARGEST_POOL
        steady, binding = self.steady_rate()
        if qps > self.utilisation_cap * devices * steady:
            return binding if steady <= 0 else f"utilisation {self.utilisation_cap:g}, by {binding}"
        admitted = self.admitted(devices)
        if admitted < 1:
            return KV_MEMORY
        chances = self._chances(qps, devices, admitted)
        if chances is None:
            return KV_MEMORY
        found = np.cumsum(chances)
        waiting = 1.0 - float(found[admitted - 1]) if admitted <= len(found) - 1 else 0.0
        for slo in self.slos:
            sessions = min(int(np.searchsorted(found, slo.quantile)), admitted)
            step_s = self.device.step_at(max(sessions / devices, 1.0))
            if float(self._value(slo, step_s)) > slo.limit:
                return _name(slo)
            if slo.metric == "ttfa_s" and waiting > 1 - slo.quantile:
                return KV_MEMORY
        return ""

    def fewest(self, qps: float) -> int | None:
        """The fewest devices that meet every limit at a rate; None where no number does."""
        steady, _ = self.steady_rate()
        if steady <= 0:
            return None
        low = max(math.ceil(qps / (self.utilisation_cap * steady) - 1e-9), 1)
        if not self.violated(qps, low):
            return low
        below, step = low, 1
        while self.violated(qps, below + step):
            below, step = below + step, 2 * step
            if below > MOST_DEVICES:
                return None
        above = below + step
        while above - below > 1:
            middle = (below + above) // 2
            below, above = (middle, above) if self.violated(qps, middle) else (below, middle)
        return above

    def rate(self, devices: int = 1) -> tuple[float, str]:
        """The highest rate (requests/s) of a pool, within 1%, and what binds just above it; 0 where none is met."""
        steady, binding = self.steady_rate()
        low, high = 0.0, self.utilisation_cap * devices * steady
        if high <= 0:
            return 0.0, binding
        if not self.violated(high, devices):
            return high, f"utilisation {self.utilisation_cap:g}, by {binding}"
        while high - low > 0.01 * high and high > 1e-9:
            middle = (low + high) / 2
            said = self.violated(middle, devices)
            low, high, binding = (low, middle, said) if said else (middle, high, binding)
        return low, binding

    def sessions_p95(self, qps: float, devices: int) -> float:
        """The 95th percentile of sessions on a device."""
        scale = min(1.0, LARGEST_POOL / devices)
        devices, qps = min(devices, LARGEST_POOL), qps * scale
        admitted = self.admitted(devices)
        chances = self._chances(qps, devices, admitted)
        if chances is None:
            return math.inf
        return min(int(np.searchsorted(np.cumsum(chances), 0.95)), admitted) / devices

    def _chances(self, qps: float, devices: int, admitted: int) -> np.ndarray | None:
        """Probabilities of 0, 1, 2 … sessions in the pool, waiting ones included; None without a steady state."""
        offered = qps * self.demand.mean_frames
        full_s = float(self.device.step_at(max(admitted / devices, 1.0)))
        if offered * full_s / admitted >= 1:
            return None
        n = np.arange(1, admitted + _TAIL + 1, dtype=float)
        served = np.minimum(n, admitted)
        rises = np.log(offered * self.device.step_at(np.maximum(served / devices, 1.0)) / served)
        logs = np.concatenate([[0.0], np.cumsum(rises)])
        chances = np.exp(logs - logs.max())
        return chances / chances.sum()

    def _value(self, slo: Slo, step_s: np.ndarray) -> np.ndarray:
        if slo.metric == "rtf":
            return step_s / wire.SECONDS_PER_FRAME
        name = slo.traffic_class
        return self.device.audio_base_s[name] + self.device.first_steps[name] * step_s


def _name(slo: Slo) -> str:
    return slo_name(slo.traffic_class, slo.metric, slo.quantile)
