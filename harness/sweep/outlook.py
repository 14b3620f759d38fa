"""Whether the windows of a plan hold enough requests to decide its SLOs, computed before anything is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from harness import wire
from harness.capacity.fitting.observations import MIN_STARTS
from harness.clock import AUTO, HOST, Clock
from harness.drive.load import Load
from harness.drive.stop_rule import SETTLE_SHARE
from harness.errors import InconclusiveError
from harness.planfile.plan import PlanSpec
from harness.records.slo import Slo, clean_requests_needed
from harness.runs.expected import ExpectedServer, server_by_profile
from harness.sweep.budget import CHOOSE_S, FIT_S, MOST_LONGER, START_SERVER_S, decidable_s, deciding_s, estimated_s
from harness.sweep.near_limit import rungs_near_limit
from harness.sweep.trial_log import TRIES
from harness.traffic.mix import Mix

OF_FIRST = "; so with the first value of each knob, and another point of the space may be faster"
_QUANTILES = (0.95, 0.9, 0.8, 0.75, 0.5)  # that a plan is told of where its own are out of reach


@dataclass(frozen=True)
class SloOutlook:
    """An SLO in a window: requests of its class that are ``expected``, and those ``needed`` for a verdict.

    ``per_s``: requests of its class; those that the window finds in progress are as many as come in ``found_s``.
    """

    slo: Slo
    expected: float
    needed: int
    per_s: float = math.nan
    found_s: float = 0.0

    @property
    def is_decidable(self) -> bool:
        return self.expected >= self.needed

    @property
    def seconds(self) -> float:
        """The window that holds as many, but for chance."""
        return max(deciding_s(self.needed, self.per_s) - self.found_s, 0.0)

    def share_in(self, seconds: float) -> float:
        """The share of this rate with which a window of so many seconds decides it."""
        return deciding_s(self.needed, self.per_s) / (seconds + self.found_s)


@dataclass(frozen=True)
class WindowOutlook:
    """The confirmation that an answer needs: its rate (requests/s) and its window (seconds), SLO by SLO.

    ``confirm_s``, ``confidence``: of the plan.
    """

    rate_per_s: float
    seconds: float
    slos: tuple[SloOutlook, ...]
    confirm_s: float
    confidence: float

    @classmethod
    def of(cls, spec: PlanSpec, mix: Mix, rate_per_s: float, step_s: float = wire.SECONDS_PER_FRAME) -> WindowOutlook:
        """A confirmation at a rate, as long as a sign-off makes it. ``step_s``: of a frame, by default that of speech.

        Sessions that the window finds in progress have a real-time factor in it too, and no first audio.
        """
        seconds, shares, found = decidable_s(spec, mix, rate_per_s), mix.shares(), []
        lasts_s = {each.name: each.length.mean_frames() * step_s for each in mix.classes}
        for slo in spec.slo_list():
            needed = clean_requests_needed(slo.quantile, spec.confidence)
            own_per_s = rate_per_s * shares[slo.traffic_class]
            found_s = 0.0 if slo.metric == "ttfa_s" else lasts_s[slo.traffic_class]
            found.append(SloOutlook(slo, own_per_s * (seconds + found_s), needed, own_per_s, found_s))
        return cls(rate_per_s, seconds, tuple(found), spec.confirm.seconds, spec.confidence)

    @property
    def problem(self) -> str:
        """Why no SLO can be decided in it, and what to change; "" where one can."""
        if any(each.is_decidable for each in self.slos):
            return ""
        nearest = min(self.slos, key=lambda each: each.seconds)
        limit = f" (at most {MOST_LONGER} times confirm.seconds)" if self.seconds > self.confirm_s else ""
        return (
            f"confirm: {self.seconds:g} s{limit} at {self.rate_per_s:.2g} requests/s hold about {nearest.expected:.0f} "
            f"requests of class {nearest.slo.traffic_class}, and {nearest.needed} are needed for {named(nearest.slo)}: "
            f"give confirm.seconds {math.ceil(nearest.seconds / MOST_LONGER)} or more{self._lower(nearest)}"
        )

    def _lower(self, nearest: SloOutlook) -> str:
        """The highest usual quantile that this window decides."""
        for quantile in _QUANTILES:
            if quantile < nearest.slo.quantile and clean_requests_needed(quantile, self.confidence) <= nearest.expected:
                return f", or an SLO of p{100 * quantile:g}"
        return ""


def window_of(spec: PlanSpec, mix: Mix, server: ExpectedServer) -> WindowOutlook:
    """The confirmation of an expected server, at the highest of the plan's shares."""
    rate = server.rate_per_s * max(spec.confirm.load_share)
    return WindowOutlook.of(spec, mix, rate, server.step_at(rate))


def named(slo: Slo) -> str:
    return f"{slo.metric.removesuffix('_s')} p{100 * slo.quantile:g} of class {slo.traffic_class}"


