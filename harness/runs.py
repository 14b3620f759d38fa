"""A run of a plan: where it is kept, what it was made with, and its fit and plan from what is stored."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from harness import wire
from harness.capacity.behaviour import behaviour
from harness.capacity.cards import Card
from harness.capacity.fit import fit_run
from harness.capacity.memory import KV_BYTES_PER_TOKEN, KvRoom
from harness.capacity.other_card import scaled
from harness.capacity.plan import Terms, headline_target, make_plan, pools_of
from harness.capacity.pools import Pools
from harness.capacity.predict import predict_open_run
from harness.errors import HarnessError, InconclusiveError, InputError
from harness.identity import AUTO, CPU, GPU, StageIdentity, computes_frames
from harness.identity import topology_of as topology_told
from harness.places import PACKAGE, REPOSITORY, SCENARIOS, plan_name, plan_of_name
from harness.provenance import commit, host_facts, versions
from harness.records import RunManifest
from harness.spec import PlanSpec, ProfileSpec
from harness.store import Run, read_profile
from harness.topology import KV_MODELS, TOPOLOGY
from harness.triton.config import Deployment

_ELSEWHERE = "the Triton at ", "Triton of "  # a device of these names was deployed by somebody else
_CLUSTER = "host of the Ray cluster "
_KV_LIMIT_BYTES = 8 << 30  # of runs whose manifests hold no stages
_CODE = (PACKAGE, "**/*.py"), (REPOSITORY, "**/*.py"), (REPOSITORY, "**/*.pbtxt"), (SCENARIOS, "*.py")


def deployment_of(spec: PlanSpec, url: str | None, **more) -> Deployment:
    """What a plan deploys. Raises InputError for what cannot be deployed, or not on a server of somebody else."""
    parameters = {name: str(value) for name, value in spec.parameters.items()}
    if url and (spec.emulate or parameters):
        raise InputError("emulate and parameters are of a server that the harness starts: leave them or --url out")
    profile = str(spec.profile_path() or "")
    where = {"emulate": profile, "gpus": spec.gpus, "device": spec.device, "dtype": spec.dtype}
    where["topology"] = spec.topologies[0]
    return Deployment(preset=spec.preset, parameters=parameters, **{**where, **more})


def base_of(run: Run) -> Deployment:
    """What the run deployed before it turned a knob, on the kind of device that it ran on."""
    kinds = {stage["kind"] for stage in run.manifest.stages if stage["preset"]}
    return deployment_of(spec_of(run), None, device=GPU if kinds == {GPU} else AUTO)


def record_stages(run: Run, servers: Mapping[str, Sequence[StageIdentity]]) -> None:
    """Keep what the processes of each server say that they run on, and name the device by it.

    Of each topology that the run deploys, its stages are kept. Raises InputError where servers of one topology differ
    in that, or the run's trials were measured on something else.
    """
    topology = topology_told(next(iter(servers.values())))
    first, *rest = (*servers.values(), *stages_by_server(run.manifest, topology).values())
    alike = _computing(first), len(_cards(first))
    if others := [told for told in rest if (_computing(told), len(_cards(told))) != alike]:
        raise InputError(
            f"{run.path}: its trials would be of different devices ({_told(first)} and {_told(others[0])}), and the "
            "answer of neither; measure anew with --fresh, or give another --results"
        )
    if run.manifest.finished_at:
        return  # it may be signed, with its manifest
    others = tuple(each for each in run.manifest.stages if _topology_of(each) != topology)
    mark = {TOPOLOGY: topology}
    told = tuple({"server": server, **mark, **each.content()} for server, found in servers.items() for each in found)
    run.update_manifest(stages=(*others, *told), device=_device_by(first, run.manifest))


def stages_by_server(manifest: RunManifest, topology: str | None = None) -> dict[str, list[StageIdentity]]:
    """What the processes of each server of a run said that they run on, deployed so (None = the first topology);
    empty for an older run."""
    topology, servers = topology or manifest.topologies[0], {}
    for content in [each for each in manifest.stages if _topology_of(each) == topology]:
        servers.setdefault(content["server"], []).append(StageIdentity.of(content))
    return servers


def _topology_of(content: Mapping) -> str:
    return content.get(TOPOLOGY, wire.STAGED)


def _computing(stages: Iterable[StageIdentity]) -> set[tuple[str, ...]]:
    return {(e.model, e.gpu or e.device, e.dtype, e.preset, e.weights, e.code_digest) for e in stages if e.preset}


def _cards(stages: Iterable[StageIdentity]) -> dict[str, str]:
    """The GPUs that the stages of the frame path run on: names by UUID."""
    return {each.gpu_uuid: each.gpu for each in stages if each.kind == GPU and computes_frames(each.model)}


def _told(stages: Sequence[StageIdentity]) -> str:
    found = "; ".join(sorted({", ".join(filter(None, each[1:])) for each in _computing(stages)}))
    return f"{len(_cards(stages))} x {found}" if len(_cards(stages)) > 1 else found


def _device_by(stages: Sequence[StageIdentity], manifest: RunManifest) -> str:
    """The device's name as the stages have it; of servers elsewhere, beside where they are."""
    cards = _cards(stages)
    if not cards:
        return manifest.device if manifest.emulated or not _is_here(manifest) else CPU
    names = Counter(cards.values())
    told = " and ".join(name if count == 1 else f"{count} {name}" for name, count in sorted(names.items()))
    return told if _is_here(manifest) else f"{manifest.device.partition(' (')[0]} ({told})"


