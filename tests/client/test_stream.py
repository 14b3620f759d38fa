"""One request in, one Result out: against a server of Triton's protocol on a fixed timetable."""

import asyncio
import json
import socket

import numpy as np
import pytest
from fake_triton import FakeTriton, Timetable, inputs_of, start
from hypothesis import given
from hypothesis import strategies as st

from harness import wire
from harness.client import replicas
from harness.client.stream import SpeechClient, infer_message
from harness.client.target import Target
from harness.errors import RequestError, ServerError
from harness.records.schema import Outcome, Request


def request(**changes) -> Request:
    given = dict(request_id="r1", traffic_class="short", script="Speaker 1: Hi.", speaker_ids=(0,), frames=6)
    return Request(**{**given, **changes})


def run(timetable: Timetable, use, **limits):
    """``await use(client, fake)`` with a client of a served timetable; ``limits`` are fields of its Target."""

    async def main():
        fake = FakeTriton(timetable)
        fake.server, fake.url = await start(fake)
        try:
            async with SpeechClient(Target.of(fake.url, **limits)) as client:
                return await use(client, fake)
        finally:
            await fake.server.stop(None)

    return asyncio.run(main())


def speak(timetable: Timetable, **changes):
    return run(timetable, lambda client, _: client.speak(request(**changes), "open"))


@given(
    script=st.text(min_size=1, max_size=40).filter(lambda text: text.isprintable()),
    speaker_ids=st.lists(st.integers(0, 99), min_size=1, max_size=4).map(tuple),
    frames=st.integers(1, wire.MAX_FRAMES),
    start_frame=st.integers(0, wire.MAX_FRAMES - 1),
    chunk_frames=st.integers(1, 75),
    seed=st.integers(-(2**63), 2**63 - 1),
    guidance_scale=st.floats(0, 10, width=32),
)
def test_the_server_reads_what_the_client_wrote(**fields):
    read = inputs_of(infer_message(request(**fields)))
    assert read == {
        wire.TEXT_INPUT: fields["script"],
        wire.SPEAKER_IDS: list(fields["speaker_ids"]),
        wire.FRAMES: [fields["frames"]],
        wire.START_FRAME: [fields["start_frame"]],
        wire.CHUNK_FRAMES: [fields["chunk_frames"]],
        wire.SEED: [fields["seed"]],
        wire.GUIDANCE_SCALE: [fields["guidance_scale"]],
    }


@given(
    diffusion_steps=st.integers(1, wire.MAX_DIFFUSION_STEPS),
    until_end=st.booleans(),
    say=st.lists(st.integers(0, 3), max_size=9).map(tuple),
    keep=st.booleans(),
    carry=st.binary(max_size=50),
)
def test_what_most_requests_do_not_use_is_sent_only_where_it_is_used(**fields):
    plain, read = inputs_of(infer_message(request())), inputs_of(infer_message(request(**fields)))
    used = {name: value for name, value in fields.items() if value}
    if fields["diffusion_steps"] == wire.DEFAULT_DIFFUSION_STEPS:
        del used["diffusion_steps"]
    for name, value in used.items():
        assert read.pop(name) == (list(value) if isinstance(value, tuple | bytes) else [value])
    assert read == plain


def test_speaking_until_the_end_may_leave_the_length_to_the_model():
    assert wire.FRAMES not in inputs_of(infer_message(request(frames=0, until_end=True)))
    assert inputs_of(infer_message(request(frames=0)))[wire.FRAMES] == [0]  # for the server to refuse


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("frames", 3_000_000_000, "frames 3000000000 does not fit Triton's INT32"),
        ("start_frame", -(2**31) - 1, "start_frame -2147483649 does not"),
        ("chunk_frames", 2.5, "chunk_frames 2.5 does not"),
        ("speaker_ids", (1, 2**31), "speaker_ids 1, 2147483648 does not"),
        ("seed", 2**63, "seed 9223372036854775808 does not fit Triton's INT64"),
        ("guidance_scale", 1e39, "guidance_scale 1e\\+39 does not fit Triton's FP32"),
    ],
)
def test_a_number_that_its_type_cannot_hold_is_refused_before_anything_is_sent(field, value, words):
    async def use(client, fake):
        with pytest.raises(RequestError, match=words):
            await client.speak(request(**{field: value}), "open")
        assert fake.requests == []

    run(Timetable(), use)


def test_a_whole_stream_is_done():
    heard = []

    async def use(client, _):
        await client.ready()
        return await client.speak(request(frames=7, chunk_frames=3), "closed", on_audio=heard.append)

    result = run(Timetable(first_s=0.02), use)
    assert (result.outcome, result.error, result.loop) == (Outcome.DONE, "", "closed")
    assert (result.traffic_class, result.speakers, result.script_words, result.frames) == ("short", 1, 1, 7)
    assert result.chunks.samples.tolist() == [9600, 9600, 3200]
    assert [len(audio) for audio in heard] == [38400, 38400, 12800]
    chunks = result.chunks
    times = np.concatenate([[result.sent_ns], chunks.received_ns, [result.ended_ns]])
    assert np.all(np.diff(times) >= 0)
    assert np.all(chunks.received_ns >= chunks.sent_at_ns) and np.all(chunks.sent_at_ns > result.sent_ns)
    assert chunks.received_ns[0] - result.sent_ns >= 20_000_000


