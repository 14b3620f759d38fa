"""The servers that run on this host, from their state files."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness.content import content_of, read
from harness.errors import InputError
from harness.host.places import ROOT

STATE = ".harness"  # folder of all state, within the folder that the harness may write to
STATE_NAME = "state.json"  # in a server's folder, which only its user can read
ProcessMark = tuple[int, float]
"""A process, distinct from a later one of the same pid: pid and start time in seconds since boot, -1 for none."""


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """A server of this host: its owner, its process, and what it leaves behind if its owner is killed."""

    owner: ProcessMark
    server: ProcessMark
    mark: str = ""  # see ``keys.server_mark``
    url: str
    metrics_url: str | None = None
    shm_prefix: str
    preset: str = ""
    public: bool = False  # started by `harness serve`

    def text(self) -> str:
        return json.dumps(content_of(self))


def local_url(root: Path = ROOT) -> str | None:
    """The gRPC address of the running ``harness serve``, or None. Raises InputError where several run."""
    urls = local_urls(root)
    if len(urls) > 1:
        raise InputError(
            f"{len(urls)} servers of `harness serve` run on this host: {', '.join(urls)}. Select one "
            "with --url, or stop the others"
        )
    return urls[0] if urls else None


def local_urls(root: Path = ROOT) -> list[str]:
    """The gRPC address of every running ``harness serve``."""
    return sorted(state.url for state in states(root).values() if state.public and is_alive(state.server))


def states(root: Path) -> dict[Path, ServerState]:
    """The states of servers, by their folders; those that cannot be read are left out."""
    found = {}
    for file in (root / STATE).glob(f"triton-*/{STATE_NAME}"):
        with contextlib.suppress(OSError, ValueError):
            found[file.parent] = read(ServerState, json.loads(file.read_text()))
    return found


def process_mark(pid: int) -> ProcessMark:
    """The mark of the process that has this pid now."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return pid, round(psutil.Process(pid).create_time() - psutil.boot_time(), 1)
    return pid, -1.0


def is_alive(mark: ProcessMark) -> bool:
    return mark[1] >= 0 and process_mark(mark[0]) == mark
