"""The processes in which Triton runs models (its Python stubs), by their command lines."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from harness.errors import ServerError
from harness.vibevoice.sessions.table import is_alive

_PROCESSES = Path("/proc")
_NAME, _MODEL, _REGION, _SERVER = 0, 1, 2, 5  # places in a command line of Triton (2.51)


@dataclass(frozen=True)
class Stub:
    """One process that serves, loads or unloads a model."""

    pid: int
    model: str
    region: str  # the shared memory of this process and its server
    server: int  # the process that started it
    started_ns: int = 0  # see ``started_ns``


def stub_of(pid: int) -> Stub | None:
    """The stub that a process is; None for any other, and for one that has ended."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        words = [word.decode() for word in (_PROCESSES / str(pid) / "cmdline").read_bytes().split(b"\0")]
        if Path(words[_NAME]).name == "triton_python_backend_stub" and is_alive(pid):
            model = Path(words[_MODEL]).parents[1].name
            return Stub(pid, model, words[_REGION], int(words[_SERVER]), started_ns(pid))
    return None


def started_ns(pid: int) -> int:
    """When a process started, of CLOCK_BOOTTIME: unlike CLOCK_MONOTONIC, it goes on while the host is suspended."""
    ticks = int((_PROCESSES / str(pid) / "stat").read_text().rpartition(")")[2].split()[19])
    return ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def stubs_of(server: int) -> list[Stub]:
    """The living stubs that a server started."""
    found = (stub_of(int(path.name)) for path in _PROCESSES.iterdir() if path.name.isdigit())
    return [stub for stub in found if stub and stub.server == server]


def own_server() -> int:
    """The server that started this process. Raises ServerError where it has ended: another one is the parent then."""
    parent, stub = os.getppid(), stub_of(os.getpid())
    if stub and stub.server != parent:
        raise ServerError(f"the server of this process, {stub.server}, has ended: nothing is to be served")
    return parent
