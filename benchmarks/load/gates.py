"""How often the certificate calls a steady run INVALID, and how often it detects a fault: simulated and real runs.

A server of 16 slots steps all its sessions together, in a + b x (sessions) seconds with noise of each step and of the
host; a request without a free slot waits. The harness generates the arrivals and judges the records. ``load`` is
the share of the frames/s possible with all slots in use. Every steady run that is INVALID is a false alarm. A run
with a fault is testable if its gate found it or passed; if the gate reports that it cannot tell, the fault was
neither found nor missed.

``--real`` runs Locust against the tests' timetable server, in an open loop of this many seconds.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numba
import numpy as np
from scipy.stats import binomtest
from testbed import TimetableServer

from harness import wire
from harness.drive.certificate import certificate_of, window_start_ns
from harness.drive.generator import LoadSettings, arrival_times, lead_in
from harness.drive.load import Load
from harness.drive.observed import ReaderTotals
from harness.drive.recorder import Recorder
from harness.drive.validity import Certificate
from harness.errors import HarnessError
from harness.host.places import ROOT
from harness.records import metrics
from harness.records.schema import Chunks, Outcome, Result
from harness.traffic.arrivals import Arrivals
from harness.traffic.mix import Draw, Lengths, Mix, TrafficClass

SLOTS = 16
STEP_S, STEP_PER_SESSION_S = 0.030, 0.006  # 16 sessions: 126 ms per frame, just in time for speech
STEP_NOISE, HOST_NOISE, HOST_MEMORY_S = 0.08, 0.03, 5.0
OPENING_S, OPENING_SPREAD = 0.08, 0.3
LATE_S = 0.0004  # mean of sent - due, and of received - sent_at
MAX_FRAMES_PER_S = SLOTS / (STEP_S + STEP_PER_SESSION_S * SLOTS)
FALSE_ALARMS, FOUND = 0.05, 0.9
LOADS = 0.3, 0.6, 0.9
_PROCESSES = 2
_NS = 1e9


def _mix(name: str, chunk_frames: int, **lengths: tuple[float, float, float]) -> Mix:
    """Classes by name, each (weight, shortest and longest audio in seconds)."""
    slo = {"ttfa_p95_s": 1.0, "rtf_p95": 1.0}
    made = (
        TrafficClass(each, weight, Lengths.parse({"uniform": [low, high]}), slos=slo)
        for each, (weight, low, high) in lengths.items()
    )
    return Mix(name, tuple(made), chunk_frames)


SHORT = _mix("short lines", 5, short=(1.0, 4, 16))
MIXED = _mix("mixed", 15, short=(0.8, 4, 16), long=(0.2, 30, 90))
NINETY = _mix("90 minutes", 75, long=(1.0, 5000, 5400))
WINDOWS_S = {SHORT: (20, 40, 120, 600, 3600), MIXED: (40, 120, 600, 3600), NINETY: (120, 600, 3600)}


@dataclass(frozen=True)
class Cell:
    """Runs of one kind. ``finds``: the gates that may detect its ``fault``; "" is a steady run."""

    mix: Mix
    load: float
    seconds: int
    steady: bool = False
    burstiness: float = 1.0
    fault: str = ""
    finds: tuple[str, ...] = ()

    @property
    def rate_per_s(self) -> float:
        return self.load * MAX_FRAMES_PER_S / self.mix.mean_frames()

    def settings(self, seed: int) -> LoadSettings:
        kind = "poisson" if self.burstiness == 1 else "gamma"
        return LoadSettings(
            self.mix,
            Load(
                seed=seed,
                arrivals=Arrivals(kind, self.rate_per_s, self.burstiness),
                steady=_sessions_at(min(self.load, 0.95)) if self.steady else None,
            ),
        )

    def __str__(self) -> str:
        words = [self.mix.name, f"load {self.load:.0%}", f"{self.seconds} s"]
        words += ["from its steady state"] * self.steady + ["bursts"] * (self.burstiness > 1)
        return ", ".join([*words, *filter(None, [self.fault])])


def _sessions_at(load: float) -> int:
    frames_per_s = load * MAX_FRAMES_PER_S
    return round(frames_per_s * STEP_S / (1 - frames_per_s * STEP_PER_SESSION_S))


def steady_cells() -> Iterator[Cell]:
    for mix, windows in WINDOWS_S.items():
        for load in LOADS:
            for seconds in windows:
                yield Cell(mix, load, seconds, steady=mix is not SHORT)
    for load in LOADS:
        for seconds in (20, 40, 120):
            yield Cell(MIXED, load, seconds)
            yield Cell(SHORT, load, seconds, steady=True)
    for seconds in (120, 600):
        yield Cell(SHORT, 0.6, seconds, burstiness=4.0)


SLOWER, RISING, MORE = "server 20% slower at the end", "arrivals rise by 10%", "overload of 150%"
HUNG, LOST, READER, FIRST = (
    "1 in 20 never ends",
    "one record lost",
    "a reader lost",
    "first audio 0.4 s later at the end",
)
LATE, STAMPS = "1 in 5 sent 20 ms late", "stamps 20 ms late"


def faulty_cells() -> Iterator[Cell]:
    step, records = ("step time",), ("records", "arrivals")
    for seconds in (40, 120, 600):
        yield Cell(SHORT, 0.6, seconds, fault=RISING, finds=("arrivals",))
        yield Cell(SHORT, 0.6, seconds, fault=LOST, finds=records)
        yield Cell(SHORT, 0.6, seconds, fault=READER, finds=records)
        yield Cell(SHORT, 0.6, seconds, fault=LATE, finds=("punctuality",))
        yield Cell(SHORT, 0.6, seconds, fault=STAMPS, finds=("timestamps",))
        yield Cell(SHORT, 1.5, seconds, fault=MORE, finds=("sessions", "Little's law", "first audio of short"))
        yield Cell(SHORT, 0.6, seconds, fault=SLOWER, finds=step)
        yield Cell(MIXED, 0.3, seconds, steady=True, fault=SLOWER, finds=step)
        yield Cell(NINETY, 0.6, seconds, steady=True, fault=SLOWER, finds=step)
        yield Cell(SHORT, 0.6, seconds, fault=FIRST, finds=("first audio of short",))
        yield Cell(SHORT, 0.3, seconds, fault=HUNG, finds=("Little's law",))


@dataclass(frozen=True)
class Judged:
    """The certificate of one run: for every gate, whether it passed, and why if it did not."""

    valid: bool
    gates: dict[str, bool | None]
    verdict: str


def judge(cell: Cell, seed: int) -> Judged:
    """Simulate one run and judge its records."""
    settings = cell.settings(seed)
    rng = np.random.default_rng([seed, zlib.crc32(str(cell).encode())])
    recorder = Recorder(settings, "127.0.0.1:1", None)
    recorder.begin(10**12)
    results = simulate(cell, settings, recorder.start_ns, rng)
    submitted = len(results)
    for each in _kept(cell.fault, results, rng):
        recorder.take(each)
    certificate = _certificate(recorder, submitted, recorder.start_ns + cell.seconds * 10**9)
    return Judged(certificate.valid, {gate.name: gate.passed for gate in certificate.gates}, certificate.verdict)


def _certificate(recorder: Recorder, submitted: int, end_ns: int) -> Certificate:
    """The certificate of ``report_of``, without the quantiles and SLO verdicts, which take most of its time."""
    observed = recorder.observed(end_ns, ReaderTotals(submitted))
    start_ns = window_start_ns(observed)
    return certificate_of(observed, metrics.summarise(observed.results, start_ns, end_ns), start_ns)


def _kept(fault: str, results: list[Result], rng: np.random.Generator) -> list[Result]:
    if fault == LOST:
        del results[int(rng.integers(len(results)))]
    if fault == READER:
        return [each for number, each in enumerate(results) if number < len(results) / 2 or number % 4]
    return results


def simulate(cell: Cell, settings: LoadSettings, origin_ns: int, rng: np.random.Generator) -> list[Result]:
    draws, due_s = _requests(cell, settings, rng)
    if cell.fault == RISING:
        due_s = np.where(due_s > 0, _warped(due_s, cell.seconds), due_s)
        draws, due_s = draws[: len(due_s)], due_s
    late_s = rng.exponential(LATE_S, len(due_s))
    if cell.fault == LATE:
        late_s += 0.020 * (rng.random(len(due_s)) < 0.2)
    opening_s = OPENING_S * rng.lognormal(0, OPENING_SPREAD, len(due_s))
    if cell.fault == FIRST:
        opening_s += 0.4 * due_s.clip(0) / cell.seconds
    hung = rng.random(len(due_s)) < (0.05 if cell.fault == HUNG else 0.0)
    frames = np.array([each.frames - each.phase for each in draws], dtype=np.int64)
    slower = 0.2 if cell.fault == SLOWER else 0.0
    seeds = int(rng.integers(2**31))
    sent_s = due_s + late_s
    order = np.argsort(sent_s, kind="stable")
    served = _serve(
        sent_s[order],
        opening_s[order],
        frames[order],
        hung[order],
        cell.seconds,
        settings.mix.chunk_frames,
        slower,
        seeds,
    )
    stamp_s = LATE_S + (0.020 if cell.fault == STAMPS else 0.0)
    return [
        _result(cell, draws[number], place, due_s[number], sent_s[number], served, origin_ns, stamp_s, rng)
        for place, number in enumerate(order)
    ]


def _requests(cell: Cell, settings: LoadSettings, rng: np.random.Generator) -> tuple[list[Draw], np.ndarray]:
    begun = list(lead_in(settings))
    new = []
    for due_s in arrival_times(settings):
        if due_s >= cell.seconds * 1.02:  # some become due inside the run when they are moved earlier
            break
        new.append(due_s)
    if cell.fault != RISING:
        new = [each for each in new if each < cell.seconds]
    draws = [cell.mix.sample_in_progress(rng) for _ in begun] + [cell.mix.sample(rng) for _ in new]
    return draws, np.array(begun + new, dtype=float)


def _warped(due_s: np.ndarray, seconds: float) -> np.ndarray:
    """The times of a process whose rate rises from 95% to 105% of the declared one."""
    low, slope = 0.95, 0.10 / seconds
    return 2 * due_s / (low + np.sqrt(low**2 + 2 * slope * due_s))


def _result(cell, draw, place, due_s, sent_s, served, origin_ns, stamp_s, rng) -> Result:
    sent_at_s, first, ended_s = served
    own = sent_at_s[first[place] : first[place + 1]]
    own = own[np.isfinite(own)]
    received_ns = origin_ns + np.round((own + stamp_s) * _NS).astype(np.int64)
    chunk, frames = cell.mix.chunk_frames, draw.frames - draw.phase
    spoken = np.minimum(1 + chunk * np.arange(len(own)), frames)
    samples = np.diff(spoken, prepend=0) * wire.SAMPLES_PER_FRAME
    done = ended_s[place] + stamp_s < cell.seconds
    return Result(
        request_id=str(place),
        traffic_class=draw.traffic_class,
        speakers=1,
        script_words=1,
        frames=frames,
        start_frame=draw.phase,
        chunk_frames=chunk,
        loop="open",
        due_ns=origin_ns + round(due_s * _NS),
        sent_ns=origin_ns + round(sent_s * _NS),
        ended_ns=origin_ns + round((ended_s[place] + stamp_s if done else cell.seconds) * _NS),
        outcome=Outcome.DONE if done else Outcome.UNFINISHED,
        chunks=Chunks(received_ns, received_ns - round(stamp_s * _NS), samples),
    )


def _serve(sent_s, opening_s, frames, hung, seconds, chunk, slower, seed):
    first = np.concatenate([[0], np.cumsum(1 + np.ceil((frames - 1) / chunk).astype(np.int64))])
    sent_at_s, ended_s = np.full(first[-1], np.nan), np.full(len(frames), np.inf)
    _step_all(sent_s, opening_s, frames, hung, float(seconds), chunk, slower, seed, first, sent_at_s, ended_s)
    return sent_at_s, first, ended_s


@numba.njit(cache=True)
def _step_all(sent_s, opening_s, frames, hung, seconds, chunk, slower, seed, first, sent_at_s, ended_s):
    """Step all sessions that are open and have a slot, until the end. Fills ``sent_at_s`` and ``ended_s``."""
    np.random.seed(seed)
    slots = np.empty(SLOTS, np.int64)
    open_at, spoken = np.empty(SLOTS), np.zeros(SLOTS, np.int64)
    active, waiting, now, host = 0, 0, sent_s[0] if len(sent_s) else seconds, 0.0
    while now < seconds:
        while waiting < len(sent_s) and sent_s[waiting] <= now and active < SLOTS:
            slots[active], open_at[active], spoken[active] = waiting, now + opening_s[waiting], 0
            active, waiting = active + 1, waiting + 1
        speaking = 0
        soonest = sent_s[waiting] if waiting < len(sent_s) and active < SLOTS else np.inf
        for slot in range(active):
            if open_at[slot] <= now:
                speaking += 1
            elif open_at[slot] < soonest:
                soonest = open_at[slot]
        if not speaking:
            if soonest == np.inf:
                return
            now = soonest
            continue
        step_s = (STEP_S + STEP_PER_SESSION_S * speaking) * (1 + slower * max(now, 0.0) / seconds)
        fades = math.exp(-step_s / HOST_MEMORY_S)
        host = fades * host + math.sqrt(1 - fades * fades) * HOST_NOISE * np.random.normal()
        before, now = now, now + step_s * math.exp(host + STEP_NOISE * np.random.normal())
        slot = 0
        while slot < active:
            if open_at[slot] > before:
                slot += 1
                continue
            number = slots[slot]
            spoken[slot] += 1
            last = spoken[slot] == frames[number]
            if last or (spoken[slot] - 1) % chunk == 0:
                sent_at_s[first[number] + (spoken[slot] - 1 + chunk - 1) // chunk] = now
            leaves = last or (hung[number] and 2 * spoken[slot] >= frames[number])
            if last:
                ended_s[number] = now
            if leaves:
                active -= 1
                slots[slot], open_at[slot], spoken[slot] = slots[active], open_at[active], spoken[active]
            else:
                slot += 1


@dataclass(frozen=True)
class Tally:
    """The runs of one cell."""

    cell: Cell
    judged: tuple[Judged, ...]

    @property
    def false_alarms(self) -> int:
        return sum(not each.valid for each in self.judged)

    @property
    def found(self) -> int:
        """Runs with the fault that are INVALID by a gate that may detect it."""
        return sum(self._says(each) is False for each in self.judged)

    @property
    def missed(self) -> int:
        return sum(self._says(each) is True for each in self.judged)

    def _says(self, judged: Judged) -> bool | None:
        """False if a gate of the fault found it, True if one passed; None if none was testable."""
        said = [judged.gates[name] for name in self.cell.finds]
        return False if False in said else (True if True in said else None)


def tallies(cells: Sequence[Cell], runs: int, seed: int) -> list[Tally]:
    """Judge ``runs`` runs of each cell, fewer of the long ones, on all processes."""
    tasks = [(cell, seed * 10**6 + number) for cell in cells for number in range(_runs_of(cell, runs))]
    tasks.sort(key=lambda task: -task[0].seconds)
    done: dict[str, list[Judged]] = {str(cell): [] for cell in cells}
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(_PROCESSES) as pool:
        for number, (cell, judged) in enumerate(pool.imap(_judged, tasks, chunksize=4), start=1):
            done[cell].append(judged)
            if number % 500 == 0:
                common.say(f"{number} of {len(tasks)}, {time.monotonic() - began:.0f} s …")
    return [Tally(cell, tuple(done[str(cell)])) for cell in cells]


def _runs_of(cell: Cell, runs: int) -> int:
    return max(runs * 120 // max(cell.seconds, 120), min(runs, 4))


def _judged(task: tuple[Cell, int]) -> tuple[str, Judged]:
    return str(task[0]), judge(*task)


def shown(title: str, done: Sequence[Tally], columns: Sequence[str], row: Callable[[Tally], tuple]):
    table = common.table(title, "runs of", "runs", *columns)
    for each in done:
        table.add_row(str(each.cell), str(len(each.judged)), *row(each))
    return table


def _false_row(tally: Tally) -> tuple[str, str]:
    alarms = _counted(tally.judged, False)
    return f"{tally.false_alarms / len(tally.judged):.1%}", ", ".join(f"{name} {n}" for name, n in alarms.items())


def _found_row(tally: Tally) -> tuple[str, str, str]:
    untested = len(tally.judged) - tally.found - tally.missed
    return str(tally.found), str(tally.missed), str(untested)


def _counted(judged: Sequence[Judged], passed: bool | None) -> Counter[str]:
    return Counter(name for each in judged for name, said in each.gates.items() if said is passed)


def significantly_above(tally: Tally, cells: int) -> bool:
    """Whether a cell's share of false alarms exceeds its limit significantly, given the number of cells."""
    return binomtest(tally.false_alarms, len(tally.judged), FALSE_ALARMS, "greater").pvalue < 0.05 / cells


