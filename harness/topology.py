"""The two ways to deploy the frame path, staged and fused: which stages, models and knobs each has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from harness import wire
from harness.errors import InputError

KnobScalar = int | float | bool | str
KnobValue = KnobScalar | Sequence[KnobScalar]
Knobs = Mapping[str, KnobValue]
"""A deployment, or a point of a search space: by knob, e.g. ``{"diffusion_decoder.delay_us": 2000}``."""

TOPOLOGY = "topology"  # the knob of a point that says how it is deployed; default: staged
ENGINE = "engine"  # prefix of the fused engine's knobs
ENGINE_KNOBS = ("max_batch", "instances")
KEY = ":"  # between a model and the path of a key of its config.pbtxt
FRAME_PATHS = {wire.STAGED: wire.STAGES, wire.FUSED: (wire.ENGINE,)}
EVERY_STAGE = (*wire.STAGES, wire.ENGINE)  # of the frame path, in any topology
_OF_EMULATION = {"emulate": "emulate", wire.DILATION: "dilate"}  # parameters, and the key of a plan for each
KV_MODELS = {wire.STAGED: wire.LLM, wire.FUSED: wire.ENTRY}  # which processes hold the KV caches


def topology_of(point: Knobs) -> str:
    """The topology of a point; staged for one stored before there were two."""
    return str(point.get(TOPOLOGY, wire.STAGED))


def number_of(knobs: Knobs, knob: str, default: int) -> int:
    """The value of a knob that is a whole number; ``default`` where it is not set. Raises InputError for any other."""
    value = knobs.get(knob, default)
    if not isinstance(value, int | float):
        raise InputError(f"{knob} is {value!r}: it must be a whole number")
    return int(value)


def frame_path(point: Knobs) -> tuple[str, ...]:
    """The stages that a frame passes at a point, in order."""
    return FRAME_PATHS[topology_of(point)]


def owner_of(stage: str) -> str:
    """The prefix of a stage's knobs: ``engine`` for the fused engine."""
    return ENGINE if stage == wire.ENGINE else stage


def kv_holder(point: Knobs) -> str:
    """The stage whose processes hold the KV caches."""
    return wire.ENGINE if topology_of(point) == wire.FUSED else wire.LLM


def instances_of(point: Knobs, stage: str, gpus: int, default: int = 1) -> int:
    """Processes of a stage of the frame path on so many GPUs: its knob counts those on each, emulated GPUs included."""
    return gpus * number_of(point, f"{owner_of(stage)}.instances", default)


def has_knob(topology: str, knob: str) -> bool:
    """Whether a topology has what a knob sets; values that all requests share exist in both."""
    model, is_key, _ = knob.partition(KEY)
    if is_key:
        return model in (wire.TOPOLOGIES[topology] if model != wire.ENGINE else FRAME_PATHS[topology])
    owner = knob.rpartition(".")[0]
    if owner == ENGINE:
        return topology == wire.FUSED
    return topology == wire.STAGED or owner not in ("entry", *wire.STAGES)


def applicable(point: Knobs) -> Knobs:
    """The point without the knobs that its topology lacks: the deployment is the same."""
    topology = topology_of(point)
    return {knob: value for knob, value in point.items() if has_knob(topology, knob)}


def must_not_emulate(names: Iterable[str]) -> None:
    """Raise InputError for a parameter, or a key of a config.pbtxt, by which one model alone would emulate a GPU."""
    for name in names:
        path = name.partition(KEY)[2].removeprefix("parameters.") if KEY in name else name.rpartition(".")[2]
        parameter = path.partition(".")[0]
        if own := _OF_EMULATION.get(parameter):
            raise InputError(
                f"{name}: {parameter} is the same for all models of a deployment: leave this out, and give {own} in "
                f"the plan, or --{own} to harness serve"
            )
