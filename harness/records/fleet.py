"""The content of fleet.json: the cheapest fleets of several types of device for each target rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.content import SCHEMA, absent, content_of, read
from harness.records.bounds import Bounds, Counts
from harness.records.load_test import ClassRecord
from harness.records.slo import Slo


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetType:
    """A type of device. ``watts``: of one device, None if unknown; ``watts_basis``: measured or estimated.

    ``most``: how many can be had; None for any number. ``ruled_out``: by classes, why they cannot be served there.
    """

    name: str
    device: str
    basis: str
    price_per_hour: float
    watts: float | None
    watts_basis: str
    most: int | None
    ruled_out: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedPool:
    """Devices of one type that serve some classes: a ``share`` of those classes' requests, ``qps`` of them.

    ``spares``: included in ``devices``. ``interval``: of the devices, by the unknowns of an estimate.
    """

    device_type: str
    classes: tuple[str, ...]
    share: float
    qps: float
    devices: int
    spares: int
    interval: Counts
    basis: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedFleet:
    """Pools that together serve a rate. ``cost_interval``: of an hour, if the estimates are off as they may be.

    ``joules_per_audio_s``: watts of all devices over the seconds of audio made each second. ``proven``: each pool has
    the devices that its own planner counts, and the integer program has no cheaper fleet; otherwise ``gap`` is the
    share by which one might be, as far as it is known.
    """

    pools: tuple[MixedPool, ...]
    devices: dict[str, int]
    cost_per_hour: float
    cost_interval: Bounds
    cost_per_audio_hour: float
    watts: float | None
    joules_per_audio_s: float | None
    watts_basis: str
    proven: bool = True
    gap: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetTarget:
    """A rate: the cheapest fleet, and by type the fleet that has no other and does not divide the traffic.

    ``note``: why there is no fleet.
    """

    qps: float
    best: MixedFleet | None
    undivided: dict[str, MixedFleet]
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetAnswer:
    """fleet.json: see ``planning.fleet.plan_fleets``. ``power_limit_w``: of all devices of a fleet; None for none.

    ``note``: why a run has no fleets, and then no types or targets either.
    """

    schema: int = SCHEMA
    preset: str
    mix: dict[str, ClassRecord]
    slos: tuple[Slo, ...]
    utilisation_cap: float
    currency: str
    power_limit_w: float | None
    spares: int
    types: tuple[FleetType, ...]
    targets: tuple[FleetTarget, ...]
    note: str = absent("")

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> FleetAnswer:
        """Build it from the content of a fleet.json. Raises ValueError."""
        return read(cls, content)

    def to_dict(self) -> dict[str, Any]:
        return content_of(self)
