"""The sections of a plan file as frozen, checked models, and the types of their keys."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

from harness import wire
from harness.errors import InputError, PlanError
from harness.records.day import DemandCurve
from harness.records.summary import METRICS
from harness.traffic.arrivals import Trace
from harness.traffic.demand import diurnal, of_trace
from harness.traffic.mix import MIXES, Lengths, Mix, TrafficClass

Whole = Annotated[int, Field(strict=True, ge=1)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, gt=0, le=1)]
Rate = Annotated[float, Field(strict=True, gt=0, le=1e6)]
Scalar = StrictBool | StrictInt | StrictFloat | StrictStr
Value = Scalar | list[Scalar]
DAY_S = 86_400
MAX_OTHERS = 0.05
LEAST_TRIALS = 6  # minimum of a search, however few points its share allows
_METRIC_NAMES = [metric.name for metric in METRICS]
_CLASS_METRIC_NAMES = [metric.name for metric in METRICS if metric.per_class]


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WithSlos(Frozen):
    """A model with the key ``slos``, for which plan files may also use the old name, ``promises``."""

    @model_validator(mode="before")
    @classmethod
    def _by_old_name(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "promises" not in value:
            return value
        if "slos" in value:
            raise ValueError("slos and promises are two names of one key: keep slos")
        return {"slos" if key == "promises" else key: each for key, each in value.items()}


class ClassSpec(Frozen):
    """One traffic class; ``length`` in the form of ``harness.traffic.mix.Lengths.parse``."""

    weight: Positive
    length: Any
    speakers: tuple[Whole, Whole] = (1, 1)


class MixSpec(Frozen):
    """A named mix (only ``name``, in a plan written as ``mix: quick``) or one defined by ``classes``."""

    name: str = "custom"
    classes: Mapping[str, ClassSpec] = Field(default_factory=dict)
    chunk_frames: Annotated[int, Field(strict=True, ge=1, le=wire.MAX_FRAMES)] = 1
    diffusion_steps: Annotated[int, Field(strict=True, ge=1, le=wire.MAX_DIFFUSION_STEPS)] = (
        wire.DEFAULT_DIFFUSION_STEPS
    )
    voices: tuple[Annotated[int, Field(strict=True, ge=0)], ...] = Field((1, 2, 3, 4), min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _known(self) -> MixSpec:
        if not self.classes and self.name not in MIXES:
            raise ValueError(f"no mix is named {self.name!r}; {hint(self.name, MIXES)}; or write out its classes")
        return self

    def build(self, folder: Path) -> Mix:
        """The Mix; ``folder`` is where relative paths start. Raises PlanError."""
        classes = MIXES[self.name].classes if not self.classes else self._written_out(folder)
        return Mix(self.name, tuple(classes), self.chunk_frames, self.voices, self.diffusion_steps)

    def _written_out(self, folder: Path) -> Iterable[TrafficClass]:
        for name, spec in self.classes.items():
            try:
                yield TrafficClass(name, spec.weight, Lengths.parse(spec.length, folder), spec.speakers)
            except InputError as error:
                raise PlanError(f"mix.classes.{name}: {error}") from None


class ClassWithSlosSpec(WithSlos, ClassSpec):
    """One traffic class of a mix file, with its SLOs."""

    slos: dict[str, float] = Field(default_factory=dict)


class MixFileSpec(MixSpec):
    """A mix in its own file: its classes."""

    classes: Mapping[str, ClassWithSlosSpec] = Field(min_length=1)

    def build(self, folder: Path) -> Mix:
        return super().build(folder).with_slos({name: spec.slos for name, spec in self.classes.items()})


class LadderSpec(Frozen):
    """The closed-loop ladder of a trial: numbers of sessions, and the longest time that each is held, in seconds.

    With ``precision`` a rung ends early, once its rate is steady and known to that share. Further ladders of the best
    deployment have one more rung, near the limit of the SLOs, or go on where no SLO was violated.
    """

    sessions: tuple[Whole, ...] = Field((1, 2, 4, 8, 16), min_length=1)
    seconds: Annotated[float, Field(strict=True)] = 6.0
    precision: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = None

    @field_validator("seconds")
    @classmethod
    def _long_enough(cls, seconds: float) -> float:
        if not 2 <= seconds <= DAY_S:
            raise ValueError(f"must lie in 2 to {DAY_S}, not {seconds:g}")
        return seconds

    @field_validator("sessions")
    @classmethod
    def _ascending(cls, sessions: tuple[int, ...]) -> tuple[int, ...]:
        if any(low >= high for low, high in itertools.pairwise(sessions)):
            raise ValueError("must rise from rung to rung")
        return sessions


class ConfirmSpec(Frozen):
    """The open-loop confirmation runs: shares of the predicted highest rate, and the seconds of each run."""

    load_share: tuple[Annotated[float, Field(strict=True, gt=0, le=10)], ...] = Field((0.5, 0.7, 0.85), min_length=1)
    seconds: Annotated[float, Field(strict=True)] = 30.0

    @field_validator("seconds")
    @classmethod
    def _long_enough(cls, seconds: float) -> float:
        if not (5 <= seconds <= DAY_S and float(seconds).is_integer()):  # Locust runs for whole seconds
            raise ValueError(f"must be whole seconds from 5 to {DAY_S}, not {seconds:g}")
        return seconds


class ObjectiveSpec(Frozen):
    """A metric of a rung's summary to maximise or minimise, among rungs that meet limits on others."""

    maximise: str | None = None
    minimise: str | None = None
    at_most: dict[str, float] = Field(default_factory=dict)
    at_least: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_metric(self) -> ObjectiveSpec:
        if (self.maximise is None) == (self.minimise is None):
            raise ValueError("needs either maximise or minimise, with a metric such as frames_per_s")
        for name in self.names():
            traffic_class, dot, metric = name.rpartition(".")
            known = _METRIC_NAMES if not dot else _CLASS_METRIC_NAMES
            if metric not in known:
                raise ValueError(f"{name}: unknown metric{' of a class' if dot else ''}; {hint(metric, known)}")
        return self

    def names(self) -> list[str]:
        """Every metric that it names, the optimised one first; ``<class>.`` before one of a class."""
        best = [each for each in (self.maximise, self.minimise) if each is not None]
        return [*best, *self.at_most, *self.at_least]


