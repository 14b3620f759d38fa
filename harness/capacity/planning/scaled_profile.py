"""The profile of a GPU that was not measured, scaled from the profile of one that was: only GPU time scales.

Python and the launching of kernels are assumed to take as long with any GPU. So, for each point of the profile,

    t' = host_ms + floor' / efficiency,   efficiency = floor / device_ms on the GPU that was measured,

with floor = max(bytes / bandwidth, operations / throughput) of either GPU (roofline: vibevoice/profiling/roofline.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from harness.capacity.planning.device_types import device_ms, separates
from harness.errors import InputError

_NOT_SEPARATED = " (its profile does not separate them: the host's time is scaled too)"


def scaled(
    profile: Mapping, name: str, bandwidth_gb_s: float, tflop_s: float, kv_room_bytes: float | None = None
) -> dict:
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
        measured = profile["bandwidth_gb_s"], profile["tflop_s"]
        stages = {stage: [_point(row, measured, speeds) for row in rows] for stage, rows in profile["stages"].items()}
        room = profile["model"]["kv_room_bytes"] if kv_room_bytes is None else int(kv_room_bytes)
        note = _note(profile, speeds, kv_room_bytes is not None)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise InputError(
            f"it cannot be scaled to another GPU: {error!r}; repeat it with `harness profile`, which stores the "
            "bytes and operations of every point"
        ) from None
    speed = {"bandwidth_gb_s": bandwidth_gb_s, "tflop_s": tflop_s}
    model = profile["model"] | {"kv_room_bytes": room}
    return {**profile, "device": name, "model": model, **speed, "stages": stages, "basis": "extrapolated", "note": note}


def _point(row: Mapping, measured: tuple[float, float], speeds: tuple[float, float]) -> dict:
    if "ms" not in row:
        return dict(row)
    before_ms, gpu_ms = _floor_ms(row, *measured), device_ms(row)
    after_ms = _floor_ms(row, *speeds)
    host_ms, scaled_ms = row["ms"] - gpu_ms, gpu_ms * after_ms / before_ms
    times = {"ms": host_ms + scaled_ms, "device_ms": scaled_ms, "host_ms": host_ms, "roofline_ms": after_ms}
    return {**row, **times}


def _floor_ms(row: Mapping, bandwidth_gb_s: float, tflop_s: float) -> float:
    return max(row["bytes"] / bandwidth_gb_s / 1e6, row["gflop"] / tflop_s)


def _note(profile: Mapping, speeds: tuple[float, float], own_room: bool) -> str:
    room = "" if own_room else f", room for KV caches as on the {profile['device']}"
    return (
        f"scaled from the profile of {profile['device']}: the GPU's time by its floor at {speeds[0]:g} GB/s and "
        f"{speeds[1]:g} TFLOP/s, at the efficiency measured there; the host's time as it is"
        f"{'' if separates(profile) else _NOT_SEPARATED}{room}"
    )
