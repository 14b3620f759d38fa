"""What figures were produced with: this code, its packages, this host."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import psutil

from harness.host import nvml, packages
from harness.host.places import CHECKOUT, PACKAGE
from harness.identity import HostFacts

_SERVER_PACKAGES = ("torch", "transformers", "triton", "nvidia-pytriton", "numpy")
_PACKAGES = (*_SERVER_PACKAGES, "tritonclient", "locust", "pandas", "scipy", "grpcio")


def host_facts() -> HostFacts:
    """Facts of the host: processor, cores, memory, kernel; GPUs with driver and memory, one line each."""
    gpus = (f"{gpu.name}, driver {gpu.driver}, {gpu.memory_bytes >> 20} MiB" for gpu in nvml.present())
    return HostFacts(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        gpu="\n".join(gpus) or "none",
    )


def versions() -> dict[str, str]:
    """Versions of the packages that affect figures."""
    known = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            known[package] = metadata.version(package)
    return known


def commit() -> str:
    """The commit of this checkout, with "-dirty" if files differ from it; "" if unknown.

    For an installed harness: the commit that it was built from, if known, and its version. For an exported tree: the
    commit noted beside it.
    """
    noted = PACKAGE / "commit.txt"
    if CHECKOUT is None or noted.is_file():
        return _built_from(noted)
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _built_from(noted: Path) -> str:
    commit = noted.read_text().strip() if noted.is_file() else "no commit known"
    if CHECKOUT:
        return commit
    found = packages.find(packages.NAME)
    return f"{commit} (installed, version {found.version if found else 'unknown'})"


def code_digest() -> str:
    """A fingerprint of the package's sources: equal wherever the same code runs, whatever its commit."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
