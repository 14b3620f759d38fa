"""Workers on a real Redis, against a server that speaks: audio is that of an unbroken run, whatever happens."""

import asyncio
import contextlib
import errno
import gc
import weakref

import numpy as np
import pytest
import soundfile
from service_parts import opened, spec_of, until, working
from speaking_triton import speaking, unbroken

from harness import wire
from harness.client.stream import SpeechClient
from harness.service.queue import Room
from harness.service.room import NO_LIMIT, must_yield, tasks_allowed
from harness.service.segments import SegmentPlan, SegmentRun
from harness.service.task import TaskRecord
from harness.service.worker import TaskWorker

SEED = 7


def run(settings, target, scenario, **more):
    async def main():
        made = settings(url=target, **more)
        async with opened(made) as (queue, store):
            return await scenario(queue, store, made)

    return asyncio.run(main())


async def submit(queue, task="a", **spec):
    await queue.submit(task, "me", spec_of(seed=SEED, **spec), 99, "", "p")


def ended(queue, task="a"):
    async def condition():
        record = await queue.record(task)
        return record if record.status in ("done", "failed", "cancelled") else None

    return until(condition)


def audio_of(store, record):
    return np.frombuffer(b"".join(store.read(record.id, each.name) for each in record.segments), "<i2")


async def speak_one(queue, store, settings, task="a"):
    async with working(settings, queue, store):
        return await ended(queue, task)


def test_a_segment_is_freed_as_soon_as_it_is_stored(target):
    """Audio and carry are tens of MB: in a cycle they stay until Python looks for cycles, which it does ever less."""

    async def main():
        async with SpeechClient(target) as client:
            record, kept = TaskRecord(id="a", owner="me", spec=spec_of(frames=900), status="running"), []
            for _ in range(3):
                run = SegmentRun(client, record, SegmentPlan(20, False), kept[-1][2] if kept else b"")
                spoken = await run.run()
                kept.append((weakref.ref(run), weakref.ref(run._heard), spoken.carry))
                del run, spoken
            for _ in range(600):  # those of gRPC let go of it a little later
                if not any(run() or heard() for run, heard, _ in kept):
                    break
                await asyncio.sleep(0.05)
            return [(run(), heard()) for run, heard, _ in kept]

    gc.collect()
    gc.disable()
    try:
        assert asyncio.run(main()) == [(None, None)] * 3
    finally:
        gc.enable()


def test_segments_are_joined_to_the_audio_of_an_unbroken_run(settings, target, conduct):
    async def scenario(queue, store, made):
        await submit(queue, frames=10)
        record = await speak_one(queue, store, made)
        return record, audio_of(store, record), store.names("a")

    record, audio, names = run(settings, target, scenario)
    assert record.status == "done" and [each.frames for each in record.segments] == [4, 4, 2]
    assert np.array_equal(audio, unbroken(SEED, 10))
    assert names == [each.name for each in record.segments], "carries are removed"
    asked = [(each[wire.FRAMES], wire.KEEP in each) for each in conduct.requests]
    assert asked == [([4], True), ([4], True), ([2], False)]


@pytest.mark.parametrize(("format", "subtype"), [("flac", "PCM_16"), ("opus", "OPUS")])
def test_a_task_is_encoded_when_it_is_done(settings, target, tmp_path, format, subtype):
    async def scenario(queue, store, made):
        await submit(queue, frames=9, format=format)
        record = await speak_one(queue, store, made)
        (tmp_path / "heard").write_bytes(store.read("a", record.result))
        return record, store.names("a")

    record, names = run(settings, target, scenario)
    assert names == [record.result] and record.result_bytes == (tmp_path / "heard").stat().st_size
    with soundfile.SoundFile(tmp_path / "heard") as file:
        assert (file.samplerate, file.channels, file.subtype) == (24_000, 1, subtype)
        samples = file.read(dtype="int16")
    assert len(samples) == 9 * wire.SAMPLES_PER_FRAME
    if format == "flac":
        assert np.array_equal(samples, unbroken(SEED, 9))


def test_a_text_that_ends_by_itself_ends_there(settings, target, conduct):
    async def scenario(queue, store, made):
        await submit(queue, frames=40_500, estimate=9, until_end=True)
        return await speak_one(queue, store, made)

    conduct.ends_at = 8  # exactly after the second segment: the third has nothing left to say
    record = run(settings, target, scenario)
    assert record.status == "done" and [each.frames for each in record.segments] == [4, 4, 0]
    assert record.of_frames == record.frames == 8


def test_a_failed_segment_is_spoken_again_and_no_other(settings, target, conduct):
    async def scenario(queue, store, made):
        await submit(queue, frames=12)
        conduct.breaks = 2
        record = await speak_one(queue, store, made)
        return record, audio_of(store, record)

    record, audio = run(settings, target, scenario)
    assert record.status == "done" and np.array_equal(audio, unbroken(SEED, 12))
    assert len(conduct.requests) == 3 + 2 and record.error == "" and record.failures == 0


