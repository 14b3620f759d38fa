"""Points of a search space: how they are deployed and described."""

from __future__ import annotations

from typing import Any

from harness import wire
from harness.clock import AUTO as AUTO_DILATION
from harness.deploy.config import Deployment
from harness.errors import InputError
from harness.identity import AUTO, EMULATED, GPU
from harness.planfile.plan import PlanSpec
from harness.records.store import Run
from harness.runs.opening import spec_of
from harness.topology import TOPOLOGY, Knobs


def deployment_of(spec: PlanSpec, url: str | None, **more) -> Deployment:
    """What a plan deploys. Raises InputError for what cannot be deployed, or not on an external server."""
    parameters = {name: str(value) for name, value in spec.parameters.items()}
    if url and (spec.emulate or parameters):
        raise InputError("emulate and parameters need a server that the harness starts: leave out these keys or --url")
    profile = str(spec.profile_path() or "")
    where: dict[str, Any] = {"emulate": profile, "gpus": spec.gpus, "device": spec.device, "dtype": spec.dtype}
    where["topology"] = spec.topologies[0]
    where["dilation"] = 1.0 if spec.dilate == AUTO_DILATION else spec.dilate  # until one is chosen
    return Deployment(preset=spec.preset, parameters=parameters, **{**where, **more})


def base_of(run: Run) -> Deployment:
    """What a run offers for deployment, before any knob is set: on the kind of device that it ran on or emulated.

    Nothing in it emulates or dilates time: it is for real devices.
    """
    spec = spec_of(run)
    kinds = {each.identity.kind for each in run.manifest.stages if each.identity.preset}
    on_gpus = bool(spec.emulate) or (bool(kinds) and kinds <= {GPU, EMULATED})
    return deployment_of(spec, None, emulate="", dilation=1.0, device=GPU if on_gpus else AUTO)


def describe_point(point: Knobs) -> str:
    """A short description of a point: a knob with one value in all three stages is named once."""
    words = []
    for knob in dict.fromkeys(name.rpartition(".")[2] for name in point):
        if knob == TOPOLOGY:
            words.append(f"{point[TOPOLOGY]} topology")
            continue
        values = {name.rpartition(".")[0]: value for name, value in point.items() if name.rpartition(".")[2] == knob}
        first, *others = values.values()
        if set(values) == set(wire.STAGES) and all(value == first for value in others):
            words.append(f"{knob} {first}")
        else:
            words += [f"{stage}.{knob} {value}".lstrip(".") for stage, value in values.items()]
    return ", ".join(words) or "as the repository has it"
