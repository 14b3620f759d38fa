"""The estimated time of a step: host + launches x launch cost + floor / efficiency.

floor = max(bytes / bandwidth, operations / throughput), the roofline (Williams, Waterman and Patterson, CACM 52,
2009), with the bytes of activations counted, which vibevoice/profiling/roofline.py takes as free.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from harness import wire
from harness.cards.assumptions import (
    ACTIVATIONS,
    COMPUTE,
    EAGER,
    EAGER_HOST_MS,
    HOST,
    HOST_MS,
    LAUNCH,
    MEMORY,
    Assumptions,
)
from harness.cards.card import BANDWIDTH, THROUGHPUT, Card
from harness.cards.costs import ModelCosts, Number, Work
from harness.cards.ranges import Draw
from harness.device_profile import PREFILL

GRAPH_TOKENS, GRAPH_CONTEXT = 256, 4096  # largest prompt part and context that the fused engine runs as a graph


class CallTimes(NamedTuple):
    """Milliseconds of the device and of the host, one after the other."""

    device_ms: Number
    host_ms: Number

    @property
    def ms(self) -> Number:
        return self.device_ms + self.host_ms


class CardTimes:
    """Times of a model's steps on a card in a topology; the unknowns have the values of a draw (empty: likely)."""

    def __init__(
        self, card: Card, costs: ModelCosts, topology: str, assumptions: Assumptions, draw: Draw | None = None
    ):
        self.card, self.costs, self.topology, self.assumptions = card, costs, topology, assumptions
        self.draw = draw or {}

    def step(self, batch: Number, context: Number) -> CallTimes:
        """A frame step of the LLM."""
        return self._graph(wire.LLM, self.costs.step(self.topology, batch, context), batch)

    def denoise(self, batch: Number, steps: int = wire.DEFAULT_DIFFUSION_STEPS) -> CallTimes:
        work = self.costs.denoise(self.topology, batch, steps)
        recorded = steps == wire.DEFAULT_DIFFUSION_STEPS
        return self._graph(wire.DIFFUSION, work, batch) if recorded else self._eager(wire.DIFFUSION, work)

    def vocode(self, batch: Number) -> CallTimes:
        return self._graph(wire.VOCODER, self.costs.vocode(self.topology, batch), batch)

    def prefill(self, tokens: int, context: int) -> CallTimes:
        """A prompt part; short ones of the fused engine are graphs."""
        work = self.costs.prefill(self.topology, tokens, context)
        recorded = self.topology == wire.FUSED and tokens <= GRAPH_TOKENS and context + tokens <= GRAPH_CONTEXT
        return self._graph(PREFILL, work, 1) if recorded else self._eager(PREFILL, work)

    def encode(self, seconds: float) -> CallTimes:
        """A voice sample."""
        frames = np.ceil(seconds * wire.FRAMES_PER_SECOND)
        return self._eager(wire.VOICE, self.costs.encode(self.topology, frames))

    def frame_ms(self, batch: Number, context: Number) -> Number:
        """A whole frame step of ``batch`` sessions in one process, or stage after stage, without hops."""
        parts = self.step(batch, context), self.denoise(batch), self.vocode(batch)
        if self.topology == wire.FUSED:  # the host works while the device does
            fixed, each = HOST_MS[wire.FUSED]
            host_ms = self.assumptions.values(wire.LLM, self.draw)[HOST] * (fixed + each * batch)
            return np.maximum(sum(part.device_ms for part in parts), host_ms)
        return sum(part.ms for part in parts)

    def floor_ms(self, work: Work) -> Number:
        """The lower bound at the speeds that the card reaches, without activations."""
        values = self.assumptions.values(wire.LLM, self.draw)
        return np.maximum(self._moved_ms(work.bytes, values), self._computed_ms(work.operations, values))

    def device_ms(self, stage: str, work: Work) -> Number:
        """Launches and the floor with activations, at the efficiency of the stage's kernels."""
        values = self.assumptions.values(stage, self.draw)
        moved = work.bytes + values[ACTIVATIONS] * work.activation_bytes
        moved_ms = self._moved_ms(moved, values) / values[MEMORY]
        computed_ms = self._computed_ms(work.operations, values) / values[COMPUTE]
        return work.launches * values[LAUNCH] / 1e3 + np.maximum(moved_ms, computed_ms)

    def _moved_ms(self, bytes_: Number, values: dict[str, Number]) -> Number:
        return bytes_ / (self.card.bandwidth_gb_s * values[BANDWIDTH] * 1e9) * 1e3

    def _computed_ms(self, operations: Number, values: dict[str, Number]) -> Number:
        return operations / (self.card.bf16_tflop_s * values[THROUGHPUT] * 1e12) * 1e3

    def _graph(self, stage: str, work: Work, batch: Number) -> CallTimes:
        device_ms = self.device_ms(stage, work)
        if self.topology == wire.FUSED:
            return CallTimes(device_ms, 0.0 * device_ms)
        fixed, each = HOST_MS[wire.STAGED]
        host = self.assumptions.values(stage, self.draw)[HOST]
        return CallTimes(device_ms, host * (fixed + each * batch) + 0.0 * device_ms)

    def _eager(self, stage: str, work: Work) -> CallTimes:
        """Kernels launched one by one: the host is in the way only as far as it is slower than the device."""
        values, device_ms = self.assumptions.values(stage, self.draw), self.device_ms(stage, work)
        launching_ms = work.launches * values[EAGER] / 1e3
        return CallTimes(device_ms, np.maximum(launching_ms - device_ms, 0.0) + EAGER_HOST_MS * values[HOST])
