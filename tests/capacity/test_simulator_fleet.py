"""Traffic in blocks, fleets of pools, and what a simulation is summed up to."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.capacity.models import memory
from harness.capacity.models.device import Device
from harness.capacity.models.spreads import Sample, Spread
from harness.capacity.models.steps import StepTime
from harness.capacity.simulator.engine import Counting, SimulationEngine, arrivals_of
from harness.capacity.simulator.fleet import Split, over, replicate, simulate_pool, simulate_split
from harness.capacity.simulator.pool import Planned, Pool
from harness.capacity.simulator.results import Estimate, MetricBins, bin_edges, result_of
from harness.capacity.simulator.structures import BINS, bin_of
from harness.capacity.simulator.traffic import BLOCK, Demand, Varying
from harness.errors import InconclusiveError, InputError
from harness.traffic.arrivals import Arrivals, Trace
from harness.traffic.mix import Lengths, Mix, TrafficClass

MIX = Mix(
    "two",
    (
        TrafficClass("short", 0.9, Lengths.parse({"uniform": [4, 16]})),
        TrafficClass("long", 0.1, Lengths.parse({"fixed": 120})),
    ),
)


def tenth(n):
    return 0.1 + 0 * n


def demand(rate_per_s=2.0, **more):
    return Demand(MIX, Varying.constant(rate_per_s), **more)


def counting(seconds=2000.0, **more):
    return Counting(("short", "long"), seconds, **more)


def drawn(of, seconds, seed=1):
    return np.concatenate(list(of.blocks(np.random.default_rng(seed), seconds)))


# Traffic


def test_blocks_hold_the_mix_in_order_of_time():
    block = drawn(demand(50.0), 4000.0)
    assert len(block) == pytest.approx(200_000, rel=0.01) and len(block) > 2 * BLOCK
    assert np.all(np.diff(block["arrival_s"]) >= 0) and block["arrival_s"][-1] <= 4000
    assert np.mean(block["class_index"] == 1) == pytest.approx(0.1, rel=0.03)
    assert np.all(block["frames"][block["class_index"] == 1] == 900)
    assert block["frames"].mean() == pytest.approx(MIX.mean_frames(), rel=0.02)
    assert np.all((block["pick"] >= 0) & (block["pick"] < 1))


def test_a_session_takes_the_bytes_and_the_prompt_that_memory_says():
    block = drawn(demand(kv_bytes_per_token=1000, voice_frames=100, prefill_s_per_token=0.01), 500.0)
    long = block[block["class_index"] == 1][0]
    assert long["context"] == 900 * 240 / 450 + 100
    assert long["bytes"] == memory.session_bytes(int(long["context"]), 900, 1000)
    assert long["first_s"] == pytest.approx(0.01 * long["context"])


def test_a_rate_of_the_day_is_thinned_to_its_shape():
    day = Demand(MIX, Varying.diurnal(20.0, 0.8, peak_s=1000.0, period_s=4000.0))
    arrival_s = drawn(day, 40_000.0)["arrival_s"]
    counts = np.histogram(arrival_s % 4000, bins=8)[0] / 10 / 500
    middles = (np.arange(8) + 0.5) * 500
    assert counts == pytest.approx(20 * (1 + 0.8 * np.cos(2 * np.pi * (middles - 1000) / 4000)), rel=0.1)


def test_arrivals_may_be_those_of_a_trace_or_of_any_process():
    trace = Trace("a.csv", "0", np.array([0.0, 1.0, 5.0]))
    block = drawn(Demand(MIX, Arrivals("trace", trace=trace)), 4.0)
    assert block["arrival_s"].tolist() == [0.0, 1.0]
    assert len(drawn(Demand(MIX, Arrivals("constant", 2.0)), 10.0)) in (20, 21)


def test_the_same_seed_gives_the_same_traffic():
    assert np.array_equal(drawn(demand(), 100.0), drawn(demand(), 100.0))


def test_sessions_found_in_progress_are_drawn_by_work_and_are_not_counted():
    found = demand().found(20_000, [0, 1], np.random.default_rng(1))
    assert np.all(found["class_index"] == -1) and np.all(found["frames"] > 0)
    work_long = 0.1 * 120 / (0.9 * 10 + 0.1 * 120)
    assert np.mean(found["bytes"] == found["bytes"].max()) == pytest.approx(work_long, rel=0.05)
    assert found["context"].mean() > 150 + 240 / 450 * found["frames"].mean()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Varying.constant(0.0), "the highest rate is above 0"),
        (lambda: Varying.diurnal(1.0, 1.5), "a swing is 0 to 1"),
        (lambda: next(Varying(lambda at_s: 0 * at_s + 2, 1.0).blocks(np.random.default_rng())), "at most the highest"),
    ],
)
def test_rates_that_cannot_be_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_sessions_scatter_as_a_fit_of_single_requests_says():
    """Half of the short ones take half the time, the others twice; the long ones, too few to say, as all together."""
    values, names = np.tile([0.5, 2.0], 50), np.repeat(["short", "long"], [90, 10])
    spread = Spread.measure(values, names)
    block = drawn(demand(20.0, ttfa=spread, rtf=spread), 1000.0)
    assert np.median(block["ttfa_ratio"]) == pytest.approx(1.25, rel=0.2)
    assert np.quantile(block["rtf_ratio"], [0.1, 0.9]) == pytest.approx([0.5, 2.0])
    assert np.all(drawn(demand(), 100.0)["rtf_ratio"] == 1)


# Fleets


def test_a_split_pool_is_each_class_alone():
    """Little's law in each; and a pool of its own serves the class as if the other were not there."""
    pools = Split({"a": Pool(1, tenth), "b": Pool(2, tenth)}, {"short": "a", "long": "b"})
    results = simulate_split(pools, demand(), counting(), np.random.default_rng(3))
    assert [list(each.classes) for each in results.values()] == [["short"], ["long"]]
    for result, rate, frames in ((results["a"], 1.8, 75), (results["b"], 0.2, 900)):
        assert result.sessions.mean() == pytest.approx(rate * frames * 0.1, rel=0.12)


