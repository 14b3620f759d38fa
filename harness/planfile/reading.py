"""Reads plan files and mix files: YAML, with a line per mistake that names the file, the key and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from harness import wire
from harness.errors import InputError, PlanError
from harness.host.places import bare_name
from harness.planfile.plan import PlanSpec
from harness.planfile.sections import (
    ClassSpec,
    ClassWithSlosSpec,
    ConfirmSpec,
    DemandSpec,
    DiurnalSpec,
    LadderSpec,
    MixFileSpec,
    MixSpec,
    ObjectiveSpec,
    SearchSpec,
    TraceSpec,
    hint,
)
from harness.topology import TOPOLOGY
from harness.traffic.mix import Mix
from harness.yaml_text import UniqueKeys


def load_plan(path: Path | str) -> PlanSpec:
    """Read a plan from a file. Raises one PlanError with a line per mistake: file, key, and what is allowed."""

    def build(folder: Path, content: dict) -> PlanSpec:
        plan = PlanSpec.model_validate(content, context={"folder": folder})
        plan.traffic_mix()
        plan.script_source()
        plan.demand_curve()
        return plan

    return _load(Path(path), PlanSpec, build)


def deployed_as(
    spec: PlanSpec, topology: str = "", dilate: float | str | None = None, measured: bool = False
) -> PlanSpec:
    """The plan in another topology ("" = its own), with another time dilation (None: its own).

    ``measured``: on this host's own device, where the plan emulates one. Raises InputError for what it cannot have.
    """
    changes: dict[str, Any] = {}
    if topology:
        _check_topology(spec, topology)
        changes[TOPOLOGY] = topology
    if measured and dilate is not None:
        raise InputError("--dilate is for emulated GPUs: leave out --dilate or --no-emulate")
    if measured:
        changes |= {"emulate": None, "dilate": 1.0}
    elif dilate is not None:
        changes["dilate"] = dilate
    if not changes:
        return spec
    try:
        return PlanSpec.model_validate(spec.model_dump(mode="json") | changes, context={"folder": spec._folder})
    except ValidationError as error:
        problems = "; ".join(problem_of(each, PlanSpec) for each in error.errors())
        given = f"--topology {topology}" if topology else f"--dilate {dilate}"
        raise InputError(f"{given}: {problems}") from None


def _check_topology(spec: PlanSpec, topology: str) -> None:
    if topology not in wire.TOPOLOGIES:
        raise InputError(f"--topology {topology}: use one of {', '.join(wire.TOPOLOGIES)}")
    if TOPOLOGY in spec.space:
        raise InputError(f"--topology {topology}: the plan sweeps the topology: leave one of them out")


def load_mix(path: Path | str) -> Mix:
    """Read the mix in a file with ``classes:``, each with weight, length, speakers and (optionally) SLOs.

    Its name defaults to that of the file. Raises one PlanError with a line per mistake.
    """

    def build(folder: Path, content: dict) -> Mix:
        return MixFileSpec.model_validate({"name": bare_name(path, ".yaml", ".yml"), **content}).build(folder)

    return _load(Path(path), MixFileSpec, build)


def _load(path: Path, model: type[BaseModel], build: Callable[[Path, dict], Any]) -> Any:
    try:
        return build(path.parent, read_yaml(path, model))
    except ValidationError as error:
        problems = [problem_of(each, model) for each in error.errors()]
        raise PlanError("\n".join(f"{path}: {problem}" for problem in problems)) from None
    except InputError as error:
        raise PlanError(f"{path}: {error}") from None


def read_yaml(path: Path, model: type[BaseModel]) -> dict:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
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


def problem_of(error: Mapping, model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        *parents, key = error["loc"]
        return f"{where}: unknown key; {hint(str(key), _keys_at(parents, model))}"
    if error["type"] == "missing":
        return f"{where}: missing; it is needed"
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if error["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message}, not {repr(error['input'])[:60]}"


def _keys_at(location: Iterable[str | int], model: type[BaseModel]) -> Iterable[str]:
    """The keys that the model at a location of the file accepts."""
    class_spec = ClassSpec if model is PlanSpec else ClassWithSlosSpec
    models: dict[str, type[BaseModel]] = {"mix": MixSpec, "classes": class_spec, "ladder": LadderSpec}
    models |= {"confirm": ConfirmSpec, "search": SearchSpec, "objective": ObjectiveSpec}
    models |= {"demand": DemandSpec, "diurnal": DiurnalSpec, "trace": TraceSpec}
    for part in location:
        model = models.get(part, model)
    return model.model_fields
