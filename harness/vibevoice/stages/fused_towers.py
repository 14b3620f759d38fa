"""The convolution towers of towers.py on a GPU, channels last: a few Triton kernels beside the matrix products.

The states of all sessions are rows of one table, each laid out like the state of one session in towers.Tower. A step
reads one row of a session and writes another one, so that no kernel waits for another session.

- a block with few channels is one kernel whose hidden values never leave the multiprocessor: it reads and writes the
  activations once, where separate operations would move them twenty times;
- a block with many channels has few positions, and its time is that of reading its weights: one kernel for convolution
  and norms, then two products of torch's libraries;
- a strided or transposed convolution is one product over windows that a kernel gathers; a convolution from or to a
  single channel is a kernel.

Everything happens on the device, with shapes that depend on the inputs' shapes alone, so that a CUDA graph can record
it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.nn import functional

from harness.vibevoice.kernels.ragged import on_device
from harness.vibevoice.stages.towers import StreamingBlock, StreamingConvolution, StreamingUpsampling, Tower

# Largest number of channels of a block that is one kernel: on an H100, three blocks of 128 took 0.48 ms for 64
# sessions; three of 256, with as many operations, took 0.22 ms as two products. In float32 there are no tensor cores to
# use.
FUSED_CHANNELS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 0}
# Types in which the product's built-in tanh approximation of gelu is as exact as erf: they differ by less than
# rounding.
PRODUCT_GELU = {torch.bfloat16}
# Settings of such a block by its channels, rounded up to a power of two: positions, hidden values per pass, warps,
# pipeline stages of the products, and taps prefetched at once.
BLOCK_TILES = {
    16: (64, 64, 4, 2, 1),
    32: (64, 64, 4, 2, 7),
    64: (64, 32, 4, 2, 1),
    128: (64, 32, 8, 2, 1),
    256: (32, 32, 8, 2, 1),
}
# Types in which such a block approximates gelu by a polynomial, with an error below 6e-5: the exact one takes longer
# than the products. In bfloat16 the rounding of any value above 0.03 is larger.
POLYNOMIAL_GELU = {torch.bfloat16}
MIX_VALUES, MIX_WARPS = 2048, 4  # per program that mixes the positions of a block with many channels
WINDOW_VALUES, WINDOW_WARPS = 2048, 4  # per program that gathers windows
NARROW_VALUES, NARROW_WARPS = 4096, 4  # per program that convolves from or to a single channel
_FEWEST_SIDE = 16  # of a matrix product on tensor cores
_GELU, _SILU, _POLYNOMIAL_GELU = 0, 1, 2
_ACTIVATIONS = {functional.gelu: _GELU, functional.silu: _SILU}
_IN_PLACE = {functional.gelu: torch.ops.aten.gelu_, functional.silu: torch.ops.aten.silu_}


@dataclass(frozen=True)
class _States:
    """Where a layer reads its part of each session's state, and where it writes the next one."""

    table: torch.Tensor
    read: torch.Tensor
    write: torch.Tensor


class FusedTower:
    """``tower(x, states, read, write) -> y``: one step of many sessions of a ``towers.Tower``, on its device.

    x [sessions, time, channels] in the tower's dtype, y likewise. ``states`` [rows, total] holds the tower's part of a
    row in the columns from ``offset`` to ``offset + state_size``. Session i reads its state from row ``read[i]`` and
    writes the next one to row ``write[i]`` (int64, on the device), which no session of the step may read. Sessions may
    share a row that they write: its contents are then undefined. No other row is written. Raises NotImplementedError
    for a layer or an activation without kernels.
    """

    def __init__(self, plain: Tower, offset: int = 0):
        self.state_size = plain.state_size
        places = itertools.accumulate(plain.sizes[:-1], initial=offset)
        self.layers = [_fused(layer, place) for layer, place in zip(plain.layers, places, strict=True)]

    def __call__(self, x: torch.Tensor, states: torch.Tensor, read: torch.Tensor, write: torch.Tensor) -> torch.Tensor:
        if not (read.is_contiguous() and write.is_contiguous()):
            raise ValueError(
                f"read and write are not contiguous (strides {read.stride()} and {write.stride()}): pass copies"
            )
        x, around = x.contiguous(), _States(states, read, write)
        with on_device(x.device):
            for layer in self.layers:
                x = layer(x, around)
        return x


