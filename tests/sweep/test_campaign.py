"""The rungs of the further ladders of a campaign, from a stored fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from capacity_truth import LADDER, TRUTH, fit_of, ladder

from harness.deploy.config import Deployment
from harness.planfile.reading import load_plan
from harness.runs.opening import open_run
from harness.sweep.campaign import Campaign
from harness.sweep.search import Search
from harness.sweep.trial import REPEAT_SEED

PLAN = """
name: small
preset: tiny
seed: 3
mix: quick
slos: {short: {rtf_p95: 0.9}, long: {rtf_p95: 0.9}}
targets_qps: [0.5]
space: {delay_us: [0]}
ladder: {sessions: [1, 2, 4, 8, 16, 24], seconds: 2}
"""
SEED = 1003


@pytest.fixture
def campaign(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    spec, base = load_plan(path), Deployment("tiny")
    return Campaign(spec, Search(spec, base), open_run(path, spec, tmp_path, None))


def fitted(campaign, times):
    """Store the fit of a deployment whose steps are ``times`` as long; returns the deployment."""
    truth = replace(TRUTH, intercept_s=TRUTH.intercept_s * times, slope_s=TRUTH.slope_s * times)
    fit = fit_of(ladder(truth, np.random.default_rng(5), LADDER, deployment={"diffusion_decoder.delay_us": 0}))
    campaign.run.write_fit(fit)
    return fit.deployments[0]


def measured(campaign, load, best, valid=True):
    trial = ladder(TRUTH, np.random.default_rng(1), LADDER)[0]
    name = f"ladder-{load.seed}"
    trial = replace(trial, trial_id=name, deployment=best.deployment, load=load.record(), valid=valid, rungs=())
    campaign.run.append_trial(trial, (), ())


def test_a_further_ladder_has_a_rung_at_the_limit_of_the_slos(campaign):
    best = fitted(campaign, 1.5)
    added = set(campaign._further_load(best, SEED, ours=True).sessions) - set(LADDER)
    assert len(added) == 1 and 1 < added.pop() < 24 and "p95" in best.binding


def test_it_goes_on_where_no_slo_was_violated_and_only_where_the_server_is_ours(campaign):
    best = fitted(campaign, 0.2)
    assert campaign._further_load(best, SEED, ours=True).sessions == (*LADDER, 36, 54)
    assert campaign._further_load(best, SEED, ours=False).sessions == LADDER


def test_it_never_holds_more_sessions_than_the_server_admits(campaign):
    best = fitted(campaign, 0.2)
    campaign.search.base = replace(campaign.search.base, parameters={"vibevoice_full_pipeline.sessions_at_once": 40})
    assert campaign._further_load(best, SEED, ours=True).sessions == (*LADDER, 36, 40)


@pytest.mark.parametrize("repeat", [0, 1])
def test_after_a_restart_it_has_the_same_rungs_whatever_the_fit_says_now(campaign, repeat):
    best = fitted(campaign, 1.5)
    load = campaign._further_load(best, SEED, ours=True)
    measured(campaign, replace(load, seed=SEED + repeat * REPEAT_SEED), best, valid=False)
    again = fitted(campaign, 0.2)
    assert campaign._further_load(again, SEED, ours=True) == load
    assert campaign._further_load(again, SEED + 1000, ours=True).sessions == (
        *LADDER,
        36,
        54,
    )  # the third: as known now


def test_where_a_further_ladder_left_no_best_deployment_the_next_one_has_the_rungs_of_the_plan(campaign):
    best = fitted(campaign, 1.5)
    campaign.run.write_fit(replace(campaign.run.fit(), best=None))
    assert campaign._further_load(best, SEED, ours=True).sessions == LADDER


def test_the_budget_reserves_the_longest_further_ladders(campaign):
    rung_s = campaign.spec.ladder.seconds
    plain_s = campaign._estimated_s(campaign._ladder_load({}, 0))
    assert campaign.further_ladders_s() == pytest.approx(2 * (plain_s + 2 * rung_s + 20))


def test_dilated_time_reserves_the_longest_confirmation_and_no_repeat(campaign):
    seconds = campaign.spec.confirm.seconds
    assert campaign.confirm_s() == 2 * (1.5 + seconds + 12)
    campaign.run.update_manifest(dilation=10.0)
    assert campaign.confirm_s() == 10 * (1.5 + 3 * seconds) + 12
    assert campaign.least_s() == campaign._estimated_s(campaign._ladder_load({}, 0)) + campaign.later_s()
