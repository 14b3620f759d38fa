"""What a plan says beyond its counts: devices lost, changes, costs and growth."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from capacity_truth import (
    LADDER,
    MIX,
    SLOS,
    TRUTH,
    Truth,
    bare_fit,
    fastest_s,
    fit_of,
    fit_with,
    fitted_stage,
    ladder,
    plan_of,
    true_device,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import wire
from harness.capacity.fitting.rate_search import LARGEST_POOL, Limits, Traffic, judge_load, load_of, simulate_load
from harness.capacity.models.memory import KvRoom
from harness.capacity.planning.cost_and_growth import carried, forecast, months_until, price_of, with_costs
from harness.capacity.planning.device_losses import EARLY_S, OVERLOAD, lose, with_spares
from harness.capacity.planning.device_types import DeviceType
from harness.capacity.planning.plan import pools_of
from harness.capacity.planning.pools import Pools
from harness.capacity.planning.scaled_profile import scaled
from harness.capacity.planning.sensitivity import changes, lengthened, sensitivity
from harness.capacity.simulator.pool import Planned
from harness.capacity.simulator.sessions import simulate
from harness.device_profile import Profile
from harness.errors import InconclusiveError, InputError
from harness.records.plan import PlannedTarget, Price


@pytest.fixture(scope="module")
def pools():
    traffic = Traffic.draw(MIX, np.random.default_rng(5), 8000)
    return Pools(true_device(), traffic, Limits(SLOS, max(LADDER)), 0.85)


@pytest.fixture(scope="module")
def measured():
    delays = {f"{stage}.delay_us": 4000 for stage in wire.STAGES}
    return ladder(TRUTH, np.random.default_rng(10), LADDER, deployment=delays)


@pytest.fixture(scope="module")
def plan(measured):
    terms = {"prices": {"cpu": 0.5, "H200": 4.0}, "currency": "EUR", "growth_per_month": 0.1, "fleet": 8}
    return plan_of(fit_of(measured), measured, targets=(0.5, 3.0), **terms)


# --- devices lost


def test_sessions_of_a_lost_device_go_on_where_they_were():
    """Two devices make a frame in 0.1 s; at 1 s the first is lost, and its session of 20 frames goes on elsewhere."""
    run = simulate([0.0, 0.1], [20, 20], lambda n: 0.1 * n, devices=2, planned=[Planned(1.0, "fail", 0)])
    # 10 frames of the first are left at 1 s, 11 of the second; both then share ten frames a second.
    assert run.end_s.tolist() == pytest.approx([3.0, 3.1])


def test_a_pool_that_lost_a_device_is_like_one_that_never_had_it(pools):
    qps = 0.8 * 3 * pools.steady_rate()
    loss = lose(pools, qps, 4, 1)
    fewer = judge_load(pools.device, pools.traffic, pools.limits, qps, 3)
    assert loss.worst_share == pytest.approx(fewer.shares[fewer.worst], rel=0.05)
    assert loss.met == fewer.met
    assert loss.interrupted > 0


def test_spares_make_up_for_what_is_lost(pools):
    qps = 0.8 * 4 * pools.steady_rate()
    assert not lose(pools, qps, 4, 2).met
    spared = with_spares(pools, qps, 4, 2)
    assert spared.met and spared.devices >= 6


def test_losses_of_a_large_pool_are_simulated_in_part(pools):
    loss = lose(pools, 0.6 * 500 * pools.steady_rate(), 501, 1)
    assert loss.met and loss.devices == 501
    assert loss.judged_s >= EARLY_S and loss.basis == "simulated"


@pytest.mark.parametrize(
    "utilisation, met, basis", [(0.8, True, "simulated"), (1.01, False, "simulated"), (1.6, False, "extrapolated")]
)
def test_more_than_the_devices_left_carry_breaks_a_slo_however_slowly(pools, utilisation, met, basis):
    loss = lose(pools, utilisation * 9 * pools.steady_rate(), 11, 2)
    assert loss.met is met
    assert (loss.worst_share >= 1) is not met
    assert loss.basis == basis


def test_slos_that_hold_for_all_that_was_simulated_are_not_kept_beyond_the_steady_limit(pools):
    """Without an SLO that can break, only the arithmetic says that the line grows for ever."""
    free = pools.changed(limits=Limits((), 10**6), device=replace(pools.device, max_sessions=24.0))
    loss = lose(free, 1.01 * 3 * free.steady_rate(), 4, 1)
    assert not loss.met and loss.worst == OVERLOAD and loss.worst_share == pytest.approx(1.01)


def test_a_loss_is_judged_for_ten_minutes_and_several_residences_at_any_rate(pools):
    longest_s = pools.traffic.mean_frames * float(pools.device.step_time(max(LADDER)))
    for devices in (2, 40):
        loss = lose(pools, 0.6 * (devices - 1) * pools.steady_rate(), devices, 1)
        assert loss.judged_s > EARLY_S + 4 * longest_s
    short = lose(pools.changed(traffic=pools.traffic.part(400)), 0.6 * pools.steady_rate(), 2, 1)
    assert short.judged_s > EARLY_S and not math.isnan(short.early_share)


def test_the_first_minutes_after_a_loss_are_the_worst_of_several_draws(pools):
    loss = lose(pools, 0.85 * 2 * pools.steady_rate(), 3, 1)
    rate, draws = 0.85 * 2 * pools.steady_rate(), []
    for seed in range(5):
        traffic = pools.traffic.again(seed).part(math.ceil(rate * EARLY_S / 0.8 * 1.05))
        simulated, counted = simulate_load(pools.device, traffic, rate, 3, pools.limits, 1)
        early = counted & (simulated.arrival_s < simulated.arrival_s[counted][0] + EARLY_S)
        load = load_of(pools.device, traffic, pools.limits, rate, 3, simulated, early)
        draws.append(load.shares[load.worst])
    assert loss.early_share == pytest.approx(max(draws)) and max(draws) > min(draws)
    rare = lose(pools, 0.01, 2, 1)  # six sessions in ten minutes
    assert not math.isinf(rare.early_share)


def test_no_device_left_is_refused(pools):
    with pytest.raises(InputError, match="one must be left"):
        lose(pools, 1.0, 2, 2)


# --- changes


def test_longer_sessions_ask_for_more_and_ninety_minutes_stay_the_longest(pools):
    longer = lengthened(pools.traffic, 1.2)
    assert longer.mean_frames == pytest.approx(1.2 * pools.traffic.mean_frames)
    longest = replace(pools.traffic, frames=np.full(10, float(wire.MAX_FRAMES)))
    assert lengthened(longest, 1.2).frames.max() == wire.MAX_FRAMES
    assert lengthened(longest, 1.2).mean_frames == pytest.approx(pools.traffic.mean_frames)


def test_changes_move_the_rate_as_they_must(plan):
    rates = {row.change: row.rate_per_device for row in plan.sensitivity}
    base = rates["as planned"]
    assert rates["sessions 20% longer"] == pytest.approx(base / 1.2, rel=0.03)
    assert base < rates["a device that computes 50% faster"] < 1.55 * base
    assert rates["half the delay"] >= 0.99 * base
    for row in plan.sensitivity:
        assert row.basis == ("simulated" if row.change in ("as planned", "sessions 20% longer") else "extrapolated")
        counts = [each.devices for each in row.targets]
        assert counts == sorted(counts) and all(counts)


def test_a_change_that_the_sweep_measured_is_taken_from_it(measured):
    halved = {knob: 2000 for knob in measured[0].deployment}
    faster = ladder(Truth(0.006, 0.006), np.random.default_rng(3), LADDER, name="faster", deployment=halved)
    fit = fit_of(measured, faster)
    chosen = fit.deployments[0]
    limits = Limits(SLOS, max(LADDER))
    pools = Pools(true_device(), Traffic.draw(MIX, np.random.default_rng(5), 4000), limits, 0.85)
    half = next(change for change in changes(fit, chosen, pools) if change.name == "half the delay")
    assert half.basis == "simulated" and "measured" in half.note
    assert float(half.pools.device.step_time(4)) == pytest.approx(0.006 + 4 * 0.006, rel=0.1)


def slow_llm(fit):
    """With a second a batch in the LLM, and a millisecond in the others."""
    return replace(fit, stages=tuple(replace(e, alpha_s=1.0 if e.stage == wire.LLM else 1e-3) for e in fit.stages))


def test_a_change_has_the_room_for_kv_caches_of_its_own_deployment(measured):
    """An instance of the LLM more has room of its own: as fitted where it was measured, else by arithmetic."""
    knob = f"{wire.LLM}.instances"
    two = ladder(TRUTH, np.random.default_rng(3), LADDER, name="two", deployment=measured[0].deployment | {knob: 2})
    for ladders in ((measured,), (measured, two)):
        fit = fit_of(*ladders, kv=KvRoom(10**6, 512))
        chosen = slow_llm(fit.deployments[0])
        fit = replace(fit, deployments=(chosen, *fit.deployments[1:]))
        planned = pools_of(fit, chosen, MIX, SLOS, 0.85)
        found = {change.name: change.pools for change in changes(fit, chosen, planned)}
        more = found[f"one more instance of {wire.LLM}"].limits
        assert (planned.limits.kv.instances, more.kv.instances) == (1, 2)
        assert more.kv_slots == pytest.approx(2 * planned.limits.kv_slots)
        assert found["half the delay"].limits.kv_slots == planned.limits.kv_slots


@pytest.mark.parametrize(("gpus", "name"), [(1, ""), (2, " on each GPU")])
def test_one_more_instance_is_one_more_on_each_gpu(measured, pools, gpus, name):
    """The knob counts those on each: a deployment with 2 was measured with one more than the default, however many."""
    knob = f"{wire.LLM}.instances"
    two = ladder(TRUTH, np.random.default_rng(3), LADDER, name="two", deployment=measured[0].deployment | {knob: 2})
    fit = fit_of(measured, two)
    chosen = slow_llm(fit.deployments[0])
    rows = {row.change: row for row in sensitivity(fit, chosen, pools, (0.5,), gpus)}
    assert rows[f"one more instance of {wire.LLM}{name}"].basis == "simulated"


def test_room_for_kv_caches_is_that_of_the_instances_on_all_gpus(measured):
    knob = f"{wire.LLM}.instances"
    two = ladder(TRUTH, np.random.default_rng(3), LADDER, name="two", deployment=measured[0].deployment | {knob: 2})
    fit = fit_of(measured, two, kv=KvRoom(10**6, 512, instances=4, gpus=4))
    assert [each.kv.instances for each in fit.deployments] == [4, 8]


# --- other types of device


def profile(token_ms=1e-4, **changes):
    """Lines: LLM 4 + b (0.5 + c token_ms), diffusion 10 + 0.2 b, vocoder 2 + 0.3 b milliseconds."""
    batches, contexts = (1, 4, 16), (100, 10_000)
    stages = {
        wire.LLM: [{"batch": b, "context": c, "ms": 4 + b * (0.5 + c * token_ms)} for b in batches for c in contexts],
        wire.DIFFUSION: [{"batch": b, "steps": 10, "ms": 10 + 0.2 * b} for b in batches]
        + [{"batch": 1, "steps": 20, "ms": 99}],
        wire.VOCODER: [{"batch": b, "ms": 2 + 0.3 * b} for b in batches] + [{"batch": 64, "left_out": "no memory"}],
    }
    model = {"hidden_size": 8, "kv_bytes_per_token": 1000, "kv_room_bytes": 10**9, "state_values": 8}
    return {"device": "NVIDIA H200", "preset": "1.5b", "model": model, "stages": stages | changes}


def device_type_of(content):
    return DeviceType.of_profile(Profile.of(content))


def test_a_profile_is_read_as_lines_over_batch_and_context():
    device_type = device_type_of(profile())
    assert device_type.worst_residual < 1e-6 and device_type.most_sessions == 16
    assert device_type.tau0_s == pytest.approx({wire.LLM: 0.004, wire.DIFFUSION: 0.010, wire.VOCODER: 0.002})
    assert device_type.alpha_s == pytest.approx({wire.LLM: 0.0005, wire.DIFFUSION: 0.0002, wire.VOCODER: 0.0003})
    assert device_type.token_s == pytest.approx(1e-7)


def test_context_makes_the_steps_of_a_gpu_longer():
    """One session alone: 17 ms, and 6.2 ms for 62,000 tokens; then a hop before each stage."""
    device_type = device_type_of(profile())

    def alone_s(context, **between):
        return device_type.topology({}, context, **between).alone_s()

    short, long = alone_s(0), alone_s(62_000)
    assert short == pytest.approx(0.017)
    assert long - short == pytest.approx(0.0062)
    assert alone_s(0, hop_s=0.001) == pytest.approx(0.020, rel=0.02)


def test_a_plan_says_what_other_devices_would_carry(measured):
    terms = {"profiles": {"H200": Profile.of(profile())}, "prices": {"H200": 4.0}}
    (row,) = plan_of(fit_of(measured), measured, targets=(0.5, 3.0), **terms).device_types
    assert (row.type, row.device, row.basis) == ("H200", "NVIDIA H200", "extrapolated")
    assert row.rate_per_device > 0
    audio = 3.0 * MIX.mean_frames() / 7.5
    last = row.targets[-1]
    assert last.cost_per_audio_hour == pytest.approx(4.0 * last.devices / audio, rel=0.01)


def split(content, host_ms=1.5):
    """The profile, so much of every time the host's."""
    parts = {"host_ms": host_ms, "device_ms_from": "profiler"}
    rows = {
        stage: [row | parts | {"device_ms": row["ms"] - host_ms} if "ms" in row else row for row in stages]
        for stage, stages in content["stages"].items()
    }
    return content | {"stages": rows}


