"""The queue for room: order, bounds, what becomes of those who leave it; and what stages say, in words."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import wire
from harness.errors import RequestError
from harness.vibevoice.sessions import admission
from harness.vibevoice.sessions.admission import AdmissionQueue, Busy
from harness.vibevoice.sessions.failures import StageEnded, StageError, at_instance, described


class Left(Exception):
    pass


class Room:
    """A stage with room for so many units; opening takes a turn of the loop, as a call to a stage does."""

    def __init__(self, units):
        self.free, self.opened, self.tries, self.worst = units, [], 0, 0

    def taker(self, name, units=1):
        async def take():
            self.tries += 1
            await asyncio.sleep(0)
            if units > self.free:
                raise Busy(f"{wire.BUSY}{self.free} units are free")
            self.free -= units
            self.opened.append(name)

        return take


def run(main):
    return asyncio.run(asyncio.wait_for(main, 120))


def stay():
    """The check of a client that does not leave."""


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


def test_with_room_for_all_nobody_waits():
    async def main():
        queue, room = AdmissionQueue(places=100, limit=0, patience_s=0), Room(100)
        await asyncio.gather(*(queue.enter(room.taker(i), stay) for i in range(100)))
        return room.tries

    assert run(main()) == 100


def test_those_that_wait_are_served_in_the_order_in_which_they_came():
    async def main():
        queue, room = AdmissionQueue(places=100, limit=50, patience_s=10), Room(1)
        await queue.enter(room.taker("first"), stay)
        waiting = []
        for i in range(5):
            waiting.append(asyncio.create_task(queue.enter(room.taker(i), stay)))
            await until(lambda i=i: len(queue) == i + 1)
        for _ in range(5):
            room.free += 1
            queue.leave()
            await until(lambda: room.free == 0)
        await asyncio.gather(*waiting)
        return room.opened

    assert run(main()) == ["first", 0, 1, 2, 3, 4]


def test_a_big_session_at_the_head_is_not_overtaken_by_small_ones():
    async def main():
        queue, room = AdmissionQueue(places=100, limit=50, patience_s=10), Room(4)
        await queue.enter(room.taker("a", 3), stay)
        big = asyncio.create_task(queue.enter(room.taker("big", 4), stay))
        await until(lambda: len(queue) == 1)
        small = asyncio.create_task(queue.enter(room.taker("small", 1), stay))
        await until(lambda: len(queue) == 2)
        await asyncio.sleep(2 * admission.RETRY_S)
        assert room.opened == ["a"]
        room.free += 3
        queue.leave()
        await big
        room.free += 4
        queue.leave()
        await small
        return room.opened

    assert run(main()) == ["a", "big", "small"]


def test_a_queue_that_is_full_turns_away_at_once():
    async def main():
        queue, room = AdmissionQueue(places=100, limit=2, patience_s=60), Room(0)
        waiting = [asyncio.create_task(queue.enter(room.taker(i), stay)) for i in range(2)]
        await until(lambda: len(queue) == 2)
        with pytest.raises(
            Busy, match=r"^busy: other requests are waiting for room; queue full: 2 requests wait .*waiting_limit"
        ):
            await queue.enter(room.taker("late"), stay)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert len(queue) == 0
        with pytest.raises(Busy, match=r"^busy: 0 units are free; queue full: 0 requests wait"):
            await AdmissionQueue(places=100, limit=0, patience_s=60).enter(room.taker("none may wait"), stay)

    run(main())


def test_who_waited_long_enough_is_told_how_long_and_why():
    async def main():
        queue, room = AdmissionQueue(places=100, limit=5, patience_s=0.15), Room(0)
        head = asyncio.create_task(queue.enter(room.taker("head"), stay))
        await until(lambda: len(queue) == 1)
        second = asyncio.create_task(queue.enter(room.taker("second"), stay))
        errors = await asyncio.gather(head, second, return_exceptions=True)
        assert room.tries >= 2 and len(queue) == 0 and queue.free == 100
        return [str(error) for error in errors]

    head, second = run(main())
    assert head.startswith("busy: 0 units are free; waited 0.15 s, the limit (waiting_seconds)")
    assert second.startswith("busy: ") and "waited 0.15 s" in second


def test_a_client_that_leaves_leaves_the_queue():
    async def main():
        queue, room, gone = AdmissionQueue(places=100, limit=5, patience_s=60), Room(0), []

        def check():
            if gone:
                raise Left

        leaver = asyncio.create_task(queue.enter(room.taker("leaver"), check))
        await until(lambda: len(queue) == 1)
        next_ = asyncio.create_task(queue.enter(room.taker("next"), stay))
        await until(lambda: len(queue) == 2)
        gone.append(True)
        with pytest.raises(Left):
            await leaver
        assert len(queue) == 1
        room.free += 1
        queue.leave()
        await next_
        return room.opened

    assert run(main()) == ["next"]


def test_room_that_comes_free_elsewhere_is_found():
    """Another entry instance closed a session: nobody calls ``leave`` here."""

    async def main():
        queue, room = AdmissionQueue(places=100, limit=5, patience_s=60), Room(0)
        waiting = asyncio.create_task(queue.enter(room.taker("one"), stay))
        await until(lambda: len(queue) == 1)
        room.free += 1
        await waiting
        return room.opened

    assert run(main()) == ["one"]


def test_places_are_counted_and_given_back_whatever_happens():
    async def main():
        queue, room = AdmissionQueue(places=2, limit=5, patience_s=0.1), Room(100)
        await asyncio.gather(queue.enter(room.taker("a"), stay), queue.enter(room.taker("b"), stay))
        with pytest.raises(Busy, match="all 2 sessions of this entry instance are taken"):
            await queue.enter(room.taker("c"), stay)
        queue.leave()

        async def broken():
            raise RequestError("it can never fit")

        with pytest.raises(RequestError, match="never fit"):
            await queue.enter(broken, stay)
        await queue.enter(room.taker("d"), stay)
        return queue.free, room.opened

    assert run(main()) == (0, ["a", "b", "d"])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5), st.booleans()), max_size=25),
)
def test_no_room_is_lost_and_none_is_taken_twice(places, units, requests):
    """Sessions of any size that hold their room for some turns of the loop; some clients leave while they wait."""

    async def one(queue, room, number, size, turns, leaves):
        def check():
            if leaves:
                raise Left

        try:
            await queue.enter(room.taker(number, size), check)
        except (Busy, Left):
            return
        assert room.free >= 0 and queue.free >= 0
        for _ in range(turns):
            await asyncio.sleep(0)
        room.free += size
        queue.leave()

    async def main():
        queue, room = AdmissionQueue(places, limit=10, patience_s=0.02), Room(units)
        await asyncio.gather(*(one(queue, room, i, *request) for i, request in enumerate(requests)))
        assert (len(queue), queue.free, room.free) == (0, places, units)
        assert len(set(room.opened)) == len(room.opened)

    run(main())


@pytest.mark.parametrize(
    ("message", "kind", "words"),
    [
        (f"in ensemble 'x', {wire.BUSY}no room", Busy, "^busy: no room$"),
        ("Stub process 'neural_vocoder_0_0' is not healthy.", StageEnded, "^neural_vocoder ended while"),
        ("in ensemble 'vibevoice_frame', Stub process 'a_b_0_12' is not healthy.", StageEnded, "^a_b ended while"),
        ("in ensemble 'vibevoice_frame', a_b has no such session: it was closed", StageEnded, "^a_b ended while"),
        (
            "inference request for sequence 7 to model 'a_b' must specify the START flag on the first request",
            StageEnded,
            "^a_b ended while",
        ),
        ("in ensemble 'vibevoice_frame', the room is used up", StageError, "^the room is used up$"),
    ],
)
def test_what_a_stage_says_in_the_words_of_a_client(message, kind, words):
    error = described(message)
    assert type(error) is kind
    with pytest.raises(kind, match=words):
        raise error


def test_one_of_several_instances_says_which_it_is():
    full = RequestError(f"{wire.BUSY}no room")
    assert at_instance(full, 1, 1) is full
    told = described(str(at_instance(full, 2, 3)))
    assert (type(told), told.place, told.places) == (Busy, 2, 3)
    assert (described(str(full)).place, described(str(full)).places) == (1, 1)
    other = RequestError("it can never fit")
    assert at_instance(other, 2, 3) is other


@pytest.mark.parametrize(
    "message",
    [
        "Model vibevoice_frame - Error when running inference: Server not ready",
        "in ensemble 'vibevoice_frame', Server is stopping, scheduler for model has stopped accepting new requests",
    ],
)
def test_what_triton_says_as_it_stops_is_told_as_what_it_is(message):
    error = described(message)
    assert type(error) is StageError and "the server is stopping" in str(error) and "retry" in str(error)
