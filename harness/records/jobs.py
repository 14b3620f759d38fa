"""Tasks beside the streams of a plan, as stored in plan.json: the fleets for streams, for tasks, and for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.content import absent
from harness.records.bounds import Counts


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedTasks:
    """A file of tasks as it was when a run began: its ``keys``, and the lengths (frames) that it took from another."""

    keys: dict[str, Any]
    frames: tuple[int, ...] = absent(())


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedTurnaround:
    """An SLO of tasks and its simulated ``value``, both as text with their unit: seconds, or lengths of the audio."""

    slo: str
    value: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SizedFleet:
    """The fewest devices of a ``kind`` (streams, tasks or both), with an interval; ``binding``: the nearest limit.

    ``sessions``: what streams and tasks share, the studio's ``--sessions``; 0 for streams alone.
    """

    kind: str
    devices: int
    interval: Counts
    sessions: int
    turnarounds: tuple[JudgedTurnaround, ...] = ()
    binding: str


@dataclass(frozen=True, kw_only=True, slots=True)
class JobsPlan:
    """plan.json's ``jobs``: see ``planning.job_fleets.shared_plan``. A kind whose SLOs no fleet meets is left out.

    ``qps``: streams at their peak; ``swing``: of their rate over a day. Of tasks: ``per_hour``, the mean length of
    their audio, and their segments. ``saved``: devices by which one fleet is smaller than two; None where a kind has no
    fleet. ``note``: why there is no fleet for both.
    """

    qps: float
    swing: float
    per_hour: float
    mean_audio_s: float
    segment_s: float
    slos: tuple[str, ...]
    fleets: tuple[SizedFleet, ...] = ()
    two_fleets: int | None = None
    saved: int | None = None
    saved_interval: Counts | None = None
    basis: str = "simulated"
    note: str = ""

    def fleet(self, kind: str) -> SizedFleet | None:
        return next((each for each in self.fleets if each.kind == kind), None)

    @property
    def doubt(self) -> str:
        """Why an answer does not cover the tasks, as a sentence; "" where a fleet serves both."""
        return "" if self.fleet("both") else f"Tasks beside the streams: {self.note}"
