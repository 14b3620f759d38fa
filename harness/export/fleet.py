"""A signed plan as a fleet: how many servers, of what, with which autoscaler; and why a plan may not become one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from harness import wire
from harness.deploy.config import PRESETS
from harness.errors import InputError
from harness.identity import CPU, GPU, computes_frames
from harness.planfile.plan import PlanSpec
from harness.records.day import Day, ScalingRule
from harness.records.plan import Plan, PlannedTarget
from harness.records.slo import Slo
from harness.records.store import Run
from harness.report.facts import expires_at
from harness.report.seal import check_seal, seal_of
from harness.runs.opening import spec_of
from harness.topology import TOPOLOGY, Knobs, number_of, topology_of

SETTLE_S = 15  # until clients and gateways know that a server ends: it serves as before until then
EXIT_S = 30  # after the last session: models are unloaded
_STUDIO = {"chunk_frames": 1, "diffusion_steps": wire.DEFAULT_DIFFUSION_STEPS}  # what its requests ask for


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """What an operator takes upon himself: a plan that ``force`` or ``inconclusive`` is needed for."""

    force: bool = False
    inconclusive: bool = False


@dataclass(frozen=True, kw_only=True)
class PlannedFleet:
    """What a plan says of one target rate. A device is one server with ``gpus`` GPUs.

    ``devices`` serve ``qps`` requests/s; ``replicas`` still do so after the loss of ``spare`` of them. ``sessions`` is
    what a device holds on average at the plan's cap, ``sessions_p95`` what it exceeds in 5% of the time.
    ``steady_rate``: requests/s of a device at utilisation 1, of which ``utilisation_cap`` is planned.
    ``mean_audio_s``: seconds of audio of a mean request of the mix. ``drain_s``: until a device with its sessions
    is empty. ``requests``: what the plan's requests asked for, by name. ``remarks``: why it would have been refused.
    """

    run_id: str
    seal_sha256: str
    verdict: str
    basis: str
    emulated: bool
    expires_at: str
    qps: float
    devices: int
    replicas: int
    gpus: int
    device: str
    preset: str
    dtype: str
    knobs: Knobs
    parameters: dict[str, str | int | float]
    sessions: float
    sessions_p95: float
    steady_rate: float
    utilisation_cap: float
    mean_audio_s: float
    drain_s: float
    routing: str
    slos: tuple[Slo, ...] = field(repr=False)
    requests: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    simulated_rule: ScalingRule | None = None
    remarks: tuple[str, ...] = ()

    @property
    def spare(self) -> int:
        return self.replicas - self.devices

    @property
    def on_cpu(self) -> bool:
        return self.device == CPU

    @property
    def topology(self) -> str:
        return topology_of(self.knobs)

    @property
    def server_knobs(self) -> Knobs:
        """The knobs that a server is deployed with."""
        return {name: value for name, value in self.knobs.items() if name not in (TOPOLOGY, *_STUDIO)}

    @property
    def grace_s(self) -> int:
        """Whole seconds that a server gets to end: clients leave, its sessions end, its models are unloaded."""
        return math.ceil(self.drain_s) + SETTLE_S + EXIT_S

    @property
    def scaling(self) -> ScalingRule:
        """The rule that the plan simulated over its day; without one, from one device and the spare ones to all.

        A schedule that always wishes for the same number is a minimum.
        """
        rule = self.simulated_rule or ScalingRule(
            target_sessions_per_device=self.sessions, minimum=1 + self.spare, maximum=self.replicas
        )
        counts = set({each.at_s // 60: each.devices for each in rule.schedule}.values())  # in minutes, as cron has
        return rule if len(counts) != 1 else replace(rule, minimum=max(rule.minimum, *counts), schedule=())

    @property
    def expires_unix_s(self) -> int:
        return int(datetime.fromisoformat(self.expires_at).timestamp())


def fleet_of(folder: Path, qps: float, accepted: Accepted, now: datetime | None = None) -> PlannedFleet:
    """The fleet of a signed run for one of its target rates (requests/s).

    Raises InputError for a plan that has no such target, or no count for it; and, unless ``accepted``, for one that is
    not signed, changed, expired or inconclusive.
    """
    run = Run.open(folder)
    plan = run.plan()
    if plan is None:
        raise InputError(f"{folder} holds no plan yet: run `harness signoff` to its end")
    target = _target(plan, qps, folder)
    spec = spec_of(run)
    requests = _requests(spec, plan)
    problems = list(_problems(run, accepted, now))
    doubts = list(_doubts(plan, target, requests))
    if problems and not accepted.force:
        raise InputError(f"{folder}: {'; '.join(problems)}; or export it anyway with --force")
    if doubts and not accepted.inconclusive:
        raise InputError(f"{folder}: {'; '.join(doubts)}; or export it anyway with --accept-inconclusive")
    return _fleet(run, spec, plan, target, requests, tuple(problems + doubts))


def _target(plan: Plan, qps: float, folder: Path) -> PlannedTarget:
    target = next((each for each in plan.targets if math.isclose(each.qps, qps, rel_tol=1e-9)), None)
    if target is None:
        planned = ", ".join(f"{each.qps:g}" for each in plan.targets)
        raise InputError(
            f"{folder} is planned for {planned} requests/s, not for {qps:g}: give one of these, or sign off a plan "
            f"with {qps:g} in its targets_qps"
        )
    if target.devices is None or plan.drain is None or plan.steady_rate is None:
        why = target.note or plan.verdict
        raise InputError(f"{folder} has no count of devices for {qps:g} requests/s ({why}): there is nothing to export")
    if plan.preset not in PRESETS:
        raise InputError(f"{folder} is for the sizes in {plan.preset}, a file that no image has: export another run")
    return target


def _problems(run: Run, accepted: Accepted, now: datetime | None) -> Iterator[str]:
    """Why the plan may not be what was signed, or not hold any more."""
    try:
        yield from check_seal(run.path, now).problems
    except InputError as error:
        if not accepted.force:
            raise
        yield str(error)


def _requests(spec: PlanSpec, plan: Plan) -> dict[str, tuple[int, ...]]:
    """What the plan's requests asked for: the knob of the best deployment, else what each class of the mix says."""
    mix, knobs = spec.traffic_mix(), plan.deployment or {}
    found: dict[str, tuple[int, ...]] = {}
    for name in _STUDIO:
        own = number_of(knobs, name, 0)
        found[name] = tuple(sorted({int(own or getattr(one, name) or getattr(mix, name)) for one in mix.classes}))
    return found


