"""A step of the LLM's backbone, compiled: one new position for each of many sequences."""

from __future__ import annotations

import math

import numpy as np
import torch

from harness.jit import kept
from harness.vibevoice.compiled.lanes import (
    SOURCES,
    add,
    compiled,
    fma,
    load,
    mul,
    poke,
    splat,
    store,
    sub,
    total,
)
from harness.vibevoice.compiled.pack import Pack, rounded
from harness.vibevoice.compiled.products import exponential, normed, number, product, silu, spread, whole
from harness.vibevoice.stages import backbone

# Offsets of the backbone's weights: those shared by all layers, then those per layer.
FINAL_NORM, FINAL_EPSILON, NO_BIAS, FIRST = range(4)
QKV, QKV_BIAS, OUT, GATE_AND_UP, MLP_DOWN, ATTENTION_EPSILON, MLP_EPSILON = range(7)
BACKBONE_FIELDS = 7


class CompiledBackbone:
    """``backbone(embeds [rows, hidden], caches, lengths) -> hidden [rows, hidden]``: one new position for each row.

    A cache is [layers, 2, KV heads, capacity, head size]; the position is written after its ``length`` filled ones.
    """

    def __init__(self, plain: backbone.Backbone):
        pack, self.frequencies = Pack(), plain.frequencies
        self.hidden = plain.norm.weight.numel()
        inner = len(plain.layers[0].gate_and_up) // 2
        self.sizes = self.hidden, inner, plain.heads, plain.kv_heads, plain.size, len(plain.layers)
        if plain.size % 8:
            raise NotImplementedError(f"heads of {plain.size}")
        largest = torch.zeros(max(self.hidden, 2 * inner))
        at = [pack.add(plain.norm.weight), pack.add(plain.norm.variance_epsilon), pack.add(largest)]
        for layer in plain.layers:
            at += [
                pack.matrix(layer.qkv * layer.norm.weight),
                pack.add(layer.qkv_bias),
                pack.matrix(layer.out.weight),
                pack.matrix(layer.gate_and_up * layer.feed_norm.weight),
                pack.matrix(layer.down.weight),
                pack.add(layer.norm.variance_epsilon),
                pack.add(layer.feed_norm.variance_epsilon),
            ]
        self.at, self.weights = np.array(at), pack.array()
        self._buffers: dict[int, list[np.ndarray]] = {}
        self._scores = np.zeros(0, np.float32)
        # Compiles, or reads from disk, before the first frame.
        self(torch.zeros(1, self.hidden), [torch.zeros(len(plain.layers), 2, plain.kv_heads, 1, plain.size)], [0])

    def __call__(self, embeds: torch.Tensor, caches: list[torch.Tensor], lengths: list[int]) -> torch.Tensor:
        rows = len(caches)
        cos, sin, x, t, made, inner = self._room(rows)
        angles = torch.outer(self.frequencies, torch.tensor(lengths, dtype=torch.float32))
        cos[:, :rows], sin[:, :rows] = angles.cos().numpy(), angles.sin().numpy()
        x[:, :rows] = embeds.t().numpy()
        addresses = np.array([cache.data_ptr() for cache in caches])
        capacities, lengths = np.array([cache.shape[3] for cache in caches]), np.array(lengths)
        self._lengthen(int(lengths.max()) + self.sizes[4] + 16)
        working = [each.reshape(-1) for each in (x, t, made, inner)]
        turns = cos.reshape(-1), sin.reshape(-1)
        _step(
            SOURCES, self.at, self.sizes, self.weights, *turns, addresses, capacities, lengths, *working, self._scores
        )
        return torch.from_numpy(x[:, :rows].T.copy())

    def _room(self, rows: int) -> list[np.ndarray]:
        """Working memory: cos, sin, x, its normed form or the attention's, queries keys values, inner activations."""
        if rows not in self._buffers:
            hidden, inner, heads, kv_heads, size, _ = self.sizes
            features = size // 2, size // 2, hidden, max(hidden, heads * size), (heads + 2 * kv_heads) * size, 2 * inner
            self._buffers = {rows: [np.zeros((count, rounded(rows, 8)), np.float32) for count in features]}
        return self._buffers[rows]

    def _lengthen(self, count: int) -> None:
        if len(self._scores) < count:
            self._scores = np.zeros(2 * count, np.float32)


