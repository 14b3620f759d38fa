"""The content of plan.json, which is what is signed: devices per target rate, their basis, and the verdict.

A field with a default is newer than some stored files; the default is the value that those imply. ``basis`` says how
a figure is known: measured, simulated, computed, given or extrapolated; "" if there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from harness.content import SCHEMA, Figure, absent, content_of, read, stored_as
from harness.records.bounds import Bounds, Counts
from harness.records.day import Day
from harness.records.fleet import FleetAnswer
from harness.records.jobs import JobsPlan
from harness.records.slo import Slo
from harness.records.why_not import RuledOut
from harness.topology import Knobs


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRate:
    """Requests/s that one device alone sustains, with Poisson arrivals and every SLO met; ``value`` None if unknown.

    ``ladders`` determine it; ``between_ladders``: relative standard deviation of whole ladders, held by its interval.
    """

    value: float | None = None
    interval: Bounds = (None, None)
    binding: str = ""
    max_sessions_measured: float | None = None
    ladders: int | None = absent(None)
    between_ladders: float | None = absent(None)
    basis: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedLoss:
    """``devices`` after the loss of ``lost`` of them: see ``device_losses.Loss``.

    The shares are value / limit; None if infinite or unknown.
    """

    lost: int
    devices: int
    met: Annotated[bool, Field(validation_alias="kept")] = stored_as("kept")
    worst: str
    worst_share: float | None = None
    early_share: float | None = None
    judged_s: float | None = None
    interrupted: int
    basis: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTarget:
    """The devices that a rate needs; None if no count is known. Costs are present with a price, energy with a power.

    ``devices_by_routing``: the count under each routing; None where half as many again do not suffice.
    ``devices_that_recover``: the count that also recovers from total overload without rejecting anything.
    """

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
    devices_by_routing: dict[str, int | None] | None = absent(None)
    devices_that_recover: int | None = absent(None)
    basis: str = ""
    note: str = ""
    cost_per_hour: float | None = absent(None)
    cost_per_audio_hour: float | None = absent(None)
    cost_per_audio_hour_interval: Bounds | None = absent(None)
    kwh_per_audio_hour: float | None = absent(None)  # at the power limit of the devices


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationRow:
    """A figure of an open-loop trial, predicted and measured: see ``planning.validation.validate``."""

    trial_id: str
    rate_per_s: float | None
    said_at: str | None = None
    prediction_sha256: str | None = None
    metric: str
    predicted_in_advance: Annotated[float | None, Field(validation_alias="said_before")] = stored_as(
        "said_before", None
    )
    predicted: float | None
    predicted_interval: Bounds
    measured: float | None
    relative_error: float | None
    limit: float
    passed: bool | None
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedSlo:
    """An SLO judged in one run; ``met`` None where there are too few requests."""

    traffic_class: str
    metric: str
    quantile: float
    limit: float
    measured: float | None
    requests: int
    met: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenRun:
    """An open-loop trial; ``own``: on the planned deployment. ``passed`` None if undecided: see ``note``."""

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
    """Seconds that a draining device with this many sessions takes to empty."""

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
    """Price of an hour of a device."""

    device_type: str
    price_per_device_hour: float
    currency: str
    basis: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CountAtRate:
    """Devices at a rate; None if no number suffices, or it is unknown."""

    qps: float
    devices: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CostedCount(CountAtRate):
    """Devices at a rate and their cost, if there is a price."""

    cost_per_audio_hour: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SensitivityRow:
    """Effect of a change on the rate of a device and the devices of each target."""

    change: str
    basis: str
    note: str
    rate_per_device: float | None
    targets: tuple[CountAtRate, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceTypeRow:
    """What another type of device would sustain, by its profile; without targets if ``note`` says why."""

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
    """Months until counts of devices are too small for a rate that grows; None for never, 0 if they are already.

    ``devices_after_months``: by the number of months; None beyond ``Forecast.most_devices``.
    """

    qps: float
    months_until_too_small: float | None
    months_until_too_small_n_plus_1: float | None
    months_until_fleet_too_small: float | None
    devices_after_months: dict[str, int | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """When growth exceeds the counts. ``growth_per_month``: a share; ``fleet``: existing devices."""

    growth_per_month: float
    fleet: int | None
    most_devices: int
    basis: str
    targets: tuple[ForecastRow, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SurgeParts:
    """A surge over time, part by part: the load as a multiple, the share that met its SLOs, sessions per device."""

    at_s: tuple[float, ...]
    rate: tuple[float, ...]
    within_slos: Annotated[tuple[float | None, ...], Field(validation_alias="in_promise")] = stored_as("in_promise")
    sessions: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SurgeRow:
    """A surge under one admission policy; shares are None where no session arrived."""

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
    """The devices of a target under surges: see ``planning.surges.behaviour``."""

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
    """What the budget had no time for, and its estimated duration. ``decisive``: without it there is no answer."""

    what: str
    seconds: float
    decisive: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """plan.json: see ``planning.plan.make_plan``.

    ``unit``: one device as text. ``deployment``: the planned knobs; None where no deployment has a rate.
    ``doubts``: the ``reasons`` that the sign-off added to the plan's own: what its budget left out, or tasks without a
    fleet. ``why_not``: the options that lost; older files do not say. ``mixed_fleets``: of the types of device with a
    price, if several.
    """

    schema: int = SCHEMA
    verdict: str
    reasons: tuple[str, ...]
    unit: str
    preset: str = ""
    device: str = ""
    gpus_per_device: int = 1
    emulated: bool = False
    times_basis: str = absent("")  # of emulated times that nobody measured: estimated or scaled
    dilation: float = absent(1.0)  # how many times slower than these figures the emulated GPUs ran
    confidence: float
    utilisation_cap: float | None = None
    routing: str = absent("least_loaded")
    deployment: Knobs | None
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
    day: Day | None = absent(None)
    jobs: JobsPlan | None = absent(None)
    mixed_fleets: FleetAnswer | None = absent(None)
    doubts: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    why_not: tuple[RuledOut, ...] = absent(())

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Plan:
        """Build it from the content of a plan.json. Raises ValueError."""
        return read(cls, content)

    def to_dict(self) -> dict[str, Any]:
        return content_of(self)

    @property
    def steady_rate(self) -> float | None:
        """Requests/s of one device at utilisation 1, by the targets; None if no target has a count."""
        targets = self.targets
        rates = (each.qps / (each.devices * each.utilisation) for each in targets if each.devices and each.utilisation)
        return next(rates, None)

    @property
    def planned_limit(self) -> float | None:
        """Requests/s above which no device of any fleet is planned: the cap's share of the steady rate."""
        rate, cap = self.steady_rate, self.utilisation_cap
        return None if rate is None or cap is None else cap * rate

    @property
    def is_more_in_a_fleet(self) -> bool:
        """Whether a device is planned to carry more in a fleet than one device alone sustains."""
        alone, most = self.rate_per_device.value, self.planned_limit
        return alone is not None and most is not None and most > alone

    def headline(self) -> PlannedTarget | None:
        """The target named in the answer: the highest within the measured loads, otherwise the highest of all."""
        counted = [target for target in self.targets if target.devices is not None]
        in_range = [target for target in counted if target.basis != "extrapolated"]
        return max(in_range or counted, key=lambda target: target.qps, default=None)
