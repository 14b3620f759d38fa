"""One script through a server, for a person: how it went, and its audio as a WAV file."""

from __future__ import annotations

import asyncio
import time
import wave
from pathlib import Path

import numpy as np

from harness import wire
from harness.client import SpeechClient
from harness.errors import InputError, RequestError, ServerError
from harness.records import Outcome, Request, Result
from harness.script import parse_script, validate_utf8

_FRAMES_PER_WORD = 60 / 24  # 180 words a minute of audio


def speak_file(url: str, path: Path, frames: int | None, wav: Path | None) -> str:
    """Speak a script file; returns a sentence with the figures. Raises HarnessError where it cannot be spoken."""
    if frames is not None and not 1 <= frames <= wire.MAX_FRAMES:
        raise RequestError(f"--frames {frames} must lie in 1 to {wire.MAX_FRAMES} (90 minutes)")
    text = _read(path)
    speakers = max(turn.speaker for turn in parse_script(text))
    words = len(text.split())
    asked = frames if frames is not None else min(wire.MAX_FRAMES, max(1, round(words * _FRAMES_PER_WORD)))
    voices = tuple(range(1, speakers + 1))
    request = Request(path.stem, "speak", text, voices, asked, due_ns=time.monotonic_ns())
    audio: list[bytes] = []
    result = asyncio.run(_speak(url, request, audio.append if wav else None))
    if result.outcome is not Outcome.DONE:
        raise ServerError(f"{path}: {result.error or result.outcome}")
    if wav:
        _write(wav, b"".join(audio))
    return _sentence(path, result)


async def _speak(url: str, request: Request, on_audio) -> Result:
    async with SpeechClient(url) as client:
        await client.ready()
        return await client.speak(request, "closed", on_audio=on_audio)


def _read(path: Path) -> str:
    try:
        return validate_utf8(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


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


def _sentence(path: Path, result: Result) -> str:
    chunks = result.chunks
    spoken = int(chunks.samples.sum()) // wire.SAMPLES_PER_FRAME
    seconds = (result.ended_ns - result.sent_ns) / 1e9
    return (
        f"{path.name}: {result.speakers} speakers, {result.script_words} words, {spoken} of {result.frames} frames "
        f"({spoken * wire.SECONDS_PER_FRAME:.1f} s of audio) in {seconds:.2f} s; first audio after "
        f"{(chunks.received_ns[0] - result.due_ns) / 1e9:.3f} s"
    )
