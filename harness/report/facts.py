"""What the report shows, derived from a run's stored records: points, time to first audio, trials, evidence."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pandas as pd

from harness import wire
from harness.capacity.fitting.fit import CONFIDENCE
from harness.capacity.fitting.observations import MIN_STARTS
from harness.capacity.planning.prediction import flaw_of
from harness.records.fit import Fit, FittedDeployment
from harness.records.metrics import begun
from harness.records.plan import Plan
from harness.records.prediction import Prediction
from harness.records.schema import Outcome, Rung, RunManifest, ServerSample, Trial
from harness.records.seal import Evidence
from harness.records.slo import Slo
from harness.records.store import Run
from harness.report import words
from harness.topology import EVERY_STAGE, Knobs

REPORT_NAME = "signoff.html"
SEAL_NAME = "signoff.json"
SIGNATURE_NAME = "signoff.json.sig"
SWEEP_NAME = "sweep.html"
PAPER_NAMES = ("signoff.pdf", "sweep.pdf")  # the pages as PDF
VALID_DAYS = 90  # for a plan that does not say


@dataclass(frozen=True)
class StageShare:
    """Mean seconds that one frame spent in one stage, queued and being computed."""

    stage: str
    queue_s: float
    compute_s: float


@dataclass(frozen=True)
class Point:
    """One rung of a ladder: the load that was held, its frame step time and its time to first audio."""

    trial_id: str
    valid: bool
    sessions: float
    frames_per_s: float
    step_s: float
    stages: tuple[StageShare, ...]
    first_audio_p50_s: float | None
    first_audio_p95_s: float | None
    first_audio_count: int

    @property
    def hop_s(self) -> float | None:
        """Seconds of a frame's step that are neither queue nor compute time of a stage."""
        parts_s = sum(share.queue_s + share.compute_s for share in self.stages)
        return max(0.0, self.step_s - parts_s) if self.stages else None

    @property
    def real_time_factor(self) -> float:
        return self.step_s * wire.FRAMES_PER_SECOND

    @property
    def audio_s_per_s(self) -> float:
        return self.frames_per_s / wire.FRAMES_PER_SECOND


@dataclass(frozen=True)
class SweptDeployment:
    """One deployment of the sweep: its letter, its name, its ladder and its fit (or none)."""

    letter: str
    name: str
    knobs: Knobs
    points: tuple[Point, ...]
    best: bool
    fit: FittedDeployment | None

    @property
    def label(self) -> str:
        return f"{self.letter}: {self.name}"


@dataclass(frozen=True)
class TrialRow:
    """One trial as listed. ``delivery_p99_s``: p99 from the server's timestamp of a chunk to its receipt."""

    trial: Trial
    letter: str
    load: str
    outcomes: dict[str, int]
    cpu_mean_percent: float | None
    cpu_max_percent: float | None
    memory_bytes: int | None
    late_sends_share: float | None
    reader_lag_p99_s: float | None
    delivery_p99_s: float | None


@dataclass(frozen=True)
class ClassRow:
    """The requests sent of one traffic class: count, share, mean requested length in seconds, and speakers."""

    traffic_class: str
    requests: int
    share: float
    mean_asked_s: float
    speakers: str


@dataclass(frozen=True)
class StoredPrediction:
    """When the prediction of an open-loop trial was made, how long before the trial, and its SHA-256.

    ``flaw``: why the prediction does not count, or "".
    """

    trial_id: str
    made_at: str
    before_s: float
    sha256: str
    flaw: str


def is_signed(run: Run) -> bool:
    """Whether the run holds a signed answer, whose evidence must not change any more."""
    return (run.path / SEAL_NAME).exists()


def expires_at(manifest: RunManifest) -> datetime | None:
    """When the answer of a finished run expires."""
    if not manifest.finished_at:
        return None
    days = VALID_DAYS if manifest.valid_days is None else manifest.valid_days
    return datetime.fromisoformat(manifest.finished_at) + timedelta(days=days)


def rate_confidence(fit: Fit | None) -> float:
    """The confidence level of the rate intervals in a fit."""
    return fit.confidence if fit else CONFIDENCE


def predictions(run: Run, trials: Sequence[Trial]) -> list[StoredPrediction]:
    """One for each trial with a prediction; older runs have none, since their predictions lack time and hash."""
    written = run.predictions()
    return [
        _stored_prediction(trial, trial.prediction, written)
        for trial in trials
        if trial.prediction and (written or trial.prediction.sha256)
    ]


