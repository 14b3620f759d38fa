"""One segment of a task at the server: its frames as 16-bit samples, and the carry with which the next one goes on."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace

from harness import wire
from harness.client.stream import SpeechClient, Stream
from harness.records.schema import Outcome, Request
from harness.service.audio import to_pcm
from harness.service.task import TaskRecord, TaskSpec

TRAFFIC_CLASS = "job"
_BYTES_PER_FRAME = 4 * wire.SAMPLES_PER_FRAME  # of the server's float32


class ServerFull(Exception):
    """The server has no room now."""


class Unspeakable(Exception):
    """The server cannot speak this, whenever it is asked."""


class SegmentFailed(Exception):
    """The server, or the connection to it, failed; another try may succeed."""


class SegmentStopped(Exception):
    """The segment was stopped from here."""


@dataclass(frozen=True)
class SpokenSegment:
    """``pcm``: 16-bit samples; ``carry``: b"" for the last segment; ``last``: nothing comes after it."""

    pcm: bytes
    frames: int
    carry: bytes
    last: bool
    seconds: float


@dataclass(frozen=True)
class SegmentPlan:
    """The frames of the next segment, and whether they are the last ones for sure."""

    frames: int
    is_last: bool


def next_segment(record: TaskRecord, segment_frames: int) -> SegmentPlan:
    """What to ask for next; a text that ends by itself may end before."""
    left = record.spec.frames - record.frames
    frames = min(segment_frames, left)
    return SegmentPlan(frames, frames == left)


@dataclass
class _Heard:
    """What has arrived. Apart from the run: a stream that refers to its run is a cycle, which is not freed in time."""

    pieces: list[bytes] = field(default_factory=list)
    carries: list[bytes] = field(default_factory=list)
    frames: int = 0

    def audio(self, samples: bytes) -> None:
        self.pieces.append(samples)
        self.frames += len(samples) // _BYTES_PER_FRAME


class SegmentRun:
    """A segment in progress: ``await run()`` once; ``frames`` have arrived; ``stop()`` ends it early."""

    def __init__(self, client: SpeechClient, record: TaskRecord, plan: SegmentPlan, carry: bytes):
        self._plan, self._until_end, self._heard = plan, record.spec.until_end, _Heard()
        request = request_of(f"{record.id}-{len(record.segments)}", TRAFFIC_CLASS, record.spec, plan.frames)
        request = _resumed(request, carry, keep=not plan.is_last)
        heard = self._heard
        self._stream: Stream = client.open(request, "closed", on_audio=heard.audio, on_carry=heard.carries.append)

    @property
    def frames(self) -> int:
        return self._heard.frames

    def stop(self) -> None:
        self._stream.stop(Outcome.CANCELLED)

    async def run(self) -> SpokenSegment:
        """Raises ServerFull, Unspeakable, SegmentFailed or SegmentStopped."""
        began_s = time.monotonic()
        result = await self._stream.run()
        raise_for(result.outcome, result.error)
        pcm = await asyncio.to_thread(_joined, self._heard.pieces)
        ended = self._until_end and self.frames < self._plan.frames
        last = self._plan.is_last or ended
        carry = b"" if last else self._heard.carries[0]
        return SpokenSegment(pcm, self.frames, carry, last, time.monotonic() - began_s)


def _joined(pieces: list[bytes]) -> bytes:
    return b"".join(map(to_pcm, pieces))


def request_of(name: str, traffic_class: str, spec: TaskSpec, frames: int) -> Request:
    """The request for the first ``frames`` frames of a text. Chunks are one frame, so that progress is known."""
    return Request(
        request_id=name,
        traffic_class=traffic_class,
        script=spec.script,
        speaker_ids=spec.voices,
        frames=frames,
        seed=spec.seed,
        guidance_scale=spec.guidance,
        diffusion_steps=spec.diffusion_steps,
        until_end=spec.until_end,
        due_ns=time.monotonic_ns(),
    )


def raise_for(outcome: Outcome, error: str) -> None:
    """Raise what a result that is not done means."""
    if outcome is Outcome.DONE:
        return
    if outcome is not Outcome.ERROR:
        raise SegmentStopped
    if error.startswith(wire.BUSY):
        raise ServerFull(error.removeprefix(wire.BUSY))
    if error.startswith(wire.REFUSED):
        raise Unspeakable(error.removeprefix(wire.REFUSED))
    raise SegmentFailed(error)


def _resumed(request: Request, carry: bytes, keep: bool) -> Request:
    return replace(request, carry=carry, keep=keep)
