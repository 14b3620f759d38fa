"""A synthetic run for the tests of the report: six deployments, three open-loop trials, a fit and a plan."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from harness import wire
from harness.identity import HostFacts
from harness.records import metrics
from harness.records.fit import Fit
from harness.records.load import TrialLoad
from harness.records.plan import Plan
from harness.records.prediction import Prediction
from harness.records.schema import (
    BatchStatistics,
    Chunks,
    Outcome,
    Result,
    Rung,
    RunManifest,
    ServerSample,
    StageStatistics,
    Trial,
)
from harness.records.store import Run
from harness.records.summary import Summary

SESSIONS = (1, 2, 4, 8, 16)
SERVICE_S = {wire.LLM: (0.0011, 0.0036), wire.DIFFUSION: (0.0016, 0.0052), wire.VOCODER: (0.0013, 0.0029)}
UNIT = "this host (2 CPU cores) at preset tiny"
TARGETS = (0.5, 1.0, 5.0, 20.0)
RATE_PER_S, RATE_INTERVAL = 1.42, (1.18, 1.66)
SECOND_NS = 1_000_000_000


def space() -> list[dict]:
    """The six deployments: three delays of every stage, times one or two diffusion instances."""
    return [
        {f"{stage}.delay_us": delay for stage in wire.STAGES} | {f"{wire.DIFFUSION}.instances": instances}
        for delay, instances in product((0, 5_000, 25_000), (1, 2))
    ]


def stage_seconds(deployment: dict, sessions: float) -> dict[str, tuple[float, float]]:
    """Queue and compute seconds of one frame in each stage."""
    seconds = {}
    for stage, (alpha_s, tau0_s) in SERVICE_S.items():
        instances = deployment.get(f"{stage}.instances", 1)
        compute_s = alpha_s * sessions / instances**0.3 + tau0_s
        queue_s = deployment[f"{stage}.delay_us"] / 1e6 + 0.25 * compute_s * (1 - 1 / sessions)
        seconds[stage] = (queue_s, compute_s)
    return seconds


def step_seconds(deployment: dict, sessions: float) -> float:
    parts_s = sum(queue_s + compute_s for queue_s, compute_s in stage_seconds(deployment, sessions).values())
    return parts_s + 0.0012 + 0.00045 * sessions


def stage_statistics(deployment: dict, sessions: float, frames: int) -> tuple[StageStatistics, ...]:
    batch = max(1, round(sessions * 0.8))
    executions = max(1, frames // batch)
    return tuple(
        StageStatistics(
            stage,
            frames,
            executions,
            round(queue_s * frames * 1e9),
            round(compute_s * frames * 1e9),
            (BatchStatistics(batch, executions, round(compute_s * executions * 1e9)),),
        )
        for stage, (queue_s, compute_s) in stage_seconds(deployment, sessions).items()
    )


def speak(request_id: str, loop: str, due_ns: int, end_ns: int, step_s: float, rng: np.random.Generator) -> Result:
    """One request whose frames come ``step_s`` apart, cut off at ``end_ns``."""
    long = rng.random() < 0.3
    frames = int(rng.integers(300, 900)) if long else int(rng.integers(30, 120))
    first_s = (0.030 + 2.5 * step_s) * rng.lognormal(0, 0.2)
    sent_ns = due_ns + int(rng.integers(100_000, 900_000))
    gaps_s = step_s * rng.lognormal(0, 0.05, frames - 1)
    left_ns = due_ns + np.round(np.concatenate([[first_s], first_s + np.cumsum(gaps_s)]) * 1e9).astype(np.int64)
    left_ns = left_ns[left_ns < end_ns]
    whole = len(left_ns) == frames
    chunks = Chunks(left_ns + 400_000, left_ns, np.full(len(left_ns), wire.SAMPLES_PER_FRAME))
    return Result(
        request_id=request_id,
        traffic_class="long" if long else "short",
        speakers=int(rng.integers(2, 5)) if long else int(rng.integers(1, 3)),
        script_words=frames * 24 // 60,
        frames=frames,
        start_frame=0,
        chunk_frames=1,
        loop=loop,
        due_ns=due_ns,
        sent_ns=sent_ns,
        ended_ns=int(chunks.received_ns[-1]) + 200_000 if whole else end_ns + 500_000,
        outcome=Outcome.DONE if whole else Outcome.UNFINISHED,
        chunks=chunks,
    )


def rung_of(deployment: dict, sessions: float, start_ns: int, end_ns: int, rng: np.random.Generator) -> Rung:
    step_s = step_seconds(deployment, sessions) * rng.lognormal(0, 0.015)
    frames_per_s = sessions / step_s
    frames = round(frames_per_s * (end_ns - start_ns) / 1e9)
    return Rung(sessions, frames_per_s, start_ns, end_ns, Summary(), stage_statistics(deployment, sessions, frames))


def _summarised(rung: Rung, results: list[Result]) -> Rung:
    return replace(rung, summary=metrics.summarise(results, rung.start_ns, rung.end_ns))


def samples_between(start_ns: int, end_ns: int, load: float, rng: np.random.Generator) -> list[ServerSample]:
    return [
        ServerSample(at_ns, (), float(np.clip(rng.normal(100 * load, 3), 0, 100)), 1_600_000_000)
        for at_ns in range(start_ns, end_ns, SECOND_NS)
    ]


def ladder_trial(index: int, deployment: dict, rng: np.random.Generator):
    """A ladder of five rungs of six seconds, with its results and samples."""
    start_ns = (1_000 + 40 * index) * SECOND_NS
    rungs, results = [], []
    for step, sessions in enumerate(SESSIONS):
        open_ns = start_ns + step * 7 * SECOND_NS
        close_ns = open_ns + 6 * SECOND_NS
        rung = rung_of(deployment, float(sessions), open_ns, close_ns, rng)
        rungs.append(rung)
        for slot in range(sessions):
            due_ns, turn = open_ns + slot * 1_000_000, 0
            while due_ns < close_ns:
                step_s = sessions / rung.frames_per_s
                result = speak(f"l{index}-{sessions}-{slot}-{turn}", "closed", due_ns, close_ns, step_s, rng)
                results.append(result)
                due_ns, turn = result.ended_ns + 1_000_000, turn + 1
    rungs = [_summarised(rung, results) for rung in rungs]
    trial = Trial(
        trial_id=f"ladder-{index + 1:02d}",
        kind="ladder",
        deployment=deployment,
        load=TrialLoad(loop="closed", sessions=SESSIONS, seconds=6, seed=1 + index),
        started_at=f"2025-01-31T09:{10 + index:02d}:05+00:00",
        wall_s=38.4,
        valid=True,
        reasons=(),
        rungs=tuple(rungs),
    )
    return trial, results, samples_between(start_ns, start_ns + 34 * SECOND_NS, 0.88, rng)


PREDICTION = Prediction(rate_per_s=0.8, seconds=30, sessions=5.8, frames_per_s=90.0, step_s=5.8 / 90.0)


def open_trial(index: int, deployment: dict, rate_per_s: float, valid: bool, rng: np.random.Generator):
    """Thirty seconds of Poisson arrivals, with the prediction that was stored before it."""
    start_ns = (2_000 + 40 * index) * SECOND_NS
    end_ns = start_ns + 30 * SECOND_NS
    sessions = 1 + 6 * rate_per_s
    rung = rung_of(deployment, sessions, start_ns, end_ns, rng)
    due_ns = start_ns + np.cumsum(rng.exponential(1 / rate_per_s, 200)) * 1e9
    results = [
        speak(f"o{index}-{n}", "open", int(due), end_ns, sessions / rung.frames_per_s, rng)
        for n, due in enumerate(due_ns[due_ns < end_ns])
    ]
    rung = _summarised(rung, results)
    trial = Trial(
        trial_id=f"open-{index + 1:02d}",
        kind="open",
        deployment=deployment,
        load=TrialLoad(loop="open", arrivals="poisson", rate_per_s=rate_per_s, seconds=30, seed=11 + index),
        started_at=f"2025-01-31T09:{16 + index:02d}:30+00:00",
        wall_s=32.1,
        valid=valid,
        reasons=() if valid else ("3.1% of sends were later than 5 ms (limit 1%)",),
        rungs=(rung,),
        prediction=PREDICTION,
        reader_lag_p99_s=0.0021,
    )
    return trial, results, samples_between(start_ns, end_ns, 0.75, rng)


def stage_fit(stage: str, deployment: dict, rng: np.random.Generator) -> dict:
    alpha_s, tau0_s = SERVICE_S[stage]
    alpha_s = alpha_s / deployment.get(f"{stage}.instances", 1) ** 0.3
    points = [
        {"batch_size": b, "executions": 400 // b, "mean_s": (alpha_s * b + tau0_s) * float(rng.lognormal(0, 0.03))}
        for b in (1, 2, 3, 6, 8, 13)
    ]
    return {
        "stage": stage,
        "alpha_s": alpha_s,
        "tau0_s": tau0_s,
        "alpha_interval_s": [alpha_s * 0.94, alpha_s * 1.07],
        "tau0_interval_s": [tau0_s * 0.9, tau0_s * 1.12],
        "r_squared": 0.9963,
        "worst_residual": 0.03,
        "runs_p_value": None,
        "points": points,
        "inconclusive": "",
    }


def step_fit(deployment: dict) -> dict:
    points = [
        {"sessions": n, "step_s": step, "low_s": step * 0.96, "high_s": step * 1.05}
        for n in SESSIONS
        for step in (step_seconds(deployment, n),)
    ]
    return {
        "intercept_s": points[0]["step_s"] - 0.006,
        "slope_s": 0.006,
        "kind": "linear",
        "values": [points[0]["step_s"] - 0.006, 0.006],
        "knots": [],
        "r_squared": 0.994,
        "noise": 0.02,
        "max_sessions": 16.0,
        "points": points,
        "draws": [],
        "inconclusive": "",
    }


def deployment_fit(index: int, deployment: dict, rng: np.random.Generator) -> dict:
    rate_per_s = RATE_PER_S * (1.0, 0.97, 0.86, 0.84, None, None)[index] if index < 4 else None
    return {
        "deployment": deployment,
        "trial_ids": [f"ladder-{index + 1:02d}"],
        "stages": [stage_fit(stage, deployment, rng) for stage in wire.STAGES],
        "step_time": step_fit(deployment),
        "first_audio": {"inconclusive": "too few requests"},
        "rtf": {"inconclusive": "too few requests"},
        "stalls": {},
        "scaling": {"inconclusive": "too few rungs"},
        "max_rate_per_s": rate_per_s,
        "max_rate_interval": list(RATE_INTERVAL) if rate_per_s else [None, None],
        "binding": "rtf p95 of class long",
        "inconclusive": "" if rate_per_s else "The SLO ttfa p95 of class short fails at one session already.",
    }


def fit_record(rng: np.random.Generator, verdict: str = "met") -> dict:
    """fit.json: the best is the first deployment; none where no capacity could be fitted."""
    deployments = [deployment_fit(index, point, rng) for index, point in enumerate(space())]
    terms = {"schema": 1, "unit": UNIT, "session_limit": None, "extrapolation": 1.0, "traffic_seed": 1, "excluded": []}
    return terms | {"deployments": deployments, "best": None if verdict == "missed" else 0}


def target_record(qps: float, verdict: str) -> dict:
    if verdict == "missed":
        nothing = dict.fromkeys(("devices", "utilisation", "headroom_qps", "devices_n_plus_1", "devices_n_plus_2"))
        nothing |= {"interval": [None, None], "basis": "measured", "note": "No rate keeps it."}
        return nothing | {"qps": qps, "binding": "ttfa p95 of class short"}
    devices = int(np.ceil(qps / (0.85 * RATE_PER_S)))
    return {
        "qps": qps,
        "devices": devices,
        "interval": [int(np.ceil(qps / (0.85 * rate))) for rate in reversed(RATE_INTERVAL)],
        "binding": "rtf p95 of class long",
        "utilisation": qps / (devices * RATE_PER_S),
        "headroom_qps": devices * 0.85 * RATE_PER_S - qps,
        "devices_n_plus_1": devices + 1,
        "devices_n_plus_2": devices + 2,
        "basis": "extrapolated" if qps > 5 else "measured",
        "note": "Needs more devices than were run together." if qps > 5 else "",
    }


def validation_record(verdict: str) -> list[dict]:
    rows = []
    for trial, rate in enumerate((0.71, 0.99, 1.21), start=1):
        for metric, predicted, error in (
            ("rtf p95 of class long", 0.31 + 0.2 * rate, -0.06 * trial),
            ("ttfa p95 of class short", 0.11 + 0.08 * rate, 0.05 * trial),
        ):
            error = 0.41 if verdict == "inconclusive" and trial == 3 else error
            rows.append(
                {
                    "trial_id": f"open-{trial:02d}",
                    "rate_per_s": rate,
                    "metric": metric,
                    "said_before": 1.3 * predicted,
                    "predicted": predicted,
                    "predicted_interval": [0.9 * predicted, 1.1 * predicted],
                    "measured": predicted / (1 + error),
                    "relative_error": error,
                    "limit": 0.25,
                    "passed": abs(error) <= 0.25,
                    "note": "",
                }
            )
    return rows


def open_run_records(verdict: str) -> list[dict]:
    """plan.json's ``open_runs``: the last is INVALID where the verdict is inconclusive."""
    runs = []
    for trial, rate in enumerate((0.71, 0.99, 1.21), start=1):
        valid = verdict == "met" or trial < 3
        runs.append(
            {
                "trial_id": f"open-{trial:02d}",
                "own": True,
                "valid": valid,
                "rate_per_s": rate,
                "seconds": 30,
                "nominal_audio_s_per_s": 20 * rate,
                "offered_audio_s_per_s": (14 + 2 * trial) * rate,
                "promises": slo_judgements() if valid else [],
                "passed": True if valid else None,
                "note": "" if valid else "INVALID: 3.1% of sends were later than 5 ms (limit 1%)",
            }
        )
    return runs