def test_one_pool_of_all_classes_counts_as_the_engine_does():
    result = simulate_pool(Pool(2, tenth), demand(), counting(), np.random.default_rng(3))
    assert result.classes["short"].arrived.sum() == pytest.approx(3600, rel=0.06)
    for each in result.classes.values():
        assert each.arrived.sum() == each.done.sum() + each.unfinished
        assert each.good.sum() == each.done.sum() == each.rtf.count
    assert result.devices_up.tolist() == [2.0] * 20
    assert result.device_hours == pytest.approx(2 * 2000 / 3600)
    assert result.utilisation == pytest.approx(1.0, abs=0.02)


def test_a_fleet_found_in_its_steady_state_begins_there():
    pool, span = Pool(1, tenth), counting(100.0, windows=1, batches=1)
    steady = 2.0 * MIX.mean_frames() * 0.1
    for found, expected in ((0, 0.35 * steady), (round(steady), steady)):
        results = replicate(lambda rng, n=found: simulate_pool(pool, demand(), span, rng, found=n), 20, seed=1)
        sessions = over(results, lambda result: result.sessions[0])
        assert sessions.value < 0.75 * steady if found == 0 else sessions.low <= expected <= sessions.high


@pytest.mark.parametrize(
    ("pool_of", "classes", "message"),
    [
        ({"short": "a"}, ("short", "long"), "every class"),
        ({"short": "a", "long": "c"}, ("short", "long"), "goes to a pool of a, b"),
        ({"short": "a", "long": "b"}, ("short",), "the demand is of short, long, counted are short"),
    ],
)
def test_a_split_that_leaves_something_out_is_refused(pool_of, classes, message):
    split = Split({"a": Pool(1, tenth), "b": Pool(1, tenth)}, pool_of)
    with pytest.raises(InputError, match=message):
        simulate_split(split, demand(), Counting(classes, 10.0), np.random.default_rng())


# Results


@given(value=st.floats(0, 1e9))
def test_a_value_lies_in_its_bin(value):
    edges, index = bin_edges(), bin_of(value)
    assert len(edges) == BINS + 1
    assert edges[index] <= value < edges[index + 1]
    assert index in (0, BINS - 1) or edges[index + 1] - edges[index] <= edges[index] / 128


def distribution(values, batches=4):
    bins = np.zeros((batches, BINS), np.int64)
    for number, value in enumerate(values):
        bins[number % batches, bin_of(value)] += 1
    sums = [sum(each for each in values[batch::batches] if each < math.inf) for batch in range(batches)]
    return MetricBins(bins, np.array(sums))


@given(seed=st.integers(0, 1000), probability=st.floats(0.02, 0.98))
def test_quantiles_of_bins_are_those_of_the_values(seed, probability):
    values = np.random.default_rng(seed).lognormal(0, 1, 400)
    shown, low, high = (
        distribution(values).quantile(probability),
        *np.quantile(values, [probability - 1 / 400, probability + 1 / 400], method="closest_observation"),
    )
    assert low * (1 - 1 / 128) <= shown <= high * (1 + 1 / 128)


def test_means_are_exact_and_who_was_never_heard_is_beyond_every_quantile():
    shown = distribution([1.0, 2.0, 4.0, math.inf])
    assert shown.mean == pytest.approx(7 / 3)
    assert shown.quantile(0.7) < 4.1 and shown.quantile(0.8) == math.inf
    assert shown.share_above(1.5) == 0.75
    assert distribution([0.0, 0.0, 0.0, 1.0]).quantile(0.5) == 0.0
    assert distribution([0.0, 0.0, 0.0, 1.0]).share_above(0.0) == 0.25


