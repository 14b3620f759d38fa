"""How well the load generator measures, and what it costs, against a Triton with a timetable (tests/timetable).

lateness    chunks of 100 streams, 7.5/s each: received minus the server's own timestamp
streams     a rung is held if lateness p99 is under 10 ms and 99% of the timetable's chunks arrived within the window
schedule    50 starts/s through Locust, and through a ReaderPool alone: sent minus due
others      tritonclient under gevent, same streams; perf_analyzer, same closed loop: mean times to a stream's chunks
--floor     instead: CPU cost of a message, layer by layer, with gRPC's default polling and with the readers'

Every figure is a median of three. A measurement starts when the machine is quiet, and is repeated if others used
more than 0.2 cores meanwhile, until --patience is spent; "others_cores" is the most that they used in one that counts.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import floor
from other_clients import PerfAnalyzer, Times, gevent_lateness, perf_analyzer
from rich.table import Table
from streams import (
    LOOP_FRAMES,
    USERS,
    Held,
    Patience,
    hold,
    locust_delay_p99_ms,
    loop_inputs,
    loop_times,
    pool_delay_p99_ms,
)
from testbed import TimetableServer

from harness import wire
from harness.errors import ServerError

TIMETABLE = f"first=0.1 every={wire.SECONDS_PER_FRAME}"
LADDER = (100, 250, 500, 750, 1000, 1250, 1500)


class Bench:
    """One server and how it is measured: how often, for how long, and with what patience."""

    def __init__(self, server: TimetableServer, quick: bool, patience_s: float):
        self.server, self.quick = server, quick
        self.times, self.seconds = (1, 3.0) if quick else (3, 8.0)
        self.patience = Patience(0 if quick else patience_s)

    def repeat(self, what: str, once: Callable[[], object]) -> list:
        common.say(f"{what} …")
        return [self.patience.measured(once) for _ in range(self.times)]

    def hold(self, streams: int) -> Held:
        """The median of each figure separately."""
        several = self.repeat(f"{streams} streams", lambda: hold(self.server, streams, self.seconds))
        return Held(**{name: statistics.median(getattr(one, name) for one in several) for name in vars(several[0])})

    def climb(self) -> list[Held]:
        """Rungs up to and including the first that is not held."""
        rungs: list[Held] = []
        for streams in LADDER[:1] if self.quick else LADDER:
            rungs.append(self.hold(streams))
            if not rungs[-1].is_held:
                break
        return rungs

    def delays_ms(self) -> tuple[float, float]:
        """Schedule delay p99 through Locust, and through a ReaderPool alone."""
        through_locust = self.repeat("Locust, 50 starts/s", lambda: locust_delay_p99_ms(self.server, self.seconds))
        alone = self.repeat("ReaderPool, 50 starts/s", lambda: pool_delay_p99_ms(self.server, self.seconds))
        return statistics.median(through_locust), statistics.median(alone)

    def gevent(self) -> dict[str, float]:
        once = lambda: gevent_lateness(self.server.url, LADDER[0], self.seconds)  # noqa: E731
        several = self.repeat("tritonclient under gevent", once)
        return {name: statistics.median(one[name] for one in several) for name in several[0]}

    def loops(self, tool: PerfAnalyzer) -> list[tuple[Times, Times]]:
        """Our closed loop and perf_analyzer's, in turn."""
        theirs = lambda: tool.times(self.server.url, loop_inputs(), USERS, LOOP_FRAMES)  # noqa: E731
        return self.repeat("perf_analyzer", lambda: (loop_times(self.server), theirs()))


def measure(bench: Bench, options) -> tuple[list[Table], dict]:
    rungs = bench.climb()
    through_locust, alone = bench.delays_ms()
    gevent = bench.gevent()
    first = rungs[0]
    table = common.table("Beside", "", "this instrument", "other", "ratio")
    for name, ours, other, unit in (
        ("chunk lateness p99 at 100 streams; tritonclient under gevent", first.p99_ms, gevent["p99_ms"], "ms"),
        ("CPU per 1,000 chunks; tritonclient under gevent", first.reader_s_per_1000, gevent["cpu_s_per_1000"], "s"),
        ("schedule delay p99 at 50 starts/s; a ReaderPool without Locust", through_locust, alone, "ms"),
    ):
        table.add_row(name, f"{ours:.3f} {unit}", f"{other:.3f} {unit}", f"{other / ours:.1f}")
    figures = {
        "lateness_p50_ms_100_streams": first.p50_ms,
        "lateness_p99_ms_100_streams": first.p99_ms,
        "streams_under_10_ms": max((rung.streams for rung in rungs if rung.is_held), default=0),
        "schedule_delay_p99_ms": through_locust,
        "schedule_delay_p99_ms_pool": alone,
        "reader_cpu_s_per_1000_chunks": first.reader_s_per_1000,
        "gevent": gevent,
        "gevent_lateness_ratio": gevent["p99_ms"] / first.p99_ms,
    }
    shown, agreement = beside_perf_analyzer(bench)
    tables = [rungs_table(rungs), table, *shown]
    return tables, {**figures, **agreement, "rungs": [vars(rung) for rung in rungs]}


