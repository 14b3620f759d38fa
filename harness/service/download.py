"""A task's audio as a response: whole or a range of it, finished or as far as it is."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi import HTTPException
from fastapi.responses import Response, StreamingResponse

from harness.service.audio import FORMATS, wav_header
from harness.service.storage import AudioStore
from harness.service.task import DONE, ENDED, TaskRecord

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_PIECE = 1 << 18


@dataclass(frozen=True)
class AudioFile:
    """Bytes that can be downloaded: ``head``, then objects (name, bytes). ``is_whole``: no more will follow."""

    task: str
    kind: str
    head: bytes
    objects: tuple[tuple[str, int], ...]
    is_whole: bool

    @property
    def size(self) -> int:
        return len(self.head) + sum(size for _, size in self.objects)

    @property
    def tag(self) -> str:
        """Of the whole file; parts of one that grows carry none."""
        return f'"{self.task}.{self.kind}.{self.size}"'


def audio_file(record: TaskRecord) -> AudioFile:
    """What there is of a task. While it is made that is a WAV of unknown length, whatever its format."""
    if record.status == DONE and record.result:
        return AudioFile(record.id, record.spec.format, b"", ((record.result, record.result_bytes),), True)
    ended = record.status in ENDED
    head = wav_header(record.audio_bytes if ended else None)
    objects = tuple((segment.name, segment.bytes) for segment in record.segments)
    return AudioFile(record.id, "wav", head if objects else b"", objects, ended)


async def download(record: TaskRecord, store: AudioStore, asked: str, if_range: str) -> Response:
    """The response to a request with these Range and If-Range headers. Raises 404 and 416."""
    file = audio_file(record)
    if not file.size:
        raise HTTPException(404, "there is no audio of this task yet")
    span = _span(asked, file.size) if not if_range or if_range == file.tag else None
    total = str(file.size) if file.is_whole else "*"
    headers = {
        "Accept-Ranges": "bytes",
        "Content-Disposition": "inline",  # the page names the file
        "Cache-Control": "no-store",
    }
    if file.is_whole:
        headers["ETag"] = file.tag
    start, end = span or (0, file.size)
    if span:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
    headers["Content-Length"] = str(end - start)
    pieces = _pieces(file, store, start, end)
    first = await anext(pieces)  # so that a storage that fails is an answer, not a broken one
    return StreamingResponse(
        _and_rest(first, pieces), 206 if span else 200, headers=headers, media_type=FORMATS[file.kind]
    )


def _span(asked: str, size: int) -> tuple[int, int] | None:
    """Start and end of the one range that is asked for; None for no range, or several. Raises 416 for none there."""
    found = _RANGE.fullmatch(asked.strip())
    if not found or not (found[1] or found[2]):
        return None
    if found[1]:
        start, end = int(found[1]), min(size, int(found[2]) + 1) if found[2] else size
        if found[2] and int(found[2]) < start:
            return None
    else:
        start, end = max(0, size - int(found[2])), size
    if start >= end:
        raise HTTPException(416, "there is nothing in this range (yet)", {"Content-Range": f"bytes */{size}"})
    return start, end


async def _pieces(file: AudioFile, store: AudioStore, start: int, end: int) -> AsyncIterator[bytes]:
    """The bytes from ``start`` to ``end`` in pieces."""
    if start < len(file.head):
        yield file.head[start:end]
    place = len(file.head)
    for name, size in file.objects:
        low, high = max(start, place), min(end, place + size)
        for begin in range(low, high, _PIECE):
            span = begin - place, min(high, begin + _PIECE) - place
            yield await asyncio.to_thread(store.read, file.task, name, *span)
        place += size


async def _and_rest(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece
