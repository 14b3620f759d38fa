"""The autoscaler's rule for planned devices: its target, its schedule for a known demand, and its simulated form."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from harness.capacity.fitting.rate_search import steady_sessions
from harness.capacity.planning.pools import Pools
from harness.capacity.simulator.pool import Autoscaler
from harness.errors import InputError
from harness.records.day import DemandCurve, ScalingRule, ScheduledMinimum
from harness.records.plan import Drain

SPARE_DEVICES = 2.0  # times the static devices: the maximum unless one is given, for targets below the cap
PLACES = 4  # times the maximum: beside those that serve or start, others drain, as beyond Kubernetes' maxReplicas
_SLOTS = 48  # of a schedule: half an hour of a day
_LEAST_SESSIONS = 0.01
_BELOW = 1 - 1e-12  # Kubernetes computes |1.1 - 1| <= 0.1, which is false in binary fractions, and |0.9 - 1| <= 0.1


@dataclass(frozen=True)
class ScalingTerms:
    """What is given of a rule. ``target_sessions`` and ``maximum`` None: found by planning."""

    start_s: float = 300.0
    poll_s: float = 30.0
    stabilisation_s: float = 300.0
    minimum: int = 1
    maximum: int | None = None
    target_sessions: float | None = None

    def rule(self, target_sessions: float, devices: int, drain: Drain | None = None) -> ScalingRule:
        """The rule with a target, for a fleet that has ``devices`` where it is static. Raises InputError."""
        most = self.maximum or max(math.ceil(SPARE_DEVICES * devices), self.minimum)
        if most < self.minimum:
            raise InputError(f"an autoscaler of {self.minimum} to {most} devices: raise its maximum")
        return ScalingRule(
            target_sessions_per_device=target_sessions,
            poll_s=self.poll_s,
            stabilisation_s=self.stabilisation_s,
            start_s=self.start_s,
            drain_s=drain.longest_s if drain else None,
            minimum=self.minimum,
            maximum=most,
        )


def sessions_at_cap(pools: Pools, qps: float, devices: int) -> float:
    """Mean sessions on each of ``devices`` at the highest rate that they carry.

    Little's law on one device: the fewest n with n / S(n) frames/s at that rate. ``qps``: a rate that they carry.
    """
    per_device = float(pools.rates(np.array([devices]), qps)[0]) / devices
    frames_per_s = per_device * pools.traffic.mean_frames
    n = np.linspace(_LEAST_SESSIONS, max(steady_sessions(pools.device, pools.limits), 1.0), 4096)
    enough = np.flatnonzero(pools.device.step_time.frames_per_s(n) >= frames_per_s)
    return float(n[enough[0]]) if len(enough) else float(n[-1])


def expected_sessions(curve: DemandCurve, lasts_s: np.ndarray) -> np.ndarray:
    """Mean sessions in progress at each time of a curve [n], if none waits and each lasts one of ``lasts_s`` [k].

    M(t)/G/infinity: m(t) = integral of rate(t - u) P(S > u) du (Eick, Massey and Whitt, The physics of the
    Mt/G/infinity queue, 1993, Theorem 1).
    """
    step_s = curve.step_s
    edges = np.arange(0.0, float(lasts_s.max()) + step_s, step_s)
    by_then = np.array([np.minimum(lasts_s, edge).mean() for edge in edges])
    at_s = np.arange(len(curve.qps)) * step_s
    return np.sum(
        [mass * curve.at(at_s - edge - step_s / 2) for mass, edge in zip(np.diff(by_then), edges[:-1], strict=True)],
        axis=0,
    )


def schedule_of(curve: DemandCurve, sessions: np.ndarray, rule: ScalingRule) -> tuple[ScheduledMinimum, ...]:
    """Devices by the slots of a period that hold the ``sessions`` [n] expected from a slot's start until a start later.

    They are wished for early enough to serve when their sessions come: the predictive rule.
    """
    slot_s = curve.period_s / _SLOTS
    at_s = np.arange(len(sessions)) * curve.step_s
    rows: list[ScheduledMinimum] = []
    for begin_s in np.arange(_SLOTS) * slot_s:
        span_s = np.mod(at_s - begin_s, curve.period_s)
        ahead = sessions[span_s <= slot_s + rule.start_s + rule.poll_s]
        needed = math.ceil(float(ahead.max()) / rule.target_sessions_per_device - 1e-9)
        devices = min(max(needed, rule.minimum), rule.maximum)
        if not rows or rows[-1].devices != devices:
            rows.append(ScheduledMinimum(at_s=float(begin_s), devices=devices))
    return tuple(rows)


def with_schedule(rule: ScalingRule, curve: DemandCurve, sessions: np.ndarray) -> ScalingRule:
    """The predictive form of a rule: at least the devices that the expected ``sessions`` need."""
    return replace(rule, schedule=schedule_of(curve, sessions, rule), period_s=curve.period_s)


def autoscaler_of(rule: ScalingRule, seconds: float, phase_s: float = 0.0) -> Autoscaler:
    """The rule as the simulator runs it for ``seconds``, from ``phase_s`` into the period on."""
    periods = range(-1, math.ceil((phase_s + seconds) / rule.period_s) + 1)
    floors = [(turn * rule.period_s + each.at_s - phase_s, each.devices) for turn in periods for each in rule.schedule]
    target = rule.target_sessions_per_device
    return Autoscaler(
        rule.minimum,
        rule.maximum,
        target,
        high=target * (1 + rule.tolerance) * _BELOW,
        low=target * (1 - rule.tolerance) * _BELOW,
        every_s=rule.poll_s,
        lag_s=rule.start_s,
        hold_s=0.0,
        stabilise_s=rule.stabilisation_s,
        recalls=False,
        newest=True,
        floors=tuple(sorted(floors)),
        places=PLACES * rule.maximum,
    )
