"""A run's stored records as pandas tables, for notebooks and for your own analysis.

Columns carry their unit in their name. The requests themselves are ``Run.requests()``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from harness.records.plan import Plan
from harness.records.schema import RunManifest
from harness.records.store import Run
from harness.report import decision, facts, figures, words
from harness.report.facts import SweptDeployment


def swept(run: Run) -> list[SweptDeployment]:
    """The deployments of a run, lettered as in its report."""
    return facts.deployments(run.trials(), run.requests(), run.fit(), run.plan())


def about(manifest: RunManifest) -> pd.DataFrame:
    """What was run, on what, and when: one row per fact."""
    host = [words.host_fact(name, value) for name, value in manifest.host.to_dict().items()]
    known = {
        "run": manifest.run_id,
        "plan": manifest.plan_path,
        "model": f"VibeVoice at preset {manifest.preset}",
        "device": manifest.device,
        "emulated": decision.how_emulated(manifest).replace("emulated", "yes") if manifest.emulated else "no",
        "started": manifest.created_at,
        "finished": manifest.finished_at or "not yet",
        "commit": manifest.commit,
        **{f"host: {name}": value for name, value in host},
    }
    return pd.DataFrame({"": known.values()}, index=pd.Index(known, name="fact"))


def trials(run: Run, entries: Sequence[SweptDeployment]) -> pd.DataFrame:
    """One row per trial: what was offered, what became of it, and whether it counts."""
    rows = facts.trial_rows(run, run.requests(), list(entries))
    return pd.DataFrame(
        {
            "trial": row.trial.trial_id,
            "kind": row.trial.kind,
            "on": row.letter,
            "load": row.load,
            "counts": "VALID" if row.trial.valid else "INVALID",
            **row.outcomes,
            "sent late": words.percent(row.late_sends_share, 1),
            "delivery p99 ms": row.delivery_p99_s and 1000 * row.delivery_p99_s,
            "host CPU %": row.cpu_mean_percent,
            "remarks": "; ".join(row.trial.reasons),
        }
        for row in rows
    )


def deployments(entries: Sequence[SweptDeployment]) -> pd.DataFrame:
    """One row per deployment, the fastest first: the rate that one device sustains, and its binding constraint."""
    frame = pd.DataFrame(
        {
            "deployment": entry.letter,
            "settings": words.deployment(entry.knobs),
            "requests per s": entry.fit.max_rate_per_s if entry.fit else None,
            "interval": words.interval(entry.fit.max_rate_interval if entry.fit else None),
            "bound by": words.metric_briefly((entry.fit.binding or entry.fit.inconclusive) if entry.fit else ""),
            "best": "best" if entry.best else "",
        }
        for entry in entries
    )
    return frame.sort_values("requests per s", ascending=False, ignore_index=True)


def points(entries: Sequence[SweptDeployment]) -> pd.DataFrame:
    """One row per rung of a ladder: sessions held, audio delivered, and a frame's time by stage (ms)."""
    return pd.DataFrame(
        {
            "deployment": entry.letter,
            **entry.knobs,
            "sessions": point.sessions,
            "audio_s_per_s": point.audio_s_per_s,
            "step_ms": 1000 * point.step_s,
            **{f"{words.stage(each.stage)} queue_ms": 1000 * each.queue_s for each in point.stages},
            **{f"{words.stage(each.stage)} compute_ms": 1000 * each.compute_s for each in point.stages},
            "hop_ms": None if point.hop_s is None else 1000 * point.hop_s,
            "first_audio_p50_s": point.first_audio_p50_s,
            "first_audio_p95_s": point.first_audio_p95_s,
        }
        for entry in entries
        for point in entry.points
    )


def samples(run: Run, trial_id: str) -> pd.DataFrame:
    """One row per sample of the server during a trial: seconds since the first, CPU of the host, memory."""
    own = run.samples(trial_id)
    return pd.DataFrame(
        {
            "at_s": (sample.at_ns - own[0].at_ns) / 1e9,
            "cpu_percent": sample.cpu_percent,
            "memory_gib": sample.memory_bytes / 2**30,
            "gpu_percent": _mean(gpu.percent for gpu in sample.gpus),
            "gpu_memory_gib": _total(gpu.memory_bytes for gpu in sample.gpus) / 2**30,
            "gpu_power_w": _total(gpu.power_w for gpu in sample.gpus),
        }
        for sample in own
    )


def _mean(values: Iterable[float | None]) -> float:
    told = [value for value in values if value is not None]
    return sum(told) / len(told) if told else math.nan


def _total(values: Iterable[float | None]) -> float:
    told = [value for value in values if value is not None]
    return sum(told) if told else math.nan


def targets(plan: Plan) -> pd.DataFrame:
    """One row per target rate of plan.json."""
    return pd.DataFrame(
        {
            "requests per s": target.qps,
            "devices": target.devices,
            "interval": words.interval(target.interval),
            "bound by": words.constraint(target.binding),
            "utilisation": words.percent(target.utilisation),
            "N+1": target.devices_n_plus_1,
            "N+2": target.devices_n_plus_2,
            "basis": _basis(plan, target.basis),
        }
        for target in plan.targets
    )


def validation(plan: Plan) -> pd.DataFrame:
    """One row per prediction that was compared with an open-loop trial."""
    said = {True: "passed", False: "failed", None: "not decidable"}
    return pd.DataFrame(
        {
            "trial": row.trial_id,
            "requests per s": row.rate_per_s,
            "metric": words.metric(row.metric),
            "predicted in advance": row.predicted_in_advance,
            "predicted from actual arrivals": row.predicted,
            "measured": row.measured,
            "error": words.signed_percent(figures.signed_error(row)) if words.known(row.relative_error) else "",
            "result": said[row.passed],
        }
        for row in plan.validation
    )


def surges(plan: Plan) -> pd.DataFrame:
    """One row per surge and admission policy, from plan.json's ``behaviour``."""
    return pd.DataFrame(
        {
            "surge": row.surge,
            "admitted": row.admission,
            "SLOs met": words.percent(row.within_slos_during),
            "rejected": words.percent(row.busy_during),
            "most sessions": row.most_sessions,
            "basis": _basis(plan, "extrapolated" if row.beyond_measured else "simulated"),
            "recovered after": words.recovery(row.recovered_after_s, row.watched_s),
        }
        for row in (plan.behaviour.surges if plan.behaviour else ())
    )


def sensitivity(plan: Plan) -> pd.DataFrame:
    """One row per change in plan.json's ``sensitivity``: the rate of a device, and the devices of each target."""
    return pd.DataFrame(
        {
            "change": row.change,
            "requests per s on one device": row.rate_per_device,
            **{f"devices at {each.qps:g}": each.devices for each in row.targets},
            "basis": _basis(plan, row.basis),
            "note": row.note,
        }
        for row in plan.sensitivity
    )


def _basis(plan: Plan, known: str) -> str:
    """How a figure is known: measured, extrapolated, or emulated; emulated times never count as measured."""
    if not (plan.emulated and known):
        return known
    known = plan.times_basis or known if known == "measured" else known
    return "emulated" if known == "measured" else f"{known}, emulated"
