"""The table of open sessions that a stage keeps between calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

from harness.errors import RequestError

IDLE_LIMIT_S = 120.0  # a session whose owner died is dropped after this long without a step

State = TypeVar("State")


class Sessions(Generic[State]):
    """Session id -> state, with the sessions that nobody steps any more dropped when a new one opens."""

    def __init__(self, stage: str, clock: Callable[[], float] = time.monotonic):
        self._stage = stage
        self._clock = clock
        self._states: dict[int, State] = {}
        self._used_at: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._states)

    def open(self, session_id: int, state: State) -> None:
        self.drop_idle()
        self._states[session_id] = state
        self._used_at[session_id] = self._clock()

    def get(self, session_id: int) -> State:
        """The state of an open session. Raises RequestError for one that is not (or no longer) there."""
        try:
            state = self._states[session_id]
        except KeyError:
            raise RequestError(
                f"{self._stage} has no session {session_id}: it was closed or its process restarted; ask again"
            ) from None
        self._used_at[session_id] = self._clock()
        return state

    def close(self, session_id: int) -> State | None:
        self._used_at.pop(session_id, None)
        return self._states.pop(session_id, None)

    def states(self):
        return self._states.values()

    def drop_idle(self) -> None:
        oldest = self._clock() - IDLE_LIMIT_S
        for session_id in [s for s, used in self._used_at.items() if used < oldest]:
            self.close(session_id)