def test_a_gpu_is_held_for_the_gpus_part_of_a_step_and_its_host_is_busy_beside():
    device_type, whole = device_type_of(split(profile())), device_type_of(profile())
    assert device_type.worst_residual < 1e-6
    assert device_type.tau0_s == pytest.approx({wire.LLM: 0.0025, wire.DIFFUSION: 0.0085, wire.VOCODER: 0.0005})
    assert device_type.host_s == pytest.approx(dict.fromkeys(wire.STAGES, 0.0015))
    one, all_of_it = (each.topology({}, 400.0) for each in (device_type, whole))
    assert one.alone_s() == pytest.approx(all_of_it.alone_s())
    assert fastest_s(one, 16) < fastest_s(all_of_it, 16)
    assert "overlaps" in device_type.note and "does not separate" in whole.note


def test_a_devices_part_beyond_its_time_is_refused():
    for part in (0.0, -1.0, 99.0, None, math.nan):
        rows = [{"batch": b, "ms": 2.0, "device_ms": part} for b in (1, 4, 16)]
        with pytest.raises(ValueError, match="device_ms|a number is missing"):
            Profile.of(profile(**{wire.VOCODER: rows}))


# --- a GPU that was not measured


def launch_bound(host_ms=12.0, gpu_ms=2.0, **more):
    """A profile of a GPU of 3,000 GB/s and 700 TFLOP/s, bound by memory: 2 GB move in what is ideally 0.67 ms."""
    row = {"ms": host_ms + gpu_ms, "device_ms": gpu_ms, "bytes": 2_000_000_000, "gflop": 1.0}
    rows = [row | {"batch": b, "device_ms_from": "profiler"} for b in (1, 4, 16)]
    content = profile(**{stage: rows for stage in wire.STAGES})
    return content | {"bandwidth_gb_s": 3000.0, "tflop_s": 700.0} | more


