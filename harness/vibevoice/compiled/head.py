"""The diffusion head and its solver, compiled: all steps of a frame in one call."""

from __future__ import annotations

import numpy as np
import torch

from harness.jit import kept
from harness.vibevoice.compiled.lanes import SOURCES, add, compiled, fma, inlined, load, mul, splat, store, sub
from harness.vibevoice.compiled.pack import Pack, rounded
from harness.vibevoice.compiled.products import normed, product, room, silu, spread, whole
from harness.vibevoice.stages import diffusion

# Offsets of the diffusion head's weights: those of the whole head, then gate and up, down, epsilon of each layer.
CONDITION, NOISY, MODULATION, MODULATION_BIAS, LAST, LAST_EPSILON, NOTHING, FIRST_LAYER = range(8)


class CompiledHead:
    """The diffusion head and its solver, all steps of a frame in one call."""

    def __init__(self, plain: diffusion.Head):
        head, pack = plain.head, Pack()
        self.latent, self.hidden = head.noisy_images_proj.in_features, plain.hidden
        self.layers, self.inner = len(head.layers), len(plain.gate_and_up[0]) // 2
        last = head.final_layer
        modulation, bias = _modulation(plain)
        at = {
            CONDITION: pack.matrix(head.cond_proj.weight),
            NOISY: pack.matrix(head.noisy_images_proj.weight),
            MODULATION: pack.matrix(modulation),
            MODULATION_BIAS: pack.add(bias),
            LAST: pack.matrix(last.linear_2.weight),
            LAST_EPSILON: pack.add(last.rms_norm_eps),
            NOTHING: pack.add(torch.zeros(max(self.hidden, 2 * self.inner, self.latent))),
        }
        for layer, gate_and_up in zip(head.layers, plain.gate_and_up, strict=True):
            down, epsilon = layer.ffn.down_proj.weight, layer.norm.variance_epsilon
            for offset in (pack.matrix(gate_and_up), pack.matrix(down), pack.add(epsilon)):
                at[len(at)] = offset
        self.at, self.weights = np.array([at[i] for i in range(len(at))]), pack.array()
        self._buffers: dict[int, list[np.ndarray]] = {}
        nothing = torch.zeros(1, 2, self.hidden), torch.zeros(1, self.latent), torch.zeros(1, 1)
        # Compiles, or reads from disk, before the first frame.
        self.denoise(*nothing, np.zeros(self.hidden, np.float32), np.zeros((1, 5), np.float32))

    def denoise(self, condition: torch.Tensor, noise: torch.Tensor, guidance: torch.Tensor, times, updates):
        """condition [N, 2, hidden], noise [N, 64], guidance [N, 1], times and updates -> latent [N, 64]."""
        count = len(noise)
        guide, x, before, given, *rest = self._room(count)
        guide[:count] = guidance[:, 0].numpy()
        x.reshape(self.latent, -1)[:, :count] = noise.t().numpy()
        before[:] = 0
        given.reshape(self.hidden, -1)[:, : 2 * count] = condition.transpose(0, 1).reshape(2 * count, -1).t().numpy()
        sizes = self.latent, self.hidden, self.inner, self.layers
        _denoise(SOURCES, self.at, sizes, self.weights, times, updates, guide, x, before, given, *rest, count)
        return torch.from_numpy(x.reshape(self.latent, -1)[:, :count].T.copy())

    def _room(self, count: int) -> list[np.ndarray]:
        """Working memory: guidance, x, previous x0, condition, hidden, t, modulations, inner activations."""
        if count not in self._buffers:
            one = rounded(count, 8)
            both, hidden = rounded(count + one, 8), self.hidden
            inner = max(2 * self.inner, self.latent, hidden) * both + 16
            square = hidden * both
            sizes = one, self.latent * one, self.latent * one, square, square + 16, square
            sizes = *sizes, (3 * self.layers + 2) * square, inner
            self._buffers = {count: [np.zeros(size, np.float32) for size in sizes]}
        return self._buffers[count]


