"""Whose prompt is read next."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

EARLY_POSITIONS = 4_096  # of a prompt: its later parts let those of others go first
EARLY_IN_A_ROW = 3  # then a late part has its turn, if one waits: its session would be given up while it waits for ever


class Turns:
    """Places for prompt parts that are being read: first come, first served, but early parts before late ones.

    A late part attends to thousands of positions. A few clients with very long prompts would otherwise delay every
    short one by one such part each. Every fourth turn is a late part's, so that short prompts do not hold up long ones.
    """

    def __init__(self, places: int):
        self._free = places
        self._early: deque[asyncio.Future[None]] = deque()
        self._late: deque[asyncio.Future[None]] = deque()
        self._in_a_row = 0  # turns of early parts while a late one waits

    @asynccontextmanager
    async def one(self, behind: int) -> AsyncIterator[None]:
        """A turn for a part after ``behind`` positions of its prompt."""
        await self._enter(behind >= EARLY_POSITIONS)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, late: bool) -> None:
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        (self._late if late else self._early).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it had just been given
                self._leave()
            raise

    def _leave(self) -> None:
        while self._early or self._late:
            turn = self._next()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _next(self) -> asyncio.Future[None]:
        if self._late and (not self._early or self._in_a_row >= EARLY_IN_A_ROW):
            self._in_a_row = 0
            return self._late.popleft()
        self._in_a_row += bool(self._late)
        return self._early.popleft()
