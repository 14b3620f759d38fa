"""Whose prompt part is read next."""

import asyncio

import pytest

from harness.vibevoice.sessions.turns import EARLY_IN_A_ROW, EARLY_POSITIONS, Turns


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def taken(turns, order, name, behind, until):
    async with turns.one(behind):
        order.append(name)
        await until.wait()


def test_parts_are_read_as_they_come_but_late_ones_last():
    async def main():
        turns, order, until = Turns(1), [], asyncio.Event()
        behind = {"first": EARLY_POSITIONS, "late": EARLY_POSITIONS, "later": 60_000, "short": 0, "next": 256}
        tasks = [asyncio.create_task(taken(turns, order, name, each, until)) for name, each in behind.items()]
        await settle()
        assert order == ["first"]
        until.set()
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(main()) == ["first", "short", "next", "late", "later"]


def test_early_parts_without_end_do_not_hold_up_a_late_one():
    async def main():
        turns, order = Turns(1), []

        async def read(name, behind, times):
            for _ in range(times):
                async with turns.one(behind):
                    order.append(name)
                    await asyncio.sleep(0)

        await asyncio.gather(*(read("short", 0, 30) for _ in range(3)), read("long", 60_000, 4))
        return order

    places = [i for i, name in enumerate(asyncio.run(main())) if name == "long"]
    assert len(places) == 4 and places[-1] <= 4 * (EARLY_IN_A_ROW + 2)


@pytest.mark.parametrize("places", [1, 3])
def test_no_more_parts_than_places_are_read_at_once_and_none_is_lost(places):
    async def main():
        turns, reading, most = Turns(places), 0, 0

        async def read(behind):
            nonlocal reading, most
            for _ in range(5):
                async with turns.one(behind):
                    reading += 1
                    most = max(most, reading)
                    await asyncio.sleep(0)
                    reading -= 1

        await asyncio.gather(*(read(5_000 * (i % 2)) for i in range(20)))
        return most

    assert asyncio.run(main()) == places


@pytest.mark.parametrize("given", [False, True], ids=["while it waits", "as its turn comes"])
def test_a_session_that_ends_leaves_its_turn_to_the_next(given):
    async def main():
        turns, order, until = Turns(1), [], asyncio.Event()
        first, gone, last = (asyncio.create_task(taken(turns, order, name, 0, until)) for name in ("a", "b", "c"))
        await settle()
        if given:
            until.set()
            await asyncio.sleep(0)  # "a" goes on, and gives its turn to "b"
        gone.cancel()
        until.set()
        await asyncio.gather(first, last)
        async with turns.one(0):
            return order, gone.cancelled()

    order, cancelled = asyncio.run(asyncio.wait_for(main(), 10))
    assert order[0] == "a" and order[-1] == "c" and (cancelled or given)