def test_twice_the_bandwidth_halves_the_gpus_part_and_leaves_python_as_it_is():
    (row, *_) = scaled(Profile.of(launch_bound()), "twice", 6000.0, 700.0).timed(wire.LLM)
    assert (row.ms, row.device_ms, row.host_ms) == pytest.approx((13.0, 1.0, 12.0))


def test_the_floor_turns_from_memory_to_arithmetic():
    """2 GB at 6,000 GB/s take 0.33 ms; 400 GFLOP at 700 TFLOP/s take 0.57, and did so before: 0.67 x 0.57 / 0.67."""
    content = launch_bound()
    for row in content["stages"][wire.LLM]:
        row["gflop"] = 400.0
    (row, *_) = scaled(Profile.of(content), "twice", 6000.0, 700.0).timed(wire.LLM)
    assert row.device_ms == pytest.approx(2.0 * (400 / 700) / (2 / 3))


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 50), st.floats(0.1, 50), st.floats(0.2, 5))
def test_the_same_gpu_is_itself_and_speed_only_moves_the_gpus_part(host_ms, gpu_ms, speed):
    content = Profile.of(launch_bound(host_ms, gpu_ms))
    for factor in (1.0, speed):
        for row in scaled(content, "x", 3000.0 * factor, 700.0 * factor).timed(wire.DIFFUSION):
            assert row.ms == pytest.approx(host_ms + gpu_ms / factor)


