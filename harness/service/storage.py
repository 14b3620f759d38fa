"""Audio and carries of tasks as objects under any URL that fsspec knows: a folder, ``s3://bucket/prefix``, …"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from harness.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_PIECE = 1 << 20


class AudioStore:
    """The objects of tasks, by task and name. Methods block; they raise OSError where the storage fails.

    A name never repeats for other content: the attempt that wrote an object is part of it, so a worker that lost its
    task overwrites nothing. Which objects count is said by the task's record alone.
    """

    def __init__(self, url: str):
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"storage {url} cannot be used ({error}): give a folder, or a URL of fsspec whose package is installed "
                "(for s3:// it is s3fs)"
            ) from None
        self._root = root.rstrip("/")
        if isinstance(self._files, LocalFileSystem):
            Path(self._root).mkdir(parents=True, exist_ok=True, mode=0o700)

    def write(self, task: str, name: str, content: bytes) -> None:
        self._files.makedirs(self._folder(task), exist_ok=True)
        self._files.pipe_file(self._path(task, name), content)

    def put(self, task: str, name: str, file: Path) -> None:
        """Store a local file."""
        self._files.makedirs(self._folder(task), exist_ok=True)
        self._files.put_file(str(file), self._path(task, name))

    def read(self, task: str, name: str, start: int = 0, end: int | None = None) -> bytes:
        return self._files.cat_file(self._path(task, name), start, end)

    def pieces(self, task: str, objects: Iterable[tuple[str, int]]) -> Iterator[bytes]:
        """The content of objects (name, bytes), one after the other, in pieces of at most 1 MiB."""
        for name, size in objects:
            for start in range(0, size, _PIECE):
                yield self.read(task, name, start, min(size, start + _PIECE))

    def size(self, task: str, name: str) -> int:
        return self._files.size(self._path(task, name))

    def names(self, task: str) -> list[str]:
        """Names of all objects of a task, whether they count or not."""
        try:
            found = self._files.ls(self._folder(task), detail=False, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(str(path).rpartition("/")[2] for path in found)

    def keep_only(self, task: str, names: Iterable[str]) -> None:
        """Remove what attempts that do not count have left."""
        kept = set(names)
        for name in self.names(task):
            if name not in kept:
                self._files.rm_file(self._path(task, name))

    def remove_object(self, task: str, name: str) -> None:
        self._files.rm_file(self._path(task, name))

    def remove(self, task: str) -> None:
        """Remove all objects of a task."""
        try:
            self._files.rm(self._folder(task), recursive=True)
        except FileNotFoundError:
            pass

    def _folder(self, task: str) -> str:
        return f"{self._root}/{_checked(task)}"

    def _path(self, task: str, name: str) -> str:
        return f"{self._folder(task)}/{_checked(name)}"


def _checked(name: str) -> str:
    """A name that cannot lead out of its folder."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an object")
    return name
