"""Plans for cards that nobody measured: the closed form against theory and the simulator, and what an estimate says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import queueing

from harness import wire
from harness.capacity.fitting.rate_search import Limits, Traffic
from harness.capacity.models.device import Device
from harness.capacity.models.memory import KvRoom
from harness.capacity.models.spreads import Sample, Spread
from harness.capacity.models.steps import StepTime
from harness.capacity.planning.closed_form import ClassDemand, ClosedDevice, ClosedPools, MemoryNeed, MixDemand
from harness.capacity.planning.device_types import DeviceType
from harness.capacity.planning.estimated import CardModel, _Planner, estimate
from harness.capacity.planning.pools import Pools
from harness.capacity.planning.scaled_profile import scaled
from harness.cards.assumptions import MEMORY, SPLIT
from harness.cards.card import card_of
from harness.cards.costs import costs_of
from harness.cards.estimate import assumptions_for, estimated_profile
from harness.errors import InputError
from harness.planfile.reading import load_mix
from harness.records.estimate import PlanningEstimate
from harness.records.slo import Slo
from harness.records.store import read_profile
from harness.traffic.mix import MIXES

ROOT = Path(__file__).resolve().parents[2]
MEASURED_H100 = ROOT / "results/gpu/nvidia-h100-80gb-hbm3/nvidia-h100-80gb-hbm3-1.5b.json"
COSTS = costs_of("1.5b")
MIXED = load_mix(ROOT / "scenarios/mixes/mixed.yaml")
SHORTS = MIXES["shorts"].with_slos({"short": {"ttfa_p95_s": 1.0, "rtf_p95": 0.9}})
FRAMES = 100.0


def model_of(name, topology=wire.FUSED, measured=None):
    card = card_of(name)
    return CardModel(card, assumptions_for(card, COSTS, topology, measured))


def made(*names, mix=MIXED, rates=(1.0, 10.0), topology=wire.FUSED, measured=None):
    models = [model_of(name, topology, measured) for name in names]
    return estimate(models, COSTS, topology, mix, mix.slos, rates)


def width(target):
    return target.interval[1] - target.interval[0]


# The closed form


def pools_with(step_s, limit=64, rtf=1e9, cap=0.999, room=None):
    """A device with these steps (seconds at 1, 2, … sessions), for sessions of 100 frames."""
    demand = MixDemand((ClassDemand("one", 1.0, np.array([FRAMES])),))
    device = ClosedDevice(np.asarray(step_s), {"one": 0.0}, {"one": 1.0}, room or 1e18, limit)
    slos = (Slo("one", "rtf", 0.95, rtf), Slo("one", "ttfa_s", 0.95, 1e9))
    return ClosedPools(device, demand, MemoryNeed.of(demand, 1000), slos, cap)


def test_sessions_that_share_a_device_are_as_many_as_in_processor_sharing():
    """Egalitarian processor sharing: P(n) = (1 - load) load^n, for any lengths (Kelly)."""
    pools = pools_with(0.01 * np.arange(1, 65))  # 100 frames/s, however many share it
    load = 0.6
    chances = pools._chances(load * 100 / FRAMES, 1, 64)
    assert chances[:20] == pytest.approx((1 - load) * load ** np.arange(20), rel=1e-6)


@pytest.mark.parametrize(("servers", "load"), [(4, 0.7), (16, 0.85), (50, 0.9)])
def test_sessions_that_wait_for_memory_are_as_many_as_erlang_says(servers, load):
    """With a constant step each admitted session has a server of its own: Erlang's C is the share that waits."""
    pools = pools_with(np.full(servers, 0.1), limit=servers)
    offered = load * servers  # sessions; each lasts 10 s
    chances = pools._chances(offered / 10.0, 1, servers)
    assert chances[servers:].sum() == pytest.approx(queueing.erlang_c(servers, offered), rel=1e-3)


def test_a_pool_is_as_large_as_it_must_be_and_no_larger():
    pools = pools_with(0.01 * np.arange(1, 65), rtf=0.9, cap=0.85)
    for qps in (0.3, 2.0, 7.5, 40.0, 500.0):
        devices = pools.fewest(qps)
        assert not pools.violated(qps, devices) and (devices == 1 or pools.violated(qps, devices - 1))
    assert pools.rate()[0] == pytest.approx(0.85, rel=0.25) and pools.rate()[0] <= 0.85
    counts = [pools.fewest(qps) for qps in np.geomspace(0.1, 100, 30)]
    assert counts == sorted(counts)
    assert pools_with(np.full(64, 1.0), rtf=0.9).fewest(1.0) is None  # one session alone is too slow