def test_nothing_counted_is_inconclusive():
    with pytest.raises(InconclusiveError, match="simulate for longer"):
        distribution([]).quantile(0.5)
    assert math.isnan(distribution([]).mean)


def test_an_interval_is_students():
    figure = Estimate.of(2.0, [1.0, 2.0, 3.0])
    assert (figure.value, figure.low, figure.high) == pytest.approx(
        (2.0, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4
    )
    assert Estimate.of(2.0, [2.0]).high == math.inf


def test_intervals_of_batches_cover_the_truth_about_as_often_as_they_say():
    """Waits of M/M/1 at load 0.5: means of 20 batches of 1,000 sessions are nearly independent."""
    covered, expected = 0, 1.0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        engine = SimulationEngine(Pool(1, tenth, session_limit=1), Counting(("one",), 40_000.0, 500.0))
        engine.feed(arrivals_of(np.cumsum(rng.exponential(2.0, 21_000)), rng.exponential(10, 21_000)))
        engine.finish(40_500.0)
        wait_s = result_of(engine.arrays, ["one"], [0], 2000.0).classes["one"].wait_s.mean_with_interval()
        covered += wait_s.low <= expected <= wait_s.high
    assert 51 <= covered <= 60


def test_scatter_multiplies_first_audio_and_rtf():
    engine = SimulationEngine(Pool(1, tenth, first_audio=(0.1, 2.0)), Counting(("one",), 10.0, 0.0, 1, 1))
    engine.feed(arrivals_of([1.0], [5], first_s=0.2, ttfa_ratio=3.0, rtf_ratio=2.0), last=True, stop_s=10.0)
    shown = result_of(engine.arrays, ["one"], [0], 10.0).classes["one"]
    assert shown.ttfa_s.mean == pytest.approx(3 * (0.2 + 0.1 + 0.2))
    assert shown.rtf.mean == pytest.approx(2 * 0.1 * 7.5)


def test_a_pool_may_be_of_devices_as_fitted():
    known = Sample.of(np.ones(5))
    device = Device(StepTime("linear", (0.1, 0.0)), 0.5, 2.0, Spread(known), Spread(known), {}, 8, ())
    engine = SimulationEngine(Pool.of(device, 2, session_limit=1), keep=3)
    engine.feed(arrivals_of([0.0, 0.0, 0.0], [10, 10, 10]), last=True)
    assert engine.arrays.kept["first_audio_s"].tolist() == pytest.approx([0.7, 0.7, 1.7])


def test_goodput_is_of_those_that_kept_every_limit():
    limits = {"one": {"ttfa_s": 1.0, "rtf": 1.0, "stall_s": 0.0}}
    engine = SimulationEngine(
        Pool(1, tenth, session_limit=1, start_buffer_s=0.0), Counting(("one",), 10.0, 0.0, 10, 2, limits)
    )
    engine.feed(arrivals_of([0.0, 0.1, 0.2], [5, 8, 4]), last=True, stop_s=10.0)
    shown = result_of(engine.arrays, ["one"], [0], 1.0).classes["one"]
    assert shown.done.sum() == 3 and shown.good.sum() == 2  # the third was heard after 1.2 s
    assert shown.goodput_per_s().value == pytest.approx(0.2)


def test_who_is_told_busy_or_lost_unheard_counts_as_never_heard():
    pool = Pool(1, tenth, session_limit=1, queue_limit=1, planned=(Planned(0.5, "fail", 0),))
    engine = SimulationEngine(pool, Counting(("one",), 10.0, windows=1, batches=1))
    engine.feed(arrivals_of([0.0, 0.1, 0.2], [10, 10, 10]), last=True, stop_s=10.0)
    shown = result_of(engine.arrays, ["one"], [0], 10.0).classes["one"]
    assert (shown.lost.sum(), shown.refused.sum(), shown.unfinished) == (1, 1, 1)
    assert shown.ttfa_s.count == 2 and shown.ttfa_s.quantile(0.9) == math.inf
    assert shown.busy_share() == pytest.approx(1 / 3)


def test_memory_of_a_long_run_is_that_of_the_sessions_aboard():
    engine = SimulationEngine(Pool(4, tenth, session_limit=1), Counting(("one",), 1e5))
    blocks = Demand(Mix("one", MIX.classes[:1]), Varying.constant(0.1)).blocks(np.random.default_rng(1), 1e5)
    for block in itertools.islice(blocks, 2):
        engine.feed(block)
    engine.finish(1e5)
    assert engine.arrays.state[0]["arrived"] > 9000 and len(engine.arrays.slots) == 64
