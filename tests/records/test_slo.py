"""SLOs: read from plans, judged by order statistics."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import PlanError
from harness.records.slo import Slo, clean_requests_needed, goodput_per_s, judge, sample_quantile

TTFA = Slo("short", "ttfa_s", 0.95, 1.0)


@pytest.mark.parametrize(
    ("key", "metric", "quantile"),
    [
        ("ttfa_p95_s", "ttfa_s", 0.95),
        ("rtf_p50", "rtf", 0.5),
        ("stall_p99.9_s", "stall_longest_s", 0.999),
    ],
)
def test_a_plan_key_is_a_slo(key, metric, quantile):
    assert Slo.parse("long", key, 2) == Slo("long", metric, pytest.approx(quantile), 2.0)


@pytest.mark.parametrize("key", ["ttfa_p95", "rtf_p95_s", "rtf_p0", "rtf_p100", "rtf_95", "latency_p95_s", ""])
def test_an_unknown_slo_is_refused(key):
    with pytest.raises(PlanError, match="ttfa_p95_s, rtf_p95 or stall_p95_s"):
        Slo.parse("long", key, 1)


@pytest.mark.parametrize("limit", [-1, math.nan, math.inf, "1", None, True])
def test_an_impossible_limit_is_refused(limit):
    with pytest.raises(PlanError, match="rtf_p95"):
        Slo.parse("long", "rtf_p95", limit)


@pytest.mark.parametrize(("quantile", "confidence", "needed"), [(0.99, 0.99, 459), (0.99, 0.95, 299), (0.9, 0.99, 44)])
def test_the_published_sample_sizes(quantile, confidence, needed):
    assert clean_requests_needed(quantile, confidence) == needed


@given(st.floats(0.5, 0.999), st.floats(0.5, 0.999))
def test_clean_requests_meet_a_slo_exactly_from_the_stated_number_on(quantile, confidence):
    slo = Slo("short", "rtf", quantile, 1.0)
    needed = clean_requests_needed(quantile, confidence)
    assert judge(slo, [1.0] * needed, confidence).met is True
    assert judge(slo, [1.0] * (needed - 1), confidence).met is None


def test_many_breaches_miss_and_few_requests_are_inconclusive():
    missed = judge(TTFA, [0.5] * 80 + [2.0] * 20)
    assert missed.met is False and missed.value == 2.0 and "20 of 100 requests above the limit" in missed.reason
    unclear = judge(TTFA, [0.5] * 30)
    assert (unclear.met, unclear.n, unclear.needed_n) == (None, 30, 59)
    assert "at least 59 requests" in unclear.reason
    assert judge(TTFA, []).met is None


def test_an_unmeasured_request_helps_neither_verdict():
    assert judge(TTFA, [0.5] * 59).met is True
    assert judge(TTFA, [0.5] * 59 + [math.nan]).met is None
    assert judge(TTFA, [math.nan] * 100).met is None
    assert math.isnan(judge(TTFA, [0.5] * 9 + [math.nan]).value)


@pytest.mark.parametrize(("share_above", "wrong"), [(0.051, True), (0.049, False)])
def test_a_wrong_verdict_is_rarer_than_one_minus_the_confidence(share_above, wrong):
    samples = np.random.default_rng(5).random((400, 200))
    verdicts = [judge(TTFA, np.where(sample < share_above, 2.0, 0.5), 0.9).met for sample in samples]
    assert sum(verdict is wrong for verdict in verdicts) <= 0.1 * len(samples)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50), st.floats(0.01, 0.99))
def test_a_quantile_is_a_value_that_enough_of_the_sample_does_not_exceed(values, quantile):
    result = sample_quantile(values, quantile)
    assert result in values
    assert sum(value <= result for value in values) >= quantile * len(values) - 1e-6
    assert sum(value < result for value in values) < quantile * len(values)


def test_goodput_counts_whole_requests_that_kept_every_slo():
    requests = pd.DataFrame(
        {
            "traffic_class": ["short", "short", "short", "long", "short"],
            "outcome": ["done", "done", "done", "done", "error"],
            "ttfa_s": [0.5, 1.5, math.nan, 9.0, 0.5],
            "rtf": [0.5, 0.5, 0.5, 0.5, 0.5],
            "start_frame": 0,
        }
    )
    found_in_progress = requests.assign(start_frame=[0, 7, 7, 0, 0])  # they had their first audio long before
    assert goodput_per_s([TTFA], found_in_progress, seconds=4.0) == 1.0
    assert goodput_per_s([TTFA, Slo("short", "rtf", 0.95, 0.9)], requests, seconds=4.0) == 0.5
