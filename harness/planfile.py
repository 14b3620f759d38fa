"""A PLAN.yaml as frozen, checked models: the traffic, the SLOs, the targets, the search space and the budget."""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from harness import wire
from harness.errors import InputError, PlanError
from harness.host.places import bare_name
from harness.records.slo import Slo
from harness.records.summary import METRICS
from harness.topology import ENGINE, KEY, TOPOLOGY, applicable, has_knob
from harness.traffic.mix import MIXES, Lengths, Mix, ScriptSource, TrafficClass

STAGE_KNOBS = {
    "delay_us": (0, 10_000_000),
    "max_batch": (1, 1024),
    "preferred_batch": (0, 1024),
    "instances": (1, 64),
}
KNOBS = {
    **STAGE_KNOBS,
    **{f"{stage}.{knob}": limits for stage in wire.STAGES for knob, limits in STAGE_KNOBS.items()},
    "entry.instances": (1, 64),
    f"{ENGINE}.max_batch": (1, 1024),
    f"{ENGINE}.instances": (1, 64),
    "chunk_frames": (1, wire.MAX_FRAMES),
    "diffusion_steps": (1, wire.MAX_DIFFUSION_STEPS),
}
"""Every knob of a search space, and its lowest and highest value. A bare stage knob sets that of all stages.

``topology`` is one too, with the values ``staged`` and ``fused``; knobs of ``engine`` belong to the fused topology.
Any other key of a config.pbtxt is set as ``<model>:<path>``, as ``triton.config.set_key`` takes it.
"""