def test_a_segment_that_always_fails_ends_its_task_with_the_reason(settings, target, conduct):
    async def scenario(queue, store, made):
        await submit(queue, frames=12)
        conduct.breaks = 99
        return await speak_one(queue, store, made)

    record = run(settings, target, scenario, tries=3)
    assert record.status == "failed" and len(conduct.requests) == 3
    assert "3 times in a row" in record.error and "ran out of memory" in record.error


def test_what_the_server_refuses_fails_at_once(settings, target, conduct):
    async def scenario(queue, store, made):
        await submit(queue)
        return await speak_one(queue, store, made)

    conduct.refuse = "the text does not fit"
    record = run(settings, target, scenario)
    assert (record.status, record.error) == ("failed", "the text does not fit") and len(conduct.requests) == 1


def test_a_full_server_is_waited_for(settings, target, conduct):
    async def scenario(queue, store, made):
        await submit(queue)
        return await speak_one(queue, store, made)

    conduct.busy = 3
    record = run(settings, target, scenario, tries=2)
    assert record.status == "done" and record.failures == 0 and len(conduct.requests) == 3 + 2


def test_a_worker_that_stops_gives_its_task_back_at_once(settings, target, conduct):
    async def scenario(queue, store, made):
        await submit(queue, frames=12)
        conduct.holds_at = 6
        async with working(made, queue, store):
            await until(lambda: frames_stored(queue, 4))
        record = await queue.record("a")
        assert record.status == "queued" and record.frames == 4
        await until(lambda: _is(conduct.speaking == 0))
        conduct.go_on.set()
        record = await speak_one(queue, store, made)
        return audio_of(store, record)

    assert np.array_equal(run(settings, target, scenario, lease_s=30), unbroken(SEED, 12))


async def frames_stored(queue, least, task="a"):
    return (await queue.record(task)).frames >= least


def test_a_worker_that_dies_costs_one_segment(settings, target, conduct):
    """It is frozen in the middle of a segment: another takes over, and what the first one does later counts nothing."""

    async def scenario(queue, store, made):
        await submit(queue, frames=12)
        conduct.holds_at = 6
        async with SpeechClient(made.url) as client:
            frozen = TaskWorker(made, queue, store, client)
            frozen._beat = _never
            running = asyncio.create_task(frozen.run())
            await until(lambda: frames_stored(queue, 4))
            store_now, frozen._store = frozen._store, None
            frozen._store = lambda *given: _late(store_now, *given)
            conduct.go_on.set()
            record = await speak_one(queue, store, made)
            frozen.stop()
            await running
        return record, audio_of(store, record), conduct.requests

    record, audio, requests = run(settings, target, scenario, lease_s=1.5, jobs_at_once=1)
    assert record.status == "done" and np.array_equal(audio, unbroken(SEED, 12))
    assert 4 <= len(requests) <= 3 + 2


async def _never(*_):
    await asyncio.Event().wait()


async def _late(store, *given):
    await asyncio.sleep(3.0)  # twice the lease
    return await store(*given)


def test_a_cancelled_task_stops_at_the_server_and_its_audio_is_removed(settings, target, conduct):
    async def scenario(queue, store, made):
        await submit(queue, frames=400)
        conduct.frame_s = 0.05
        async with working(made, queue, store):
            await until(lambda: frames_stored(queue, 4))
            await queue.cancel("a")
            await until(lambda: _is(conduct.speaking == 0))
            await until(lambda: _is(store.names("a") == []))
        return await queue.record("a")

    assert run(settings, target, scenario, lease_s=0.5).status == "cancelled"


async def _is(condition):
    return condition


def test_a_full_disk_delays_a_task_and_fails_none(settings, target, conduct):
    async def scenario(queue, store, made):
        await submit(queue)
        write, failures = store.write, []

        def full(task, name, content):
            if len(failures) < 3:
                failures.append(name)
                raise OSError(errno.ENOSPC, "No space left on device")
            write(task, name, content)

        store.write = full
        record = await speak_one(queue, store, made)
        return record, audio_of(store, record), failures

    record, audio, failures = run(settings, target, scenario, tries=1, lease_s=0.5)
    assert len(failures) == 3 and record.status == "done" and np.array_equal(audio, unbroken(SEED, 8))


def test_an_error_that_nobody_expected_ends_its_task_and_no_worker(settings, target, conduct):
    async def scenario(queue, store, made):
        await submit(queue)
        write = store.write

        def broken(task, name, content):
            if task == "a":
                raise RuntimeError("the encoder broke")  # what soundfile and storages of others raise
            write(task, name, content)

        store.write = broken
        async with working(made, queue, store):
            first = await ended(queue)
            await submit(queue, "b")
            return first, await ended(queue, "b")

    first, second = run(settings, target, scenario, tries=2, lease_s=0.5)
    assert (first.status, second.status) == ("failed", "done") and "the encoder broke" in first.error


