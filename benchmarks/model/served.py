"""`harness serve` as a user starts it, with everything that belongs to it, and one client of it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import common
import psutil

from harness.client.stream import SpeechClient
from harness.deploy.leftovers import shm_prefix_of
from harness.errors import HarnessError
from harness.host.places import ROOT
from harness.records.schema import Outcome, Result
from harness.vibevoice.sessions.table import is_alive

TRITON, SERVE = "tritonserver", "harness serve"
PATIENCE_S = 90.0
PROBES, PROBE_S = 4, 0.5  # requests at once that find out whether a server is back, and between two of them
TOLD_S, MORE = 4.0, 10  # for a client to be told of a fault, or to hear so many more chunks
SHORT = "Speaker 1: It is early."
SHARED = Path("/dev/shm")
KEYS = "harness-*"  # files there: of a kind, and the mark of a server


class Serve:
    """`harness serve` as a user starts it, its output, and everything that belongs to it."""

    def __init__(self, topology: str):
        self.topology, self.began_s = topology, time.time()
        self.output = Path(tempfile.mkstemp(prefix="server-faults-")[1])
        command = [sys.executable, "-m", "harness", "serve", "--topology", topology]
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, start_new_session=True)
        self.family: dict[int, psutil.Process] = {}
        self.ready_s = 0.0
        self.judged = 0  # characters of its output
        self.marks: set[str] = set()
        self.ports: list[int] = []
        self._keys_before = set(SHARED.glob(KEYS))

    def said(self) -> str:
        """Its output since the last fault."""
        return " ".join(self.output.read_text(errors="replace").split())[self.judged :]

    def next_fault(self) -> None:
        self.judged += len(self.said())

    def look(self) -> list[psutil.Process]:
        """Its processes now; all that ever existed are remembered."""
        with contextlib.suppress(psutil.Error):
            self.family |= {p.pid: p for p in psutil.Process(self.process.pid).children(recursive=True)}
        return [p for p in self.family.values() if p.is_running() and is_alive(p.pid)]  # pids are used again

    def find(self, name: str) -> psutil.Process | None:
        if name == SERVE:
            return psutil.Process(self.process.pid)
        found = []
        for one in self.look():
            with contextlib.suppress(psutil.Error, IndexError):
                command = one.cmdline()
                if name == TRITON and Path(command[0]).name == TRITON:
                    self.marks.add(f"{one.pid}-")
                    return one
                if any(f"/{name}/" in word for word in command) and "stub" in command[0]:
                    found.append((one.create_time(), one))
        return max(found, key=lambda each: each[0])[1] if found else None  # an older one is being unloaded

    def ready(self) -> bool:
        """Whether it serves; waits until it does, or ends."""
        deadline = time.monotonic() + 2 * PATIENCE_S
        while self.process.poll() is None and time.monotonic() < deadline:
            if found := re.search(r"at (127\.0\.0\.1:(\d+)) \(gRPC\), metrics at \S+?:(\d+)/", self.said()):
                self.url, self.ports = found[1], [int(found[2]), int(found[3])]
                self.find(TRITON)
                self.ready_s = time.time()
                return True
            self.look()
            time.sleep(0.05)
        self.ready_s = time.time()
        return False

    @property
    def prefixes(self) -> list[str]:
        return [shm_prefix_of(folder) for folder in self.folders] or [f"harness_{self.process.pid}_"]

    @property
    def folders(self) -> list[Path]:
        return list((ROOT / ".harness").glob(f"triton-{self.process.pid}-*/"))

    def shared(self) -> list[Path]:
        """Its shared memory, notes and keys; also new keys of no server at all."""
        mine = SHARED.glob(f"harness_{self.process.pid}_*")
        keys = [path for path in SHARED.glob(KEYS) if any(f"-{mark}" in path.name for mark in self.marks)]
        new = set(SHARED.glob(KEYS)) - self._keys_before - set(keys)
        return [*mine, *keys, *(path for path in new if not _is_of_a_server(path))]

    def held(self) -> dict[str, float]:
        """Sessions, queue and KV cache by its metrics page; empty where that does not answer."""
        with contextlib.suppress(OSError):
            return common.held(f"http://127.0.0.1:{self.ports[1]}/metrics")
        return {}

    def wait(self, seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    def end(self) -> None:
        """End everything that still runs of it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.wait(20)
        for one in [psutil.Process(os.getpid()), *self.look()][1:]:
            with contextlib.suppress(psutil.Error):
                one.kill()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self.output.unlink(missing_ok=True)
        for log in (ROOT / ".harness").glob(f"triton-{self.process.pid}-*.log"):
            log.unlink()  # kept for the user on purpose


def _is_of_a_server(key: Path) -> bool:
    """Whether a tritonserver runs to which a key belongs, such as one of another test."""
    with contextlib.suppress(psutil.Error, IndexError, ValueError):
        return Path(psutil.Process(int(key.name.split("-")[-2])).cmdline()[0]).name == TRITON
    return False


@functools.cache
def loop() -> asyncio.AbstractEventLoop:
    """The event loop of all streams: gRPC supports one per process."""
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, daemon=True).start()
    return made


class Client:
    """One stream in a background thread."""

    def __init__(self, url: str, script: str, frames: int = 30_000, **more):
        self.url, self.heard, self.ended_s, self.result = url, 0, 0.0, None
        self.request = common.request("client", frames, script, **more)
        self._stream = None
        self._task = asyncio.run_coroutine_threadsafe(self._run(), loop())

    async def _run(self) -> None:
        async with SpeechClient(self.url) as client:
            self._stream = client.open(self.request, "closed", on_chunk=self._count)
            self.result = await self._stream.run()
            self.ended_s = time.monotonic()

    def _count(self, *_) -> None:
        self.heard += 1

    def wait_for_speech(self, chunks: int = 5) -> None:
        wait_for(lambda: self.heard >= chunks or self.result, "speech")

    def finish(self, seconds: float) -> Result | None:
        """Its result; abandoned if it still speaks after ``seconds``."""
        concurrent.futures.wait([self._task], seconds)
        if self.result is None and self._stream is not None:
            loop().call_soon_threadsafe(self._stream.stop, Outcome.CANCELLED)
            concurrent.futures.wait([self._task], 10)
        return self.result


def speaks(url: str, seconds: float = 20, goes_on: Callable[[], bool] = lambda: True) -> bool:
    """Whether one of several requests is served; a new one does not wait for those that a dead process holds."""
    waiting: list[Client] = []
    began_s = next_s = time.monotonic()
    try:
        while (now := time.monotonic()) < began_s + seconds and goes_on():
            if any(one.result and one.result.outcome is Outcome.DONE for one in waiting):
                return True
            waiting = [one for one in waiting if one.result is None]
            if now >= next_s and len(waiting) < PROBES:
                waiting.append(Client(url, SHORT, 3))
                next_s = now + PROBE_S
            time.sleep(0.02)
    finally:
        for one in waiting:
            one.finish(0)
    return False


def outcome_of(client: Client) -> Result | None:
    """The result of a client that is told of the fault; one that hears more after it is stopped, as it goes on."""
    before, deadline = client.heard, time.monotonic() + TOLD_S
    while client.result is None and client.heard < before + MORE and time.monotonic() < deadline:
        time.sleep(0.02)
    return client.finish(0)


def wait_for(holds, what: str, seconds: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise HarnessError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.02)
