"""Sessions on the real server: what they say, kept and resumed, waiting for room, and stages that die under them."""

import asyncio
import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from conftest import make_request
from stage_sessions import Stages, Talk
from triton_ends import ended_with_it

from harness import wire
from harness.client.stream import SpeechClient
from harness.deploy.config import Deployment
from harness.deploy.server import TritonServer
from harness.errors import RequestError
from harness.host.keys import NOTE_SUFFIX, SHARED_FOLDER, server_mark
from harness.records.schema import Outcome
from harness.vibevoice.entry.prompt import PromptBuilder
from harness.vibevoice.entry.tokenizer import tokenizer_for
from harness.vibevoice.process.restarts import Registry
from harness.vibevoice.process.stubs import stubs_of
from harness.vibevoice.stages.presets import Weights

pytestmark = pytest.mark.server
FRAME, BEGIN, END, STOP = (
    wire.TOKEN_SPEECH_FRAME,
    wire.TOKEN_SPEECH_BEGIN,
    wire.TOKEN_SPEECH_END,
    wire.TOKEN_END_OF_TEXT,
)
SCRIPT = "Speaker 1: Good morning, and welcome.\nSpeaker 2: Thank you. It is early.\nSpeaker 1: So it is."


class Heard:
    """The result of one request, with its audio [samples] and its carry."""

    def __init__(self):
        self.pieces, self.carry, self.result = [], b"", None

    @property
    def audio(self):
        return np.frombuffer(b"".join(self.pieces), "<f4")


async def hear(client, request):
    heard = Heard()
    keep = lambda data: setattr(heard, "carry", data)  # noqa: E731
    heard.result = await client.speak(request, "closed", on_audio=heard.pieces.append, on_carry=keep)
    return heard


def hear_all(url, *requests):
    async def together():
        async with SpeechClient(url) as client:
            return await asyncio.gather(*(hear(client, request) for request in requests))

    return asyncio.run(asyncio.wait_for(together(), 120))


def done(*all_heard):
    assert [(h.result.outcome, h.result.error) for h in all_heard] == [(Outcome.DONE, "")] * len(all_heard)
    return all_heard


def talk(name="t", frames=30, **more):
    return make_request(name, SCRIPT, (1, 3), frames, **more)


def assert_same(ours, expected):
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_a_kept_session_goes_on_as_if_unbroken(triton):
    """Cut in the middle of what it is made to say, and again; other sessions share its batches."""
    said = dict(seed=5, say=(FRAME, FRAME, END, BEGIN, FRAME, END, FRAME), diffusion_steps=5, guidance_scale=2.0)
    whole, *_ = done(*hear_all(triton.url, talk(frames=40, **said), talk("other", 25, seed=9)))
    first, *_ = done(*hear_all(triton.url, talk(frames=2, keep=True, **said), talk("other", 9, seed=1)))
    # What it was still made to say goes on by itself.
    more = dict(said, say=())
    (second,) = done(*hear_all(triton.url, talk(frames=13, keep=True, carry=first.carry, **more)))
    (third,) = done(*hear_all(triton.url, talk(frames=25, carry=second.carry, chunk_frames=4, **more)))
    assert third.carry == b"" and len(second.carry) > len(first.carry) > 0
    assert_same(np.concatenate([first.audio, second.audio, third.audio]), whole.audio)