def slo_judgements() -> list[dict]:
    slo = {"traffic_class": "short", "quantile": 0.95}
    return [
        slo | {"metric": "ttfa_s", "limit": 1.0, "measured": 0.2, "requests": 80, "met": True},
        slo | {"metric": "rtf", "limit": 0.9, "measured": 0.4, "requests": 30, "met": None},
    ]


REASONS = {
    "met": [],
    "missed": ["ttfa p95 of class short is above 1.0 s at every rate, also with one session alone."],
    "inconclusive": [
        "The prediction missed the open-loop trial open-03 by 41% (limit 25%). Measure 60 s more at 1.21 requests/s."
    ],
}


def plan_record(verdict: str = "met") -> dict:
    return {
        "schema": 1,
        "verdict": verdict,
        "reasons": REASONS[verdict],
        "unit": UNIT,
        "preset": "tiny",
        "device": "cpu",
        "emulated": False,
        "confidence": 0.95,
        "deployment": space()[0],
        "promises": [
            {"traffic_class": "short", "metric": "ttfa_s", "quantile": 0.95, "limit": 1.0},
            {"traffic_class": "short", "metric": "rtf", "quantile": 0.95, "limit": 0.9},
            {"traffic_class": "long", "metric": "ttfa_s", "quantile": 0.95, "limit": 1.5},
            {"traffic_class": "long", "metric": "rtf", "quantile": 0.95, "limit": 0.9},
        ],
        "rate_per_device": {
            "value": None if verdict == "missed" else RATE_PER_S,
            "interval": [None, None] if verdict == "missed" else list(RATE_INTERVAL),
            "binding": "ttfa p95 of class short" if verdict == "missed" else "rtf p95 of class long",
            "max_sessions_measured": 16,
        },
        "targets": [target_record(qps, verdict) for qps in TARGETS],
        "drain": None if verdict == "missed" else {"sessions": 9, "p50_s": 61.0, "p95_s": 205.0},
        "validation": [] if verdict == "missed" else validation_record(verdict),
        "open_runs": [] if verdict == "missed" else open_run_records(verdict),
    }


