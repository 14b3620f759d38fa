"""Set-up of a process that computes stages, in a Triton stub or a profiler."""

from __future__ import annotations

import contextlib
import ctypes

import torch

# After one of these errors a GPU is unusable to this process; older versions of torch have no separate class.
DEVICE_ERRORS = (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()


def prepare(device: torch.device | str = "cpu") -> None:
    """One CPU thread, no gradients, freed memory kept: the instances of a server share its cores.

    A GPU becomes the current one: otherwise our kernels would start on GPU 0 with pointers to another. TF32 is
    disabled, since convolutions would round their float32 inputs.
    """
    device = torch.device(device)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory: a stage frees and allocates the same large buffers at every step."""
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_threshold, 32 << 20)  # the largest value that glibc accepts
        mallopt(m_trim_threshold, (1 << 31) - 1)
