"""Which functions a network calls for what it computes row by row: kernels on a GPU, operations of torch elsewhere."""

from __future__ import annotations

from types import ModuleType

import torch

from harness.vibevoice.kernels import plain_rows


def rows_on(device: torch.device) -> ModuleType:
    """The module whose functions a network on this device calls: ``fused_rows`` on a GPU, elsewhere ``plain_rows``."""
    if device.type == "cuda":
        from harness.vibevoice.kernels import fused_rows  # its kernels are compiled for a GPU

        return fused_rows
    return plain_rows
