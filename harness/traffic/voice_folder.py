"""A folder of voice samples: which files are voices, their order, and their sound in the model's format."""

from __future__ import annotations

import math
import mimetypes
import re
from pathlib import Path

import numpy as np

from harness import wire
from harness.errors import InputError

BUILT_IN = 4  # voices without a folder: ids 1 to 4
_SYNTHETIC_SECONDS = (9.0, 12.0, 10.0, 14.0)  # the released voices take 9 to 30 s
_ENDINGS = {
    *("wav", "wave", "flac", "ogg", "oga", "opus", "mp3", "aif", "aiff", "aifc", "au", "snd", "caf", "w64", "rf64"),
    *("voc", "paf", "svx", "iff", "nist", "sph", "sf", "ircam", "avr", "sds", "xi"),
}  # formats that soundfile reads
_MOST_SECONDS = 600  # a prompt of 4,500 frames
_RATES_HZ = 4_000, 768_000


def voice_files(folder: str) -> list[Path]:
    """The voices of a folder, in the order of their ids from 1: by name, comparing numbers as numbers (2 before 10).

    Hidden files are none (macOS leaves ``._x.wav`` on other disks). Raises InputError where there is no such folder,
    or no voice in it, or a sound that cannot be read by its ending.
    """
    path = Path(folder)
    if not path.is_dir():
        why = "it is a file" if path.exists() else "no such folder"
        raise InputError(f"voices folder {folder}: {why}; give a folder of sound files such as .wav or .flac")
    try:
        files = [file for file in path.iterdir() if not file.name.startswith(".")]
    except OSError as error:
        raise InputError(f"voices folder {folder} cannot be read: {error.strerror}") from None
    voices = [file for file in files if _ending(file) in _ENDINGS]
    for file in files:
        if file not in voices and (mimetypes.guess_type(file.name)[0] or "").startswith(("audio/", "video/")):
            raise InputError(f"{file} has a format that cannot be read: convert it to .wav, or move it elsewhere")
    if not voices:
        raise InputError(f"voices folder {folder} holds no voice: put sound files such as .wav or .flac there")
    return sorted(voices, key=_natural)


def count_voices(folder: str) -> int:
    """Number of voices of a server, with ids 1 to this number; "" means no folder. Raises InputError."""
    return len(voice_files(folder)) if folder else BUILT_IN


def synthetic_voice(voice: int) -> np.ndarray:
    """Voice 1 to BUILT_IN: mono float32 samples [n] at 24 kHz of a vowel-like tone, used where no voice is given."""
    t = np.arange(int(_SYNTHETIC_SECONDS[voice - 1] * wire.SAMPLE_RATE_HZ)) / wire.SAMPLE_RATE_HZ
    pitch_hz = 90.0 + 35.0 * voice + 4.0 * np.sin(2 * np.pi * 5.0 * t)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / wire.SAMPLE_RATE_HZ
    tone = sum(np.sin(k * phase) / k for k in range(1, 9))
    return (0.1 * tone * (0.6 + 0.4 * np.sin(2 * np.pi * 3.0 * t))).astype(np.float32)


def read_voice(file: Path) -> tuple[np.ndarray, str]:
    """A voice as mono float32 samples [n] at 24 kHz, and the conversions made ("" for none). Raises InputError."""
    sound, rate_hz = _read(file)
    if not sound.size:
        raise InputError(f"{file} holds no sound: use a sample of some seconds")
    if len(sound) > _MOST_SECONDS * rate_hz:
        raise InputError(f"{file} lasts {len(sound) / rate_hz:.0f} s: use a sample of 9 to 30 s")
    if not np.all(np.isfinite(sound)):
        raise InputError(f"{file} contains samples that are not numbers: save it again as 16 bit")
    if not _RATES_HZ[0] <= rate_hz <= _RATES_HZ[1]:
        raise InputError(f"{file} claims {rate_hz} samples per second: save it again at 24000 Hz")
    done = []
    if sound.shape[1] > 1:
        done.append(f"{sound.shape[1]} channels were mixed to one")
    if rate_hz != wire.SAMPLE_RATE_HZ:
        done.append(f"resampled from {rate_hz} Hz to {wire.SAMPLE_RATE_HZ}")
    mono = sound[:, 0] if sound.shape[1] == 1 else sound.mean(axis=1)
    note = f"{file.name}: {', '.join(done)}" if done else ""
    return resampled(mono, rate_hz).astype(np.float32), note


def _read(file: Path) -> tuple[np.ndarray, int]:
    """Samples [n, channels] as float32, and their rate in Hz."""
    import soundfile  # slow to load, and needed only for voices

    try:
        with soundfile.SoundFile(file) as sound:
            most = math.ceil((_MOST_SECONDS + 1) * sound.samplerate)  # limits reading, whatever a damaged header says
            return sound.read(min(max(sound.frames, 0), most), dtype="float32", always_2d=True), sound.samplerate
    except (soundfile.SoundFileError, OSError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        why = "it is a folder" if file.is_dir() else " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{file} is not a readable sound file ({why}): save it again as .wav") from None


def resampled(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    if rate_hz == wire.SAMPLE_RATE_HZ:
        return samples
    from scipy.signal import resample_poly

    shared = math.gcd(rate_hz, wire.SAMPLE_RATE_HZ)
    return resample_poly(samples, wire.SAMPLE_RATE_HZ // shared, rate_hz // shared)


def _ending(file: Path) -> str:
    return file.suffix.removeprefix(".").lower()


def _natural(file: Path) -> list[tuple[bool, int, str]]:
    parts = re.split(r"([0-9]+)", file.name.casefold())
    return [*((part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts), (False, 0, file.name)]
