"""The row-wise operations of a layer between its matrix products, with torch's operations.

``fused_rows`` has the same functions as one kernel each, for GPUs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional


def add_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and delta [rows, hidden] -> x + delta, and its root mean square norm times the weight [hidden]."""
    total = x if delta is None else x + delta
    return total, functional.rms_norm(total, (total.shape[-1],), weight, epsilon)


def angles(positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The ``angles`` of ``turn`` for positions [rows] and frequencies [size / 2], the same for all layers."""
    angles = torch.outer(positions.float(), frequencies)[:, None]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def turn(made: torch.Tensor, angles: tuple[torch.Tensor, ...], heads: int) -> torch.Tensor:
    """Rotate the first heads of made [rows, all heads, size] by their row's angles: [rows, heads, size].

    The result may share memory with ``made``, of which only the other heads may be read afterwards.
    """
    turning = made[:, :heads]
    swapped = turning.roll(made.shape[2] // 2, -1)
    return torch.addcmul(turning * angles[0], swapped, angles[1])


def gate(inner_and_up: torch.Tensor, activation: Callable) -> torch.Tensor:
    """Two halves of columns [rows, 2 x wide] -> activation of the first, times the second [rows, wide]."""
    inner, up = inner_and_up.chunk(2, -1)
    return activation(inner).mul_(up)


def modulate(
    x: torch.Tensor,
    gating: torch.Tensor | None,
    delta: torch.Tensor | None,
    weight: torch.Tensor | None,
    epsilon: float,
    shift: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All [rows, hidden], the weight [hidden] -> x + gating x delta, and shift + scale x the norm of that sum.

    Where x has fewer rows than the others, its rows repeat; what comes back as the sum may still have as few of them.
    """
    if len(x) < len(shift):
        x = x.repeat(len(shift) // len(x), 1)
    total = x if delta is None else torch.addcmul(x, gating, delta)
    normed = functional.rms_norm(total, (total.shape[-1],), weight, epsilon)
    return total, torch.addcmul(shift, normed, scale)


def solve(
    x: torch.Tensor,
    velocity: torch.Tensor,
    guidance: torch.Tensor,
    before: torch.Tensor | None,
    update: tuple[float, ...],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of the solver in float32: x [N, 64], velocity [2N, 64] with and without the prompt, guidance [N, 1].

    Returns the next x, this step's x0 (``before`` of the next step), and the next x in the head's type.
    """
    alpha, sigma, a, b, c = update
    with_prompt, without_prompt = velocity.float().chunk(2)
    x0 = torch.lerp(without_prompt, with_prompt, guidance).mul_(-sigma).add_(x, alpha=alpha)
    x = (x * a).add_(x0, alpha=b)
    if c:
        x.add_(before, alpha=c)
    return x, x0, x.to(dtype)