class SearchSpec(Frozen):
    """How the space is searched: every point (``grid``), or by a model of the stages (``model``).

    ``tpe`` and ``random`` are Optuna's own samplers, without a model of the stages. A search ends when no untried point
    is likely to beat the best by more than ``margin`` (with probability ``sure``), or after ``share`` of the points or
    ``trials``, whichever comes first.
    """

    kind: Literal["grid", "model", "tpe", "random"] = "model"
    margin: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.02
    sure: Annotated[float, Field(strict=True, ge=0.5, lt=1)] = 0.9
    share: Share = 0.1
    trials: Whole | None = None
    objective: ObjectiveSpec | None = None  # default: the highest rate that one device sustains under the SLOs

    @model_validator(mode="before")
    @classmethod
    def _by_kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    def most(self, points: int) -> int:
        """The most points to try, of ``points``."""
        if self.kind == "grid":
            return points
        return min(points, max(LEAST_TRIALS, int(points * self.share)), self.trials or points)


class ProfileSpec(Frozen):
    """A profile file; with the speed of another GPU, as reached by copies and matrix products, scaled to that GPU."""

    profile: str
    bandwidth_gb_s: Positive | None = None
    tflop_s: Positive | None = None
    kv_room_gb: Positive | None = None  # for KV caches beside the weights; default: that of the profile's GPU

    @model_validator(mode="before")
    @classmethod
    def _by_path(cls, value: Any) -> Any:
        return {"profile": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _both_speeds(self) -> ProfileSpec:
        if (self.bandwidth_gb_s is None) != (self.tflop_s is None):
            raise ValueError("another GPU needs both bandwidth_gb_s and tflop_s: give both")
        if self.kv_room_gb and not self.bandwidth_gb_s:
            raise ValueError("kv_room_gb applies to another GPU: give its bandwidth_gb_s and tflop_s too")
        return self


class DiurnalSpec(Frozen):
    """A demand that swings between two rates, requests/s, every 24 hours; ``peak_hour``: when it is highest."""

    peak_qps: Rate
    trough_qps: Annotated[float, Field(strict=True, ge=0, le=1e6)]
    peak_hour: Annotated[float, Field(strict=True, ge=0, le=24)] = 20.0

    @model_validator(mode="after")
    def _in_order(self) -> DiurnalSpec:
        if self.trough_qps > self.peak_qps:
            raise ValueError(f"trough_qps {self.trough_qps:g} is above peak_qps {self.peak_qps:g}: exchange them")
        return self


class TraceSpec(Frozen):
    """A file of arrivals, as for ``locust --trace``, whose rates are the demand; stretched and scaled if asked."""

    file: str = Field(min_length=1)
    hours: Annotated[float, Field(strict=True, gt=0, le=24 * 31)] | None = None
    mean_qps: Rate | None = None

    @model_validator(mode="before")
    @classmethod
    def _by_path(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) else value


class DemandSpec(Frozen):
    """The demand over a day, and what an autoscaler for it may do; its target is planned where none is given."""

    diurnal: DiurnalSpec | None = None
    trace: TraceSpec | None = None
    start_seconds: Annotated[float, Field(strict=True, ge=0, le=DAY_S)] = 300.0
    poll_seconds: Annotated[float, Field(strict=True, ge=1, le=3600)] = 30.0
    stabilisation_seconds: Annotated[float, Field(strict=True, ge=0, le=DAY_S)] = 300.0
    minimum: Whole = 1
    maximum: Whole | None = None
    target_sessions: Positive | None = None

    @model_validator(mode="after")
    def _one_demand(self) -> DemandSpec:
        if (self.diurnal is None) == (self.trace is None):
            raise ValueError("needs either diurnal: {peak_qps: 5, trough_qps: 1} or trace: FILE")
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError(f"maximum {self.maximum} is below minimum {self.minimum}: raise it")
        return self

    def curve(self, folder: Path) -> DemandCurve:
        """The rates; ``folder`` is where relative paths start. Raises PlanError."""
        if self.diurnal:
            return diurnal(self.diurnal.peak_qps, self.diurnal.trough_qps, self.diurnal.peak_hour)
        assert self.trace is not None
        try:
            return of_trace(Trace.read(folder / self.trace.file), self.trace.hours, self.trace.mean_qps)
        except InputError as error:
            raise PlanError(f"demand.trace: {error}") from None


def hint(word: str, known: Iterable[str]) -> str:
    """The known word that is nearest, or all of them, as the end of an error message."""
    known = list(known)
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