def _modulation(plain: diffusion.Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of shift, scale and gate; a scale has 1 added and includes the weight of the norm before it."""
    parts = plain.modulation.view(-1, plain.hidden, plain.hidden).clone()
    bias = torch.zeros(len(parts), plain.hidden)
    for i, layer in enumerate(plain.head.layers):
        bias[3 * i + 1] = layer.norm.weight
        parts[3 * i + 1] *= layer.norm.weight[:, None]
    bias[-1] = 1
    return parts.flatten(0, 1), bias


@inlined
def _modulated(t, scale, shift, mod, rows, ld):
    for i in range(0, rows * ld, 8):
        store(t, i, fma(load(t, i), load(mod, scale + i), load(mod, shift + i)))


@kept
def _denoise(sources, at, sizes, w, times, updates, guidance, x, before, condition, hidden, t, mod, inner, count):
    """All steps of the solver for ``count`` frames, both branches in one batch; x [latent, count] becomes the latent.

    ``sizes`` are latent, hidden, inner and layers; ``times`` [steps, hidden] the embedded timesteps; ``updates``
    [steps, 5] as ``diffusion.solver_updates`` gives them; ``condition`` [hidden, 2 count]; the others working memory.
    """
    latent, size, wide, layers = sizes
    ldx, ld = whole(count), room(count, count)
    nothing = at[NOTHING]
    product(w, at[CONDITION], nothing, size, condition, 0, ld, size, 1, 0, inner, 0, ld, 2 * count, False)
    for i in range(size * ld):
        condition[i] = inner[i]
    outputs = (3 * layers + 2) * size
    for step in range(len(updates)):
        for row in range(size):
            time = spread(times, step * size + row)
            for column in range(row * ld, (row + 1) * ld, 8):
                store(t, column, silu(add(load(condition, column), time)))
        product(w, at[MODULATION], at[MODULATION_BIAS], outputs, t, 0, ld, size, 1, 0, mod, 0, ld, 2 * count, False)
        product(w, at[NOISY], nothing, size, x, 0, ldx, latent, 1, 0, hidden, 0, ld, count, False)
        for row in range(size):
            for column in range(row * ld, row * ld + ldx, 8):
                store(hidden, column + count, load(hidden, column))
        for i in range(layers):
            _head_layer(at, FIRST_LAYER + 3 * i, w, nothing, size, wide, hidden, t, mod, 3 * i, inner, count)
        normed(hidden, 0, ld, size, w[at[LAST_EPSILON]], t, 0, ld, ld)
        _modulated(t, (3 * layers + 1) * size * ld, 3 * layers * size * ld, mod, size, ld)
        product(w, at[LAST], nothing, latent, t, 0, ld, size, 1, 0, inner, 0, ld, 2 * count, False)
        _solve(updates[step], inner, ld, guidance, x, before, ldx, latent, count)


@compiled
def _head_layer(at, layer, w, nothing, size, wide, hidden, t, mod, part, inner, count):
    ld = room(count, count)
    columns, block = 2 * count, size * ld
    normed(hidden, 0, ld, size, w[at[layer + 2]], t, 0, ld, ld)
    _modulated(t, (part + 1) * block, part * block, mod, size, ld)
    product(w, at[layer], nothing, 2 * wide, t, 0, ld, size, 1, 0, inner, 0, ld, columns, False)
    for i in range(0, wide * ld, 8):
        store(inner, i, mul(silu(load(inner, i)), load(inner, wide * ld + i)))
    product(w, at[layer + 1], nothing, size, inner, 0, ld, wide, 1, 0, t, 0, ld, columns, False)
    gate = (part + 2) * block
    for i in range(0, block, 8):
        store(hidden, i, fma(load(mod, gate + i), load(t, i), load(hidden, i)))


@compiled
def _solve(update, velocity, ld, guidance, x, before, ldx, latent, count):
    """One step of DPM-Solver++ (2M) with classifier-free guidance, in place."""
    alpha, sigma = splat(update[0]), splat(-update[1])
    a, b, c = splat(update[2]), splat(update[3]), splat(update[4])
    for row in range(latent):
        for column in range(0, ldx, 8):
            of = row * ldx + column
            with_prompt, without = load(velocity, row * ld + column), load(velocity, row * ld + count + column)
            guided = fma(load(guidance, column), sub(with_prompt, without), without)
            now, last = load(x, of), load(before, of)
            clean = fma(alpha, now, mul(sigma, guided))
            store(x, of, fma(a, now, fma(b, clean, mul(c, last))))
            store(before, of, clean)