def test_what_was_scaled_says_so_in_the_plan(measured):
    measured_gpu = Profile.of(launch_bound())
    content = scaled(measured_gpu, "B200", 6000.0, 1400.0)
    assert (content.device, content.basis) == ("B200", "scaled")
    assert content.model == measured_gpu.model and Profile.of(content.to_dict()) == content
    assert scaled(measured_gpu, "B200", 6000.0, 1400.0, 5e10).model.kv_room_bytes == 5 * 10**10
    (row,) = plan_of(fit_of(measured), measured, profiles={"B200": content}).device_types
    assert "scaled from the profile of NVIDIA H200" in row.note and "the host's time as it is" in row.note
    whole = launch_bound()
    for row in whole["stages"][wire.LLM]:
        del row["device_ms"], row["device_ms_from"]
    assert "the host's time is scaled too" in scaled(Profile.of(whole), "B200", 6000.0, 1400.0).note


def test_a_profile_without_bytes_and_operations_cannot_be_scaled():
    for content in (profile(), launch_bound(bandwidth_gb_s=None), launch_bound(tflop_s=0.0)):
        with pytest.raises(InputError, match="cannot be scaled to another GPU: .*harness profile"):
            scaled(Profile.of(content), "B200", 6000.0, 1400.0)
    with pytest.raises(InputError, match="0 GB/s"):
        scaled(Profile.of(launch_bound()), "B200", 0.0, 1400.0)