def outlook_record() -> dict:
    """What a plan of today holds besides: costs, losses, sensitivity, forecast, and behaviour under surges."""
    plan = plan_record()
    cost = {"cost_per_hour": 10.0, "cost_per_audio_hour": 0.137, "cost_per_audio_hour_interval": [0.11, 0.17]}
    loss = {"lost": 1, "devices": 5, "kept": False, "worst": "rtf p95 of class long", "interrupted": 8}
    loss |= {"worst_share": 1.72, "early_share": None, "judged_s": 960.0, "basis": "extrapolated"}
    changed = {"change": "sessions 20% longer", "basis": "simulated", "note": "", "rate_per_device": 1.2}
    unknown = {"change": "half the delay", "basis": "", "note": "the deployment has no delay", "rate_per_device": None}
    months = {"months_until_too_small": 2.31, "months_until_too_small_n_plus_1": None}
    growth = months | {"months_until_fleet_too_small": 0.0, "devices_after_months": {"3": 6, "6": 8, "12": None}}
    return plan | {
        "targets": [each | cost | {"losses": [loss]} for each in plan["targets"]],
        "costs": {"device_type": "H100", "price_per_device_hour": 2.5, "currency": "EUR", "basis": "given"},
        "drain": plan["drain"] | {"longest_s": 310.0, "basis": "simulated"},
        "sensitivity": [
            changed | {"change": "as planned", "targets": [{"qps": qps, "devices": 5} for qps in TARGETS]},
            changed | {"targets": [{"qps": qps, "devices": 7} for qps in TARGETS]},
            unknown | {"targets": [{"qps": qps, "devices": None} for qps in TARGETS]},
        ],
        "forecast": {
            "growth_per_month": 0.1,
            "fleet": 9,
            "most_devices": 100_000,
            "basis": "extrapolated",
            "targets": [growth | {"qps": qps} for qps in TARGETS],
        },
        "behaviour": behaviour_record(),
    }


