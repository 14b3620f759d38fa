"""The open sessions that a stage keeps between calls, and the limits of their room."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from harness import wire
from harness.errors import RequestError

IDLE_LIMIT_S = 120.0  # sessions without a step for this long are dropped
_OWNER_BITS = 42  # random; above them 22 bits for the pid, of Triton's 64
MOST_POSITIONS = 1 << 24  # far beyond any model's context; products of it do not overflow
SPARE_STEPS = 64  # room of a session that ends by itself, besides its frames and forced tokens

State = TypeVar("State")


class Sessions(Generic[State]):
    """Session id -> state. Opening a session drops those that have been idle for too long.

    A session id contains its owner: see ``session_ids``.
    """

    def __init__(self, stage: str, clock: Callable[[], float] = time.monotonic):
        self._stage = stage
        self.idle_limit_s = IDLE_LIMIT_S
        self._clock = clock
        self._states: dict[int, State] = {}
        self._used_at: dict[int, float] = {}
        self.orphaned = 0  # dropped so far, as nobody used or closed them

    def __len__(self) -> int:
        return len(self._states)

    def open(self, session_id: int, state: State) -> None:
        """Store a session. Raises RequestError for an id that is not a number, since it would not contain its owner."""
        if not isinstance(session_id, int):
            raise RequestError(f"{self._stage} needs a number as session id, not a text")
        self.drop_idle()
        self._states[session_id] = state
        self._used_at[session_id] = self._clock()

    def get(self, session_id: int) -> State:
        """The state of an open session. Raises RequestError for an unknown or closed one."""
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

    def states(self) -> list[State]:
        """The states of all sessions; a copy, so that any thread may ask."""
        return list(self._states.values())

    def drop_idle(self) -> None:
        """Drop sessions that were idle for too long, and those whose owner's process has ended."""
        if self.idle_limit_s == math.inf:  # their owner closes them
            return
        oldest = self._clock() - self.idle_limit_s
        gone = {owner for owner in set(map(_owner_of, self._states)) if owner and not is_alive(owner)}
        dropped = [s for s, used in self._used_at.items() if used < oldest or _owner_of(s) in gone]
        self.orphaned += len(dropped)
        for session_id in dropped:
            self.close(session_id)


def session_ids(pid: int) -> Iterator[int]:
    """Session ids of a process: unique on this host, and unpredictable to others."""
    while True:
        yield (pid << _OWNER_BITS) + secrets.randbits(_OWNER_BITS)


def _owner_of(session_id: int) -> int:
    """The process that opened a session; 0 for an id that no process made."""
    return session_id >> _OWNER_BITS


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    return _state_of(pid) not in "ZX"


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal and has not continued."""
    return _state_of(pid) == "T"


def _state_of(pid: int) -> str:
    """The state of a process in /proc; X if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def check_numbers(prompt_tokens: int, frames: int, start_frame: int) -> None:
    """Raise RequestError where these cannot be the sizes of a session, since memory is allocated for them."""
    if not (0 <= prompt_tokens <= MOST_POSITIONS and 0 <= start_frame <= frames <= MOST_POSITIONS):
        raise RequestError(
            f"a session of {prompt_tokens} prompt tokens and {frames} frames, {start_frame} of them counted as spoken, "
            f"is impossible: give 0 to {MOST_POSITIONS} of each, and no more spoken frames than frames"
        )


class NoRoom(RequestError):
    """KV cache memory does not suffice, now or ever: see ``check_room``."""


def check_room(positions: int, bytes_per_position: int, taken_bytes: int, limit_bytes: int) -> None:
    """Raise NoRoom where a session with this many KV cache positions does not fit beside the bytes taken.

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
    """The error of a session that would step beyond the positions reserved when it opened."""
    return RequestError(
        f"the session has used up the {positions} positions it reserved for its prompt, its frames and "
        "other tokens: ask for more frames, or cut the script into parts"
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:.4g} MiB"
