"""Estimated times: units by hand, what makes them longer and shorter, their intervals, and profiles made of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import gpu_memory, wire
from harness.cards import memory
from harness.cards.assumptions import COMPUTE, EAGER, HOST, LAUNCH, MEMORY, OF_STAGES, Assumptions
from harness.cards.card import BANDWIDTH, THROUGHPUT, card_of, own_cards
from harness.cards.costs import costs_of
from harness.cards.estimate import assumptions_for, estimated_profile
from harness.cards.times import CardTimes
from harness.device_profile import ESTIMATED, PREFILL, SCALED, Profile
from harness.errors import InputError
from harness.host.places import ROOT
from harness.records.store import read_profile, write_profile
from harness.vibevoice.profiling.times import ProfiledTimes

MEASURED_H100 = ROOT / "results/gpu/nvidia-h100-80gb-hbm3/nvidia-h100-80gb-hbm3-1.5b.json"
COSTS, H100 = costs_of("1.5b"), card_of("h100")
TOPOLOGIES = pytest.mark.parametrize("topology", [wire.STAGED, wire.FUSED])


def profile_of(card=H100, topology=wire.STAGED, measured=None, costs=COSTS):
    return estimated_profile(card, costs, topology, assumptions_for(card, costs, topology, measured))


def points_of(profile):
    return [point for points in profile.stages.values() for point in points]


def certain(card, topology=wire.STAGED, **values):
    """Times without any doubt: every range is one value, 1 unless given by name."""
    free = Assumptions.of(card, topology, ESTIMATED)

    def alike(ranges):
        one = {name: values.get(name, 1.0) for name in ranges}
        return {name: replace(ranges[name], low=v, likely=v, high=v) for name, v in one.items()}

    stages = {stage: alike(own) for stage, own in free.stages.items()}
    return CardTimes(
        card, COSTS, topology, replace(free, shares=alike(free.shares), stages=stages, common=alike(free.common))
    )


def test_bytes_and_operations_of_the_model_are_those_of_its_sizes():
    """By hand, from the sizes in VibeVoice's paper and configuration."""
    hidden, layers, kv_heads, head, ffn = 1536, 28, 2, 128, 8960
    assert COSTS.kv_bytes_per_token == 2 * layers * kv_heads * head * 2 == 28_672
    attention = hidden * hidden + 2 * hidden * kv_heads * head + hidden * hidden
    biases, norms = hidden + 2 * kv_heads * head, 2 * hidden
    backbone = layers * (attention + 3 * hidden * ffn + biases + norms) + hidden
    assert COSTS.parts["backbone"].parameters == backbone
    assert COSTS.parts["embeddings"].parameters == 151_936 * hidden
    assert COSTS.weight_bytes == pytest.approx(5.41e9, rel=0.01)  # 2.7 G numbers in bfloat16, decimal bytes
    step = COSTS.step(wire.STAGED, 1, 400)
    assert step.bytes == 2 * (backbone + COSTS.parts["connectors"].parameters + 4 * hidden) + 402 * 28_672
    assert step.operations == pytest.approx(2 * 2.62e9 + 10e6 + 400 * 0.172e6, rel=0.001)
    assert COSTS.denoise(wire.STAGED, 1).operations == pytest.approx(4.93e9, rel=0.001)
    assert COSTS.vocode(wire.STAGED, 1).operations == pytest.approx(2 * 3.633e9, rel=0.001)
    assert costs_of("7b").kv_bytes_per_token == 57_344
    with pytest.raises(InputError, match="no estimate for preset '3b': use one of tiny, 1.5b, 7b"):
        costs_of("3b")