def test_a_short_stream_is_an_error_with_both_numbers():
    result = speak(Timetable(stop_after=4))
    assert result.outcome is Outcome.ERROR
    assert "12800" in result.error and "19200" in result.error
    assert len(result.chunks) == 4


@pytest.mark.parametrize("frames, spoken", [(0, 4), (9, 6), (6, 6)])
def test_a_model_that_ends_by_itself_may_speak_fewer_frames(frames, spoken):
    result = speak(Timetable(stop_after=6), frames=frames, until_end=True)
    assert (result.outcome, result.error, result.frames) == (Outcome.DONE, "", frames)
    assert len(result.chunks) == spoken


def test_a_carry_comes_after_the_audio_and_is_missed_where_it_does_not_come():
    heard = []

    async def use(client, _):
        taken = dict(on_audio=lambda _: heard.append("audio"), on_carry=heard.append)
        return await client.speak(request(frames=2, keep=True), "open", **taken)

    result = run(Timetable(carry=b"what was said"), use)
    assert (result.outcome, heard) == (Outcome.DONE, ["audio", "audio", b"what was said"])
    missed = run(Timetable(), use)
    assert missed.outcome is Outcome.ERROR and "without the requested carry" in missed.error


def test_emulated_compute_is_marked_in_the_result():
    assert speak(Timetable(emulated=True)).emulated
    assert not speak(Timetable()).emulated


def test_the_servers_message_is_kept_as_it_is():
    result = speak(Timetable(fail_after=2, error="slot 7 of 4 is taken"))
    assert (result.outcome, result.error) == (Outcome.ERROR, "slot 7 of 4 is taken")
    assert len(result.chunks) == 2


@pytest.mark.parametrize(("open_s", "left"), [(0.05, False), (60.0, True)])
def test_a_client_that_is_refused_leaves_only_if_the_server_does_not_end_the_stream(monkeypatch, open_s, left):
    monkeypatch.setattr("harness.client.stream.CLOSES_S", 0.5)

    async def use(client, fake):
        result = await client.speak(request(), "open")
        while left and not fake.cancelled:
            await asyncio.sleep(0)
        return result, fake.cancelled

    result, cancelled = run(Timetable(fail_after=1, open_s=open_s), use)
    assert (result.outcome, result.error, len(result.chunks)) == (Outcome.ERROR, Timetable.error, 1)
    assert bool(cancelled) == left
    assert result.ended_ns - result.chunks.received_ns[-1] < 0.5e9 and result.ended_ns >= result.sent_ns


@pytest.mark.parametrize("outcome", [Outcome.UNFINISHED, Outcome.CANCELLED])
def test_a_stopped_stream_keeps_its_chunks_and_frees_the_server(outcome):
    async def use(client, fake):
        heard = asyncio.Event()
        stream = client.open(request(), "open", on_audio=lambda _: heard.set())
        task = asyncio.create_task(stream.run())
        await heard.wait()
        stream.stop(outcome)
        result = await task
        while not fake.cancelled:
            await asyncio.sleep(0)
        return result

    result = run(Timetable(hang_after=1), use)
    assert (result.outcome, result.error, len(result.chunks)) == (outcome, "", 1)


def test_a_stream_stopped_before_it_began_was_never_sent():
    async def use(client, fake):
        stream = client.open(request(), "open")
        stream.stop(Outcome.UNFINISHED)
        return await stream.run(), len(fake.requests)

    result, requests = run(Timetable(), use)
    assert (result.outcome, result.sent_ns, requests) == (Outcome.UNFINISHED, 0, 0)


def test_cancelling_the_caller_is_not_swallowed():
    async def use(client, fake):
        task = asyncio.create_task(client.speak(request(), "open"))
        while not fake.requests:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(Timetable(hang_after=0), use)


@pytest.mark.parametrize("stopped", [False, True])
def test_nor_is_it_between_an_error_and_the_end_of_its_stream(stopped):
    """Who stops the stream too still hears of the error: it came before."""

    async def use(client, fake):
        stream = client.open(request(), "open")
        task = asyncio.create_task(stream.run())
        while not stream._error:
            await asyncio.sleep(0)
        if stopped:
            stream.stop(Outcome.CANCELLED)
            return await task
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return None

    result = run(Timetable(fail_after=0, open_s=60.0), use)
    assert result is None or (result.outcome, result.error) == (Outcome.ERROR, Timetable.error)
    assert (result is not None) is stopped


def test_a_server_that_dies_in_mid_stream_is_an_error_with_the_chunks_so_far():
    async def use(client, fake):
        heard = asyncio.Event()
        stream = client.open(request(), "open", on_audio=lambda _: heard.set())
        task = asyncio.create_task(stream.run())
        await heard.wait()
        await fake.server.stop(None)
        return await task

    result = run(Timetable(hang_after=1), use)
    assert result.outcome is Outcome.ERROR and len(result.chunks) == 1
    assert "3200 samples" in result.error and "19200" in result.error


