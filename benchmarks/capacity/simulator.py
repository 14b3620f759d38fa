"""The pool simulator: speed in sessions/s beside Ciw and SimPy, on one core; closed forms; and a week of traffic.

Ciw and SimPy come with `pip install '.[bench]'`. All simulators generate their traffic within the measured time; the
best of three runs counts. The week: mixed traffic with its daily cycle, KV memory, a bounded queue and failures.
"""

from __future__ import annotations

import importlib.util
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import closed_forms
import common
import numpy as np
from testbed import queueing

from harness.capacity.simulator.engine import Counting
from harness.capacity.simulator.fleet import simulate_pool
from harness.capacity.simulator.pool import Pool, random_failures
from harness.capacity.simulator.results import Estimate, PoolResult
from harness.capacity.simulator.traffic import DAY_S, Demand, Varying
from harness.errors import InputError
from harness.traffic.mix import Lengths, Mix, TrafficClass

RUNS = 3
ALLOWED_ERROR = 0.02
WEEK_S, ALLOWED_WEEK_S = 7 * DAY_S, 60.0
MIX = Mix(
    "week",
    (
        TrafficClass("short", 0.80, Lengths.parse({"lognormal": {"median": 20, "sigma": 0.7, "max": 120}})),
        TrafficClass("podcast", 0.17, Lengths.parse({"lognormal": {"median": 600, "sigma": 0.6, "max": 3600}})),
        TrafficClass("ninety minutes", 0.03, Lengths.parse({"fixed": 5400})),
    ),
)
LIMITS = {each.name: {"ttfa_s": 2.0, "rtf": 0.9, "stall_s": 0.1} for each in MIX.classes}


@dataclass(frozen=True)
class Work:
    """The task of all three simulators: a name, the theoretical figure, and by simulator a run of n customers."""

    name: str
    expected: float
    runs: dict[str, Callable[[int, int], float]]


