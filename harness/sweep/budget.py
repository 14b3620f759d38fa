"""The time budget of a job: how long trials take on this host, and what there was no time for."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from harness.clock import HOST, Clock
from harness.drive.generator import AHEAD_NS, LEAD_IN_NS
from harness.drive.load import Load
from harness.drive.stop_rule import settle_s
from harness.planfile.plan import PlanSpec
from harness.records.plan import LeftOut
from harness.records.schema import Trial
from harness.records.slo import clean_requests_needed
from harness.traffic.mix import Mix

MOST_LONGER = 3
FIT_S = 20.0  # a fit and the computations around it
START_SERVER_S, CHOOSE_S = 25.0, 90.0  # of a Triton; of a time dilation
START_S = 12.0  # of a trial besides the time that its load is held, until the first has been measured
LEAD_S = (AHEAD_NS + LEAD_IN_NS) / 1e9  # of an open loop, from the order to start to its first arrivals


@dataclass
class Budget:
    """Minutes that the job may take, counted from its construction."""

    minutes: float
    began_s: float = field(default_factory=time.monotonic)

    def left_s(self) -> float:
        return self.minutes * 60 - (time.monotonic() - self.began_s)


def estimated_s(load: Load, trials: Sequence[Trial] = (), clock: Clock = HOST) -> float:
    """Estimated seconds on the host of a trial, including the reload of its stages, from the ``trials`` of the run.

    ``clock``: of the servers. A ladder may end before its last rung: the estimate assumes the longest duration so far
    of a ladder with the same rungs, or with all but a few of them, and the whole time of those. An open loop
    begins with the sessions that it finds in progress, on the clock of the servers too.
    """
    ladders = [trial for trial in trials if trial.kind == "ladder" and trial.rungs]
    beside_s = median([trial.wall_s - clock.host_span(_held_s(trial)) for trial in ladders]) if ladders else START_S
    alike = [_held_s(trial) + _others_s(load, trial) for trial in ladders if _is_part_of(trial, load)]
    lead_s = 0.0 if load.sessions else LEAD_S
    return clock.host_span(lead_s + max(alike, default=load.total_s)) + max(beside_s, 0.0)


def decidable_s(spec: PlanSpec, mix: Mix, rate_per_s: float) -> float:
    """Whole seconds of an open-loop run in which at least one SLO gets enough requests to be decided.

    Never less than the plan says, and at most MOST_LONGER times that.
    """
    shares = mix.shares()
    needed = [
        deciding_s(clean_requests_needed(slo.quantile, spec.confidence), rate_per_s * shares[slo.traffic_class])
        for slo in spec.slo_list()
    ]
    return float(min(max(spec.confirm.seconds, math.ceil(min(needed))), MOST_LONGER * spec.confirm.seconds))


def deciding_s(requests: int, rate_per_s: float) -> float:
    """Seconds in which so many requests come, and two standard deviations of a Poisson count more."""
    return (requests + 2 * math.sqrt(requests)) / rate_per_s


def _held_s(trial: Trial) -> float:
    """Seconds for which a ladder held its load."""
    return (trial.rungs[-1].end_ns - trial.rungs[0].start_ns) / 1e9 + settle_s(trial.load.seconds or 0.0)


def _is_part_of(trial: Trial, load: Load) -> bool:
    """Whether the trial's ladder has no rung that is not in the load, held as long."""
    return trial.load.seconds == load.seconds and set(trial.load.sessions) <= set(load.sessions)


def _others_s(load: Load, trial: Trial) -> float:
    """Seconds of the rungs that the trial's ladder does not have."""
    return load.total_s * (1 - len(trial.load.sessions) / len(load.sessions)) if load.sessions else 0.0


def minutes_needed(budget: Budget, left_out: Sequence[LeftOut]) -> int:
    """The budget, in whole minutes, that would have sufficed for what was left out too."""
    return math.ceil(budget.minutes + sum(each.seconds for each in left_out) / 60)