def _is_here(manifest: RunManifest) -> bool:
    return not manifest.device.startswith((*_ELSEWHERE, _CLUSTER))


def spec_of(run: Run) -> PlanSpec:
    """The plan as the run was made with, whatever became of its file. Raises InputError for one of another harness."""
    folder = plan_of_name(run.manifest.plan_path).parent
    try:
        return PlanSpec.model_validate(run.manifest.plan, context={"folder": folder})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        words = f"its manifest.json holds a plan that this harness cannot read ({where}: {first['msg']})"
        raise InputError(f"{run.path}: {words}; use the harness that wrote it") from None


def fit_of(run: Run) -> dict:
    """fit.json from a run's stored trials."""
    spec = spec_of(run)
    mix, promises, rng = spec.traffic_mix(), spec.promise_list(), np.random.default_rng(spec.seed)
    unit, kv = unit_of(run.manifest), kv_rooms(run.manifest, spec)
    return fit_run(run.trials(), run.requests(), mix, promises, rng, unit, kv=kv, confidence=spec.confidence)


def kv_rooms(manifest: RunManifest, spec: PlanSpec) -> dict[str, KvRoom | None]:
    """Room for KV caches of one device, by topology of the plan."""
    return {topology: kv_room(manifest, spec, topology) for topology in spec.topologies}


def kv_room(manifest: RunManifest, spec: PlanSpec, topology: str | None = None) -> KvRoom | None:
    """Room for KV caches of one device, as the processes that hold them say; None for an older run on a server
    elsewhere."""
    topology = topology or spec.topologies[0]
    holder = KV_MODELS[topology]
    stages = next(iter(stages_by_server(manifest, topology).values()), ())
    if told := [each for each in stages if each.model == holder and each.kv_limit_bytes]:
        smallest = min(each.kv_limit_bytes for each in told)
        return KvRoom(float(smallest), told[0].kv_bytes_per_token, instances=len(told))
    if manifest.device.startswith(_ELSEWHERE):
        return None
    names = (holder, wire.ENGINE) if topology == wire.FUSED else (holder,)
    given = [spec.parameters[f"{name}.kv_limit_bytes"] for name in names if f"{name}.kv_limit_bytes" in spec.parameters]
    if not (given or stages) and len(spec.topologies) > 1:
        return None  # it has not been deployed yet, and nobody has told
    limit_bytes = float(given[0]) if given and given[0] != AUTO else float(_KV_LIMIT_BYTES)
    return KvRoom(limit_bytes, KV_BYTES_PER_TOKEN[spec.preset], instances=spec.gpus)


