"""What a host and the stages of a server report about themselves, and the differences from what was requested."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness import wire
from harness.content import absent, content_of, read
from harness.errors import ServerError

CPU, GPU, EMULATED = "cpu", "gpu", "emulated"
AUTO = wire.AUTO


@dataclass(frozen=True)
class HostFacts:
    """The host that figures were measured on; what an older record does not say is left out."""

    cpu: str = absent("")  # the processor's model
    cores: int | None = absent(None)  # that this process may use
    memory_gib: float | None = absent(None)
    system: str = absent("")  # kernel and its release
    python: str = absent("")
    gpu: str = absent("")  # one line a GPU, with driver and memory; "none" without one

    def to_dict(self) -> dict[str, Any]:
        return content_of(self)


@dataclass(frozen=True, slots=True)
class GpuSample:
    """What one GPU did at the time of a sample; None for values that it does not report."""

    uuid: str
    percent: float | None = None  # of the time in which a kernel ran
    memory_bytes: int | None = None  # in use
    power_w: float | None = None


@dataclass(frozen=True)
class StageIdentity:
    """What one model process computes with, as determined by itself."""

    model: str
    instance: str
    kind: str  # CPU, GPU or EMULATED
    device: str  # "cpu", "cuda:1", or the name of the emulated device
    gpu: str = ""  # the GPU's name
    gpu_uuid: str = ""
    gpu_memory_bytes: int = 0
    dtype: str = ""  # "float32", "bfloat16", "float16"
    preset: str = ""
    weights: str = ""  # the checkpoint folder, or "random, seed 0"
    graphs: int = 0  # largest batch whose step is one CUDA graph
    kv_limit_bytes: int = 0  # of the LLM stage, or of the fused engine
    kv_bytes_per_token: int = 0  # of the same
    code: str = ""  # folder of the package that it runs
    code_digest: str = ""  # of that package's sources
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> StageIdentity:
        """From the report of a server of this or another version of the harness. Raises ValueError."""
        return read(cls, content)

    def content(self) -> dict[str, Any]:
        return content_of(self)


@dataclass(frozen=True)
class Requested:
    """What stages must report; None or AUTO = anything that is the same for all."""

    preset: str | None = None
    kind: str = AUTO
    dtype: str = AUTO
    code: str | None = None
    gpus: int | None = None  # with an instance of every stage on the frame path


def from_json(text: str) -> tuple[StageIdentity, ...]:
    """Parse a report. Raises ValueError or TypeError for any other text."""
    return tuple(StageIdentity.of(each) for each in json.loads(text))


def must_be_as_requested(found: Sequence[StageIdentity], requested: Requested, address: str) -> None:
    """Raise ServerError that names every difference, and its fix."""
    if differences := list(_differences(found, requested)):
        raise ServerError(
            f"the server at {address} does not run what was requested, so nothing is measured on it: "
            + "; ".join(differences)
        )


def _differences(found: Sequence[StageIdentity], requested: Requested) -> Iterator[str]:
    stages = [each for each in found if each.preset]
    yield from _of_one_kind("preset", stages, requested.preset, "deploy the preset of the plan, or change the plan")
    kind, dtype = (None if each == AUTO else each for each in (requested.kind, requested.dtype))
    look = "run `harness doctor` on its host: driver, CUDA build of torch, instance_group of the stage"
    yield from _of_one_kind("kind", stages, kind, look)
    yield from _of_one_kind("dtype", stages, dtype, "set `dtype` in the parameters of every config.pbtxt alike")
    alone = "start it with `harness serve` of this checkout, or from an environment with only this one installed"
    yield from _of_one_kind("code", found, requested.code, alone)
    again = "start the server again, so that all its processes run one version"
    yield from _of_one_kind("code_digest", found, None, again)
    if requested.gpus:
        for model in {each.model for each in stages if each.kind == GPU}:
            yield from _on_gpus(model, {e.gpu_uuid for e in stages if e.model == model}, requested.gpus)


def _of_one_kind(name: str, found: Sequence[StageIdentity], expected: str | None, fix: str) -> Iterator[str]:
    said = sorted({(each.model, getattr(each, name)) for each in found})  # instances of one model may differ
    wrong = [(model, value) for model, value in said if expected is not None and value != expected]
    if wrong:
        told = ", ".join(f"{model} says {value or 'nothing'}" for model, value in wrong)
        yield f"{name} {expected} was requested, but {told} ({fix})"
    elif expected is None and len({value for _, value in said}) > 1:
        told = ", ".join(f"{model} {value or '(none)'}" for model, value in said)
        yield f"the stages differ in {name}: {told} ({fix})"


def computes_frames(model: str) -> bool:
    """Whether a process of this model computes on the frame path, provided that it has weights.

    The entry has weights only in the fused topology.
    """
    return model in (*wire.STAGES, wire.ENTRY)


def topology_of(stages: Iterable[StageIdentity]) -> str:
    """The topology of a server, from its processes' reports."""
    return wire.FUSED if any(each.model == wire.ENTRY and each.preset for each in stages) else wire.STAGED


def _on_gpus(model: str, uuids: set[str], expected: int) -> Iterator[str]:
    if computes_frames(model) and len(uuids) != expected:
        yield f"{model} runs on {len(uuids)} of {expected} GPUs (give its instance_group all of them)"
