"""The profile of a device: the times of every stage over batch and context, as ``harness profile`` measured them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag

from harness.content import SCHEMA, absent, content_of, read
from harness.identity import HostFacts

PREFILL = "prefill"  # prompt parts of the LLM stage, beside the stages of the frame path
PROFILER, EVENTS, CPU, WALL = "profiler", "events", "cpu", "wall"  # sources of a device's part of a time
ESTIMATE = "estimate"  # the source where nothing was measured: see harness/cards
SEPARATE = PROFILER, EVENTS, ESTIMATE  # sources that know it apart from the host's
MEASURED, SCALED, ESTIMATED = "measured", "scaled", "estimated"  # how the times of a profile are known

Count = Annotated[int, Field(strict=True, ge=0)]
Size = Annotated[int, Field(strict=True, gt=0)]
Milliseconds = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


def _given(value: Any) -> Any:
    if value is None:
        raise ValueError("a number is missing")
    return value


@dataclass(frozen=True, kw_only=True)
class GridPoint:
    """Where a stage was measured, as far as the stage depends on it."""

    batch: Count | None = absent(None)
    tokens: Count | None = absent(None)  # of a prompt part
    seconds: Count | None = absent(None)  # of a voice sample
    context: Count | None = absent(None)  # positions of a session's two branches together; of a prompt before its part
    steps: Count | None = absent(None)  # of diffusion

    def at(self, coordinate: str) -> int:
        """A coordinate by its name. Raises ValueError where the point has none."""
        value = getattr(self, coordinate)
        if value is None:
            raise ValueError(f"a point has no {coordinate}")
        return value


@dataclass(frozen=True, kw_only=True)
class SkippedPoint(GridPoint):
    """A point that was not measured, and why."""

    left_out: str


@dataclass(frozen=True, kw_only=True)
class StagePoint(GridPoint):
    """The times of a stage at one point, in milliseconds; ``ms`` is wall time, ``device_ms`` the device's part of it.

    Older profiles do not separate the parts. Raises ValueError where the part is longer than the whole.
    """

    ms: Milliseconds
    spread: float | None = None  # half the interval of the median, relative to it; not known from one call
    low_ms: float | None = absent(None)  # of an estimate: ``ms`` lies in between with 95% of the likely assumptions
    high_ms: float | None = absent(None)
    roofline_ms: float | None = absent(None)  # the lower bound by memory and arithmetic
    device_ms: Annotated[Milliseconds | None, BeforeValidator(_given)] = absent(None)
    host_ms: float | None = absent(None)
    device_ms_from: str = absent("")  # PROFILER, EVENTS, CPU or WALL
    device_ms_note: str = absent("")  # why no better source was used
    launches: int | None = absent(None)  # of kernels
    copies: int | None = absent(None)
    samples: int | None = absent(None)
    bytes: int | None = absent(None)  # moved
    gflop: float | None = absent(None)

    def __post_init__(self) -> None:
        if self.device_ms is not None and self.device_ms > self.ms:
            raise ValueError(f"device_ms is {self.device_ms} of {self.ms} ms")

    @property
    def turn_ms(self) -> float:
        """The device's part of the time; all of it where the profile does not separate it."""
        return self.ms if self.device_ms is None else self.device_ms

    @property
    def is_separated(self) -> bool:
        return self.device_ms_from in SEPARATE


def _kind_of(point: Any) -> str:
    left_out = "left_out" in point if isinstance(point, Mapping) else isinstance(point, SkippedPoint)
    return "left_out" if left_out else "measured"