Whole = Annotated[int, Field(strict=True, ge=1)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, gt=0, le=1)]
Rate = Annotated[float, Field(strict=True, gt=0, le=1e6)]
Scalar = StrictBool | StrictInt | StrictFloat | StrictStr
Value = Scalar | list[Scalar]
DAY_S = 86_400
MAX_OTHERS = 0.05
FEW_POINTS = 24  # at most so many points are all measured if a plan sets no search
LEAST_TRIALS = 6  # minimum of a search, however few points its share allows
_METRIC_NAMES = [metric.name for metric in METRICS]
_CLASS_METRIC_NAMES = [metric.name for metric in METRICS if metric.per_class]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _WithSlos(_Frozen):
    """A model with the key ``slos``, for which plan files may also use the old name, ``promises``."""

    @model_validator(mode="before")
    @classmethod
    def _by_old_name(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "promises" not in value:
            return value
        if "slos" in value:
            raise ValueError("slos and promises are two names of one key: keep slos")
        return {"slos" if key == "promises" else key: each for key, each in value.items()}


class ClassSpec(_Frozen):
    """One traffic class; ``length`` in the form of ``harness.traffic.mix.Lengths.parse``."""

    weight: Positive
    length: Any
    speakers: tuple[Whole, Whole] = (1, 1)


class MixSpec(_Frozen):
    """A named mix (only ``name``, in a plan written as ``mix: quick``) or one defined by ``classes``."""

    name: str = "custom"
    classes: dict[str, ClassSpec] = Field(default_factory=dict)
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
            raise ValueError(f"no mix is named {self.name!r}; {_hint(self.name, MIXES)}; or write out its classes")
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


class ClassWithSlosSpec(_WithSlos, ClassSpec):
    """One traffic class of a mix file, with its SLOs."""

    slos: dict[str, float] = Field(default_factory=dict)


class MixFileSpec(MixSpec):
    """A mix in its own file: its classes."""

    classes: dict[str, ClassWithSlosSpec] = Field(min_length=1)

    def build(self, folder: Path) -> Mix:
        return super().build(folder).with_slos({name: spec.slos for name, spec in self.classes.items()})


class LadderSpec(_Frozen):
    """The closed-loop ladder of a trial: numbers of sessions, and the longest time that each is held, in seconds.

    With ``precision`` a rung ends early, once its rate is steady and known to that share.
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


class ConfirmSpec(_Frozen):
    """The open-loop confirmation runs: shares of the predicted highest rate, and the seconds of each run."""

    load_share: tuple[Annotated[float, Field(strict=True, gt=0, le=10)], ...] = Field((0.5, 0.7, 0.85), min_length=1)
    seconds: Annotated[float, Field(strict=True)] = 30.0

    @field_validator("seconds")
    @classmethod
    def _long_enough(cls, seconds: float) -> float:
        if not (5 <= seconds <= DAY_S and seconds.is_integer()):  # Locust runs for whole seconds
            raise ValueError(f"must be whole seconds from 5 to {DAY_S}, not {seconds:g}")
        return seconds


class ObjectiveSpec(_Frozen):
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
                raise ValueError(f"{name}: unknown metric{' of a class' if dot else ''}; {_hint(metric, known)}")
        return self

    def names(self) -> list[str]:
        """Every metric that it names, the optimised one first; ``<class>.`` before one of a class."""
        best = self.maximise if self.maximise is not None else self.minimise
        return [best, *self.at_most, *self.at_least]


class SearchSpec(_Frozen):
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


class ProfileSpec(_Frozen):
    """A profile file; with the speed of another card, as reached by copies and matrix products, scaled to that card."""

    profile: str
    bandwidth_gb_s: Positive | None = None
    tflop_s: Positive | None = None
    kv_room_gb: Positive | None = None  # for KV caches beside the weights; default: that of the profile's card

    @model_validator(mode="before")
    @classmethod
    def _by_path(cls, value: Any) -> Any:
        return {"profile": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _both_speeds(self) -> ProfileSpec:
        if (self.bandwidth_gb_s is None) != (self.tflop_s is None):
            raise ValueError("another card needs both bandwidth_gb_s and tflop_s: give both")
        if self.kv_room_gb and not self.bandwidth_gb_s:
            raise ValueError("kv_room_gb applies to another card: give its bandwidth_gb_s and tflop_s too")
        return self


class PlanSpec(_WithSlos):
    """A plan: model, traffic, SLOs, targets, search space, budget. Units are in the names; rates in requests/s."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)
    preset: Literal["tiny", "1.5b", "7b"]
    seed: Annotated[int, Field(strict=True, ge=0)] = 1
    mix: MixSpec
    scripts: str | None = None  # folder of .txt scripts, cut or repeated to the mix's lengths; default: generated
    emulate: str | None = None  # profile whose times the stages take instead of computing
    gpus: Annotated[int, Field(strict=True, ge=1, le=64)] = 1  # per server, real or emulated
    device: Literal["auto", "cpu", "gpu"] = "auto"  # auto: a GPU if the server's host has one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    topology: Literal[wire.STAGED, wire.FUSED] = wire.STAGED  # of the frame path; see harness.topology
    parameters: dict[str, str | int | float] = Field(default_factory=dict)  # <model>.<parameter> of a config.pbtxt
    slos: dict[str, dict[str, float]] = Field(min_length=1)
    targets_qps: tuple[Rate, ...] = Field(min_length=1)
    space: dict[str, tuple[Value, ...]] = Field(default_factory=dict)
    search: SearchSpec | None = None  # default: grid for few points, model for many
    ladder: LadderSpec = LadderSpec()
    confirm: ConfirmSpec = ConfirmSpec()
    budget_minutes: Positive = 60.0
    utilisation_cap: Share = 0.85
    confidence: Annotated[float, Field(strict=True, ge=0.5, le=0.99)] = 0.95  # limited: 200 draws resolve no more
    max_error: Share = 0.25
    max_others: Positive = MAX_OTHERS  # CPU of others and stolen CPU, as a share of the cores that a run needs
    prices: dict[str, Positive] = Field(default_factory=dict)  # per hour of a device, by type (part of its name)
    currency: str = Field("USD", min_length=1, max_length=8)
    growth_per_month: Annotated[float, Field(strict=True)] | None = None  # of the rates; 0.1 = 10% more
    fleet: Whole | None = None  # existing devices
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
            _check_knob(knob, values)
        return space

    @model_validator(mode="after")
    def _knobs_of_its_topologies(self) -> PlanSpec:
        if TOPOLOGY in self.space and self.topology != wire.STAGED:
            raise ValueError(f"topology is given twice: leave {TOPOLOGY}: out of space, or out of the plan")
        for knob in self.space:
            if not any(self._turns(topology, knob) for topology in self.topologies):
                other = next(each for each in wire.TOPOLOGIES if each not in self.topologies)
                raise ValueError(
                    f"space: {knob}: the {self.topologies[0]} topology has no such knob: leave it out, or set "
                    f"topology: {other}, or sweep both with space: {{topology: [staged, fused]}}"
                )
        return self

    @property
    def topologies(self) -> tuple[str, ...]:
        """The topologies that the plan deploys, in order."""
        return self.space.get(TOPOLOGY, (self.topology,))

    def _turns(self, topology: str, knob: str) -> bool:
        return any(has_knob(topology, each) for each in _written_out(knob, None))

    @model_validator(mode="after")
    def _batches_that_fit(self) -> PlanSpec:
        for stage in wire.STAGES:
            preferred, most = (self._values(f"{stage}.{knob}") for knob in ("preferred_batch", "max_batch"))
            if preferred and most and max(preferred) > min(most):
                raise ValueError(
                    f"space: {stage}: preferred_batch {max(preferred)} is above max_batch {min(most)}, which it is "
                    "combined with: lower the one or raise the other"
                )
        return self

    def _values(self, knob: str) -> list[Value]:
        """The values that the points of the space give a knob; the last column takes precedence."""
        columns = [[value[knob] for value in column if knob in value] for column in self.columns()]
        return next((values for values in reversed(columns) if values), [])

    @model_validator(mode="after")
    def _slos_of_the_mix(self) -> PlanSpec:
        known = self.mix.classes or [each.name for each in MIXES[self.mix.name].classes]
        for name in self.slos:
            if name not in known:
                raise ValueError(f"slos.{name}: mix {self.mix.name} has no such class; {_hint(name, known)}")
        return self

    @model_validator(mode="after")
    def _objective_of_the_mix(self) -> PlanSpec:
        objective = self.search and self.search.objective
        known = self.mix.classes or [each.name for each in MIXES[self.mix.name].classes]
        for name in objective.names() if objective else ():
            traffic_class, dot, _ = name.rpartition(".")
            if dot and traffic_class not in known:
                problem = f"mix {self.mix.name} has no class {traffic_class!r}; {_hint(traffic_class, known)}"
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

    def profile_paths(self) -> dict[str, Path]:
        """Profiles of other types of device, by type; relative paths start at the plan's folder."""
        return {name: self._folder / given.profile for name, given in self.profiles.items()}

    def slo_list(self) -> tuple[Slo, ...]:
        """Every SLO, in the order of the plan."""
        each = ((name, key, limit) for name, limits in self.slos.items() for key, limit in limits.items())
        return tuple(Slo.parse(*slo) for slo in each)

    def points(self) -> list[dict[str, Value]]:
        """Every combination of the space, as ``{"<stage>.<knob>": value}``; one empty point where nothing is swept.

        A bare stage knob is expanded to each stage of the frame path; one that names its stage takes precedence. A
        point has only the knobs of its topology: combinations that differ only in others are one point.
        """
        columns = self.columns()
        points = (
            applicable({knob: value for part in parts for knob, value in part.items()})
            for parts in itertools.product(*columns)
        )
        return list({json.dumps(point, sort_keys=True): point for point in points}.values())

    def columns(self) -> tuple[tuple[dict[str, Value], ...], ...]:
        """The space as columns of what each value sets: a bare stage knob comes before those that name their stage.

        The topology comes first, so that a grid changes it, and restarts a server, as rarely as possible.
        """
        space = self.space if self.topology == wire.STAGED else {TOPOLOGY: (self.topology,), **self.space}
        in_order = sorted(space.items(), key=lambda item: (item[0] != TOPOLOGY, item[0] not in STAGE_KNOBS))
        return tuple(tuple(_written_out(knob, value) for value in values) for knob, values in in_order)

    def size(self) -> int:
        """Number of combinations of the space, counting only knobs that their topology has."""
        knobs = [(knob, len(values)) for knob, values in self.space.items() if knob != TOPOLOGY]
        return sum(
            math.prod(count for knob, count in knobs if self._turns(topology, knob)) for topology in self.topologies
        )

    def searched(self) -> SearchSpec:
        """The search of the space, with defaults filled in."""
        return self.search or SearchSpec(kind="grid" if self.size() <= FEW_POINTS else "model")


def load_plan(path: Path | str) -> PlanSpec:
    """Read a plan from a file. Raises one PlanError with a line per mistake: file, key, and what is allowed."""

    def build(folder: Path, content: dict) -> PlanSpec:
        plan = PlanSpec.model_validate(content, context={"folder": folder})
        plan.traffic_mix()
        plan.script_source()
        return plan

    return _load(Path(path), PlanSpec, build)


def deployed_as(spec: PlanSpec, topology: str) -> PlanSpec:
    """The plan in another topology; "" = its own. Raises InputError for one that it cannot have."""
    if not topology:
        return spec
    if topology not in wire.TOPOLOGIES:
        raise InputError(f"--topology {topology}: use one of {', '.join(wire.TOPOLOGIES)}")
    if TOPOLOGY in spec.space:
        raise InputError(f"--topology {topology}: the plan sweeps the topology: leave one of them out")
    try:
        return PlanSpec.model_validate(
            spec.model_dump(mode="json") | {TOPOLOGY: topology}, context={"folder": spec._folder}
        )
    except ValidationError as error:
        problems = "; ".join(_problem(each, PlanSpec) for each in error.errors())
        raise InputError(f"--topology {topology}: {problems}") from None


def load_mix(path: Path | str) -> Mix:
    """Read the mix in a file with ``classes:``, each with weight, length, speakers and (optionally) SLOs.

    Its name defaults to that of the file. Raises one PlanError with a line per mistake.
    """

    def build(folder: Path, content: dict) -> Mix:
        return MixFileSpec.model_validate({"name": bare_name(path, ".yaml", ".yml"), **content}).build(folder)

    return _load(Path(path), MixFileSpec, build)


def _load(path: Path, model: type[BaseModel], build: Callable[[Path, dict], Any]) -> Any:
    try:
        return build(path.parent, _read_yaml(path, model))
    except ValidationError as error:
        problems = [_problem(each, model) for each in error.errors()]
        raise PlanError("\n".join(f"{path}: {problem}" for problem in problems)) from None
    except InputError as error:
        raise PlanError(f"{path}: {error}") from None


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses a repeated key: the safe loader silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path, model: type[BaseModel]) -> dict:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise PlanError(f"cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise PlanError(f"{line}no valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PlanError(f"no valid YAML: {error}") from None
    if not isinstance(content, dict):
        needed = [f"'{key}:'" for key, field in model.model_fields.items() if field.is_required()]
        raise PlanError(f"has no keys; start with {', '.join(needed)}")
    return content


def _problem(error: Mapping, model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        *parents, key = error["loc"]
        return f"{where}: unknown key; {_hint(str(key), _keys_at(parents, model))}"
    if error["type"] == "missing":
        return f"{where}: missing; it is needed"
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if error["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message}, not {repr(error['input'])[:60]}"


def _keys_at(location: Iterable[str | int], model: type[BaseModel]) -> Iterable[str]:
    """The keys that the model at a location of the file accepts."""
    class_spec = ClassSpec if model is PlanSpec else ClassWithSlosSpec
    models = {"mix": MixSpec, "classes": class_spec, "ladder": LadderSpec, "confirm": ConfirmSpec}
    models |= {"search": SearchSpec, "objective": ObjectiveSpec}
    for part in location:
        model = models.get(part, model)
    return model.model_fields


def _hint(word: str, known: Iterable[str]) -> str:
    known = list(known)
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"


def _parse_slo(traffic_class: str, key: str, limit: Any) -> None:
    try:
        Slo.parse(traffic_class, key, limit)
    except PlanError as error:
        raise ValueError(f"{traffic_class}: {error}") from None


def _check_knob(knob: str, values: tuple[Value, ...]) -> None:
    if not values or any(value in values[:index] for index, value in enumerate(values)):
        raise ValueError(f"{knob}: needs one value or more, each different, not {list(values)}")
    model, colon, _ = knob.partition(KEY)
    if colon:
        known = (*wire.MODELS, wire.ENGINE)
        if model not in known:
            raise ValueError(f"{knob}: unknown model; {_hint(model, known)}")
        return
    if knob == TOPOLOGY:
        if not all(value in wire.TOPOLOGIES for value in values):
            raise ValueError(f"{knob}: must be {' or '.join(wire.TOPOLOGIES)}, not {list(values)}")
        return
    if knob not in KNOBS:
        raise ValueError(
            f"{knob}: unknown knob; {_hint(knob, (TOPOLOGY, *KNOBS))}; or <model>:<path of a key of its config.pbtxt>"
        )
    low, high = KNOBS[knob]
    if not all(type(value) is int and low <= value <= high for value in values):
        raise ValueError(f"{knob}: needs different whole numbers from {low} to {high}, not {list(values)}")


def _written_out(knob: str, value: Value) -> dict[str, Value]:
    return {f"{stage}.{knob}": value for stage in wire.STAGES} if knob in STAGE_KNOBS else {knob: value}
