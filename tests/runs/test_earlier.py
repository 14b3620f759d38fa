"""What earlier runs in a results folder say of how far ladders differ on this host."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from capacity_truth import TRUTH, bare_fit, fit_of, fit_with, ladder
from run_manifest import MANIFEST

from harness.capacity.models.between_ladders import ASSUMED
from harness.identity import HostFacts
from harness.records.store import Run
from harness.runs.earlier import between_of_earlier_runs, prior_of


def fit_of_ladders(*times):
    """Of a deployment whose ladders differ by these factors."""
    rng = np.random.default_rng(5)
    truths = (replace(TRUTH, intercept_s=TRUTH.intercept_s * each, slope_s=TRUTH.slope_s * each) for each in times)
    return fit_of(*(ladder(truth, rng, name=f"ladder-{number}") for number, truth in enumerate(truths)))


@pytest.fixture(scope="module")
def fitted():
    """On a host that varies more than is assumed."""
    return fit_of_ladders(0.7, 1.0, 1.4)


def run_of(results, name, fit, **changes):
    run = Run.create(results, replace(MANIFEST, run_id=name, **({"finished_at": "2026-01-02"} | changes)))
    if fit:
        run.write_fit(fit)
    return run


def test_a_host_on_which_ladders_differed_much_is_taken_to_vary_more(tmp_path, fitted):
    run_of(tmp_path, "first", fitted)
    learnt = between_of_earlier_runs(tmp_path, MANIFEST)
    found = fitted.best_deployment.step_time.between
    assert (learnt.deviation, learnt.degrees) == pytest.approx((found.deviation, found.degrees))
    assert learnt.runs == ("first",) and learnt.deviation > 1.5 * ASSUMED.deviation
    run_of(tmp_path, "second", fitted)
    both = between_of_earlier_runs(tmp_path, MANIFEST)
    assert both.degrees == ASSUMED.degrees + 4 and both.deviation > learnt.deviation


def test_ladders_that_agreed_within_minutes_do_not_narrow_what_is_assumed(tmp_path):
    run_of(tmp_path, "first", fit_of_ladders(1.0, 1.0, 1.0))
    assert between_of_earlier_runs(tmp_path, MANIFEST) is None


def test_many_runs_count_no_more_than_a_few(tmp_path, fitted):
    for number in range(12):
        run_of(tmp_path, f"run-{number}", fitted)
    assert between_of_earlier_runs(tmp_path, MANIFEST).degrees == 12


def test_what_a_run_had_learnt_from_others_does_not_count_twice(tmp_path, fitted):
    run_of(tmp_path, "first", fitted)
    learnt = between_of_earlier_runs(tmp_path, MANIFEST)
    again = fit_with(bare_fit(step_time=fitted.best_deployment.step_time, max_rate_per_s=1.0), best=0)
    run_of(tmp_path, "second", again, between_ladders=learnt)  # as if it had found nothing beyond it
    assert between_of_earlier_runs(tmp_path, MANIFEST) == learnt


@pytest.mark.parametrize(
    "changes",
    [
        {"finished_at": ""},
        {"preset": "1.5b"},
        {"device": "the Triton at 10.0.0.1:8001"},
        {"emulated": True},
        {"host": HostFacts(cpu="EPYC", cores=4, memory_gib=24.0, gpu="none")},
    ],
)
def test_runs_elsewhere_or_without_an_end_say_nothing(tmp_path, fitted, changes):
    run_of(tmp_path, "other", fitted, **changes)
    assert between_of_earlier_runs(tmp_path, MANIFEST) is None


def test_what_stages_reported_of_a_device_does_not_keep_runs_apart(tmp_path, fitted):
    at = "the Triton at 10.0.0.1:8001"
    run_of(tmp_path, "first", fitted, device=f"{at} (H100)")
    assert between_of_earlier_runs(tmp_path, replace(MANIFEST, device=at)).runs == ("first",)
    run_of(tmp_path / "gpus", "first", fitted, device="2 NVIDIA H100")
    assert between_of_earlier_runs(tmp_path / "gpus", replace(MANIFEST, device="NVIDIA H100")).runs == ("first",)


def test_copies_of_a_run_say_nothing(tmp_path, fitted):
    run_of(tmp_path, "first", fitted).path.rename(tmp_path / "sample-quick")
    assert between_of_earlier_runs(tmp_path, MANIFEST) is None


def test_runs_without_an_answer_and_damaged_ones_say_nothing(tmp_path, fitted):
    assert between_of_earlier_runs(tmp_path / "none", MANIFEST) is None
    run_of(tmp_path, "unfitted", None)
    run_of(tmp_path, "no-best", fit_with(bare_fit()))
    damaged = run_of(tmp_path, "damaged", fitted)
    (damaged.path / "fit.json").write_text("{")
    assert between_of_earlier_runs(tmp_path, MANIFEST) is None


def test_a_run_keeps_what_it_began_with(tmp_path, fitted):
    run_of(tmp_path, "first", fitted)
    learnt = between_of_earlier_runs(tmp_path, MANIFEST)
    stored = Run.open(run_of(tmp_path, "second", None, between_ladders=learnt).path).manifest
    assert stored.between_ladders == learnt and prior_of(stored).deviation == learnt.deviation
    assert prior_of(MANIFEST) == ASSUMED
