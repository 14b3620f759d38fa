"""Runs of Locust during which a fault is injected: how each is injected, and what the run leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
from testbed import Network, TimetableServer

from harness.drive.readers.pool import PROCESS
from harness.errors import HarnessError, StoreError
from harness.records.load_log import Records, read_records
from harness.records.schema import Outcome, Result

ROOT = Path(__file__).resolve().parents[2]
COUNT = 20
PATIENCE_S = 90.0  # a cut network is detected within half of it
RATE_PER_S = 20
WORDS = "first=0.5 every=0.002"  # of the server: at any time about 15 requests are in progress, none for LONGEST_S
LONGEST_S = 2.0
DONE_AND_FAILED = (Outcome.DONE, Outcome.ERROR)


@dataclass
class Run:
    """A run of Locust in progress."""

    server: TimetableServer
    network: Network
    process: subprocess.Popen
    folder: Path

    def results(self) -> list[Result]:
        try:
            return read_records(self.folder).results
        except StoreError:  # not started yet
            return []

    def wait_for(self, outcome: Outcome, more: int = COUNT) -> None:
        """Wait until this many more requests have ended so, or the run has."""
        count = self.count(outcome) + more
        wait_for(lambda: self.count(outcome) >= count or self.process.poll() is not None, f"{count} to be {outcome}")

    def count(self, outcome: Outcome) -> int:
        return sum(result.outcome is outcome for result in self.results())

    def reader(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if PROCESS in child.cmdline())


def interrupt(run: Run) -> None:
    run.process.send_signal(signal.SIGINT)


def kill_server(run: Run) -> None:
    os.kill(run.server.pid, signal.SIGKILL)
    run.wait_for(Outcome.ERROR)


def replace_server(run: Run) -> None:
    kill_server(run)
    run.server.start_again()
    run.wait_for(Outcome.DONE)


def cut_network(run: Run) -> None:
    run.network.cut()
    run.wait_for(Outcome.ERROR)
    run.network.repair()
    run.wait_for(Outcome.DONE)


def reset_connection(run: Run) -> None:
    run.network.reset()
    run.wait_for(Outcome.DONE)


def kill_reader(run: Run) -> None:
    run.reader().kill()
    run.wait_for(Outcome.ERROR)


def kill_locust(run: Run) -> None:
    reader = run.reader()
    run.process.kill()
    gone, _ = psutil.wait_procs([reader], timeout=20)
    if not gone:
        raise HarnessError(f"reader process {reader.pid} outlived Locust")


@dataclass(frozen=True)
class RunFault:
    """``ends``: outcomes that must occur. ``lives``: whether one server received every request.

    The fault is injected when ``after`` requests are complete.
    """

    name: str
    strike: Callable[[Run], None]
    ends: tuple[Outcome, ...]
    told: str = ""
    lives: bool = True
    after: int = COUNT


RUN_FAULTS = (
    RunFault("client stopped with Ctrl-C", interrupt, (Outcome.DONE,)),
    RunFault("Locust killed", kill_locust, (Outcome.DONE,), after=5 * COUNT),
    RunFault("connection reset", reset_connection, DONE_AND_FAILED, "ended the connection"),
    RunFault(
        "network cut for a while",
        cut_network,
        DONE_AND_FAILED,
        "sent nothing, not even an answer to a ping",
        lives=False,
    ),
    RunFault("reader process killed", kill_reader, DONE_AND_FAILED, "INVALID", lives=False),
    RunFault(
        "server killed, another in its place", replace_server, DONE_AND_FAILED, "ended the connection", lives=False
    ),
    RunFault("server killed", kill_server, DONE_AND_FAILED, "no Triton answers", lives=False),
)


@dataclass(frozen=True)
class Struck:
    """What a run left behind: its output, its records, and what the server received while it lived."""

    said: str
    records: Records
    taken: int | None
    at_ns: int


def struck(server: TimetableServer, fault: RunFault) -> Struck:
    """Start a run, inject the fault after its first requests, and let it end."""
    taken_before = server.taken()
    with tempfile.TemporaryDirectory() as folder, Network(server.url) as network:
        with _locust(network.url, Path(folder) / "records") as process:
            run = Run(server, network, process, Path(folder) / "records")
            run.wait_for(Outcome.DONE, fault.after)
            at_ns = time.monotonic_ns()
            fault.strike(run)
            if process.poll() is None and fault.strike is not interrupt:
                interrupt(run)  # the fault is over: end the run
            said = "".join(process.communicate(timeout=PATIENCE_S))
        taken = server.taken() - taken_before if fault.lives else None
        return Struck(said, read_records(run.folder), taken, at_ns)


@contextlib.contextmanager
def _locust(url: str, records: Path) -> Iterator[subprocess.Popen]:
    file = str(ROOT / "scenarios" / "podcast.py")
    command = [sys.executable, "-m", "locust", "-f", file, "--headless", "--only-summary", "--host", url]
    command += ["--rate", str(RATE_PER_S), "--arrivals", "constant", "--chunk-frames", "10", "-t", "300s"]
    command += ["--stop-timeout", "2", "--records", str(records)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(holds: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline_s:
            raise HarnessError(f"waited {PATIENCE_S:.0f} s in vain for {what}")
        time.sleep(0.05)
