"""The settings of a load test, the rungs that it held, and its outcome, as its process records them.

They are stored in records.msgpack, for the process that started the test, and in the manifest.json beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from harness.content import Figure, absent, content_of, read, stored_as
from harness.identity import HostFacts
from harness.records.load import TraceRecord
from harness.records.summary import Summary

LOAD_TEST = "load test"  # the kind of a manifest.json that Locust's tests write
_JUDGED = ("valid", "verdict", "reasons", "gates")  # fields of a TestEnd that its manifest holds as ``certificate``


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassRecord:
    """A traffic class of a mix; ``speakers``: their lowest and highest number."""

    share: float
    mean_audio_s: float
    speakers: tuple[int, int]
    slos: Annotated[dict[str, int | float], Field(validation_alias="promises")] = stored_as("promises")
    chunk_frames: int | None = absent(None)
    diffusion_steps: int | None = absent(None)


@dataclass(frozen=True, kw_only=True, slots=True)
class UserRecord:
    """A user class of Locust."""

    mix: str
    weight: int | float
    fixed_count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedLoad:
    """The settings of a load test. Processes with equal settings send shares of the same load.

    ``arrivals`` None is a closed loop. ``sessions``: the rungs of a ladder. ``steady``: sessions that start
    in progress. ``iterations``: requests after which the test ends.
    """

    loop: Literal["closed", "open"]
    arrivals: str | None
    rate_per_s: int | float | None
    burstiness: float | None = absent(None)
    stages: tuple[tuple[float, float, float], ...] = absent(())
    trace: TraceRecord | None = absent(None)
    mix: str
    users: dict[str, UserRecord] = field(default_factory=dict)
    classes: dict[str, ClassRecord]
    mean_audio_s: float
    chunk_frames: int
    diffusion_steps: int
    seed: int
    steady: int | None
    iterations: int | None
    readers: int
    sessions: Annotated[tuple[int, ...], Field(validation_alias="ladder")] = stored_as("ladder")
    rung_s: int | float
    precision: float | None
    until_saturated: bool

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> AskedLoad:
        """Read its content. Raises ValueError."""
        return read(cls, content)

    def to_dict(self) -> dict[str, Any]:
        return content_of(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsRecord:
    """The PEM files of encrypted connections; "" for those not given."""

    ca: str
    cert: str
    key: str
    server_name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetRecord:
    """A target without its secrets: ``headers`` by name only. ``tls`` None is plain text; times in seconds."""

    addresses: tuple[str, ...]
    tls: TlsRecord | None
    headers: tuple[str, ...]
    balance: str
    ready_s: float
    silence_s: float
    request_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TestRun:
    """A test and its target. ``run_s``: the time limit, None without one.

    ``dilation``: how many times slower than its records say an emulated server ran.
    """

    __test__ = False  # not a test of pytest

    url: str
    target: TargetRecord
    run_s: int | float | None
    dilation: float = absent(1.0)
    asked: AskedLoad

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> TestRun:
        """Read its content, which holds the settings at the same level as the rest. Raises ValueError."""
        return read(cls, {**content, "asked": AskedLoad.of(content)})

    def to_dict(self) -> dict[str, Any]:
        content = content_of(self)
        asked = content.pop("asked")
        return {**content, **asked}


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldRung:
    """A rung of a ladder, held by ``users`` over [start_ns, end_ns).

    ``others_share`` and ``stolen_share``: of the cores of the load generator's host, what processes other than harness
    and server used, and what the hypervisor took; None where unknown. ``disturbed``: why that spoils the rung, or "".
    """

    users: int
    start_ns: int
    end_ns: int
    others_share: float | None = absent(None)
    stolen_share: float | None = absent(None)
    disturbed: str = absent("")

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> HeldRung:
        """Read its content. Raises ValueError."""
        return read(cls, content)

    def to_dict(self) -> dict[str, Any]:
        return content_of(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerRequests:
    """Requests to one server, and statistics of the connections to it."""

    address: str
    requests: int
    reconnects: int
    passed_over: int
    forgotten: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HostSummary:
    """The host over the window: means and maxima of its ``samples``, as shares of its cores; None without one."""

    samples: Annotated[int, Field(validation_alias="looks")] = stored_as("looks")
    cores: int | None
    stolen_share: float | None
    stolen_share_max: float | None
    busy_share: float | None
    other_share: float | None
    other_share_max: float | None
    server_memory_bytes: int
    server_events: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftRecord:
    """The server over a long test, in equal parts of its window."""

    part_s: float
    step_s: tuple[Figure, ...]
    memory_mib: tuple[Figure, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TestEnd:
    """The outcome of a test over [start_ns, end_ns).

    ``gates``: name, passed and explanation. ``slos``: text, met, and the measured quantile. ``machine``: None
    where the host was not sampled; content holds that as an empty object.
    """

    __test__ = False

    origin_ns: int
    start_ns: int
    end_ns: int
    warm_up_s: float
    ladder_ended: str
    submitted: int
    never_sent: int
    lost: int
    lag_p99_s: Figure
    replicas: tuple[ServerRequests, ...]
    valid: bool
    verdict: str = ""
    reasons: tuple[str, ...]
    gates: tuple[tuple[str, bool | None, str], ...]
    slos: Annotated[tuple[tuple[str, bool | None, Figure], ...], Field(validation_alias="promises")] = stored_as(
        "promises"
    )
    machine: Annotated[HostSummary | None, BeforeValidator(lambda content: content or None)]
    drift: DriftRecord | None
    summary: Annotated[Summary, BeforeValidator(Summary.of)]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> TestEnd:
        """Read its content. Raises ValueError."""
        return read(cls, content)

    def to_dict(self) -> dict[str, Any]:
        content = content_of(self)
        return content | {"machine": content["machine"] or {}}


@dataclass(frozen=True, kw_only=True, slots=True)
class TestManifest:
    """manifest.json of a load test. ``requests``: by outcome; it and ``end`` are None while the test runs or if it was
    killed. Times are ISO 8601, UTC.
    """

    __test__ = False

    created_at: str
    finished_at: str | None = None
    commit: str
    versions: dict[str, str]
    host: HostFacts
    run: TestRun
    requests: dict[str, int] | None = None
    end: TestEnd | None = None

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> TestManifest:
        """Read its content. Raises ValueError or KeyError."""
        end = TestEnd.of({**content["certificate"], **content["measured"]}) if "measured" in content else None
        return read(cls, {**content, "run": TestRun.of(content["load"]), "end": end})

    def to_dict(self) -> dict[str, Any]:
        content = content_of(self)
        load, requests, end = (content.pop(name) for name in ("run", "requests", "end"))
        started = {"kind": LOAD_TEST, **content, "load": load}
        if end is None:
            return started
        ended = {
            "requests": requests,
            "certificate": {name: end[name] for name in _JUDGED},
            "measured": {name: value for name, value in end.items() if name not in _JUDGED},
        }
        return started | ended