def test_a_profile_with_too_few_points_is_refused(measured):
    few = profile(**{wire.VOCODER: [{"batch": 1, "ms": 2.0}]})
    with pytest.raises(InconclusiveError, match="fewer than 3 points of neural_vocoder"):
        device_type_of(few)
    (row,) = plan_of(fit_of(measured), measured, profiles={"H200": Profile.of(few)}).device_types
    assert row.rate_per_device is None and "fewer than 3 points" in row.note


def test_what_is_no_profile_is_refused():
    for part in ("stages", "model", "device"):
        with pytest.raises(ValueError, match=f"it has no '{part}'"):
            device_type_of({name: value for name, value in profile().items() if name != part})
    without = profile()
    del without["model"]["kv_room_bytes"]
    with pytest.raises(InputError, match="kv_room_bytes"):
        device_type_of(without)
    for row, words in (
        ({"ms": 1.0}, "a point has no batch"),
        ({"batch": "many", "ms": 1.0}, "batch: Input should be a valid integer"),
        ({"batch": 1, "ms": None}, "ms: Input should be a valid number"),
    ):
        with pytest.raises((InputError, ValueError), match=words):
            device_type_of(profile(**{wire.VOCODER: [row | {"context": tokens} for tokens in range(4)]}))


def test_a_stage_that_no_model_can_take_costs_its_row_and_not_the_plan(measured):
    slow = profile(**{wire.VOCODER: [{"batch": b, "ms": 1e9 * b} for b in (1, 4, 16)]})
    (row,) = plan_of(fit_of(measured), measured, profiles={"H200": Profile.of(slow)}).device_types
    assert row.rate_per_device is None and "times must be 0 to" in row.note


def test_a_fit_with_a_stage_too_fast_for_the_model_still_has_a_faster_device(pools):
    chosen = bare_fit(stages=tuple(fitted_stage(name, alpha_s=0.0, tau0_s=0.0) for name in wire.STAGES))
    found = {change.name: change for change in changes(fit_with(), chosen, pools)}
    (faster,) = [change for name, change in found.items() if name.startswith("a device that computes")]
    assert faster.pools is not None and "delays and hops shrink too" in faster.note


def test_a_change_that_cannot_be_made_says_why(pools):
    found = {change.name: change for change in changes(fit_with(), bare_fit(), pools)}
    assert found["half the delay"].pools is None and "no delay" in found["half the delay"].note
    assert found["one more instance"].pools is None


# --- costs and growth


@pytest.mark.parametrize(
    ("device", "found"),
    [
        ("NVIDIA H100 NVL", ("H100 NVL", 3.0)),
        ("emulated NVIDIA h100", ("H100", 2.0)),
        ("2 emulated NVIDIA H100", ("2 x H100", 4.0)),
        ("4 NVIDIA H100 80GB HBM3", ("4 x H100", 8.0)),
        ("2 NVIDIA A10 and NVIDIA H100", ("2 x A10 + H100", 4.0)),
        ("2 NVIDIA A10 and NVIDIA L4", None),
        ("the Triton at a:1 (2 NVIDIA A10)", ("2 x A10", 2.0)),
        ("host of the Ray cluster a:1 (NVIDIA H100)", ("H100", 2.0)),
        ("NVIDIA H100-SXM5-80GB", ("H100", 2.0)),
        ("NVIDIA A100", None),
        ("the Triton at H100-gw:8001", None),
        ("Triton of a:1, h100:2", None),
        ("host of the Ray cluster h100:6379", None),
        ("cpu", None),
    ],
)
def test_the_price_is_that_of_the_type_that_fits_best(device, found):
    assert price_of({"H100": 2.0, "H100 NVL": 3.0, "A10": 1.0}, device) == found


