"""The content of signoff.json: the answer of a finished run, when it expires, and the hashes of its evidence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import Field

from harness.content import SCHEMA, OtherSchema, content_of, read
from harness.records.plan import Counts, Plan, PlannedTarget
from harness.topology import Knobs

_HASH = "sha256"  # of everything else in the file


@dataclass(frozen=True, slots=True)
class Evidence:
    """A file of the run folder, with its SHA-256."""

    name: str
    size_bytes: int
    sha256: str

    @property
    def is_part(self) -> bool:
        """Whether it holds raw records of one trial."""
        return "/" in self.name


@dataclass(frozen=True, slots=True)
class SealedTarget:
    """The devices that a rate needs; None if no count is known."""

    qps: float
    devices: int | None
    interval: Counts
    binding: str
    basis: str
    devices_n_plus_1: int | None
    devices_n_plus_2: int | None

    @classmethod
    def of_plan(cls, target: PlannedTarget) -> SealedTarget:
        return cls(**{each.name: getattr(target, each.name) for each in fields(cls)})


@dataclass(frozen=True, slots=True)
class SealedAnswer:
    """The decision for a pipeline: what one device is, and how many each target needs."""

    unit: str
    confidence: float
    deployment: Knobs | None
    reasons: tuple[str, ...]
    targets: tuple[SealedTarget, ...]

    @classmethod
    def of_plan(cls, plan: Plan) -> SealedAnswer:
        targets = tuple(map(SealedTarget.of_plan, plan.targets))
        return cls(plan.unit, plan.confidence, plan.deployment, plan.reasons, targets)


@dataclass(frozen=True, slots=True)
class SealedConditions:
    """What the answer holds for: another plan, preset, device or package needs another sign-off."""

    plan_sha256: str
    preset: str
    device: str
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Seal:
    """signoff.json. Times are ISO 8601 with a zone."""

    schema: int = SCHEMA
    run_id: str
    verdict: Annotated[str, Field(pattern="^(met|missed|inconclusive|planning estimate)$")]
    answer: SealedAnswer
    signed_at: str
    expires_at: str
    expires_with: SealedConditions
    emulated: bool
    evidence: tuple[Evidence, ...]
    report_sha256: str

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Seal:
        """Read its content. Raises ValueError, also for a field that a seal does not have: a hash covers all of it."""
        seal = read(cls, content)
        if seal.to_dict() != content:
            raise ValueError("it has fields that a seal does not have")
        return seal

    def to_dict(self) -> dict[str, Any]:
        return content_of(self)

    @property
    def sha256(self) -> str:
        """The hash that detects a change of the seal itself."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def differences(self, other: Seal) -> Iterator[str]:
        """The names of the fields in which this seal differs from another."""
        yield from (each.name for each in fields(self) if getattr(self, each.name) != getattr(other, each.name))

    def text(self) -> str:
        """The file, with the seal's own hash as its last field."""
        return json.dumps({**self.to_dict(), _HASH: self.sha256}, indent=1) + "\n"


def read_seal(text: str) -> tuple[Seal, str]:
    """A seal and the hash that its file states for it. Raises OtherSchema, ValueError, TypeError or KeyError.

    The content must be as it was hashed, so one of another schema is not migrated.
    """
    content = json.loads(text)
    if content["schema"] != SCHEMA:
        raise OtherSchema(f"schema {content['schema']}, this harness checks {SCHEMA}; use the harness that wrote it")
    stated = content.pop(_HASH)
    return Seal.of(content), stated