def _fused(layer, place: int):
    """A layer of a plain tower for channels-last activations; its part of a state starts at column ``place``."""
    if isinstance(layer, StreamingBlock):
        kind = _FusedBlock if layer.channels <= FUSED_CHANNELS[layer.up.dtype] else _WideBlock
        return kind(layer, place)
    if isinstance(layer, StreamingUpsampling):
        return _Windowed(place, layer.weight, layer.bias, layer.channels, 2, 1, layer.ratio)
    if not isinstance(layer, StreamingConvolution):
        raise NotImplementedError(f"there is no kernel for a layer of type {type(layer).__name__}")
    outputs = len(layer.weight)
    if layer.stride == 1 and 1 in (outputs, layer.channels):
        return _Narrow(layer, place)
    weight = layer.weight.view(outputs, layer.channels, layer.width).transpose(1, 2).reshape(outputs, -1)
    return _Windowed(place, weight, layer.bias, layer.channels, layer.width, layer.stride, 1)


class _Mixer:
    """The weights of the depthwise convolution and the feed-forward network, common to both kinds of blocks."""

    def __init__(self, plain: StreamingBlock, place: int):
        self.place, self.channels, self.width = place, plain.channels, plain.past + 1
        self.epsilons = plain.norm.constant, plain.feed_norm.constant
        self.taps = plain.kernel[:, 0, :, 0].t().contiguous()  # [width, channels]
        self.bias, self.up_bias, self.down_bias = (each[:, 0] for each in (plain.bias, plain.up_bias, plain.down_bias))
        self.up, self.down, self.activation = plain.up, plain.down, plain.activation
        if self.activation not in _ACTIVATIONS:
            raise NotImplementedError(f"there is no kernel for the activation {self.activation}")
        self.room = max(_FEWEST_SIDE, triton.next_power_of_2(self.channels))


