"""A file system of a few megabytes that can be filled to its last byte."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

_PIECE = bytes(1 << 16)


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[bool]:
    """Mount a tmpfs of this size at ``folder`` meanwhile; gives whether that was possible (it takes root)."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,mode=700", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Leave no byte free on the file system of ``folder`` for the length of a ``with`` block."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(_PIECE)
    with open(ballast, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:  # what a whole piece did not fit into
            file.write(b"\0" * 512)
    try:
        yield
    finally:
        os.unlink(ballast)
