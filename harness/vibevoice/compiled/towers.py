"""The vocoder's convolution towers, compiled: layers process columns in tiles that stay in the L1 cache."""

from __future__ import annotations

import numpy as np
import torch

from harness.jit import kept
from harness.vibevoice.compiled.lanes import SOURCES, add, compiled, fma, inlined, load, peek, poke, store
from harness.vibevoice.compiled.pack import Pack, rounded
from harness.vibevoice.compiled.products import gelu, normed, product, room, spread, whole
from harness.vibevoice.stages import towers

BLOCK, CONVOLUTION, UPSAMPLING = 0, 1, 2  # kinds of layers
# Columns of the table of layers. Weights, biases, … are offsets into the array of weights.
KIND, CHANNELS, OUTPUTS, PAST, TAPS, RATIO, STATE, WEIGHT, BIAS, DOWN, DOWN_BIAS, MIX, MIX_BIAS, EPSILON = range(14)
FIELDS = 14


class CompiledTower:
    """``tower(x [channels, time, sessions], states) -> y``; each state [state_size] is updated in place."""

    def __init__(self, plain: towers.Tower):
        pack, rows, state = Pack(), [], 0
        for layer, size in zip(plain.layers, plain.sizes, strict=True):
            rows.append(_row(pack, layer) | {STATE: state})
            state += size
        self.layers = np.zeros((len(rows), FIELDS), np.int64)
        for i, row in enumerate(rows):
            self.layers[i, list(row)] = list(row.values())
        self.weights, self.state_size = pack.array(), state
        self._buffers: dict[tuple[int, int], list[np.ndarray]] = {}
        strides = self.layers[self.layers[:, KIND] == CONVOLUTION, RATIO]
        # Compiles, or reads from disk, before the first frame.
        self(torch.zeros(self.layers[0, CHANNELS], int(strides.prod()), 1), [torch.zeros(state)])

    def __call__(self, x: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
        channels, time, sessions = x.shape
        buffers = self._room(time, sessions)
        columns = time * sessions
        first = buffers[0][: channels * rounded(columns, 8)].reshape(channels, -1)
        first[:, :columns] = x.reshape(channels, columns).numpy()
        addresses = np.array([state.data_ptr() for state in states])
        time = run(SOURCES, self.layers, self.weights, *buffers, time, addresses)
        outputs, columns = self.layers[-1, OUTPUTS], time * sessions
        made = buffers[0][: outputs * rounded(columns, 8)].reshape(outputs, -1)[:, :columns]
        return torch.from_numpy(made.copy().reshape(outputs, time, sessions))  # the next call overwrites it

    def _room(self, time: int, sessions: int) -> list[np.ndarray]:
        """The working memory of a call: activations, the same with the past in front, a tile of inner activations."""
        if (time, sessions) not in self._buffers:
            self._buffers = {(time, sessions): [np.zeros(size, np.float32) for size in self._sizes(time, sessions)]}
        return self._buffers[time, sessions]

    def _sizes(self, time: int, sessions: int) -> tuple[int, int, int]:
        x = padded = inner = 0
        for kind, channels, outputs, past, _, ratio in self.layers[:, :6].tolist():
            columns = rounded(time * sessions, 8)
            x, padded = (
                max(x, channels * columns),
                max(padded, channels * (columns + (past + 1) * sessions + 16 * ratio)),
            )
            if kind == BLOCK:
                inner = max(inner, 5 * channels * max(24, 1200 // channels))
                continue
            inner = max(inner, outputs * columns) if kind == UPSAMPLING else inner
            time = time * ratio if kind == UPSAMPLING else time // ratio
            x = max(x, outputs * rounded(time * sessions, 8))
        return x + 16, padded + 16, inner + 16


def _row(pack: Pack, layer) -> dict[int, int]:
    """The kernel's description of a layer, with its weights packed."""
    row = {CHANNELS: layer.channels, PAST: layer.past, RATIO: 1}
    match layer:
        case towers.StreamingBlock():
            return row | _block_row(pack, layer)
        case towers.StreamingUpsampling():
            return row | _upsampling_row(pack, layer)
        case _:
            return row | _convolution_row(pack, layer)


def _block_row(pack: Pack, layer: towers.StreamingBlock) -> dict[int, int]:
    epsilon = pack.add(torch.cat([norm.epsilon.flatten() for norm in (layer.norm, layer.feed_norm)]))
    return {
        KIND: BLOCK,
        OUTPUTS: len(layer.up),
        WEIGHT: pack.matrix(layer.up),
        BIAS: pack.add(layer.up_bias),
        DOWN: pack.matrix(layer.down),
        DOWN_BIAS: pack.add(layer.down_bias),
        MIX: pack.add(torch.cat(layer.taps, 1)),
        MIX_BIAS: pack.add(layer.bias),
        EPSILON: epsilon,
    }


def _convolution_row(pack: Pack, layer: towers.StreamingConvolution) -> dict[int, int]:
    weight, outputs = layer.weight, len(layer.weight)
    if layer.stride > 1:  # each phase is a separate input with two taps
        weight = weight.view(outputs, layer.channels, 2, layer.stride).permute(0, 2, 1, 3)
    else:
        weight = weight.view(outputs, layer.channels, layer.width).transpose(1, 2)
    return {
        KIND: CONVOLUTION,
        OUTPUTS: outputs,
        TAPS: layer.width,
        RATIO: layer.stride,
        WEIGHT: pack.matrix(weight.reshape(outputs, -1)),
        BIAS: pack.add(layer.bias),
    }


def _upsampling_row(pack: Pack, layer: towers.StreamingUpsampling) -> dict[int, int]:
    weights = [pack.matrix(weight) for weight in layer.weight.view(layer.ratio, layer.outputs, -1)]
    return {
        KIND: UPSAMPLING,
        OUTPUTS: layer.outputs,
        TAPS: 2,
        RATIO: layer.ratio,
        WEIGHT: weights[0],
        BIAS: pack.add(layer.bias[: layer.outputs]),
    }


@compiled
def _bring_past(padded, ld, channels, past, time, states, state):
    """Copy the last samples of each session's state to the front of ``padded`` [channels, past + time, sessions]."""
    sessions = len(states)
    for session in range(sessions):
        for channel in range(channels):
            at, of = channel * ld + session, state + channel * past
            for i in range(past):
                padded[at + i * sessions] = peek(states[session], of + i)


@compiled
def _keep_last(padded, ld, channels, past, time, states, state):
    sessions = len(states)
    for session in range(sessions):
        for channel in range(channels):
            at, of = channel * ld + time * sessions + session, state + channel * past
            for i in range(past):
                poke(states[session], of + i, padded[at + i * sessions])


@compiled
def _block(layer, w, x, padded, inner, time, states):
    """A ConvNeXt layer, in place, by tiles of columns that stay in the L1 cache."""
    channels, past, sessions = layer[CHANNELS], layer[PAST], len(states)
    columns = time * sessions
    ld, ldp = whole(columns), room(past * sessions, columns)
    normed(x, 0, ld, channels, w[layer[EPSILON]], padded, past * sessions, ldp, columns)
    _bring_past(padded, ldp, channels, past, time, states, layer[STATE])
    _keep_last(padded, ldp, channels, past, time, states, layer[STATE])
    width = max(24, min(240, 1200 // channels // 24 * 24))
    wide = 4 * channels * width  # of inner: the activations of a tile; its normed inputs come after them
    for first in range(0, columns, width):
        tile = min(width, ld - first)
        for channel in range(channels):
            bias = spread(w, layer[MIX_BIAS] + channel)
            of = channel * ldp + first
            for column in range(0, tile, 8):
                mixed = add(load(x, channel * ld + first + column), bias)
                for i in range(past + 1):
                    tap = spread(w, layer[MIX] + channel * (past + 1) + i)
                    mixed = fma(tap, load(padded, of + i * sessions + column), mixed)
                store(x, channel * ld + first + column, mixed)
        normed(x, first, ld, channels, w[layer[EPSILON] + 1], inner, wide, width, tile)
        outputs = layer[OUTPUTS]
        product(
            w, layer[WEIGHT], layer[BIAS], outputs, inner, wide, width, channels, 1, 0, inner, 0, width, tile, False
        )
        for row in range(outputs):
            for column in range(row * width, row * width + tile, 8):
                store(inner, column, gelu(load(inner, column)))
        product(w, layer[DOWN], layer[DOWN_BIAS], channels, inner, 0, width, outputs, 1, 0, x, first, ld, tile, True)


@compiled
def _fill(padded, ldp, x, ld, channels, offset, columns):
    for channel in range(channels):
        for column in range(0, columns, 8):
            store(padded, channel * ldp + offset + column, load(x, channel * ld + column))


@inlined
def _move(x, of, y, at, count):
    for i in range(0, count - 7, 8):
        store(y, at + i, load(x, of + i))
    for i in range(count // 8 * 8, count):
        y[at + i] = x[of + i]


@compiled
def _convolution(layer, w, x, padded, time, states):
    """Stride 1: the inputs of tap k are the padded ones from k on."""
    channels, past, sessions = layer[CHANNELS], layer[PAST], len(states)
    columns = time * sessions
    ld, ldp = whole(columns), room(past * sessions, columns)
    _fill(padded, ldp, x, ld, channels, past * sessions, columns)
    _bring_past(padded, ldp, channels, past, time, states, layer[STATE])
    _keep_last(padded, ldp, channels, past, time, states, layer[STATE])
    rows, taps = layer[OUTPUTS], layer[TAPS]
    product(w, layer[WEIGHT], layer[BIAS], rows, padded, 0, ldp, channels, taps, sessions, x, 0, ld, columns, False)


@compiled
def _downsampling(layer, w, x, padded, time, states):
    """Kernel 2r and stride r: sample q r + p of a window is sample q of phase p, so each phase is a separate input."""
    channels, ratio, sessions = layer[CHANNELS], layer[RATIO], len(states)
    ld, made = whole(time * sessions), time // ratio
    ldp = room(sessions, made * sessions)
    for session in range(sessions):
        for channel in range(channels):
            of = layer[STATE] + channel * ratio
            for phase in range(ratio):
                padded[(channel * ratio + phase) * ldp + session] = peek(states[session], of + phase)
                last = channel * ld + (time - ratio + phase) * sessions + session
                poke(states[session], of + phase, x[last])
    for channel in range(channels):
        for t in range(time):
            at = (channel * ratio + t % ratio) * ldp + (1 + t // ratio) * sessions
            of = channel * ld + t * sessions
            _move(x, of, padded, at, sessions)
    rows, columns, inputs = layer[OUTPUTS], made * sessions, channels * ratio
    product(
        w, layer[WEIGHT], layer[BIAS], rows, padded, 0, ldp, inputs, 2, sessions, x, 0, whole(columns), columns, False
    )


@compiled
def _upsampling(layer, w, x, padded, inner, time, states):
    """Kernel 2r and stride r: r outputs of the present and the previous sample, interleaved afterwards."""
    channels, ratio, sessions = layer[CHANNELS], layer[RATIO], len(states)
    columns, outputs = time * sessions, layer[OUTPUTS]
    ld, ldp, ldy = whole(columns), room(sessions, columns), whole(ratio * columns)
    _fill(padded, ldp, x, ld, channels, sessions, columns)
    _bring_past(padded, ldp, channels, 1, time, states, layer[STATE])
    _keep_last(padded, ldp, channels, 1, time, states, layer[STATE])
    for phase in range(ratio):
        weight = layer[WEIGHT] + phase * ((outputs + 3) // 4 * 4) * channels * 2
        product(w, weight, layer[BIAS], outputs, padded, 0, ldp, channels, 2, sessions, inner, 0, ld, columns, False)
        for output in range(outputs):
            for t in range(time):
                at, of = output * ldy + (t * ratio + phase) * sessions, output * ld + t * sessions
                _move(inner, of, x, at, sessions)


@kept
def run(sources, layers, w, x, padded, inner, time, states):
    """Run x [channels, time, sessions] (one row every ``whole(time x sessions)``) through the layers, in place.

    ``states`` holds the address of each session's state, which is updated. Returns the number of samples of the output
    in x.
    """
    for i in range(len(layers)):
        layer = layers[i]
        if layer[KIND] == BLOCK:
            _block(layer, w, x, padded, inner, time, states)
        elif layer[KIND] == UPSAMPLING:
            _upsampling(layer, w, x, padded, inner, time, states)
            time *= layer[RATIO]
        elif layer[RATIO] > 1:
            _downsampling(layer, w, x, padded, time, states)
            time //= layer[RATIO]
        else:
            _convolution(layer, w, x, padded, time, states)
    return time