def works() -> list[Work]:
    """M/M/10 at load 0.8, and M/M/1 with processor sharing at load 0.6. Raises InputError without the others."""
    missing = [name for name in ("ciw", "simpy") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{' and '.join(missing)} to compare with: pip install '.[bench]'")
    import other_simulators as others

    servers, sharing = Pool(10, closed_forms.constant, session_limit=1), Pool(1, closed_forms.shared)

    def wait_s(customers: int, seed: int) -> float:
        return _class(_served(servers, 8.0, customers, seed)).wait_s.mean

    def stay_s(customers: int, seed: int) -> float:
        return _class(_served(sharing, 0.6, customers, seed)).stay_s.mean

    return [
        Work(
            "M/M/10, mean wait",
            queueing.mean_wait_s(10, 8.0, 1.0),
            {
                "this": wait_s,
                "Ciw": lambda customers, seed: others.ciw_servers(10, 8.0, customers, seed),
                "SimPy": lambda customers, seed: others.simpy_servers(10, 8.0, customers, seed),
            },
        ),
        Work(
            "processor sharing, mean stay",
            queueing.sharing_stay_s(1.0, 0.6),
            {
                "this": stay_s,
                "Ciw": lambda customers, seed: others.ciw_sharing(0.6, customers, seed),
                "SimPy": lambda customers, seed: others.simpy_sharing(0.6, customers, seed),
            },
        ),
    ]


def _served(pool: Pool, rate_per_s: float, sessions: int, seed: int) -> PoolResult:
    return closed_forms.serve(pool, rate_per_s, closed_forms.exponential, sessions, np.random.default_rng(seed))


def _class(result: PoolResult):
    return result.classes[closed_forms.CLASS]


def speeds(sessions: int, customers: int) -> tuple[list, dict]:
    """Rows of the table, and customers a second [work, simulator]."""
    rows, rates = [], {}
    for work in works():
        for name, once in work.runs.items():
            count = sessions if name == "this" else customers
            common.say(f"{work.name}: {name}, {RUNS} x {count:,} …")
            times_s, values = zip(*(timed(once, count, seed) for seed in range(RUNS)), strict=True)
            rate, error = count / min(times_s), float(np.mean(values)) / work.expected - 1
            rates[work.name, name] = rate
            rows.append((work.name, name, f"{count:,}", f"{rate:,.0f}", f"{error:+.1%}"))
    return rows, rates


def timed(once: Callable[[int, int], float], count: int, seed: int) -> tuple[float, float]:
    began = time.perf_counter()
    value = once(count, seed)
    return time.perf_counter() - began, value


def errors(sessions: int, replications: int, seed: int) -> list[tuple[closed_forms.Form, Estimate]]:
    """Every closed form with the relative error of the simulated figure, and its confidence interval."""
    found = []
    for number, form in enumerate(closed_forms.forms()):
        common.say(f"{form.name}: {replications} x {sessions:,} …")
        seeds = np.random.SeedSequence([seed, number]).spawn(replications)
        values = [form.simulated(sessions, np.random.default_rng(seed)) / form.expected - 1 for seed in seeds]
        found.append((form, Estimate.of(float(np.mean(values)), values)))
    return found


def week(seconds: float, rate_per_s: float, devices: int, seed: int) -> tuple[float, PoolResult]:
    """Seconds taken, and the result: 60 ms + 2 ms per session and 0.1 µs per token; 120 GB for KV caches per device."""
    rng = np.random.default_rng(seed)
    windows = max(int(seconds // 3600), 1)
    batches = windows // 24 if windows % 24 == 0 else 1
    counting = Counting(tuple(each.name for each in MIX.classes), seconds, 0.0, windows, batches, LIMITS)
    began = time.perf_counter()
    pool = Pool(
        devices,
        lambda n: 0.06 + 0.002 * n,
        token_s=1e-7,
        session_limit=64,
        memory_bytes=120e9,
        queue_limit=1000,
        patience_s=30.0,
        on_failure="resume",
        planned=random_failures(devices, seconds, 30 * DAY_S, 3600.0, rng),
    )
    demand = Demand(MIX, Varying.diurnal(rate_per_s, 0.6), prefill_s_per_token=2e-5)
    result = simulate_pool(pool, demand, counting, rng, found=int(rate_per_s * 150))
    return time.perf_counter() - began, result


def show_speeds(rows: Sequence[tuple]):
    table = common.table("Customers a second on one core", "work", "simulator", "customers", "a second", "error")
    for row in rows:
        table.add_row(*row)
    return table


def show_errors(found: Sequence[tuple[closed_forms.Form, Estimate]], sessions: int, replications: int):
    title = f"Closed forms, {replications} x {sessions:,} sessions each"
    table = common.table(title, "figure", "theory", "error", "95% interval of the error")
    for form, error in found:
        interval = f"{error.low:+.2%} to {error.high:+.2%}"
        table.add_row(form.name, f"{form.expected:.5g}", f"{error.value:+.2%}", interval)
    return table


def show_week(result: PoolResult, took_s: float, seconds: float, devices: int):
    columns = ("class", "sessions", "busy", "first audio p95, s", "RTF p95", "stalled", "good a second", "95% interval")
    title = f"{seconds / DAY_S:.3g} days over {devices:,} devices in {took_s:.1f} s"
    title += f"; {result.sessions.max():,.0f} sessions at the busiest, devices in use {result.utilisation:.0%} of time"
    table = common.table(title, *columns)
    for name, each in result.classes.items():
        good, stalled = each.goodput_per_s(), each.stall_s.share_above(0.0)
        table.add_row(
            name,
            f"{each.arrived.sum():,}",
            f"{each.busy_share():.2%}",
            f"{each.ttfa_s.quantile(0.95):.3f}",
            f"{each.rtf.quantile(0.95):.3f}",
            f"{stalled:.2%}",
            f"{good.value:.3f}",
            f"{good.low:.3f} to {good.high:.3f}",
        )
    return table


def main(arguments: Sequence[str]) -> int:
    parser = common.Parser(__doc__, "python benchmarks/capacity/simulator.py --sessions 4000000 --rate 20")
    parser.add_argument("--sessions", type=common.whole(1000, 10**9), default=2_000_000, help="of a run for speed")
    parser.add_argument("--customers", type=common.whole(100, 10**7), default=50_000, help="of one of Ciw and SimPy")
    parser.add_argument("--replications", type=common.whole(2, 1000), default=48, help="of a closed form")
    parser.add_argument("--rate", type=common.real(0.1, 1000), default=10.0, help="requests a second of the week")
    parser.add_argument("--devices", type=common.whole(1, 10**5), default=1000, help="GPUs of the week")
    parser.add_argument("--seed", type=common.whole(0, 10**9), default=1)
    options = parser.parse_args(arguments)
    sessions, customers, replications = options.sessions, options.customers, options.replications
    seconds, each = (3600.0, 20_000) if options.quick else (WEEK_S, 500_000)
    if options.quick:
        sessions, customers, replications = 200_000, 5_000, 2
    compile_s = timed(lambda *_: _served(Pool(1, closed_forms.shared), 0.5, 1000, 0), 0, 0)[0]
    rows, rates = speeds(sessions, customers)
    found = errors(each, replications, options.seed)
    took_s, result = week(seconds, options.rate, options.devices, options.seed)
    names = sorted({name for name, _ in rates})
    figures = {
        "sessions_per_s": min(rates[name, "this"] for name in names),
        "ratio_to_ciw": min(rates[name, "this"] / rates[name, "Ciw"] for name in names),
        "ratio_to_simpy": min(rates[name, "this"] / rates[name, "SimPy"] for name in names),
        "closed_form_error_max": max(abs(error.value) for _, error in found),
        "closed_form_chance_max": max(error.high - error.value for _, error in found),
        "closed_forms": len(found),
        "week_s": took_s,
        "week_sessions": sum(int(one.arrived.sum()) for one in result.classes.values()),
        "week_devices": options.devices,
        "memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "load_or_compile_s": compile_s,
    }
    tables = [show_speeds(rows), show_errors(found, each, replications)]
    common.finish([*tables, show_week(result, took_s, seconds, options.devices)], figures)
    fine = figures["closed_form_error_max"] <= ALLOWED_ERROR and figures["sessions_per_s"] >= 1e6
    return 0 if options.quick or (fine and took_s <= ALLOWED_WEEK_S) else common.EXIT_FAILED


if __name__ == "__main__":
    common.run(main)
