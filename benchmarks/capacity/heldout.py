"""Predictions recorded before their runs start, compared with those runs: the real Triton with emulated GPUs.

Six deployments are fitted: ladders without delay, at 5 and 25 ms, with two instances of a stage, with a delay in one
stage only, and with batches up to 4; one GPU, one mix. Of each rung the step and the mean batch of every stage count.
What the stages do not explain of them is modelled by a Gaussian process (`harness.sweep.optimizer.surrogate`).

Held out are other delays, batch limits, instances and mixes (90-minute sessions in steady state among them), two GPUs,
and all open-loop runs. Stage computation is emulated with the times of a stand-in GPU (stand_in.py); queues, batches,
hops, streams and load are real. On two shared cores that is steadier than computing, and closer to a GPU's scale.

fit      the ladders; then every prediction is sealed (hash, time) in predictions.jsonl of the run's folder
measure  of each held-out deployment a ladder around its predicted limit, a second one where that does not reach the
         measured limit, and open-loop runs at shares of its rate
score    highest sustainable rate = frames/s at the sessions where RTF p95 meets its SLO, interpolated between
         the rungs on both sides, over the mean frames of the mix; TTFA p95 of exactly the requests that were predicted.
         Steps grow with the context of sessions, which a seed draws: rates are predicted at four mean contexts, and
         compared at the one that the ladder had where it met the limit

An interrupted run resumes; it stops between trials after --minutes.

The model got `apart_s` and `wake_s` after an earlier run of these cases had shown that a delay in one stage was
predicted up to 26% too fast: for that case these are not blind predictions, for the runs themselves they are.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
import stand_in
import yaml
from heldout_cases import CASES, FITTED, MIXES, SHARES, SLOS, Case
from heldout_model import MOST, Model, contexts_of_rungs, offered_context, steady_context

from harness.capacity.fitting.rate_search import Limits, steady_limit
from harness.capacity.models.device import Device
from harness.capacity.simulator.sessions import Simulated, simulate
from harness.deploy.config import Deployment
from harness.deploy.server import TritonServer
from harness.drive.generator import LoadSettings, arrival_times, lead_in
from harness.drive.load import Load
from harness.errors import InputError
from harness.host.places import ROOT
from harness.host.provenance import commit, host_facts, versions
from harness.planfile.plan import PlanSpec
from harness.planfile.reading import load_plan
from harness.records.prediction import hash_of
from harness.records.schema import Rung, RunManifest, Trial
from harness.records.store import Run
from harness.sweep.trial import Driver, TrialRequest, trial_id
from harness.traffic.mix import ScriptSource, requests

RUN_ID = "heldout-emulated"
LIMITS = {
    "max_rate_error_median": 0.05,
    "max_rate_error_worst": 0.10,
    "ttfa_p95_error_median": 0.10,
    "near_saturation_error_worst": 0.10,
}
RTF = SLOS["short"]["rtf_p95"]
CAP = 0.85  # of the highest rate, for counts of GPUs
AROUND = (0.8, 1.0, 1.2)  # of the predicted limit in sessions: rungs of a held-out ladder
BELOW, ABOVE = (0.4, 0.6, 0.8), (1.2, 1.45, 1.75)  # rungs of a second one, where the limit lies outside of the first
CONTEXTS = (0.25, 0.5, 1.0, 1.5)  # of the steady state's: rates are predicted at each


@dataclass
class Bench:
    """The run's folder, the plan of each mix, and the durations of loads.

    An open-loop run lasts ``seconds``, or until about ``due`` requests are due, whichever is longer; a rung ``rung_s``.
    """

    run: Run
    folder: Path
    seconds: float
    due: int
    rung_s: float
    deadline_s: float = math.inf
    specs: dict[str, PlanSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / "gpu.json").write_text(json.dumps(stand_in.profile()))
        for name, classes in MIXES.items():
            plan = {
                "name": name,
                "preset": "tiny",
                "mix": {"classes": classes},
                "promises": SLOS,
                "targets_qps": [1],
            }
            (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(plan))
            self.specs[name] = load_plan(self.folder / f"{name}.yaml")

    def driver(self, server: TritonServer, base: Deployment, mix: str) -> Driver:
        return Driver(server, self.folder / f"{mix}.yaml", self.specs[mix], self.folder / "work", base)

    def base(self, gpus: int) -> Deployment:
        return Deployment("tiny", emulate=str(self.folder / "gpu.json"), gpus=gpus)

    def known(self, knobs: dict, load: Load) -> Trial | None:
        """Its VALID trial, or the INVALID one of a second try."""
        tries = {trial.trial_id: trial for trial in self.run.trials()}
        both = [tries.get(trial_id(knobs, load, repeat)) for repeat in range(2)]
        return next((trial for trial in both if trial and trial.valid), both[1])

    def measure(self, work: Sequence[tuple[int, str, dict, Load]]) -> bool:
        """Measure what is missing of (gpus, mix, knobs, load); False if the time is up before that."""
        for gpus in sorted({each[0] for each in work}):
            missing = [each for each in work if each[0] == gpus and self.known(*each[2:]) is None]
            if missing and time.monotonic() > self.deadline_s:
                return False
            if missing and not self._measure_on(gpus, missing):
                return False
        return True

    def _measure_on(self, gpus: int, missing: Sequence[tuple]) -> bool:
        base = self.base(gpus)
        with TritonServer(base) as server:
            for _, mix, knobs, load in missing:
                driver = self.driver(server, base, mix)
                while self.known(knobs, load) is None:
                    if time.monotonic() + load.total_s + 15 > self.deadline_s:
                        return False
                    repeat = int(any(t.trial_id == trial_id(knobs, load) for t in self.run.trials()))
                    common.say(f"{gpus} x, {mix}, {load.kind}, {_short(knobs)} {load.rate_per_s or load.sessions} …")
                    measured = driver.run(TrialRequest(knobs, load, repeat=repeat))
                    self.run.append_trial(measured.trial, measured.results, ())
                    if not measured.trial.valid:
                        common.say(f"  INVALID: {'; '.join(measured.trial.reasons)}")
        return True


def _short(knobs: dict) -> str:
    return " ".join(f"{knob.partition('.')[0][:4]}.{knob.partition('.')[2]}={value}" for knob, value in knobs.items())


def fit_loads(bench: Bench) -> list[tuple[int, str, dict, Load]]:
    load = Load.ladder(bench.rung_s, 11, (1, 2, 4, 8, 14, 20, 28))
    return [(1, "fitted", knobs, load) for knobs in FITTED]


def predictions(bench: Bench) -> list[dict]:
    """The predictions, sealed on disk: made once, from the fit alone, before any held-out run."""
    path = bench.run.path / "predictions.jsonl"
    if path.exists():
        return [json.loads(line) for line in path.read_text().splitlines()]
    trials = [bench.known(knobs, load) for _, _, knobs, load in fit_loads(bench)]
    model = Model.of(trials, bench.run.requests(), bench.specs["fitted"])
    common.say(f"fitted: {model.between}, steps off by {model.off:.1%}, mean batches by {model.batches_off:.1%}")
    lines = []
    for number, case in enumerate(CASES):
        predicted = _predict(bench, model, case, 100 * (number + 1)) | {"made_at": datetime.now(UTC).isoformat()}
        name = case.name.replace(" ", "-").replace(",", "")
        lines.append(json.dumps({"trial_id": name, **predicted, "sha256": hash_of(predicted)}) + "\n")
    draft = path.with_suffix(".draft")
    draft.write_text("".join(lines))
    draft.rename(path)  # all of them or none: an interrupted run makes them again
    return predictions(bench)


def _predict(bench: Bench, model: Model, case: Case, seed: int) -> dict:
    spec = bench.specs[case.mix]
    context = steady_context(spec)
    contexts = [share * context for share in CONTEXTS]
    rates = {tokens: _highest_rate(spec, case, model.device(case, tokens)) for tokens in contexts}
    rate, binding, most = rates[context]
    runs = [
        _predict_open(bench, case, model, round(share * rate, 3), seed + i) for i, share in enumerate(case.shares())
    ]
    return {
        "case": case.name,
        "max_rate_per_s": {str(tokens): found[0] for tokens, found in rates.items()},
        "binding": binding,
        "max_sessions": most,
        "rungs": sorted({max(round(share * most), 1) for share in AROUND}),
        "ladder_seed": seed + 50,
        "open": runs,
    }


def _highest_rate(spec: PlanSpec, case: Case, device: Device) -> tuple[float, str, float]:
    """Requests/s on the GPUs of a case, the limit that binds, and their sessions there."""
    frames_per_s, binding = steady_limit(device, Limits(spec.slo_list(), MOST))
    sessions = np.linspace(1, MOST, 2000)
    most = float(sessions[np.argmin(np.abs(device.step_time.frames_per_s(sessions) - frames_per_s))])
    return case.gpus * frames_per_s / spec.traffic_mix().mean_frames(), binding, case.gpus * most


def _predict_open(bench: Bench, case: Case, model: Model, rate: float, seed: int) -> dict:
    """Predicted TTFA p95 and step of the requests that a seed will send: times, lengths, contexts and concurrency are
    known ahead.
    """
    spec, context = bench.specs[case.mix], steady_context(bench.specs[case.mix])
    steady = max(1, round(_sessions(model.device(case, context), spec, rate / case.gpus) * case.gpus))
    seconds = float(math.ceil(max(bench.seconds, bench.due / rate)))
    due_s, frames, starts, names = offered(spec, rate, seed, steady, seconds)
    for _ in range(2):  # first at the mean context of steady state, then at that of these very requests
        device = model.device(case, context)
        shown = simulate(
            due_s, frames, device.step_time, devices=case.gpus, first_audio=device.first_audio, stop_s=seconds
        )
        begin_s, end_s = np.nan_to_num(shown.start_s, nan=seconds), np.nan_to_num(shown.end_s, nan=seconds)
        context = offered_context(starts, frames, begin_s, end_s, seconds)
    own, rng = due_s >= 0, np.random.default_rng(seed)
    ttfa_s = np.nan_to_num(shown.ttfa_s[own], nan=np.inf)
    ratios = [device.ttfa.of(name).at(rng.random(200)) for name in names[own]]
    scattered = ttfa_s * np.transpose(ratios)
    p95_s = float(np.median(np.quantile(scattered, 0.95, axis=1, method="inverted_cdf")))
    of_run = {"seconds": seconds, "requests": int(own.sum()), "step_s": _mean_step_s(shown, seconds)}
    return {"rate_per_s": rate, "seed": seed, "steady": steady, "ttfa_p95_s": p95_s, "context": context} | of_run


def _mean_step_s(shown: Simulated, seconds: float) -> float:
    """Mean seconds of a frame step over [0, seconds): session-seconds over frames."""
    began = ~np.isnan(shown.rtf)
    ends_s = np.minimum(np.nan_to_num(shown.end_s[began], nan=seconds), seconds)
    inside_s = np.maximum(ends_s - np.maximum(shown.start_s[began], 0.0), 0.0)
    return float(np.sum(inside_s) / np.sum(inside_s / shown.step_s()[began]))


def _sessions(device: Device, spec: PlanSpec, rate: float) -> float:
    """Mean sessions of a device at a rate: where its throughput equals the offered load."""
    sessions = np.linspace(0.5, MOST, 2000)
    offered_frames = rate * spec.traffic_mix().mean_frames()
    return float(sessions[np.argmax(device.step_time.frames_per_s(sessions) >= offered_frames)])


def offered(spec: PlanSpec, rate: float, seed: int, steady: int, seconds: float):
    """Due times in seconds, frames, frames spoken before, and classes of the requests that a seed gives, in order."""
    mix = spec.traffic_mix()
    settings = LoadSettings(mix, Load.poisson(seconds, seed, rate, steady))
    new, found = np.random.default_rng([seed, 0]).spawn(2)

    def sent() -> Iterator[tuple[float, int, int, str]]:
        sources = (found, True, lead_in(settings)), (new, False, arrival_times(settings))
        for rng, in_progress, due in sources:
            for due_s, request in zip(due, requests(mix, rng, ScriptSource(), steady=in_progress), strict=False):
                if due_s > seconds:
                    return
                yield due_s, request.frames, request.start_frame, request.traffic_class

    due_s, frames, starts, names = zip(*sent(), strict=True)
    return np.array(due_s), np.array(frames, dtype=float), np.array(starts, dtype=float), np.array(names)


def held_out_loads(bench: Bench, predicted: Sequence[dict]) -> list[tuple[int, str, dict, Load]]:
    work = []
    for case, said in zip(CASES, predicted, strict=True):
        loads = [Load.ladder(case.patience * bench.rung_s - 1, said["ladder_seed"], tuple(said["rungs"]))]
        loads += [Load.poisson(r["seconds"], r["seed"], r["rate_per_s"], r["steady"]) for r in said["open"]]
        work += [(case.gpus, case.mix, case.knobs, load) for load in loads]
    return work


def second_ladders(bench: Bench, predicted: Sequence[dict]) -> list[tuple[int, str, dict, Load]]:
    """Ladders further up or down of the cases whose first one did not enclose the measured limit."""
    return [work for case, said in zip(CASES, predicted, strict=True) if (work := _second(bench, case, said))]


def _second(bench: Bench, case: Case, said: dict) -> tuple[int, str, dict, Load] | None:
    first = Load.ladder(case.patience * bench.rung_s - 1, said["ladder_seed"], tuple(said["rungs"]))
    rtf, _ = _heard([bench.known(case.knobs, first)])
    if not rtf or min(rtf) <= RTF <= max(rtf):
        return None
    shares = ABOVE if max(rtf) < RTF else BELOW
    rungs = tuple(sorted({max(round(share * said["max_sessions"]), 1) for share in shares}))
    return (
        case.gpus,
        case.mix,
        case.knobs,
        Load.ladder(case.patience * bench.rung_s - 1, said["ladder_seed"] + 1, rungs),
    )


def ladders(bench: Bench, case: Case, said: dict) -> list[Trial]:
    """The one or two ladders of a case."""
    first = Load.ladder(case.patience * bench.rung_s - 1, said["ladder_seed"], tuple(said["rungs"]))
    second = _second(bench, case, said)
    trials = [bench.known(case.knobs, first), bench.known(case.knobs, second[3]) if second else None]
    return [trial for trial in trials if trial]


def _heard(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
    """RTF p95 of short requests and frames/s of the rungs that heard any, by sessions."""
    rungs = _rungs(trials)
    return [rung.summary.figure("short.rtf_p95") for rung in rungs], [rung.frames_per_s for rung in rungs]


def _rungs(trials: Sequence[Trial]) -> list[Rung]:
    heard = [rung for trial in trials for rung in trial.rungs if rung.summary.figure("short.rtf_p95") > 0]
    return sorted(heard, key=lambda rung: rung.sessions)


def measured_rate(bench: Bench, case: Case, trials: Sequence[Trial]) -> tuple[float, float]:
    """Requests/s where RTF p95 meets its SLO, and the mean context of sessions there, in tokens.

    NaN where no two rungs enclose that.
    """
    spec = bench.specs[case.mix]
    rtf, frames = _heard(trials)
    if not rtf or not min(rtf) <= RTF <= max(rtf):
        return math.nan, math.nan
    contexts = contexts_of_rungs(trials, bench.run.requests(), spec)
    ordered, rising = [contexts[rung.start_ns] for rung in _rungs(trials)], np.maximum.accumulate(rtf)
    rate = float(np.interp(RTF, rising, frames)) / spec.traffic_mix().mean_frames()
    return rate, float(np.interp(RTF, rising, ordered))


@dataclass(frozen=True)
class Score:
    """A held-out case: its highest rate as predicted and measured; of each open-loop run its TTFA p95 and frame step.

    ``ttfa``, ``steps``: rate, predicted and measured seconds.
    """

    case: Case
    predicted: float
    measured: float
    ttfa: list[tuple[float, float, float]]
    steps: list[tuple[float, float, float]]
    flaw: str

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    def near_saturation(self) -> list[tuple[float, float, float]]:
        """The frame steps of its runs near saturation."""
        return self.steps[len(SHARES) :]


def _flaw(said: dict, trial: Trial) -> str:
    """Why what was said does not count for a trial, or ""."""
    if hash_of({name: value for name, value in said.items() if name != "trial_id"}) != said["sha256"]:
        return "its prediction is not the one that was made: its hash differs"
    return "its prediction was made after it had started" if said["made_at"] > trial.started_at else ""


def score(bench: Bench, predicted: Sequence[dict]) -> list[Score]:
    scores, work = [], iter(held_out_loads(bench, predicted))
    for case, said in zip(CASES, predicted, strict=True):
        trials = [bench.known(knobs, load) for _, _, knobs, load in (next(work) for _ in range(1 + len(said["open"])))]
        climbed = ladders(bench, case, said)
        flaws = {_flaw(said, trial) for trial in (*trials, *climbed)} - {""}
        flaws |= {"INVALID: " + "; ".join(trial.reasons) for trial in (*trials, *climbed) if not trial.valid}
        ttfa = [
            (run["rate_per_s"], run["ttfa_p95_s"], trial.rungs[0].summary.ttfa_p95_s)
            for run, trial in zip(said["open"], trials[1:], strict=True)
        ]
        steps = [
            (run["rate_per_s"], run["step_s"], trial.rungs[0].sessions / trial.rungs[0].frames_per_s)
            for run, trial in zip(said["open"], trials[1:], strict=True)
        ]
        rate, context = measured_rate(bench, case, climbed)
        tokens, rates = zip(*((float(at), value) for at, value in said["max_rate_per_s"].items()), strict=True)
        scores.append(
            Score(case, float(np.interp(context, tokens, rates)), rate, ttfa, steps, "; ".join(sorted(flaws)))
        )
    return scores


def counts(scores: Sequence[Score]) -> tuple[list[int], int]:
    """GPUs predicted minus GPUs needed, for rates in the range of one and two GPUs; and the number of rates."""
    one = next(each for each in scores if each.case.knobs == CASES[0].knobs and each.case.gpus == 1)
    two = next(each for each in scores if each.case.gpus == 2)
    rates = np.linspace(0.2, 0.95, 16) * CAP * min(two.predicted, two.measured)

    def gpus(single: float, pair: float) -> np.ndarray:
        return np.where(rates <= CAP * single, 1, np.where(rates <= CAP * pair, 2, 3))

    return (gpus(one.predicted, two.predicted) - gpus(one.measured, two.measured)).tolist(), len(rates)


def show(scores: Sequence[Score]) -> list:
    rates = common.table(
        "Highest sustainable rate, requests a second", "held out", "predicted", "measured", "error", ""
    )
    for each in scores:
        row = f"{each.predicted:.3f}", f"{each.measured:.3f}", f"{each.error:+.1%}", each.flaw
        rates.add_row(each.case.name, *row)
    ttfa = common.table("Time to first audio p95, s, open loop", "held out", "rate", "predicted", "measured", "error")
    for each in scores:
        for rate, said, seen in each.ttfa:
            ttfa.add_row(each.case.name, f"{rate:.3f}", f"{said:.4f}", f"{seen:.4f}", f"{said / seen - 1:+.1%}")
    steps = common.table("Frame step, ms, open loop", "held out", "rate", "predicted", "measured", "error")
    for each in scores:
        for rate, said, seen in each.steps:
            row = f"{rate:.3f}", f"{1e3 * said:.2f}", f"{1e3 * seen:.2f}", f"{said / seen - 1:+.1%}"
            steps.add_row(each.case.name, *row)
    return [rates, ttfa, steps]


def main(arguments: Sequence[str]) -> int:
    parser = common.Parser(
        __doc__, "python benchmarks/capacity/heldout.py --minutes 9    # again and again, until it says all"
    )
    parser.add_argument(
        "--minutes", type=common.real(0.5, 600), default=600.0, help="stop after this long; a later start resumes"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="where the run is kept")
    options = parser.parse_args(arguments)
    deadline_s = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results" if options.quick else options.results
        lengths = (12.0, 0, 3.0) if options.quick else (20.0, 45, 8.0)
        bench = Bench(open_run(results), Path(scratch), *lengths, deadline_s)
        if not bench.measure(fit_loads(bench)):
            return unfinished()
        predicted = predictions(bench)
        if not bench.measure(held_out_loads(bench, predicted)):
            return unfinished()
        if not bench.measure(second_ladders(bench, predicted)):
            return unfinished()
        return report(score(bench, predicted), options.quick)


def open_run(results: Path) -> Run:
    content = json.dumps([MIXES, SLOS, FITTED, [vars(case) for case in CASES], stand_in.profile()], sort_keys=True)
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    if Run.is_run(results / RUN_ID):
        run = Run.open(results / RUN_ID)
        if run.manifest.plan_sha256 != sha256:
            raise InputError(f"{run.path} is of other cases: move it away, or give another folder with --results")
        return run
    manifest = RunManifest(
        run_id=RUN_ID,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        plan_path="benchmarks/capacity/heldout.py",
        plan_sha256=sha256,
        plan={"mixes": MIXES, "promises": SLOS},
        commit=commit(),
        versions=versions(),
        host=host_facts(),
        preset="tiny",
        device=f"emulated {stand_in.NAME}",
        seed=11,
        emulated=True,
    )
    return Run.create(results, manifest)


def unfinished() -> int:
    common.say("the time is up: start it again to resume")
    return common.EXIT_FAILED


def report(scores: Sequence[Score], quick: bool) -> int:
    errors = [abs(each.error) for each in scores if math.isfinite(each.error)]
    if not errors:
        raise InputError("no held-out ladder met its SLO between two rungs: nothing to compare")
    every = [abs(said / seen - 1) for each in scores for _, said, seen in each.ttfa]
    ttfa = [error for error in every if math.isfinite(error)]  # a run with few requests tells no p95
    near = [abs(said / seen - 1) for each in scores for _, said, seen in each.near_saturation()]
    near = [error if math.isfinite(error) else math.inf for error in near]
    off, rates = counts(scores)
    figures = {
        "max_rate_error_median": float(np.median(errors)),
        "max_rate_error_worst": max(errors),
        "max_rates": len(errors),
        "ttfa_p95_error_median": float(np.median(ttfa)),
        "ttfa_p95_error_worst": max(ttfa),
        "near_saturation_error_worst": max(near, default=math.inf),
        "near_saturation_runs": len(near),
        "open_loop_runs": len(every),
        "counts_exact_share": off.count(0) / rates,
        "counts_off_least": min(off),
        "counts_off_most": max(off),
        "flaws": sum(bool(each.flaw) for each in scores),
    }
    common.finish(show(scores), figures)
    good = all(figures[name] <= limit for name, limit in LIMITS.items()) and 0 <= min(off) and max(off) <= 1
    whole = len(errors) == len(CASES) and not figures["flaws"]
    return 0 if quick or (good and whole) else common.EXIT_FAILED


if __name__ == "__main__":
    common.run(main)
