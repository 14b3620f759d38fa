"""The queue on a real Redis: every change happens whole, once, and by the worker that holds the task."""

import asyncio
import signal

import pytest
from redis.exceptions import RedisError, ResponseError
from service_parts import opened, spec_of, until

from harness.service.scripts import GROUP, SCRIPTS
from harness.service.task import MOST_TITLE, StoredSegment, TaskRecord


def run(settings, scenario, **more):
    async def main():
        async with opened(settings(**more)) as (queue, _):
            return await scenario(queue)

    return asyncio.run(main())


def segment(number, token, frames=4):
    return StoredSegment(f"{number:05d}-{token}.pcm", frames, 6400 * frames, f"{number:05d}-{token}.carry")


async def submit(queue, task="a", owner="me", most=9, again="", print_="p", **spec):
    return await queue.submit(task, owner, spec_of(**spec), most, again, print_)


def test_a_task_goes_from_queued_over_running_to_done(settings):
    async def scenario(queue):
        await submit(queue)
        queued = await queue.view(await queue.record("a"))
        claim = await queue.take("c", 0.1)
        running = await queue.record("a")
        assert await queue.commit(claim, segment(0, 1), 0.5, False)
        assert await queue.commit(await again(queue, claim), segment(1, 1), 0.5, True)
        assert await queue.finish(claim, "", 0)
        done = await queue.record("a")
        assert (queued["status"], queued["position"], queued["frames"]) == ("queued", 1, 0)
        assert running.status == "running" and running.started >= running.created > 0
        assert (
            done.status == "done"
            and done.ended >= done.started
            and done.frames == 8
            and done.rtf == pytest.approx(1.0 / (8 / 7.5))
        )
        assert await queue.client.xlen("studio:queue") == 0
        assert (await queue.client.xpending("studio:queue", GROUP))["pending"] == 0
        return await queue.counts()

    counts = run(settings, scenario)
    assert counts["submitted"] == counts["done"] == 1 and counts["segments"] == 2 and counts["frames"] == 8


async def again(queue, claim):
    """The claim with the record as it is now."""
    return type(claim)(await queue.record(claim.record.id), claim.token, claim.consumer)


def test_a_silent_workers_task_goes_to_another_and_the_silent_one_may_write_nothing_more(settings):
    async def scenario(queue):
        await submit(queue)
        old = await queue.take("one", 0.1)
        assert await queue.take("two", 0.05) is None, "its lease runs"
        new = await until(lambda: queue.take("two", 0.05))
        assert new.token > old.token
        refused = [
            await queue.beat(old, 1),
            await queue.commit(old, segment(0, old.token), 1.0, True),
            await queue.finish(old, "x", 1),
            await queue.fail(old, "no"),
            await queue.release(old),
        ]
        assert refused == [False] * 5
        record = await queue.record("a")
        assert record.status == "running" and record.segments == () and record.attempt == new.token
        assert await queue.commit(new, segment(0, new.token), 1.0, True) and await queue.finish(new, "", 0)
        assert (await queue.counts())["reclaimed"] == 1

    run(settings, scenario, lease_s=2.0)


def test_a_worker_that_gives_signs_of_life_keeps_its_task(settings):
    async def scenario(queue):
        await submit(queue)
        claim = await queue.take("one", 0.1)
        for live in range(8):
            await asyncio.sleep(0.3)
            assert await queue.beat(claim, live) and await queue.take("two", 0.01) is None
        assert (await queue.record("a")).live == 7

    run(settings, scenario, lease_s=2.0)


def test_a_task_beyond_the_most_that_may_run_keeps_its_place_and_is_offered_at_once_when_there_is_room(settings):
    async def scenario(queue):
        for task in "abc":
            await submit(queue, task)
        first = await queue.take("one", 0.1, 1)
        refused = [await queue.take(worker, 0.01, 1) for worker in ("two", "three", "one")]
        waiting = await queue.record("b")
        assert refused == [None] * 3 and (waiting.status, waiting.attempt, await queue.position("b")) == (
            "queued",
            0,
            1,
        )
        await queue.release(first)
        back = await queue.take("two", 0.01, 1)
        beside = await queue.take("three", 0.01, 2)
        assert (back.record.id, beside.record.id) == ("a", "b") and await queue.take("one", 0.01, 2) is None
        counts = await queue.counts()
        assert counts.get("reclaimed", 0) == counts.get("duplicates", 0) == 0

    run(settings, scenario, lease_s=30)