def simulated(planner, pools, mix):
    """The same device and mix in the simulator."""
    traffic, device = Traffic.draw(mix, np.random.default_rng(0)), pools.device
    step = StepTime("piecewise", tuple(device.step_s.tolist()), tuple(range(1, len(device.step_s) + 1)))
    same = Spread(Sample.of(np.ones(1000)))
    kv = KvRoom(device.room_bytes, COSTS.kv_bytes_per_token)
    first = next(iter(device.first_steps.values()))
    whole = Device(step, min(device.audio_base_s.values()), first, same, same, {}, float(len(device.step_s)), ())
    limits = Limits(mix.slos, 512, 512, kv, kv.slots(traffic.whole_frames))
    return Pools(whole, traffic, limits, planner.utilisation_cap)


@pytest.mark.parametrize(
    ("card", "mix", "qps"),
    [("h100", MIXED, 10.0), ("l40s", MIXED, 1.0), ("b200", MIXED, 1.0), ("l4", SHORTS, 10.0), ("l40s", SHORTS, 50.0)],
)
def test_counts_are_those_of_the_simulator(card, mix, qps):
    """Within one device, or 10%: the closed form leaves out how unevenly sessions of two lengths spread."""
    planner = _Planner(COSTS, wire.FUSED, MixDemand.of(mix), tuple(mix.slos), (qps,), 0.85)
    pools = planner._pools(model_of(card), {})
    in_simulation = simulated(planner, pools, mix)
    assert pools.steady_rate()[0] == pytest.approx(in_simulation.steady_rate(), rel=0.05)
    assert pools.fewest(qps) == pytest.approx(in_simulation.fewest(qps).devices, abs=max(1, 0.1 * pools.fewest(qps)))


def test_lengths_of_sessions_found_in_progress_are_drawn_by_their_work():
    demand = MixDemand.of(MIXED)
    frames, weights = demand.in_progress()
    long_share = 0.05 * 40_500 / (0.05 * 40_500 + 0.95 * 75)
    assert dict(zip(frames.tolist(), weights.tolist(), strict=True)) == pytest.approx(
        {75: 1 - long_share, 40_500: long_share}
    )
    assert demand.mean_frames == pytest.approx(0.05 * 40_500 + 0.95 * 75)
    assert demand.mean_context == pytest.approx(
        long_share * (21_600 + 150 + 40_500) + (1 - long_share) * (40 + 150 + 75)
    )  # the prompt, and half of the frames in each of two branches


# What an estimate says


def test_an_estimate_names_its_basis_everywhere_and_is_never_met():
    found = made("h100", "l40s")
    assert found.verdict == "planning estimate" and not found.accepted
    for card in found.cards:
        assert card.basis == card.rate_per_device.basis == card.memory.basis == "estimated"
        assert {target.basis for target in card.targets} == {"estimated"}
        assert all(target.interval[0] <= target.devices <= target.interval[1] for target in card.targets)
        assert card.rate_per_device.interval[0] <= card.rate_per_device.value <= card.rate_per_device.interval[1]
        assert [target.devices_n_plus_1 - target.devices for target in card.targets] == [1, 1]
        assert width(card.targets[-1]) >= 0.3 * card.targets[-1].devices, "too sure for an estimate"
    assert PlanningEstimate.of(found.to_dict()) == found


def test_a_better_card_needs_no_more_devices():
    counts = [card.targets[-1].devices for card in made("l4", "l40s", "h100", "h200", "b200").cards]
    assert counts == sorted(counts, reverse=True) and counts[0] > 4 * counts[-1]
    planner = _Planner(COSTS, wire.FUSED, MixDemand.of(MIXED), MIXED.slos, (10.0,), 0.85)
    h100 = model_of("h100")
    faster = replace(h100, card=h100.card.model_copy(update={"bandwidth_gb_s": 2 * h100.card.bandwidth_gb_s}))
    larger = replace(h100, card=h100.card.model_copy(update={"memory_gb": 2 * h100.card.memory_gb}))
    base, *others = (planner._pools(each, {}).fewest(10.0) for each in (h100, faster, larger))
    assert all(count < base for count in others)


