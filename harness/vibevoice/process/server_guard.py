"""Ends a process that waits for its server once the server has ended.

A process that has a model loaded waits in Triton's binding (2.51), which holds the interpreter until the server
answers. If the server is killed, that never happens, and no thread of the process can notice it. So another process
watches meanwhile: this file as a script, which needs the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_LOOK_S = 0.2


@contextlib.contextmanager
def ended_with(server: int, files: Sequence[Path] = ()) -> Iterator[None]:
    """End this process, and remove its ``files``, if ``server``, its parent, ends during the block."""
    python = shutil.which("python3") or sys.executable  # of a stub, the first python3 is the one that it uses
    watch = [python, "-I", "-S", str(Path(__file__).resolve()), str(os.getpid()), str(server), *map(str, files)]
    guard = subprocess.Popen(watch, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        guard.kill()
        guard.wait()


def _watch(waiting: int, server: int, files: Sequence[str]) -> None:
    """Kill the process ``waiting``, which started this one, when its parent is no longer ``server``.

    It says nothing: the last line of the server's log tells why the server ended.
    """
    while os.getppid() == waiting:
        if _parent_of(waiting) != server:
            with contextlib.suppress(ProcessLookupError):
                os.kill(waiting, signal.SIGKILL)
            for file in files:
                Path(file).unlink(missing_ok=True)
            return
        time.sleep(_LOOK_S)


def _parent_of(pid: int) -> int | None:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


if __name__ == "__main__":
    _watch(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
