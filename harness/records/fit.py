"""The content of fit.json: what was fitted to the ladders of a run, deployment by deployment.

The records hold numbers; ``capacity.models`` computes with them. A field with a default is newer than some stored
files; the default is the value that those imply. Stored files are never rewritten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field

from harness.content import SCHEMA, Figure, absent, content_of, read
from harness.errors import InconclusiveError
from harness.records.bounds import Bounds
from harness.topology import Knobs

Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True, slots=True)
class Unfitted:
    """A part that could not be fitted, and why."""

    # otherwise a damaged record of a fitted part would be read as one of these
    __pydantic_config__ = ConfigDict(extra="forbid")

    inconclusive: str


def fitted(part: Part | Unfitted) -> Part:
    """A fitted part. Raises InconclusiveError, with the reason, for an unfitted one."""
    if isinstance(part, Unfitted):
        raise InconclusiveError(part.inconclusive)
    return part


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPoint:
    """A rung: its sessions, and its frame step in seconds with an interval."""

    sessions: float
    step_s: float
    low_s: float
    high_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedBetween:
    """Relative standard deviation between whole ladders, known from ``degrees`` (None: exactly).

    ``ladders``: how many determine the level of the step time. ``open_run``: how many times as long as by them a step
    was in the VALID open-loop run with the highest rate, None without one.
    """

    deviation: float
    degrees: int | float | None
    ladders: int
    open_run: float | None = absent(None)


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedStep:
    """Seconds of a frame step: see ``capacity.models.steps``. The line is fitted also if ``kind`` is piecewise.

    ``draws`` [d][values]: equally likely alternatives, by the noise of rungs; ``levels`` [d]: the factor of each, by
    the variation between ladders (none in older files). ``context_frame_s``: what a step takes longer per frame
    of context of all its sessions, None where none shows; the step time is at the contexts of steady state. A
    prediction stores no ``points``.
    """

    intercept_s: float
    slope_s: float
    kind: str
    values: tuple[float, ...]
    knots: tuple[float, ...]
    r_squared: Figure
    noise: Figure
    max_sessions: float
    between: FittedBetween | None = absent(None)
    context_frame_s: float | None = absent(None)
    points: tuple[StepPoint, ...] = absent(())
    draws: tuple[tuple[float, ...], ...]
    levels: tuple[float, ...] = absent(())
    inconclusive: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedSample:
    """``count`` requests, equivalent to ``independent`` independent ones; their values by probability."""

    count: int
    independent: float
    quantiles: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedSpread(FittedSample):
    """The samples of all requests together, and of each class with enough of them."""

    classes: dict[str, FittedSample]


@dataclass(frozen=True, kw_only=True, slots=True)
class StartPoint:
    """Requests sent with the same number of sessions in progress: count, mean step and mean TTFA."""

    sessions: float
    step_s: float
    ttfa_s: float
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedFirstAudio:
    """Time to first audio = (base_s + steps x step time at the start) x a ratio of ``spread``."""

    base_s: float
    steps: float
    starts: str
    residual_quantiles: dict[str, float]
    spread: FittedSpread
    points: tuple[StartPoint, ...] = absent(())
    inconclusive: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedRtf:
    """RTF = mean step time / seconds of a frame x a ratio of ``spread``."""

    spread: FittedSpread
    inconclusive: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StallLevel:
    """The longest stalls, in seconds, of requests with about the same mean step."""

    step_s: float
    count: int
    independent: float
    quantiles: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedStalls:
    """Longest stalls by step time, up to ``reach_s``."""

    reach_s: float
    levels: tuple[StallLevel, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServicePoint:
    """Executions of a stage at one batch size, and their mean seconds."""

    batch_size: int
    executions: int
    mean_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedStage:
    """Service time of a stage: S(b) = alpha_s b + tau0_s."""

    stage: str
    points: tuple[ServicePoint, ...]
    alpha_s: float
    tau0_s: float
    alpha_interval_s: Bounds
    tau0_interval_s: Bounds
    r_squared: Figure
    worst_residual: Figure
    runs_p_value: float | None
    inconclusive: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnfittedStage:
    """A stage whose service time could not be fitted, and why."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    stage: str
    points: tuple[ServicePoint, ...]
    inconclusive: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedScaling:
    """Universal Scalability Law: see ``capacity.models.scaling``. ``peak_sessions``: None if throughput never falls."""

    gamma: float
    sigma: float
    kappa: float
    gamma_interval: tuple[Figure, Figure]
    sigma_interval: tuple[Figure, Figure]
    kappa_interval: tuple[Figure, Figure]
    r_squared: Figure
    peak_sessions: float | None
    largest_measured: float
    inconclusive: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedKv:
    """Room for KV caches of a device: see ``capacity.models.memory.KvRoom``."""

    limit_bytes: float
    bytes_per_token: int
    instances: int
    voice_frames: int
    gpus: int = absent(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExcludedTrial:
    """A trial, or rungs of it, excluded from every fit, and why."""

    trial_id: str
    reasons: tuple[str, ...]


_IN_ORDER = Field(union_mode="left_to_right")  # a part is only read as unfitted if it cannot be read as fitted


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedModel:
    """Everything needed to simulate a device; a prediction stores it as ``model``."""

    step_time: Annotated[FittedStep | Unfitted, _IN_ORDER]
    first_audio: Annotated[FittedFirstAudio | Unfitted, _IN_ORDER]
    rtf: Annotated[FittedRtf | Unfitted, _IN_ORDER]
    stalls: dict[str, FittedStalls]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> FittedModel:
        """Build it from its content. Raises ValueError."""
        return read(cls, content)

    def to_dict(self) -> dict[str, Any]:
        return content_of(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedDeployment:
    """One deployment: the physics of its ladders, and the rate that one device sustains.

    ``max_rate_per_s``: requests/s with every SLO met; None if unknown, for the reason in ``inconclusive``.
    ``stalls``: by class, "" for all together. ``kv``: None if the room for KV caches is unknown.
    """

    deployment: Knobs
    trial_ids: tuple[str, ...]
    stages: tuple[Annotated[FittedStage | UnfittedStage, _IN_ORDER], ...]
    step_time: Annotated[FittedStep | Unfitted, _IN_ORDER]
    first_audio: Annotated[FittedFirstAudio | Unfitted, _IN_ORDER]
    rtf: Annotated[FittedRtf | Unfitted, _IN_ORDER]
    stalls: dict[str, FittedStalls]
    scaling: Annotated[FittedScaling | Unfitted, _IN_ORDER]
    kv: FittedKv | None = None
    max_rate_per_s: float | None
    max_rate_interval: Bounds
    binding: str
    inconclusive: str

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> FittedDeployment:
        """Build it from its content. Raises ValueError."""
        return read(cls, content)

    def to_dict(self) -> dict[str, Any]:
        return content_of(self)

    def rate(self) -> float:
        """Requests/s; 0 if unknown."""
        return self.max_rate_per_s or 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """fit.json. ``best``: the number of the deployment with the highest rate; None if no rate is above 0.

    ``extrapolation``: rates were searched up to this multiple of the most sessions measured. ``confidence``: of the
    intervals of rates. ``traffic_seed``: lets a plan simulate the same sessions again.
    """

    schema: int = SCHEMA
    unit: str
    session_limit: int | None
    extrapolation: float
    confidence: float = 0.95
    traffic_seed: int
    deployments: tuple[FittedDeployment, ...]
    best: int | None
    excluded: tuple[ExcludedTrial, ...]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Fit:
        """Build it from the content of a fit.json. Raises ValueError."""
        return read(cls, content)

    def to_dict(self) -> dict[str, Any]:
        return content_of(self)

    @property
    def best_deployment(self) -> FittedDeployment | None:
        return None if self.best is None else self.deployments[self.best]