def figures(steady: Sequence[Tally], faulty: Sequence[Tally]) -> dict:
    runs = [each for tally in steady for each in tally.judged]
    found, missed = (sum(getattr(each, name) for each in faulty) for name in ("found", "missed"))
    faults = sum(len(each.judged) for each in faulty)
    said = Counter(name for each in runs for name in each.gates)
    untested = _counted(runs, None)
    return {
        "steady_runs": len(runs),
        "false_alarm_share": sum(not each.valid for each in runs) / len(runs),
        "false_alarm_share_worst": max(each.false_alarms / len(each.judged) for each in steady),
        "cells_above_limit": sum(significantly_above(each, len(steady)) for each in steady),
        "cells": len(steady),
        "false_alarm_share_by_gate": {name: n / len(runs) for name, n in _counted(runs, False).items()},
        "testable_share_by_gate": {name: 1 - untested[name] / n for name, n in said.items()},
        "faulty_runs": faults,
        "found_share": found / max(found + missed, 1),
        "testable_share": (found + missed) / faults,
        "found_by_fault": _by_fault(faulty),
    }


def _by_fault(faulty: Sequence[Tally]) -> dict[str, dict[str, float]]:
    """For each fault: the share found of all runs and of the testable ones, and the number of testable runs."""
    shares = {}
    for fault in dict.fromkeys(each.cell.fault for each in faulty):
        own = [each for each in faulty if each.cell.fault == fault]
        runs, found, missed = (sum(n) for n in zip(*((len(t.judged), t.found, t.missed) for t in own), strict=True))
        tested = found + missed
        shares[fault] = {"of_all": found / runs, "of_testable": found / max(tested, 1), "testable": tested / runs}
    return shares


