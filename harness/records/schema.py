"""The vocabulary of the harness: frozen records that every package reads and writes.

All times are nanoseconds of CLOCK_MONOTONIC (``time.monotonic_ns``), comparable across the processes of one host; under
time dilation they are those of a slower clock (``harness.clock``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator

from harness import wire
from harness.clock import HOST, Clock
from harness.content import absent, content_of, read
from harness.device_profile import Profile
from harness.identity import GpuSample, HostFacts, StageIdentity
from harness.records.day import DemandCurve
from harness.records.jobs import AskedTasks
from harness.records.load import TrialLoad
from harness.records.prediction import Prediction
from harness.records.slo import Slo
from harness.records.summary import Summary
from harness.topology import TOPOLOGY, Knobs


class Outcome(StrEnum):
    """How a request ended."""

    DONE = "done"
    ERROR = "error"
    CANCELLED = "cancelled"
    UNFINISHED = "unfinished"  # cut off by the end of the window: censored, not failed


@dataclass(frozen=True, slots=True)
class Request:
    """One request for speech. ``frames``: frames to speak now, after ``start_frame`` frames already spoken."""

    request_id: str
    traffic_class: str
    script: str
    speaker_ids: tuple[int, ...]
    frames: int
    start_frame: int = 0
    chunk_frames: int = 1
    seed: int = 0
    guidance_scale: float = wire.DEFAULT_GUIDANCE_SCALE
    due_ns: int = 0
    diffusion_steps: int = wire.DEFAULT_DIFFUSION_STEPS
    until_end: bool = False  # stop where the model ends the text; ``frames`` is then the maximum
    say: tuple[int, ...] = ()  # forced tokens (wire.TOKEN_*)
    keep: bool = False  # request a carry after the last frame
    carry: bytes = b""  # of a kept session, to resume it


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunks of one stream as columns, in order of arrival: int64 arrays of one length."""

    received_ns: np.ndarray
    sent_at_ns: np.ndarray
    samples: np.ndarray

    @classmethod
    def empty(cls) -> Chunks:
        nothing = np.empty(0, dtype=np.int64)
        return cls(nothing, nothing, nothing)

    def __len__(self) -> int:
        return len(self.received_ns)


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one request. The script itself is not stored, only its size."""

    request_id: str
    traffic_class: str
    speakers: int
    script_words: int
    frames: int
    start_frame: int
    chunk_frames: int
    loop: str  # "open" or "closed"
    due_ns: int
    sent_ns: int
    ended_ns: int
    outcome: Outcome
    error: str = ""
    chunks: Chunks = field(default_factory=Chunks.empty)
    emulated: bool = False  # compute times came from a profile
    target: str = ""  # host:port of the server that it was sent to


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Executions of one stage at one batch size, and their total compute time (input + infer + output)."""

    batch_size: int
    executions: int
    compute_ns: int


