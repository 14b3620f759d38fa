"""Whose prompt is read next."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

EARLY_POSITIONS = 4_096  # of a prompt: its later parts let those of others go first


class Turns:
    """Places for prompt parts that are being read: first come, first served, but early parts before late ones.

    A late part attends to thousands of positions. A few clients with very long prompts would otherwise delay every
    short one by one such part each.
    """

    def __init__(self, places: int):
        self._free = places
        self._numbers = itertools.count()
        self._waiting: list[tuple[bool, int, asyncio.Future[None]]] = []

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
        heapq.heappush(self._waiting, (late, next(self._numbers), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it had just been given
                self._leave()
            raise

    def _leave(self) -> None:
        while self._waiting:
            turn = heapq.heappop(self._waiting)[2]
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
