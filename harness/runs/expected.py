"""What a server of emulated GPUs is expected to sustain, by its profile, before anything is measured.

In closed form (``planning.closed_form``), over the frame steps that the stage model simulates: it decides how long
windows must be, and is no answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from harness.capacity.models.memory import prompt_tokens
from harness.capacity.planning.closed_form import ClosedDevice, ClosedPools, MemoryNeed, MixDemand
from harness.capacity.planning.device_types import DeviceType
from harness.capacity.planning.estimated import ENTRY_S
from harness.capacity.planning.staged import staged_step_time
from harness.cards.assumptions import FIRST_STEPS, HOP, OF_SERVING, OF_STAGED
from harness.device_profile import PREFILL, Profile
from harness.errors import HarnessError, InconclusiveError
from harness.planfile.plan import PlanSpec
from harness.records.store import read_profile
from harness.runs.rungs import kv_room_of

_METRICS = ("ttfa_s", "rtf")  # what the closed form knows


@dataclass(frozen=True)
class ExpectedServer:
    """``rate_per_s``: the highest rate of requests with every SLO met. ``step_s`` [n]: of a GPU with 1 to n sessions.

    ``gpus``: of the server, which share its sessions. ``mean_frames``: of a request. ``binding``: what limits the rate.
    ``of_all``: the space has no other point; otherwise these are of the first value of each knob, and another point may
    be faster.
    """

    rate_per_s: float
    step_s: np.ndarray
    gpus: int
    mean_frames: float
    binding: str = ""
    of_all: bool = True

    def begun_per_s(self, sessions: int) -> float:
        """Requests/s that begin while so many sessions are held: as many as end, by the frames that they make."""
        step_s = np.interp(sessions / self.gpus, np.arange(1, len(self.step_s) + 1), self.step_s)
        return float(sessions / step_s / self.mean_frames)

    def step_at(self, rate_per_s: float) -> float:
        """Seconds of a frame step with the fewest sessions that make the frames of a rate; the last one beyond."""
        frames_per_s = self.gpus * np.arange(1, len(self.step_s) + 1) / self.step_s
        enough = np.flatnonzero(frames_per_s >= rate_per_s * self.mean_frames)
        return float(self.step_s[enough[0] if len(enough) else -1])


def expected_server(spec: PlanSpec) -> ExpectedServer | None:
    """The server of a plan that emulates GPUs; None for any other, and where the profile does not tell."""
    try:
        return server_by_profile(spec)
    except InconclusiveError:
        return None


def server_by_profile(spec: PlanSpec) -> ExpectedServer:
    """The server of a plan that emulates GPUs. Raises InconclusiveError that says why nothing is expected."""
    path = spec.profile_path()
    if path is None:
        raise InconclusiveError("only emulated GPUs have an expected one")
    kv = kv_room_of(spec)
    if kv is None:
        raise InconclusiveError(f"{path} has no kv_room_bytes, so the sessions that its memory holds are not known")
    try:
        profile, demand = read_profile(path), MixDemand.of(spec.traffic_mix())
        step_s = _steps_s(DeviceType.of_profile(profile), spec, demand.mean_context)
        base_s = {each.name: _first_audio_base_s(profile, each.frames, demand) for each in demand.classes}
    except (HarnessError, ValueError) as error:  # the profile has no separate stages, or too few points of one
        raise InconclusiveError(f"the profile {path} does not tell: {error}") from None
    need = MemoryNeed.of(demand, kv.bytes_per_token)
    steps = dict.fromkeys(base_s, OF_SERVING[FIRST_STEPS].likely)
    device = ClosedDevice(step_s, base_s, steps, float(kv.limit_bytes), len(step_s))
    slos = tuple(slo for slo in spec.slo_list() if slo.metric in _METRICS)
    rate, binding = ClosedPools(device, demand, need, slos, 1.0).rate(spec.gpus)
    return ExpectedServer(rate, step_s, spec.gpus, demand.mean_frames, binding, of_all=spec.size() == 1)


def _steps_s(device_type: DeviceType, spec: PlanSpec, context: float) -> np.ndarray:
    """Seconds of a frame step with 1 to as many sessions as were profiled, on one GPU, at the space's first point."""
    first = {knob: values[:1] for knob, values in spec.space.items()}
    (point,) = spec.model_copy(update={"space": first}).points()
    topology = device_type.topology(point, context, hop_s=OF_STAGED[HOP].likely / 1e3)
    step_time = staged_step_time(topology, device_type.most_sessions, np.random.default_rng(0), starts=1)
    return np.asarray(step_time(np.arange(1, device_type.most_sessions + 1)), dtype=float)


def _first_audio_base_s(profile: Profile, frames: np.ndarray, demand: MixDemand) -> float:
    """Seconds from the receipt of a class's longest request to its first frame step: entry, and its prompt in parts."""
    points, tokens = profile.timed(PREFILL), float(prompt_tokens(float(frames.max()), demand.voice_frames))
    sizes = sorted(each.at("tokens") for each in points)
    size = next((each for each in sizes if each >= tokens), sizes[-1])
    slowest_ms = max(each.ms for each in points if each.at("tokens") == size)
    return ENTRY_S + math.ceil(tokens / size) * slowest_ms / 1e3
