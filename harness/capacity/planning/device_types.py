"""Predicts a type of device that was not deployed, from its profile: stage times over batch and context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import optimize

from harness import wire
from harness.capacity.fitting.rate_search import Limits
from harness.capacity.models.memory import KvRoom
from harness.capacity.planning.cost_and_growth import cost_per_audio_hour, price_of
from harness.capacity.planning.pools import Pools
from harness.capacity.planning.staged import StageModel, Topology, hop_of, staged_step_time
from harness.device_profile import ESTIMATED, Profile, StagePoint
from harness.errors import InconclusiveError, InputError
from harness.records.fit import FittedDeployment
from harness.records.plan import CostedCount, DeviceTypeRow
from harness.topology import Knobs, number_of, topology_of

_DEFAULT_STEPS = wire.DEFAULT_DIFFUSION_STEPS
_NOTE = (
    "a lower bound: stages as profiled, in turns on one device; hops as measured here with one session; first audio "
    "and the variation of requests as measured here; extra time on a host busy with many sessions is left out"
)
_FUSED = (
    "not predicted: the chosen deployment is the fused engine, and a profile has the times of separate stages; run a "
    "sign-off on such a device, or plan with topology: staged"
)
_SEPARATED = "its host time overlaps with the turns of its GPU"
_NOT_SEPARATED = "its profile does not separate host time from GPU time, so all of it counts as GPU turns"


@dataclass(frozen=True)
class DeviceType:
    """S(b) = tau0 + alpha b of each stage, in seconds, plus ``token_s`` b L for the LLM at a context of L tokens.

    The last is S = W + H b (L / L_ref) with H / L_ref = token_s. S is GPU time; host time is host_s + host_each_s b.
    ``worst_residual``: largest |fitted / profiled - 1| of both together. ``most_sessions``: the largest batch
    that was profiled. ``note``: caveats of the profile's times.
    """

    name: str
    preset: str
    tau0_s: Mapping[str, float]
    alpha_s: Mapping[str, float]
    token_s: float
    host_s: Mapping[str, float]
    host_each_s: Mapping[str, float]
    worst_residual: float
    most_sessions: int
    kv: KvRoom
    note: str

    @classmethod
    def of_profile(cls, profile: Profile) -> DeviceType:
        """From a profile written by ``harness profile``.

        Raises InputError for one that lacks a stage or the room for KV caches, InconclusiveError for a stage with
        fewer than three points.
        """
        try:
            return cls._read(profile)
        except ValueError as error:
            raise InputError(f"it is not a profile of a device to plan for: {error}") from None

    @classmethod
    def _read(cls, profile: Profile) -> DeviceType:
        if profile.model.kv_room_bytes is None:
            raise ValueError("its model has no kv_room_bytes")
        if profile.topology == wire.FUSED:
            raise ValueError("it has the parts of the fused engine's step: estimate the card with --topology staged")
        kv = KvRoom(profile.model.kv_room_bytes, profile.model.kv_bytes_per_token)
        tau0_s, alpha_s, token_s, host_s, host_each_s, off, batches = {}, {}, 0.0, {}, {}, 0.0, []
        for stage in wire.STAGES:
            rows = [row for row in profile.timed(stage) if row.steps in (None, _DEFAULT_STEPS)]
            (tau0_s[stage], alpha_s[stage], per_token), (host_s[stage], host_each_s[stage]), residual = _planes(
                stage, rows
            )
            token_s, off = token_s + per_token, max(off, residual)
            batches.append(max(row.at("batch") for row in rows))
        lines = tau0_s, alpha_s, token_s, host_s, host_each_s, off
        return cls(profile.device, profile.preset, *lines, min(batches), kv, _words(profile))

    def topology(self, knobs: Knobs, context: float, **between: float) -> Topology:
        """The deployment with these knobs on one such device, for sessions with ``context`` tokens on average.

        ``between``: hop_s, host_s and host_each_s of the topology.
        """
        stages = []
        for stage in wire.STAGES:
            given: dict[str, Any] = {
                knob: number_of(knobs, f"{stage}.{knob}", 0)
                for knob in ("max_batch", "instances")
                if f"{stage}.{knob}" in knobs
            }
            alpha_s = self.alpha_s[stage] + (self.token_s * context if stage == wire.LLM else 0.0)
            delay_s = number_of(knobs, f"{stage}.delay_us", 0) / 1e6
            given |= {"host_s": self.host_s[stage], "host_each_s": self.host_each_s[stage]}
            stages.append(StageModel(stage, alpha_s, self.tau0_s[stage], delay_s, **given))
        return Topology(tuple(stages), one_gpu=True, prefetch=True, **between)


def device_types(
    chosen: FittedDeployment,
    pools: Pools,
    profiles: Mapping[str, Profile],
    targets_qps: Sequence[float],
    prices: Mapping[str, float],
) -> tuple[DeviceTypeRow, ...]:
    """plan.json's ``device_types``: for each profile, by its name in the plan, what its device would sustain.

    ``chosen``: the deployment of fit.json whose knobs it gets. All is extrapolated: no such device was measured.
    """
    return tuple(_record(name, profile, chosen, pools, targets_qps, prices) for name, profile in profiles.items())


def _record(
    name: str,
    profile: Profile,
    chosen: FittedDeployment,
    pools: Pools,
    targets_qps: Sequence[float],
    prices: Mapping[str, float],
) -> DeviceTypeRow:
    named: dict[str, Any] = {
        "type": name,
        "device": profile.device,
        "preset": profile.preset,
        "basis": ESTIMATED if profile.known_as == ESTIMATED else "extrapolated",
    }
    try:
        _must_be_staged(chosen)
        device_type = DeviceType.of_profile(profile)
        typed = pools_of_type(device_type, pools, chosen)
    except (InconclusiveError, InputError) as error:
        return DeviceTypeRow(**named, rate_per_device=None, kv_sessions=None, targets=(), note=str(error))
    priced = price_of(prices, name) or price_of(prices, profile.device)
    rows = tuple(_counts(typed, qps, priced[1] if priced else None) for qps in targets_qps)
    off = f"lines through the profile are off by {device_type.worst_residual:.0%} at the most"
    note = f"{_NOTE}; {device_type.note}; {off}"
    rate, binding = typed.rate(1)
    known = {"rate_per_device": rate, "kv_sessions": typed.limits.kv_slots}
    return DeviceTypeRow(**named, **known, binding=binding, targets=rows, note=note)


def _must_be_staged(chosen: FittedDeployment) -> None:
    """Raise InconclusiveError where the chosen deployment is the fused engine."""
    if topology_of(chosen.deployment) == wire.FUSED:
        raise InconclusiveError(_FUSED)


def pools_of_type(device_type: DeviceType, pools: Pools, chosen: FittedDeployment) -> Pools:
    """Pools of a type of device under the traffic and SLOs of ``pools``, with the knobs of a deployment of fit.json.

    Raises InconclusiveError for the fused engine.
    """
    _must_be_staged(chosen)
    frames = pools.traffic.whole_frames
    kv = device_type.kv
    context = float(np.mean(kv.bytes_of(frames))) / kv.bytes_per_token - float(np.mean(frames))  # half spoken
    try:
        hop_s = hop_of(pools.device.step_time, Topology.of_fit(chosen))
    except (InconclusiveError, InputError):
        hop_s = 0.0
    topology = device_type.topology(chosen.deployment, context, hop_s=hop_s)
    step_time = staged_step_time(topology, device_type.most_sessions, np.random.default_rng(0))
    device = replace(
        pools.device, step_time=step_time, max_sessions=float(device_type.most_sessions), draws=(), levels=()
    )
    limits = Limits(pools.limits.slos, device_type.most_sessions, None, kv, kv.slots(frames))
    return pools.changed(device=device, limits=limits)


def _counts(pools: Pools, qps: float, price: float | None) -> CostedCount:
    load = pools.fewest(qps) if pools.rate(1)[0] > 0 else None
    devices = load.devices if load else None
    cost = None if price is None else cost_per_audio_hour(devices, qps, price, pools.traffic.mean_frames)
    return CostedCount(qps=qps, devices=devices, cost_per_audio_hour=cost)


def _planes(stage: str, rows: Sequence[StagePoint]) -> tuple[tuple[float, float, float], tuple[float, float], float]:
    """tau0, alpha and seconds per token of the GPU; constant and seconds per session of the host; the worst residual.

    Least squares relative to the GPU's time and to the sum of both; no coefficient is below 0.
    """
    if len({(row.at("batch"), row.context or 0) for row in rows}) < 3:
        raise InconclusiveError(f"the profile has fewer than 3 points of {stage}: profile it again, in full")
    batch = np.array([row.at("batch") for row in rows], dtype=float)
    context = np.array([row.context or 0 for row in rows], dtype=float)
    wall_s, gpu_s = np.array([(row.ms, row.turn_ms) for row in rows], dtype=float).T / 1e3
    columns = np.column_stack([np.ones(len(rows)), batch, batch * context / 1e6])
    gpu, _ = optimize.nnls(columns / gpu_s[:, None], np.ones(len(rows)))
    host, _ = optimize.nnls(columns[:, :2] / wall_s[:, None], (wall_s - gpu_s) / wall_s)
    residual = float(np.max(np.abs((columns @ gpu + columns[:, :2] @ host) / wall_s - 1)))
    return (float(gpu[0]), float(gpu[1]), float(gpu[2]) / 1e6), (float(host[0]), float(host[1])), residual


def _words(profile: Profile) -> str:
    words = _SEPARATED if profile.is_separated else _NOT_SEPARATED
    return f"{words}; {profile.note}" if profile.note else words