def test_a_time_is_what_its_parts_are_by_hand():
    """2.65 GB at 3.35 TB/s, 301 kernels of 1 µs; 12 TFLOP at 989 TFLOP/s."""
    times, step = certain(H100), COSTS.step(wire.STAGED, 1, 400)
    by_hand_ms = step.launches * 1e-3 + (step.bytes + step.activation_bytes) / 3350e9 * 1e3
    assert times.step(1, 400).device_ms == pytest.approx(by_hand_ms) == pytest.approx(1.09, abs=0.02)
    prompt = COSTS.prefill(wire.STAGED, 4096, 0)
    assert prompt.operations == pytest.approx(4096 * 2.62e9 + 4096 * 4097 / 2 * 172_032, rel=0.001)
    by_hand_ms = prompt.launches * 1e-3 + prompt.operations / 989e12 * 1e3
    assert times.prefill(4096, 0).device_ms == pytest.approx(by_hand_ms) == pytest.approx(12.6, abs=0.1)
    halved = certain(H100, **{MEMORY: 0.5})
    work = COSTS.step(wire.STAGED, 1, 400)
    launches_ms = work.launches * 1e-3
    assert halved.step(1, 400).device_ms - launches_ms == pytest.approx(
        2 * (times.step(1, 400).device_ms - launches_ms)
    )
    assert times.floor_ms(work) == pytest.approx(work.bytes / 3350e9 * 1e3)
    eager = certain(H100, **{EAGER: 20.0}).prefill(64, 0)  # 313 launches of 20 µs take longer than the device
    assert eager.ms == pytest.approx(COSTS.prefill(wire.STAGED, 64, 0).launches * 0.02 + 0.3)


@TOPOLOGIES
@given(
    faster=st.floats(1.0, 4.0),
    batch=st.sampled_from([1, 8, 64, 128]),
    context=st.sampled_from([100, 7_600, 63_000]),
    place=st.floats(0, 1),
)
@settings(max_examples=30, deadline=None)
def test_a_faster_card_is_never_slower_and_more_work_never_faster(topology, faster, batch, context, place):
    free = Assumptions.of(H100, topology, ESTIMATED)
    draw = dict.fromkeys(free.names, place)
    slow = CardTimes(H100, COSTS, topology, free, draw)
    for name in ("bandwidth_gb_s", "bf16_tflop_s"):
        card = H100.model_copy(update={name: getattr(H100, name) * faster})
        fast = CardTimes(card, COSTS, topology, free, draw)
        assert fast.frame_ms(batch, context) <= slow.frame_ms(batch, context) * (1 + 1e-9)
        assert fast.prefill(256, context).ms <= slow.prefill(256, context).ms * (1 + 1e-9)
    assert slow.frame_ms(batch + 1, context) >= slow.frame_ms(batch, context)
    assert slow.frame_ms(batch, context + 100) >= slow.frame_ms(batch, context)


@TOPOLOGIES
@pytest.mark.parametrize("key", ["h100", "l40s", "b200"])
def test_the_interval_of_every_time_contains_it_and_the_floor_lies_below(topology, key):
    profile = profile_of(card_of(key), topology)
    assert all(point.low_ms < point.ms < point.high_ms for point in points_of(profile))
    assert all(point.roofline_ms < point.ms and point.device_ms <= point.ms for point in points_of(profile))
    assert all(point.high_ms / point.low_ms > 1.5 for point in points_of(profile)), "too sure for an estimate"


def test_more_of_the_unknown_in_a_draw_means_what_its_name_says():
    free = Assumptions.of(H100, wire.FUSED, ESTIMATED)
    frame = lambda **draw: CardTimes(H100, COSTS, wire.FUSED, free, draw).frame_ms(64, 7_600)  # noqa: E731
    for name in (MEMORY, BANDWIDTH):
        assert frame(**{name: 1.0}) < frame() < frame(**{name: 0.0})
    assert frame(**{LAUNCH: 0.0}) < frame() < frame(**{LAUNCH: 1.0})
    prompt = lambda **draw: CardTimes(H100, COSTS, wire.FUSED, free, draw).prefill(4096, 0).ms  # noqa: E731
    for name in (COMPUTE, THROUGHPUT):
        assert prompt(**{name: 1.0}) < prompt() < prompt(**{name: 0.0})


def test_draws_are_arrays_of_what_single_draws_are():
    free = Assumptions.of(H100, wire.FUSED, ESTIMATED)
    places = np.array([0.1, 0.5, 0.9])
    together = CardTimes(H100, COSTS, wire.FUSED, free, dict.fromkeys(free.names, places)).frame_ms(
        np.array([[1], [64]]), 400
    )
    for column, place in enumerate(places):
        alone = CardTimes(H100, COSTS, wire.FUSED, free, dict.fromkeys(free.names, place))
        assert together[:, column] == pytest.approx([alone.frame_ms(1, 400), alone.frame_ms(64, 400)])


