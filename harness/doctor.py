"""What this machine can and cannot do for the harness, and how to mend it."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness.errors import ServerError
from harness.provenance import host_facts
from harness.replicas import Replica
from harness.targets import Target
from harness.triton.config import REPOSITORY, Deployment
from harness.triton.server import find_distribution, free_ports, local_url

_SHARED_MEMORY_NEEDED = 64 << 20
_MEMORY_NEEDED = 4 << 30
_DISK_NEEDED = 1 << 30


@dataclass(frozen=True)
class Check:
    """One finding. ``fine`` is None for what is good to have but not needed."""

    what: str
    fine: bool | None
    found: str
    mend: str = ""


def examine(root: Path, target: Target | None = None) -> list[Check]:
    """Every check, in the order in which a first run would meet them; ``target``: servers to be reached."""
    servers = asyncio.run(_servers(target)) if target else [_server(root)]
    return [*_software(), *_machine(root), _gpu(), *servers]


def _software() -> Iterator[Check]:
    version = sys.version_info[:2]
    fine = (3, 11) <= version <= (3, 12)
    yield Check("Python", fine, ".".join(map(str, version)), "" if fine else "use Python 3.11 or 3.12")
    try:
        yield Check("Triton", True, str(find_distribution().server))
    except ServerError as error:
        yield Check("Triton", False, "not usable", str(error))
    try:
        Deployment().configs()
        yield Check("model repository", True, str(REPOSITORY))
    except ServerError as error:
        yield Check("model repository", False, str(REPOSITORY), str(error))


def _machine(root: Path) -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0))
    yield Check("cores", cores >= 2 or None, str(cores), "" if cores >= 2 else "one core measures itself: use two")
    yield _room("memory", psutil.virtual_memory().available, _MEMORY_NEEDED, "close other programs")
    shared = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    yield _room("shared memory", shared, _SHARED_MEMORY_NEEDED, "in a container: --shm-size=1g")
    yield _room("disk", shutil.disk_usage(root).free, _DISK_NEEDED, "free some space, or give --results elsewhere")
    try:
        free_ports(3)
        yield Check("loopback ports", True, "free")
    except OSError as error:
        yield Check("loopback ports", False, str(error), "allow binding to 127.0.0.1")


def _room(what: str, free: int, needed: int, mend: str) -> Check:
    fine = free >= needed
    return Check(what, fine, f"{free / 2**30:.1f} GiB free", "" if fine else f"{needed / 2**30:.2g} GiB needed: {mend}")


def _gpu() -> Check:
    gpu = host_facts()["gpu"]
    if gpu == "none":
        return Check("GPU", None, "none: figures are of this host's CPU", "for GPU figures, run where one is")
    return Check("GPU", True, gpu)


def _server(root: Path) -> Check:
    url = local_url(root)
    return Check("running server", None, url or "none", "" if url else "start one: harness serve")


async def _servers(target: Target) -> list[Check]:
    return await asyncio.gather(*(_reached(target, address) for address in target.addresses))


async def _reached(target: Target, address: str) -> Check:
    replica = Replica(target, address)
    try:
        await replica.ready()
    except ServerError as error:
        return Check(f"server {address}", False, "not usable", str(error))
    finally:
        await replica.close()
    return Check(f"server {address}", True, f"ready, reached {'with TLS' if target.tls else 'in plain text'}")