def test_a_silent_workers_task_takes_no_room_from_itself_when_another_claims_it(settings):
    async def scenario(queue):
        await submit(queue, "a")
        await submit(queue, "b")
        silent = await queue.take("one", 0.1)
        await asyncio.sleep(1.1)
        other = await until(lambda: queue.take("two", 0.01, 1))
        assert other.record.id == "a" and other.token > silent.token
        assert await queue.take("three", 0.01, 1) is None, "one runs"
        await asyncio.sleep(1.1)
        third = await queue.take("three", 0.01)
        assert third.record.id == "a" and await queue.take("one", 0.01, 1) is None, "the next one waits too"
        assert await queue.beat(third, 1) and not await queue.beat(other, 1)

    run(settings, scenario, lease_s=1.0)


def test_a_message_that_is_delivered_twice_makes_no_second_run(settings):
    async def scenario(queue):
        await submit(queue)
        await queue.client.xadd("studio:queue", {"task": "a"})
        await queue.client.xadd("studio:queue", {"task": "never"})
        first = await queue.take("one", 0.1)
        others = [await queue.take("two", 0.01) for _ in range(3)]
        assert first.record.id == "a" and others == [None] * 3
        assert await queue.beat(first, 0), "the first one still holds it"
        assert await queue.client.xlen("studio:queue") == 1

    run(settings, scenario, lease_s=30)


def test_an_answer_that_was_lost_is_asked_for_again_without_harm(settings):
    """redis-py sends a script again where the connection broke before its answer."""

    async def scenario(queue):
        made = [await submit(queue), await submit(queue)]
        claim = await queue.take("one", 0.1)
        commits = [await queue.commit(claim, segment(0, 1), 2.0, True) for _ in range(3)]
        finishes = [await queue.finish(claim, "", 0) for _ in range(3)]
        record = await queue.record("a")
        assert [each.outcome for each in made] == ["queued"] * 2 and commits == finishes == [True] * 3
        assert len(record.segments) == 1 and record.busy_s == 2.0
        assert (await queue.counts())["submitted"] == (await queue.counts())["done"] == 1

    run(settings, scenario)


def test_a_segment_is_taken_after_those_before_it_alone(settings):
    async def scenario(queue):
        await submit(queue)
        claim = await queue.take("one", 0.1)
        assert await queue.commit(claim, segment(0, 1), 1.0, False)
        assert not await queue.commit(claim, segment(0, 2), 1.0, False), "there is a first segment"
        assert [each.name for each in (await queue.record("a")).segments] == ["00000-1.pcm"]

    run(settings, scenario)


def test_an_idempotency_key_makes_one_task_for_one_owner(settings):
    async def scenario(queue):
        first = await submit(queue, "a", again="k")
        return first, [
            await submit(queue, "b", again="k"),
            await submit(queue, "c", again="k", print_="other"),
            await submit(queue, "d", owner="you", again="k"),
            await submit(queue, "e", again=""),
        ]

    first, later = run(settings, scenario)
    assert [(each.outcome, each.id) for each in (first, *later)] == [
        ("queued", "a"), ("known", "a"), ("conflict", "a"), ("queued", "d"), ("queued", "e"),
    ]  # fmt: skip


def test_a_quota_counts_tasks_that_have_not_ended(settings):
    async def scenario(queue):
        outcomes = [(await submit(queue, task, most=2)).outcome for task in "abc"]
        await queue.cancel("a")
        outcomes += [
            (await submit(queue, "d", most=2)).outcome,
            (await submit(queue, "e", owner="you", most=2)).outcome,
        ]
        return outcomes

    assert run(settings, scenario) == ["queued", "queued", "full", "queued", "queued"]


def test_a_task_that_is_given_back_keeps_its_place_and_comes_after_its_delay(settings):
    async def scenario(queue):
        for task in "abc":
            await submit(queue, task)
        claim = await queue.take("one", 0.1)
        assert claim.record.id == "a" and await queue.release(claim, 1.5, failed=True, why="it broke")
        record = await queue.record("a")
        assert (record.status, record.failures, record.error) == ("queued", 1, "it broke")
        assert await queue.position("a") == 1 and await queue.position("c") == 3
        assert (await queue.take("two", 0.01)).record.id == "b", "it is delayed"
        await asyncio.sleep(1.6)
        assert (await queue.take("two", 0.01)).record.id == "a", "it comes before newer ones"

    run(settings, scenario, lease_s=30)


def test_many_tasks_that_are_attended_hide_none_that_is_not(settings):
    async def scenario(queue):
        for number in range(40):
            await submit(queue, f"t{number}", most=99)
        claims = [await queue.take("one", 0.1) for _ in range(40)]
        await queue.release(claims[-1])
        assert (await queue.take("two", 0.01)).record.id == "t39"

    run(settings, scenario, lease_s=30)


