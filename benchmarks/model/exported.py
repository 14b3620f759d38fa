"""What the metrics cost that a server exports itself: time of a frame, and of a scrape.

Beside the real servers of both topologies under closed-loop streams: how long an update takes in this process, for
several numbers of open sessions, without the calls to the server.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

from harness import wire  # noqa: E402
from harness.client.stream import SpeechClient  # noqa: E402
from harness.deploy.server import TritonServer  # noqa: E402
from harness.errors import ServerError  # noqa: E402
from harness.records.schema import Outcome, Result  # noqa: E402
from harness.server_metrics import EXPORT_SECONDS, FRAMES  # noqa: E402
from harness.vibevoice.entry.tally import Tally  # noqa: E402
from harness.vibevoice.process.exporter import EVERY_S, Exporter  # noqa: E402
from harness.vibevoice.sessions.admission import AdmissionQueue  # noqa: E402

OPEN = (1, 64, 512)  # sessions of an update in this process
UPDATES, SCRAPES = 200, 20


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    frames = 15 if options.quick else options.frames
    rows = {topology: measured(topology, options.streams, frames) for topology in wire.TOPOLOGIES}
    updates = {count: update_us(count) for count in OPEN}
    common.finish([served_table(rows, options.streams), update_table(updates)], figures(rows, updates))
    return 0


def parser() -> common.Parser:
    made = common.Parser(__doc__, "python benchmarks/model/exported.py --streams 8 --frames 300")
    made.add_argument("--streams", type=common.whole(1, 200), default=8, help="at once")
    made.add_argument("--frames", type=common.whole(10, 40_500), default=300, help="of each stream")
    return made


def measured(topology: str, streams: int, frames: int) -> dict[str, float]:
    """Costs at a real server, by its own metrics and the CPU time of its processes."""
    with common.served(topology=topology) as server:
        asyncio.run(speak(server, streams, 10))
        time.sleep(2 * EVERY_S)
        before, cpu_before = common.page(server.metrics_url), sum(common.cpu_seconds(server).values())
        common.say(f"{topology}: {streams} streams of {frames} frames …")
        results = asyncio.run(speak(server, streams, frames))
        heard = sum(int(one.chunks.samples.sum()) for one in results) // wire.SAMPLES_PER_FRAME
        time.sleep(2 * EVERY_S)
        after, cpu_s = common.page(server.metrics_url), sum(common.cpu_seconds(server).values()) - cpu_before
        exported_s = after[EXPORT_SECONDS.name] - before[EXPORT_SECONDS.name]
        counted = after[FRAMES.name] - before[FRAMES.name]
        return {
            "us_per_frame": 1e6 * exported_s / counted,
            "share_of_cpu": exported_s / cpu_s,
            "frames_not_counted": heard - counted,
            "scrape_ms": statistics.median(scrape_ms(server) for _ in range(SCRAPES)),
        }


async def speak(server: TritonServer, streams: int, frames: int) -> list[Result]:
    async with SpeechClient(server.url) as client:
        requests = [common.request("m", frames, seed=seed) for seed in range(streams)]
        results = await asyncio.gather(*(client.speak(one, "closed") for one in requests))
    if wrong := [one.error for one in results if one.outcome is not Outcome.DONE]:
        raise ServerError(f"a stream failed: {wrong[0]}")
    return results


def scrape_ms(server: TritonServer) -> float:
    began = time.perf_counter()
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
        answer.read()
    return 1e3 * (time.perf_counter() - began)


class Stream:
    frames = 0


def update_us(sessions: int) -> float:
    """Median microseconds of an update of the entry with so many open sessions, all of which sent frames."""
    tally = Tally(AdmissionQueue(sessions, 0, 0.0), (wire.ENTRY, "benchmark"))
    streams = [Stream() for _ in range(sessions)]
    for stream in streams:
        tally.begin(stream)
    nothing = SimpleNamespace(set=lambda _: None, increment=lambda _: None, observe=lambda _: None)
    exporter = Exporter([tally.readings], lambda metric: SimpleNamespace(Metric=lambda **_: nothing))
    taken = []
    for _ in range(UPDATES):
        for stream in streams:
            stream.frames += 1
        began = time.perf_counter()
        exporter.update()
        taken.append(1e6 * (time.perf_counter() - began))
    return statistics.median(taken)


def served_table(rows: dict[str, dict[str, float]], streams: int) -> Table:
    columns = "topology", "µs per frame", "of all CPU time", "frames not counted", "scrape, ms"
    shown = common.table(
        f"What the server's own metrics cost at {streams} streams, an update each {EVERY_S:g} s", *columns
    )
    for topology, row in rows.items():
        cost, share = f"{row['us_per_frame']:.1f}", f"{100 * row['share_of_cpu']:.3f}%"
        shown.add_row(topology, cost, share, f"{row['frames_not_counted']:.0f}", f"{row['scrape_ms']:.1f}")
    return shown


def update_table(updates: dict[int, float]) -> Table:
    shown = common.table("An update of the entry, without calls to the server", "open sessions", "µs")
    for count, taken in updates.items():
        shown.add_row(str(count), f"{taken:.0f}")
    return shown


def figures(rows: dict[str, dict[str, float]], updates: dict[int, float]) -> dict[str, float]:
    served = {f"{topology}_{name}": value for topology, row in rows.items() for name, value in row.items()}
    return served | {f"update_us_{count}": taken for count, taken in updates.items()}


if __name__ == "__main__":
    common.run(main)
