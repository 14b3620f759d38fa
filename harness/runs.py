"""A run of a plan: where it is kept, what it was made with, and its fit and plan from what is stored."""

from __future__ import annotations

import hashlib
import json
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
from harness.capacity.plan import Terms, headline_target, make_plan, pools_of
from harness.capacity.pools import Pools
from harness.capacity.predict import predict_open_run
from harness.errors import HarnessError, InconclusiveError, InputError
from harness.places import PACKAGE, REPOSITORY, SCENARIOS, plan_name, plan_of_name
from harness.probe import commit, host_facts, versions
from harness.records import RunManifest
from harness.spec import PlanSpec
from harness.store import Run, read_profile
from harness.triton.config import Deployment, read_config

_ELSEWHERE = "the Triton at ", "Triton of "  # a device of these names was deployed by somebody else
_CODE = (PACKAGE, "**/*.py"), (REPOSITORY, "**/*.py"), (REPOSITORY, "**/*.pbtxt"), (SCENARIOS, "*.py")


def deployment_of(spec: PlanSpec, url: str | None, **more) -> Deployment:
    """What a plan deploys. Raises InputError for what cannot be deployed, or not on a server of somebody else."""
    parameters = {name: str(value) for name, value in spec.parameters.items()}
    if url and (spec.emulate or parameters):
        raise InputError("emulate and parameters are of a server that the harness starts: leave them or --url out")
    profile = str(spec.profile_path() or "")
    return Deployment(preset=spec.preset, parameters=parameters, emulate=profile, gpus=spec.gpus, **more)


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
    unit, kv = unit_of(run.manifest), kv_room(run.manifest, spec)
    return fit_run(run.trials(), run.requests(), mix, promises, rng, unit, kv=kv, confidence=spec.confidence)


def kv_room(manifest: RunManifest, spec: PlanSpec) -> KvRoom | None:
    """Room for KV caches where the harness deployed; None for a server of somebody else."""
    if manifest.device.startswith(_ELSEWHERE):
        return None
    name = "kv_limit_bytes"
    given = read_config(REPOSITORY / wire.LLM / "config.pbtxt").parameters[name].string_value
    limit_bytes = float(spec.parameters.get(f"{wire.LLM}.{name}", given))
    return KvRoom(limit_bytes, KV_BYTES_PER_TOKEN[spec.preset], instances=spec.gpus)


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
        gpus=spec.gpus,
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
            found[name] = read_profile(path)
            Card.of_profile(found[name])
        except InconclusiveError:
            pass  # too few points of a stage: the plan says so beside its type
        except HarnessError as error:
            words = f"profiles.{name}: {path}: {error}; make one with `harness profile`"
            raise InputError(words) from None
    return found


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
        return f"host of the Ray cluster {ray}"
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
        values = {name.rpartition(".")[0]: value for name, value in point.items() if name.rpartition(".")[2] == knob}
        first, *others = values.values()
        if set(values) == set(wire.STAGES) and all(value == first for value in others):
            words.append(f"{knob} {first}")
        else:
            words += [f"{stage}.{knob} {value}".lstrip(".") for stage, value in values.items()]
    return ", ".join(words) or "as the repository has it"