def live(runs: int, seconds: int) -> list[dict]:
    """The certificates of real runs of Locust against a timetable server."""
    with tempfile.TemporaryDirectory(prefix="gates-") as folder, TimetableServer("first=0.05 every=0.04") as server:
        return [_live(server.url, seconds, seed, Path(folder) / f"run-{seed}") for seed in range(1, runs + 1)]


def _live(url: str, seconds: int, seed: int, records: Path) -> dict:
    common.say(f"a real run of {seconds} s …")
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "scenarios" / "podcast.py"), "--headless"]
    command += ["--only-summary", "--host", url, "--rate", "3", "--arrivals", "poisson", "--mix", "shorts"]
    command += ["-t", f"{seconds}s", "--stop-timeout", "2", "--seed", str(seed), "--records", str(records)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + 90)
    manifest = records / "manifest.json"
    if not manifest.exists():
        raise HarnessError(f"Locust kept no records:\n{done.stdout[-500:]}{done.stderr[-1500:]}")
    return json.loads(manifest.read_text())["certificate"]


def real_shown(certificates: Sequence[dict]):
    table = common.table("Real runs: what each gate said", "run and gate", "passed", "says")
    for number, certificate in enumerate(certificates, start=1):
        for name, passed, says in certificate["gates"]:
            table.add_row(f"{number} {name}", {True: "yes", False: "NO", None: "-"}[passed], says)
    return table


