"""Do arrivals follow the configured process? Tests every process, split over 1, 2 and 4 workers.

Gaps are tested in the process's own time, in which they are gamma gaps of mean 1 (stages by the time-rescaling theorem;
Brown, Barbieri, Ventura, Kass and Frank 2002). Constant arrivals and traces are deterministic: they, and every union of
shares, are compared time by time with the process itself. ``--live`` sends real requests, with Locust and this many
workers, to the tests' timetable server; the delivered time is then the reader's time of sending.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
from scipy import stats

from harness.deploy.ports import free_ports
from harness.drive.generator import LoadSettings, arrival_times
from harness.drive.load import Load
from harness.errors import HarnessError
from harness.records.load_log import read_records
from harness.records.metrics import LATE_SEND_S
from harness.traffic.arrivals import Arrivals, Trace, parse_stages
from harness.traffic.mix import MIXES

ROOT = Path(__file__).resolve().parents[2]
WORKERS = (1, 2, 4)
IMPROBABLE = 1e-3  # p-value; by chance one in about 50 runs of this script falls below
WINDOW_ARRIVALS = 25  # mean arrivals in a window whose counts are compared
SCENARIO = """
from harness.scenario import Lengths, Mix, SpeechUser, TrafficClass


class Caller(SpeechUser):
    mix = Mix("one", (TrafficClass("short", 1.0, Lengths.parse({"fixed": 0.4})),))
