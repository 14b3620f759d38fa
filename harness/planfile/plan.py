"""A plan: the traffic, the SLOs, the targets, the search space and the budget, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from harness import wire
from harness.clock import MOST_DILATION
from harness.errors import PlanError
from harness.planfile.sections import (
    MAX_OTHERS,
    ConfirmSpec,
    DemandSpec,
    LadderSpec,
    MixSpec,
    Positive,
    ProfileSpec,
    Rate,
    SearchSpec,
    Share,
    Value,
    Whole,
    WithSlos,
    hint,
)
from harness.planfile.space import Column, check_knob, columns_of, is_knob_of, numbers_of, points_of, size_of
from harness.records.day import DemandCurve
from harness.records.slo import Slo
from harness.topology import TOPOLOGY, Knobs
from harness.traffic.mix import MIXES, Mix, ScriptSource

FEW_POINTS = 24  # at most so many points are all measured if a plan sets no search


class PlanSpec(WithSlos):
    """A plan: model, traffic, SLOs, targets, search space, budget. Units are in the names; rates in requests/s."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)
    preset: Literal["tiny", "1.5b", "7b"]
    seed: Annotated[int, Field(strict=True, ge=0)] = 1
    mix: MixSpec
    scripts: str | None = None  # folder of .txt scripts, cut or repeated to the mix's lengths; default: generated
    emulate: str | None = None  # profile whose times the stages take instead of computing
    dilate: Literal["auto"] | Annotated[float, Field(strict=True, ge=1, le=MOST_DILATION)] = 1.0  # of emulated time
    gpus: Annotated[int, Field(strict=True, ge=1, le=64)] = 1  # per server, real or emulated
    device: Literal["auto", "cpu", "gpu"] = "auto"  # auto: a GPU if the server's host has one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    topology: Literal["staged", "fused"] = "staged"  # of the frame path; see harness.topology
    parameters: dict[str, str | int | float] = Field(default_factory=dict)  # <model>.<parameter> of a config.pbtxt
    slos: dict[str, dict[str, float]] = Field(min_length=1)
    targets_qps: tuple[Rate, ...] = Field(min_length=1)
    space: dict[str, tuple[Value, ...]] = Field(default_factory=dict)
    search: SearchSpec | None = None  # default: grid for few points, model for many
    ladder: LadderSpec = LadderSpec()
    confirm: ConfirmSpec = ConfirmSpec()
    budget_minutes: Positive = 60.0
    utilisation_cap: Share = 0.85
    routing: Literal["least_loaded", "round_robin", "random"] = "least_loaded"  # how sessions are given to devices
    confidence: Annotated[float, Field(strict=True, ge=0.5, le=0.99)] = 0.95  # limited: 200 draws resolve no more
    max_error: Share = 0.25
    max_others: Positive = MAX_OTHERS  # CPU of others and stolen CPU, as a share of the cores that a run needs
    prices: dict[str, Positive] = Field(default_factory=dict)  # per hour of a device, by type (part of its name)
    currency: str = Field("USD", min_length=1, max_length=8)
    growth_per_month: Annotated[float, Field(strict=True)] | None = None  # of the rates; 0.1 = 10% more
    fleet: Whole | None = None  # existing devices
    demand: DemandSpec | None = None  # over a day, for static and elastic fleets
    jobs: str | None = None  # file of tasks that run beside the streams
    profiles: dict[str, ProfileSpec] = Field(default_factory=dict)  # of other types of device, to predict
    valid_days: Annotated[int, Field(strict=True, ge=1, le=3650)] = 90  # until the answer expires
    _folder: Path = PrivateAttr(Path("."))

    def model_post_init(self, context: Any) -> None:
        self._folder = (context or {}).get("folder", Path("."))

    @field_validator("slos", mode="before")
    @classmethod
    def _readable_slos(cls, slos: Any) -> Any:
        if isinstance(slos, Mapping):
            for traffic_class, limits in slos.items():
                if not isinstance(limits, Mapping) or not limits:
                    raise ValueError(f"{traffic_class}: needs at least one SLO such as ttfa_p95_s: 1.0")
                for key, limit in limits.items():
                    _parse_slo(traffic_class, str(key), limit)
        return slos

    @field_validator("growth_per_month")
    @classmethod
    def _a_share(cls, growth: float | None) -> float | None:
        if growth is not None and not 0 <= growth <= 1:
            raise ValueError(
                f"must lie in 0 to 1, not {growth:g}: 0.1 means 10% more each month, and 1 that they double"
            )
        return growth

    @field_validator("space")
    @classmethod
    def _known_knobs(cls, space: dict[str, tuple[Value, ...]]) -> dict[str, tuple[Value, ...]]:
        for knob, values in space.items():
            check_knob(knob, values)
        return space

    @model_validator(mode="after")
    def _dilates_emulated_time(self) -> PlanSpec:
        if self.dilate != 1 and not self.emulate:
            raise ValueError("dilate: only emulated GPUs can run slower: leave it out, or give a profile to emulate")
        return self

    @model_validator(mode="after")
    def _knobs_of_its_topologies(self) -> PlanSpec:
        if TOPOLOGY in self.space and self.topology != wire.STAGED:
            raise ValueError(f"topology is given twice: leave {TOPOLOGY}: out of space, or out of the plan")
        for knob in self.space:
            if not any(is_knob_of(topology, knob) for topology in self.topologies):
                other = next(each for each in wire.TOPOLOGIES if each not in self.topologies)
                raise ValueError(
                    f"space: {knob}: the {self.topologies[0]} topology has no such knob: leave it out, or set "
                    f"topology: {other}, or sweep both with space: {{topology: [staged, fused]}}"
                )
        return self

    @property
    def topologies(self) -> tuple[str, ...]:
        """The topologies that the plan deploys, in order."""
        return tuple(str(each) for each in self.space.get(TOPOLOGY, (self.topology,)))

    @model_validator(mode="after")
    def _batches_that_fit(self) -> PlanSpec:
        columns = self.columns()
        for stage in wire.STAGES:
            preferred, most = (numbers_of(f"{stage}.{knob}", columns) for knob in ("preferred_batch", "max_batch"))
            if preferred and most and max(preferred) > min(most):
                raise ValueError(
                    f"space: {stage}: preferred_batch {max(preferred)} is above max_batch {min(most)}, which it is "
                    "combined with: lower the one or raise the other"
                )
        return self

    @model_validator(mode="after")
    def _slos_of_the_mix(self) -> PlanSpec:
        known = self.mix.classes or [each.name for each in MIXES[self.mix.name].classes]
        for name in self.slos:
            if name not in known:
                raise ValueError(f"slos.{name}: mix {self.mix.name} has no such class; {hint(name, known)}")
        return self

    @model_validator(mode="after")
    def _objective_of_the_mix(self) -> PlanSpec:
        objective = self.search.objective if self.search else None
        known = self.mix.classes or [each.name for each in MIXES[self.mix.name].classes]
        for name in objective.names() if objective else ():
            traffic_class, dot, _ = name.rpartition(".")
            if dot and traffic_class not in known:
                problem = f"mix {self.mix.name} has no class {traffic_class!r}; {hint(traffic_class, known)}"
                raise ValueError(f"search.objective: {name}: {problem}")
        return self

    def traffic_mix(self) -> Mix:
        """The mix of the requests; a point of the space may set values that all requests share."""
        mix = self.mix.build(self._folder).with_slos(self.slos)
        return mix.of_scripts(self.script_source()) if mix.speaks_whole_scripts else mix

    def script_source(self) -> ScriptSource:
        """The source of the requests' scripts."""
        return ScriptSource.from_folder(self._folder / self.scripts) if self.scripts else ScriptSource()

    def profile_path(self) -> Path | None:
        """The profile to emulate; relative paths start at the plan's folder."""
        return self._folder / self.emulate if self.emulate else None

    def demand_path(self) -> Path | None:
        """The trace of the demand; relative paths start at the plan's folder."""
        traced = self.demand.trace if self.demand else None
        return self._folder / traced.file if traced else None

    def demand_curve(self) -> DemandCurve | None:
        """The demand over a day, if the plan has one. Raises PlanError for a trace that cannot be read."""
        return None if self.demand is None else self.demand.curve(self._folder)

    def jobs_path(self) -> Path | None:
        """The file of tasks beside the streams; relative paths start at the plan's folder."""
        return self._folder / self.jobs if self.jobs else None

    def profile_paths(self) -> dict[str, Path]:
        """Profiles of other types of device, by type; relative paths start at the plan's folder."""
        return {name: self._folder / given.profile for name, given in self.profiles.items()}

    def slo_list(self) -> tuple[Slo, ...]:
        """Every SLO, in the order of the plan."""
        each = ((name, key, limit) for name, limits in self.slos.items() for key, limit in limits.items())
        return tuple(Slo.parse(*slo) for slo in each)

    def points(self) -> list[Knobs]:
        """The points of the space: every combination, as ``{"<stage>.<knob>": value}``, without repetition.

        A bare stage knob is expanded to each stage of the frame path; one that names its stage takes precedence.
        """
        return points_of(self.columns())

    def columns(self) -> tuple[Column, ...]:
        """The space as columns of what each value sets."""
        return columns_of(self.space, self.topology)

    def size(self) -> int:
        """Number of combinations of the space, counting only knobs that their topology has."""
        return size_of(self.space, self.topologies)

    def searched(self) -> SearchSpec:
        """The search of the space, with defaults filled in."""
        return self.search or SearchSpec(kind="grid" if self.size() <= FEW_POINTS else "model")


def _parse_slo(traffic_class: str, key: str, limit: Any) -> None:
    try:
        Slo.parse(traffic_class, key, limit)
    except PlanError as error:
        raise ValueError(f"{traffic_class}: {error}") from None
