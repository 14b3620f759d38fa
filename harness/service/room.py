"""How many tasks may run beside the streams, which come first."""

from __future__ import annotations

from harness.service.queue import NO_LIMIT, Room


def tasks_allowed(room: Room, sessions: int) -> int:
    """Tasks that may run now. ``sessions``: what the target serves at once within its SLOs, 0 where not known.

    Where it is known, tasks get what the streams leave. Where not, tasks pause while a stream finds no room.
    """
    if sessions:
        return max(0, sessions - room.streams)
    return 0 if room.impatient else NO_LIMIT


def must_yield(room: Room, sessions: int) -> bool:
    """Whether a running task gives way at the end of its segment: the youngest of them do."""
    return room.rank >= tasks_allowed(room, sessions)
