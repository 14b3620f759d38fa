"""How a prompt or a past is cut into parts, so that sessions that speak can take steps in between."""

from __future__ import annotations

from collections.abc import Iterator

FULL_PARTS = 16_384  # positions that are read in full parts; an hour's script has about 12,000 tokens


def parts_of(count: int, size: int, behind: int = 0) -> Iterator[slice]:
    """Split ``count`` positions after ``behind`` others into parts of at most ``size``.

    A part attends to all positions before it, and whoever speaks waits for it: from FULL_PARTS positions on, parts are
    shorter, so that none takes longer than one of ``size`` there.
    """
    start = 0
    while start < count:
        most = size * FULL_PARTS // max(FULL_PARTS, behind + start)
        end = min(count, start + max(1, most))
        yield slice(start, end)
        start = end
