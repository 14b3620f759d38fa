"""The content of estimate.json: GPUs per target rate on cards that nobody has measured. Never a verdict on SLOs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.content import SCHEMA, absent, content_of, read
from harness.records.load_test import ClassRecord
from harness.records.plan import Counts, KvMemory, PlannedRate, PlannedTarget
from harness.records.slo import Slo

VERDICT = "planning estimate"


@dataclass(frozen=True, kw_only=True, slots=True)
class UnknownEffect:
    """The devices at the highest target with one unknown at an end of its range (95% of it), the others likely.

    ``low``, ``likely``, ``high``: of the unknown. A count is None where no number of devices suffices.
    """

    unknown: str
    low: float
    likely: float
    high: float
    devices_at_low: int | None
    devices_at_high: int | None
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Narrowing:
    """A measurement on one such GPU, and the interval at the highest target that would be left if it settled what it
    can."""

    command: str
    minutes: float
    unknowns: tuple[str, ...]
    interval: Counts


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimatedCard:
    """The estimate for one kind of card; ``basis``: estimated or scaled. ``problem``: why there is no count.

    ``unknowns``: the one that costs most devices first; ``measurements``: the one that narrows most first. ``watts``:
    the limit on its data sheet.
    """

    card: str
    name: str
    basis: str
    note: str
    rate_per_device: PlannedRate
    targets: tuple[PlannedTarget, ...]
    memory: KvMemory | None = None
    longest_s: float = 0.0
    unknowns: tuple[UnknownEffect, ...] = ()
    measurements: tuple[Narrowing, ...] = ()
    problem: str = ""
    watts: float | None = absent(None)
    price_per_hour: float | None = absent(None)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanningEstimate:
    """estimate.json. ``accepted``: whether the reader has accepted estimates (--accept-estimates)."""

    schema: int = SCHEMA
    verdict: str = VERDICT
    accepted: bool = False
    preset: str
    topology: str
    mix: dict[str, ClassRecord]
    slos: tuple[Slo, ...]
    confidence: float
    utilisation_cap: float
    cards: tuple[EstimatedCard, ...]
    currency: str = absent("")  # of prices, where any was given

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> PlanningEstimate:
        """Build it from the content of an estimate.json. Raises ValueError."""
        return read(cls, content)

    def to_dict(self) -> dict[str, Any]:
        return content_of(self)
