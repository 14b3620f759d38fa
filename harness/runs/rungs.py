"""The rungs of a ladder that the memory of an emulated GPU holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from harness import wire
from harness.capacity.models.memory import KvRoom
from harness.planfile.plan import PlanSpec
from harness.records.store import read_profile

_DRAWS = 4000
_DEVIATIONS = 2.0  # of the bytes of all sessions: so many sessions fit in nearly every draw
_APART = 1.2  # a rung this far beyond the one below shows something new
_FEWEST = 3  # a step time is fitted from this many


def sessions_that_fit(spec: PlanSpec) -> float:
    """Sessions in progress whose KV caches nearly always fit the GPUs of a plan that emulates; infinite: not known.

    Their bytes are a sum of independent draws: mean + 2 standard deviations <= room. At least as many as fit if each is
    the longest.
    """
    kv = kv_room_of(spec)
    if kv is None:
        return math.inf
    mix, rng = spec.traffic_mix(), np.random.default_rng(1)
    each = kv.bytes_of(np.array([mix.sample_in_progress(rng).frames for _ in range(_DRAWS)])).astype(float)
    mean, spread = each.mean(), _DEVIATIONS * each.std()
    root = (math.sqrt(spread**2 + 4 * mean * kv.room_bytes) - spread) / (2 * mean)  # of n: n mean + root spread = room
    return max(math.floor(root**2), math.floor(kv.room_bytes / each.max()))


def kv_room_of(spec: PlanSpec) -> KvRoom | None:
    """Room for KV caches of the GPUs that a plan emulates; None where it emulates none, or nothing says."""
    path = spec.profile_path()
    if path is None:
        return None
    model = read_profile(path).model
    given = spec.parameters.get(f"{wire.LLM}.kv_limit_bytes", wire.AUTO)
    limit_bytes = model.kv_room_bytes if given == wire.AUTO else float(given)
    return KvRoom(limit_bytes, model.kv_bytes_per_token, instances=spec.gpus, gpus=spec.gpus) if limit_bytes else None


def rungs_within(rungs: Sequence[int], room: float) -> tuple[int, ...]:
    """The rungs that fit, and one at the ``room`` in place of those beyond it.

    Beyond it requests wait for memory, and a rung would count as sessions what is not served.
    """
    if rungs[-1] <= room:
        return tuple(rungs)
    most = max(math.floor(room), 1)
    within = {each for each in rungs if each <= most}
    if most >= _APART * max(within, default=0):
        within.add(most)
    if len(within) < _FEWEST:
        within |= {max(most // 2, 1), most}
    return tuple(sorted(within))


def within_room(spec: PlanSpec) -> tuple[PlanSpec, str]:
    """The plan with the rungs that its emulated GPUs hold, and which were replaced ("": none)."""
    rungs, room = spec.ladder.sessions, sessions_that_fit(spec)
    kept = rungs_within(rungs, room)
    if kept == rungs:
        return spec, ""
    ladder = spec.ladder.model_copy(update={"sessions": kept})
    says = (
        f"the KV caches of {room:.0f} sessions fit the emulated GPU's memory: rungs of "
        f"{', '.join(map(str, kept))} sessions are measured instead of {', '.join(map(str, rungs))}"
    )
    return spec.model_copy(update={"ladder": ladder}), says
