"""The content of a comparison: two runs side by side, each difference with its interval and what it shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from harness.content import SCHEMA, content_of, read
from harness.records.plan import Bounds
from harness.topology import Knobs

WORSE, BETTER, NOT_SHOWN, UNKNOWN = "worse", "better", "no difference shown", "not known"
INCONCLUSIVE = "inconclusive"  # of a comparison that does not know every figure
STEP, SLO_METRIC, RATE, COUNT = "step time", "SLO metric", "rate", "count"
KINDS = (STEP, SLO_METRIC, RATE, COUNT)
Finding = Annotated[str, Field(pattern=f"^({WORSE}|{BETTER}|{NOT_SHOWN}|{UNKNOWN})$")]


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedRun:
    """One of the two runs. ``ladders`` determine the level of its step time; ``between_ladders``: relative standard
    deviation of whole ladders, as its interval holds it; ``between_runs``: of a factor that all ladders of a run share.
    ``basis``: emulated, estimated, scaled, or "".
    """

    folder: str
    run_id: str
    created_at: str
    plan: str
    verdict: str
    unit: str
    topology: str
    deployment: Knobs
    ladders: int
    between_ladders: float
    between_runs: float
    basis: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Differing:
    """A fact of the runs that is not the same, such as a fact of their hosts; "" where one does not say."""

    fact: str
    a: str
    b: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A figure of both runs, and how B differs from A.

    ``kind``: STEP (seconds of a frame step at ``at`` sessions; None: the geometric mean over all loads that both
    measured, which the noise of single rungs moves least), SLO_METRIC (``name`` at ``at`` sessions), RATE
    (requests/s of one device) or COUNT (devices, or GPUs, at ``at`` requests/s). ``change``: b / a - 1; for a count
    b - a. ``interval``: of the change; None on a side where nothing is known. ``extrapolated``: a figure is beyond the
    loads that were measured. ``note``: why nothing is known, or what limits the finding.
    """

    kind: Annotated[str, Field(pattern=f"^({STEP}|{SLO_METRIC}|{RATE}|{COUNT})$")]
    name: str
    at: float | None = None
    a: float | None
    b: float | None
    change: float | None
    interval: Bounds
    finding: Finding
    extrapolated: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedDeployment:
    """A deployment that both runs measured: requests/s of one device in each, with its interval."""

    deployment: Knobs
    rate_a: float | None
    interval_a: Bounds
    rate_b: float | None
    interval_b: Bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two runs compared. The intervals of all figures hold together with ``confidence``.

    ``pooled``: the runs' ladders together say how far ladders differ, as both are of one kind of host.
    """

    schema: int = SCHEMA
    a: ComparedRun
    b: ComparedRun
    confidence: float
    pooled: bool
    differing: tuple[Differing, ...]
    differences: tuple[Difference, ...]
    deployments: tuple[ComparedDeployment, ...]
    only_in_a: int
    only_in_b: int

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Comparison:
        """Build it from its content. Raises ValueError."""
        return read(cls, content)

    def to_dict(self) -> dict[str, Any]:
        return content_of(self) | {"finding": self.finding}

    @property
    def finding(self) -> str:
        """B is worse where any figure is; better where some figure is, none is worse, and every figure is known."""
        found = {each.finding for each in self.differences}
        if WORSE not in found and (UNKNOWN in found or not found):
            return INCONCLUSIVE
        return next(each for each in (WORSE, BETTER, NOT_SHOWN) if each in found)


def finding_of(interval: Bounds, *, less_is_better: bool = True) -> str:
    """What an interval of a change shows."""
    low, high = interval
    if low is not None and low > 0:
        return WORSE if less_is_better else BETTER
    if high is not None and high < 0:
        return BETTER if less_is_better else WORSE
    return NOT_SHOWN
