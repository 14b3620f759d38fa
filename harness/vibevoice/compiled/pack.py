"""Packs weights in the order in which the compiled functions read them."""

from __future__ import annotations

import numpy as np
import torch


def rounded(count: int, multiple: int) -> int:
    """The next multiple of ``multiple``, at least ``count``."""
    return -(-count // multiple) * multiple


class Pack:
    """Weights concatenated in one array; ``add`` and ``matrix`` return the offset of what they append."""

    def __init__(self):
        self._parts: list[np.ndarray] = []
        self._size = 0

    def add(self, values: torch.Tensor | float) -> int:
        """Append values unchanged, padded to a whole block of 4."""
        flat = torch.as_tensor(values, dtype=torch.float32).flatten().numpy()
        at, self._size = self._size, self._size + rounded(len(flat), 4)
        self._parts.append(np.pad(flat, (0, rounded(len(flat), 4) - len(flat))))
        return at

    def matrix(self, weight: torch.Tensor) -> int:
        """Append a product's weight [rows, inputs] in blocks of 4 rows: [blocks, inputs, 4]."""
        padded = torch.nn.functional.pad(weight.float(), (0, 0, 0, -len(weight) % 4))
        return self.add(padded.view(-1, 4, weight.shape[1]).transpose(1, 2))

    def array(self) -> np.ndarray:
        return np.concatenate(self._parts)
