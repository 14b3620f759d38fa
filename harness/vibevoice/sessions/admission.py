"""Admission queue: requests wait for room in order of arrival, limited in number and in time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable

from harness import wire
from harness.errors import RequestError

RETRY_S = 0.1  # this process does not see all room that comes free: sessions of another entry instance may close
_FIX = "retry later, or add capacity (kv_limit_bytes, instances, servers)"

OpenSession = Callable[[], Awaitable[None]]


class Busy(RequestError):
    """There is no room now; the message begins with wire.BUSY.

    ``place`` is the instance of the stage that has no room, of ``places`` instances.
    """

    def __init__(self, message: str, place: int = 1, places: int = 1):
        super().__init__(message)
        self.place, self.places = place, places


class AdmissionQueue:
    """Admits requests, at most ``places`` sessions at a time, and keeps the order of those that wait.

    At most ``limit`` requests wait, each for at most ``patience_s`` seconds; otherwise ``enter`` raises Busy.
    """

    def __init__(self, places: int, limit: int, patience_s: float):
        self.places, self.limit, self.patience_s = places, limit, patience_s
        self.free = places
        self._waiting: deque[asyncio.Event] = deque()  # one per waiting request, set when its turn may have come

    def __len__(self) -> int:
        return len(self._waiting)

    async def enter(self, open_session: OpenSession, check: Callable[[], None]) -> None:
        """Open a session, now or once there is room; every success must be followed by one ``leave``.

        ``open_session`` raises Busy where there is no room. ``check`` is called while the request waits: an error that
        it raises (the client has left) removes the request from the queue. While nothing waits, any number of requests
        may open sessions concurrently.
        """
        refusal = None
        if not self._waiting:
            refusal = await self._try(open_session)
            if refusal is None:
                return
        if len(self._waiting) >= self.limit:
            why = refusal or f"{wire.BUSY}other requests are waiting for room"
            raise Busy(f"{why}; queue full: {len(self._waiting)} requests wait (waiting_limit): {_FIX}")
        await self._wait(open_session, check)

    def leave(self) -> None:
        """Note that an admitted session has closed."""
        self.free += 1
        self._call_first()

    async def _wait(self, open_session: OpenSession, check: Callable[[], None]) -> None:
        turn, began, refusal = asyncio.Event(), time.monotonic(), None
        self._waiting.append(turn)
        try:
            while True:
                turn.clear()  # before the attempt: a session that closes meanwhile sets it again
                if self._waiting[0] is turn:
                    refusal = await self._try(open_session)
                    if refusal is None:
                        return
                check()
                if time.monotonic() - began >= self.patience_s:
                    raise Busy(self._out_of_patience(turn, refusal))
                # not wait_for, which loses a cancellation that coincides with the turn (Python 3.11)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(RETRY_S, self.patience_s)):
                        await turn.wait()
        finally:
            self._waiting.remove(turn)
            self._call_first()

    async def _try(self, open_session: OpenSession) -> Busy | None:
        """Try to open the session; returns the refusal where there is no room."""
        if not self.free:
            return Busy(f"{wire.BUSY}all {self.places} sessions of this entry instance are taken")
        self.free -= 1
        try:
            await open_session()
        except BaseException as error:
            self.free += 1
            if isinstance(error, Busy):
                return error
            raise
        return None

    def _out_of_patience(self, turn: asyncio.Event, refusal: Busy | None) -> str:
        ahead = self._waiting.index(turn)
        why = refusal or f"{wire.BUSY}{ahead} requests before this one are waiting for room"
        return f"{why}; waited {self.patience_s:g} s, the limit (waiting_seconds): {_FIX}"

    def _call_first(self) -> None:
        if self._waiting:
            self._waiting[0].set()