def gpus_of(manifest: RunManifest, spec: PlanSpec) -> int:
    """GPUs of one device of the plan: those that the stages of a server run on, else (emulated, CPU) the plan's."""
    return len(_cards(next(iter(stages_by_server(manifest).values()), ()))) or spec.gpus


def plan_of(run: Run, spec: PlanSpec, fit: dict, targets_qps) -> dict:
    """plan.json for these targets, from stored records alone."""
    mix, promises, rng = spec.traffic_mix(), spec.promise_list(), np.random.default_rng(spec.seed)
    terms = replace(terms_of(run.manifest, spec), foretold=run.predictions())
    return make_plan(fit, run.trials(), run.requests(), mix, promises, targets_qps, rng, terms)


def terms_of(manifest: RunManifest, spec: PlanSpec) -> Terms:
    """What a run's plan is made under."""
    return Terms(
        utilisation_cap=spec.utilisation_cap,
        confidence=spec.confidence,
        max_error=spec.max_error,
        unit=unit_of(manifest),
        preset=manifest.preset,
        device=manifest.device,
        gpus=gpus_of(manifest, spec),
        emulated=manifest.emulated,
        prices=spec.prices,
        currency=spec.currency,
        growth_per_month=spec.growth_per_month,
        fleet=spec.fleet,
        profiles=manifest.profiles,
    )


def profiles_of(spec: PlanSpec) -> dict[str, dict]:
    """The profiles of other types of device, by type. Raises InputError for one that is missing or is no profile."""
    found = {}
    for name, path in spec.profile_paths().items():
        try:
            found[name] = _of_card(name, read_profile(path), spec.profiles[name])
            Card.of_profile(found[name])
        except InconclusiveError:
            pass  # too few points of a stage: the plan says so beside its type
        except HarnessError as error:
            words = f"profiles.{name}: {path}: {error}; make one with `harness profile`"
            raise InputError(words) from None
    return found


def _of_card(name: str, profile: dict, asked: ProfileSpec) -> dict:
    """The profile, scaled to the card that the plan asks for, if it does."""
    if asked.bandwidth_gb_s is None:
        return profile
    room_bytes = None if asked.kv_room_gb is None else asked.kv_room_gb * 1e9
    return scaled(profile, name, asked.bandwidth_gb_s, asked.tflop_s, room_bytes)


def behaviour_of(spec: PlanSpec, fit: dict, plan: dict) -> dict | None:
    """What the devices of the target that the answer names show under surges; None where no target has a count."""
    target = headline_target(plan["targets"])
    if target is None:
        return None
    mix = spec.traffic_mix()
    pools = pools_of(fit, fit["deployments"][fit["best"]], mix, spec.promise_list(), spec.utilisation_cap)
    return behaviour(pools, mix, target, np.random.default_rng(spec.seed))


def simulation_of(run: Run, rate_per_s: float) -> dict:
    """What an open-loop run at a rate would show on the best deployment, from the run's stored fit.

    Raises InputError at a rate that one device cannot carry for good with as many sessions as were measured, whatever
    it promises: there would be no steady state to show.
    """
    spec, carried = spec_of(run), fleet_of(run).unpromised().steady_rate()
    if rate_per_s >= carried:
        raise InputError(
            f"{rate_per_s:g} requests a second have no steady state on one device: with the sessions that were "
            f"measured it carries less than {carried:.3g}. Ask for less, or for the devices that they need: "
            f"harness plan --run {run.path} --qps {rate_per_s:g}"
        )
    rng = np.random.default_rng(spec.seed)
    return predict_open_run(best_of(run), spec.traffic_mix(), rate_per_s, 60.0, rng)


