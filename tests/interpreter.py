"""Triton's interpreter, which runs kernels for GPUs on a CPU, as compiled kernels compute.

As a program (``python tests/interpreter.py benchmarks/gpu/towers.py --quick``) it runs a script of kernels in it.
"""

import os
import runpy
import sys
from types import SimpleNamespace

import numpy as np
from scipy import special


def hasten():
    """Have it look through Triton's language once, not at every call of a function: that is most of its time.

    The language stays the interpreter's afterwards: this process compiles no kernels.
    """
    from triton.runtime import interpreter

    patch, looked = interpreter._patch_lang, set()

    def patched(function):
        if function.__module__ not in looked:
            looked.add(function.__module__)
            patch(function)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patched
    interpreter.np_erf_fp32 = lambda values: special.erf(values.astype(float)).astype(np.float32)  # it goes one by one


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


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    hasten()
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
