"""A day's demand and the fleets that serve it, as stored: in the manifest of a run and in plan.json."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.content import absent

STATIC, REACTIVE, PREDICTIVE = "static", "reactive", "predictive"


@dataclass(frozen=True, kw_only=True, slots=True)
class DemandCurve:
    """Requests/s over a period that repeats: ``qps[i]`` at i x ``step_s`` seconds, linear in between.

    ``source``: where it comes from, as text.
    """

    source: str
    step_s: float
    qps: tuple[float, ...]

    def __post_init__(self) -> None:
        if not (self.step_s > 0 and len(self.qps) > 1 and max(self.qps) > 0 and min(self.qps) >= 0):
            raise ValueError("a demand has two rates or more, none below 0 and one above, and time between them")

    @property
    def period_s(self) -> float:
        return self.step_s * len(self.qps)

    @property
    def peak_qps(self) -> float:
        return max(self.qps)

    @property
    def mean_qps(self) -> float:
        """The mean over the period, by the trapezoidal rule, which is exact here."""
        return sum(self.qps) / len(self.qps)

    def at(self, at_s: np.ndarray) -> np.ndarray:
        """Requests/s at each time."""
        times_s = np.arange(len(self.qps) + 1) * self.step_s
        return np.interp(np.mod(at_s, self.period_s), times_s, [*self.qps, self.qps[0]])


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledMinimum:
    """From ``at_s`` seconds into the period on, at least so many devices."""

    at_s: float
    devices: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingRule:
    """The rule of an autoscaler: what is simulated, and what an export to Kubernetes writes.

    Every ``poll_s`` it wishes for ceil(sessions / ``target_sessions_per_device``) devices, unless sessions per device
    are within ``tolerance`` (a share) of the target; sessions are all that run or wait, those on draining devices
    too. It grows at once, and shrinks to the most of its wishes in the last ``stabilisation_s``, both within
    ``minimum`` to ``maximum`` devices that serve or start, beside which others may drain: the algorithm of Kubernetes'
    HorizontalPodAutoscaler with an AverageValue. ``schedule``: rows by time in a period of ``period_s``, the rule of
    a second metric; the larger wish counts. A new device serves ``start_s`` after it was wished for; one that goes gets
    no new session, is empty after ``drain_s`` at the latest (None: unknown), and does not return. The newest go first.
    """

    target_sessions_per_device: float
    tolerance: float = 0.1
    poll_s: float = 30.0
    stabilisation_s: float = 300.0
    start_s: float = 300.0
    drain_s: float | None = None
    minimum: int = 1
    maximum: int
    schedule: tuple[ScheduledMinimum, ...] = ()
    period_s: float = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SloOfDay:
    """An SLO: the share of all sessions that arrived in the period and were within its limit, and the least of a part.

    A part is 1/24 of the period. ``met``: over the period, and in every part as far as chance allows; None
    where no session was counted.
    """

    traffic_class: str
    metric: str
    quantile: float
    limit: float
    within: float | None
    worst_part: float | None
    met: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetDay:
    """One policy over the period. ``devices`` by window: the mean of those that are paid for, draining ones too;
    ``most_devices``: the most at any time.

    ``within_slos``: the share of sessions that met every SLO of their class that is counted; ``worst_part``: the least
    of it in any 1/24 of the period. ``met``: every counted SLO; None where none was
    counted.
    """

    policy: str
    rule: ScalingRule | None = None
    devices: tuple[float, ...]
    most_devices: int
    device_hours: float
    cost: float | None = None
    within_slos: float | None
    worst_part: float | None
    rejected: float | None
    slos: tuple[SloOfDay, ...]
    met: bool | None
    basis: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Day:
    """plan.json's ``day``: see ``planning.day.plan_day``. Windows are equal parts of the period.

    ``offered_qps`` and ``sessions`` (mean in progress, on the static fleet) are by window. ``note``: why there are no
    policies, or what a reader has to know of them.
    """

    source: str
    period_s: float
    window_s: float
    peak_qps: float
    mean_qps: float
    requests: int = 0
    offered_qps: tuple[float, ...] = ()
    sessions: tuple[float, ...] = ()
    session_limit: int = 0
    sessions_at_cap: float | None = None
    policies: tuple[FleetDay, ...] = ()
    gpus_per_device: int = 1
    currency: str = absent("")
    note: str = ""

    def policy(self, name: str) -> FleetDay | None:
        return next((each for each in self.policies if each.policy == name), None)

    @property
    def rule(self) -> ScalingRule | None:
        """The rule to export: of the elastic policy with the fewest device hours among those that meet every SLO."""
        elastic = [each for each in self.policies if each.rule is not None and each.met]
        best = min(elastic, key=lambda each: each.device_hours, default=None)
        return best.rule if best else None