def test_tasks_run_side_by_side_up_to_the_places_of_a_worker(settings, target, conduct):
    async def scenario(queue, store, made):
        conduct.holds_at = 6
        for number in range(6):
            await submit(queue, f"t{number}")
        async with working(made, queue, store):
            await until(lambda: _is(conduct.speaking == 3))
            conduct.go_on.set()
            return [(await ended(queue, f"t{number}")).status for number in range(6)]

    assert run(settings, target, scenario, jobs_at_once=3, lease_s=30) == ["done"] * 6
    assert conduct.most_speaking == 3


def test_tasks_that_come_at_once_to_an_idle_worker_are_no_more_than_its_sessions(settings, target, conduct):
    """Each place looks after the one before it has taken: all of them saw room for another one before."""

    async def scenario(queue, store, made):
        conduct.frame_s = 0.02
        async with working(made, queue, store):
            await until(queue.slots)
            await asyncio.sleep(0.2)
            for number in range(6):
                await submit(queue, f"t{number}")
            return [(await ended(queue, f"t{number}")).status for number in range(6)], await queue.counts()

    statuses, counts = run(settings, target, scenario, jobs_at_once=6, sessions=2)
    assert statuses == ["done"] * 6 and conduct.most_speaking == 2 and counts.get("yielded", 0) == 0


def test_tasks_that_come_at_once_to_several_idle_workers_are_no_more_than_the_sessions(settings, target, conduct):
    """Workers do not wait for each other: the claim itself counts, so that what both saw as room is taken once."""

    async def scenario(queue, store, made):
        conduct.frame_s = 0.02
        async with contextlib.AsyncExitStack() as workers:
            for _ in range(4):
                await workers.enter_async_context(working(made, queue, store))
            await until(lambda: _has_slots(queue, 8))
            await asyncio.sleep(0.3)  # every worker waits for a task now, with room for it
            for number in range(6):
                await submit(queue, f"t{number}")
            return [(await ended(queue, f"t{number}")).status for number in range(6)], await queue.counts()

    statuses, counts = run(settings, target, scenario, jobs_at_once=2, sessions=1)
    assert statuses == ["done"] * 6 and conduct.most_speaking == 1
    assert counts.get("yielded", 0) == counts.get("reclaimed", 0) == 0


async def _has_slots(queue, slots):
    return await queue.slots() == slots


def test_a_task_makes_room_for_streams_at_the_end_of_a_segment_and_goes_on_after_them(settings, target, conduct):
    async def scenario(queue, store, made):
        conduct.frame_s = 0.03
        await submit(queue, frames=100)
        async with working(made, queue, store):
            await until(lambda: frames_stored(queue, 4))
            await queue.alive("streams", "s", 30)
            await until(lambda: _has_status(queue, "queued"))
            paused = await queue.record("a")
            await asyncio.sleep(0.5)
            assert (await queue.record("a")).frames == paused.frames and conduct.speaking == 0
            conduct.frame_s = 0
            await queue.gone("streams", "s")
            record = await ended(queue)
        return paused.frames, audio_of(store, record), await queue.counts()

    frames, audio, counts = run(settings, target, scenario, sessions=1, lease_s=30)
    assert frames % 4 == 0 and 4 <= frames < 100 and np.array_equal(audio, unbroken(SEED, 100))
    assert counts["yielded"] == 1 and counts.get("retried", 0) == 0 and len(conduct.requests) == 25


async def _has_status(queue, status):
    return (await queue.record("a")).status == status


def test_a_worker_waits_for_a_server_that_is_not_there(settings, conduct):
    async def scenario(queue, store, made):
        await submit(queue)
        async with working(made, queue, store):
            await asyncio.sleep(0.5)
            assert (await queue.record("a")).status == "queued", "nothing is taken that cannot be spoken"

    with speaking(conduct) as fake:
        fake.kill()
        run(settings, fake.url, scenario)


def test_ended_tasks_and_their_audio_are_removed_in_time(settings, target):
    async def scenario(queue, store, made):
        await submit(queue)
        async with working(made, queue, store):
            await ended(queue)
            await until(lambda: _gone(queue))
        return store.names("a"), await queue.of_owner("me", 5), await queue.client.keys("studio:*a")

    assert run(settings, target, scenario, retention_days=0.0001) == ([], [], [])


async def _gone(queue):
    return await queue.record("a") is None


@pytest.mark.parametrize(
    ("room", "sessions", "allowed"),
    [
        (Room(0, 0, 0, -1), 0, NO_LIMIT),
        (Room(9, 0, 5, 0), 0, NO_LIMIT),
        (Room(9, 1, 5, 0), 0, 0),
        (Room(0, 0, 0, -1), 4, 4),
        (Room(3, 0, 1, 0), 4, 1),
        (Room(6, 2, 1, 0), 4, 0),
    ],
)
def test_streams_come_before_tasks(room, sessions, allowed):
    assert tasks_allowed(room, sessions) == allowed


def test_the_youngest_tasks_give_way():
    rooms = [Room(2, 0, 3, rank) for rank in range(3)]
    assert [must_yield(room, sessions=4) for room in rooms] == [False, False, True]
