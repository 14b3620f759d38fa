"""Sends one script to a server: prints the result, writes audio to a WAV file and the session to a file to resume."""

from __future__ import annotations

import asyncio
import os
import wave
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from harness import wire
from harness.client.stream import SpeechClient
from harness.client.target import Target
from harness.errors import InputError, RequestError, ScriptError, ServerError
from harness.records.schema import Outcome, Request, Result
from harness.traffic.script import Turn, format_script, parse_script, read_script, speakers_of, speech_s, validate_utf8


@dataclass(frozen=True)
class Manner:
    """How a script is spoken. ``frames`` None: as long as the text takes or, with ``until_end``, the model decides.

    ``keep`` is a file for the session after the last frame; ``resume`` one that was kept, to go on with. Raises
    InputError for what does not go together.
    """

    frames: int | None = None
    until_end: bool = False
    steps: int = wire.DEFAULT_DIFFUSION_STEPS
    guidance: float = wire.DEFAULT_GUIDANCE_SCALE
    keep: Path | None = None
    resume: Path | None = None

    def __post_init__(self):
        if self.frames is not None and not 1 <= self.frames <= wire.MAX_FRAMES:
            raise RequestError(f"--frames {self.frames} must lie in 1 to {wire.MAX_FRAMES} (90 minutes)")
        if not 1 <= self.steps <= wire.MAX_DIFFUSION_STEPS:
            raise RequestError(f"--steps {self.steps} must lie in 1 to {wire.MAX_DIFFUSION_STEPS}")
        if not 0 <= self.guidance <= 100:
            raise RequestError(f"--guidance {self.guidance} must lie in 0 to 100")
        if self.resume is not None and self.frames is None and not self.until_end:
            raise InputError("--resume needs --frames (how many more to speak) or --until-end")

    def frames_for(self, turns: Sequence[Turn]) -> int:
        """Frames to request; 0 leaves the length to the model."""
        if self.frames is not None:
            return self.frames
        return 0 if self.until_end else min(wire.MAX_FRAMES, max(1, round(speech_s(turns) * wire.FRAMES_PER_SECOND)))


def speak_file(
    target: Target | str,
    path: Path,
    wav: Path | None = None,
    manner: Manner = Manner(),  # noqa: B008 (frozen)
) -> str:
    """Speak a script file; returns a sentence with the figures. Raises HarnessError where it cannot be spoken."""
    request, remarks = _request(path, manner)
    for file in (wav, manner.keep):  # before the work, which may take an hour
        if file is not None and not file.parent.is_dir():
            raise InputError(f"cannot write {file}: no such folder: {file.parent}")
        if file is not None and file.is_dir():
            raise InputError(f"cannot write {file}: it is a folder; give a file in it")
    audio: list[bytes] = []
    carry: list[bytes] = []
    result = asyncio.run(_speak(target, request, audio.append if wav else None, carry.append))
    if result.outcome is not Outcome.DONE:
        raise ServerError(f"{path}: {result.error or result.outcome}")
    if wav:
        _write(wav, b"".join(audio))
    if manner.keep:
        _replace(manner.keep, carry[0])
    return "\n".join([*(f"warning: {path.name}: {remark}" for remark in remarks), _sentence(path, result, manner)])


def _request(path: Path, manner: Manner) -> tuple[Request, tuple[str, ...]]:
    """The request for a script, with the voice of each speaker's number in the file, and remarks on it."""
    text = validate_utf8(_read(path))
    try:
        script, voices = read_script(text), speakers_of(parse_script(text))
    except ScriptError as error:
        raise ScriptError(f"{path}: {error}") from None
    request = Request(
        request_id=path.stem,
        traffic_class="speak",
        script=format_script(script.turns),
        speaker_ids=tuple(voices),
        frames=manner.frames_for(script.turns),
        guidance_scale=manner.guidance,
        diffusion_steps=manner.steps,
        until_end=manner.until_end,
        keep=manner.keep is not None,
        carry=_read(manner.resume) if manner.resume else b"",
    )
    return request, script.remarks


async def _speak(target: Target | str, request: Request, on_audio, on_carry) -> Result:
    async with SpeechClient(target) as client:
        await client.ready()
        request = replace(request, due_ns=client.clock.now_ns())
        return await client.speak(request, "closed", on_audio=on_audio, on_carry=on_carry)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _replace(path: Path, content: bytes) -> None:
    """Write a file atomically: readers find the old one or the new one, never a part."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def _write(path: Path, audio: bytes) -> None:
    samples = (np.clip(np.frombuffer(audio, "<f4"), -1, 1) * 32767).astype("<i2")
    try:
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(wire.SAMPLE_RATE_HZ)
            file.writeframes(samples.tobytes())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def _sentence(path: Path, result: Result, manner: Manner) -> str:
    received, samples = result.chunks.received_ns, int(result.chunks.samples.sum())
    spoken = samples // wire.SAMPLES_PER_FRAME
    asked = f" of {'at most ' if manner.until_end else ''}{result.frames}" if result.frames else ""
    words = [
        f"{path.name}: {result.speakers} speakers, {result.script_words} words, {spoken}{asked} frames "
        f"({spoken * wire.SECONDS_PER_FRAME:.1f} s of audio) in {(result.ended_ns - result.sent_ns) / 1e9:.2f} s"
    ]
    if len(received):
        words.append(f"first audio after {(received[0] - result.due_ns) / 1e9:.3f} s")
    if result.emulated:
        words.append("emulated: the times are those of a profile, the audio is silent")
    if manner.keep:
        words.append(f"kept in {manner.keep}, for --resume")
    return "; ".join(words)