def beside_perf_analyzer(bench: Bench) -> tuple[list[Table], dict]:
    """The same closed loop with both tools; if perf_analyzer cannot run, the reason is the result."""
    try:
        with perf_analyzer() as tool:
            pairs = bench.loops(tool)
    except ServerError as error:
        return [], {"perf_analyzer_difference": None, "perf_analyzer_missing": str(error)}
    columns = "", "this instrument", "perf_analyzer", "difference"
    table, worst = common.table(f"Closed loop of {USERS}: mean time to", *columns), 0.0
    for name, label in (("first_ms", "first chunk"), ("last_ms", f"chunk {LOOP_FRAMES}")):
        ours, theirs = (statistics.median(getattr(pair[side], name) for pair in pairs) for side in (0, 1))
        table.add_row(label, f"{ours:.2f} ms", f"{theirs:.2f} ms", f"{ours / theirs - 1:+.2%}")
        worst = max(worst, abs(ours / theirs - 1))
    return [table], {"perf_analyzer_difference": worst}


def rungs_table(rungs: Sequence[Held]) -> Table:
    columns = ("streams", "lateness p50", "p99", "chunks", "reader CPU/1000", "reader", "server", "held")
    table = common.table("Streams on one reader process, 7.5 chunks a second each", *columns)
    for rung in rungs:
        lateness = f"{rung.p50_ms:.2f} ms", f"{rung.p99_ms:.2f} ms"
        cores = (f"{cores:.2f} cores" for cores in (rung.reader_cores, rung.server_cores))
        cost, held = f"{rung.reader_s_per_1000:.3f} s", "yes" if rung.is_held else "no"
        table.add_row(str(round(rung.streams)), *lateness, f"{rung.complete:.1%}", cost, *cores, held)
    return table


def find_floor(bench: Bench, options) -> tuple[list[Table], dict]:
    streams, seconds = options.streams, 2.0 if bench.quick else 5.0

    def cost(layer: str, polling: str = floor.POLLING) -> float:
        once = lambda: floor.cost_us(layer, bench.server.url, streams, seconds, polling)  # noqa: E731
        return statistics.median(bench.repeat(layer, once))

    costs = {layer: (cost(layer, "") if layer in floor.GRPC_LAYERS else None, cost(layer)) for layer in floor.LAYERS}
    costs["reader"] = None, bench.hold(streams).reader_s_per_1000 * 1000
    columns = "layer", "gRPC's default polling", "the readers' polling"
    table = common.table(f"Processor time per message, {streams} streams of 7.5 a second", *columns)
    for layer, values in costs.items():
        table.add_row(layer, *("" if value is None else f"{value:.0f} µs" for value in values))
    return [table], {"streams": streams, "floor_us": {layer: list(values) for layer, values in costs.items()}}


def parser() -> common.Parser:
    made = common.Parser(__doc__, "python benchmarks/load/instrument.py --patience 300")
    made.add_argument("--floor", action="store_true", help="only measure the cost of a message, layer by layer")
    made.add_argument("--streams", type=common.whole(1, 1000), default=300, help="of --floor (default 300)")
    patience = common.real(0, 36_000)
    made.add_argument("--patience", type=patience, default=120, metavar="S", help="seconds to wait for quiet (120)")
    return made


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_args(arguments)
    with TimetableServer(TIMETABLE) as server:
        bench = Bench(server, options.quick, options.patience)
        tables, figures = (find_floor if options.floor else measure)(bench, options)
    common.finish(tables, {**figures, "others_cores": bench.patience.others_cores})


if __name__ == "__main__":
    common.run(main)
