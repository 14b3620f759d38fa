"""The record of a task: what was asked, how far it is, and how callers see it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from harness import wire

QUEUED, RUNNING, DONE, FAILED, CANCELLED = STATES = ("queued", "running", "done", "failed", "cancelled")
ENDED = (DONE, FAILED, CANCELLED)
MOST_TITLE = 80
_TEXTS = ("id", "owner", "status", "error", "result")  # fields of a record in Redis, by type
_SECONDS = ("created", "started", "ended", "busy_s")
_COUNTS = ("attempt", "live", "failures", "result_bytes")
_ID_BYTES = 18  # 144 random bits: an id cannot be guessed


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What was asked. ``voices``: the voice id of speaker 1, 2, …; ``frames``: to be spoken, or at most with
    ``until_end`` (``estimate`` is then what the text is likely to take)."""

    script: str
    voices: tuple[int, ...]
    frames: int
    estimate: int
    until_end: bool = False
    format: str = "wav"
    seed: int = 0
    diffusion_steps: int = wire.DEFAULT_DIFFUSION_STEPS
    guidance: float = wire.DEFAULT_GUIDANCE_SCALE
    webhook: str = ""

    def text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of(cls, text: str) -> TaskSpec:
        values: dict[str, Any] = json.loads(text)
        values["voices"] = tuple(values["voices"])
        return cls(**values)


@dataclass(frozen=True)
class StoredSegment:
    """A part of a task's audio that counts: its object, frames and bytes, and the object of its carry ("" for none)."""

    name: str
    frames: int
    bytes: int
    carry: str = ""

    def text(self) -> str:
        return json.dumps([self.name, self.frames, self.bytes, self.carry])

    @classmethod
    def of(cls, text: str) -> StoredSegment:
        return cls(*json.loads(text))


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """The state of a task. Times are seconds since 1970, 0 = not yet; ``busy_s``: seconds spent on stored segments.

    ``live``: frames of the segment in progress. ``attempt`` is the fencing token: it grows with every claim, and only
    the worker that holds the present one may change the task. ``spoken``: all segments are stored. ``result``: the
    object with the encoded audio, "" for the segments themselves.
    """

    id: str
    owner: str
    spec: TaskSpec
    status: str
    attempt: int = 0
    created: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    live: int = 0
    busy_s: float = 0.0
    spoken: bool = False
    failures: int = 0
    error: str = ""
    result: str = ""
    result_bytes: int = 0
    segments: tuple[StoredSegment, ...] = field(default=())

    @property
    def title(self) -> str:
        """The beginning of the script, without its marker."""
        words = self.spec.script.partition("\n")[0].partition(": ")[2]
        return words if len(words) <= MOST_TITLE else f"{_whole_words(words[:MOST_TITLE])}…"

    @property
    def frames(self) -> int:
        """Frames whose audio is stored."""
        return sum(segment.frames for segment in self.segments)

    @property
    def audio_bytes(self) -> int:
        """Bytes of 16-bit samples that are stored."""
        return sum(segment.bytes for segment in self.segments)

    @property
    def of_frames(self) -> int:
        """Frames when done: exact if they were asked for, or once all are spoken; otherwise estimated from the text."""
        if self.spoken:
            return self.frames
        return max(self.spec.estimate, self.frames + self.live) if self.spec.until_end else self.spec.frames

    @property
    def rtf(self) -> float | None:
        """Seconds of work per second of stored audio."""
        return self.busy_s / (self.frames * wire.SECONDS_PER_FRAME) if self.frames else None

    @classmethod
    def of(cls, fields: Mapping[str, str], segments: list[str]) -> TaskRecord:
        """The record from its fields in Redis."""
        given: dict[str, Any] = {name: fields[name] for name in _TEXTS if name in fields}
        given |= {name: float(fields[name]) for name in _SECONDS if name in fields}
        given |= {name: int(fields[name]) for name in _COUNTS if name in fields}
        given["segments"] = tuple(map(StoredSegment.of, segments))
        return cls(**given, spec=TaskSpec.of(fields["spec"]), spoken=fields.get("spoken") == "1")

    def view(self, position: int | None = None, estimated_start: float | None = None) -> dict:
        """The task as callers see it (the object of ``GET /v1/tasks/{id}``)."""
        heard = self.frames + (self.live if self.status == RUNNING else 0)
        rest = max(0, self.of_frames - heard)
        eta_s = self.rtf * rest * wire.SECONDS_PER_FRAME if self.status == RUNNING and self.rtf else None
        here = f"/v1/tasks/{self.id}"
        return {
            "id": self.id,
            "title": self.title,
            "status": self.status,
            "position": position,
            "estimated_start": _iso(estimated_start),
            "frames": heard,
            "of_frames": self.of_frames,
            "seconds_of_audio": round(self.frames * wire.SECONDS_PER_FRAME, 3),
            "rtf": None if self.rtf is None else round(self.rtf, 4),
            "eta_s": None if eta_s is None else round(eta_s, 1),
            "error": self.error or None,
            "created": _iso(self.created),
            "started": _iso(self.started),
            "ended": _iso(self.ended),
            "speakers": len(self.spec.voices),
            "format": self.spec.format,
            "links": {"self": here, "events": f"{here}/events", "audio": f"{here}/audio"},
        }


def new_id() -> str:
    return secrets.token_hex(_ID_BYTES)


def _iso(at_s: float | None) -> str | None:
    if not at_s:
        return None
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _whole_words(cut: str) -> str:
    """A text that was cut off, shorter by one character or by the word at its end; a single long word is kept."""
    return cut[:-1].rpartition(" ")[0].rstrip() or cut[:-1]