def main(arguments: Sequence[str]) -> int:
    parser = common.Parser(__doc__, "python benchmarks/load/gates.py --runs 60 --real 2 --seconds 38")
    parser.add_argument("--runs", type=common.whole(2, 10**5), default=40, help="of each kind; fewer of long windows")
    parser.add_argument("--longest", type=common.whole(40, 3600), default=3600, help="window to simulate, seconds")
    parser.add_argument("--real", type=common.whole(0, 100), default=0, help="runs of Locust on the tests' server")
    parser.add_argument("--seconds", type=common.whole(10, 3600), default=38, help="of each of these")
    parser.add_argument("--seed", type=common.whole(0, 10**6), default=1)
    options = parser.parse_args(arguments)
    if options.quick:
        options.runs, options.longest = 2, 40
    os.environ["OMP_NUM_THREADS"] = "1"
    steady, faulty = (
        tallies([each for each in cells if each.seconds <= options.longest], options.runs, options.seed)
        for cells in (steady_cells(), faulty_cells())
    )
    certificates = live(options.real, options.seconds)
    tables = [
        shown("Steady runs: every one that is INVALID is a false alarm", steady, ("INVALID", "by"), _false_row),
        shown("Runs with a fault", faulty, ("found", "missed", "not testable"), _found_row),
        *([real_shown(certificates)] if certificates else []),
    ]
    result = figures(steady, faulty)
    if certificates:
        result |= {"real_runs": len(certificates), "real_valid": sum(each["valid"] for each in certificates)}
    common.finish(tables, result)
    good = result["false_alarm_share"] <= FALSE_ALARMS and not result["cells_above_limit"]
    return 0 if options.quick or (good and result["found_share"] >= FOUND) else common.EXIT_FAILED


if __name__ == "__main__":
    common.run(main)
