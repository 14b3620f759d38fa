"""Reads WAV files from strangers: plain Python and numpy, so that no damaged file can end the process.

Only uncompressed samples are read, so a file is never larger in memory than some multiple of its size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from harness import wire
from harness.errors import InputError
from harness.traffic.voice_folder import resampled

RATES_HZ = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 88200, 96000)
MOST_CHANNELS = 2
LEAST_S = 1.0
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_DTYPES = {(_PCM, 8): "u1", (_PCM, 16): "<i2", (_PCM, 32): "<i4", (_FLOAT, 32): "<f4", (_FLOAT, 64): "<f8"}
_FIX = "save it as WAV, 16 bit, mono, 24000 Hz"


def read_wav(data: bytes, most_s: float) -> np.ndarray:
    """Mono float32 samples [n] at 24 kHz of an uncompressed WAV. Raises InputError for anything else."""
    kind, channels, rate, bits, content = _parts(data)
    width = bits // 8
    frames = len(content) // (width * channels)
    if frames > most_s * rate:
        raise InputError(f"the voice lasts {frames / rate:.0f} s: use a sample of 9 to 30 s, at most {most_s:g} s")
    if frames < LEAST_S * rate:
        raise InputError(f"the voice lasts {frames / rate:.1f} s: use a sample of 9 to 30 s, at least {LEAST_S:g} s")
    samples = _decoded(content[: frames * width * channels], kind, bits).reshape(-1, channels)
    if not np.isfinite(samples).all() or np.abs(samples).max() > 100:
        raise InputError(f"the voice holds samples that are no audio: {_FIX}")
    return resampled(samples.mean(axis=1), rate).astype(np.float32)


def _parts(data: bytes) -> tuple[int, int, int, int, bytes]:
    """Kind, channels, rate in Hz and bits of the samples, and their bytes."""
    if len(data) < 12 or data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise InputError(f"this is no WAV file: {_FIX}")
    chunks = dict(reversed(list(_chunks(data))))  # of two with one name the first counts
    layout, content = chunks.get(b"fmt ", b""), chunks.get(b"data", b"")
    if len(layout) < 16 or not content:
        raise InputError(f"the WAV file has no samples: {_FIX}")
    kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", layout)
    if kind == _EXTENSIBLE and len(layout) >= 26:
        (kind,) = struct.unpack_from("<H", layout, 24)
    if (kind, bits) not in (*_DTYPES, (_PCM, 24)):
        raise InputError(f"the WAV file is compressed, or has {bits} bits per sample: {_FIX}")
    if not 1 <= channels <= MOST_CHANNELS:
        raise InputError(f"the WAV file has {channels} channels: {_FIX}")
    if rate not in RATES_HZ:
        raise InputError(f"the WAV file has {rate} samples per second: {_FIX}")
    return kind, channels, rate, bits, content


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of each chunk; the last one may claim to be longer than the file."""
    place = 12
    while place + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, place + 4)
        yield data[place : place + 4], data[place + 8 : place + 8 + size]
        place += 8 + size + size % 2


def _decoded(content: bytes, kind: int, bits: int) -> np.ndarray:
    """Samples as float64 from -1 to 1."""
    if (kind, bits) == (_PCM, 24):
        wide = np.zeros((len(content) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
        return wide.reshape(-1).view("<i4") / 2.0**31
    values = np.frombuffer(content, _DTYPES[kind, bits])
    if kind == _FLOAT:
        return values.astype(np.float64)
    return values / 128.0 - 1 if bits == 8 else values / 2.0 ** (bits - 1)


def wav_of(samples: np.ndarray) -> bytes:
    """Mono float32 samples [n] at 24 kHz as a WAV that keeps them exactly."""
    content = samples.astype("<f4").tobytes()
    rate = wire.SAMPLE_RATE_HZ
    layout = struct.pack("<4sIHHIIHHH", b"fmt ", 18, _FLOAT, 1, rate, 4 * rate, 4, 32, 0)
    fact = struct.pack("<4sII", b"fact", 4, len(samples))
    body = b"WAVE" + layout + fact + struct.pack("<4sI", b"data", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(body)) + body
