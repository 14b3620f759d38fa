"""Intervals as records have them: a lower and an upper bound, None where that side is unknown."""

from __future__ import annotations

Bounds = tuple[float | None, float | None]
Counts = tuple[int | None, int | None]
