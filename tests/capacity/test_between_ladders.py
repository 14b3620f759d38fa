"""Ladders that differ as a whole, rungs that were disturbed, and the best of many: what each does to the step time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from capacity_truth import LADDER, TRUTH, bare_fit, fit_of, ladder
from hypothesis import given
from hypothesis import strategies as st

from harness.capacity.fitting.observations import MeasuredRequests, observe
from harness.capacity.fitting.slow_rungs import slow_rungs, without
from harness.capacity.fitting.winner import selection_bias
from harness.capacity.models.between_ladders import ALIKE, ASSUMED, Between
from harness.capacity.models.steps import Rungs, StepTime, align, comparable, fit_step_time
from harness.errors import InconclusiveError

SESSIONS = np.array([1, 4, 8, 16, 24, 36, 48.0])


def line(sessions):
    return 0.02 + 0.005 * sessions


def knee(sessions):
    return 0.04 + 0.001 * sessions + 0.03 * np.maximum(sessions - 20, 0)


def rungs_of(*factors, step=line, noise=0.0, seed=0, sessions=SESSIONS):
    """Ladders of one deployment, each with a factor of its own."""
    rng = np.random.default_rng(seed)
    steps = [step(sessions) * each * np.exp(noise * rng.standard_normal(len(sessions))) for each in factors]
    trial = np.repeat(np.arange(len(factors)), len(sessions))
    return Rungs(np.tile(sessions, len(factors)), np.concatenate(steps), trial)


def slower(rungs, row, times):
    steps = rungs.step_s.copy()
    steps[row] *= times
    return replace(rungs, step_s=steps)


def interval(fit, sessions=24):
    return np.quantile([float(each(sessions)) for each in fit.alternatives()], [0.025, 0.975])


# --- between ladders


@given(st.lists(st.floats(0.5, 2), min_size=1, max_size=5), st.booleans())
def test_ladders_are_brought_to_one_level_whatever_their_factors(factors, knees):
    rungs = rungs_of(*factors, step=knee if knees else line)
    aligned, found = align(rungs)
    assert found == pytest.approx(np.array(factors) / np.exp(np.mean(np.log(factors))), rel=1e-6)
    level = (knee if knees else line)(rungs.sessions) * np.exp(np.mean(np.log(factors)))
    assert aligned.step_s == pytest.approx(level, rel=1e-6)


def test_ladders_that_ended_early_are_aligned_by_the_rungs_that_they_have():
    whole, short = rungs_of(1.0), rungs_of(1.2, sessions=SESSIONS[:4])
    parts = [np.concatenate([getattr(whole, name), getattr(short, name)]) for name in ("sessions", "step_s")]
    _, factors = align(Rungs(*parts, np.array([0] * 7 + [1] * 4)))
    assert factors[1] / factors[0] == pytest.approx(1.2, rel=0.02)


def test_intervals_cover_the_truth_although_every_ladder_has_a_factor_of_its_own():
    rng, runs = np.random.default_rng(7), 120
    for ladders in (1, 2, 3):
        held = 0
        for seed in range(runs):
            rungs = rungs_of(*np.exp(0.1 * rng.standard_normal(ladders)), noise=0.01, seed=seed)
            low, high = interval(fit_step_time(rungs, rng))
            held += low <= line(24) <= high
        assert held / runs >= 0.9, ladders


def test_more_ladders_narrow_the_interval_and_those_that_agree_more():
    widths = [
        np.ptp(np.log(interval(fit_step_time(rungs_of(*[1.0] * n), np.random.default_rng(0))))) for n in (1, 2, 3)
    ]
    assert widths == sorted(widths, reverse=True) and widths[2] < 0.5 * widths[0]
    apart = fit_step_time(rungs_of(0.8, 1.0, 1.25), np.random.default_rng(0))
    assert np.ptp(np.log(interval(apart))) > 1.5 * widths[2]
    alike = fit_step_time(rungs_of(1.0), np.random.default_rng(0), prior=ALIKE)
    assert np.ptp(np.log(interval(alike))) < 1e-6


def test_what_ladders_differ_by_is_learnt_from_those_that_were_repeated():
    assert ASSUMED.with_ladders(np.array([0.3])) == ASSUMED
    quiet = ASSUMED.with_ladders(np.zeros(3))
    assert quiet.deviation == pytest.approx(0.1 * math.sqrt(4 / 6)) and quiet.degrees == 6
    many = Between(0.1, 4).with_ladders(np.random.default_rng(0).normal(0, 0.02, 400))
    assert many.deviation == pytest.approx(0.02, rel=0.15)
    assert ASSUMED.reach(1, 0.95) == pytest.approx(2.776 * 0.1, rel=1e-3)
    assert ASSUMED.reach(3, 0.95) == pytest.approx(2.776 * 0.1 / math.sqrt(3), rel=1e-3)


def test_ladders_without_a_common_rung_do_not_show_that_they_are_alike():
    first, second = rungs_of(1.0, sessions=np.array([1.0, 8, 24])), rungs_of(1.0, sessions=np.array([4.0, 16, 48]))
    apart = Rungs(*(np.concatenate(both) for both in zip(
        (first.sessions, first.step_s, first.trial), (second.sessions, second.step_s, second.trial + 1), strict=True
    )))  # fmt: skip
    assert len(set(comparable(apart))) == 2
    assert fit_step_time(apart, np.random.default_rng(0)).between == ASSUMED
    linked = Rungs(*(np.append(*each) for each in (
        (apart.sessions, [1.0, 4.0]), (apart.step_s, line(np.array([1.0, 4.0]))), (apart.trial, [2, 2])
    )))  # fmt: skip
    assert len(set(comparable(linked))) == 1
    assert fit_step_time(linked, np.random.default_rng(0)).between.degrees == ASSUMED.degrees + 2


def test_the_ladder_that_chose_the_best_says_nothing_of_its_level():
    rungs = rungs_of(0.8, 1.0, 1.0)  # the first was the fastest of many
    fit = fit_step_time(rungs, np.random.default_rng(0), not_of_the_level=0)
    assert float(fit.step_time(24)) == pytest.approx(line(24), rel=1e-6) and fit.ladders == 2
    with_it = fit_step_time(rungs, np.random.default_rng(0))
    assert float(with_it.step_time(24)) < 0.95 * line(24)


def test_the_best_of_equal_deployments_is_not_faster_than_they_are():
    rng, over = np.random.default_rng(3), []
    for _ in range(60):
        rates = np.exp(0.1 * rng.standard_normal(6))
        fits = [bare_fit(max_rate_per_s=rate, trial_ids=("ladder",)) for rate in rates]
        over.append(rates.max() / selection_bias(fits, int(np.argmax(rates)), ASSUMED, rng))
    assert np.mean(over) == pytest.approx(1.0, abs=0.05)
    again = [bare_fit(max_rate_per_s=2.0, trial_ids=("a", "b")), bare_fit(max_rate_per_s=1.9, trial_ids=("c",))]
    assert selection_bias(again, 0, ASSUMED, rng) == 1
    apart = [bare_fit(max_rate_per_s=2.0, trial_ids=("a",)), bare_fit(max_rate_per_s=0.5, trial_ids=("c",))]
    assert selection_bias(apart, 0, ASSUMED, rng) == pytest.approx(1, abs=0.02)


# --- slow rungs


@pytest.mark.parametrize("row", range(1, 7))
@pytest.mark.parametrize("times", [1.25, 3, 100])
def test_one_disturbed_rung_is_found_and_left_out(row, times):
    rungs = slower(rungs_of(1.0, noise=0.01), row, times)
    slow = slow_rungs(rungs)
    assert [each.at for each in slow] == [row]
    assert slow[0].times == pytest.approx(times, rel=0.06)
    fit = fit_step_time(without(rungs, slow), np.random.default_rng(0), prior=ALIKE)
    assert float(fit.step_time(24)) == pytest.approx(line(24), rel=0.05)


def test_a_disturbed_last_rung_ends_what_is_known_unless_other_ladders_have_it():
    alone = slower(rungs_of(1.0), 6, 1.25)
    assert without(alone, slow_rungs(alone)).sessions.max() == 36
    with_others = slower(rungs_of(1.0, 1.1, 0.9), 6, 1.25)
    assert [each.at for each in slow_rungs(with_others)] == [6]
    assert without(with_others, slow_rungs(with_others)).sessions.max() == 48


@pytest.mark.parametrize("step", [line, knee, lambda n: 0.04 + 0.02 * np.ceil(n / 8), lambda n: 0.02 * np.sqrt(n)])
@pytest.mark.parametrize("ladders", [1, 3])
def test_no_rung_of_an_undisturbed_ladder_is_slow(step, ladders):
    for seed in range(20):
        factors = np.exp(0.1 * np.random.default_rng(seed).standard_normal(ladders))
        assert slow_rungs(rungs_of(*factors, step=step, noise=0.02, seed=seed)) == []


def test_a_rise_that_every_ladder_shows_is_real():
    rising = rungs_of(1.0, 1.05, step=lambda n: line(n) * np.where(n > 40, 1.4, 1))
    assert slow_rungs(rising) == []
    one = rungs_of(1.0, step=lambda n: line(n) * np.where(n > 40, 1.4, 1))
    assert [each.at for each in slow_rungs(one)] == [6]


def test_rungs_that_scatter_by_more_than_a_quarter_are_refused():
    wild = rungs_of(1.0, 1.0, 1.0, noise=0.5, seed=4)
    with pytest.raises(InconclusiveError, match="scatter by .* on a host that nothing else uses"):
        fit_step_time(wild, np.random.default_rng(0))
    falling = rungs_of(1.0, step=lambda n: np.where(n < 20, 10.0, 0.1))
    with pytest.raises(InconclusiveError, match="scatter"):
        fit_step_time(falling, np.random.default_rng(0))
    fit_step_time(rungs_of(1.0, step=knee), np.random.default_rng(0))  # a bend is not noise


def test_a_left_out_rung_is_named_and_its_requests_do_not_count():
    trial, rows = ladder(TRUTH, np.random.default_rng(10), LADDER, seconds=15)
    rung = trial.rungs[3]
    inside = (rows["sent_ns"] < rung.end_ns) & (rows["ended_ns"] >= rung.start_ns)
    disturbed = replace(rung, frames_per_s=rung.frames_per_s / 5)
    rungs = tuple(disturbed if each is rung else each for each in trial.rungs)
    slow_rows = rows.assign(rtf=rows["rtf"].mask(inside, 5 * rows["rtf"]))
    fit, quiet = fit_of((replace(trial, rungs=rungs), slow_rows)), fit_of((trial, rows))
    (excluded,) = fit.excluded
    assert excluded.trial_id == trial.trial_id
    assert "rung 4 (" in excluded.reasons[0] and "times as long as the other rungs" in excluded.reasons[0]
    assert fit.deployments[0].max_rate_per_s == pytest.approx(quiet.deployments[0].max_rate_per_s, rel=0.12)


def test_a_session_that_lasts_through_rungs_is_seen_in_each_of_them():
    """One of 90 minutes stalls in the rungs that are too slow for it, and in no other."""
    trial, rows = ladder(TRUTH, np.random.default_rng(10), LADDER, seconds=15)
    first, last = trial.rungs[0], trial.rungs[-1]
    own = rows.iloc[:1].assign(request_id="podcast", traffic_class="long", frames=40_500, start_frame=9_000)
    podcast = own.assign(sent_ns=first.start_ns, ended_ns=last.end_ns, audio_s=60.0, stall_longest_s=2.0)
    windows = [
        podcast.assign(
            window=number,
            audio_s=10.0,
            first_received_ns=rung.start_ns,
            last_received_ns=rung.end_ns,
            stall_longest_s=2.0 if rung is last else 0.0,
        )
        for number, rung in enumerate(trial.rungs)
    ]
    rows = pd.concat([rows, podcast], ignore_index=True)
    step = fit_of((trial, rows)).deployments[0].step_time
    seen = MeasuredRequests(rows, pd.concat(windows, ignore_index=True))
    observed = observe([trial], seen, StepTime.of_record(step))
    of_podcast = observed[(observed["traffic_class"] == "long") & observed["served"] & observed["sessions"].isna()]
    assert of_podcast["rung"].tolist() == [1, 2, 3, 4, 5, 6]
    assert of_podcast["stall_longest_s"].tolist() == [0, 0, 0, 0, 0, 2.0]
    assert of_podcast["mean_step_s"].is_monotonic_increasing
    assert not ((observed["stall_longest_s"] == 2.0) & observed["served"] & observed["sessions"].notna()).any()


def test_a_ladder_that_is_slow_in_most_rungs_is_a_slow_ladder_and_counts():
    """Seen: a ladder 25% slower at every load but the lowest, where the host had cores to spare."""
    rungs = rungs_of(1.0, 1.0, 1.0, noise=0.01)
    for row in range(15, 21):
        rungs = slower(rungs, row, 1.25)
    assert slow_rungs(rungs) == []
    low, high = interval(fit_step_time(rungs, np.random.default_rng(0)))
    assert low < line(24) and high > 1.15 * line(24)