ROOM = {
    "vibevoice_llm_encoder.kv_limit_bytes": "3200000",
    "vibevoice_full_pipeline.waiting_limit": "6",
    "vibevoice_full_pipeline.waiting_seconds": "60",
    "vibevoice_full_pipeline.beat_seconds": "0.5",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A server with room for 3.2 MB of KV cache and six queued requests; a test that reloads it puts it back."""
    with TritonServer(Deployment(parameters=ROOM), root=tmp_path_factory.mktemp("small")) as server:
        yield server


@contextlib.contextmanager
def deployed(server, **changes):
    """The server with another deployment for the length of a ``with`` block."""
    before = server.deployment
    server.reload(replace(before, **changes))
    try:
        yield
    finally:
        server.reload(before)


def big(name="big", frames=12, start_frame=700, **more):
    """A request without a voice that takes about 0.75 MB of KV cache: four fit."""
    return make_request(name, SCRIPT, (0, 0), frames, start_frame=start_frame, **more)


def outcomes(all_heard):
    return [(h.result.outcome, h.result.error) for h in all_heard]


@pytest.mark.parametrize(
    ("text", "seed", "ends"),
    [("Speaker 1: Good morning.", 5, True), ("Speaker 1: So it is.", 3, True), ("Speaker 1: Hello.", 1, False)],
)
def test_a_session_ends_where_the_model_says_so(triton, text, seed, ends):
    """Random weights may also say "begin" for ever: then the room is used up, and the client is told."""
    say = (FRAME, END, BEGIN, FRAME, FRAME)
    request = make_request("n", text, (0,), 40, seed=seed, until_end=True, say=say)
    ours, whole = hear_all(triton.url, request, replace(request, frames=3))
    done(whole)  # the most frames that it may speak come first
    tokens, audio = spoken_in_process(request)
    assert (tokens[-1] == STOP) == ends
    if ends:
        done(ours)
        assert len(ours.result.chunks) == tokens.count(FRAME) < 40
    else:
        assert ours.result.outcome is Outcome.ERROR and "has used up the" in ours.result.error
    assert_same(ours.audio, audio)


def spoken_in_process(request):
    """(tokens, audio) of a session that is not forced, from the stages without Triton."""
    weights = Weights("tiny", seed=0)
    prompts = PromptBuilder(weights.config, tokenizer_for(weights.config), {})
    prompt = prompts.request(request.script.encode(), request.speaker_ids, {wire.FRAMES: 1}).prompt
    noise = np.random.default_rng(request.seed).standard_normal((request.frames + 1, wire.LATENT_SIZE), np.float32)
    stages, one = Stages(weights), Talk(request.frames, torch.from_numpy(noise))
    stages.open(1, torch.tensor(prompt.token_ids), request.frames, forced=False, say=request.say)
    with contextlib.suppress(RequestError):  # its room is used up
        stages.speak(1, one)
    return one.tokens, one.heard().numpy()


def test_a_kept_session_goes_on_at_another_server(triton, small):
    said = dict(seed=3, say=(FRAME, END, BEGIN))
    whole, first = done(*hear_all(triton.url, talk(frames=24, **said), talk(frames=11, keep=True, **said)))
    (second,) = done(*hear_all(small.url, talk(frames=13, carry=first.carry)))
    assert_same(np.concatenate([first.audio, second.audio]), whole.audio)


def test_a_carry_that_cannot_be_resumed_is_refused_in_words(triton):
    (kept,) = done(*hear_all(triton.url, talk(frames=3, keep=True)))
    (ended,) = done(*hear_all(triton.url, talk(frames=9, until_end=True, say=(FRAME, STOP), keep=True)))
    assert len(ended.result.chunks) == 1
    refused = hear_all(
        triton.url,
        talk(frames=3, carry=kept.carry[:-9]),
        talk(frames=3, carry=ended.carry),
        make_request("other", "Speaker 1: Something else.", (1,), 3, carry=kept.carry),
        replace(talk(frames=3, carry=kept.carry), speaker_ids=(1, 2)),
        talk(frames=3, carry=kept.carry, start_frame=5),
        talk(frames=wire.MAX_FRAMES, carry=kept.carry),
    )
    words = [
        "is damaged",
        "nothing to resume",
        "another script",
        "another script",
        "exclude each other",
        "40503 frames",
    ]
    for heard, expected in zip(refused, words, strict=True):
        assert heard.result.outcome is Outcome.ERROR and expected in heard.result.error


def test_beyond_the_room_some_wait_and_the_rest_are_told_so(small):
    """Four sessions fit and six may wait, whatever comes at once; nobody runs out of memory, and no room is lost."""
    all_heard = hear_all(small.url, *(big(f"b{i}", seed=i) for i in range(20)))
    served = [h for h in all_heard if h.result.outcome is Outcome.DONE]
    turned_away = [h.result.error for h in all_heard if h.result.outcome is not Outcome.DONE]
    assert len(served) == 10
    assert all(error.startswith(wire.BUSY) and "6 requests wait" in error for error in turned_away)
    assert all("needs 0.7" in error or "are waiting" in error for error in turned_away)
    nearly_all = big("all", start_frame=2800)  # (prompt + 2 x 2812) x 512 bytes
    done(*hear_all(small.url, nearly_all))


def test_what_can_never_fit_is_refused_at_once(small):
    (heard,) = hear_all(small.url, big(start_frame=3200))
    assert heard.result.outcome is Outcome.ERROR
    assert "can never fit" in heard.result.error and "x 512 bytes" in heard.result.error
    assert not heard.result.error.startswith(wire.BUSY)


def test_who_waits_too_long_is_told_so_and_who_leaves_makes_room_in_the_queue(small):
    parameters = dict(ROOM) | {"vibevoice_full_pipeline.waiting_seconds": "1.5"}

    async def main():
        async with SpeechClient(small.url) as client:
            holder = client.open(big("holder", 2800, start_frame=0), "closed")
            holding = asyncio.create_task(holder.run())
            await asyncio.sleep(0.5)
            leaving = [client.open(big(f"l{i}"), "closed") for i in range(6)]
            left = [asyncio.create_task(stream.run()) for stream in leaving]
            await asyncio.sleep(0.3)
            for stream in leaving:
                stream.stop(Outcome.CANCELLED)
            await asyncio.gather(*left)
            await asyncio.sleep(1.2)
            late = await asyncio.gather(*(client.speak(big(f"w{i}"), "closed") for i in range(6)))
            holder.stop(Outcome.CANCELLED)
            await holding
            return late, await client.speak(big("after"), "closed")

    with deployed(small, parameters=parameters):
        late, after = asyncio.run(asyncio.wait_for(main(), 120))
    assert after.outcome is Outcome.DONE
    assert all(result.error.startswith(wire.BUSY) and "waited 1.5 s" in result.error for result in late)


def processes_of(server, model):
    """Those that serve a model now; a zombie has no command line."""
    found = []
    for child in psutil.Process(server.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(word.startswith(f"{model}_0_") for word in child.cmdline()):
                found.append(child)
    return found


async def served_again(client, deadline_s=90.0):
    """The errors of requests, one after another, until one is served."""
    errors, deadline = [], time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        result = await client.speak(talk("again", 4), "closed")
        if result.outcome is Outcome.DONE:
            return errors
        errors.append(result.error)
        await asyncio.sleep(0.3)
    raise AssertionError(f"not served again: {errors[-3:]}")


@pytest.mark.parametrize("model", [wire.VOCODER, wire.LLM, wire.DIFFUSION, wire.ENTRY])
def test_a_stage_that_dies_fails_its_sessions_in_words_and_comes_back(small, model):
    """SIGKILL, as the kernel's out-of-memory killer does it."""

    async def main():
        async with SpeechClient(small.url) as client:
            speaking = set()
            streams = [
                client.open(talk(f"t{i}", 500), "closed", on_chunk=lambda stream, *_: speaking.add(stream))
                for i in range(3)
            ]
            running = [asyncio.create_task(stream.run()) for stream in streams]
            while len(speaking) < 3:
                await asyncio.sleep(0.01)
            max(processes_of(small, model), key=psutil.Process.create_time).kill()
            failed = await asyncio.gather(*running)
            if ended_with_it(small, failed[0].error):
                return [], []
            return failed, await served_again(client)

    failed, errors = asyncio.run(asyncio.wait_for(main(), 150))
    words = f"{model} ended while it served this {'request' if model == wire.ENTRY else 'session'}"
    # A stream of the entry asks what has become of it; on a busy host its time of silence may be over first.
    silent = "the process that served this request has ended" if model == wire.ENTRY else words
    for result in failed:
        assert result.outcome is Outcome.ERROR and (words in result.error or silent in result.error)
    for error in errors:
        assert f"{model} ended" in error or (model == wire.ENTRY and silent in error)
    nearly_all = big("all", start_frame=2800)  # the sessions of the dead hold no room
    done(*hear_all(small.url, nearly_all))


def test_a_process_killed_while_its_model_is_loaded_leaves_the_new_configuration_and_nothing_else(small):
    """It is not restarted with its own configuration, once more and after the new one."""
    (old,), before = processes_of(small, wire.LLM), small.deployment
    regions = len(regions_of(small))
    try:
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(small.reload, replace(before, knobs={f"{wire.LLM}.delay_us": 7}))
            while sum(stub.model == wire.LLM for stub in stubs_of(small.pid)) < 2:
                assert not loading.done()
                time.sleep(0.01)
            old.kill()
            loading.result(120)
        time.sleep(1.0)  # a restart that is asked for has begun
        deadline = time.monotonic() + 60
        while (len(regions_of(small)), len(notes_of(small, wire.LLM))) != (regions, 1):
            assert time.monotonic() < deadline, f"left: {regions_of(small)}"
            time.sleep(0.1)
        (note,) = notes_of(small, wire.LLM)
        config = json.loads(note.config)
        assert note.living and "restarts" not in config["parameters"]
        assert int(config["sequence_batching"]["oldest"]["max_queue_delay_microseconds"]) == 7
    finally:
        small.reload(before)


def regions_of(server):
    return [path for path in SHARED_FOLDER.glob(f"{server.shm_prefix}*") if path.suffix != NOTE_SUFFIX]


def notes_of(server, model):
    notes = Registry(server_mark(server.pid)).notes().values()
    return [note for note in notes if note.model == model]


def test_several_instances_of_everything_keep_each_session_where_its_state_is(triton, tmp_path):
    requests = [talk(f"s{i}", 10 + 3 * i, seed=i, say=(FRAME, END, BEGIN) * (i % 2)) for i in range(10)]
    expected = done(*hear_all(triton.url, *requests))
    twice = {f"{owner}.instances": 2 for owner in ("entry", *wire.STAGES, wire.VOICE)}
    with TritonServer(Deployment(parameters=ROOM, knobs=twice), root=tmp_path) as server:
        assert len(processes_of(server, wire.LLM)) == 2
        heard = done(*hear_all(server.url, *requests))
        for ours, theirs in zip(heard, expected, strict=True):
            assert_same(ours.audio, theirs.audio)
        # Each LLM instance has room for four of these: eight at once, and none is rejected while the other has room.
        parallel = hear_all(server.url, *(big(f"b{i}", seed=i) for i in range(12)))
        assert len(done(*parallel)) == 12
