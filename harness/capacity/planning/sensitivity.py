"""How device counts change with the traffic, the deployment or the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness import wire
from harness.capacity.fitting.fit import limits_of
from harness.capacity.fitting.rate_search import Traffic
from harness.capacity.models.device import Device
from harness.capacity.models.steps import StepTime
from harness.capacity.planning.pools import Pools
from harness.capacity.planning.staged import Topology, staged_step_time, step_knots
from harness.errors import InconclusiveError, InputError
from harness.records.fit import Fit, FittedDeployment, FittedStage
from harness.records.plan import CountAtRate, SensitivityRow
from harness.topology import Knobs, frame_path, instances_of, kv_holder, number_of, owner_of

LONGER = 1.2
FASTER = 1.5
_DELAYS = tuple(f"{stage}.delay_us" for stage in wire.STAGES)


@dataclass(frozen=True)
class Change:
    """A change as text, and the pools with it; None where its effect is unknown, and ``note`` says why.

    ``basis``: simulated (from measured parts) or extrapolated (from a model of the stages or of the device).
    """

    name: str
    pools: Pools | None
    basis: str
    note: str = ""


def sensitivity(
    fit: Fit, chosen: FittedDeployment, pools: Pools, targets_qps: Sequence[float], gpus: int = 1
) -> tuple[SensitivityRow, ...]:
    """plan.json's ``sensitivity``: for each change, the rate of a device and the devices of each target.

    ``gpus``: GPUs per device, on each of which a stage has the instances of its knob.
    """
    fit = replace(fit, deployments=tuple(_on_all(each, gpus) for each in fit.deployments))
    return tuple(_record(change, targets_qps) for change in changes(fit, _on_all(chosen, gpus), pools, gpus))


def _on_all(fit: FittedDeployment, gpus: int) -> FittedDeployment:
    """The fit of a deployment whose knobs count the instances of every stage on all GPUs together."""
    knobs = fit.deployment
    counted = {f"{owner_of(each)}.instances": instances_of(knobs, each, gpus) for each in frame_path(knobs)}
    return replace(fit, deployment={**knobs, **counted})


def changes(fit: Fit, chosen: FittedDeployment, pools: Pools, gpus: int = 1) -> Iterator[Change]:
    """No change, to compare; longer sessions, half the delay, one more instance of the busiest stage, a fast device.

    Instances are counted on all ``gpus`` of a device together; one more is one on each.
    """
    yield Change("as planned", pools, "simulated")
    yield Change(f"sessions {LONGER - 1:.0%} longer", _longer(pools), "simulated")
    delays = {knob: number_of(chosen.deployment, knob, 0) for knob in _DELAYS}
    if any(delays.values()):
        yield _turned("half the delay", fit, chosen, pools, {knob: value // 2 for knob, value in delays.items()})
    else:
        yield Change("half the delay", None, "", "the deployment has no delay")
    stage = _busiest(chosen)
    if stage is None:
        yield Change("one more instance", None, "", "the service time of no stage is known")
    else:
        knob = f"{owner_of(stage)}.instances"
        turned, name = {knob: number_of(chosen.deployment, knob, 1) + gpus}, f"one more instance of {stage}"
        name += " on each GPU" if gpus > 1 else ""
        if stage == wire.ENGINE and not _is_measured(fit, {**chosen.deployment, **turned}):
            note = "a second engine shares the GPU and its memory with the first: measure engine.instances"
            yield Change(name, None, "", note)
        else:
            yield _turned(name, fit, chosen, pools, turned)
    yield _faster(chosen, pools)


def _is_measured(fit: Fit, deployment: Knobs) -> bool:
    return any(each.deployment == deployment and not each.inconclusive for each in fit.deployments)


def _longer(pools: Pools) -> Pools:
    traffic, limits = lengthened(pools.traffic, LONGER), pools.limits
    if limits.kv is not None:
        limits = replace(limits, kv_slots=limits.kv.slots(traffic.whole_frames))
    return pools.changed(traffic=traffic, limits=limits)


def lengthened(traffic: Traffic, factor: float) -> Traffic:
    """Traffic with sessions ``factor`` times as long, limited to 90 minutes, at the same rate."""
    frames = np.minimum(traffic.frames * factor, np.maximum(traffic.frames, wire.MAX_FRAMES))
    longer = float(frames.mean() / traffic.frames.mean())
    return replace(
        traffic,
        frames=frames,
        whole_frames=traffic.whole_frames * longer,
        residual_frames=traffic.residual_frames * longer,
        mean_frames=traffic.mean_frames * longer,
    )


def _turned(name: str, fit: Fit, chosen: FittedDeployment, pools: Pools, knobs: Knobs) -> Change:
    """Other knobs: a measured deployment with exactly these, otherwise a prediction from the stages' service times."""
    wanted = {**chosen.deployment, **knobs}
    for other in fit.deployments:
        if other.deployment == wanted and not other.inconclusive:
            device = Device.from_fit(other)
            limits = limits_of(other, pools.limits.slos, fit.session_limit, fit.extrapolation, pools.traffic)
            return Change(
                name, pools.changed(device=device, limits=limits), "simulated", "as this deployment was measured"
            )
    try:
        now = Topology.of_fit(chosen)
        counted = f"{owner_of(kv_holder(chosen.deployment))}.instances"
        before = number_of(chosen.deployment, counted, 1)
        roomy = _with_instances(pools, number_of(knobs, counted, before) - before)
        return _staged(name, roomy, now, Topology.of_fit(chosen, knobs))
    except (InconclusiveError, InputError) as error:
        return Change(name, None, "", str(error))


