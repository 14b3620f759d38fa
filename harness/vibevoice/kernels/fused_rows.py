"""The row-wise operations of a layer between its matrix products, one kernel for each function of ``plain_rows``.

All arithmetic is float32 and rounded once, when stored. A step has few rows: a kernel's time is mostly launch overhead,
and small kernels in a CUDA graph cost two to three microseconds each.

The model's sizes are compile-time constants of a kernel, other sizes are run-time arguments: all layers and batches
share one compiled variant (``_modulate``: one each for the first layer, the others, and the last norm).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch.nn import functional

from harness.vibevoice.kernels import plain_rows
from harness.vibevoice.kernels.ragged import on_device

_COLUMNS = 1024  # per program, where a row is split
_COLUMNS_A_WARP = 256  # 8 per thread: one load of 16 bytes in a 16-bit type
_MOST_WARPS = 16


def add_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in ``plain_rows``; the sum is rounded before the norm."""
    if delta is None:
        return plain_rows.add_norm(x, None, weight, epsilon)  # a single kernel too
    x, delta = x.contiguous(), delta.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    rows, hidden = x.shape
    with on_device(x.device):
        _add_norm[rows,](x, delta, weight, total, normed, epsilon, hidden=hidden, **_whole_row(hidden))
    return total, normed


def angles(positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor]:
    """As in ``plain_rows``: cosines and sines [rows, 2, size / 2], computed in float32."""
    rows, half = len(positions), len(frequencies)
    turns = torch.empty(rows, 2, half, dtype=dtype, device=positions.device)
    with on_device(turns.device):
        _angles[rows,](
            positions, frequencies, turns, positions.stride(0),
            half=half, room=triton.next_power_of_2(half), num_warps=1,
        )  # fmt: skip
    return (turns,)


