"""One trial: deploy a point, let Locust drive it, and turn the result into a record.

A ladder holds rising numbers of sessions (closed loop), from which the physics are fitted; an open-loop run sends
Poisson arrivals at a rate, and predictions are compared with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from harness import exit_codes, wire
from harness.deploy.config import Deployment
from harness.deploy.sampler import Probe
from harness.deploy.statistics import difference
from harness.drive.host_monitor import LEADER_VARIABLE
from harness.drive.load import REQUEST_KNOBS, Load
from harness.drive.stop_rule import OVER_SATURATED, settle_s
from harness.errors import HarnessError, InputError, ServerError
from harness.host.places import SCENARIOS
from harness.host.process_group import end_group, spawn
from harness.planfile.plan import PlanSpec
from harness.records import metrics
from harness.records.load_log import Records, read_records
from harness.records.load_test import TestEnd
from harness.records.prediction import Prediction
from harness.records.schema import Outcome, Result, Rung, ServerSample, StageStatistics, Trial
from harness.records.slo import Slo
from harness.topology import TOPOLOGY, Knobs, number_of, topology_of

SCENARIO = SCENARIOS / "podcast.py"
REPEAT_SEED, SECOND_SAMPLE_SEED = 400, 1000  # added to a plan's seed: for a repeat, for each further ladder of the best
SILENCE_VARIABLE = "LOCUST_SILENCE_TIMEOUT"
_SILENCE_S = 30  # a live server sends something every few seconds, so that this detects one that hangs


def asked(point: Knobs) -> dict[str, int]:
    """The values that requests set at a point of the space."""
    return {knob: number_of(point, knob, 0) for knob in point if knob in REQUEST_KNOBS}


def deployed(base: Deployment, point: Knobs) -> Deployment:
    """The deployment at a point of the space. Raises InputError for a key that no model has."""
    knobs = {knob: value for knob, value in point.items() if knob not in (*REQUEST_KNOBS, TOPOLOGY)}
    return replace(base, topology=topology_of(point), knobs=knobs)


def trial_id(point: Knobs, load: Load, repeat: int = 0) -> str:
    """An id that is always the same for the same point and load, so that nothing is measured twice."""
    content = json.dumps([sorted(point.items()), load.record().to_dict(), repeat], sort_keys=True)
    return f"{load.kind}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class TrialRequest:
    """A trial to be run: the point to deploy, the load to drive it with, and what was predicted for it.

    ``repeat``: how often the same point and load were measured before.
    """

    point: Knobs
    load: Load
    prediction: Prediction | None = None
    repeat: int = 0

    @property
    def trial_id(self) -> str:
        return trial_id(self.point, self.load, self.repeat)

    @property
    def drawn_load(self) -> Load:
        """The load; that of a repeat has other requests and arrivals, as the same ones might fail in the same way."""
        return replace(self.load, seed=self.load.seed + self.repeat * REPEAT_SEED)


class TrialFailed(ServerError):
    """A point could not be deployed, or the server or the load generator failed during its trial."""


def failed_trial(request: TrialRequest, error: str) -> Trial:
    """The record of a failed trial: INVALID, with its reason and no rungs."""
    return Trial(
        trial_id=request.trial_id,
        kind=request.load.kind,
        deployment=request.point,
        load=request.drawn_load.record(),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_s=0.0,
        valid=False,
        reasons=(f"failed: {error}",),
        rungs=(),
        topology=topology_of(request.point),
    )


@dataclass(frozen=True)
class Measured:
    """A finished trial with its raw records."""

    trial: Trial
    results: Sequence[Result]
    samples: Sequence[ServerSample]


class Driver:
    """Runs trials of one plan on one server (``TritonServer`` or ``RemoteTriton``)."""

    def __init__(self, server, plan_path: Path, plan: PlanSpec, scratch: Path, base: Deployment):
        self.server = server
        self.plan_path = plan_path
        self.plan = plan
        self.scratch = scratch  # for the records of the running trial
        self.base = base
        self._process: subprocess.Popen | None = None  # Locust, while a trial runs
        self._aborted = False

    def deploy(self, point: Knobs) -> list[str]:
        """Deploy a point of the space on the server; returns the stages that were reloaded."""
        return self.server.reload(deployed(self.base, point))

    def run(self, request: TrialRequest) -> Measured:
        """Deploy a point, drive the load and return the record of one trial.

        Raises TrialFailed where the server or Locust failed during it, and InputError where the server permanently
        rejects what the plan asks for.
        """
        started_at, began = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
        name, load = request.trial_id, request.drawn_load
        try:
            self.deploy(request.point)
        except ServerError as error:
            raise TrialFailed(f"{name} cannot be deployed: {error}") from error
        folder = self.scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        metrics_url, clock = self.server.metrics_url, self.base.clock
        with Probe(self.server.target, self.server.pid, metrics_url=metrics_url, clock=clock) as probe:
            exit_code, output = self._locust(folder, load)
        if not self.server.alive():
            raise TrialFailed(f"the server ended during {name}")
        records, end = _records(folder, exit_code, output)
        rungs, disturbed = _rungs(records, end, probe.samples, self.plan.slo_list())
        failures = _failures(records.results)
        if failures and not self.server.responds():
            raise TrialFailed(f"the server hung during {name}: {failures[0]}")
        shutil.rmtree(folder, ignore_errors=True)
        trial = Trial(
            trial_id=name,
            kind=load.kind,
            deployment=request.point,
            load=load.record(),
            started_at=started_at,
            wall_s=round(time.monotonic() - began, 3),
            valid=end.valid and not failures,
            reasons=(*failures, *end.reasons, *filter(None, [end.ladder_ended])),
            rungs=rungs,
            prediction=request.prediction,
            over_saturated=end.ladder_ended.startswith(OVER_SATURATED),
            reader_lag_p99_s=end.lag_p99_s,
            topology=topology_of(request.point),
            disturbed=disturbed,
        )
        return Measured(trial, records.results, probe.samples)

    def _locust(self, folder: Path, load: Load) -> tuple[int, str]:
        command = [sys.executable, "-m", "locust", "-f", str(SCENARIO), "--headless", "--host", self.server.url]
        command += ["--plan", str(self.plan_path), "--records", str(folder), *load.options()]
        command += ["--stop-timeout", "0"]
        if SILENCE_VARIABLE not in os.environ:
            command += ["--silence-timeout", str(_SILENCE_S)]
        log = self.scratch / "locust.log"
        self.scratch.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, LEADER_VARIABLE: str(os.getpid())}
        self._process, self._aborted = spawn(command, log, environment=environment), False
        try:
            # a ladder may repeat as much as it measures
            code = self._process.wait(timeout=self.base.clock.host_span(2 * load.total_s) + 120)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        finally:
            end_group(self._process, grace_s=5)
        if self._aborted:  # it may have completed its records all the same
            code = -signal.SIGTERM
        return code, log.read_text(errors="replace")

    def abort(self) -> None:
        """Abort the running trial from another thread: ``run`` then raises TrialFailed."""
        if self._process is not None:
            self._aborted = True
            end_group(self._process, grace_s=5)


def _records(folder: Path, exit_code: int, output: str) -> tuple[Records, TestEnd]:
    """Read Locust's records and its last one. Raises TrialFailed where they are not those of a complete test."""
    try:
        records = read_records(folder)
    except HarnessError as error:
        raise TrialFailed(f"Locust gave no records (exit code {exit_code}): {error}\n{output[-1500:]}") from error
    refused = [result.error for result in records.results if result.error.startswith(wire.REFUSED)]
    if refused:
        words = refused[0].removeprefix(wire.REFUSED)
        raise InputError(f"the server rejects what the plan asks for, and no retry helps: {words}; change the plan")
    if exit_code not in (0, 1, exit_codes.INVALID) or records.end is None:
        raise TrialFailed(f"Locust was aborted (exit code {exit_code}): {output[-500:].strip()}")
    return records, records.end


