"""Looks at the server while a trial runs: Triton's counts, CPU, memory and GPU, about once a second."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import threading
import time
from importlib import metadata
from pathlib import Path

import psutil

from harness import packages
from harness.errors import ServerError
from harness.places import CHECKOUT, PACKAGE
from harness.records import ServerSample
from harness.targets import Target
from harness.triton.statistics import StatisticsReader, prometheus

_PACKAGES = ("torch", "transformers", "nvidia-pytriton", "tritonclient", "locust", "numpy", "pandas", "scipy", "grpcio")


class Probe:
    """Samples the servers of a target from a thread of its own, for the length of a ``with`` block.

    ``samples`` grows while it runs; ``missed`` counts the looks at which a server did not answer. ``metrics_url`` is of
    its Prometheus page; None = there is none.
    """

    def __init__(
        self,
        target: Target | str,
        server_pid: int | None = None,
        interval_s: float = 1.0,
        metrics_url: str | None = None,
    ):
        self.samples: list[ServerSample] = []
        self.missed = 0
        self._reader = StatisticsReader(target)
        self._pid, self._metrics_url = server_pid, metrics_url
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="probe", daemon=True)

    def __enter__(self) -> Probe:
        psutil.cpu_percent()  # the first call only sets the mark
        self._thread.start()
        return self

    def __exit__(self, error_type, *_) -> None:
        self._stop.set()
        self._thread.join()
        if error_type is None:
            self._look()
        self._reader.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._look()
            self._stop.wait(self._interval_s)

    def _look(self) -> None:
        try:
            stages = self._reader.snapshot()
        except ServerError:
            self.missed += 1
            return
        gpu_percent, gpu_memory = gpu_load()
        self.samples.append(
            ServerSample(
                at_ns=time.monotonic_ns(),
                stages=stages,
                cpu_percent=psutil.cpu_percent(),
                memory_bytes=tree_memory_bytes(self._pid) if self._pid else 0,
                gpu_percent=gpu_percent,
                gpu_memory_bytes=gpu_memory,
                metrics=prometheus(self._metrics_url) if self._metrics_url else {},
            )
        )


def tree_memory_bytes(pid: int) -> int:
    """Resident memory of a process and its children; pages that they share count in each."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += one.memory_info().rss
    return total


_HAS_GPU = os.path.exists("/dev/nvidiactl")


def gpu_load() -> tuple[float | None, int | None]:
    """Utilisation in percent and used bytes of the first GPU; None for what it does not tell, or with no GPU at all."""
    percent, _, mebibytes = _nvidia_smi("utilization.gpu,memory.used").partition("\n")[0].partition(",")
    used = _figure(mebibytes)
    return _figure(percent), None if used is None else int(used * 2**20)


def _figure(text: str) -> float | None:
    """A number of nvidia-smi, which also says [N/A]: of a GPU in parts, or of memory that it shares with the host."""
    try:
        return float(text)
    except ValueError:
        return None


def host_facts() -> dict:
    """What the figures were measured on: processor, cores, memory, kernel, GPU and its driver."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "gpu": _nvidia_smi("name,driver_version,memory.total") or "none",
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide a figure."""
    known = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            known[package] = metadata.version(package)
    return known


def commit() -> str:
    """The commit of this checkout, "-dirty" where files differ from it; "" where it is none.

    Of an installed harness: the commit that it was built from, where that is known, and its version. Of files that were
    taken out of a checkout: the commit that is noted beside them.
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


def _cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _nvidia_smi(query: str) -> str:
    if not _HAS_GPU:
        return ""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