def test_a_server_that_falls_silent_is_an_error_with_the_chunks_so_far():
    """One that only waits sends something now and then; the process of one that died sends nothing."""

    def speak(timetable):
        return run(timetable, lambda client, _: client.speak(request(), "open"), silence_s=1.5)

    result = speak(Timetable(hang_after=2))
    assert (result.outcome, len(result.chunks)) == (Outcome.ERROR, 2)
    assert "has sent nothing for 1.5 s" in result.error and "6400 samples of audio where 19200" in result.error
    slow = speak(Timetable(interval_s=0.35))  # together longer than that
    assert (slow.outcome, len(slow.chunks)) == (Outcome.DONE, 6)


def test_a_server_that_says_how_often_it_is_heard_is_given_up_sooner():
    """In the stream in which it says so, and in those that follow, from their beginning."""

    async def use(client, fake):
        first = await client.speak(request(), "open")
        fake.timetable = Timetable(hang_after=0)
        return first, await client.speak(request(), "open")

    first, second = run(Timetable(hang_after=2, beat_s=0.15), use, silence_s=60.0)
    assert (first.outcome, len(first.chunks), len(second.chunks)) == (Outcome.ERROR, 2, 0)
    assert all("has sent nothing for 0.75 s" in result.error for result in (first, second))
    first, _ = run(Timetable(hang_after=2, beat_s=2.0), use, silence_s=0.1)
    assert "has sent nothing for 0.1 s" in first.error


def entries(*ages_s):
    return json.dumps([{"model": wire.LLM, wire.AGE_S: 0.0}, *({"model": wire.ENTRY, wire.AGE_S: s} for s in ages_s)])


@pytest.mark.parametrize("description", [None, entries(0.05), entries(0.05, 0.01)], ids=["dead", "new", "all new"])
def test_a_stream_whose_process_ended_is_told_so_when_it_asks(monkeypatch, description):
    monkeypatch.setattr(replicas, "ASK_AFTER_S", 0.6)
    table = Timetable(hang_after=2, description=description)
    result = run(table, lambda client, _: client.speak(request(), "open"), silence_s=20.0)
    assert result.error.startswith(f"{wire.ENTRY} ended while it served this request") and "retry" in result.error
    assert result.outcome is Outcome.ERROR and "6400 samples of audio where 19200" in result.error


@pytest.mark.parametrize(
    "description",
    [entries(9.0), entries(0.05, 9.0), entries(), "[]", "no JSON", '[{"model": "vibevoice_full_pipeline"}]', "3"],
)
def test_a_server_whose_process_lives_or_that_does_not_tell_is_only_silent(monkeypatch, description):
    monkeypatch.setattr(replicas, "ASK_AFTER_S", 0.1)
    table = Timetable(hang_after=2, description=description)
    result = run(table, lambda client, _: client.speak(request(), "open"), silence_s=0.5)
    assert "has sent nothing for 0.5 s" in result.error
    late = run(Timetable(stalls={2: 0.5}, description=description), lambda client, _: client.speak(request(), "open"))
    assert late.outcome is Outcome.DONE


def test_a_request_that_takes_too_long_is_an_error_with_the_chunks_so_far_and_frees_the_server():
    async def use(client, fake):
        result = await client.speak(request(), "open")
        while not fake.cancelled:
            await asyncio.sleep(0)
        return result

    result = run(Timetable(interval_s=0.6), use, request_s=1.5)
    assert result.outcome is Outcome.ERROR and 0 < len(result.chunks) < 6
    assert "exceeded its time limit of 1.5 s" in result.error and "where 19200 were requested" in result.error
    assert 1.5e9 <= result.ended_ns - result.sent_ns


def test_an_unreachable_server_is_named_with_its_remedy():
    with socket.socket() as taken:  # bound but not listening: nothing answers
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"

        async def use():
            async with SpeechClient(address) as client:
                with pytest.raises(ServerError, match="harness serve") as error:
                    await client.ready()
                return str(error.value), await client.speak(request(), "open")

        words, result = asyncio.run(use())
    assert address in words and "\n" not in words
    assert result.outcome is Outcome.ERROR and result.error == words


@pytest.mark.parametrize(
    "timetable, words", [(Timetable(ready=False), "not ready"), (Timetable(model_ready=False), wire.ENTRY)]
)
def test_a_server_that_cannot_speak_is_refused(timetable, words):
    async def use(client, _):
        with pytest.raises(ServerError, match=words):
            await client.ready()

    run(timetable, use)


def test_an_http_port_is_told_from_a_grpc_port():
    async def answer(_, writer):
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def use():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, SpeechClient(f"127.0.0.1:{port}") as client:
            with pytest.raises(ServerError, match="gRPC port"):
                await client.ready()

    asyncio.run(use())