def behaviour_record() -> dict:
    """Two surges, each with two ways to let callers in; with one of them SLOs are never kept again."""
    at_s = [60.0 * part for part in range(-5, 20)]
    rows = [
        {
            "surge": surge,
            "times": 2,
            "lasts_s": 900.0,
            "admission": admission,
            "in_promise_before": 1.0,
            "in_promise_during": 0.61,
            "in_promise_worst": 0.5,
            "busy_during": 0.38,
            "most_sessions": 36.0 if recovered_s == 0 else 577.0,
            "recovered_after_s": recovered_s,
            "watched_s": 18_000.0,
            "beyond_measured": recovered_s is None,
            "parts": {
                "at_s": at_s,
                "rate": [2.0 if 0 <= at < 900 else 1.0 for at in at_s],
                "in_promise": [0.61 if 0 <= at < 900 else 1.0 for at in at_s],
                "sessions": [20.0] * len(at_s),
            },
        }
        for surge in ("twice the load", "an impulse")
        for admission, recovered_s in (("all are admitted", None), ("the rest are rejected", 0.0))
    ]
    return {
        "basis": "simulated",
        "qps": 5.0,
        "devices": 5,
        "session_limit": 36,
        "line": 64,
        "patience_s": 30.0,
        "hold_s": 900.0,
        "part_s": 60.0,
        "max_sessions_measured": 48.0,
        "surges": rows,
        "ninety": {"sessions": 36, "p50_s": 2700.0, "p95_s": 3000.0, "longest_s": 9000.0},
    }


