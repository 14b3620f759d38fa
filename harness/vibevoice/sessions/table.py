"""The open sessions that a stage keeps between calls: a table of them, and the rules of their room."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from harness import wire
from harness.errors import RequestError

IDLE_LIMIT_S = 120.0  # a session that nobody steps for so long is dropped
_OWNER_BITS = 42  # random ones; above them 22 for the pid, of 64 that Triton has
MOST_POSITIONS = 1 << 24  # far beyond any model's context, and no product of it overflows
SPARE_STEPS = 64  # steps for which a session that ends by itself has room beside its frames and what it is made to say

State = TypeVar("State")


class Sessions(Generic[State]):
    """Session id -> state, with the sessions that nobody steps any more dropped when a new one opens.

    A session id says who owns it: see ``session_ids``.
    """

    def __init__(self, stage: str, clock: Callable[[], float] = time.monotonic):
        self._stage = stage
        self.idle_limit_s = IDLE_LIMIT_S
        self._clock = clock
        self._states: dict[int, State] = {}
        self._used_at: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._states)

    def open(self, session_id: int, state: State) -> None:
        """Keep a session. Raises RequestError for an id that is no number: it would not say who owns it."""
        if not isinstance(session_id, int):
            raise RequestError(f"{self._stage} takes no session whose id is a text: number it")
        self.drop_idle()
        self._states[session_id] = state
        self._used_at[session_id] = self._clock()

    def get(self, session_id: int) -> State:
        """The state of an open session. Raises RequestError for one that is not (or no longer) there."""
        try:
            state = self._states[session_id]
        except KeyError:
            raise RequestError(
                f"{self._stage} has no such session: it was closed or its process restarted; retry"
            ) from None
        self._used_at[session_id] = self._clock()
        return state

    def close(self, session_id: int) -> State | None:
        self._used_at.pop(session_id, None)
        return self._states.pop(session_id, None)

    def states(self):
        return self._states.values()

    def drop_idle(self) -> None:
        """Drop the sessions that were not stepped for long, and those whose owner's process has ended."""
        if self.idle_limit_s == math.inf:  # whoever keeps them ends them
            return
        oldest = self._clock() - self.idle_limit_s
        gone = {owner for owner in set(map(_owner_of, self._states)) if owner and not is_alive(owner)}
        for session_id in [s for s, used in self._used_at.items() if used < oldest or _owner_of(s) in gone]:
            self.close(session_id)


def session_ids(pid: int) -> Iterator[int]:
    """Session ids of a process: no other process of this host makes them, and nobody can guess the next."""
    while True:
        yield (pid << _OWNER_BITS) + secrets.randbits(_OWNER_BITS)


def _owner_of(session_id: int) -> int:
    """The process that opened a session, 0 for an id that was made by none."""
    return session_id >> _OWNER_BITS


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be reaped does not."""
    return _state_of(pid) not in "ZX"


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal and does not go on by itself."""
    return _state_of(pid) == "T"


def _state_of(pid: int) -> str:
    """The state of a process as /proc has it; X for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def check_numbers(prompt_tokens: int, frames: int, start_frame: int) -> None:
    """Raise RequestError where these cannot be the sizes of a session: memory is taken and filled by them."""
    if not (0 <= prompt_tokens <= MOST_POSITIONS and 0 <= start_frame <= frames <= MOST_POSITIONS):
        raise RequestError(
            f"a session of {prompt_tokens} prompt tokens and {frames} frames, {start_frame} of them taken as spoken, "
            f"cannot be: give 0 to {MOST_POSITIONS} of each, and no more spoken frames than frames"
        )


class NoRoom(RequestError):
    """There are not so many bytes of KV cache, now or ever: see ``check_room``."""


def check_room(positions: int, bytes_per_position: int, taken_bytes: int, limit_bytes: int) -> None:
    """Raise NoRoom where a session of so many positions of KV cache does not fit beside the bytes taken.

    The message begins with wire.BUSY where it would fit once others have ended.
    """
    needed, free = positions * bytes_per_position, limit_bytes - taken_bytes
    if needed > limit_bytes:
        raise NoRoom(
            f"the session can never fit: {positions} positions (prompt, and twice the frames) x "
            f"{bytes_per_position} bytes = {_mib(needed)} of KV cache, but there are {_mib(limit_bytes)}; "
            f"ask for fewer frames, shorten the script, or raise kv_limit_bytes"
        )
    if needed > free:
        raise NoRoom(
            f"{wire.BUSY}the session needs {_mib(needed)} of KV cache, and {_mib(free)} of {_mib(limit_bytes)} are free"
        )


def room_used_up(positions: int) -> RequestError:
    """The error of a session that would step beyond the positions it took when it opened."""
    return RequestError(
        f"the session has used up the {positions} positions it reserved for its prompt, its frames and what "
        "else it may say: ask for more frames, or cut the script into parts"
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:.4g} MiB"
