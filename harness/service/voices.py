"""The voices of the service: those that the servers began with, and those that callers have added.

The studio keeps them in a folder of its own, which its Triton reads: ``0001.all.NAME.wav``. The number is the voice's
id, then comes whose it is (``all``, or an owner's fingerprint). Files are only added, never changed or removed, so that
ids keep their meaning.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from harness.errors import InputError
from harness.service.audio import to_pcm, wav_header
from harness.service.wav_reading import read_wav, wav_of
from harness.traffic.voice_folder import BUILT_IN, read_voice, synthetic_voice, voice_files

ALL = "all"  # whose the voices are that everybody may use
MARK = ".studio"  # a file in a folder that a studio has made: voices may be added to it
MOST_ADDED = 100  # voices of one owner
_FILE = re.compile(r"(?P<number>\d{4})\.(?P<owner>[a-z0-9]+)\.(?P<name>.*)\.wav")
_NAME = re.compile(r"[^\w -]+")


class VoiceBank:
    """The voices in ``folder``, "" for the four synthetic ones of a server without a folder."""

    def __init__(self, folder: str):
        self.folder = folder

    @property
    def may_grow(self) -> bool:
        return bool(self.folder) and (Path(self.folder) / MARK).exists()

    def names(self, owner: str) -> dict[int, str]:
        """The voices that an owner may use, by id."""
        if not self.folder:
            return {number: f"voice {number}" for number in range(1, BUILT_IN + 1)}
        found = {}
        for number, file in enumerate(voice_files(self.folder), start=1):
            kept = _FILE.fullmatch(file.name) if self.may_grow else None
            if kept is None or kept["owner"] in (ALL, owner):
                found[number] = kept["name"] if kept else file.stem
        return found

    def sample(self, owner: str, voice: int) -> bytes | None:
        """A voice as a 16-bit WAV; None where the owner has no such voice."""
        if voice not in self.names(owner):
            return None
        if not self.folder:
            samples = synthetic_voice(voice)
        else:
            samples, _ = read_voice(voice_files(self.folder)[voice - 1])
        pcm = to_pcm(samples.tobytes())
        return wav_header(len(pcm)) + pcm

    def add(self, owner: str, name: str, data: bytes, most_s: float) -> int:
        """Add a WAV as a voice of an owner; returns its id. Raises InputError."""
        if not self.may_grow:
            raise InputError("this service cannot take voices: its servers have a fixed set")
        samples = read_wav(data, most_s)
        with _alone(Path(self.folder)):
            files = voice_files(self.folder)
            if sum(f".{owner}." in file.name for file in files) >= MOST_ADDED:
                raise InputError(f"there are {MOST_ADDED} voices of yours already")
            return _write(Path(self.folder), len(files) + 1, owner, name, samples)


def lay_out(folder: Path, source: str) -> None:
    """Make a studio's folder of voices from a folder of sound files, or from the synthetic ones; once.

    Raises InputError where it was made from others: ids of tasks that wait would mean other voices.
    """
    origin = str(Path(source).absolute()) if source else ""
    mark = folder / MARK
    if mark.exists():
        if mark.read_text() != origin:
            raise InputError(
                f"{folder} was made from the voices of {mark.read_text() or 'no folder'}: give the same --voices, or "
                "another --folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for number, (name, samples) in enumerate(_first_voices(source), start=1):
        _write(folder, number, ALL, name, samples)
    mark.write_text(origin)


def _first_voices(source: str) -> Iterator[tuple[str, np.ndarray]]:
    if source:
        for file in voice_files(source):
            yield file.stem, read_voice(file)[0]
    else:
        for voice in range(1, BUILT_IN + 1):
            yield f"voice {voice}", synthetic_voice(voice)


def _write(folder: Path, number: int, owner: str, name: str, samples: np.ndarray) -> int:
    """Write a voice; it appears under its name when it is whole."""
    draft = folder / f".{secrets.token_hex(8)}"
    try:
        draft.write_bytes(wav_of(samples))
        os.replace(draft, folder / f"{number:04d}.{owner}.{_clean(name)}.wav")
    finally:
        draft.unlink(missing_ok=True)
    return number


def _clean(name: str) -> str:
    """A name that is safe in a file's name: letters, digits, spaces, - and _."""
    stem = name.rpartition(".")[0] or name
    return " ".join(_NAME.sub(" ", stem).split())[:40].strip() or "voice"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process at a time gives out a number."""
    with open(folder / MARK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