def test_an_audio_hour_costs_devices_over_audio():
    """Two requests a second of 900 frames (two minutes) are 240 audio seconds a second; 6 devices at 4 an hour."""
    found = with_costs(PlannedTarget(qps=2.0, devices=6, interval=(5, None)), 4.0, 900)
    assert found.cost_per_hour == 24
    assert found.cost_per_audio_hour == pytest.approx(0.1)
    assert found.cost_per_audio_hour_interval == (pytest.approx(20 / 240), None)


def test_a_plan_with_prices_and_growth_says_what_they_make_of_it(plan):
    assert plan.costs == Price(device_type="cpu", price_per_device_hour=0.5, currency="EUR", basis="given")
    for target, row in zip(plan.targets, plan.forecast.targets, strict=True):
        audio = target.qps * MIX.mean_frames() / 7.5
        assert target.cost_per_audio_hour == pytest.approx(0.5 * target.devices / audio, rel=0.01)
        ends = target.qps * 1.1**row.months_until_too_small
        assert ends == pytest.approx(target.qps + target.headroom_qps, rel=0.02)
        assert row.months_until_too_small < row.months_until_too_small_n_plus_1
        later = list(row.devices_after_months.values())
        assert later == sorted(later) and later[0] >= target.devices
    assert plan.forecast.targets[0].months_until_fleet_too_small > 12


@given(qps=st.floats(0.1, 1e12), shares=st.lists(st.floats(0.06, 2), min_size=1, max_size=5))
@settings(deadline=None, max_examples=40)
def test_counts_of_any_size_carry_their_rate_and_one_fewer_does_not(pools, qps, shares):
    shares = np.array(shares)
    counts = pools.devices_for(qps, shares)
    largest = carried(pools, LARGEST_POOL) / LARGEST_POOL
    for share, count in zip(shares, counts, strict=True):
        if count > LARGEST_POOL:
            assert count * largest * share >= qps * (1 - 1e-9) and (count - 1) * largest * share <= qps * (1 + 1e-9)
        else:
            assert carried(pools, int(count)) * share >= qps * 0.98  # monotone: noise of the simulation is smoothed
    assert np.isinf(pools.devices_for(qps, np.array([0.0, 1.0]))[0])


@pytest.mark.parametrize("cap, noisy", [(0.85, False), (1.0, True)])
def test_only_a_rate_that_a_slo_binds_has_the_noise_of_simulation(pools, cap, noisy):
    pools = Pools(pools.device, pools.traffic, pools.limits, cap)
    counts = pools.drawn_devices(60 * pools.rate(1)[0], np.ones(200), np.random.default_rng(3))
    assert (pools.binding(64) != f"utilisation {cap:g}") == noisy
    assert (len(set(counts)) > 1) == noisy


def test_growth_beyond_all_counting_is_bounded(pools):
    target = PlannedTarget(qps=20.0, devices=11, devices_n_plus_1=12)
    (row,) = forecast(pools, [target], 10.0, None).targets
    assert row.devices_after_months["3"] > 1000
    assert row.devices_after_months["12"] is None


def test_prices_that_fit_no_device_are_said_to(measured):
    plan = plan_of(fit_of(measured), measured, prices={"H100": 2.0, "A10": 1.0})
    assert plan.costs is None
    assert any("(H100, A10), none is in this device's name, cpu" in reason for reason in plan.reasons)


def test_without_prices_and_growth_nothing_is_said(measured):
    plan = plan_of(fit_of(measured), measured)
    assert plan.costs is None and plan.forecast is None
    assert "cost_per_hour" not in plan.to_dict()["targets"][0]


def test_months_until():
    assert months_until(1.0, 2.0, 0.1) == pytest.approx(math.log(2) / math.log(1.1))
    assert months_until(2.0, 2.0, 0.1) == 0
    assert months_until(1.0, 2.0, 0.0) is None


def test_more_devices_carry_more_than_in_proportion(pools):
    assert carried(pools, 6) >= 6 * carried(pools, 1)
