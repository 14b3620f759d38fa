"""Pools of equal devices: the rate that a number of devices sustains, and the number that a rate needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from harness.capacity.fitting.rate_search import (
    LARGEST_POOL,
    SESSIONS,
    Limits,
    SimulatedLoad,
    Traffic,
    highest_rate,
    judge_load,
    lasts,
    least_throughput,
    simulation_noise,
    steady_limit,
)
from harness.capacity.models.device import Device
from harness.capacity.simulator.sessions import simulate

LEAST_SHARE = 0.05  # of the fitted rate: below it, no number of devices suffices
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, LARGEST_POOL)


@dataclass(frozen=True)
class Pools:
    """Rates of pools of ``device`` with the routing of its limits, simulated for a few sizes and interpolated between.

    A pool's rate is the highest that meets every limit, and at most ``utilisation_cap`` of the steady limit: the rate
    of devices with constant numbers of sessions. Above 64 devices the rate per device is held at that of 64, which is
    on the safe side: larger pools only balance better. Devices are assumed not to slow each other down.
    """

    device: Device
    traffic: Traffic
    limits: Limits
    utilisation_cap: float
    _known: dict[int, tuple[float, str]] = field(default_factory=dict, repr=False)
    _parts: dict[int, Traffic] = field(default_factory=dict, repr=False)

    def changed(self, **changes) -> Pools:
        """The pools with another device, traffic or limits; nothing is simulated yet."""
        return replace(self, **changes, _known={}, _parts={})

    def without_slos(self) -> Pools:
        """The pools without SLOs: what devices sustain with the sessions that were measured and that they admit."""
        return self.changed(limits=replace(self.limits, slos=()))

    def has_seen(self, sessions: float) -> bool:
        """Whether this many sessions were measured on a device; beyond that, its step time is extrapolated."""
        return sessions <= round(self.device.max_sessions)

    def steady_rate(self) -> float:
        """Requests/s at the steady limit of one device, where utilisation is 1."""
        return steady_limit(self.device, self.limits)[0] / self.traffic.mean_frames

    def rate(self, devices: int) -> tuple[float, str]:
        """Highest rate (requests/s) of a simulated pool size (at most 64), and what binds."""
        if devices not in self._known:
            cap = self.utilisation_cap * devices * self.steady_rate()
            capped = cap, self._cap_name
            met = cap > 0 and self.serves(cap, devices)
            self._known[devices] = capped if met else self._search(devices, cap)
        return self._known[devices]

    def rates(self, devices: np.ndarray, reach_qps: float) -> np.ndarray:
        """Highest rate of each number of devices; simulates sizes up to it, or to one that sustains ``reach_qps``.

        A larger pool balances its load better: where the rate per device falls, that is noise of the simulation.
        """
        sizes = []
        for size in _SIZES:
            sizes.append(size)
            if self.rate(size)[0] >= reach_qps or size >= devices.max():
                break
        per_device = np.maximum.accumulate([self.rate(size)[0] / size for size in sizes])
        return devices * np.interp(np.log(devices), np.log(sizes), per_device)

    def devices_for(self, qps: float, shares: np.ndarray) -> np.ndarray:
        """Fewest devices that sustain ``qps`` if each sustained ``shares`` [n] of the fitted rate.

        Infinite below a share of 0.05. Above 64 devices the count follows in proportion, without a search.
        """
        single = self.rate(1)[0]
        lowest = max(float(np.min(shares[shares > 0], initial=1.0)), LEAST_SHARE)
        if single <= 0:
            return np.full(np.shape(shares), np.inf)
        devices = np.arange(1, min(math.ceil(1.2 * qps / (single * lowest)) + 1, LARGEST_POOL) + 1)
        rates = np.maximum.accumulate(self.rates(devices, qps / max(lowest, 0.5)))
        needed = qps / np.maximum(shares, LEAST_SHARE)
        beyond = np.ceil(needed / (rates[-1] / devices[-1]))
        found = np.searchsorted(rates, needed)
        return np.where(shares < lowest, np.inf, np.where(found < len(devices), found + 1.0, beyond))

    def drawn_devices(self, qps: float, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """``devices_for`` at drawn ``shares`` [n]: the bootstrap of a count.

        Where an SLO binds, its rate was found by simulation, and the noise of that is drawn too; a rate at the
        utilisation cap is computed exactly.
        """
        typical = self.devices_for(qps, np.ones(1))[0]
        if self.binding(typical) == self._cap_name:
            return self.devices_for(qps, shares)
        return self.devices_for(qps, shares * simulation_noise(len(shares), rng))

    def that_recover(self, qps: float, devices: int) -> int | None:
        """At least ``devices``, and enough to empty again from any number of sessions; None if none are.

        Where throughput falls as sessions grow, a device that once holds many may deliver less than arrives, and holds
        ever more (metastability). Analytic, see ``least_throughput``; beyond the rungs extrapolated.
        """
        rate = least_throughput(self.device, self.limits) / self.traffic.mean_frames
        return max(devices, math.ceil(qps / rate - 1e-9)) if rate > 0 else None

    def fewest(self, qps: float) -> SimulatedLoad | None:
        """The smallest pool that meets every limit at ``qps``, as simulated; None if none does.

        Where it could collapse, it also has to last in several other runs.
        """
        if self.rate(1)[0] <= 0:
            return None
        expected = int(self.devices_for(qps, np.ones(1))[0])
        # the interpolation between simulated sizes may be one device too small
        loads = (self.judge(qps, devices) for devices in range(expected, expected + 3 + expected // 20))
        return next((load for load in loads if load.met and self._lasts(qps, load.devices)), None)

    def serves(self, qps: float, devices: int) -> bool:
        """Whether the pool meets every limit at ``qps``, and goes on to do so where it could collapse."""
        return self.judge(qps, devices).met and self._lasts(qps, devices)

    def _lasts(self, qps: float, devices: int) -> bool:
        simulated = min(devices, LARGEST_POOL)
        traffic, rate = self.traffic_for(simulated), qps * simulated / devices
        return lasts(self.device, traffic, self.limits, rate, simulated)

    def judge(self, qps: float, devices: int) -> SimulatedLoad:
        """Simulate the pool at ``qps``; above 64 devices, 64 of them with their part of it."""
        simulated = min(devices, LARGEST_POOL)
        traffic = self.traffic_for(simulated)
        load = judge_load(self.device, traffic, self.limits, qps * simulated / devices, simulated)
        return replace(load, rate_per_s=qps, devices=devices)

    def _search(self, devices: int, cap: float) -> tuple[float, str]:
        return highest_rate(self.device, self.traffic_for(devices), self.limits, devices, at_most=cap)

    def traffic_for(self, devices: int) -> Traffic:
        """Traffic for a pool size: fewer sessions per device for larger pools, whose load varies less."""
        sessions = max(SESSIONS // math.isqrt(devices), SESSIONS // 4)
        if sessions not in self._parts:
            self._parts[sessions] = self.traffic.part(sessions)
        return self._parts[sessions]

    @property
    def _cap_name(self) -> str:
        return f"utilisation {self.utilisation_cap:g}"

    def binding(self, devices: float) -> str:
        return self._known[max(size for size in self._known if size <= devices)][1]


def drain_times_s(
    device: Device, traffic: Traffic, sessions: int, rng: np.random.Generator, runs: int = 200
) -> np.ndarray:
    """Seconds [runs] until a device with ``sessions`` sessions found in progress is empty, once it gets no more."""
    nobody = np.zeros(sessions)
    drawn = rng.choice(traffic.residual_frames, (runs, sessions))
    return np.array([simulate(nobody, frames, device.step_time).end_s.max() for frames in drawn])
