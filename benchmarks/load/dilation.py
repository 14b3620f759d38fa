"""Time dilation against real time: the same load on an emulated GPU at its own speed, and several times slower.

The real Triton serves a made-up GPU whose stages take so long that this host carries their frames at their own speed
too. At every dilation the same requests are sent: up a concurrency ladder, and as an open loop with the same arrivals.
Step times and times to first audio, all undilated, must agree. What remains is the host's part of a step, which
dilation divides: ``host_ms`` is what it took at full speed. Stages that take less time (--step) show more of it.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
import yaml

from harness import wire
from harness.clock import MOST_DILATION
from harness.deploy.config import Deployment
from harness.deploy.server import TritonServer
from harness.drive.load import Load
from harness.planfile.reading import load_plan
from harness.records.metrics import per_request
from harness.records.schema import Result, Rung
from harness.sweep.trial import Driver, Measured, TrialRequest

LIMITS = {"step_error_max": 0.03, "ttfa_p95_error": 0.05}
SHARES = {wire.LLM: (0.40, 0.03), wire.DIFFUSION: (0.35, 0.02), wire.VOCODER: (0.25, 0.01)}  # of a step: fixed, each
BATCHES, CONTEXTS, PROMPTS = (1, 2, 4, 8, 16, 32), (0, 100_000), (64, 4096)
# Queue delays, as shares of a step. That of the LLM is longer than a step: all sessions then share a batch, whenever
# they joined. With shorter ones they may stay apart in groups, and which groups form is chance, at any speed.
DELAYS = {wire.LLM: 1.2, wire.DIFFUSION: 0.05, wire.VOCODER: 0.05}
PLANS = {
    "ladder": {"speech": {"weight": 1, "length": {"fixed": 120}}},
    "open": {"speech": {"weight": 1, "length": {"fixed": 0.8}}},
}
RATE_STEPS = 0.5  # requests of 6 frames that arrive in the time of a step with one session, without its delay


@dataclass(frozen=True)
class Figures:
    """At one dilation: seconds of a step at each rung, and times to first audio of the open loop."""

    dilation: float
    step_s: dict[int, float]
    ttfa_s: np.ndarray
    busy: float | None
    invalid: tuple[str, ...]  # why a trial is INVALID

    @property
    def ttfa_p95_s(self) -> float:
        return float(np.quantile(self.ttfa_s, 0.95)) if len(self.ttfa_s) else math.nan


def profile(step_ms: float) -> dict:
    """A profile whose step with one session takes about ``step_ms``, in the format of ``harness profile``."""

    def ms(stage: str, batch: int) -> float:
        fixed, each = SHARES[stage]
        return step_ms * (fixed + each * batch)

    return {
        "schema": 1,
        "device": "made-up GPU",
        "preset": "tiny",
        "dtype": "none",
        "manifest": {"command": "benchmarks/load/dilation.py", "notes": "lines that were made up"},
        "model": {"hidden_size": 64, "kv_bytes_per_token": 512, "kv_room_bytes": 8 << 30, "state_values": 5266},
        "stages": {
            wire.LLM: [{"batch": b, "context": c, "ms": ms(wire.LLM, b)} for b in BATCHES for c in CONTEXTS],
            "prefill": [{"tokens": t, "context": c, "ms": 0.1 * step_ms} for t in PROMPTS for c in CONTEXTS],
            wire.DIFFUSION: [{"batch": b, "steps": 10, "ms": ms(wire.DIFFUSION, b)} for b in BATCHES],
            wire.VOCODER: [{"batch": b, "ms": ms(wire.VOCODER, b)} for b in BATCHES],
            wire.VOICE: [{"seconds": seconds, "ms": 0.1 * step_ms} for seconds in (3, 30)],
        },
    }


@dataclass(frozen=True)
class Bench:
    """``step_ms``: of one session; a rung lasts ``rung_s`` and the open loop ``open_s``, of the emulated GPU."""

    folder: Path
    step_ms: float
    rungs: tuple[int, ...]
    rung_s: float
    open_s: float

    def __post_init__(self) -> None:
        (self.folder / "gpu.json").write_text(json.dumps(profile(self.step_ms)))
        for name, classes in PLANS.items():
            mix = {"classes": classes, "voices": [0]}
            plan = {"name": name, "preset": "tiny", "mix": mix, "slos": {"speech": {"rtf_p95": 100}}}
            path = self.folder / f"{name}.yaml"
            path.write_text(yaml.safe_dump({**plan, "targets_qps": [1], "max_others": 1000.0}))

    def measure(self, dilation: float) -> Figures:
        knobs = {f"{stage}.delay_us": round(1e3 * self.step_ms * share) for stage, share in DELAYS.items()}
        base = Deployment("tiny", emulate=str(self.folder / "gpu.json"), dilation=dilation)
        rate = RATE_STEPS / (self.step_ms / 1e3)
        with TritonServer(base) as server:
            common.say(f"time dilated {dilation:g} times: a ladder, then {rate:.2g} requests/s")
            ladder = self._run(server, base, "ladder", knobs, Load.ladder(self.rung_s, 1, self.rungs))
            opened = self._run(server, base, "open", knobs, Load.poisson(self.open_s, 2, rate))
        return figures_of(dilation, ladder, opened)

    def _run(self, server: TritonServer, base: Deployment, plan: str, knobs: dict, load: Load) -> Measured:
        path = self.folder / f"{plan}.yaml"
        measured = Driver(server, path, load_plan(path), self.folder / "work", base).run(TrialRequest(knobs, load))
        if not measured.trial.valid:
            common.say(f"  INVALID: {'; '.join(measured.trial.reasons)}")
        return measured


def figures_of(dilation: float, ladder: Measured, opened: Measured) -> Figures:
    """What one dilation showed; the mean number of sessions of a rung is rounded to its number of users."""
    rungs = (*ladder.trial.rungs, *ladder.trial.disturbed)
    step_s = {round(rung.sessions): _step_s(ladder.results, rung) for rung in rungs}
    ttfa_s = per_request(opened.results)["ttfa_s"].dropna().to_numpy()
    busy = [sample.cpu_percent / 100 for sample in ladder.samples[1:]]
    invalid = tuple(
        reason for each in (ladder, opened) if not each.trial.valid for reason in each.trial.reasons or ("?",)
    )
    return Figures(dilation, step_s, ttfa_s, max(busy, default=None), invalid)


def missing(each: Figures, rungs: Sequence[int]) -> list[str]:
    """What one dilation did not show; figures that do not exist cannot agree."""
    at = f"at dilation {each.dilation:g}"
    left_out = [n for n in rungs if not math.isfinite(each.step_s.get(n, math.nan))]
    found = [f"{at}: INVALID: {reason}" for reason in each.invalid]
    found += [f"{at}: no step time of {n} sessions" for n in left_out]
    return found if math.isfinite(each.ttfa_p95_s) else [*found, f"{at}: no time to first audio"]


def _step_s(results: Sequence[Result], rung: Rung) -> float:
    """Mean seconds between two chunks of a stream, both in the window of a rung: whole steps, unlike frames/s."""
    apart_ns = [np.diff(each[(each >= rung.start_ns) & (each < rung.end_ns)])
                for each in (result.chunks.received_ns for result in results)]  # fmt: skip
    return float(np.concatenate(apart_ns).mean()) / 1e9


def compared(plain: Figures, slower: Sequence[Figures]) -> dict:
    """The figures of the last line: the largest errors, and what the host took of a step at full speed."""
    pairs = [(one.step_s[n], plain.step_s[n], one.dilation) for one in slower for n in one.step_s if n in plain.step_s]
    host_ms = [1e3 * (own - dilated) * n / (n - 1) for dilated, own, n in pairs]
    return {
        "step_error_max": max((abs(dilated / own - 1) for dilated, own, _ in pairs), default=math.inf),
        "ttfa_p95_error": max((abs(one.ttfa_p95_s / plain.ttfa_p95_s - 1) for one in slower), default=math.inf),
        "ttfa_median_error": max(
            (abs(np.median(one.ttfa_s) / np.median(plain.ttfa_s) - 1) for one in slower), default=math.inf
        ),
        "host_ms": float(np.median(host_ms)) if host_ms else math.nan,
        "steps_compared": len(pairs),
        "requests": min(len(one.ttfa_s) for one in (plain, *slower)),
        "dilations": [one.dilation for one in slower],
    }


def show(plain: Figures, slower: Sequence[Figures]):
    shown = common.table("Undilated figures at each dilation, and against full speed", "figure", "full speed")
    for one in slower:
        shown.add_column(f"{one.dilation:g} times", justify="right")
        shown.add_column("apart", justify="right")
    rows = [(f"step, ms, {n} sessions", [1e3 * each.step_s.get(n, math.nan) for each in (plain, *slower)])
            for n in plain.step_s]  # fmt: skip
    rows.append(("first audio p50, ms", [1e3 * float(np.median(each.ttfa_s)) for each in (plain, *slower)]))
    rows.append(("first audio p95, ms", [1e3 * each.ttfa_p95_s for each in (plain, *slower)]))
    for name, (own, *others) in rows:
        cells = [cell for value in others for cell in (f"{value:.1f}", f"{value / own - 1:+.1%}")]
        shown.add_row(name, f"{own:.1f}", *cells)
    busy = [f"{each.busy:.0%}" if each.busy is not None else "-" for each in (plain, *slower)]
    shown.add_row("busiest second of the host", busy[0], *(cell for each in busy[1:] for cell in (each, "")))
    return shown


def main(arguments: Sequence[str]) -> int:
    parser = common.Parser(__doc__, "python benchmarks/load/dilation.py --dilations 3,8")
    parser.add_argument(
        "--dilations", type=common.several(common.real(1.01, MOST_DILATION)), default=[2.0, 5.0],
        help="with commas between them (default: 2,5)",
    )  # fmt: skip
    parser.add_argument(
        "--step",
        type=common.real(10, 10_000),
        default=300.0,
        help="ms of a step with one session, without its delay (default: 300)",
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        lengths = ((1, 2, 3), 4.0, 6.0) if options.quick else ((1, 3, 6), 16.0, 90.0)
        bench = Bench(Path(scratch), 100.0 if options.quick else options.step, *lengths)
        plain = bench.measure(1.0)
        slower = [bench.measure(each) for each in (options.dilations[:1] if options.quick else options.dilations)]
        lacking = [why for each in (plain, *slower) for why in missing(each, bench.rungs)]
        figures = compared(plain, slower) | {"missing": len(lacking)}
    for why in lacking:
        common.say(why)
    common.finish(show(plain, slower), figures)
    return 0 if is_good(figures, options.quick) else common.EXIT_FAILED


def is_good(figures: dict, quick: bool = False) -> bool:
    """Whether everything was measured and, except where ``quick`` windows are too short to tell, agrees."""
    within = all(figures[name] <= limit for name, limit in LIMITS.items())  # NaN is not
    return not figures["missing"] and (quick or within)


if __name__ == "__main__":
    common.run(main)
