"""Finds and removes what a killed server leaves behind: processes, shared memory, folders."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from pathlib import Path

import psutil

from harness.deploy.running import STATE, STATE_NAME, is_alive, states
from harness.host.keys import remove_keys, remove_orphaned_files
from harness.host.places import ROOT

_SHARED_MEMORY, _TEMPORARY = Path("/dev/shm"), Path("/tmp")
_LONGEST_START_S = 600.0


def remove_stale(root: Path = ROOT) -> None:
    """Remove what servers left behind whose owner was killed: processes, shared memory, folders."""
    for folder, state in states(root).items():
        if is_alive(state.owner):
            continue
        if is_alive(state.server):
            _kill_tree(psutil.Process(state.server[0]))
        _end_orphans(state.shm_prefix)
        remove_keys(state.mark)
        remove_shared_memory(state.shm_prefix)
        _remove_folder(folder)
    for folder in (root / STATE).glob("triton-*/"):
        with contextlib.suppress(OSError, ValueError):  # another user's, or not a server's folder
            if not (folder / STATE_NAME).exists() and not psutil.pid_exists(int(folder.name.split("-")[1])):
                _end_orphans(shm_prefix_of(folder))  # killed before it wrote its state
                remove_shared_memory(shm_prefix_of(folder))
                _remove_folder(folder)
    remove_orphaned_files()


def shm_prefix_of(folder: Path) -> str:
    """The prefix of a server's shared memory, from its folder; it is also in the command lines of its processes."""
    return f"harness_{folder.name.removeprefix('triton-').replace('-', '_')}_"


def remove_shared_memory(prefix: str) -> None:
    for region in _SHARED_MEMORY.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # already removed, or another user's
            region.unlink()


def _remove_folder(folder: Path) -> None:
    """Remove a server's folder, and what it left in the temporary folder if it was killed while starting."""
    with contextlib.suppress(OSError):  # another user's
        laid_out_s = (folder / "models").stat().st_mtime
        remove_environments(laid_out_s, laid_out_s + _LONGEST_START_S)
    shutil.rmtree(folder, ignore_errors=True)


def remove_environments(since_s: float, until_s: float = math.inf) -> None:
    """Remove the empty folders that Triton creates at start for packed environments, which our stages do not use."""
    for folder in _TEMPORARY.glob("python_env_*"):
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            if folder.stat().st_uid == os.geteuid() and since_s <= folder.stat().st_ctime <= until_s:
                folder.rmdir()


def _end_orphans(prefix: str) -> None:
    """End the stage processes of a server that has ended."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.uids().effective == os.geteuid() and any(w.startswith(prefix) for w in process.cmdline()[1:4]):
                process.kill()


def _kill_tree(process: psutil.Process) -> None:
    for one in [*process.children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
