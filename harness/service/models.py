"""What callers send and get, as the OpenAPI document describes it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from harness import wire

MOST_VOICES = wire.MAX_SPEAKERS
Voice = Annotated[StrictInt, Field(ge=0, le=1_000_000)] | Annotated[StrictStr, Field(max_length=100)]
Voices = Annotated[list[Voice], Field(max_length=MOST_VOICES)]
_FORBID = ConfigDict(extra="forbid")


class TaskOptions(BaseModel):
    """How the script is spoken."""

    model_config = _FORBID
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of the noise: the same seed gives the same audio.")
    diffusion_steps: int = Field(wire.DEFAULT_DIFFUSION_STEPS, ge=1, le=wire.MAX_DIFFUSION_STEPS)
    guidance: float = Field(wire.DEFAULT_GUIDANCE_SCALE, ge=0, le=100)


class TaskRequest(BaseModel):
    """A script to be spoken as a task."""

    model_config = _FORBID
    script: str = Field(description="Lines `Speaker N: text`, N from 1 to 4.")
    voices: Voices | None = Field(
        None, description="The voice (id or name) of the first speaker, the second, …; null: voices 1, 2, …"
    )
    format: Literal["wav", "flac", "opus"] = "wav"
    options: TaskOptions = TaskOptions()
    webhook: str | None = Field(None, max_length=2000, description="Called with the task when it has ended.")


class SpokenRequest(BaseModel):
    """A script to be spoken at once. Fields of other speech servers that have no meaning here are ignored."""

    input: str = Field(description="A script: lines `Speaker N: text`, or text for one speaker.")
    voice: Voice | Voices | None = None
    voices: Voices | None = None
    response_format: Literal["pcm", "wav"] = "pcm"
    stream: bool = Field(True, description="Send audio as it is made; otherwise all of it at the end.")
    options: TaskOptions = TaskOptions()


class TaskLinks(BaseModel):
    self: str
    events: str
    audio: str


class TaskAccepted(BaseModel):
    """A task that was queued."""

    id: str
    status: str
    links: TaskLinks
    remarks: list[str] = Field([], description="Probable mistakes in the script.")


class TaskView(BaseModel):
    """A task. Times are ISO 8601 in UTC; `estimated_start` and `eta_s` are estimates, null while nothing is known."""

    id: str
    title: str = Field(description="The beginning of the script.")
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    position: int | None = Field(description="Place in the queue, from 1.")
    estimated_start: str | None
    frames: int = Field(description="Frames of 133 ms that are spoken.")
    of_frames: int
    seconds_of_audio: float = Field(description="Audio that is stored and can be downloaded.")
    rtf: float | None = Field(description="Seconds of work per second of audio.")
    eta_s: float | None
    error: str | None = Field(description="Why it failed, or the last trouble of one that goes on.")
    created: str | None
    started: str | None
    ended: str | None
    speakers: int
    format: str
    links: TaskLinks


class TaskList(BaseModel):
    tasks: list[TaskView]


class VoiceView(BaseModel):
    id: int
    name: str


class Problem(BaseModel):
    """A part of a request that cannot be used: a line of the script, or a field."""

    line: int | None = None
    field: str | None = None
    message: str


class Rejected(BaseModel):
    detail: list[Problem]


class Failure(BaseModel):
    detail: str
