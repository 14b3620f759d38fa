"""The servers that run on this host, from their state files."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import psutil

from harness.errors import InputError
from harness.host.places import ROOT

STATE = ".harness"  # folder of all state, within the folder that the harness may write to


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
    return sorted(state["url"] for state in states(root) if state["public"] and is_alive(state["server"]))


def states(root: Path) -> list[dict]:
    states = []
    for file in (root / STATE).glob("triton-*/state.json"):
        with contextlib.suppress(OSError, ValueError):
            states.append({**json.loads(file.read_text()), "folder": file.parent})
    return states


def process_mark(pid: int) -> list:
    """Identity of a process, distinct from a later one of the same pid: pid and start time in seconds since boot."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [pid, round(psutil.Process(pid).create_time() - psutil.boot_time(), 1)]
    return [pid, -1.0]


def is_alive(mark: list) -> bool:
    return mark[1] >= 0 and process_mark(mark[0]) == list(mark)