def manifest(**changes) -> RunManifest:
    whole = RunManifest(
        run_id="quick-20250131-091000",
        created_at="2025-01-31T09:10:00+00:00",
        plan_path="scenarios/quick.yaml",
        plan_sha256="5f" * 32,
        plan={
            "name": "quick",
            "preset": "tiny",
            "seed": 1,
            "mix": {"name": "quick", "classes": {}, "chunk_frames": 1},
            "promises": {"short": {"ttfa_p95_s": 1.0, "rtf_p95": 0.9}, "long": {"ttfa_p95_s": 1.5, "rtf_p95": 0.9}},
            "targets_qps": list(TARGETS),
            "space": {"delay_us": [0, 5000, 25000], "diffusion_decoder.instances": [1, 2]},
            "ladder": {"sessions": list(SESSIONS), "seconds": 6},
        },
        commit="0123456789abcdef0123456789abcdef01234567",
        versions={"python": "3.11.2", "tritonserver": "2.51.0", "torch": "2.11.0", "harness": "0.1.0"},
        host=HostFacts(cpu="AMD EPYC 7B13", cores=2, memory_gib=7.8, gpu="none"),
        preset="tiny",
        device="cpu",
        seed=1,
        finished_at="2025-01-31T09:19:12+00:00",
    )
    return replace(whole, **changes)


@functools.cache
def trials_of(verdict: str, seed: int) -> tuple[list, dict]:
    """The trials of a run, each with its results and samples; and the state of the generator after them."""
    rng = np.random.default_rng(seed)
    trials = [ladder_trial(index, deployment, rng) for index, deployment in enumerate(space())]
    if verdict != "missed":
        valid = (True, True, verdict == "met")
        trials += [
            open_trial(index, space()[0], rate, valid[index], rng) for index, rate in enumerate((0.71, 0.99, 1.21))
        ]
    return trials, rng.bit_generator.state


def make_run(root: Path, verdict: str = "met", *, seed: int = 1, fit=True, plan=True, **changes) -> Run:
    """A whole run on disk; ``fit`` and ``plan`` may be left out or given as content, ``changes`` go to the manifest."""
    run, rng = Run.create(root, manifest(**changes)), np.random.default_rng()
    trials, rng.bit_generator.state = trials_of(verdict, seed)
    for trial in trials:
        run.append_trial(*trial)
    if fit:
        run.write_fit(Fit.of(fit if isinstance(fit, dict) else fit_record(rng, verdict)))
    if plan:
        run.write_plan(Plan.of(plan if isinstance(plan, dict) else plan_record(verdict)))
    return run
