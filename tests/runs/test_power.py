"""The watts of a run's device: only its own GPUs, under valid load of the planned deployment, are measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from run_manifest import MANIFEST

from harness.identity import GPU, StageIdentity
from harness.records.load import TrialLoad
from harness.records.schema import GpuSample, ServerSample, StageRecord, Trial
from harness.records.store import Run
from harness.runs.power import ESTIMATED, MEASURED, watts_of

PLANNED, OTHER = {"delay_us": 0}, {"delay_us": 5000}
STAGES = tuple(StageIdentity(model, "0", GPU, "cuda:0", "NVIDIA L4", "GPU-a") for model in ("vibevoice_lm", "decoder"))
ON_A_GPU = replace(
    MANIFEST,
    run_id="run",
    host=replace(MANIFEST.host, gpu="NVIDIA L4"),
    device="NVIDIA L4",
    stages=tuple(StageRecord("localhost:8001", "staged", each) for each in STAGES),
)


def sampled(own, other=300.0):
    """A sample of a host with two GPUs, of which the device has one."""
    return ServerSample(1, (), gpus=(GpuSample("GPU-a", power_w=own), GpuSample("GPU-b", power_w=other)))


def run_of(tmp_path, *trials, **changes):
    """A run with trials, each (watts of the device's GPU, deployment, whether it is VALID)."""
    run = Run.create(tmp_path, replace(ON_A_GPU, **changes))
    for number, (own, deployment, valid) in enumerate(trials):
        load = TrialLoad(loop="closed", sessions=(1,), seconds=1, seed=1)
        trial = Trial(f"trial-{number}", "ladder", deployment, load, "2026-01-01T00:00:00", 1.0, valid, (), ())
        run.append_trial(trial, [], [sampled(own), sampled(own and own + 10)])
    return run


def test_only_the_gpus_of_the_device_count(tmp_path):
    assert watts_of(run_of(tmp_path, (50.0, PLANNED, True)), 1, PLANNED) == (55.0, MEASURED)


def test_invalid_trials_and_other_deployments_do_not_count(tmp_path):
    run = run_of(tmp_path, (50.0, PLANNED, True), (70.0, PLANNED, False), (71.0, OTHER, True))
    assert watts_of(run, 1, PLANNED) == (55.0, MEASURED)
    assert watts_of(run, 1, {"delay_us": 1}) == (72.0, ESTIMATED)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"emulated": True, "device": "emulated NVIDIA L4"}, (72.0, ESTIMATED)),
        ({"device": "cpu", "stages": ()}, (None, "")),
        ({"stages": ()}, (72.0, ESTIMATED)),
    ],
)
def test_gauges_of_a_host_whose_gpus_did_not_serve_are_no_measurement(tmp_path, changes, found):
    assert watts_of(run_of(tmp_path, (50.0, PLANNED, True), **changes), 1, PLANNED) == found


def test_a_gauge_that_is_missing_is_not_zero(tmp_path):
    assert watts_of(run_of(tmp_path, (None, PLANNED, True)), 1, PLANNED) == (72.0, ESTIMATED)
