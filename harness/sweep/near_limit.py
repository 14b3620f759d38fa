"""The rungs of a ladder that is measured once the limit of its deployment is roughly known."""

from __future__ import annotations

import math
from collections.abc import Sequence

_APART = 0.1  # a rung this near to the limit shows what happens there
_BEYOND = (1.5, 2.25)  # times the last rung, where it was still within every SLO


def rungs_near_limit(sessions: Sequence[int], most: float, *, reached: bool, room: float = math.inf) -> tuple[int, ...]:
    """The rungs of the plan, and between them one at the most sessions that meet every SLO.

    Each ladder narrows the interval of the limit, as a bisection does: its two neighbours are nearer. Where no SLO was
    violated up to the last rung (not ``reached``), further rungs above it; a ladder ends at over-saturation anyway.
    ``room``: the most sessions that the server admits, and that its memory holds.
    """
    if not reached:
        beyond = (min(round(sessions[-1] * times), math.floor(min(room, 1e9))) for times in _BEYOND)
        return tuple(sorted({*sessions, *(each for each in beyond if each > sessions[-1])}))
    at = max(round(min(most, math.floor(min(room, 1e9)))), 1)
    if any(abs(at - each) <= _APART * each for each in sessions):
        return tuple(sessions)
    return tuple(sorted({*sessions, at}))
