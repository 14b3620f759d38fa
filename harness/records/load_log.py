"""Results as plain msgpack values, for transfer between processes and for the records file of a load test.

``records.msgpack`` is a sequence of msgpack pairs ``[kind, value]``: first one ``run``, then ``result`` and ``rung``
as they happen, finally one ``end``. A file without ``end`` is from a test that was killed; its other pairs are valid.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from harness.content import SCHEMA
from harness.errors import StoreError
from harness.records.load_test import HeldRung, TestEnd, TestRun
from harness.records.schema import Chunks, Outcome, Request, Result

FILE_NAME = "records.msgpack"
_REQUEST_FIELDS = tuple(f.name for f in dataclasses.fields(Request))
_RESULT_FIELDS = tuple(f.name for f in dataclasses.fields(Result) if f.name != "chunks")
_CHUNK_FIELDS = tuple(f.name for f in dataclasses.fields(Chunks))


def request_to_plain(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in _REQUEST_FIELDS}


def request_from_plain(plain: Mapping[str, Any]) -> Request:
    fields: dict[str, Any] = {**plain, "speaker_ids": tuple(plain["speaker_ids"]), "say": tuple(plain["say"])}
    return Request(**fields)


def result_to_plain(result: Result) -> dict[str, Any]:
    """The Result in types that msgpack supports: each column of its chunks is the bytes of little-endian int64."""
    plain = {name: getattr(result, name) for name in _RESULT_FIELDS}
    plain["outcome"] = str(result.outcome)
    plain["chunks"] = [getattr(result.chunks, name).astype("<i8").tobytes() for name in _CHUNK_FIELDS]
    return plain


def result_from_plain(plain: Mapping[str, Any]) -> Result:
    columns = (np.frombuffer(column, "<i8").astype(np.int64) for column in plain["chunks"])
    fields: dict[str, Any] = {**plain, "outcome": Outcome(plain["outcome"]), "chunks": Chunks(*columns)}
    return Result(**fields)


def mixture(results: Sequence[Result]) -> tuple[str, ...]:
    """Why a test with both emulated and computed results is INVALID: their times cannot be combined."""
    answered = [result.emulated for result in results if len(result.chunks)]
    if len(set(answered)) < 2:
        return ()
    return (f"{sum(answered)} of {len(answered)} responses were emulated and the others computed",)


@dataclass
class Records:
    """One load test as read back. ``run``: its settings; ``end``: its outcome (None if it was killed)."""

    run: TestRun
    results: list[Result] = field(default_factory=list)
    rungs: list[HeldRung] = field(default_factory=list)
    end: TestEnd | None = None


def check_folder(folder: Path) -> None:
    """Raise StoreError where records cannot be written to ``folder``, as far as that can be checked in advance."""
    try:
        if folder.is_dir() and any(folder.iterdir()):
            holds = "the records of an earlier test" if (folder / FILE_NAME).exists() else "other files"
            raise StoreError(f"{folder} holds {holds}: give --records a new folder")
        nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    except OSError as error:  # name too long, or no permission to look into a folder
        raise StoreError(f"cannot write records to {folder}: {error.strerror}") from error
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise StoreError(f"cannot write records to {folder}: {nearest} is not a writable folder")


class RecordsWriter:
    """Appends to ``records.msgpack`` in a folder, unbuffered: a kill loses at most an incomplete last pair.

    A pair that cannot be written raises StoreError and leaves the file unchanged.
    """

    def __init__(self, folder: Path, run: TestRun):
        self.path = Path(folder) / FILE_NAME
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("xb", buffering=0)
        except FileExistsError:
            raise StoreError(f"{self.path} holds the records of an earlier test: give --records a new folder") from None
        except OSError as error:
            raise StoreError(f"cannot write records to {folder}: {error.strerror}") from error
        try:
            self._append("run", {"schema": SCHEMA, **run.to_dict()})
        except StoreError:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove the created file, and its folder if that is empty."""
        self._file.close()
        self.path.unlink()
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()

    def result(self, result: Result) -> None:
        self._append("result", result_to_plain(result))

    def rung(self, rung: HeldRung) -> None:
        self._append("rung", rung.to_dict())

    def end(self, end: TestEnd) -> None:
        self._append("end", end.to_dict())
        self._file.close()

    def _append(self, kind: str, value: dict[str, Any]) -> None:
        begin, rest = self._file.tell(), memoryview(msgpack.packb([kind, value]))
        try:
            while rest:  # a disk that fills up accepts a part
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.seek(begin)
            self._file.truncate()  # after an incomplete pair nothing could be read
            raise StoreError(f"cannot write to {self.path}: {error.strerror}") from error


def read_records(folder: Path) -> Records:
    """The records of one load test, without an incomplete last pair.

    Raises StoreError where there is no records file, or it is damaged or of a newer schema.
    """
    path = Path(folder) / FILE_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"no records of a load test at {path}: {error.strerror}") from error
    unpacker = msgpack.Unpacker(max_buffer_size=0)
    unpacker.feed(data)
    try:
        return _collect(unpacker, path)
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise StoreError(f"{path} is damaged at byte {unpacker.tell()}: {error}") from error


def _collect(pairs, path: Path) -> Records:
    records = None
    for kind, value in pairs:
        if records is None:
            if kind != "run" or value["schema"] > SCHEMA:
                raise StoreError(f"{path} was written by a newer version of the harness, or is not a records file")
            records = Records(run=TestRun.of(value))
        elif kind == "result":
            records.results.append(result_from_plain(value))
        elif kind == "rung":
            records.rungs.append(HeldRung.of(value))
        elif kind == "end":
            records.end = TestEnd.of(value)
    if records is None:
        raise StoreError(f"{path} is empty: the test was killed before it began")
    return records
