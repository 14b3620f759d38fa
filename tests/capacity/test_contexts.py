"""Steps that depend on how long their sessions have spoken: what a ladder of long sessions is corrected for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from capacity_truth import LADDER, TRUTH, fit_of, ladder

from harness.capacity.fitting.contexts import context_cost, context_of, in_steady_state
from harness.capacity.models.steps import Rungs, fit_step_time

SESSIONS = np.array([1, 2, 4, 8, 16, 24, 32.0])
BASE_S, SESSION_S, FRAME_S, STEADY = 0.02, 0.0016, 8e-7, 4000.0


def measured(seed, ladders=1, noise=0.01, cost=FRAME_S):
    """Ladders whose sessions are at random phases; the context of each rung."""
    rng = np.random.default_rng(seed)
    sessions = np.tile(SESSIONS, ladders)
    context = np.array([rng.uniform(0, 2 * STEADY, int(n)).sum() for n in sessions])
    step_s = (BASE_S + SESSION_S * sessions + cost * context) * np.exp(noise * rng.standard_normal(len(sessions)))
    return Rungs(sessions, step_s, np.repeat(np.arange(ladders), len(SESSIONS))), context


def steady_s(n, cost=FRAME_S):
    return BASE_S + (SESSION_S + cost * STEADY) * n


def test_what_context_costs_is_found_and_rungs_are_brought_to_steady_state():
    found = []
    for seed in range(30):
        rungs, context = measured(seed, ladders=3)
        cost = context_cost(rungs, context)
        if cost is None:
            continue
        found.append(cost.frame_s / FRAME_S)
        level = in_steady_state(rungs, context, STEADY, cost)
        fit = fit_step_time(level, np.random.default_rng(0))
        assert float(fit.step_time(24)) == pytest.approx(steady_s(24), rel=0.15)
    assert len(found) > 20 and np.median(found) == pytest.approx(1, abs=0.1)


def test_no_cost_is_found_where_context_costs_nothing():
    costs = [context_cost(*measured(seed, ladders=2, noise=0.03, cost=0.0)) for seed in range(100)]
    assert sum(cost is not None for cost in costs) <= 4


def test_too_few_rungs_or_contexts_that_do_not_vary_tell_nothing():
    rungs, context = measured(1)
    few = Rungs(rungs.sessions[:4], rungs.step_s[:4], rungs.trial[:4])
    assert context_cost(few, context[:4]) is None
    assert context_cost(rungs, 100 * rungs.sessions) is None


def test_the_context_of_a_rung_is_what_its_sessions_have_spoken():
    trial, _ = ladder(TRUTH, np.random.default_rng(1), (1, 2), seconds=10)
    rung = replace(trial.rungs[0], start_ns=10_000_000_000, end_ns=20_000_000_000)
    second = 1_000_000_000
    rows = pd.DataFrame(
        {
            "sent_ns": [0, 0, 15 * second],
            "ended_ns": [30 * second, 5 * second, 25 * second],
            "first_received_ns": pd.array([0, 0, 15 * second], dtype="Int64"),
            "last_received_ns": pd.array([30 * second, 5 * second, 25 * second], dtype="Int64"),
            "start_frame": [1000, 5000, 0],
            "audio_s": [40.0, 8.0, 8.0],
        }
    )
    # the first is half way (15 of 30 s) through 300 frames; the second has ended; the third speaks for half of the rung
    half = (17.5 - 15) / 10 * 60 * 0.5
    assert context_of([rung], rows) == pytest.approx([1000 + 150 + half])


def test_a_fit_without_a_cost_of_context_says_so():
    fit = fit_of(ladder(TRUTH, np.random.default_rng(10), LADDER, seconds=15))
    assert fit.deployments[0].step_time.context_frame_s is None