class _FusedBlock(_Mixer):
    def __init__(self, plain: StreamingBlock, place: int):
        super().__init__(plain, place)
        self.hidden, self.known_as = len(self.up), _ACTIVATIONS[self.activation]
        if self.known_as == _GELU and self.up.dtype in POLYNOMIAL_GELU:
            self.known_as = _POLYNOMIAL_GELU

    def __call__(self, x: torch.Tensor, around: _States) -> torch.Tensor:
        sessions, time, _ = x.shape
        y, count = torch.empty_like(x), sessions * time
        block, chunk, warps, stages, taps_at_once = BLOCK_TILES[self.room]
        _block[(triton.cdiv(count, block) + sessions,)](
            x, y, around.table, around.read, around.write,
            self.taps, self.bias, self.up, self.up_bias, self.down, self.down_bias, *self.epsilons,
            self.place, around.table.stride(0), count, time,
            channels=self.channels, room=self.room, hidden=self.hidden, width=self.width, block=block,
            chunk=min(chunk, max(_FEWEST_SIDE, triton.next_power_of_2(self.hidden))),
            activation=self.known_as, taps_at_once=taps_at_once, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return y


class _WideBlock(_Mixer):
    def __call__(self, x: torch.Tensor, around: _States) -> torch.Tensor:
        sessions, time, _ = x.shape
        mixed, normed, count = torch.empty_like(x), torch.empty_like(x), sessions * time
        block = max(1, MIX_VALUES // self.room)
        _mix[(triton.cdiv(count, block) + sessions,)](
            x, mixed, normed, around.table, around.read, around.write,
            self.taps, self.bias, self.down_bias, *self.epsilons,
            self.place, around.table.stride(0), count, time,
            channels=self.channels, room=self.room, width=self.width, block=block, num_warps=MIX_WARPS,
        )  # fmt: skip
        inner = self._inner(normed.view(count, -1))
        return mixed.view(count, -1).addmm_(inner, self.down.t()).view(x.shape)

    def _inner(self, normed: torch.Tensor) -> torch.Tensor:
        if self.activation is functional.gelu and normed.is_cuda and normed.dtype in PRODUCT_GELU:
            return torch._addmm_activation(self.up_bias, normed, self.up.t(), use_gelu=True)
        inner = torch.addmm(self.up_bias, normed, self.up.t())
        return _IN_PLACE[self.activation](inner)  # in place: two copies would not fit in an H100's L2 cache


class _Windowed:
    """A convolution as one product: ``weight`` [ratio x outputs, width x channels] over windows of ``width`` samples.

    A transposed one produces ``ratio`` samples per window, interleaved.
    """

    def __init__(self, place: int, weight, bias, channels: int, width: int, stride: int, ratio: int):
        self.place, self.weight, self.bias = place, weight.contiguous(), bias[:, 0]
        self.channels, self.width, self.stride, self.ratio = channels, width, stride, ratio

    def __call__(self, x: torch.Tensor, around: _States) -> torch.Tensor:
        sessions, time, _ = x.shape
        count, columns = sessions * time // self.stride, self.width * self.channels
        windows = x.new_empty(count, columns)
        wide = min(WINDOW_VALUES, triton.next_power_of_2(columns))
        block = WINDOW_VALUES // wide
        _windows[(triton.cdiv(count, block), triton.cdiv(columns, wide))](
            x, windows, around.table, around.read, around.write,
            self.place, around.table.stride(0), count, time // self.stride,
            channels=self.channels, width=self.width, stride=self.stride, block=block, wide=wide,
            num_warps=WINDOW_WARPS,
        )  # fmt: skip
        return torch.addmm(self.bias, windows, self.weight.t()).view(sessions, time // self.stride * self.ratio, -1)


class _Narrow:
    """A convolution of stride 1 from a single channel, or to one."""

    def __init__(self, plain: StreamingConvolution, place: int):
        self.place, self.channels, self.width = place, plain.channels, plain.width
        self.outputs, self.bias = len(plain.weight), plain.bias[:, 0]
        weight = plain.weight.view(self.outputs, self.channels, self.width)
        self.weight = weight.permute(2, 1, 0).reshape(self.width, -1).contiguous()  # [width, channels x outputs]

    def __call__(self, x: torch.Tensor, around: _States) -> torch.Tensor:
        sessions, time, _ = x.shape
        count, room = sessions * time, triton.next_power_of_2(self.channels * self.outputs)
        block = max(1, NARROW_VALUES // room)
        y = x.new_empty(sessions, time, self.outputs)
        _narrow[(triton.cdiv(count, block) + sessions,)](
            x, y, around.table, around.read, around.write, self.weight, self.bias,
            self.place, around.table.stride(0), count, time,
            channels=self.channels, outputs=self.outputs, room=room, width=self.width, block=block,
            num_warps=NARROW_WARPS,
        )  # fmt: skip
        return y


@triton.jit
def _load(pointers, mask, whole: tl.constexpr):
    """Load values; with ``whole`` nothing is masked and the mask is not computed."""
    if whole:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _rooted(x, channels: tl.constexpr, epsilon):
    """x [block, room] / its root mean square over channels; x must be 0 beyond the channels."""
    return x * tl.rsqrt(tl.sum(x * x, axis=1) / channels + epsilon)[:, None]


@triton.jit
def _convolved(
    total, x, states, read, taps, start, epsilon, place, row_size, count, time,
    channels: tl.constexpr, room: tl.constexpr, weights: tl.constexpr, breadth: tl.constexpr,
    width: tl.constexpr, block: tl.constexpr, normed: tl.constexpr, unrolled: tl.constexpr,
):  # fmt: skip
    """``total`` [block, breadth] + a causal convolution of the positions from ``start`` on, tap by tap.

    x [count, channels] holds sessions of ``time`` positions each, one after another; taps [width, weights].
    ``normed``: apply the norm to each position first (those in the state are normed already).
    """
    past: tl.constexpr = width - 1
    row = start.to(tl.int32) + tl.arange(0, block)
    inside = row < count
    t = row % time
    column, member = tl.arange(0, room)[None, :], tl.arange(0, breadth)[None, :]
    for k in tl.range(0, width, loop_unroll_factor=unrolled):
        there = (inside & (t + k >= past))[:, None]
        source = x + (row + k - past).to(tl.int64)[:, None] * channels + column
        if channels == room:
            value = tl.load(source, mask=there, other=0.0).to(tl.float32)
        else:
            value = tl.load(source, mask=there & (column < channels), other=0.0).to(tl.float32)
        if normed:
            value = _rooted(value, channels, epsilon)
        total += value * _load(taps + k * weights + member, member < weights, weights == breadth).to(tl.float32)
    first = (start % time).to(tl.int32)
    if (first < past) | (first + block > time):
        old = tl.load(read + row // time, mask=inside, other=0)[:, None] * row_size + place + column * past
        for k in tl.range(0, past, loop_unroll_factor=unrolled):
            before = (inside & (t + k < past))[:, None] & (column < channels)
            kept = tl.load(states + old + (t + k)[:, None], mask=before, other=0.0).to(tl.float32)
            total += kept * _load(taps + k * weights + member, member < weights, weights == breadth).to(tl.float32)
    return total


@triton.jit
def _keep(
    x, states, read, write, session, epsilon, place, row_size, time,
    channels: tl.constexpr, room: tl.constexpr, past: tl.constexpr, normed: tl.constexpr,
):  # fmt: skip
    """Write the state of one session after the step: its last ``past`` positions, including those of the old state."""
    column = tl.arange(0, room)[None, :]
    old = states + tl.load(read + session) * row_size + place + column * past
    new = states + tl.load(write + session) * row_size + place + column * past
    for k in tl.static_range(past):
        position = time + k - past
        known = (column < channels) & (position >= 0)
        value = tl.load(x + (session * time + position) * channels + column, mask=known, other=0.0).to(tl.float32)
        if normed:
            value = _rooted(value, channels, epsilon)
        kept = tl.load(old + (time + k), mask=(column < channels) & (position < 0), other=0.0).to(tl.float32)
        tl.store(new + k, (value + kept).to(x.dtype.element_ty), mask=column < channels)


@triton.jit
def _mixed(
    x, states, read, taps, bias, start, epsilon, place, row_size, count, time,
    channels: tl.constexpr, room: tl.constexpr, width: tl.constexpr, block: tl.constexpr, unrolled: tl.constexpr,
):  # fmt: skip
    """x + the depthwise convolution of its norm [block, room], rounded to the activations' type."""
    row = start + tl.arange(0, block)
    column = tl.arange(0, room)[None, :]
    there = (row < count)[:, None]
    if channels != room:
        there = there & (column < channels)
    total = tl.load(x + row[:, None] * channels + column, mask=there, other=0.0).to(tl.float32)
    total += _load(bias + column, column < channels, channels == room).to(tl.float32)
    total = _convolved(
        total, x, states, read, taps, start, epsilon, place, row_size, count, time,
        channels, room, channels, room, width, block, True, unrolled,
    )  # fmt: skip
    return total.to(x.dtype.element_ty)


@triton.jit(do_not_specialize=["place", "row_size", "count", "time"])
def _mix(
    x, mixed, normed, states, read, write, taps, bias, down_bias, epsilon, feed_epsilon, place, row_size, count, time,
    channels: tl.constexpr, room: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """First half of a block: the residual (with the network's last bias), and the feed-forward network's input.

    A program each for ``block`` positions, then one for the state of each session.
    """
    start = tl.program_id(0).to(tl.int64) * block
    if start >= count:
        session = tl.program_id(0).to(tl.int64) - tl.cdiv(count, block)
        _keep(x, states, read, write, session, epsilon, place, row_size, time, channels, room, width - 1, True)
    else:
        made = _mixed(
            x, states, read, taps, bias, start, epsilon, place, row_size, count, time,
            channels, room, width, block, width,
        )  # fmt: skip
        row, column = start + tl.arange(0, block), tl.arange(0, room)[None, :]
        there = (row < count)[:, None] & (column < channels)
        at = row[:, None] * channels + column
        wide = made.to(tl.float32)
        tl.store(normed + at, _rooted(wide, channels, feed_epsilon).to(made.dtype), mask=there)
        wide += _load(down_bias + column, column < channels, channels == room).to(tl.float32)
        tl.store(mixed + at, wide.to(made.dtype), mask=there)


@triton.jit(do_not_specialize=["place", "row_size", "count", "time"])
def _block(
    x, y, states, read, write, taps, bias, up, up_bias, down, down_bias, epsilon, feed_epsilon,
    place, row_size, count, time,
    channels: tl.constexpr, room: tl.constexpr, hidden: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
    chunk: tl.constexpr, activation: tl.constexpr, taps_at_once: tl.constexpr,
):  # fmt: skip
    """A whole block; its hidden values are computed and consumed ``chunk`` at a time.

    One program per ``block`` positions, then one per session's state.
    """
    start = tl.program_id(0).to(tl.int64) * block
    if start >= count:
        session = tl.program_id(0).to(tl.int64) - tl.cdiv(count, block)
        _keep(x, states, read, write, session, epsilon, place, row_size, time, channels, room, width - 1, True)
    else:
        made = _mixed(
            x, states, read, taps, bias, start, epsilon, place, row_size, count, time,
            channels, room, width, block, taps_at_once,
        )  # fmt: skip
        added = _fed_forward(
            made, up, up_bias, down, down_bias, feed_epsilon, channels, room, hidden, block, chunk, activation
        )
        row, column = start + tl.arange(0, block), tl.arange(0, room)[None, :]
        there = (row < count)[:, None] & (column < channels)
        tl.store(y + row[:, None] * channels + column, (made.to(tl.float32) + added).to(made.dtype), mask=there)


@triton.jit
def _fed_forward(
    x, up, up_bias, down, down_bias, epsilon,
    channels: tl.constexpr, room: tl.constexpr, hidden: tl.constexpr, block: tl.constexpr,
    chunk: tl.constexpr, activation: tl.constexpr,
):  # fmt: skip
    """The feed-forward network of the norm of x [block, room], in float32."""
    whole: tl.constexpr = channels == room and hidden % chunk == 0
    fed = _rooted(x.to(tl.float32), channels, epsilon).to(x.dtype)
    wide, channel = tl.arange(0, room)[None, :], tl.arange(0, room)[:, None]
    added = tl.zeros((block, room), tl.float32) + _load(down_bias + wide, wide < channels, whole).to(tl.float32)
    for first in range(0, hidden, chunk):
        across, along = (first + tl.arange(0, chunk))[None, :], (first + tl.arange(0, chunk))[:, None]
        weight = _load(up + across * channels + channel, (across < hidden) & (channel < channels), whole)
        inner = tl.dot(fed, weight, input_precision="ieee")
        inner += _load(up_bias + across, across < hidden, whole).to(tl.float32)
        inner = _activated(inner, activation).to(x.dtype)
        weight = _load(down + wide * hidden + along, (along < hidden) & (wide < channels), whole)
        added = tl.dot(inner, weight, added, input_precision="ieee")
    return added


@triton.jit
def _activated(x, activation: tl.constexpr):
    if activation == 0:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif activation == 1:
        return x * tl.sigmoid(x)
    else:
        # x (1/2 + u q(u^2)), where u q(u^2) is the odd polynomial of degree 17 for erf(u / sqrt 2) / 2 on [-4.4, 4.4]
        # that minimises the largest error times u, and is 1/2 at the end.
        u = tl.minimum(tl.maximum(x, -4.4), 4.4)
        z = u * u
        q = 3.5701611805771805e-11 * z - 3.754663691069027e-09
        q = q * z + 1.741061055327009e-07
        q = q * z - 4.725266080640722e-06
        q = q * z + 8.429728040937334e-05
        q = q * z - 0.0010550189763307571
        q = q * z + 0.009643117897212505
        q = q * z - 0.06607657670974731
        q = q * z + 0.39876168966293335
        return x * (0.5 + u * q)


@triton.jit(do_not_specialize=["place", "row_size", "count", "time"])
def _narrow(
    x, y, states, read, write, taps, bias, place, row_size, count, time,
    channels: tl.constexpr, outputs: tl.constexpr, room: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A convolution from one channel to ``room`` channels, or the reverse.

    One program per ``block`` positions, then one per session's state.
    """
    start = tl.program_id(0).to(tl.int64) * block
    seen: tl.constexpr = room if outputs == 1 else 1
    if start >= count:
        session = tl.program_id(0).to(tl.int64) - tl.cdiv(count, block)
        _keep(x, states, read, write, session, 0.0, place, row_size, time, channels, seen, width - 1, False)
    else:
        total = _convolved(
            tl.zeros((block, room), tl.float32), x, states, read, taps, start, 0.0, place, row_size, count, time,
            channels, seen, channels * outputs, room, width, block, False, 1,
        )  # fmt: skip
        row, column = start + tl.arange(0, block), tl.arange(0, room)[None, :]
        if outputs == 1:
            made = tl.sum(total, axis=1) + tl.load(bias).to(tl.float32)
            tl.store(y + row, made.to(y.dtype.element_ty), mask=row < count)
        else:
            total += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)
            there = (row < count)[:, None] & (column < outputs)
            tl.store(y + row[:, None] * outputs + column, total.to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["place", "row_size", "count", "time"])
def _windows(
    x, windows, states, read, write, place, row_size, count, time,
    channels: tl.constexpr, width: tl.constexpr, stride: tl.constexpr, block: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Windows [count, width x channels] over x, ``time`` per session; the end of the last one is the new state."""
    past: tl.constexpr = width - stride
    start = tl.program_id(0).to(tl.int64) * block
    row = start.to(tl.int32) + tl.arange(0, block)
    column = tl.program_id(1) * wide + tl.arange(0, wide)[None, :]
    inside = (row < count)[:, None] & (column < width * channels)
    session, t = row // time, row % time
    k, channel = column // channels, column % channels
    position = t[:, None] * stride + k - past
    source = x + (row.to(tl.int64) * stride - past)[:, None] * channels + column
    value = tl.load(source, mask=inside & (position >= 0), other=0.0)
    first = (start % time).to(tl.int32)
    if (first * stride < past) | (first + block > time):
        old = states + place + tl.load(read + session, mask=row < count, other=0)[:, None] * row_size
        before = inside & (position < 0)
        value += tl.load(old + channel * past + position + past, mask=before, other=0.0)
    tl.store(windows + row.to(tl.int64)[:, None] * (width * channels) + column, value, mask=inside)
    if first + block >= time:
        new = states + place + tl.load(write + session, mask=row < count, other=0)[:, None] * row_size
        kept = inside & (t == time - 1)[:, None] & (k >= stride)
        tl.store(new + channel * past + k - stride, value, mask=kept)
