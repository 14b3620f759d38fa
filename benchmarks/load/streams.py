"""Loads for the benchmarks of the load generator on a timetable server, and their measurement."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
from other_clients import Times
from testbed import TimetableServer

from harness import wire
from harness.drive.readers.pool import ReaderPool
from harness.records.load_log import read_records
from harness.records.schema import Request, Result

ROOT = Path(__file__).resolve().parents[2]
LIMIT_MS = 10.0
COMPLETE = 0.99
SPREAD_S = 2.0  # over which the streams begin
STARTS_PER_S = 50
USERS, LOOP_FRAMES, LOOP_WORDS, LOOP_S = 10, 20, "first=0.1 every=0.05", 4.0
QUIET_CORES = 0.2  # that others may use
LOCUSTFILE = """
from harness.scenario import Lengths, Mix, SpeechUser, TrafficClass

class Caller(SpeechUser):
    mix = Mix("two seconds", (TrafficClass("short", 1.0, Lengths.parse({"fixed": 2})),))
"""


@dataclass(frozen=True)
class Held:
    """Figures of ``streams`` streams in a window. ``complete``: chunks received / chunks of the timetable."""

    streams: int
    p50_ms: float
    p99_ms: float
    complete: float
    reader_s_per_1000: float
    reader_cores: float
    server_cores: float

    @property
    def is_held(self) -> bool:
        return self.p99_ms < LIMIT_MS and self.complete >= COMPLETE


def hold(server: TimetableServer, streams: int, seconds: float) -> Held:
    """Hold this many streams on one reader process; measure the last ``seconds``."""
    pool = ReaderPool(server.url)
    start_ns = time.monotonic_ns() + 500_000_000
    frames = round((SPREAD_S + seconds + 5) * wire.FRAMES_PER_SECOND)
    tickets = []
    for number in range(streams):
        due_ns = start_ns + round(SPREAD_S * 1e9 * number / streams)
        tickets.append(pool.submit(Request(str(number), "x", "Speaker 1: Hello.", (0,), frames, due_ns=due_ns), "open"))
    sleep_until(start_ns + round((SPREAD_S + 1) * 1e9))
    before, from_ns = cpu_s(server, pool), time.monotonic_ns()
    sleep_until(from_ns + round(seconds * 1e9))
    after, to_ns = cpu_s(server, pool), time.monotonic_ns()
    pool.close()
    used = {name: after[name] - before[name] for name in before}
    return seen([ticket.result for ticket in tickets], from_ns, to_ns, used)


def seen(results: Sequence[Result], from_ns: int, to_ns: int, used: dict[str, float]) -> Held:
    received = np.concatenate([result.chunks.received_ns for result in results])
    sent_at = np.concatenate([result.chunks.sent_at_ns for result in results])
    inside = (received >= from_ns) & (received < to_ns)
    p50, p99 = np.quantile((received - sent_at)[inside] / 1e6, [0.5, 0.99]) if inside.any() else (np.inf, np.inf)
    seconds, chunks = (to_ns - from_ns) / 1e9, max(int(inside.sum()), 1)
    return Held(
        streams=len(results),
        p50_ms=float(p50),
        p99_ms=float(p99),
        complete=chunks / (len(results) * seconds * wire.FRAMES_PER_SECOND),
        reader_s_per_1000=used["reader"] / chunks * 1000,
        reader_cores=used["reader"] / seconds,
        server_cores=used["server"] / seconds,
    )


def cpu_s(server: TimetableServer, pool: ReaderPool) -> dict[str, float]:
    """CPU seconds used so far by the server with its model, and by the reader."""
    main = psutil.Process(server.pid)
    return {
        "server": sum(sum(one.cpu_times()[:2]) for one in (main, *main.children(recursive=True))),
        "reader": sum(psutil.Process(pool._readers[0].process.pid).cpu_times()[:2]),
    }


def pool_delay_p99_ms(server: TimetableServer, seconds: float) -> float:
    """Schedule delay of requests of two seconds handed to a ReaderPool half a second ahead."""
    pool = ReaderPool(server.url)
    start_ns, tickets = time.monotonic_ns() + 1_000_000_000, []
    for number in range(round(seconds * STARTS_PER_S)):
        due_ns = start_ns + round(number / STARTS_PER_S * 1e9)
        sleep_until(due_ns - 500_000_000)
        tickets.append(pool.submit(Request(str(number), "x", "Speaker 1: Hello.", (0,), 15, due_ns=due_ns), "open"))
    pool.close(grace_s=10)
    return delay_p99_ms([ticket.result for ticket in tickets])


def locust_delay_p99_ms(server: TimetableServer, seconds: float) -> float:
    """The same for a run of Locust itself, with everything else that it does."""
    with tempfile.TemporaryDirectory() as folder:
        file, records = Path(folder) / "locustfile.py", Path(folder) / "records"
        file.write_text(LOCUSTFILE)
        command = [sys.executable, "-m", "locust", "-f", str(file), "--headless", "--host", server.url]
        command += ["--rate", str(STARTS_PER_S), "--arrivals", "constant", "-t", f"{seconds:g}s"]
        subprocess.run([*command, "--records", str(records)], cwd=ROOT, capture_output=True, timeout=seconds + 90)
        return delay_p99_ms(read_records(records).results)


def delay_p99_ms(results: Sequence[Result]) -> float:
    sent = [result for result in results if result.sent_ns]
    return float(np.quantile([(result.sent_ns - result.due_ns) / 1e6 for result in sent], 0.99))


def loop_times(server: TimetableServer) -> Times:
    """A closed loop of USERS, equal to that of perf_analyzer."""
    pool, results, stop_s = ReaderPool(server.url), [], time.monotonic() + LOOP_S

    def user() -> None:
        while time.monotonic() < stop_s:
            request = Request("loop", "x", f"Speaker 1: {LOOP_WORDS}", (0,), LOOP_FRAMES, due_ns=time.monotonic_ns())
            results.append(pool.submit(request, "closed").wait(60))

    users = [threading.Thread(target=user) for _ in range(USERS)]
    for one in users:
        one.start()
    for one in users:
        one.join()
    pool.close()
    times = np.array([result.chunks.received_ns[[0, -1]] - result.sent_ns for result in results]) / 1e6
    return Times(*(float(mean) for mean in times.mean(axis=0)), len(results))


def loop_inputs() -> dict:
    one = {name: [value] for name, value in ((wire.FRAMES, LOOP_FRAMES), (wire.CHUNK_FRAMES, 1), (wire.SEED, 0))}
    one |= {wire.START_FRAME: [0], wire.GUIDANCE_SCALE: [1.3], wire.DIFFUSION_STEPS: [10]}
    one |= {wire.UNTIL_END: [False], wire.KEEP: [False]}
    any_length = {name: {"content": [0], "shape": [1]} for name in (wire.SPEAKER_IDS, wire.SAY, wire.CARRY)}
    return {wire.TEXT_INPUT: [f"Speaker 1: {LOOP_WORDS}"], **one, **any_length}


def sleep_until(at_ns: int) -> None:
    time.sleep(max(0.0, (at_ns - time.monotonic_ns()) / 1e9))


class Patience:
    """Measures while other work on the machine rests, within a budget of waiting time.

    ``others_cores``: the most that others used during a measurement that counts.
    """

    def __init__(self, left_s: float):
        self.left_s, self.others_cores = left_s, 0.0

    def measured(self, once: Callable[[], object]):
        """The result of ``once``, started when the machine is quiet, and repeated if it did not stay quiet."""
        while True:
            self._wait()
            began_s, others_s = time.monotonic(), _others_cpu_s()
            result = once()
            took_s = time.monotonic() - began_s
            others_cores = (_others_cpu_s() - others_s) / took_s
            if others_cores < QUIET_CORES or self.left_s <= 0:
                self.others_cores = max(self.others_cores, others_cores)
                return result
            self.left_s -= took_s

    def _wait(self) -> None:
        while self.left_s > 0 and psutil.cpu_percent(1.0) / 100 * psutil.cpu_count() > QUIET_CORES:
            self.left_s -= 1


def _others_cpu_s() -> float:
    """CPU seconds used so far on this machine by all other processes."""
    times = psutil.cpu_times()
    own = sum(os.times()[:4])
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            own += sum(child.cpu_times())
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice - own