@kept
def _step(sources, at, sizes, w, cos, sin, caches, capacities, lengths, x, t, made, inner, scores):
    """One new position for each row: x [hidden, rows] becomes the hidden state after the last norm.

    ``sizes`` are hidden, inner, heads, KV heads, head size and layers; ``cos`` and ``sin`` [head size / 2, rows] are
    the rotary embeddings; ``caches`` are the addresses of the rows' caches [layers, 2, KV heads, capacity, head size],
    filled to ``lengths``.
    """
    hidden, wide, heads, kv_heads, size, layers = sizes
    rows = len(caches)
    ld, nothing = whole(rows), at[NO_BIAS]
    for layer in range(layers):
        of = FIRST + layer * BACKBONE_FIELDS
        normed(x, 0, ld, hidden, w[at[of + ATTENTION_EPSILON]], t, 0, ld, rows)
        outputs = (heads + 2 * kv_heads) * size
        product(w, at[of + QKV], at[of + QKV_BIAS], outputs, t, 0, ld, hidden, 1, 0, made, 0, ld, rows, False)
        _turn(made, heads + kv_heads, size, cos, sin, ld)
        for row in range(rows):
            cache = caches[row] + 4 * layer * 2 * kv_heads * capacities[row] * size
            _attend(made, row, ld, cache, capacities[row], lengths[row], heads, kv_heads, size, t, scores)
        product(w, at[of + OUT], nothing, hidden, t, 0, ld, heads * size, 1, 0, x, 0, ld, rows, True)
        normed(x, 0, ld, hidden, w[at[of + MLP_EPSILON]], t, 0, ld, rows)
        product(w, at[of + GATE_AND_UP], nothing, 2 * wide, t, 0, ld, hidden, 1, 0, inner, 0, ld, rows, False)
        for i in range(0, wide * ld, 8):
            store(inner, i, mul(silu(load(inner, i)), load(inner, wide * ld + i)))
        product(w, at[of + MLP_DOWN], nothing, hidden, inner, 0, ld, wide, 1, 0, x, 0, ld, rows, True)
    normed(x, 0, ld, hidden, w[at[FINAL_EPSILON]], x, 0, ld, rows)
    for i in range(hidden):
        weight = spread(w, at[FINAL_NORM] + i)
        for column in range(i * ld, (i + 1) * ld, 8):
            store(x, column, mul(weight, load(x, column)))


@compiled
def _turn(made, heads, size, cos, sin, ld):
    """Rotate the queries and keys in place."""
    half = size // 2 * ld
    for head in range(heads):
        for i in range(0, half, 8):
            first = head * size * ld + i
            a, b, c, s = load(made, first), load(made, first + half), load(cos, i), load(sin, i)
            store(made, first, sub(mul(a, c), mul(b, s)))
            store(made, first + half, fma(a, s, mul(b, c)))


@compiled
def _attend(made, row, ld, cache, capacity, length, heads, kv_heads, size, t, scores):
    """Append a row's key and value to its cache and attend with its queries to all positions; t [heads x size, rows].

    ``scores`` holds a weight for each position and, after them, the query.
    """
    query = (length + 8) // 8 * 8
    scale = np.float32(1.0 / math.sqrt(size))
    for kv_head in range(kv_heads):
        keys, values = kv_head * capacity * size, (kv_heads + kv_head) * capacity * size
        for i in range(size):
            place, of = length * size + i, (heads + kv_head) * size + i
            poke(cache, keys + place, made[of * ld + row])
            poke(cache, values + place, made[(of + kv_heads * size) * ld + row])
        for head in range(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads):
            for i in range(size):
                scores[query + i] = made[(head * size + i) * ld + row] * scale
            _weigh(cache, keys, length + 1, size, scores, query)
            for i in range(0, size, 8):
                _mix(
                    cache, values + i, length + 1, size, scores, query
                )  # overwrites the query, which is no longer needed
                for lane in range(8):
                    t[(head * size + i + lane) * ld + row] = scores[query + lane]


@compiled
def _weigh(cache, keys, positions, size, scores, query):
    """The softmax of the query's products with all keys."""
    highest = np.float32(-np.inf)
    for position in range(positions):
        products = number(0.0)
        for i in range(0, size, 8):
            products = fma(load(scores, query + i), load(cache, keys + position * size + i), products)
        score = total(products)
        scores[position] = score
        highest = max(highest, score)
    for position in range(positions, query):
        scores[position] = np.float32(-1e30)
    top, sums = splat(highest), number(0.0)
    for position in range(0, query, 8):
        weight = exponential(sub(load(scores, position), top))
        store(scores, position, weight)
        sums = add(sums, weight)
    share = splat(np.float32(1.0) / total(sums))
    for position in range(0, query, 8):
        store(scores, position, mul(load(scores, position), share))


@compiled
def _mix(cache, values, positions, size, scores, to):
    """Eight components of the weighted sum of all values, in four independent partial sums."""
    a = b = c = d = number(0.0)
    for position in range(0, positions - 3, 4):
        of = values + position * size
        a = fma(spread(scores, position), load(cache, of), a)
        b = fma(spread(scores, position + 1), load(cache, of + size), b)
        c = fma(spread(scores, position + 2), load(cache, of + 2 * size), c)
        d = fma(spread(scores, position + 3), load(cache, of + 3 * size), d)
    for position in range(positions // 4 * 4, positions):
        a = fma(spread(scores, position), load(cache, values + position * size), a)
    store(scores, to, add(add(a, b), add(c, d)))
