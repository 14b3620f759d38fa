"""The profile of a GPU that was not measured, scaled from the profile of one that was: only GPU time scales.

Python and the launching of kernels are assumed to take as long with any GPU. So, for each point of the profile,

    t' = host_ms + floor' / efficiency,   efficiency = floor / device_ms on the GPU that was measured,

with floor = max(bytes / bandwidth, operations / throughput) of either GPU (roofline: vibevoice/profiling/roofline.py).
"""

from __future__ import annotations

from dataclasses import replace

from harness.device_profile import ESTIMATED, SCALED, Profile, SkippedPoint, StagePoint
from harness.errors import InputError

_NOT_SEPARATED = " (its profile does not separate them: the host's time is scaled too)"


def scaled(
    profile: Profile, name: str, bandwidth_gb_s: float, tflop_s: float, kv_room_bytes: float | None = None
) -> Profile:
    """The profile scaled to a GPU of this bandwidth and throughput.

    Both are as ``harness profile`` measures them, by copies and matrix products: figures of data sheets are higher.
    Host time hidden by the measured GPU's own work is unknown, though a faster GPU would wait for it. Without
    ``kv_room_bytes`` the room for KV caches is that of the measured GPU. Raises InputError for a profile
    without the data that the floor needs.
    """
    if not (bandwidth_gb_s > 0 and tflop_s > 0):
        raise InputError(
            f"invalid GPU specification, {bandwidth_gb_s:g} GB/s and {tflop_s:g} TFLOP/s: give what it reaches, above 0"
        )
    speeds = (bandwidth_gb_s, tflop_s)
    try:
        measured = _speeds_of(profile)
        stages = {
            stage: tuple(_scaled_point(point, measured, speeds) for point in points)
            for stage, points in profile.stages.items()
        }
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"it cannot be scaled to another GPU: {error}; repeat it with `harness profile`, which stores the "
            "bytes and operations of every point"
        ) from None
    room = profile.model.kv_room_bytes if kv_room_bytes is None else int(kv_room_bytes)
    return replace(
        profile, device=name, model=replace(profile.model, kv_room_bytes=room), stages=stages,
        bandwidth_gb_s=bandwidth_gb_s, tflop_s=tflop_s, basis=ESTIMATED if profile.known_as == ESTIMATED else SCALED,
        note=_note(profile, speeds, kv_room_bytes is not None),
    )  # fmt: skip


def _speeds_of(profile: Profile) -> tuple[float, float]:
    if profile.bandwidth_gb_s is None or profile.tflop_s is None:
        raise ValueError("it has no bandwidth_gb_s or no tflop_s")
    return profile.bandwidth_gb_s, profile.tflop_s


def _scaled_point(
    point: StagePoint | SkippedPoint, measured: tuple[float, float], speeds: tuple[float, float]
) -> StagePoint | SkippedPoint:
    if isinstance(point, SkippedPoint):
        return point
    after_ms = _floor_ms(point, *speeds)
    host_ms, scaled_ms = point.ms - point.turn_ms, point.turn_ms * after_ms / _floor_ms(point, *measured)
    return replace(point, ms=host_ms + scaled_ms, device_ms=scaled_ms, host_ms=host_ms, roofline_ms=after_ms)


def _floor_ms(point: StagePoint, bandwidth_gb_s: float, tflop_s: float) -> float:
    if point.bytes is None or point.gflop is None:
        raise ValueError("a point has no bytes or no gflop")
    return max(point.bytes / bandwidth_gb_s / 1e6, point.gflop / tflop_s)


def _note(profile: Profile, speeds: tuple[float, float], own_room: bool) -> str:
    room = "" if own_room else f", room for KV caches as on the {profile.device}"
    return (
        f"scaled from the profile of {profile.device}: the GPU's time by its floor at {speeds[0]:g} GB/s and "
        f"{speeds[1]:g} TFLOP/s, at the efficiency measured there; the host's time as it is"
        f"{'' if profile.is_separated else _NOT_SEPARATED}{room}"
    )
