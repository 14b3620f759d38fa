"""The shares of a load test: those of all its processes together are the one process of arrivals that was asked for."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.drive.generator import LoadSettings, arrival_times, lead_in
from harness.drive.load import Load
from harness.traffic.arrivals import Arrivals, RateStage, Trace
from harness.traffic.mix import MIXES

QUICK = MIXES["quick"]
POISSON = Arrivals("poisson", 8.0)


def traced(count=4000, seed=3) -> Trace:
    """A trace with bursts, as real ones have."""
    gaps = np.random.default_rng(seed).gamma(0.3, 1.0, count - 1)
    return Trace("made.csv", "0" * 64, np.concatenate([[0.0], np.cumsum(gaps)]))


PROCESSES = [
    Arrivals("constant", 8.0),
    POISSON,
    Arrivals("gamma", 8.0, 0.25),
    Arrivals("gamma", 8.0, 4.0),
    Arrivals("stages", stages=(RateStage(60, 2, 2), RateStage(120, 2, 20), RateStage(30, 0, 0), RateStage(60, 8, 8))),
    Arrivals("trace", 8.0, trace=traced()),
    Arrivals("trace", trace=traced(50), repeat=True),
]


def shares(process: Arrivals, of: int, count: int, seed: int = 1) -> list[list[float]]:
    load = LoadSettings(QUICK, Load(arrivals=process, seed=seed))
    return [list(itertools.islice(arrival_times(load, index, of), count)) for index in range(of)]


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("of", [2, 3, 4])
def test_shares_of_any_arrivals_are_together_the_one_process(process, of):
    union = sorted(itertools.chain(*shares(process, of, 600 // of)))
    (whole,) = shares(process, 1, 600 // of * of)
    assert union == whole


@settings(max_examples=30)
@given(rate=st.floats(0.01, 100), burstiness=st.floats(0.1, 10), of=st.integers(1, 5), seed=st.integers(0, 99))
def test_shares_differ_by_one_arrival_at_most(rate, burstiness, of, seed):
    process = Arrivals("gamma", rate, burstiness)
    until_s = 50 / rate
    counts = [sum(each < until_s for each in share) for share in shares(process, of, 200, seed)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("of", [1, 2, 4])
@pytest.mark.parametrize("burstiness", [1.0, 0.25, 4.0])
def test_gaps_of_the_union_over_workers_have_the_distribution_asked_for(burstiness, of, seed):
    union = np.sort(np.concatenate(shares(Arrivals("gamma", 8.0, burstiness), of, 4000 // of, seed)))
    shape, scale = 1 / burstiness, burstiness / 8.0
    assert stats.kstest(np.diff(union), "gamma", args=(shape, 0, scale)).pvalue > 0.01
    counts = np.histogram(union, np.arange(0, union[-1], 5.0))[0]
    assert counts.var() / counts.mean() == pytest.approx(burstiness, rel=0.35)  # the index of dispersion


@pytest.mark.parametrize("of", [1, 3])
def test_stages_over_workers_are_poisson_in_their_own_time(of):
    process = PROCESSES[4]
    union = np.sort(np.concatenate(shares(process, of, 1500 // of)))
    work = np.array([process.expected(time_s) for time_s in union])  # the time-rescaling theorem
    assert stats.kstest(np.diff(work), "expon").pvalue > 0.01
    assert not np.any((union > 180) & (union < 210))


def test_iterations_end_the_process_for_all_its_shares():
    load = LoadSettings(QUICK, Load(arrivals=POISSON, iterations=7))
    assert [len(list(arrival_times(load, index, 3))) for index in range(3)] == [3, 2, 2]


def test_sessions_of_a_steady_open_loop_begin_before_its_window():
    load = LoadSettings(QUICK, Load.poisson(60, 1, 1.0, steady=5))
    times = sorted([*lead_in(load, 0, 2), *lead_in(load, 1, 2)])
    assert times == list(lead_in(load)) and len(times) == 5
    assert times[0] == -1.0 and times[-1] < 0
