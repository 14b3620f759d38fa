"""How a process that computes stages is set up, be it a Triton stub or one that measures them."""

from __future__ import annotations

import contextlib
import ctypes

import torch


def prepare() -> None:
    """One CPU thread, no gradients, freed memory kept: the instances of a server share its cores."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """A stage frees and takes the same large buffers at every step: kept by glibc, they cost no page faults."""
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_threshold, 32 << 20)  # the largest that glibc takes
        mallopt(m_trim_threshold, (1 << 31) - 1)