def fleet_of(run: Run) -> Pools:
    """Pools of the best deployment, from the run's stored fit: what simulates any number of devices at any rate."""
    spec, best = spec_of(run), best_of(run)
    return pools_of(run.fit(), best, spec.traffic_mix(), spec.promise_list(), spec.utilisation_cap)


def best_of(run: Run) -> dict:
    """The stored fit of the best deployment. Raises InconclusiveError where there is none."""
    fit = run.fit()
    if fit is None or fit["best"] is None:
        raise InconclusiveError(f"{run.path} holds no deployment that keeps the promises: nothing to simulate")
    return fit["deployments"][fit["best"]]


def run_id_of(plan_path: Path, spec: PlanSpec, url: str | None, ray: str | None = None) -> str:
    """The same plan file, code and server always lead to the same folder, and others to another."""
    digest = hashlib.sha256(Path(plan_path).read_bytes())
    if spec.topology != wire.STAGED:  # perhaps by an option, and not by the plan
        digest.update(spec.topology.encode())
    for path in sorted({path for folder, pattern in _CODE for path in folder.glob(pattern)}):
        digest.update(path.read_bytes())
    if spec.emulate:
        digest.update(spec.profile_path().read_bytes())
    if spec.profiles:
        digest.update(json.dumps(profiles_of(spec), sort_keys=True).encode())
    digest.update((url or (f"ray {ray}" if ray else "")).encode())
    return f"{spec.name}-{digest.hexdigest()[:8]}"


def open_run(plan_path: Path, spec: PlanSpec, results: Path, url: str | None, ray: str | None = None) -> Run:
    """The run of a plan, new or as an earlier start left it. ``url`` and ``ray``: where, if not here."""
    run_id = run_id_of(plan_path, spec, url, ray)
    if Run.is_run(Path(results) / run_id):
        return Run.open(Path(results) / run_id)
    host = host_facts()
    manifest = RunManifest(
        run_id=run_id,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        plan_path=plan_name(plan_path),
        plan_sha256=hashlib.sha256(Path(plan_path).read_bytes()).hexdigest(),
        plan=spec.model_dump(mode="json"),
        commit=commit(),
        versions=versions(),
        host=host,
        preset=spec.preset,
        device=_device(spec, url, ray, host),
        seed=spec.seed,
        emulated=bool(spec.emulate),
        notes=_notes(url, ray),
        profiles=profiles_of(spec),
        topologies=spec.topologies,
    )
    return Run.create(results, manifest)


def _notes(url: str | None, ray: str | None) -> tuple[str, ...]:
    if url:
        return (f"Triton at {url} was not started by the harness; the host named here drove it",)
    return (f"Triton and its load ran on the hosts of the Ray cluster {ray}; the host named here led",) if ray else ()


def _device(spec: PlanSpec, url: str | None, ray: str | None, host: dict) -> str:
    """What serves: a Triton somewhere else, a host of a cluster, emulated GPUs, this host's GPU or its processor."""
    if url:
        return f"the Triton at {url}" if "," not in url else f"Triton of {url}"  # as _ELSEWHERE has them
    if ray and not spec.emulate:
        return f"{_CLUSTER}{ray}"
    if spec.emulate:
        name = f"emulated {read_profile(spec.profile_path())['device']}"
        return name if spec.gpus == 1 else f"{spec.gpus} {name}"
    return "cpu" if host["gpu"] == "none" else host["gpu"].split(",")[0]


def unit_of(manifest: RunManifest) -> str:
    """What one "device" of the plan is, in words."""
    if manifest.device == "cpu":
        return f"this host ({manifest.host['cores']} CPU cores) at preset {manifest.preset}"
    counted = manifest.device.startswith("the Triton") or manifest.device.split(" ")[0].isdigit()
    one = "" if counted else "one "
    return f"{one}{manifest.device} at preset {manifest.preset}"


def describe_point(point: dict) -> str:
    """A point of the space in a few words: knobs of all three stages with one value are said once."""
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
