"""The decision as text: verdict, answer, what was and was not measured; from the stored plan and trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from harness.capacity.models.device import slo_name
from harness.clock import HOST
from harness.records.estimate import VERDICT
from harness.records.plan import JudgedSlo, Plan, PlannedTarget
from harness.records.schema import RunManifest, Trial
from harness.report import words
from harness.report.facts import SweptDeployment


@dataclass(frozen=True)
class FirstScreen:
    """The texts of the report's first screen."""

    verdict: str  # met | missed | inconclusive | planning estimate | none
    symbol: str
    title: str
    answer: str
    basis: str  # of the figure in the answer: measured | extrapolated | ""
    reasons: tuple[str, ...]


TITLES = {
    "met": ("✓", "Met: every SLO can be met at every target"),
    "missed": ("✕", "Missed: no measured deployment meets the SLOs at any rate"),
    "inconclusive": ("?", "Inconclusive: the measurements do not suffice for a decision yet"),
    VERDICT: (
        "≈",
        "Planning estimate: no GPU was measured; every SLO can be met at every target if its times are true",
    ),
    "none": ("–", "No decision: this run holds no capacity plan yet"),
}


def unit(manifest: RunManifest, plan: Plan | None) -> str:
    """What one device is, as text: the plan's own words, otherwise from the manifest."""
    if plan and plan.unit:
        return plan.unit
    if manifest.device == "cpu":
        cores = manifest.host.cores
        return f"this host{f' ({cores} CPU cores)' if cores else ''} at preset {manifest.preset}"
    return f"one {manifest.device} at preset {manifest.preset}"


def decide(manifest: RunManifest, plan: Plan | None) -> FirstScreen:
    verdict = plan.verdict if plan else "none"
    symbol, title = TITLES[verdict]
    target = plan.headline() if plan else None
    return FirstScreen(
        verdict=verdict,
        symbol=symbol,
        title=title,
        answer=_answer(verdict, plan, target, unit(manifest, plan)),
        basis=target.basis if target and verdict != "missed" else "",
        reasons=plan.reasons if plan else (),
    )


def _answer(verdict: str, plan: Plan | None, target: PlannedTarget | None, device: str) -> str:
    if plan is None:
        return "No device count was computed from the records of this run yet; harness plan does that."
    if verdict == "missed":
        binding = words.binding(plan.rate_per_device.binding)
        return f"No number of devices helps: at any rate of requests, {device} violates the SLO on {binding}."
    if target is None:
        return "No device count can be given for any target from what was measured."
    said = _target_sentence(target, plan.confidence, plan.gpus_per_device)
    if verdict == VERDICT:
        return f"Estimated: at {said}"
    return f"At {said}" if verdict == "met" else f"Not signed off. Best estimate so far: at {said}"


def _target_sentence(target: PlannedTarget, confidence: float, gpus: int) -> str:
    """A target's answer as a sentence. ``gpus``: GPUs per device; above 1 the sentence counts both."""
    in_gpus = f" ({(target.devices or 0) * gpus} GPUs)" if gpus > 1 else ""
    return (
        f"{words.plural(target.qps, 'request')} per second of this mix: "
        f"{words.plural(target.devices, 'device')}{in_gpus}, "
        f"{words.level(confidence)} interval {words.interval(target.interval)}; "
        f"bound by {words.binding(target.binding)}."
    )


def measured(swept: Sequence[SweptDeployment], trials: Sequence[Trial], requests: pd.DataFrame) -> list[str]:
    """What was measured, in sentences with figures; ``requests`` as Run.requests() gives them."""
    ladders = [trial for trial in trials if trial.kind == "ladder"]
    opened = [trial for trial in trials if trial.kind == "open"]
    points = [point for entry in swept for point in entry.points]
    said = []
    if points:
        most = max(point.sessions for point in points)
        said.append(
            f"{words.plural(len(swept), 'deployment')}, each under a ladder of steady load: "
            f"{words.plural(len(points), 'window')} in {words.plural(len(ladders), 'trial')}, "
            f"up to {words.plural(most, 'session')} at once."
        )
    if opened:
        rates = ", ".join(words.figure(trial.load.rate_per_s) for trial in opened)
        predicted = sum(trial.prediction is not None for trial in opened)
        said.append(
            f"{words.plural(len(opened), 'open-loop trial')} at {rates} requests/s, arrivals independent of responses; "
            f"before {words.figure(predicted)} of them a prediction was stored."
        )
    if len(requests):
        minutes = words.figure(requests["audio_s"].sum() / 60)
        said.append(f"{words.plural(len(requests), 'request')} in all, {minutes} minutes of audio delivered.")
    invalid = sum(not trial.valid for trial in trials)
    if invalid:
        said.append(
            f"{words.plural(invalid, 'trial')} failed a gate and were not used for capacity (listed as INVALID)."
        )
    return said or ["Nothing: this run holds no finished trial."]