def _with_instances(pools: Pools, more: int) -> Pools:
    """The pools with ``more`` further instances that hold KV caches: each has its own room for them."""
    if pools.limits.kv is None:
        return pools
    kv = replace(pools.limits.kv, instances=pools.limits.kv.instances + more)
    return pools.changed(limits=replace(pools.limits, kv=kv, kv_slots=kv.slots(pools.traffic.whole_frames)))


def _faster(chosen: FittedDeployment, pools: Pools) -> Change:
    name = f"a device that computes {FASTER - 1:.0%} faster"
    try:
        now = Topology.of_fit(chosen)
        stages = tuple(replace(each, alpha_s=each.alpha_s / FASTER, tau0_s=each.tau0_s / FASTER) for each in now.stages)
    except (InconclusiveError, InputError):
        shorter = _scaled(pools.device, lambda n: np.full(len(n), 1 / FASTER))
        return Change(name, pools.changed(device=shorter), "extrapolated", "assumes that delays and hops shrink too")
    change = _staged(name, pools, now, replace(now, stages=stages))
    assumed = "assumes that the host's share of stage time shrinks as much as the GPU's"
    return replace(change, note=f"{change.note}; {assumed}")


def _staged(name: str, pools: Pools, now: Topology, then: Topology) -> Change:
    """The measured step time, times the ratio that the model of the stages predicts for the change."""
    most = math.ceil(pools.device.max_sessions)
    whole = now.completed(pools.device.step_time)
    between = {"hop_s": whole.hop_s, "host_s": whole.host_s}
    before, after = (staged_step_time(replace(each, **between), most, np.random.default_rng(0)) for each in (now, then))
    off = np.abs(before(np.arange(1, most + 1)) / pools.device.step_time(np.arange(1, most + 1)) - 1)
    note = f"predicted by the stage model (median error {np.median(off):.0%} on the measured deployment)"
    changed = _scaled(pools.device, lambda n: after(n) / before(n))
    return Change(name, pools.changed(device=changed), "extrapolated", note)


def _scaled(device: Device, factor: Callable[[np.ndarray], np.ndarray]) -> Device:
    """A device whose step time is multiplied by ``factor`` (of sessions [n])."""
    step = device.step_time
    knots = np.array(step.knots or step_knots(math.ceil(device.max_sessions), ()), dtype=float)
    values = step(knots) * factor(knots)
    return replace(
        device, step_time=StepTime("piecewise", tuple(values.tolist()), tuple(knots.tolist())), draws=(), levels=()
    )


def _busiest(chosen: FittedDeployment) -> str | None:
    """The stage of the frame path whose instances would be busy longest with a full ladder's largest batch."""
    path = frame_path(chosen.deployment)
    known = [each for each in chosen.stages if each.stage in path and isinstance(each, FittedStage)]

    def busy_s(fit: FittedStage) -> float:
        largest = max(point.batch_size for point in fit.points)
        instances = number_of(chosen.deployment, f"{owner_of(fit.stage)}.instances", 1)
        return (fit.alpha_s * largest + fit.tau0_s) / instances

    return max(known, key=busy_s).stage if known else None


def _record(change: Change, targets_qps: Sequence[float]) -> SensitivityRow:
    pools, note, rate, counts = change.pools, change.note, None, [None] * len(targets_qps)
    if pools is not None and pools.rate(1)[0] > 0:
        rate, counts = pools.rate(1)[0], [int(pools.devices_for(qps, np.ones(1))[0]) for qps in targets_qps]
    elif pools is not None:
        note = "one session alone violates an SLO"
    rows = tuple(CountAtRate(qps=qps, devices=count) for qps, count in zip(targets_qps, counts, strict=True))
    return SensitivityRow(change=change.name, basis=change.basis, note=note, rate_per_device=rate, targets=rows)