def _failures(results: Sequence[Result]) -> tuple[str, ...]:
    """The failures of a trial. Nothing may be fitted from it then: failed requests are missing in every figure."""
    errors = [result.error for result in results if result.outcome is Outcome.ERROR]
    return (f"{len(errors)} of {len(results)} requests failed, the first with: {errors[0]}",) if errors else ()


def _rungs(
    records: Records, end: TestEnd, samples: Sequence[ServerSample], slos: Sequence[Slo]
) -> tuple[tuple[Rung, ...], tuple[Rung, ...]]:
    """The windows of a trial in which the load was held, without the time that sessions take to open.

    Those during which others took CPU are apart from the others.
    """
    asked = records.run.asked
    if not asked.sessions:
        rung = _rung(records.results, samples, end.start_ns, end.end_ns, slos)
        machine = end.machine
        shares = (machine.other_share, machine.stolen_share) if machine else (None, None)
        return (replace(rung, others_share=shares[0], stolen_share=shares[1]),), ()
    settling_ns = int(settle_s(asked.rung_s) * 1e9)
    held = [rung for rung in records.rungs if rung.end_ns - rung.start_ns > settling_ns]
    last = {rung.users: rung for rung in held}
    rungs = [
        replace(
            _rung(records.results, samples, each.start_ns + settling_ns, each.end_ns, slos),
            others_share=each.others_share,
            stolen_share=each.stolen_share,
            disturbed=each.disturbed,
            repeated=each is not last[each.users],
        )
        for each in held
    ]
    return tuple(each for each in rungs if not each.disturbed), tuple(each for each in rungs if each.disturbed)


def _rung(
    results: Sequence[Result], samples: Sequence[ServerSample], start: int, end: int, slos: Sequence[Slo]
) -> Rung:
    summary = metrics.summarise(results, start, end, slos)
    return Rung(
        sessions=summary.sessions,
        frames_per_s=summary.frames_per_s,
        start_ns=start,
        end_ns=end,
        summary=summary,
        stages=_stages(samples, start, end),
    )


def _stages(samples: Sequence[ServerSample], start: int, end: int) -> tuple[StageStatistics, ...]:
    inside = [sample for sample in samples if start <= sample.at_ns <= end]
    return difference(inside[-1].stages, inside[0].stages) if len(inside) > 1 else ()
