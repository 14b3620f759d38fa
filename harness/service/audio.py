"""Audio as the service stores and sends it: 16-bit samples, a WAV header, and files in FLAC and Opus."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from harness import wire

BYTES_PER_SAMPLE = 2
BYTES_PER_S = BYTES_PER_SAMPLE * wire.SAMPLE_RATE_HZ
BYTES_PER_FRAME = BYTES_PER_SAMPLE * wire.SAMPLES_PER_FRAME
HEADER_BYTES = 44
FORMATS = {"wav": "audio/wav", "flac": "audio/flac", "opus": "audio/ogg"}
_ENCODED = {"flac": ("FLAC", "PCM_16"), "opus": ("OGG", "OPUS")}
_UNKNOWN = 0xFFFF_FFFF  # sizes of a WAV whose end is not known, as other programs write them to a pipe
_BLOCK = BYTES_PER_S  # libsndfile's Opus encoder keeps whole blocks on the stack


def to_pcm(samples: bytes) -> bytes:
    """Float32 samples (little-endian, -1 to 1) as 16-bit ones, rounded as `harness speak --wav` does."""
    return (np.clip(np.frombuffer(samples, "<f4"), -1, 1) * 32767).astype("<i2").tobytes()


def wav_header(audio_bytes: int | None) -> bytes:
    """The 44 bytes before 16-bit mono samples at 24 kHz; None where their number is not known yet."""
    size = _UNKNOWN if audio_bytes is None else audio_bytes
    riff = _UNKNOWN if audio_bytes is None else min(_UNKNOWN, audio_bytes + HEADER_BYTES - 8)
    rate = wire.SAMPLE_RATE_HZ
    layout = struct.pack("<IHHIIHH", 16, 1, 1, rate, BYTES_PER_S, BYTES_PER_SAMPLE, 8 * BYTES_PER_SAMPLE)
    return b"RIFF" + struct.pack("<I", riff) + b"WAVEfmt " + layout + b"data" + struct.pack("<I", size)


def encode(kind: str, pieces: Iterable[bytes], path: Path) -> None:
    """Write 16-bit samples to a file in ``kind`` (flac or opus); pieces of any size hold whole samples."""
    import soundfile  # slow to load

    container, subtype = _ENCODED[kind]
    with soundfile.SoundFile(path, "w", wire.SAMPLE_RATE_HZ, 1, subtype, format=container) as file:
        for piece in pieces:
            for start in range(0, len(piece), _BLOCK):
                file.write(np.frombuffer(piece[start : start + _BLOCK], "<i2"))