"""


@dataclass(frozen=True)
class Case:
    """A process with its name, and its options for Locust."""

    name: str
    arrivals: Arrivals
    options: tuple[str, ...]


@dataclass(frozen=True)
class Fit:
    """Delivered times compared with a process; NaN where a figure does not apply."""

    arrivals: int
    rate_error: float  # relative, of the number of arrivals up to the last
    ks_distance: float
    ks_p_value: float
    dispersion: float
    largest_error_s: float  # of any arrival, against the process itself


def cases(rate_per_s: float, trace: str | None) -> list[Case]:
    plan = f"20s@{rate_per_s / 2:g},20s@{rate_per_s / 2:g}..{2 * rate_per_s:g},5s@0,10s@{rate_per_s:g}"
    rate = ("--rate", f"{rate_per_s:g}")
    found = [
        Case("constant", Arrivals("constant", rate_per_s), (*rate, "--arrivals", "constant")),
        Case("poisson", Arrivals("poisson", rate_per_s), rate),
        Case("gamma 0.25", Arrivals("gamma", rate_per_s, 0.25), (*rate, "--burstiness", "0.25")),
        Case("gamma 4", Arrivals("gamma", rate_per_s, 4.0), (*rate, "--burstiness", "4")),
        Case("stages", Arrivals("stages", stages=parse_stages(plan)), ("--stages", plan)),
    ]
    if trace:
        replayed = Arrivals("trace", rate_per_s, trace=Trace.read(trace), repeat=True)
        found.append(Case("trace", replayed, (*rate, "--trace", trace, "--trace-repeat")))
    return found


def own_time(process: Arrivals, times_s: np.ndarray) -> np.ndarray:
    """Times transformed so that the process has one arrival per unit on average."""
    if process.kind == "stages":
        return np.array([process.expected(time_s) for time_s in times_s])
    return times_s * process.rate_per_s


def kolmogorov_smirnov(process: Arrivals, units: np.ndarray, blur: float) -> tuple[float, float]:
    """Distance and p-value of gaps in the process's own time against gamma gaps of mean 1.

    Distances below ``blur``, the error of a gap, are ignored, since times cannot resolve them (the p-value is then an
    upper bound).
    """
    gaps = np.sort(np.diff(units))
    expected = stats.gamma.cdf(gaps, 1 / process.burstiness, scale=process.burstiness)
    ranks = np.arange(1, len(gaps) + 1) / len(gaps)
    told = gaps >= blur
    apart = np.maximum(np.abs(ranks - expected), np.abs(ranks - 1 / len(gaps) - expected))[told]
    distance = float(apart.max(initial=0.0))
    return distance, float(stats.kstwo.sf(distance, len(gaps)))


def fit(process: Arrivals, delivered_s: np.ndarray, exact_s: Sequence[float], blur_s: float = 0.0) -> Fit:
    """``exact_s``: the process with the same seed on one worker; ``blur_s``: the error of a gap, in seconds."""
    count = len(delivered_s)
    errors_s = np.abs(delivered_s - np.asarray(exact_s[:count]))
    units = own_time(process, delivered_s)
    distance, p_value = np.nan, np.nan
    if process.kind not in ("constant", "trace"):
        highest = max((max(stage[1:]) for stage in process.stages), default=process.rate_per_s)
        distance, p_value = kolmogorov_smirnov(process, units, blur_s * highest)
    counts = np.histogram(units, np.arange(0, units[-1], WINDOW_ARRIVALS))[0]
    dispersion = counts.var() / counts.mean() if len(counts) > 3 else np.nan
    first = process.kind == "trace"  # its first arrival is at 0, those of others one gap later
    rate_error = (count - first) / process.expected(float(delivered_s[-1])) - 1
    return Fit(count, rate_error, distance, p_value, float(dispersion), float(errors_s.max()))


def generated(case: Case, workers: int, count: int, seed: int) -> Fit:
    """The union of the workers' shares from the generator functions, without waiting."""
    settings = LoadSettings(MIXES["quick"], Load(arrivals=case.arrivals, seed=seed))
    exact_s = list(itertools.islice(arrival_times(settings), count))
    shares = (arrival_times(settings, index, workers) for index in range(workers))
    union = sorted(itertools.chain(*(itertools.islice(share, count // workers) for share in shares)))
    return fit(case.arrivals, np.array(union), exact_s)


def live(case: Case, workers: int, seconds: int, seed: int, url: str, folder: Path) -> Fit:
    """The times at which Locust's workers sent. Raises HarnessError where it wrote no records."""
    (folder / "scenario.py").write_text(SCENARIO)
    records = folder / f"{case.name.replace(' ', '-')}-{workers}"
    command = [sys.executable, "-m", "locust", "-f", str(folder / "scenario.py"), "--headless", "--only-summary"]
    command += ["--host", url, "-t", f"{seconds + 3}s", "--stop-timeout", "2", "--seed", str(seed), *case.options]
    command += ["--records", str(records)]
    if workers > 1:
        port = str(free_ports(1)[0])
        command += ["--processes", str(workers), "--master-bind-port", port, "--master-port", port]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + 90)
    try:
        kept = read_records(records)
    except HarnessError as error:
        raise HarnessError(f"{error}\n{done.stdout[-500:]}{done.stderr[-1500:]}") from None
    sent_s = np.sort([(each.sent_ns - kept.end.origin_ns) / 1e9 for each in kept.results if each.sent_ns])
    settings = LoadSettings(MIXES["quick"], Load(arrivals=case.arrivals, seed=seed))
    return fit(case.arrivals, sent_s, list(itertools.islice(arrival_times(settings), len(sent_s))), LATE_SEND_S)


def lines(fits: dict[tuple[str, int], Fit]) -> Iterator[tuple[str, ...]]:
    def figure(value: float, words: str) -> str:
        return "-" if np.isnan(value) else words.format(value)

    for (name, workers), one in fits.items():
        yield (
            name,
            str(workers),
            str(one.arrivals),
            f"{one.rate_error:+.2%}",
            figure(one.ks_distance, "{:.4f}"),
            figure(one.ks_p_value, "{:.3f}"),
            figure(one.dispersion, "{:.2f}"),
            f"{one.largest_error_s * 1e3:.3f}",
        )


def shown(title: str, fits: dict[tuple[str, int], Fit]):
    columns = ("process", "workers", "arrivals", "rate error", "KS distance", "p", "dispersion", "largest error, ms")
    table = common.table(title, *columns)
    for line in lines(fits):
        table.add_row(*line)
    return table


def figures(prefix: str, fits: dict[tuple[str, int], Fit]) -> dict:
    exact = [each for (name, _), each in fits.items() if name in ("constant", "trace")]
    random = [each for each in fits.values() if not np.isnan(each.ks_p_value)]
    return {
        f"{prefix}ks_p_min": min(each.ks_p_value for each in random),
        f"{prefix}ks_distance_max": max(each.ks_distance for each in random),
        f"{prefix}rate_error_max_constant": max(abs(fits["constant", workers].rate_error) for workers in WORKERS),
        f"{prefix}largest_error_ms": max(each.largest_error_s for each in fits.values()) * 1e3,
        f"{prefix}largest_error_ms_constant_and_trace": max(each.largest_error_s for each in exact) * 1e3,
        f"{prefix}dispersion": {f"{name} x{workers}": one.dispersion for (name, workers), one in fits.items()},
    }


def main(arguments: Sequence[str]) -> int:
    parser = common.Parser(__doc__, "python benchmarks/load/arrivals.py --trace day.csv --live 20")
    parser.add_argument("--rate", type=common.real(0.1, 1000), default=20.0, help="requests per second")
    parser.add_argument("--arrivals", type=common.whole(500, 10**6), default=40_000, help="arrivals of each process")
    parser.add_argument("--trace", help="a CSV file of arrival times to replay as well")
    parser.add_argument("--seed", type=common.whole(0, 10**9), default=1)
    parser.add_argument(
        "--live",
        type=common.whole(3, 3600),
        metavar="SECONDS",
        help="also run each process through Locust for this long",
    )
    options = parser.parse_args(arguments)
    count = 2000 if options.quick else options.arrivals
    pairs = [(case, workers) for case in cases(options.rate, options.trace) for workers in WORKERS]
    fits = {(case.name, workers): generated(case, workers, count, options.seed) for case, workers in pairs}
    tables, result = [shown("Arrivals as generated", fits)], figures("", fits)
    if options.live:
        sent = measured(pairs, options.live, options.seed)
        tables.append(shown(f"Arrivals as sent by Locust, {options.live} s each", sent))
        result |= figures("live_", sent)
    common.finish(tables, {"rate_per_s": options.rate, "seed": options.seed, **result})
    fine = result["ks_p_min"] > IMPROBABLE and result["largest_error_ms"] == 0
    return 0 if fine and result.get("live_ks_p_min", 1.0) > IMPROBABLE else common.EXIT_FAILED


def measured(pairs: Sequence[tuple[Case, int]], seconds: int, seed: int) -> dict[tuple[str, int], Fit]:
    """Every case through Locust, against the tests' server."""
    server = [sys.executable, str(ROOT / "tests" / "fake_triton.py"), "--interval", "0.001", "--first", "0.01"]
    fits = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(server, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process,
    ):
        try:
            url = process.stdout.readline().strip()
            for case, workers in pairs:
                common.say(f"{case.name} with {workers} workers for {seconds} s …")
                fits[case.name, workers] = live(case, workers, seconds, seed, url, Path(folder))
        finally:
            process.terminate()
    return fits


if __name__ == "__main__":
    common.run(main)
