"""How a process that computes stages is set up, be it a Triton stub or one that measures them."""

from __future__ import annotations

import contextlib
import ctypes

import torch

# After one of these a GPU does nothing more for this process; older versions of torch raise no class of their own.
DEVICE_ERRORS = (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()


def prepare(device: torch.device | str = "cpu") -> None:
    """One CPU thread, no gradients, freed memory kept: the instances of a server share its cores.

    On a GPU, it becomes the one on which kernels are launched: a kernel of our own would go to GPU 0 with pointers of
    another. float32 is float32 there: convolutions would round their inputs to TF32.
    """
    device = torch.device(device)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """A stage frees and takes the same large buffers at every step: kept by glibc, they cost no page faults."""
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_threshold, 32 << 20)  # the largest that glibc takes
        mallopt(m_trim_threshold, (1 << 31) - 1)
