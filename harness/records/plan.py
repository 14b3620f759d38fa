"""The content of plan.json, which is what is signed: devices per target rate, what that rests on, and the verdict.

A field with a default is newer than some stored files; the default is what those mean. ``basis`` says how a figure is
known: measured, simulated, computed, given or extrapolated; "" where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from harness.records.content import Figure, absent, content_of, read, stored_as
from harness.records.slo import Slo

SCHEMA = 1

Bounds = tuple[float | None, float | None]
Counts = tuple[int | None, int | None]
"""The lower and the upper bound; None where nothing is known on that side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRate:
    """Requests a second of one device with every SLO met; ``value`` None where that is not known."""

    value: float | None = None
    interval: Bounds = (None, None)
    binding: str = ""
    max_sessions_measured: float | None = None
    basis: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedLoss:
    """What ``devices`` show when ``lost`` of them fail: see ``device_losses.Loss``.

    The shares are value / limit; None where that is beyond measure.
    """

    lost: int
    devices: int
    kept: bool
    worst: str
    worst_share: float | None = None
    early_share: float | None = None
    judged_s: float | None = None
    interrupted: int
    basis: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTarget:
    """The devices that a rate needs; None where no count of devices is known. Costs are there where a price is."""

    qps: float
    devices: int | None = None
    interval: Counts = (None, None)
    binding: str = ""
    utilisation: float | None = None
    headroom_qps: float | None = None
    devices_n_plus_1: int | None = None
    devices_n_plus_2: int | None = None
    losses: tuple[PlannedLoss, ...] = ()
    sessions_per_device_p95: float | None = None
    basis: str = ""
    note: str = ""
    cost_per_hour: float | None = absent(None)
    cost_per_audio_hour: float | None = absent(None)
    cost_per_audio_hour_interval: Bounds | None = absent(None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationRow:
    """A figure of an open-loop trial, predicted and measured: see ``planning.validation.validate``."""

    trial_id: str
    rate_per_s: float | None
    said_at: str | None = None
    prediction_sha256: str | None = None
    metric: str
    said_before: float | None = None
    predicted: float | None
    predicted_interval: Bounds
    measured: float | None
    relative_error: float | None
    limit: float
    passed: bool | None
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedSlo:
    """An SLO as one run showed it; ``met`` None where too few requests carry it."""

    traffic_class: str
    metric: str
    quantile: float
    limit: float
    measured: float | None
    requests: int
    met: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenRun:
    """An open-loop trial; ``own``: on the planned deployment. ``passed`` None where it cannot say: see ``note``."""

    trial_id: str
    own: bool
    valid: bool
    rate_per_s: float
    seconds: float | None
    nominal_audio_s_per_s: float
    offered_audio_s_per_s: float | None
    slos: Annotated[tuple[JudgedSlo, ...], Field(validation_alias="promises")] = stored_as("promises", ())
    passed: bool | None
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drain:
    """Seconds that a device with so many sessions aboard takes to empty."""

    sessions: int
    p50_s: float
    p95_s: float
    longest_s: float | None = None
    basis: str = absent("")


@dataclass(frozen=True, kw_only=True, slots=True)
class KvMemory:
    """Room for KV caches on a device, and how many sessions of the mix, or of its longest, fill it."""

    room_bytes: float
    bytes_per_token: int
    sessions: Figure
    longest_sessions: Figure
    basis: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """Of an hour of a device."""

    device_type: str
    price_per_device_hour: float
    currency: str
    basis: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CountAtRate:
    """Devices at a rate; None where none helps, or it is not known."""

    qps: float
    devices: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CostedCount(CountAtRate):
    """And what they cost, where there is a price."""

    cost_per_audio_hour: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SensitivityRow:
    """What a change does to the rate of a device and the devices of each target."""

    change: str
    basis: str
    note: str
    rate_per_device: float | None
    targets: tuple[CountAtRate, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceTypeRow:
    """What another type of device would carry, by its profile; without targets where ``note`` says why."""

    type: str
    device: str
    preset: str
    basis: str
    rate_per_device: float | None
    binding: str = absent("")
    kv_sessions: float | None
    targets: tuple[CostedCount, ...]
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ForecastRow:
    """Months until counts of devices are too small for a rate that grows; None for never. 0 for now.

    ``devices_after_months``: by the number of months; None beyond ``Forecast.most_devices``.
    """

    qps: float
    months_until_too_small: float | None
    months_until_too_small_n_plus_1: float | None
    months_until_fleet_too_small: float | None
    devices_after_months: dict[str, int | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """When growth makes the counts too small. ``growth_per_month``: a share; ``fleet``: devices that there are."""

    growth_per_month: float
    fleet: int | None
    most_devices: int
    basis: str
    targets: tuple[ForecastRow, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SurgeParts:
    """A surge over time, part by part: the load as a multiple, the share that met its SLOs, sessions of a device."""

    at_s: tuple[float, ...]
    rate: tuple[float, ...]
    within_slos: Annotated[tuple[float | None, ...], Field(validation_alias="in_promise")] = stored_as("in_promise")
    sessions: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SurgeRow:
    """A surge under one way to admit sessions; shares are None where no session came."""

    surge: str
    times: int | float
    lasts_s: float
    admission: str
    within_slos_before: Annotated[float | None, Field(validation_alias="in_promise_before")] = stored_as(
        "in_promise_before"
    )
    within_slos_during: Annotated[float | None, Field(validation_alias="in_promise_during")] = stored_as(
        "in_promise_during"
    )
    within_slos_worst: Annotated[float | None, Field(validation_alias="in_promise_worst")] = stored_as(
        "in_promise_worst"
    )
    busy_during: float | None
    most_sessions: float
    recovered_after_s: float | None
    watched_s: float
    beyond_measured: bool
    parts: SurgeParts


@dataclass(frozen=True, kw_only=True, slots=True)
class Behaviour:
    """What the devices of a target show under surges: see ``planning.surges.behaviour``."""

    basis: str
    qps: float
    devices: int
    session_limit: int
    queue: Annotated[int, Field(validation_alias="line")] = stored_as("line")
    patience_s: float
    kv_room_bytes: float | None = None
    hold_s: float
    part_s: float
    max_sessions_measured: float
    surges: tuple[SurgeRow, ...]
    ninety: Drain


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What the budget had no time for, and about how long it takes. ``decisive``: there is no answer without it."""

    what: str
    seconds: float
    decisive: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """plan.json: see ``planning.plan.make_plan``.

    ``unit``: one device in words. ``deployment``: the planned knobs; None where no deployment has a rate.
    ``doubts`` are those of the ``reasons`` that the sign-off added to those of the plan itself: what its budget left
    out.
    """

    schema: int = SCHEMA
    verdict: str
    reasons: tuple[str, ...]
    unit: str
    preset: str = ""
    device: str = ""
    gpus_per_device: int = 1
    emulated: bool = False
    confidence: float
    utilisation_cap: float | None = None
    deployment: dict[str, Any] | None
    slos: Annotated[tuple[Slo, ...], Field(validation_alias="promises")] = stored_as("promises")
    rate_per_device: PlannedRate
    targets: tuple[PlannedTarget, ...]
    validation: tuple[ValidationRow, ...]
    open_runs: tuple[OpenRun, ...] = ()
    drain: Drain | None = None
    memory: KvMemory | None = None
    costs: Price | None = None
    sensitivity: tuple[SensitivityRow, ...] = ()
    device_types: tuple[DeviceTypeRow, ...] = ()
    forecast: Forecast | None = None
    behaviour: Behaviour | None = None
    doubts: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Plan:
        """From the content of a plan.json. Raises ValueError."""
        return read(cls, content)

    def to_dict(self) -> dict[str, Any]:
        return content_of(self)

    def headline(self) -> PlannedTarget | None:
        """The target that the answer names: the highest one within the measured loads, else the highest at all."""
        counted = [target for target in self.targets if target.devices is not None]
        in_range = [target for target in counted if target.basis != "extrapolated"]
        return max(in_range or counted, key=lambda target: target.qps, default=None)