def _stored_prediction(trial: Trial, prediction: Prediction, written: Mapping[str, Prediction]) -> StoredPrediction:
    before = written.get(trial.trial_id, prediction)
    made_at, sha256 = prediction.made_at or before.made_at, prediction.sha256 or before.sha256
    began = datetime.fromisoformat(trial.started_at)
    before_s = (began - datetime.fromisoformat(made_at)).total_seconds() if made_at else math.nan
    return StoredPrediction(trial.trial_id, made_at, before_s, sha256, flaw_of(prediction, trial, written))


def key(knobs: Knobs) -> str:
    return json.dumps(knobs, sort_keys=True)


def deployments(
    trials: Sequence[Trial], requests: pd.DataFrame, fit: Fit | None, plan: Plan | None
) -> list[SweptDeployment]:
    """Every deployment that has a trial, in the order of its first; the best is that of the fit, otherwise of the plan.

    ``requests`` as Run.requests() gives them.
    """
    distinct = list({key(trial.deployment): trial.deployment for trial in trials}.values())
    best = _best(fit, plan)
    fits = {key(each.deployment): each for each in (fit.deployments if fit else ())}
    return [
        SweptDeployment(
            letter=words.letters(index),
            name=name,
            knobs=knobs,
            points=_points([t for t in trials if t.kind == "ladder" and t.deployment == knobs], requests),
            best=knobs == best,
            fit=fits.get(key(knobs)),
        )
        for index, (knobs, name) in enumerate(zip(distinct, words.name_deployments(distinct), strict=True))
    ]


def _best(fit: Fit | None, plan: Plan | None) -> Knobs | None:
    if fit and fit.best_deployment:
        return fit.best_deployment.deployment
    return plan.deployment if plan else None


def _points(trials: list[Trial], requests: pd.DataFrame) -> tuple[Point, ...]:
    points = [
        _point(trial, number, requests[requests["trial_id"] == trial.trial_id])
        for trial in trials
        for number, rung in enumerate(trial.rungs)
        if rung.frames_per_s > 0
    ]
    return tuple(sorted(points, key=lambda point: point.sessions))


def _point(trial: Trial, number: int, requests: pd.DataFrame) -> Point:
    rung = trial.rungs[number]
    first_audio_s = _first_audio_s(trial, number, requests)
    p50, p95 = first_audio_s.quantile([0.5, 0.95]).tolist() if len(first_audio_s) else (None, None)
    return Point(
        trial_id=trial.trial_id,
        valid=trial.valid,
        sessions=rung.sessions,
        frames_per_s=rung.frames_per_s,
        step_s=rung.sessions / rung.frames_per_s,
        stages=stage_shares(rung),
        first_audio_p50_s=p50,
        first_audio_p95_s=p95,
        first_audio_count=len(first_audio_s),
    )


def _first_audio_s(trial: Trial, number: int, requests: pd.DataFrame) -> pd.Series:
    """TTFA in seconds of requests that started in a rung's window.

    With fewer than 8 of them (long sessions): of requests that started since the end of the previous rung.
    """
    before_ns = trial.rungs[number - 1].end_ns if number else 0
    until = begun(requests[requests["due_ns"] < trial.rungs[number].end_ns])
    inside = until.loc[until["due_ns"] >= trial.rungs[number].start_ns, "ttfa_s"].dropna()
    return inside if len(inside) >= MIN_STARTS else until.loc[until["due_ns"] >= before_ns, "ttfa_s"].dropna()


def stage_shares(rung: Rung) -> tuple[StageShare, ...]:
    """Seconds of one request in each stage of the frame path: Triton's sums over the window / its requests."""
    counted = {statistics.stage: statistics for statistics in rung.stages if statistics.requests > 0}
    return tuple(
        StageShare(stage, found.queue_ns / found.requests / 1e9, found.compute_ns / found.requests / 1e9)
        for stage in EVERY_STAGE
        if (found := counted.get(stage)) is not None
    )


def stages_shown(shares: Iterable[StageShare]) -> tuple[str, ...]:
    """The stages of the frame path of every topology that was measured; of the staged topology if none was."""
    fused = [share.stage == wire.ENGINE for share in shares]
    staged = not fused or not all(fused)
    return (*(wire.STAGES if staged else ()), *((wire.ENGINE,) if any(fused) else ()))


def shares_of(swept: Iterable[SweptDeployment]) -> Iterator[StageShare]:
    """Each stage's share of a frame in every window."""
    return (share for entry in swept for point in entry.points for share in point.stages)


