"""Stand-ins for Triton and Locust under a sign-off, and the small plan of its tests."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from capacity_truth import bare_fit, fit_with

from harness import signoff as job
from harness import wire
from harness.identity import StageIdentity
from harness.records.prediction import Prediction
from harness.records.schema import Trial
from harness.sweep import campaign
from harness.sweep.trial import Measured
from harness.topology import topology_of

ROOT = Path(__file__).resolve().parents[1]
PLAN = """
name: small
preset: tiny
seed: 3
mix: quick
slos: {short: {ttfa_p95_s: 2.0}, long: {rtf_p95: 0.9}}
targets_qps: [0.5, 2]
space: {diffusion_decoder.delay_us: [0, 1000, 2000]}
ladder: {sessions: [1, 2], seconds: 2}
confirm: {load_share: [0.5], seconds: 5}
budget_minutes: 30
"""


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return path


class FakeServer:
    url, pid = "127.0.0.1:1", None
    running = True
    stages = (StageIdentity(wire.LLM, "llm@0", "cpu", "cpu", dtype="float32", preset="tiny"),)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def alive(self):
        return self.running

    def stop(self):
        pass

    def start(self):
        return self


class FakeDriver:
    """Stands where Triton and Locust are: makes trials without rungs, and breaks when told to."""

    measured: list[str] = []
    break_after = None
    valid = True

    def __init__(self, server, plan_path, plan, scratch, base):
        self.server, self.scratch = server, scratch

    def run(self, request):
        if self.break_after is not None and len(self.measured) >= self.break_after:
            raise KeyboardInterrupt
        point, load = request.point, request.load
        self.measured.append(request.trial_id)
        about = "2026-01-01T00:00:00", 1.0, self.valid, (), (), request.prediction
        trial = Trial(request.trial_id, load.kind, point, load.record(), *about)
        trial = dataclasses.replace(trial, topology=topology_of(point))
        return Measured(trial, (), ())


@pytest.fixture
def fakes(monkeypatch):
    return stand_in(monkeypatch, FakeDriver)


def stand_in(monkeypatch, driver):
    """Sign-offs measure with this driver, as if anew, and start nothing."""
    FakeDriver.measured, FakeDriver.break_after, FakeDriver.valid = [], None, True
    monkeypatch.setattr(job, "Driver", driver)
    monkeypatch.setattr(job, "TritonServer", lambda base: FakeServer())
    monkeypatch.setattr(job, "compiled_beside", lambda: nullcontext(SimpleNamespace(wait=lambda: 0)))
    return driver


def predicted_at(rate_per_s):
    return Prediction(rate_per_s=rate_per_s, seconds=30.0, sessions=2.0, frames_per_s=20.0, step_s=0.1)


@pytest.fixture
def fitted(fakes, monkeypatch):
    """Fits without physics: who looks best, and at what rate, after so many ladders of a second look."""

    def arrange(best_of, rate_of=lambda looks: 1.0):
        def fit(run):
            ladders = [trial for trial in run.trials() if trial.kind == "ladder"]
            looks = sum(trial.load.seed > 1000 for trial in ladders)
            points = list({str(trial.deployment): trial.deployment for trial in ladders}.values())
            fits = (bare_fit(deployment=point, max_rate_per_s=rate_of(looks)) for point in points)
            return fit_with(*fits, best=best_of(looks))

        monkeypatch.setattr(campaign, "fit_of", fit)
        monkeypatch.setattr(campaign.Campaign, "_further_rungs", lambda self, best, ours: self.spec.ladder.sessions)
        monkeypatch.setattr(campaign, "predict_open_run", lambda best, mix, rate, *_: predicted_at(rate))
        monkeypatch.setattr(job.SignOff, "_conclude", lambda self, watcher: {})

    return arrange
