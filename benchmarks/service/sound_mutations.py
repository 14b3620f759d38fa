"""Damaged sound files that know their format: WAV, FLAC and Ogg with wrong fields, sizes, orders and contents."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile

RATE_HZ, SECONDS = 8000, 1.2
_EDGES_16 = (0, 1, 2, 3, 7, 8, 16, 24, 32, 64, 255, 256, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)
_EDGES_32 = (0, 1, 2, 3, 44, 8000, 24_000, 96_000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFF0, 0xFFFF_FFFF)
_NAMES = (
    "voice.wav", "", "../../../etc/passwd", "/etc/passwd", "a/b\\c.wav", "\x00.wav", "é漢字.wav", "." * 300,
    "con.wav", "..", "0001.all.mine.wav", "a\r\nX-Injected: 1", '"; filename="b.wav', "%2e%2e%2fa.wav", " ",
)  # fmt: skip
_NUMBERS = (np.nan, np.inf, -np.inf, 1e38, -1e300, 5e-324)


@dataclass(frozen=True)
class Upload:
    """A file as it is sent. ``kind``: what it was made from, and how it was damaged."""

    kind: str
    name: str
    content: bytes


class SoundMutations:
    """Uploads from a generator: the same seed gives the same ones."""

    def __init__(self, rng: np.random.Generator):
        self._rng = rng
        samples = 0.3 * np.sin(np.arange(round(RATE_HZ * SECONDS)) / 9)
        self._flac = _encoded(samples, "FLAC", "PCM_16")
        self._ogg = _renumbered(_encoded(samples, "OGG", "VORBIS"))
        self._samples = samples

    def next(self) -> Upload:
        make = self._pick((self._wav, self._wav, self._wav, self._damaged_flac, self._damaged_ogg, self._mixed))
        kind, content = make()
        for _ in range(self._below(3)):
            content = self._pick((self._as_it_is, self._cut, self._flipped, self._repeated))(content)
        name = self._pick(_NAMES) if self._below(4) == 0 else "voice.wav"
        return Upload(kind, name, content)

    def _wav(self) -> tuple[str, bytes]:
        """A WAV with up to three wrong fields or chunks."""
        bits, kind = self._pick(((16, 1), (8, 1), (24, 1), (32, 1), (32, 3), (64, 3)))
        layout = [kind, 1, RATE_HZ, RATE_HZ * bits // 8, bits // 8, bits]
        for _ in range(self._below(3)):
            place = self._below(6)
            layout[place] = self._pick(_EDGES_32 if place in (2, 3) else _EDGES_16)
        content = self._values(kind, bits)
        chunks = [(b"fmt ", struct.pack("<HHIIHH", *layout)), (b"data", content)]
        if self._below(4) == 0:
            chunks[0] = (
                b"fmt ",
                chunks[0][1] + struct.pack("<HHI", 22, bits, 4) + struct.pack("<H", kind) + b"\0" * 14,
            )
        return "wav", self._riff(self._shuffled(chunks))

    def _values(self, kind: int, bits: int) -> bytes:
        if kind == 3:
            values = self._samples.copy()
            for _ in range(self._below(3)):
                values[self._below(len(values))] = self._pick(_NUMBERS)
            with np.errstate(over="ignore"):
                return values.astype(f"<f{bits // 8}").tobytes()
        return self._rng.bytes(len(self._samples) * bits // 8)

    def _shuffled(self, chunks: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Chunks in another order, repeated, left out, or with strange ones between them."""
        if self._below(3) == 0:
            chunks.insert(
                self._below(len(chunks) + 1), (self._pick((b"LIST", b"data", b"fmt ", b"\0\0\0\0")), b"x" * 9)
            )
        if self._below(5) == 0:
            chunks.reverse()
        if self._below(8) == 0:
            del chunks[self._below(len(chunks))]
        return chunks

    def _riff(self, chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
        body = b"WAVE"
        for name, content in chunks:
            size = self._pick(_EDGES_32) if self._below(6) == 0 else len(content)
            body += name + struct.pack("<I", size) + content + b"\0" * (len(content) % 2)
        size = self._pick(_EDGES_32) if self._below(6) == 0 else len(body)
        return self._pick((b"RIFF",) * 9 + (b"RIFX", b"RF64")) + struct.pack("<I", size) + body

    def _damaged_flac(self) -> tuple[str, bytes]:
        """A FLAC with a wrong length of a block of metadata, or wrong fields of its stream."""
        data = bytearray(self._flac)
        if self._below(2):
            data[5:8] = self._pick(_EDGES_32).to_bytes(4, "big")[1:]
        for _ in range(1 + self._below(4)):
            data[8 + self._below(34)] = self._below(256)
        return "flac", bytes(data)

    def _damaged_ogg(self) -> tuple[str, bytes]:
        """An Ogg with a wrong page; its checksum is right half of the time."""
        data = bytearray(self._ogg)
        number = self._below(len(_pages(data)))
        data[_pages(data)[number] + 4 + self._below(23)] = self._below(256)
        if self._below(2):
            _check(data, *_pages(self._ogg)[number : number + 2])
        return "ogg", bytes(data)

    def _mixed(self) -> tuple[str, bytes]:
        """One format inside another, compressed bytes, or nothing of the kind."""
        riff = b"RIFF" + struct.pack("<I", len(self._flac)) + b"WAVE" + self._flac
        bomb = zlib.compress(bytes(1 << 20))
        return "mixed", self._pick((riff, b"fLaC" + self._ogg, self._rng.bytes(2000), bomb, b"", b"RIFF", self._flac))

    def _as_it_is(self, content: bytes) -> bytes:
        return content

    def _cut(self, content: bytes) -> bytes:
        return content[: self._below(len(content) + 1)]

    def _flipped(self, content: bytes) -> bytes:
        data = bytearray(content)
        for _ in range(min(len(data), 1 + self._below(8))):
            data[self._below(len(data))] ^= 1 << self._below(8)
        return bytes(data)

    def _repeated(self, content: bytes) -> bytes:
        place = self._below(len(content) + 1)
        return content[:place] + content[max(0, place - 64) : place] * (1 + self._below(20)) + content[place:]

    def _below(self, limit: int) -> int:
        return int(self._rng.integers(limit))

    def _pick(self, choices: Sequence) -> Any:
        return choices[self._below(len(choices))]


def _encoded(samples: np.ndarray, container: str, subtype: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE_HZ, subtype, format=container)
    return file.getvalue()


def _pages(ogg: bytes | bytearray) -> list[int]:
    """Where the pages of an Ogg begin."""
    return [place for place in range(len(ogg) - 26) if ogg[place : place + 4] == b"OggS"]


def _renumbered(ogg: bytes) -> bytes:
    """The same stream with serial number 1: libsndfile draws another for every file."""
    data, starts = bytearray(ogg), _pages(ogg)
    for number, start in enumerate(starts):
        data[start + 14 : start + 18] = struct.pack("<I", 1)
        _check(data, *starts[number : number + 2])
    return bytes(data)


def _check(ogg: bytearray, start: int, end: int | None = None) -> None:
    """Write the right checksum of the page from ``start`` to ``end``."""
    ogg[start + 22 : start + 26] = bytes(4)
    ogg[start + 22 : start + 26] = struct.pack("<I", _ogg_checksum(bytes(ogg[start:end])))


def _ogg_checksum(page: bytes) -> int:
    """The CRC of RFC 3533: polynomial 0x04c11db7, from 0, most significant bit first."""
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ 0x04C1_1DB7 if crc & 0x8000_0000 else crc << 1) & 0xFFFF_FFFF
    return crc