def trial_rows(run: Run, requests: pd.DataFrame, swept: list[SweptDeployment]) -> list[TrialRow]:
    """Every trial in the order of its run; ``requests`` as Run.requests() gives them."""
    letters = {key(entry.knobs): entry.letter for entry in swept}
    return [
        _trial_row(trial, letters[key(trial.deployment)], requests, run.samples(trial.trial_id))
        for trial in run.trials()
    ]


def _trial_row(trial: Trial, letter: str, requests: pd.DataFrame, samples: list[ServerSample]) -> TrialRow:
    counts = requests.loc[requests["trial_id"] == trial.trial_id, "outcome"].value_counts()
    cpu = [sample.cpu_percent for sample in samples]
    return TrialRow(
        trial=trial,
        letter=letter,
        load=load_words(trial),
        outcomes={str(outcome): int(counts.get(str(outcome), 0)) for outcome in Outcome},
        cpu_mean_percent=sum(cpu) / len(cpu) if cpu else None,
        cpu_max_percent=max(cpu, default=None),
        memory_bytes=max((sample.memory_bytes for sample in samples), default=None),
        late_sends_share=_worst(trial, "late_sends_share"),
        reader_lag_p99_s=trial.reader_lag_p99_s,
        delivery_p99_s=_worst(trial, "lateness_p99_s"),
    )


def _worst(trial: Trial, name: str) -> float | None:
    """The highest value of a summary's figure over the windows of a trial."""
    values = [rung.summary.figure(name) for rung in trial.rungs]
    return max((value for value in values if words.known(value)), default=None)


def load_words(trial: Trial) -> str:
    """The load of a trial as text: a ladder's rungs, or a rate and its arrival process."""
    load, each = trial.load, ""
    if load.sessions:
        said, each = f"{', '.join(map(words.figure, load.sessions))} sessions", " each"
    elif load.rate_per_s is not None:
        said = f"{words.figure(load.rate_per_s)} requests/s, {load.arrivals}"
    else:
        said = load.arrivals or "the given number of users"
    return said if load.seconds is None else f"{said}; {words.figure(load.seconds)} s{each}"


def slos(manifest: RunManifest, plan: Plan | None) -> list[Slo]:
    """The SLOs in plan.json; without one, those of the plan file stored in the manifest."""
    return list(plan.slos) if plan and plan.slos else manifest.slos


def audio_shares(plan: Plan | None) -> str:
    """Audio offered in the open-loop runs, as shares of their mix's average: "76% to 92%", "" if there are none."""
    valid = [run for run in (plan.open_runs if plan else ()) if run.valid]
    shares = [
        run.offered_audio_s_per_s / run.nominal_audio_s_per_s for run in valid if run.offered_audio_s_per_s is not None
    ]
    said = list(dict.fromkeys(words.percent(share) for share in (min(shares), max(shares)))) if shares else []
    return " to ".join(said)


def traffic(requests: pd.DataFrame) -> tuple[list[ClassRow], str]:
    """The classes as sent, and the trials they are from: the open-loop ones if there are any."""
    if requests.empty:
        return [], ""
    open_loop = requests[requests["loop"] == "open"]
    kind, sent = ("open-loop trials", open_loop) if len(open_loop) else ("ladder trials", requests)
    rows = [_class_row(str(name), group, len(sent)) for name, group in sent.groupby("traffic_class")]
    return rows, kind


def _class_row(name: str, group: pd.DataFrame, total: int) -> ClassRow:
    fewest, most = int(group["speakers"].min()), int(group["speakers"].max())
    whole_frames = group["start_frame"] + group["frames"]
    return ClassRow(
        traffic_class=name,
        requests=len(group),
        share=len(group) / total,
        mean_asked_s=float(whole_frames.mean()) / wire.FRAMES_PER_SECOND,
        speakers=str(fewest) if fewest == most else f"{fewest} to {most}",
    )


def evidence(folder: Path) -> list[Evidence]:
    """The files of a run that the report is made from, without locks, temporary files, the pages and the seal."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        Evidence(path.relative_to(folder).as_posix(), path.stat().st_size, file_sha256(path))
        for path in paths
        if path.name not in (REPORT_NAME, SEAL_NAME, SIGNATURE_NAME, SWEEP_NAME, *PAPER_NAMES)
        and not path.name.startswith(".")
        and path.suffix not in (".lock", ".tmp")
    ]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
