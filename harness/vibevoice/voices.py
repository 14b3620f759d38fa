"""The bank of voice samples, by voice id."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import numpy as np

from harness import wire
from harness.errors import InputError

_SYNTHETIC_SECONDS = {1: 9.0, 2: 12.0, 3: 10.0, 4: 14.0}  # the released voices take 9 to 30 s

_LEVEL_DB, _EPSILON = -25.0, 1e-6  # of transformers' feature extractor


def load_voices(folder: str = "") -> dict[int, np.ndarray]:
    """Voice id -> mono float32 samples at 24 kHz: a folder's WAV files by name, numbered from 1, or four made ones.

    All at the loudness that the released feature extractor gives them. Raises InputError for what is no such file.
    """
    if not folder:
        return {voice: _levelled(_synthetic(voice, seconds)) for voice, seconds in _SYNTHETIC_SECONDS.items()}
    files = sorted(Path(folder).glob("*.wav"))
    if not files:
        raise InputError(f"voices folder {folder} holds no .wav file: put 24 kHz mono WAV files there")
    return {number: _levelled(_read(file)) for number, file in enumerate(files, start=1)}


def frames_of(samples: np.ndarray) -> int:
    """Prompt frames that a sample takes: ceil(samples / 3200)."""
    return math.ceil(len(samples) / wire.SAMPLES_PER_FRAME)


def _synthetic(voice: int, seconds: float) -> np.ndarray:
    """A vowel-like tone with its own pitch for each id: stands for a voice where none is given."""
    t = np.arange(int(seconds * wire.SAMPLE_RATE_HZ)) / wire.SAMPLE_RATE_HZ
    pitch_hz = 90.0 + 35.0 * voice + 4.0 * np.sin(2 * np.pi * 5.0 * t)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / wire.SAMPLE_RATE_HZ
    tone = sum(np.sin(k * phase) / k for k in range(1, 9))
    return (0.1 * tone * (0.6 + 0.4 * np.sin(2 * np.pi * 3.0 * t))).astype(np.float32)


def _levelled(samples: np.ndarray) -> np.ndarray:
    """The samples at -25 dB of full scale (RMS), or less where a peak would leave -1 to 1; silence stays silence."""
    rms = float(np.sqrt(np.mean(samples.astype(np.float64) ** 2)))
    samples = samples * np.float32(10 ** (_LEVEL_DB / 20) / (rms + _EPSILON))
    peak = float(np.max(np.abs(samples)))
    return samples / np.float32(peak + _EPSILON) if peak > 1.0 else samples


def _read(file: Path) -> np.ndarray:
    try:
        with wave.open(str(file)) as sound:
            layout = sound.getframerate(), sound.getnchannels(), sound.getsampwidth()
            data = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError, OSError, RuntimeError) as error:  # the last from inside wave, of lengths that lie
        raise InputError(f"{file} is not a WAV file that can be read: {error!r}") from error
    if layout != (wire.SAMPLE_RATE_HZ, 1, 2):
        raise InputError(
            f"{file} is {layout[0]} Hz, {layout[1]} channels, {8 * layout[2]} bit: use 24000 Hz mono 16 bit"
        )
    data = data[: len(data) // 2 * 2]  # of a file that was cut in the middle of a sample
    if not data:
        raise InputError(f"{file} holds no sound: use a sample of some seconds")
    return np.frombuffer(data, dtype="<i2").astype(np.float32) / 32768.0