def _doubts(plan: Plan, target: PlannedTarget, requests: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Why the plan does not answer, or not for the requests of the studio."""
    if plan.verdict != "met":
        first = plan.reasons[0] if plan.reasons else "no reason is stored"
        yield f"its verdict is {plan.verdict}: {first.rstrip('.')}"
    if target.devices_n_plus_1 is None:
        yield f"no count for {target.qps:g} requests/s is known to survive the loss of a device"
    for name, values in requests.items():
        if values != (_STUDIO[name],):
            asked = ", ".join(map(str, values))
            yield f"it is of requests with {name} {asked}, which the studio sends with {_STUDIO[name]}"


def _fleet(
    run: Run,
    spec: PlanSpec,
    plan: Plan,
    target: PlannedTarget,
    requests: Mapping[str, tuple[int, ...]],
    remarks: tuple[str, ...],
) -> PlannedFleet:
    manifest, drain, devices, rate = run.manifest, plan.drain, target.devices, plan.steady_rate
    assert drain is not None and devices is not None and rate is not None  # see _target
    sealed = seal_of(run)
    return PlannedFleet(
        run_id=manifest.run_id,
        seal_sha256=hashlib.sha256(sealed).hexdigest() if sealed else "",
        verdict=plan.verdict,
        basis=target.basis,
        emulated=plan.emulated,
        expires_at=_expiry(run),
        qps=target.qps,
        devices=devices,
        replicas=target.devices_n_plus_1 or devices + 1,
        gpus=plan.gpus_per_device,
        device=_device(run, plan),
        preset=plan.preset,
        dtype=spec.dtype,
        knobs=plan.deployment or {},
        parameters=dict(spec.parameters),
        sessions=max(drain.sessions, 1),
        sessions_p95=target.sessions_per_device_p95 or drain.sessions,
        steady_rate=rate,
        utilisation_cap=plan.utilisation_cap or 1.0,
        mean_audio_s=spec.traffic_mix().mean_audio_s(),
        drain_s=max(drain.p95_s, drain.longest_s or 0.0),
        routing=plan.routing,
        slos=tuple(plan.slos),
        requests=requests,
        simulated_rule=plan.day.rule if plan.day and _holds_its_peak(plan.day, target) else None,
        remarks=remarks,
    )


def _holds_its_peak(day: Day, target: PlannedTarget) -> bool:
    """Whether a target is for all of a plan's day: only then its rule is that of the fleet."""
    return day.peak_qps <= target.qps * (1 + 1e-9)


def _device(run: Run, plan: Plan) -> str:
    """The type of device that the stages reported; as the plan names it where it is not one, or none is known."""
    stages = [each.identity for each in run.manifest.stages]
    gpus = {each.gpu for each in stages if each.kind == GPU and computes_frames(each.model)}
    if len(gpus) == 1 and gpus != {""}:
        return gpus.pop()
    return CPU if stages and {each.kind for each in stages} == {CPU} else plan.device


def _expiry(run: Run) -> str:
    when = expires_at(run.manifest)
    if when is None:
        raise InputError(f"{run.path} is not finished: run `harness signoff` to its end")
    return when.isoformat(timespec="seconds")