def test_a_cancelled_task_is_never_delivered_and_its_worker_learns_of_it(settings):
    async def scenario(queue):
        await submit(queue, "waits")
        await submit(queue, "runs")
        await queue.cancel("waits")
        claim = await queue.take("one", 0.1)
        assert claim.record.id == "runs"
        assert await queue.cancel("runs") == "running" and await queue.cancel("runs") == "cancelled"
        assert not await queue.beat(claim, 1) and not await queue.commit(claim, segment(0, 1), 1.0, True)
        assert await queue.take("one", 0.01) is None
        assert await queue.cancel("never") is None
        assert (await queue.counts())["cancelled"] == 2

    run(settings, scenario)


def test_an_owner_sees_the_newest_of_its_tasks_first(settings):
    async def scenario(queue):
        for task in ("a", "b", "c"):
            await submit(queue, task)
        await submit(queue, "x", owner="you")
        return [record.id for record in await queue.of_owner("me", 2)], await queue.of_owner("nobody", 5)

    assert run(settings, scenario) == (["c", "b"], [])


def test_the_estimated_start_is_the_work_before_it_by_the_recent_pace(settings):
    async def scenario(queue):
        for task in ("a", "b", "c"):
            await submit(queue, task, frames=100, estimate=100)
        assert await queue.estimated_start(await queue.record("c")) is None, "nothing is known yet"
        await queue.alive("slots", "w|1")
        claim = await queue.take("one", 0.1)
        await queue.commit(claim, segment(0, 1, frames=50), 5.0, False)  # 0.1 s a frame
        record = await queue.record("c")
        view = await queue.view(record)
        now_s = float((await queue.client.time())[0])
        return await queue.estimated_start(record) - now_s, view

    wait_s, view = run(settings, scenario)
    assert wait_s == pytest.approx((50 + 100) * 0.1, abs=2) and view["position"] == 2 and view["estimated_start"]


def test_requests_per_minute_are_limited_by_owner(settings):
    async def minute(queue):
        return (await queue.client.time())[0] // 60

    async def scenario(queue):
        while True:  # once more where a minute ended meanwhile
            began = await minute(queue)
            waits = [await queue.allow(f"me at {began}", 3) for _ in range(5)], await queue.allow(f"you at {began}", 3)
            if await minute(queue) == began:
                return waits

    waits, other = run(settings, scenario)
    assert waits[:3] == [0, 0, 0] and all(1 <= each <= 60 for each in waits[3:]) and other == 0


def test_signs_of_life_end_by_themselves(settings):
    async def scenario(queue):
        await queue.alive("streams", "s", 1.5)
        await queue.alive("slots", "w|3", 1.5)
        before = await there(queue)
        await asyncio.sleep(1.6)
        return before, await there(queue)

    async def there(queue):
        return (await queue.room()).streams, await queue.slots()

    assert run(settings, scenario) == ((1, 3), (0, 0))


def test_what_is_due_goes_to_one_worker_at_a_time(settings):
    async def scenario(queue):
        await submit(queue, webhook="http://example.com/")
        await queue.cancel("a")
        taken = [await queue.due("hooks", 5.0) for _ in range(2)]
        await queue.postpone("hooks", "a", -1.0)
        taken.append(await queue.due("hooks", 5.0))
        await queue.done_with("hooks", "a")
        await queue.postpone("hooks", "a", -1.0)
        return [*taken, await queue.due("hooks", 5.0)]

    assert run(settings, scenario) == ["a", None, "a", None]


NOT_OF_A_TASK = {"submit", "reclaim", "due", "allow", "alive", "enter"}  # the first makes tasks, the rest name none


@pytest.mark.parametrize("script", sorted(SCRIPTS.keys() - NOT_OF_A_TASK))
@pytest.mark.parametrize("ends", ["cancelled", "held"])
def test_no_script_brings_back_a_task_that_was_forgotten(settings, script, ends):
    """Retention or its owner may remove a task between any two calls of a worker, or of its housekeeping."""

    async def scenario(queue):
        await submit(queue, webhook="http://example.com/")
        claim = await queue.take("one", 0.1)
        if ends == "cancelled":
            await queue.cancel("a")
        await queue.forget("a")
        await queue._run(script, "a", claim.token, 0, 0, 0, 1, 1, 1)
        left = [key async for key in queue.client.scan_iter("*:a")]
        kept = [name for name in ("hooks", "trash", "ended") if await queue.client.zscore(f"studio:{name}", "a")]
        return left, kept, await queue.record("a")

    assert run(settings, scenario) == ([], [], None)


