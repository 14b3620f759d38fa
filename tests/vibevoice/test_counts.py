"""Counts of steps on the meta device: what the stored counts say is what the networks do today."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")
from harness import wire
from harness.cards.costs import costs_of
from harness.device_profile import PREFILL
from harness.vibevoice.profiling.roofline import Roofline
from harness.vibevoice.stages.presets import Weights

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "1")  # as other tests have the kernels, whichever comes first
    from harness.vibevoice import counts
    from harness.vibevoice.engine import graph_step

STORED = json.loads(counts.FILE.read_text())["models"]
AGAIN = f"the networks have changed: run `{json.loads(counts.FILE.read_text())['made_by']}`"


def test_the_stored_counts_are_those_of_the_networks_of_today():
    assert counts.counts_of("tiny") == STORED["tiny"], AGAIN
    assert counts.PRESETS == tuple(STORED)


@pytest.mark.parametrize("preset", ["tiny", "1.5b", "7b"])
def test_sizes_and_costs_are_those_of_the_roofline(preset):
    weights, costs = Weights(preset, device="meta"), costs_of(preset)
    roofline = Roofline(weights.config, 2)
    assert costs.parameters == weights.parameters() and costs.dtype == "bfloat16"
    assert costs.kv_bytes_per_token == roofline.kv_bytes_per_token
    for batch in (1, 16, 128):
        for context in (0, 7_600):
            own, known = costs.step(wire.STAGED, batch, context), roofline.step(batch, context)
            assert (own.bytes, own.operations) == pytest.approx((known.bytes, known.operations))
        own, known = costs.denoise(wire.STAGED, batch, 20), roofline.denoise(batch, 20)
        assert (own.bytes, own.operations) == pytest.approx((known.bytes, known.operations))
        own, known = costs.vocode(wire.STAGED, batch), roofline.vocode(batch, costs.state_values)
        assert (own.bytes, own.operations) == pytest.approx((known.bytes, known.operations))
        own, known = costs.prefill(wire.STAGED, 8 * batch, 900), roofline.prefill(8 * batch, 900)
        assert (own.bytes, own.operations) == pytest.approx((known.bytes, known.operations))
        own, known = costs.encode(wire.STAGED, batch), roofline.encode(batch)
        assert (own.bytes, own.operations) == pytest.approx((known.bytes, known.operations))


def test_launches_are_near_what_an_h100_launched():
    """results/gpu: a staged step without row-wise kernels 519, 455, 1391; fused rows 329, 207; the engine 803 and 778.

    A few operators launch more than one kernel on the GPU (products that are split).
    """
    steps = costs_of("1.5b").steps
    seen = {wire.LLM: 519, wire.DIFFUSION: 455, wire.VOCODER: 1391, PREFILL: 516, wire.VOICE: 775}
    for stage, launches in seen.items():
        assert 0.7 * launches < steps[counts.PLAIN][stage].launches <= launches
    for stage, launches in {wire.LLM: 329, wire.DIFFUSION: 207}.items():
        assert 0.9 * launches < steps[wire.FUSED][stage].launches <= launches
    whole = sum(steps[wire.FUSED][stage].launches for stage in wire.STAGES)
    assert 0.9 * 778 < whole <= 803


def test_activations_of_the_vocoder_are_what_was_counted_by_hand():
    """19.9 GB a step of 64 sessions with separate operations; fused blocks read and write each activation once."""
    steps = costs_of("1.5b").steps
    assert steps[wire.STAGED][wire.VOCODER].activation_bytes(64) == pytest.approx(19.9e9, rel=0.08)
    assert steps[wire.FUSED][wire.VOCODER].activation_bytes(64) < 0.25 * 19.9e9


def test_tables_of_the_engine_are_counted_as_the_engine_does():
    from harness.cards import memory
    from harness.cards.card import card_of

    weights = Weights("1.5b", device="meta")
    budget = memory.budget_of(card_of("h100"), costs_of("1.5b"), wire.FUSED)
    assert budget.table_bytes == graph_step.table_bytes(weights, memory.SESSIONS)


def test_a_tensor_counts_each_time_that_a_kernel_reads_or_writes_it():
    a, b = (torch.empty(10, 4, device="meta") for _ in range(2))  # 160 bytes each, there before

    def step():
        c = a + b  # writes 160
        c = c.view(4, 10)  # no kernel
        return (c * 2).sum()  # reads 160, writes 160; reads 160, writes 4

    count = counts.counted(step)
    assert (count.launches, count.activation_bytes) == (3, 160 + 320 + 164)
    wide = counts.counted(lambda: (a + b)[:1].expand(10, 4).clone())  # an expanded row is read once
    assert wide.activation_bytes == 160 + 16 + 160