# From the measured profile of another card


@TOPOLOGIES
def test_a_measured_profile_narrows_every_interval_and_says_so(topology):
    measured, l40s = read_profile(MEASURED_H100), card_of("l40s")
    free, scaled = profile_of(l40s, topology), profile_of(l40s, topology, measured)
    pairs = list(zip(points_of(free), points_of(scaled), strict=True))
    assert np.mean([a.high_ms / a.low_ms for a, _ in pairs]) > 1.3 * np.mean([b.high_ms / b.low_ms for _, b in pairs])
    assert all(b.high_ms / b.low_ms < 1.02 * a.high_ms / a.low_ms for a, b in pairs)
    for stage in (wire.LLM, wire.DIFFUSION, PREFILL):  # its kernels are those that were measured
        both = zip(free.stages[stage], scaled.stages[stage], strict=True)
        assert all(b.high_ms / b.low_ms < 0.8 * a.high_ms / a.low_ms for a, b in both)
    assert (free.basis, scaled.basis) == (ESTIMATED, SCALED) and "NVIDIA H100 80GB HBM3" in scaled.note
    assert scaled.device == "NVIDIA L40S (scaled)" and free.device == "NVIDIA L40S (estimated)"
    assert all(point.low_ms < point.ms < point.high_ms for _, point in pairs)


def test_a_calibration_finds_the_parameters_that_made_a_profile():
    """A profile that is made with known parameters, taken for a measured one, gives them back where they show."""
    known = {**dict.fromkeys(OF_STAGES, 1.0), MEMORY: 0.62, COMPUTE: 0.4, LAUNCH: 3.0}
    made = certain(H100, **known, **{BANDWIDTH: 0.9, THROUGHPUT: 0.8})
    profile = estimated_profile(H100, COSTS, wire.STAGED, made.assumptions)
    taken = replace(profile, device="NVIDIA H100 80GB HBM3", basis="", topology="")
    found = assumptions_for(card_of("l4"), COSTS, wire.STAGED, taken)
    assert found.stages[wire.LLM][MEMORY].likely == pytest.approx(0.62, rel=0.03)
    assert found.stages[wire.LLM][LAUNCH].likely == pytest.approx(3.0, rel=0.1)
    assert found.stages[PREFILL][COMPUTE].likely == pytest.approx(0.4, rel=0.03)
    own = assumptions_for(H100, COSTS, wire.STAGED, taken)
    assert own.shares[BANDWIDTH].likely == pytest.approx(0.9, rel=0.001)


def test_a_profile_without_graphs_tells_the_cost_of_launches_and_nothing_of_graphs():
    """The first visit to an H100: an LLM step of 510 launches took 11 ms, of which its kernels took 2.3."""
    file = MEASURED_H100.parent / "without-graphs" / MEASURED_H100.name
    found = assumptions_for(H100, COSTS, wire.FUSED, read_profile(file))
    free = Assumptions.of(H100, wire.FUSED, ESTIMATED)
    assert found.common[HOST] == free.common[HOST] and found.common[EAGER].likely == pytest.approx(21, abs=4)
    with_graphs = assumptions_for(H100, COSTS, wire.FUSED, read_profile(MEASURED_H100))
    assert with_graphs.common[HOST].likely == pytest.approx(1.0, abs=0.2)
    assert found.stages[wire.LLM][MEMORY].likely == pytest.approx(with_graphs.stages[wire.LLM][MEMORY].likely, rel=0.1)


def test_a_profile_from_which_nothing_can_be_learned_is_refused():
    measured = read_profile(MEASURED_H100)
    for other, says in (
        (profile_of(), "is estimated, not measured"),
        (replace(measured, preset="7b"), "was measured at preset 7b, not 1.5b"),
        (read_profile(ROOT / "results/profiles/amd-epyc-tiny.json"), "preset tiny, not 1.5b"),
        (replace(measured, tflop_s=None), "no bandwidth_gb_s or tflop_s"),
        (replace(measured, stages={}), "does not separate the time of its GPU"),
    ):
        with pytest.raises(InputError, match=says):
            assumptions_for(H100, COSTS, wire.STAGED, other)


# The profile as a file


