"""Selects the row-wise functions of a network: kernels on a GPU, torch's operations elsewhere."""

from __future__ import annotations

from types import ModuleType

import torch

from harness.vibevoice.kernels import plain_rows


def rows_on(device: torch.device) -> ModuleType:
    """The module with the row-wise functions for a device: ``fused_rows`` on a GPU, otherwise ``plain_rows``."""
    if device.type == "cuda":
        from harness.vibevoice.kernels import fused_rows  # needs a GPU to compile

        return fused_rows
    return plain_rows