@dataclass(frozen=True, slots=True)
class StageStatistics:
    """Triton's counts for one stage: since it was loaded, or (as a difference) over a window."""

    stage: str
    requests: int
    executions: int
    queue_ns: int
    compute_ns: int
    batches: tuple[BatchStatistics, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerSample:
    """A sample of the server: cumulative statistics of every stage, and the host's load at that time."""

    at_ns: int
    stages: tuple[StageStatistics, ...]
    cpu_percent: float = 0.0  # of the whole host, 100 = all cores busy
    memory_bytes: int = 0  # resident memory of the server and its stage processes
    gpus: tuple[GpuSample, ...] = ()  # every GPU of the server's host
    metrics: dict[str, float] = field(default_factory=dict)  # of Triton's Prometheus page, by name and model


@dataclass(frozen=True, slots=True)
class Rung:
    """A window of a trial in which the load was held: one rung of a ladder, or the whole of an open-loop run.

    ``others_share`` and ``stolen_share``: of the cores of the load generator's host, what processes other than harness
    and server used, and what the hypervisor took; None where unknown. ``disturbed``: why that spoils the rung, or "".
    ``repeated``: it was measured again.
    """

    sessions: float  # mean sessions being served in the window
    frames_per_s: float  # frames delivered in the window / its seconds
    start_ns: int
    end_ns: int
    summary: Annotated[Summary, BeforeValidator(Summary.of)]
    stages: tuple[StageStatistics, ...] = ()
    others_share: float | None = absent(None)
    stolen_share: float | None = absent(None)
    disturbed: str = absent("")
    repeated: bool = absent(False)


def _prediction_of(content: Mapping[str, Any] | None) -> Prediction | None:
    return Prediction.of(content) if content else None


@dataclass(frozen=True, slots=True)
class Trial:
    """One measured load on one deployment."""

    trial_id: str
    kind: str  # "ladder" or "open"
    deployment: Knobs  # knob path -> value, e.g. {"diffusion_decoder.delay_us": 2000}
    load: TrialLoad
    started_at: str  # ISO 8601, UTC
    wall_s: float
    valid: bool
    reasons: tuple[str, ...]  # why it is INVALID, or what a reader should know
    rungs: tuple[Rung, ...]
    # written before an open-loop run starts: the fit's prediction of it
    prediction: Annotated[Prediction | None, BeforeValidator(_prediction_of)] = None
    over_saturated: bool = False
    reader_lag_p99_s: float | None = None  # how late the stream readers' own timers ran
    target: str = ""  # host:port that it ran on, if a plan is measured on several servers
    topology: str = wire.STAGED  # how the frame path was deployed
    disturbed: tuple[Rung, ...] = ()  # rungs of the ladder during which others took CPU: nothing is fitted

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Trial:
        """Read its content, a line of trials.jsonl. Raises ValueError."""
        return read(cls, content)

    def to_dict(self) -> dict[str, Any]:
        return content_of(self)


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What one process of a ``server`` reported of itself and its topology; the content is flat."""

    server: str
    topology: str
    identity: StageIdentity

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> StageRecord:
        """Read its content. Raises ValueError."""
        nested = {TOPOLOGY: wire.STAGED, **content, "identity": content}
        return read(cls, nested)

    def to_dict(self) -> dict[str, Any]:
        return {"server": self.server, TOPOLOGY: self.topology, **self.identity.content()}


def _stage_record(content: Any) -> StageRecord:
    return content if isinstance(content, StageRecord) else StageRecord.of(content)


_StageRecord = Annotated[StageRecord, BeforeValidator(_stage_record)]


@dataclass(frozen=True, kw_only=True)
class BetweenLadders:
    """How far ladders differ on such a host: relative standard deviation, its degrees of freedom, from which runs."""

    deviation: float
    degrees: float
    runs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunManifest:
    """What a results folder holds and how it came to be."""

    run_id: str
    created_at: str
    plan_path: str
    plan_sha256: str
    plan: dict[str, Any]  # the plan file, as the version of the harness that made the run read it
    commit: str
    versions: dict[str, str]  # of the packages that affect figures
    host: HostFacts
    preset: str
    device: str  # "cpu" or the GPU's name
    seed: int
    emulated: bool = False
    finished_at: str = ""
    notes: tuple[str, ...] = ()
    sealed: bool = False  # its answer was signed: signoff.json must exist
    profiles: dict[str, Profile] = field(default_factory=dict)  # of other types of device, as they were at the start
    stages: tuple[_StageRecord, ...] = ()  # what the server processes reported
    topologies: tuple[str, ...] = (wire.STAGED,)  # that the plan deploys
    between_ladders: BetweenLadders | None = absent(None)
    times_basis: str = absent("")  # of emulated times that nobody measured: estimated or scaled
    demand: DemandCurve | None = absent(None)  # over a day, as the plan file gave it at the start
    jobs: AskedTasks | None = absent(None)  # beside the streams, as their file gave them at the start
    # how many times slower than these records emulated GPUs ran; None: not chosen yet
    dilation: float | None = absent(1.0)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> RunManifest:
        """Read its content. Raises ValueError."""
        return read(cls, content)

    def to_dict(self) -> dict[str, Any]:
        return content_of(self)

    @property
    def clock(self) -> Clock:
        """The clock of the servers: that of every time in its records."""
        return Clock(self.dilation or 1.0)

    @property
    def is_estimate(self) -> bool:
        """Whether what is planned from it is an estimate: nobody measured its times, or time was dilated."""
        return bool(self.times_basis) or self.clock != HOST

    @property
    def title(self) -> str:
        """The name of the plan, otherwise that of the run."""
        return self.plan.get("name") or self.run_id

    @property
    def mix_name(self) -> str:
        """The name of the plan's traffic mix; "" if it has none."""
        mix = self.plan.get("mix") or ""
        return mix if isinstance(mix, str) else mix.get("name") or ""

    @property
    def topology(self) -> str:
        """The topology that the plan names."""
        return self.plan.get(TOPOLOGY) or wire.STAGED

    @property
    def valid_days(self) -> int | None:
        """Days until the answer expires, if the plan says so."""
        return self.plan.get("valid_days")

    @property
    def slos(self) -> list[Slo]:
        """The SLOs of the plan."""
        limits = self.plan.get("slos") or self.plan.get("promises") or {}
        return [Slo.parse(name, key, limit) for name, each in limits.items() for key, limit in each.items()]