ProfilePoint = Annotated[
    Annotated[StagePoint, Tag("measured")] | Annotated[SkippedPoint, Tag("left_out")],
    Discriminator(_kind_of),
]


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Sizes of the model that was measured, and bytes for KV caches that its GPU has beside the weights."""

    hidden_size: Size
    kv_bytes_per_token: Size
    kv_room_bytes: Count | None = absent(None)
    state_values: Size  # of the convolutions of one session


@dataclass(frozen=True, kw_only=True)
class ProfileManifest:
    """How a profile came to be."""

    created_at: str = absent("")  # ISO 8601, UTC
    command: str = absent("")
    commit: str = absent("")
    versions: dict[str, str] | None = absent(None)
    host: HostFacts | None = absent(None)
    threads: int | None = None  # of torch on a CPU
    weights: str = absent("")
    seconds: float | None = absent(None)
    self_noise: dict[str, float] | None = absent(None)
    device_ms_from: dict[str, int] | None = absent(None)  # points by the source of their ``device_ms``
    notes: str = absent("")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The times of every stage on one device, with its copy bandwidth (GB/s) and matrix throughput (TFLOP/s).

    ``basis``: MEASURED (also where an older one leaves it out), SCALED from the profile of another device, or ESTIMATED
    from a data sheet; ``note`` says how. ``topology``: of an estimate ("": staged). ``ranges``: what an estimate
    assumes, (low, likely, high) by name.
    """

    schema: int = SCHEMA
    device: str
    preset: str
    dtype: str = absent("")
    manifest: ProfileManifest | None = absent(None)
    model: ModelSizes
    bandwidth_gb_s: float | None = absent(None)
    tflop_s: float | None = absent(None)
    stages: dict[str, tuple[ProfilePoint, ...]]
    basis: str = absent("")
    note: str = absent("")
    topology: str = absent("")
    ranges: dict[str, tuple[float, float, float]] | None = absent(None)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Profile:
        """Read its content. Raises ValueError."""
        return read(cls, content)

    def to_dict(self) -> dict[str, Any]:
        return content_of(self)

    def timed(self, stage: str) -> list[StagePoint]:
        """The points of a stage that have a time. Raises ValueError where there are none."""
        points = [point for point in self.stages.get(stage, ()) if isinstance(point, StagePoint)]
        if not points:
            raise ValueError(f"it has no time of {stage}")
        return points

    @property
    def known_as(self) -> str:
        """How its times are known: MEASURED, SCALED or ESTIMATED."""
        return self.basis or MEASURED

    @property
    def is_separated(self) -> bool:
        """Whether every time separates the device's part from the host's."""
        points = (point for points in self.stages.values() for point in points)
        return all(point.is_separated for point in points if isinstance(point, StagePoint))


@dataclass(frozen=True, kw_only=True)
class DeviceEvent:
    """The profiler has measured what its device can do: see ``Profile``; ``self_noise``: of the measurement itself."""

    device: str
    dtype: str
    bandwidth_gb_s: float
    tflop_s: float
    self_noise: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class PointEvent:
    """The profiler has measured a point, number ``done`` of ``of``, or has left it out."""

    stage: str
    point: ProfilePoint
    done: int
    of: int


@dataclass(frozen=True, kw_only=True)
class EndEvent:
    """The profiler has measured everything."""

    model: ModelSizes


@dataclass(frozen=True, kw_only=True)
class ErrorEvent:
    """The profiler cannot measure what it was asked to; ``message`` is for the user."""

    message: str


ProfilerEvent = DeviceEvent | PointEvent | EndEvent | ErrorEvent
_EVENTS: dict[str, type[ProfilerEvent]] = {
    "device": DeviceEvent, "point": PointEvent, "end": EndEvent, "error": ErrorEvent,
}  # fmt: skip
_NAMES = {kind: name for name, kind in _EVENTS.items()}
_EVENT_PREFIX = '{"event"'  # other lines of the profiler are warnings of libraries


def event_line(event: ProfilerEvent) -> str:
    """The event as a line of JSON."""
    return json.dumps({"event": _NAMES[type(event)], **content_of(event)})


def is_event(line: str) -> bool:
    return line.startswith(_EVENT_PREFIX)


def event_of(line: str) -> ProfilerEvent:
    """Read a line of ``event_line``. Raises ValueError or KeyError."""
    content = json.loads(line)
    return read(_EVENTS[content["event"]], content)
