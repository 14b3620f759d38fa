"""The bank of voice samples, by voice id."""

from __future__ import annotations

import math

import numpy as np

from harness import wire
from harness.traffic.voice_folder import read_voice, voice_files

_SYNTHETIC_SECONDS = {1: 9.0, 2: 12.0, 3: 10.0, 4: 14.0}  # the released voices take 9 to 30 s

_LEVEL_DB, _EPSILON = -25.0, 1e-6  # as in transformers' feature extractor


def load_voices(folder: str = "") -> dict[int, np.ndarray]:
    """Voice id -> mono float32 samples at 24 kHz: a folder's sound files by name from id 1, or four synthetic ones.

    All at the loudness that the released feature extractor gives them. Raises InputError for what is no such file.
    """
    if not folder:
        return {voice: _levelled(_synthetic(voice, seconds)) for voice, seconds in _SYNTHETIC_SECONDS.items()}
    voices = {}
    for number, file in enumerate(voice_files(folder), start=1):
        samples, note = read_voice(file)
        voices[number] = _levelled(samples)
        if note:
            print(f"voice {number}: {note}", flush=True)
    return voices


def frames_of(samples: np.ndarray) -> int:
    """Prompt frames of a sample: ceil(samples / 3200)."""
    return math.ceil(len(samples) / wire.SAMPLES_PER_FRAME)


def _synthetic(voice: int, seconds: float) -> np.ndarray:
    """A vowel-like tone with a different pitch for each id, used where no voice is given."""
    t = np.arange(int(seconds * wire.SAMPLE_RATE_HZ)) / wire.SAMPLE_RATE_HZ
    pitch_hz = 90.0 + 35.0 * voice + 4.0 * np.sin(2 * np.pi * 5.0 * t)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / wire.SAMPLE_RATE_HZ
    tone = sum(np.sin(k * phase) / k for k in range(1, 9))
    return (0.1 * tone * (0.6 + 0.4 * np.sin(2 * np.pi * 3.0 * t))).astype(np.float32)


def _levelled(samples: np.ndarray) -> np.ndarray:
    """The samples at -25 dB of full scale (RMS), or less where peaks would leave -1 to 1; silence stays silence."""
    rms = float(np.sqrt(np.mean(samples.astype(np.float64) ** 2)))
    samples = samples * np.float32(10 ** (_LEVEL_DB / 20) / (rms + _EPSILON))
    peak = float(np.max(np.abs(samples)))
    return samples / np.float32(peak + _EPSILON) if peak > 1.0 else samples