def ladder_outlook(spec: PlanSpec, server: ExpectedServer) -> list[SloOutlook]:
    """Requests that begin in the rungs of a ladder, by SLO on first audio, and those that its fit needs.

    A quantile needs a request beyond it, on average; requests of all classes stand in for those of a rare one.
    """
    seconds = spec.ladder.seconds * (1 - SETTLE_SHARE)
    begun = seconds * sum(server.begun_per_s(sessions) for sessions in spec.ladder.sessions)
    slos = [slo for slo in spec.slo_list() if slo.metric == "ttfa_s"]
    return [SloOutlook(slo, begun, max(MIN_STARTS, math.ceil(1 / (1 - slo.quantile) - 1e-9))) for slo in slos]


def least_s(spec: PlanSpec, window_s: float, room: float, clock: Clock = HOST) -> float:
    """Seconds on the host for the least that an answer needs: the server, two ladders, a confirmation, the fits.

    ``room``: the most sessions that the server's memory holds. Undilated, time for a repeat of the confirmation is
    reserved too, as ``Campaign.confirm_s`` does.
    """
    rungs, held_s = spec.ladder.sessions, spec.ladder.seconds
    further = rungs_near_limit(rungs, rungs[-1], reached=False, room=room)
    ladders_s = sum(estimated_s(Load.ladder(held_s, 0, each), clock=clock) for each in (rungs, further))
    choosing_s = CHOOSE_S if spec.dilate == AUTO else 0.0
    confirm_s = (TRIES if clock == HOST else 1) * estimated_s(Load(window_s, 0), clock=clock)
    return START_SERVER_S + choosing_s + ladders_s + confirm_s + 3 * FIT_S


def most_dilation(spec: PlanSpec, window_s: float, room: float) -> float:
    """The highest time dilation with which the budget suffices for an answer; below 1 where it never does."""
    low_s, high_s = (least_s(spec, window_s, room, Clock(factor)) for factor in (2.0, 3.0))
    return 2 + (spec.budget_minutes * 60 - low_s) / (high_s - low_s)


@dataclass(frozen=True)
class PlanOutlook:
    """What a plan is expected to show before it runs. ``server`` None: nothing is expected; ``unknown`` says why.

    ``window``: of its highest share, None without a rate; ``most_dilation``: that its budget allows.
    """

    spec: PlanSpec
    server: ExpectedServer | None
    window: WindowOutlook | None
    ladder: tuple[SloOutlook, ...]
    least_s: float
    most_dilation: float
    unknown: str = ""

    @classmethod
    def of_plan(cls, spec: PlanSpec, room: float) -> PlanOutlook:
        """From the plan alone."""
        try:
            return cls.of(spec, server_by_profile(spec), room)
        except InconclusiveError as error:
            return replace(cls.of(spec, None, room), unknown=str(error))

    @classmethod
    def of(cls, spec: PlanSpec, server: ExpectedServer | None, room: float) -> PlanOutlook:
        mix, window, ladder = spec.traffic_mix(), None, []
        if server and server.rate_per_s:
            window = window_of(spec, mix, server)
            ladder = ladder_outlook(spec, server)
        clock = HOST if spec.dilate == AUTO else Clock(float(spec.dilate))
        dilated_s = window.seconds if window else MOST_LONGER * spec.confirm.seconds
        seconds = dilated_s if window or clock != HOST else spec.confirm.seconds
        least = least_s(spec, seconds, room, clock)
        return cls(spec, server, window, tuple(ladder), least, most_dilation(spec, dilated_s, room))

    def problems(self) -> list[str]:
        """Why no sign-off of the plan can conclude, each with what to change; [] where one can."""
        found = self._of_windows() if self.server and self.server.of_all else []
        minutes = self.spec.budget_minutes
        if self.least_s > minutes * 60:
            slower = "" if self.spec.dilate in (AUTO, 1) else f" with time dilated {self.spec.dilate:g} times"
            needed = math.ceil(self.least_s / 60)
            found.append(
                f"budget_minutes {minutes:g}: what an answer needs takes about {needed} min{slower}: give "
                f"budget_minutes {needed}"
            )
        return found

    def doubts(self) -> list[str]:
        """What would be problems if the space had its first point alone."""
        return [] if self.server is None or self.server.of_all else [each + OF_FIRST for each in self._of_windows()]

    def _of_windows(self) -> list[str]:
        short = [each for each in self.ladder if not each.is_decidable]
        found = [self._of_ladder(max(short, key=lambda each: each.needed / each.expected))] if short else []
        return [*found, *filter(None, [self.window.problem if self.window else ""])]

    def _of_ladder(self, short: SloOutlook) -> str:
        seconds = math.ceil(self.spec.ladder.seconds * short.needed / short.expected)
        return (
            f"ladder: about {short.expected:.0f} requests begin in its rungs of {self.spec.ladder.seconds:g} s, and "
            f"{short.needed} are needed for {named(short.slo)}: give ladder.seconds {seconds}"
        )
