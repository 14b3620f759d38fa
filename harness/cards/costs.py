"""What a step of each stage moves, computes and launches, by model and topology, without torch.

The counts in models.json were made by ``harness.vibevoice.counts`` from the networks themselves. Batches, contexts and
tokens may be numbers or arrays; the results then are, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from harness import wire
from harness.content import read
from harness.device_profile import PREFILL
from harness.errors import InputError

FILE = Path(__file__).with_name("models.json")
PLAIN = "plain"  # the staged ensemble without row-wise kernels, as it was at first
BRANCHES = 2  # of classifier-free guidance
Number = Any  # a float or an array of them


@dataclass(frozen=True, kw_only=True)
class Work:
    """Bytes of weights, KV caches and states; operations (a multiplication and an addition are two); activations, in
    bytes; kernels."""

    bytes: Number
    operations: Number
    activation_bytes: Number
    launches: Number

    def __add__(self, other: Work) -> Work:
        return Work(
            bytes=self.bytes + other.bytes,
            operations=self.operations + other.operations,
            activation_bytes=self.activation_bytes + other.activation_bytes,
            launches=self.launches + other.launches,
        )


@dataclass(frozen=True, kw_only=True)
class NetworkPart:
    """A network's parameters, and its operations for one row."""

    parameters: int
    operations: float


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """Kernels of a step, and its activation bytes: ``activations_fixed`` + ``activations_each`` x rows."""

    launches: int
    activations_fixed: int
    activations_each: int

    def activation_bytes(self, rows: Number) -> Number:
        return self.activations_fixed + self.activations_each * rows


@dataclass(frozen=True, kw_only=True)
class ModelCosts:
    """The costs of one preset. ``parameters``: by stage, as they are loaded. Bytes are those of ``dtype``."""

    preset: str
    dtype: str
    itemsize: int
    hidden_size: int
    most_positions: int
    kv_bytes_per_token: int
    state_values: int
    attention_operations: float
    parts: dict[str, NetworkPart]
    parameters: dict[str, int]
    graph_batches: tuple[int, ...]
    steps: dict[str, dict[str, StepCounts]]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of all stages, each stage once."""
        return self.itemsize * sum(self.parameters.values())

    def step(self, topology: str, batch: Number, context: Number) -> Work:
        """A frame step of the LLM: ``batch`` sessions of ``context`` positions in both branches together."""
        bytes_, operations = self._passed("backbone", BRANCHES * batch)
        for name in ("connectors", "legal_rows"):
            more = self._passed(name, batch)
            bytes_, operations = bytes_ + more[0], operations + more[1]
        kv_bytes = (batch * context + BRANCHES * batch) * self.kv_bytes_per_token
        operations = operations + batch * context * self.attention_operations
        return self._work(topology, wire.LLM, batch, bytes_ + kv_bytes, operations)

    def prefill(self, topology: str, tokens: Number, context: Number) -> Work:
        """A prompt part of ``tokens`` after ``context`` positions of the same prompt."""
        bytes_, operations = self._passed("backbone", tokens)
        kv_bytes = (context + tokens) * self.kv_bytes_per_token
        pairs = tokens * context + tokens * (tokens + 1) // 2
        operations = operations + pairs * self.attention_operations
        return self._work(topology, PREFILL, tokens, bytes_ + kv_bytes, operations)

    def denoise(self, topology: str, batch: Number, steps: int = wire.DEFAULT_DIFFUSION_STEPS) -> Work:
        """``steps`` passes of the diffusion head over both branches of ``batch`` frames."""
        bytes_, operations = self._passed("head", BRANCHES * batch)
        one = self._work(topology, wire.DIFFUSION, batch, steps * bytes_, steps * operations)
        share = steps / wire.DEFAULT_DIFFUSION_STEPS  # the counts are those of the default number
        return Work(
            bytes=one.bytes,
            operations=one.operations,
            activation_bytes=share * one.activation_bytes,
            launches=share * one.launches,
        )

    def vocode(self, topology: str, batch: Number) -> Work:
        """A frame of ``batch`` sessions through decoder and semantic encoder; their states are read and written."""
        decoder, encoder = self._passed("decoder", batch), self._passed("semantic_encoder", batch)
        states = 2 * batch * self.state_values * self.itemsize
        bytes_, operations = decoder[0] + encoder[0] + states, decoder[1] + encoder[1]
        return self._work(topology, wire.VOCODER, batch, bytes_, operations)

    def encode(self, topology: str, frames: Number) -> Work:
        """A voice sample of this many frames of 3,200 samples."""
        return self._work(topology, wire.VOICE, frames, *self._passed("acoustic_encoder", frames))

    def padded(self, batch: Number) -> Number:
        """The rows of the graph that runs a batch: the next recorded size; the batch itself beyond the largest."""
        sizes = np.array(self.graph_batches)
        place = np.minimum(np.searchsorted(sizes, batch), len(sizes) - 1)
        return np.maximum(sizes[place], batch)

    def _passed(self, part: str, rows: Number) -> tuple[Number, Number]:
        """Bytes and operations of one pass of a network over ``rows``: weights once, operations per row."""
        network = self.parts[part]
        return network.parameters * self.itemsize, rows * network.operations

    def _work(self, topology: str, stage: str, rows: Number, bytes_: Number, operations: Number) -> Work:
        counts = self.steps[topology][stage]
        return Work(
            bytes=bytes_,
            operations=operations,
            activation_bytes=counts.activation_bytes(rows),
            launches=counts.launches,
        )


@dataclass(frozen=True, kw_only=True)
class _Models:
    made_by: str
    models: dict[str, ModelCosts]


@cache
def _models() -> Mapping[str, ModelCosts]:
    return read(_Models, json.loads(FILE.read_text())).models


def costs_of(preset: str) -> ModelCosts:
    """The costs of a preset. Raises InputError for one that was not counted."""
    if preset not in _models():
        raise InputError(f"no estimate for preset {preset!r}: use one of {', '.join(_models())}")
    return _models()[preset]
