"""A device whose physics are known, and the trials that it would show: truth for the tests of the capacity fits."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from harness import wire
from harness.capacity.fitting.fit import fit_run
from harness.capacity.models.device import Device
from harness.capacity.models.spreads import Sample, Spread
from harness.capacity.models.steps import StepTime
from harness.capacity.planning.plan import Terms, make_plan
from harness.capacity.planning.prediction import predict_open_run
from harness.capacity.planning.staged import Topology
from harness.capacity.simulator.sessions import Activity, simulate
from harness.records import metrics
from harness.records.fit import Fit, FittedDeployment, FittedStage, ServicePoint, Unfitted
from harness.records.load import TrialLoad
from harness.records.plan import Plan
from harness.records.schema import BatchStatistics, Chunks, Outcome, Result, Rung, StageStatistics, Trial
from harness.records.slo import Slo
from harness.traffic.mix import Lengths, Mix, TrafficClass

MIX = Mix(
    "truth",
    (
        TrafficClass("short", 0.7, Lengths.parse({"uniform": [4, 16]}), (1, 2)),
        TrafficClass("long", 0.3, Lengths.parse({"lognormal": {"median": 60, "sigma": 0.5, "max": 240}}), (2, 4)),
    ),
)
UNIT = "a device of known physics"
SECOND_NS = 1_000_000_000
ALPHA_S, TAU0_S = 0.0015, 0.004


@dataclass(frozen=True)
class Truth:
    """Step time intercept_s + slope_s n; a session spends ``prefill`` steps more before its first frame."""

    intercept_s: float = 0.012
    slope_s: float = 0.006
    prefill: float = 1.5
    jitter: float = 0.05
    rung_noise: float = 0.01

    def step_s(self, n):
        return self.intercept_s + self.slope_s * np.asarray(n, dtype=float)


def stages(batch_sizes=(1, 2, 3, 4), alpha_s=ALPHA_S, tau0_s=TAU0_S) -> tuple[StageStatistics, ...]:
    batches = tuple(BatchStatistics(b, 100, round(100e9 * (alpha_s * b + tau0_s))) for b in batch_sizes)
    return tuple(StageStatistics(stage, 1000, 400, 0, 0, batches) for stage in wire.STAGES)


def result(name: str, traffic_class: str, frames: int, times_s: np.ndarray, sent_s: float, end_s: float) -> Result:
    """A request sent at ``sent_s`` whose frames arrive at ``times_s``, looked at until ``end_s``."""
    received_ns = np.round(times_s[times_s < end_s] * 1e9).astype(np.int64)
    whole = len(received_ns) == frames
    return Result(
        request_id=name,
        traffic_class=traffic_class,
        speakers=1,
        script_words=frames,
        frames=frames,
        start_frame=0,
        chunk_frames=1,
        loop="open",
        due_ns=round(sent_s * 1e9),
        sent_ns=round(sent_s * 1e9),
        ended_ns=int(received_ns[-1]) + 1000 if whole else round(end_s * 1e9),
        outcome=Outcome.DONE if whole else Outcome.UNFINISHED,
        chunks=Chunks(received_ns, received_ns, np.full(len(received_ns), wire.SAMPLES_PER_FRAME)),
    )


def ladder(
    truth: Truth, rng: np.random.Generator, sessions=(1, 2, 4, 8, 16), seconds=6.0, name="ladder-1", results=None,
    **changes,
) -> tuple[Trial, pd.DataFrame]:  # fmt: skip
    """A closed-loop ladder; each rung has ``sessions`` users that ask again as soon as they are served.

    A rung's window opens two seconds after its users came. A list given as ``results`` gets the raw ones.
    """
    results = [] if results is None else results
    rungs, start_s = [], 1000.0
    for n in sessions:
        end_s = start_s + 2 + seconds
        step_s = float(truth.step_s(n) * rng.lognormal(0, truth.rung_noise))
        for user in range(n):
            results += _one_user(truth, f"{name}-{n}-{user}", step_s, start_s, end_s, rng)
        window = int((start_s + 2) * 1e9), int(end_s * 1e9)
        summary = metrics.summarise(results, *window)
        rungs.append(Rung(summary.sessions, summary.frames_per_s, *window, summary, stages()))
        start_s = end_s + 1
    load = TrialLoad(loop="closed", sessions=tuple(sessions), seconds=seconds, seed=1)
    trial = Trial(name, "ladder", {"delay_us": 0}, load, "", 1.0, True, (), tuple(rungs))
    return replace(trial, **changes), _rows(results, name)


def _one_user(truth: Truth, name: str, step_s: float, start_s: float, end_s: float, rng) -> list[Result]:
    results, now_s = [], start_s
    while now_s < end_s:
        draw = MIX.sample_in_progress(rng) if now_s == start_s else MIX.sample(rng)  # in steady state from the start
        frames = draw.frames - draw.phase
        gaps_s = step_s * rng.lognormal(-(truth.jitter**2) / 2, truth.jitter, frames)
        first_s = now_s + step_s * truth.prefill * rng.lognormal(0, 0.2)
        times_s = first_s + np.cumsum(gaps_s)
        results.append(result(f"{name}-{len(results)}", draw.traffic_class, frames, times_s, now_s, end_s))
        now_s = float(times_s[-1]) + 0.001
    return results


def poisson_arrivals(rate_per_s: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """Times in seconds of the first ``n`` arrivals of a Poisson process."""
    return np.cumsum(rng.exponential(1 / rate_per_s, n))


def fastest_s(topology: Topology, sessions: int) -> float:
    """Lower bound of a round of ``sessions`` sessions (without noise): what the busiest stage or the GPU needs."""
    busy = [
        sessions / min(sessions, each.max_batch) * each.time_s(min(sessions, each.max_batch))
        for each in topology.stages
    ]
    by_stage = (b / each.instances for b, each in zip(busy, topology.stages, strict=True))
    shared = sum(busy) if topology.one_gpu else max(by_stage)
    return max(shared, sum(each.alone_s() + topology.hop_s for each in topology.stages))


def open_run(
    truth: Truth, rate_per_s: float, rng: np.random.Generator, seconds=30.0, warm_up_s=10.0, name="open-1",
    results=None, **changes,
) -> tuple[Trial, pd.DataFrame]:  # fmt: skip
    """Poisson arrivals on one device, as its frame clock serves them. A list given as ``results`` gets the raw ones."""
    start_s, end_s = 5000.0, 5000.0 + warm_up_s + seconds
    due_s = start_s + poisson_arrivals(rate_per_s, int(4 * rate_per_s * (seconds + warm_up_s)) + 20, rng)
    due_s = due_s[due_s < end_s]
    draws = [MIX.sample(rng) for _ in due_s]
    frames = np.array([draw.frames for draw in draws])
    run = simulate(due_s, frames + truth.prefill, truth.step_s, stop_s=end_s)
    activity = Activity.between(run.start_s, np.nan_to_num(run.end_s, nan=end_s))
    clock = activity.integral(lambda n: np.where(n > 0, 1 / truth.step_s(n), 0.0), activity.times_s)
    results = [] if results is None else results
    for i, (draw, sent_s) in enumerate(zip(draws, due_s, strict=True)):
        ticks = np.interp(sent_s, activity.times_s, clock) + truth.prefill + np.arange(1, draw.frames + 1)
        ticks -= 1e-6  # the clock stands still while nobody is there: a last frame comes before that, not after
        times_s = np.where(ticks <= clock[-1], np.interp(ticks, clock, activity.times_s), np.inf)
        noise_s = truth.step_s(1) * truth.jitter * rng.standard_normal(len(times_s))
        times_s = np.maximum.accumulate(np.maximum(times_s + noise_s, sent_s + 0.001))
        results.append(result(f"{name}-{i}", draw.traffic_class, draw.frames, times_s, float(sent_s), end_s))
    window = int((start_s + warm_up_s) * 1e9), int(end_s * 1e9)
    summary = metrics.summarise(results, *window)
    rung = Rung(summary.sessions, summary.frames_per_s, *window, summary)
    load = TrialLoad(loop="open", arrivals="poisson", rate_per_s=rate_per_s, seconds=seconds, seed=1)
    trial = Trial(name, "open", {"delay_us": 0}, load, "", 1.0, True, (), (rung,))
    return replace(trial, **changes), _rows(results, name)


def _rows(results: list[Result], name: str) -> pd.DataFrame:
    return metrics.per_request(results).assign(trial_id=name)


TRUTH = Truth()
LADDER = (1, 2, 4, 8, 16, 24)
SLOS = (
    Slo("short", "ttfa_s", 0.95, 1.0),
    Slo("short", "rtf", 0.95, 0.9),
    Slo("long", "ttfa_s", 0.95, 1.5),
    Slo("long", "rtf", 0.95, 0.9),
)
OPTIONS = {
    "utilisation_cap": 0.85,
    "confidence": 0.95,
    "max_error": 0.25,
    "unit": UNIT,
    "preset": "tiny",
    "device": "cpu",
}


def true_device(truth: Truth = TRUTH) -> Device:
    """What a perfect fit would know: a session of x frames takes prefill + x steps, the frames alone count for RTF."""
    one = Spread(Sample.of(np.ones(100)))
    mean_frames = MIX.mean_frames()
    scale = 1 + truth.prefill / mean_frames
    step = StepTime("linear", (truth.intercept_s * scale, truth.slope_s * scale))
    rtf = Spread(Sample.of(np.full(100, 1 / scale)))
    return Device(step, 0.0, (truth.prefill + 1) / scale, one, rtf, {}, max(LADDER), ())


def fit_of(*measured, slos=SLOS, seed=1, **options) -> Fit:
    trials, frames = zip(*measured, strict=True)
    fit = fit_run(trials, pd.concat(frames), MIX, slos, np.random.default_rng(seed), UNIT, **options)
    return Fit.of(json.loads(json.dumps(fit.to_dict(), allow_nan=False)))  # as the store would give it back


def bare_fit(**known) -> FittedDeployment:
    """The fit of a deployment of which nothing else is known."""
    no = Unfitted(inconclusive="not fitted")
    empty = {"deployment": {}, "trial_ids": (), "stages": (), "stalls": {}, "binding": "", "inconclusive": ""}
    parts = {"step_time": no, "first_audio": no, "rtf": no, "scaling": no}
    return FittedDeployment(**empty | parts | {"max_rate_per_s": None, "max_rate_interval": (None, None)} | known)


def fitted_stage(name: str, **times: float) -> FittedStage:
    """A service time of ``alpha_s`` and ``tau0_s``."""
    point = ServicePoint(batch_size=1, executions=9, mean_s=0.0)
    nothing = {"alpha_interval_s": (None, None), "tau0_interval_s": (None, None), "runs_p_value": None}
    return FittedStage(stage=name, points=(point,), r_squared=1.0, worst_residual=0.0, **nothing, **times)


def fit_with(*deployments: FittedDeployment, best: int | None = None) -> Fit:
    return Fit(
        unit=UNIT,
        session_limit=None,
        extrapolation=1.0,
        traffic_seed=1,
        deployments=deployments,
        best=best,
        excluded=(),
    )


def plan_of(fit: Fit, *measured, slos=SLOS, targets=(0.5,), **options) -> Plan:
    trials, frames = zip(*measured, strict=True)
    rng = np.random.default_rng(2)
    plan = make_plan(fit, trials, pd.concat(frames), MIX, slos, targets, rng, Terms(**(OPTIONS | options)))
    return Plan.of(json.loads(json.dumps(plan.to_dict(), allow_nan=False)))


def confirmed(fit: Fit, truth: Truth, share: float, rng: np.random.Generator, **changes):
    """An open-loop run at a share of the highest rate, with its prediction."""
    best = fit.best_deployment
    rate = share * best.rate()
    prediction = predict_open_run(best, MIX, rate, 30, rng)
    return open_run(truth, rate, rng, name=f"open-{share}", prediction=prediction, **changes)
