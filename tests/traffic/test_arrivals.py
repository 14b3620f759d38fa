"""Arrival processes: their rate, their burstiness, and what is refused."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from harness.errors import InputError
from harness.traffic import arrivals

REAL_TRACE = Path(__file__).parents[3] / "shared" / "data" / "traces" / "azure_llm_2023_conv.csv"


def first(times, count):
    return np.array(list(itertools.islice(times, count)))


def test_constant_arrivals_do_not_drift():
    assert first(arrivals.constant(3), 30_000)[-1] == 10_000


def test_poisson_gaps_are_exponential():
    times = first(arrivals.poisson(5.0, np.random.default_rng(1)), 5000)
    assert stats.kstest(np.diff(times), "expon", args=(0, 1 / 5)).pvalue > 0.01


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_the_rate_and_squared_variation_asked_for(burstiness):
    gaps = np.diff(first(arrivals.gamma(8.0, burstiness, np.random.default_rng(2)), 40_000))
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(burstiness, rel=0.08)


def test_stages_change_the_rate_pause_and_go_on_with_the_last():
    times = arrivals.stages([(100, 5), (50, 0), (100, 20)], np.random.default_rng(3))
    times = np.array(list(itertools.takewhile(lambda time: time < 500, times)))
    counts = np.histogram(times, [0, 100, 150, 250, 500])[0]
    assert counts[1] == 0
    for count, expected in zip(counts[[0, 2, 3]], (500, 2000, 5000), strict=True):
        assert abs(count - expected) < 4 * math.sqrt(expected)


@given(st.floats(0.01, 1000), st.floats(0.01, 100), st.integers(0, 1000))
def test_arrivals_never_go_back_and_the_seed_fixes_them(rate, burstiness, seed):
    one, same = (first(arrivals.gamma(rate, burstiness, np.random.default_rng(seed)), 1500) for _ in range(2))
    assert np.all(np.diff(one) >= 0) and one[0] >= 0
    assert np.array_equal(one, same)


def test_a_trace_of_dates_of_seconds_or_without_a_header(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("id,Timestamp\na,2024-03-31 00:59:59.5000000\nb,2024-03-31 03:00:00\nc,2024-03-31T00:59:59.25\n")
    assert list(arrivals.trace(path)) == pytest.approx([0, 0.25, 7200.75])
    path.write_text("10\n12.5\n11\n")
    assert list(arrivals.trace(path)) == [0, 1, 2.5]
    assert list(arrivals.trace(path, rate_per_s=4)) == [0, 0.2, 0.5]


def test_a_trace_that_names_offsets_has_no_gap_where_summer_time_ends(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("2023-10-29T02:59:58.5+02:00\n2023-10-29T02:00:00+01:00\n2023-10-29T01:00:01Z\n")
    assert list(arrivals.trace(path)) == pytest.approx([0, 1.5, 2.5])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("TIMESTAMP\n", "holds a header and no rows"),
        ("TIMESTAMP,x\n2024-01-01,1\nsoon,2\n", "line 3: 'soon' is in another time format"),
        ("TIMESTAMP,x\n1,1\nsoon,2\n", "line 3: 'soon' is no time .* in column TIMESTAMP"),
        ("1\n\nnan\n", "line 3"),
        ("tokens,arrived_at\n374,1.5\n", "none of 2 columns is named TIMESTAMP; .* 'tokens, arrived_at'"),
        ("1700000000\n2023-11-16 18:15:46\n", "line 2: '2023-11-16 18:15:46' is in another time format"),
    ],
)
def test_a_trace_without_times_is_refused_by_line(content, message, tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        arrivals.trace(path)


def test_a_trace_at_one_moment_has_no_rate(tmp_path):
    (tmp_path / "trace.csv").write_text("5\n5\n")
    with pytest.raises(InputError, match="all arrivals have the same time"):
        arrivals.trace(tmp_path / "trace.csv", rate_per_s=1)
    with pytest.raises(InputError, match="none.csv: cannot be read"):
        arrivals.trace(tmp_path / "none.csv")


@pytest.mark.parametrize("rate", [0, -1, math.nan, math.inf, 1e9, "5", True])
def test_impossible_rates_are_refused_at_once_not_at_the_first_arrival(rate):
    rng = np.random.default_rng(0)
    for process in (
        lambda: arrivals.constant(rate),
        lambda: arrivals.poisson(rate, rng),
        lambda: arrivals.gamma(rate, 1.0, rng),
        lambda: arrivals.stages([(1, rate)], rng),
    ):
        with pytest.raises(InputError, match="rate"):
            process()


@pytest.mark.parametrize("plan", [[], [(0, 1)], [(math.inf, 1)], [(1, 0), (9, 0)]])
def test_impossible_stages_are_refused(plan):
    with pytest.raises(InputError, match="stage"):
        arrivals.stages(plan, np.random.default_rng(0))


@pytest.mark.skipif(not REAL_TRACE.is_file(), reason="no ../shared/data beside the repository")
def test_a_real_trace_replays_its_hour_at_any_rate():
    hour = np.array(list(arrivals.trace(REAL_TRACE)))
    fast = np.array(list(arrivals.trace(REAL_TRACE, rate_per_s=20)))
    assert len(hour) == len(fast) == 19_366 and 3000 < hour[-1] < 3600
    assert (len(fast) - 1) / fast[-1] == pytest.approx(20)
    assert fast * hour[-1] / fast[-1] == pytest.approx(hour)


def test_a_ramp_has_the_rate_of_its_line_and_poisson_gaps_in_its_own_time():
    plan = arrivals.parse_stages("100s@2..10,50s@10..0,10s@0")
    process = arrivals.Arrivals("stages", stages=plan)
    times = np.array(list(process.times(np.random.default_rng(5))))
    assert process.ends_s == 160 and times[-1] < 150
    assert process.expected(50) == pytest.approx(50 * 2 + 4 * 50 / 2) and process.expected(1000) == 600 + 250
    work = np.array([process.expected(time) for time in times])
    assert stats.kstest(np.diff(work), "expon").pvalue > 0.01
    assert abs(len(times) - 850) < 4 * math.sqrt(850)


def test_a_rate_that_loses_all_digits_of_the_work_before_it_is_refused():
    with pytest.raises(InputError, match="1e-169 is below 1e-09 requests per second: write 0 for none"):
        arrivals.stages([(10, 1.0), (10, 1e-169), (10, 2.0)], np.random.default_rng(0))


RATES = st.just(0.0) | st.floats(1e-3, 20)


@given(
    st.lists(st.tuples(st.floats(0.1, 50), RATES, RATES), min_size=1, max_size=5),
    st.integers(0, 99),
)
def test_any_stages_are_a_unit_poisson_process_in_their_own_time(plan, seed):
    if not any(max(stage[1:]) > 1e-3 for stage in plan):
        return
    stages = tuple(arrivals.RateStage(*stage) for stage in plan)
    process = arrivals.Arrivals("stages", stages=stages)
    times = list(itertools.islice(process.times(np.random.default_rng(seed)), 200))
    unit = first(arrivals.poisson(1.0, np.random.default_rng(seed)), 200)
    assert [process.expected(time) for time in times] == pytest.approx(unit[: len(times)].tolist(), rel=1e-6, abs=1e-6)
    assert times == sorted(times)


def test_a_repeated_trace_goes_on_at_its_own_rate(tmp_path):
    (tmp_path / "trace.csv").write_text("3\n5\n9\n")
    again = arrivals.trace(tmp_path / "trace.csv", repeat=True)
    assert first(again, 7).tolist() == [0, 2, 6, 9, 11, 15, 18]
    process = arrivals.chosen(trace=tmp_path / "trace.csv", rate_per_s=1.0)
    assert (process.ends_s, process.expected(1.0), process.expected(99)) == (2.0, 2, 3)
    assert arrivals.chosen(trace=tmp_path / "trace.csv", repeat=True).ends_s == math.inf
    (tmp_path / "one.csv").write_text("3\n")
    with pytest.raises(InputError, match="all arrivals have the same time"):
        arrivals.chosen(trace=tmp_path / "one.csv", repeat=True)