def not_measured(manifest: RunManifest, trials: Sequence[Trial], plan: Plan | None) -> list[str]:
    """What the measurements do not cover, in sentences."""
    said = []
    if untested := _untested(plan):
        names = ", ".join(words.metric(name) for name in untested)
        said.append(
            f"Too few open-loop requests to test: {names}. There the answer rests on the ladders and the simulation."
        )
    if not any(trial.kind == "open" for trial in trials):
        said.append("Open-loop load: no trial with open-loop arrivals checked the predictions.")
    if manifest.preset == "tiny":
        said.append(
            "The full-size model: preset tiny runs the same graph at a small size, so its figures say nothing "
            "about presets 1.5b or 7b."
        )
    if manifest.device == "cpu":
        said.append("Any accelerator: the figures are those of a CPU host.")
    said += [
        "Several devices side by side: counts above one are computed from one device, as a pool.",
        "KV memory at its limit: the room for sessions is computed from the server's limit and their lengths, and was "
        "not filled.",
        "The step time against the length of the context: a session costs the same from first frame to last.",
        "Failures: the loss, the restart and the drain of a device under load. N+1, N+2 and the drain are computed, "
        "not rehearsed.",
        "The steadiness of single windows: rungs of a ladder are not tested for it one by one, nor are open-loop "
        "windows that are short against their requests (the trial then says so).",
        "Any network between client and server other than the one of this run.",
        "Load far above the targets (twice and five times), ramps, impulses and the recovery from them: at most "
        "simulated from what was fitted.",
        "The quality of the speech.",
    ]
    return said


def _untested(plan: Plan | None) -> list[str]:
    """The SLOs that no open-loop run of the planned deployment shows to be met, or predicted within the limit."""
    if plan is None:
        return []
    own = {run.trial_id: run for run in plan.open_runs if run.own and run.passed}
    predictions = {row.metric for row in plan.validation if row.trial_id in own and row.passed}
    judged = [slo for run in own.values() for slo in run.slos]
    kept = {_name(slo) for slo in judged if slo.met}
    return [name for name in dict.fromkeys(map(_name, judged)) if name not in predictions | kept]


def _name(slo: JudgedSlo) -> str:
    return slo_name(slo.traffic_class, slo.metric, slo.quantile)


def computed(manifest: RunManifest, plan: Plan | None) -> list[str]:
    """What was emulated or extrapolated, in sentences."""
    said = []
    if is_emulated(manifest, plan):
        said.append("EMULATED: service times were emulated, not those of the real device; so is every figure here.")
        if manifest.clock != HOST:
            said.append(
                f"TIME DILATED {manifest.clock.dilation:g} TIMES: everything ran so much slower than its figures say, "
                "and what this host took of every step is divided by it."
            )
        if manifest.times_basis:
            said.append(
                f"{manifest.times_basis.upper()}: nobody has measured the emulated device; its times come from "
                "its data sheet and the model's shapes."
            )
    else:
        said.append("Nothing was emulated.")
    beyond = [target for target in (plan.targets if plan else ()) if target.basis == "extrapolated"]
    if plan and beyond:
        rates = ", ".join(words.figure(target.qps) for target in beyond)
        most = plan.rate_per_device.max_sessions_measured
        limit = f" At most {words.plural(most, 'session')} at once were measured on one device." if most else ""
        said.append(f"EXTRAPOLATED: the device counts at {rates} requests/s.{limit}")
    elif plan:
        said.append(
            "No device count of a target was extrapolated: each lies within the loads measured. What else reaches "
            "beyond them (changes, growth, surges, devices lost) is marked so where it stands."
        )
    return said


def how_emulated(manifest: RunManifest) -> str:
    """How the times of an emulated run came about: "emulated", or with its time dilation."""
    slower = "" if manifest.clock == HOST else f", time dilated {manifest.clock.dilation:g} times"
    return f"emulated{slower}"


def is_emulated(manifest: RunManifest, plan: Plan | None) -> bool:
    return manifest.emulated or bool(plan and plan.emulated)
