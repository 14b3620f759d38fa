"""The bank of voice samples, by voice id."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from harness import wire
from harness.errors import InputError
from harness.traffic.voice_folder import BUILT_IN, read_voice, synthetic_voice, voice_files

_LEVEL_DB, _EPSILON = -25.0, 1e-6  # as in transformers' feature extractor


def load_voices(folder: str = "") -> dict[int, np.ndarray]:
    """Voice id -> mono float32 samples at 24 kHz: a folder's sound files by name from id 1, or four synthetic ones.

    All at the loudness that the released feature extractor gives them. Raises InputError for what is no such file.
    """
    if not folder:
        return {voice: _levelled(synthetic_voice(voice)) for voice in range(1, BUILT_IN + 1)}
    voices = {}
    for number, file in enumerate(voice_files(folder), start=1):
        samples, note = read_voice(file)
        voices[number] = _levelled(samples)
        if note:
            print(f"voice {number}: {note}", flush=True)
    return voices


def new_voices(folder: str, known: Collection[int]) -> dict[int, np.ndarray]:
    """Voices that were put into the folder after the ``known`` ones, which must sort before them.

    A file that cannot be read is left out: others may still be written to the folder.
    """
    found = {}
    for number, file in enumerate(voice_files(folder), start=1):
        if number not in known:
            try:
                found[number] = _levelled(read_voice(file)[0])
            except InputError as error:
                print(f"voice {number} is left out: {error}", flush=True)
    return found


def frames_of(samples: np.ndarray) -> int:
    """Prompt frames of a sample: ceil(samples / 3200)."""
    return math.ceil(len(samples) / wire.SAMPLES_PER_FRAME)


def _levelled(samples: np.ndarray) -> np.ndarray:
    """The samples at -25 dB of full scale (RMS), or less where peaks would leave -1 to 1; silence stays silence."""
    rms = float(np.sqrt(np.mean(samples.astype(np.float64) ** 2)))
    samples = samples * np.float32(10 ** (_LEVEL_DB / 20) / (rms + _EPSILON))
    peak = float(np.max(np.abs(samples)))
    return samples / np.float32(peak + _EPSILON) if peak > 1.0 else samples
