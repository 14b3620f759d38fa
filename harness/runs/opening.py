"""Opens the run of a plan: its folder, and the manifest that records what it was made with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from harness import wire
from harness.capacity.planning.device_types import DeviceType
from harness.capacity.planning.scaled_profile import scaled
from harness.clock import AUTO
from harness.content import content_of
from harness.device_profile import MEASURED, Profile
from harness.errors import HarnessError, InconclusiveError, InputError, StoreError
from harness.host.places import PACKAGE, REPOSITORY, SCENARIOS, plan_name, plan_of_name
from harness.host.provenance import commit, host_facts, versions
from harness.identity import HostFacts
from harness.planfile.jobs import read_jobs
from harness.planfile.plan import PlanSpec
from harness.planfile.sections import ProfileSpec
from harness.records.jobs import AskedTasks
from harness.records.schema import BetweenLadders, RunManifest
from harness.records.store import Run, read_profile
from harness.runs.device_names import CLUSTER
from harness.runs.earlier import between_of_earlier_runs

_CODE = (PACKAGE, "**/*.py"), (REPOSITORY, "**/*.py"), (REPOSITORY, "**/*.pbtxt"), (SCENARIOS, "*.py")


def spec_of(run: Run) -> PlanSpec:
    """The plan that the run was made with, from its manifest. Raises InputError for one of another harness version."""
    folder = plan_of_name(run.manifest.plan_path).parent
    try:
        return PlanSpec.model_validate(run.manifest.plan, context={"folder": folder})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        words = f"its manifest.json holds a plan that this harness cannot read ({where}: {first['msg']})"
        raise InputError(f"{run.path}: {words}; use the harness that wrote it") from None


def profiles_of(spec: PlanSpec) -> dict[str, Profile]:
    """The profiles of other types of device, by type. Raises InputError for one that is missing or not a profile."""
    found = {}
    for name, path in spec.profile_paths().items():
        try:
            found[name] = _of_gpu(name, read_profile(path), spec.profiles[name])
            DeviceType.of_profile(found[name])
        except InconclusiveError:
            pass  # too few points of a stage: the plan reports it beside its type
        except StoreError as error:
            raise InputError(f"profiles.{name}: {error}") from None
        except HarnessError as error:
            words = f"profiles.{name}: {path}: {error}; make one with `harness profile`"
            raise InputError(words) from None
    return found


def _of_gpu(name: str, profile: Profile, asked: ProfileSpec) -> Profile:
    """The profile, scaled to the GPU that the plan names, if it names one."""
    if asked.bandwidth_gb_s is None or asked.tflop_s is None:
        return profile
    room_bytes = None if asked.kv_room_gb is None else asked.kv_room_gb * 1e9
    return scaled(profile, name, asked.bandwidth_gb_s, asked.tflop_s, room_bytes)


def run_id_of(plan_path: Path, spec: PlanSpec, url: str | None, ray: str | None = None) -> str:
    """Folder name of a run: the same for the same plan file, code and server, different otherwise."""
    digest = hashlib.sha256(Path(plan_path).read_bytes())
    if spec.topology != wire.STAGED:  # it may come from an option and not from the plan
        digest.update(spec.topology.encode())
    for path in sorted({path for folder, pattern in _CODE for path in folder.glob(pattern)}):
        digest.update(path.read_bytes())
    if emulated := spec.profile_path():
        digest.update(emulated.read_bytes())
        digest.update(b"" if spec.dilate == 1 else str(spec.dilate).encode())  # it may come from an option, too
    if spec.profiles:
        profiles = {name: profile.to_dict() for name, profile in profiles_of(spec).items()}
        digest.update(json.dumps(profiles, sort_keys=True).encode())
    if traced := spec.demand_path():
        digest.update(traced.read_bytes())
    if tasks := _asked_tasks(spec):  # a mistake in them is said before anything is measured
        digest.update(json.dumps(content_of(tasks), sort_keys=True).encode())
    digest.update((url or (f"ray {ray}" if ray else "")).encode())
    return f"{spec.name}-{digest.hexdigest()[:8]}"


def open_run(plan_path: Path, spec: PlanSpec, results: Path, url: str | None, ray: str | None = None) -> Run:
    """Open the run of a plan, new or resumed. ``url``, ``ray``: the external server or Ray cluster, if any."""
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
        times_basis=_times_basis(spec),
        demand=spec.demand_curve(),
        jobs=_asked_tasks(spec),
        dilation=None if spec.dilate == AUTO else spec.dilate,
    )
    learnt = between_of_earlier_runs(Path(results), manifest)
    notes = (*manifest.notes, *filter(None, [learnt and _says(learnt)]))
    return Run.create(results, replace(manifest, between_ladders=learnt, notes=notes))


def _asked_tasks(spec: PlanSpec) -> AskedTasks | None:
    path = spec.jobs_path()
    return read_jobs(path) if path else None


def _says(learnt: BetweenLadders) -> str:
    return (
        f"before any was repeated, ladders were taken to differ by {learnt.deviation:.0%}, as on such a host they "
        f"differed by more than 10% in {', '.join(learnt.runs)}"
    )


def _notes(url: str | None, ray: str | None) -> tuple[str, ...]:
    if url:
        return (f"Triton at {url} was not started by the harness; the host named here drove it",)
    return (f"Triton and its load ran on the hosts of the Ray cluster {ray}; the host named here led",) if ray else ()


def _device(spec: PlanSpec, url: str | None, ray: str | None, host: HostFacts) -> str:
    """Name of the serving device: an external Triton, a cluster's host, emulated GPUs, this host's GPU or its CPU."""
    if url:
        return f"the Triton at {url}" if "," not in url else f"Triton of {url}"  # must match ELSEWHERE
    emulated = spec.profile_path()
    if ray and not emulated:
        return f"{CLUSTER}{ray}"
    if emulated:
        name = f"emulated {read_profile(emulated).device}"
        return name if spec.gpus == 1 else f"{spec.gpus} {name}"
    return "cpu" if host.gpu == "none" else host.gpu.split(",")[0]


def _times_basis(spec: PlanSpec) -> str:
    """How the emulated times are known; "" where a device was measured for them, or nothing is emulated."""
    emulated = spec.profile_path()
    known_as = read_profile(emulated).known_as if emulated else MEASURED
    return "" if known_as == MEASURED else known_as


def unit_of(manifest: RunManifest) -> str:
    """What one "device" of the plan is, as text."""
    if manifest.device == "cpu":
        return f"this host ({manifest.host.cores} CPU cores) at preset {manifest.preset}"
    counted = manifest.device.startswith("the Triton") or manifest.device.split(" ")[0].isdigit()
    one = "" if counted else "one "
    return f"{one}{manifest.device} at preset {manifest.preset}"