def turn(made: torch.Tensor, angles: tuple[torch.Tensor], heads: int) -> torch.Tensor:
    """As in ``plain_rows``, in the memory of ``made``, which must be contiguous."""
    rows, every_head, size = made.shape
    if not made.is_contiguous():
        raise ValueError(f"heads of shape {list(made.shape)} and strides {made.stride()} are not contiguous")
    with on_device(made.device):
        _turn[rows,](
            made, *angles, heads=heads, every_head=every_head, half=size // 2,
            heads_room=triton.next_power_of_2(heads), room=triton.next_power_of_2(size // 2),
        )  # fmt: skip
    return made[:, :heads]


def gate(inner_and_up: torch.Tensor, activation: Callable) -> torch.Tensor:
    """As in ``plain_rows``: for silu, the activation of the released models, in one kernel."""
    if activation is not functional.silu:
        return plain_rows.gate(inner_and_up, activation)
    inner_and_up = inner_and_up.contiguous()
    rows, wide = len(inner_and_up), inner_and_up.shape[1] // 2
    gated = torch.empty(rows, wide, dtype=inner_and_up.dtype, device=inner_and_up.device)
    with on_device(gated.device):
        _gate[rows, triton.cdiv(wide, _COLUMNS)](
            inner_and_up, gated, wide=wide, block=_COLUMNS, num_warps=_COLUMNS // _COLUMNS_A_WARP
        )
    return gated


def modulate(
    x: torch.Tensor,
    gating: torch.Tensor | None,
    delta: torch.Tensor | None,
    weight: torch.Tensor | None,
    epsilon: float,
    shift: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in ``plain_rows``; the sum is rounded before the norm.

    ``shift``, ``scale`` and ``gating`` may be columns of one tensor.
    """
    rows, hidden = shift.shape
    stride = shift.stride(0)
    if any(each.stride() != (stride, 1) for each in (scale, gating) if each is not None):
        raise ValueError(f"shift, scale and gating have different strides: {stride} and {scale.stride()}")
    x = x.contiguous()
    modulated = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    total = None if delta is None else torch.empty_like(modulated)
    with on_device(x.device):
        _modulate[rows,](
            x, gating, delta, weight, shift, scale, total, modulated, len(x), epsilon,
            stride=stride, hidden=hidden, **_whole_row(hidden),
        )  # fmt: skip
    return x if total is None else total, modulated


def solve(
    x: torch.Tensor,
    velocity: torch.Tensor,
    guidance: torch.Tensor,
    before: torch.Tensor | None,
    update: tuple[float, ...],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As in ``plain_rows``."""
    alpha, sigma, a, b, c = update
    x, velocity, guidance = x.contiguous(), velocity.contiguous(), guidance.contiguous()
    after, x0 = torch.empty_like(x), torch.empty_like(x)
    rounded = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows, size = x.shape
    with on_device(x.device):
        _solve[rows,](
            x, velocity, guidance, before if c else x, after, x0, rounded,
            float(alpha), float(sigma), float(a), float(b), float(c), rows,
            size=size, block=triton.next_power_of_2(size), num_warps=1,
        )  # fmt: skip
    return after, x0, rounded


def _whole_row(hidden: int) -> dict[str, int]:
    """Constants of a kernel that processes a row in one program."""
    block = triton.next_power_of_2(hidden)
    return {"block": block, "num_warps": max(1, min(_MOST_WARPS, block // _COLUMNS_A_WARP))}


@triton.jit
def _norm(x, epsilon, hidden: tl.constexpr):
    """Columns beyond ``hidden`` must be 0."""
    return x * tl.rsqrt(tl.sum(x * x, axis=0) / hidden + epsilon)


@triton.jit
def _add_norm(x, delta, weight, total, normed, epsilon, hidden: tl.constexpr, block: tl.constexpr):
    column = tl.arange(0, block)
    known = column < hidden
    at = tl.program_id(0).to(tl.int64) * hidden + column
    left = tl.load(x + at, mask=known, other=0.0).to(tl.float32)
    right = tl.load(delta + at, mask=known, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
    both = (left + right).to(total.dtype.element_ty)
    tl.store(total + at, both, mask=known)
    scaled = _norm(both.to(tl.float32), epsilon, hidden) * factor
    tl.store(normed + at, scaled.to(normed.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["position_stride"])
def _angles(positions, frequencies, turns, position_stride, half: tl.constexpr, room: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, room)
    known = column < half
    position = tl.load(positions + row * position_stride).to(tl.float32)
    angle = position * tl.load(frequencies + column, mask=known, other=0.0)
    at = turns + row * (2 * half) + column
    tl.store(at, tl.cos(angle).to(turns.dtype.element_ty), mask=known)
    tl.store(at + half, tl.sin(angle).to(turns.dtype.element_ty), mask=known)


@triton.jit
def _turn(
    made, turns, heads: tl.constexpr, every_head: tl.constexpr, half: tl.constexpr,
    heads_room: tl.constexpr, room: tl.constexpr,
):  # fmt: skip
    """Rotate the first heads of one row in place."""
    row = tl.program_id(0).to(tl.int64)
    column, head = tl.arange(0, room)[None, :], tl.arange(0, heads_room).to(tl.int64)[:, None]
    cos = tl.load(turns + row * (2 * half) + column, mask=column < half, other=0.0).to(tl.float32)
    sin = tl.load(turns + row * (2 * half) + half + column, mask=column < half, other=0.0).to(tl.float32)
    at = made + (row * every_head + head) * (2 * half) + column
    known = (head < heads) & (column < half)
    first = tl.load(at, mask=known, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=known, other=0.0).to(tl.float32)
    tl.store(at, (first * cos - second * sin).to(made.dtype.element_ty), mask=known)
    tl.store(at + half, (second * cos + first * sin).to(made.dtype.element_ty), mask=known)


@triton.jit
def _gate(inner_and_up, gated, wide: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * block + tl.arange(0, block)
    known = column < wide
    inner = tl.load(inner_and_up + row * (2 * wide) + column, mask=known, other=0.0).to(tl.float32)
    up = tl.load(inner_and_up + row * (2 * wide) + wide + column, mask=known, other=0.0).to(tl.float32)
    made = inner / (1 + tl.exp(-inner)) * up
    tl.store(gated + row * wide + column, made.to(gated.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["x_rows"])
def _modulate(
    x, gating, delta, weight, shift, scale, total, modulated, x_rows, epsilon,
    stride: tl.constexpr, hidden: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, block)
    known = column < hidden
    at = row.to(tl.int64) * hidden + column
    mixed_at = row.to(tl.int64) * stride + column
    wide = tl.load(x + (row % x_rows).to(tl.int64) * hidden + column, mask=known, other=0.0).to(tl.float32)
    shifted = tl.load(shift + mixed_at, mask=known, other=0.0).to(tl.float32)
    scaled = tl.load(scale + mixed_at, mask=known, other=0.0).to(tl.float32)
    if delta is not None:
        gates = tl.load(gating + mixed_at, mask=known, other=0.0).to(tl.float32)
        wide += gates * tl.load(delta + at, mask=known, other=0.0).to(tl.float32)
        rounded = wide.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=known)
        wide = rounded.to(tl.float32)
    normed = _norm(wide, epsilon, hidden)
    if weight is not None:
        normed *= tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
    tl.store(modulated + at, (shifted + normed * scaled).to(modulated.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["rows"])
def _solve(
    x, velocity, guidance, before, after, x0, rounded, alpha, sigma, a, b, c, rows,
    size: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    known, at = column < size, row * size + column
    state = tl.load(x + at, mask=known, other=0.0)
    earlier = tl.load(before + at, mask=known, other=0.0)
    with_prompt = tl.load(velocity + at, mask=known, other=0.0).to(tl.float32)
    without = tl.load(velocity + (rows + row) * size + column, mask=known, other=0.0).to(tl.float32)
    weight = tl.load(guidance + row)
    gap = with_prompt - without
    guided = tl.where(weight < 0.5, without + weight * gap, with_prompt - gap * (1 - weight))  # as torch.lerp
    found = alpha * state - sigma * guided
    state = a * state + b * found + c * earlier
    tl.store(x0 + at, found, mask=known)
    tl.store(after + at, state, mask=known)
    tl.store(rounded + at, state.to(rounded.dtype.element_ty), mask=known)
