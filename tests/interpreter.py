"""Triton's interpreter, which runs kernels for GPUs on a CPU, as compiled kernels compute."""

import numpy as np


def widen_products(monkeypatch):
    """Matrix products of bfloat16: the interpreter (of Triton 3.7) takes its bits for whole numbers."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    product = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *more: product(self, widened(a), widened(b), *more)
    )


def widen_tiles(monkeypatch):
    """Larger tiles of the towers' kernels, for a program takes the interpreter about the same time at any size."""
    from harness.vibevoice.stages import fused_towers

    for name in ("MIX_VALUES", "WINDOW_VALUES", "NARROW_VALUES"):
        monkeypatch.setattr(fused_towers, name, 1 << 14)