@TOPOLOGIES
def test_an_estimated_profile_is_read_back_as_it_was_and_says_what_it_is(topology, tmp_path):
    made = profile_of(card_of("b200"), topology)
    write_profile(tmp_path / "b200.json", made)
    read = read_profile(tmp_path / "b200.json")
    assert read == made and read.known_as == ESTIMATED and read.topology == topology and read.is_separated
    assert MEMORY in read.ranges and "not measured" in read.note
    stored = json.loads((tmp_path / "b200.json").read_text())
    assert stored["basis"] == "estimated" and stored["stages"][wire.LLM][0]["low_ms"] > 0


def test_emulated_stages_take_the_times_of_an_estimate(tmp_path):
    made = profile_of()
    write_profile(tmp_path / "h100.json", made)
    times = ProfiledTimes(tmp_path / "h100.json")
    point = next(p for p in made.stages[wire.LLM] if (p.batch, p.context) == (8, 7_600))
    assert times.step_ms([7_600] * 8) == pytest.approx(point.ms)
    assert sum(times.parts_ms(lambda t: t.vocode_ms(16))) == pytest.approx(times.vocode_ms(16))
    assert times.basis == "device times from: estimate" and "estimated" in times.device_name
    assert times.sizes.state_values == COSTS.state_values


def test_an_older_profile_is_a_measured_one():
    assert read_profile(MEASURED_H100).known_as == "measured"
    assert Profile.of(read_profile(MEASURED_H100).to_dict()) == read_profile(MEASURED_H100)


def test_a_model_that_does_not_fit_a_card_has_no_profile():
    with pytest.raises(InputError, match="7b does not fit the NVIDIA A10: weights and processes .* of 24"):
        profile_of(card_of("a10"), costs=costs_of("7b"))
    with pytest.raises(InputError, match="--topology round: use one of staged, fused"):
        assumptions_for(H100, COSTS, "round")


# Memory


@TOPOLOGIES
@pytest.mark.parametrize("key", sorted(own_cards()))
def test_memory_is_spent_to_the_last_byte_and_the_room_is_what_a_server_grants(topology, key):
    card = card_of(key)
    budget = memory.budget_of(card, COSTS, topology)
    parts = budget.reserve_bytes, budget.weight_bytes, budget.process_bytes, budget.table_bytes, budget.free_bytes
    assert sum(parts) == budget.total_bytes == card.memory_gb * 1e9
    taken, processes = budget.weight_bytes + budget.table_bytes, budget.processes
    granted = gpu_memory.gpu_room(budget.total_bytes, taken, 1, max(COSTS.graph_batches), processes)
    assert budget.room_bytes == pytest.approx(granted, abs=2)
    counts = [budget.sessions_of(seconds) for seconds in memory.LENGTHS_S]
    assert counts == sorted(counts, reverse=True)


def test_ninety_minutes_on_a_24_gb_card_fit_the_fused_engine_and_not_the_staged_ensemble():
    """A session of 40,500 frames: 21,600 tokens of script, 150 of voices, and two branches of 40,500 positions."""
    session_bytes = (21_600 + 150 + 2 * 40_500) * 28_672
    fused, staged = (memory.budget_of(card_of("a10"), COSTS, each) for each in (wire.FUSED, wire.STAGED))
    assert session_bytes == pytest.approx(2.95e9, rel=0.002)
    assert fused.sessions_of(5400) == fused.room_bytes // session_bytes == 3 and fused.longest_s == 5400
    assert staged.sessions_of(5400) == 0 and 60 < staged.longest_s / 60 < 75
    assert memory.budget_of(card_of("h200"), COSTS, wire.FUSED).sessions_of(5400) == pytest.approx(38, abs=2)
    assert (
        memory.budget_of(card_of("h200"), costs_of("7b"), wire.FUSED).sessions_of(5400) == 0
    )  # it speaks no 90 minutes
    assert memory.budget_of(card_of("h200"), costs_of("7b"), wire.FUSED).most_frames * wire.SECONDS_PER_FRAME == (
        pytest.approx(47.5 * 60, rel=0.01)
    )  # of 32K positions


def test_more_memory_for_processes_leaves_less_for_sessions():
    rooms = [memory.budget_of(H100, COSTS, wire.FUSED, factor).room_bytes for factor in (0.7, 1.0, 1.4)]
    assert rooms == sorted(rooms, reverse=True)