def test_a_webhook_of_a_task_that_is_forgotten_meanwhile_is_not_called(settings, monkeypatch):
    from harness.service.housekeeping import Housekeeping

    async def scenario(queue):
        await submit(queue, webhook="http://example.com/")
        await queue.cancel("a")
        read = queue.record

        async def forgotten_after(task):
            record = await read(task)
            await queue.forget(task)
            return record

        monkeypatch.setattr(queue, "record", forgotten_after)
        keeping = Housekeeping(settings(), queue, None)
        monkeypatch.setattr(keeping, "_tried", lambda *_: pytest.fail("it was called"))
        await keeping._call_hook("a")
        return [key async for key in queue.client.scan_iter("*:a")], await queue.due("hooks", 0.0)

    assert run(settings, scenario) == ([], None)


def test_the_queue_survives_a_redis_that_was_killed(tmp_path, settings):
    from harness.service.redis_server import RedisServer

    server = RedisServer(tmp_path / "own").start()
    try:

        async def before(queue):
            await submit(queue)
            claim = await queue.take("one", 0.1)
            await queue.commit(claim, segment(0, 1), 1.0, False)
            await queue.written(most_s=60)
            return claim

        claim = run(settings, before, redis=server.url)
        server._process.kill()
        server._process.wait()
        server.start()

        async def after(queue):
            record = await queue.record("a")
            assert record.frames == 4 and await queue.commit(await again(queue, claim), segment(1, 1), 1.0, True)
            return await queue.finish(claim, "", 0)

        assert run(settings, after, redis=server.url)
    finally:
        server.stop()


def test_a_task_is_accepted_once_redis_has_written_it(settings, monkeypatch):
    """With an fsync under way, as on a slow disk, Redis keeps it in memory for up to 2 s."""

    async def scenario(queue):
        kept, asked = [5, 5, 0, 7], []

        async def info(section):
            asked.append((section, await queue.record("a") is not None))
            return {"aof_buffer_length": kept[len(asked) - 1]}

        monkeypatch.setattr(queue.client, "info", info)
        assert (await submit(queue)).outcome == "queued"
        return asked

    assert run(settings, scenario) == [("persistence", True)] * 3


def test_a_redis_that_does_not_say_what_it_has_written_accepts_tasks_too(settings, monkeypatch):
    async def scenario(queue):
        async def refused(section):
            raise ResponseError("NOPERM this user has no permissions to run the 'info' command")

        monkeypatch.setattr(queue.client, "info", refused)
        return (await submit(queue)).outcome

    assert run(settings, scenario) == "queued"


def test_a_cancelled_question_to_redis_ends(settings):
    """With redis-py's own time limit a cancellation is lost while it sends, on Python 3.11."""

    async def scenario(queue):
        async def ask():
            while True:
                await queue.room("a")

        for number in range(60):
            asking = asyncio.create_task(ask())
            await asyncio.sleep(number * 5e-5)
            asking.cancel()
            done, _ = await asyncio.wait([asking], timeout=120)
            assert done

    run(settings, scenario)


def test_a_redis_that_does_not_answer_is_an_error_in_time(settings, redis_server, monkeypatch):
    monkeypatch.setattr("harness.service.queue.ANSWER_S", 0.3)

    async def scenario(queue):
        redis_server._process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(RedisError, match="has not answered"):
                await queue.record("a")
            with pytest.raises(RedisError, match="has not answered"):
                await queue.room()
        finally:
            redis_server._process.send_signal(signal.SIGCONT)
        monkeypatch.setattr("harness.service.queue.ANSWER_S", 60)  # a busy host answers late
        assert await queue.record("a") is None, "it goes on after that"

    run(settings, scenario)


def test_a_beat_that_comes_after_its_segment_counts_no_frames_twice(settings):
    async def scenario(queue):
        await submit(queue)
        claim = await queue.take("one", 0.1)
        assert await queue.commit(claim, segment(0, 1), 1.0, False) and await queue.beat(claim, 4)
        record = await queue.record("a")
        assert record.live == 0 and record.view()["frames"] == 4
        assert await queue.beat(await again(queue, claim), 2) and (await queue.record("a")).view()["frames"] == 6

    run(settings, scenario)


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("one two", "one two"),
        ("word " * 30, ("word " * 30)[: MOST_TITLE - 1].rpartition(" ")[0].rstrip() + "…"),
        ("x" * 200, "x" * (MOST_TITLE - 1) + "…"),
    ],
)
def test_a_title_is_short_and_ends_with_a_whole_word(text, title):
    spec = spec_of(f"Speaker 1: {text}")
    found = TaskRecord(id="a", owner="me", spec=spec, status="queued").title
    assert found == title and len(found) <= MOST_TITLE and "wor…" not in found
