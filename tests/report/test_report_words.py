"""Numbers, metrics and deployments in the words of the sign-off document."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import report_sample as sample
from hypothesis import given
from hypothesis import strategies as st

from harness import wire
from harness.records.plan import Plan, PlannedTarget
from harness.records.slo import Slo
from harness.report import words


@pytest.mark.parametrize(
    "value, said",
    [(0.5, "0.5"), (1, "1"), (20.0, "20"), (1.416, "1.42"), (12345.6, "12,346"), (0.00123, "0.00123"), (0, "0")]
    + [(None, "–"), (math.nan, "–"), (-0.25, "-0.25"), (math.inf, "unlimited"), (99.96, "100")],
)
def test_figures_in_plain_notation(value, said):
    assert words.figure(value) == said


@given(st.floats(1e-6, 1e9))
def test_a_figure_keeps_three_digits(value):
    assert float(words.figure(value).replace(",", "")) == pytest.approx(value, rel=0.0051)


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_letters_tell_deployments_apart(one, other):
    assert (words.letters(one) == words.letters(other)) == (one == other)


def test_metrics_in_words():
    assert words.metric("ttfa_s p95 of class short") == "time to first audio of short requests (95th percentile)"
    assert words.metric("stall_longest_s p99.9 of class long") == ("longest stall of long requests (99.9th percentile)")
    assert words.metric("missed rtf_p95 by 4%") == "missed real-time factor (95th percentile) by 4%"
    assert words.metric("longest stall p50 of class long") == "longest stall of long requests (median)"
    assert words.metric("the prediction of step_s") == "the prediction of step time"
    assert words.binding("memory") == "memory"
    assert words.binding("utilisation 0.85") == "the cap on utilisation (85%)"
    assert words.binding("sessions per device, known up to 48") == "the most sessions measured on a device (48)"
    assert words.binding("rtf p95 of class long").startswith("the real-time factor")
    assert words.binding(None) == "–"
    assert words.ordinal("11") == "11th" and words.ordinal("52") == "52nd"


def test_what_sets_a_count_is_a_limit_only_above_one_device():
    cap = PlannedTarget(qps=1.0, binding="utilisation 0.85")
    assert words.bound(replace(cap, devices=1)) == "minimum of one device"
    assert words.bound(replace(cap, devices=2)) == "cap on utilisation (85%)"
    assert words.bound(replace(cap, binding="rtf p95 of class long")).startswith("real-time factor")


def test_utilisation_is_defined_by_the_figures_of_the_plan():
    whole = Plan.of(sample.plan_record())
    plan = replace(whole, utilisation_cap=0.85, targets=(PlannedTarget(qps=20.0, devices=5, utilisation=0.8),))
    assert (plan.steady_rate, plan.planned_limit) == (5.0, 4.25)
    assert "requests/s / (devices x 5)" in words.utilisation(plan)
    assert "utilisation_cap allows 85% of it, 4.25" in words.utilisation(plan)
    assert words.utilisation(replace(whole, targets=(PlannedTarget(qps=1.0),))) == ""


@pytest.mark.parametrize(("alone", "more"), [(1.42, True), (4.5, False), (None, False)])
def test_the_rate_alone_and_the_planned_limit_are_told_apart(alone, more):
    """The limit may be above the rate of one device alone: only in a fleet, and the text says why."""
    whole = Plan.of(sample.plan_record())
    rate = replace(whole.rate_per_device, value=alone)
    target = PlannedTarget(qps=20.0, devices=5, utilisation=0.8)
    plan = replace(whole, utilisation_cap=0.85, targets=(target,), rate_per_device=rate)
    said = words.utilisation(plan)
    assert "5 requests/s is the steady rate" in said and plan.is_more_in_a_fleet == more
    assert ("in a fleet it is planned for more, because random arrivals even out" in said) == more
    assert ("One device alone sustains" in said) == (alone is not None)


@pytest.mark.parametrize(("confidence", "said"), [(0.95, "95%"), (0.975, "97.5%"), (0.99, "99%")])
def test_a_level_of_confidence_is_not_rounded(confidence, said):
    assert words.level(confidence) == said


def test_slos_in_words():
    slo = Slo("long", "stall_longest_s", 0.999, 0.5)
    assert words.slo(slo) == "for 99.9% of requests the longest stall is at most 0.5 s"


def test_deployments_are_named_by_what_differs():
    assert words.name_deployments(sample.space())[3] == "delay 5 ms · 2 diffusion instances"
    assert words.name_deployments(sample.space()[:1]) == ["delay 0 ms · 1 diffusion instance"]
    one, other = {f"{wire.LLM}.max_batch": 8}, {f"{wire.LLM}.max_batch": 16, "chunk_frames": 2}
    assert words.name_deployments([one, other]) == [
        "LLM batch up to 8 · chunk_frames as by default",
        "LLM batch up to 16 · 2 frames per chunk",
    ]
    assert words.name_deployments([{}]) == ["the defaults"]


@pytest.mark.parametrize(
    "bounds, said",
    [([3, 5], "3 to 5"), ([3, None], "at least 3"), ([None, 5], "at most 5"), ([None, None], "–"), (None, "–")],
)
def test_intervals_in_words(bounds, said):
    assert words.interval(bounds) == said


@pytest.mark.parametrize(
    "seconds, said", [(59, "59 s"), (120, "2 min"), (5400, "90 min"), (9000, "2.5 h"), (None, words.ABSENT)]
)
def test_durations_in_the_unit_that_one_would_say(seconds, said):
    assert words.duration(seconds) == said


@pytest.mark.parametrize("count, said", [(0.0, "now"), (2.34, "2.3 months"), (1, "1 month"), (None, "never")])
def test_months_until_something(count, said):
    assert words.months(count) == said


@pytest.mark.parametrize(
    "share, said", [(0.5, "50%"), (1.72, "172%"), (40.0, "over ten times"), (None, "over ten times")]
)
def test_a_share_of_a_limit_says_no_more_than_it_knows(share, said):
    assert words.share_of_limit(share) == said
