"""Texts and voices as prompts, what is refused, and the table of open sessions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import wire
from harness.errors import RequestError, ScriptError
from harness.traffic.mix import ScriptSource
from harness.vibevoice.entry.prompt import (
    FRAMES_PER_TEXT_TOKEN,
    LONGEST_END,
    LONGEST_END_FRAMES,
    PromptBuilder,
    prompt_chunks,
)
from harness.vibevoice.entry.tokenizer import tokenizer_for
from harness.vibevoice.entry.voices import frames_of, load_voices
from harness.vibevoice.sessions.carry import Past
from harness.vibevoice.sessions.parts import FULL_PARTS, parts_of
from harness.vibevoice.sessions.table import IDLE_LIMIT_S, SPARE_STEPS, Sessions
from harness.vibevoice.stages.configuration import preset_config


@pytest.fixture(scope="module")
def prompts():
    config = preset_config("tiny")
    voice_frames = {voice: frames_of(samples) for voice, samples in load_voices().items()}
    return PromptBuilder(config, tokenizer_for(config), voice_frames)


def test_a_prompt_has_a_place_for_every_frame_of_every_voice(prompts):
    request = prompts.request(b"Speaker 1: Hello.\nSpeaker 2: Hi.\nSpeaker 1: Bye.", [2, 0], {wire.FRAMES: 7})
    assert request.prompt.voices == (2,)  # speaker 2 has no voice sample
    assert request.prompt.token_ids.count(prompts.config.audio_token_id) == prompts.voice_frames[2] == 90
    assert (request.frames, request.start_frame, request.guidance_scale) == (7, 0, wire.DEFAULT_GUIDANCE_SCALE)


@pytest.mark.parametrize(
    ("text", "speakers", "options", "error", "message"),
    [
        (b"", [1], {}, ScriptError, "empty"),
        (b"\xff\xfe", [1], {}, ScriptError, "UTF-8"),
        (b"Speaker 5: Hi", [1, 2, 3, 4, 1], {}, ScriptError, "5"),
        (b"Speaker 1:", [1], {}, ScriptError, "line 1"),
        (b"Speaker 2: Hi", [1], {}, ScriptError, "Speaker 2"),
        (b"Hi", [9], {}, ScriptError, "unknown voice id 9"),
        (b"Hi", [1], {wire.FRAMES: 0}, RequestError, "1 to 40500"),
        (b"Hi", [1], {wire.FRAMES: 40_501}, RequestError, "40500"),
        (b"Hi", [1], {wire.FRAMES: 1, wire.START_FRAME: -1}, RequestError, "start_frame"),
        (b"Hi", [1], {wire.FRAMES: 2, wire.START_FRAME: 40_499}, RequestError, "40501"),
        (b"Hi", [1], {wire.CHUNK_FRAMES: 0}, RequestError, "chunk_frames"),
        (b"Hi", [1], {wire.GUIDANCE_SCALE: float("nan")}, RequestError, "guidance_scale"),
        (b"Hi", [1], {wire.SEED: -1}, RequestError, "seed"),
        (b"Hi", [1], {wire.DIFFUSION_STEPS: 0}, RequestError, "1 to 100"),
        (b"Hi", [1], {wire.DIFFUSION_STEPS: 101}, RequestError, "1 to 100"),
        (b"Hi", [1], {wire.SAY: [0, 4, -1]}, RequestError, "say holds -1, 4: use"),
        (b"Hi", [1], {wire.SAY: [0] * 65_536}, RequestError, "65536"),
        (b"word " * 70_000, [1], {wire.FRAMES: 10}, RequestError, "65536"),
        (b"word " * 700_000, [1], {wire.FRAMES: 10}, ScriptError, "3500000 bytes.*65536 tokens"),
    ],
)
def test_what_cannot_be_spoken_is_refused_with_its_reason(prompts, text, speakers, options, error, message):
    with pytest.raises(error, match=message):
        prompts.request(text, speakers, options)


@pytest.mark.parametrize("seconds", [10, 600, 1800])
@pytest.mark.parametrize(
    "text", ["大家好，欢迎收听今天的节目。我们今天要讨论的是人工智能。", "ยินดีต้อนรับสู่รายการของเราวันนี้"]
)
def test_a_prompt_of_any_script_has_tokens_in_proportion_to_its_length(prompts, tmp_path, text, seconds):
    """600 s of Chinese took 30,811 tokens where English takes 2,881, and 1,800 s were refused."""
    (tmp_path / "talk.txt").write_text(f"Speaker 1：{text}\nSpeaker 2：{text}\n" * 9, encoding="utf-8")
    frames, rng = round(seconds * 7.5), np.random.default_rng(1)
    sources = (ScriptSource.from_folder(tmp_path), ScriptSource())
    scripts = (source.script(rng, frames, 2)[0] for source in sources)
    tokens = [prompts.request(script.encode(), [0, 0], {wire.FRAMES: frames}).prompt.text_tokens for script in scripts]
    assert 0.4 < tokens[0] / tokens[1] < 2.5


def test_a_model_that_ends_by_itself_has_room_for_several_times_its_text(prompts):
    """Where a request says nothing about frames; room is reserved, so not all of the context for a short text."""
    by_itself = PromptBuilder(prompts.config, prompts.tokenizer, prompts.voice_frames, ends_by_itself=True)
    text = b"Speaker 1: Hello there."
    asked = {
        "random": prompts.request(text, [0], {}),
        "asked": prompts.request(text, [0], {wire.UNTIL_END: True}),
        "checkpoint": by_itself.request(text, [0], {}),
        "told": by_itself.request(text, [0], {wire.FRAMES: 9}),
        "told not to": by_itself.request(text, [0], {wire.UNTIL_END: False}),
    }
    takes = prompts.request(text, [0], {}).prompt.text_tokens * FRAMES_PER_TEXT_TOKEN
    most = LONGEST_END_FRAMES + round(LONGEST_END * takes)
    assert {name: (one.frames, one.forced) for name, one in asked.items()} == {
        "random": (asked["random"].frames, True),
        "asked": (most, False),
        "checkpoint": (most, False),
        "told": (9, True),
        "told not to": (asked["random"].frames, True),
    }
    assert 1 < asked["random"].frames == round(takes) < 40
    long = by_itself.request(b"word " * 40_000, [0], {})
    room = prompts.context - len(long.prompt.token_ids)
    assert long.frames == room - 1 - SPARE_STEPS < wire.MAX_FRAMES


def test_a_session_that_goes_on_brings_its_own_past(prompts):
    tokens = np.array([0, 2, 1, 0], np.int32)
    rows = np.zeros((2, wire.LATENT_SIZE), np.float32), np.zeros((2, wire.SEMANTIC_SIZE), np.float32)
    past = Past("m", "s", 77, 300, tokens, *rows, np.array([1, 0], np.int32), np.zeros(3, np.float32))
    request = prompts.request(b"Hi", [0], {wire.CARRY: past, wire.FRAMES: 5, wire.SEED: 3})
    assert (request.seed, request.start_frame, request.say) == (77, 300, (1, 0))
    assert (request.frames_behind, request.steps_behind) == (302, 304)
    assert prompts.request(b"Hi", [0], {wire.CARRY: past, wire.SAY: [2]}).say == (2,)
    with pytest.raises(RequestError, match=r"carry 302 \+ frames 40199 = 40501 frames"):
        prompts.request(b"Hi", [0], {wire.CARRY: past, wire.FRAMES: wire.MAX_FRAMES - 301})
    with pytest.raises(RequestError, match="exclude each other"):
        prompts.request(b"Hi", [0], {wire.CARRY: past, wire.FRAMES: 1, wire.START_FRAME: 1})


def test_the_stand_in_tokenizer_yields_about_as_many_tokens_as_the_released_one(prompts):
    text = (
        "Welcome to the programme, where we unpack the biggest stories in technology. Today's question: what does it "
        "cost to serve ninety minutes of conversation, and who pays for it? My guest has measured exactly that, on "
        "real hardware, with real traffic, and the answer surprised everyone at the table."
    )
    per_word = len(prompts.tokenizer.encode(text)) / len(text.split())
    assert 1.2 <= per_word <= 1.5


@given(st.lists(st.sampled_from([1, 2, 4095]), max_size=60), st.integers(1, 20))
def test_prompt_parts_hold_every_token_and_every_voice_frame_once(ids, size):
    parts = list(prompt_chunks(ids, size, 4095))
    assert [i for part, _ in parts for i in part] == ids
    places = [place for _, s in parts for place in range(s.start, s.stop)]
    assert places == list(range(ids.count(4095)))


@given(st.integers(0, 65_536), st.integers(1, 1024), st.integers(0, 65_536))
def test_no_part_attends_to_more_than_a_full_one_does_where_parts_begin_to_shrink(count, size, behind):
    parts = list(parts_of(count, size, behind))
    assert [part.start for part in parts] == [0, *(part.stop for part in parts)][: len(parts)]
    assert (parts[-1].stop if parts else 0) == count
    for part in parts:
        held = behind + part.start
        assert 1 <= part.stop - part.start <= size
        assert part.stop - part.start == 1 or (part.stop - part.start) * held <= size * FULL_PARTS
        assert held > FULL_PARTS or part.stop == min(count, part.start + size)


def test_sessions_that_nobody_steps_are_dropped():
    now = 0.0
    sessions = Sessions("a stage", clock=lambda: now)
    sessions.open(1, "one")
    now = IDLE_LIMIT_S - 1
    sessions.open(2, "two")
    now = IDLE_LIMIT_S
    assert sessions.get(1) == "one"
    now = 2 * IDLE_LIMIT_S - 0.5
    sessions.open(3, "three")
    assert len(sessions) == 2 and sessions.get(1) == "one"
    with pytest.raises(RequestError, match="a stage has no such session"):
        sessions.get(2)
    with pytest.raises(RequestError, match="needs a number as session id"):
        sessions.open("four", "four")  # Triton has ids of both kinds
    sessions.open(5, "five")