def test_a_measured_profile_of_another_card_narrows_the_interval():
    measured = read_profile(MEASURED_H100)
    (free,), (scaled,) = (made("l40s", measured=each).cards for each in (None, measured))
    assert width(scaled.targets[-1]) < 0.75 * width(free.targets[-1]) and scaled.basis == "scaled"
    assert {target.basis for target in scaled.targets} == {"scaled"} and "H100" in scaled.note


def test_the_unknown_that_costs_most_stands_first_and_a_measurement_of_it_narrows_most():
    fused, staged = (made("l40s", topology=each).cards[0] for each in (wire.FUSED, wire.STAGED))
    assert (fused.unknowns[0].unknown, staged.unknowns[0].unknown) == (MEMORY, SPLIT)
    for card in (fused, staged):
        spreads = [abs(row.devices_at_high - row.devices_at_low) for row in card.unknowns]
        assert spreads == sorted(spreads, reverse=True) and spreads[0] > 0
        assert all(row.low < row.likely < row.high and row.source for row in card.unknowns)
        widths = [each.interval[1] - each.interval[0] for each in card.measurements]
        assert widths == sorted(widths) and widths[0] < 0.7 * width(card.targets[-1])
        assert card.unknowns[0].unknown in card.measurements[0].unknowns
    assert "harness profile --preset 1.5b" in fused.measurements[0].command
    assert "streams.py" in staged.measurements[0].command
    assert fused.targets[-1].devices < staged.targets[-1].devices


def test_a_session_that_does_not_fit_has_no_count_but_a_reason():
    (staged,), (fused,) = (made("a10", topology=each).cards for each in (wire.STAGED, wire.FUSED))
    assert "the longest session of the mix needs 2.95 GB of KV cache; the card has 2.23 GB" in staged.problem
    assert all(target.devices is None and target.note == staged.problem for target in staged.targets)
    assert 60 < staged.longest_s / 60 < 75 and staged.rate_per_device.value is None
    assert fused.problem == "" and fused.memory.longest_sessions == pytest.approx(3.1, abs=0.2)
    slow = SHORTS.with_slos({"short": {"rtf_p95": 0.001}})
    assert "rtf p95 of class short is violated even with one session" in made("h100", mix=slow).cards[0].problem


def test_an_estimated_profile_is_a_type_of_device_to_compare_with_and_says_what_it_is():
    card = card_of("l40s")
    staged, fused = (
        estimated_profile(card, COSTS, each, assumptions_for(card, COSTS, each)) for each in (wire.STAGED, wire.FUSED)
    )
    kind = DeviceType.of_profile(staged)
    assert kind.most_sessions == 128 and "estimated, not measured" in kind.note and kind.name.endswith("(estimated)")
    again = scaled(staged, "faster", 2 * staged.bandwidth_gb_s, 2 * staged.tflop_s)
    assert again.basis == "estimated", "a profile scaled from an estimate was taken for one scaled from a measurement"
    with pytest.raises(InputError, match="estimate the card with --topology staged"):
        DeviceType.of_profile(fused)


def test_slos_that_cannot_be_estimated_are_refused():
    with pytest.raises(InputError, match="stalls cannot be estimated"):
        made("h100", mix=SHORTS.with_slos({"short": {"stall_p95_s": 0.5}}))
    with pytest.raises(InputError, match="mix shorts has no SLOs: give --slo"):
        made("h100", mix=MIXES["shorts"])


def test_sessions_of_ten_seconds_are_bound_by_their_prompts_as_much_as_by_their_frames():
    """What is not known of openings shows: each frame step opens sessions / mean frames of them."""
    planner = _Planner(COSTS, wire.FUSED, MixDemand.of(SHORTS), SHORTS.slos, (10.0,), 0.85)
    steps = planner._pools(model_of("h100"), {}).device.step_s
    long = _Planner(COSTS, wire.FUSED, replace(MixDemand.of(SHORTS), classes=(
        replace(MixDemand.of(SHORTS).classes[0], frames=np.array([75.0])),)), SHORTS.slos, (10.0,), 0.85)  # fmt: skip
    assert long._pools(model_of("h100"), {}).device.step_s[63] > 6e-3 and steps[63] > steps[0]
