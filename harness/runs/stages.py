"""What the stages of a run's servers reported that they compute on: devices, GPUs and room for KV caches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from harness import wire
from harness.capacity.models.memory import KV_BYTES_PER_TOKEN, KvRoom
from harness.errors import InputError
from harness.identity import AUTO, CPU, GPU, StageIdentity, computes_frames
from harness.identity import topology_of as topology_told
from harness.planfile.plan import PlanSpec
from harness.records.schema import RunManifest, StageRecord
from harness.records.store import Run
from harness.runs.device_names import ELSEWHERE, is_here
from harness.topology import KV_MODELS

_KV_LIMIT_BYTES = 8 << 30  # for runs whose manifests list no stages


def record_stages(run: Run, servers: Mapping[str, Sequence[StageIdentity]]) -> None:
    """Store what each server's processes report that they run on, and name the device by it.

    The stages of each topology that the run deploys are stored. Raises InputError where servers of one topology differ,
    or the run's trials were measured on something else.
    """
    topology = topology_told(next(iter(servers.values())))
    first, *rest = (*servers.values(), *stages_by_server(run.manifest, topology).values())
    alike = _computing(first), len(_gpus(first))
    if others := [told for told in rest if (_computing(told), len(_gpus(told))) != alike]:
        raise InputError(
            f"{run.path}: its trials would mix different devices ({_told(first)} and {_told(others[0])}), and the "
            "answer would hold for neither; measure again with --fresh, or give another --results"
        )
    if run.manifest.finished_at:
        return  # the manifest may be signed already
    others = tuple(each for each in run.manifest.stages if each.topology != topology)
    told = tuple(StageRecord(server, topology, each) for server, found in servers.items() for each in found)
    run.update_manifest(stages=(*others, *told), device=_device_by(first, run.manifest))


def stages_by_server(manifest: RunManifest, topology: str | None = None) -> dict[str, list[StageIdentity]]:
    """What the processes of each server reported that they run on, for one topology (None = the first one).

    Empty for a run of an older harness.
    """
    topology = topology or manifest.topologies[0]
    servers: dict[str, list[StageIdentity]] = {}
    for each in manifest.stages:
        if each.topology == topology:
            servers.setdefault(each.server, []).append(each.identity)
    return servers


def _computing(stages: Iterable[StageIdentity]) -> set[tuple[str, ...]]:
    return {(e.model, e.gpu or e.device, e.dtype, e.preset, e.weights, e.code_digest) for e in stages if e.preset}


def _gpus(stages: Iterable[StageIdentity]) -> dict[str, str]:
    """The GPUs that the stages of the frame path run on: names by UUID."""
    return {each.gpu_uuid: each.gpu for each in stages if each.kind == GPU and computes_frames(each.model)}


def _told(stages: Sequence[StageIdentity]) -> str:
    found = "; ".join(sorted({", ".join(filter(None, each[1:])) for each in _computing(stages)}))
    return f"{len(_gpus(stages))} x {found}" if len(_gpus(stages)) > 1 else found


def _device_by(stages: Sequence[StageIdentity], manifest: RunManifest) -> str:
    """The device's name from its stages; for external servers, added to their address."""
    gpus = _gpus(stages)
    if not gpus:
        return manifest.device if manifest.emulated or not is_here(manifest) else CPU
    names = Counter(gpus.values())
    told = " and ".join(name if count == 1 else f"{count} {name}" for name, count in sorted(names.items()))
    return told if is_here(manifest) else f"{manifest.device.partition(' (')[0]} ({told})"


def kv_rooms(manifest: RunManifest, spec: PlanSpec) -> dict[str, KvRoom | None]:
    """Room for KV caches of one device, by topology of the plan."""
    return {topology: kv_room(manifest, spec, topology) for topology in spec.topologies}


def kv_room(manifest: RunManifest, spec: PlanSpec, topology: str | None = None) -> KvRoom | None:
    """Room for KV caches of one device, as its processes report; None for an older run on an external server."""
    topology = topology or spec.topologies[0]
    holder = KV_MODELS[topology]
    stages = next(iter(stages_by_server(manifest, topology).values()), ())
    if told := [each for each in stages if each.model == holder and each.kv_limit_bytes]:
        smallest = min(each.kv_limit_bytes for each in told)
        return KvRoom(float(smallest), told[0].kv_bytes_per_token, instances=len(told), gpus=gpus_of(manifest, spec))
    if manifest.device.startswith(ELSEWHERE):
        return None
    names = (holder, wire.ENGINE) if topology == wire.FUSED else (holder,)
    given = [spec.parameters[f"{name}.kv_limit_bytes"] for name in names if f"{name}.kv_limit_bytes" in spec.parameters]
    if not (given or stages) and len(spec.topologies) > 1:
        return None  # not deployed yet, so nothing has reported it
    limit_bytes = float(given[0]) if given and given[0] != AUTO else float(_KV_LIMIT_BYTES)
    return KvRoom(limit_bytes, KV_BYTES_PER_TOKEN[spec.preset], instances=spec.gpus, gpus=spec.gpus)


def gpus_of(manifest: RunManifest, spec: PlanSpec) -> int:
    """GPUs per device of the plan: those that a server's stages run on, otherwise (emulated, CPU) the plan's number."""
    return len(_gpus(next(iter(stages_by_server(manifest).values()), ()))) or spec.gpus
