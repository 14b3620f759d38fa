"""Texts and voices as prompts, what is refused, and the table of open sessions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import wire
from harness.errors import InputError, RequestError, ScriptError
from harness.vibevoice.presets import preset_config
from harness.vibevoice.prompt import PromptBuilder, prompt_chunks
from harness.vibevoice.sessions import IDLE_LIMIT_S, Sessions
from harness.vibevoice.tokenizer import tokenizer_for
from harness.vibevoice.voices import frames_of, load_voices


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
        (b"word " * 70_000, [1], {wire.FRAMES: 10}, RequestError, "65536"),
    ],
)
def test_what_cannot_be_spoken_is_refused_with_its_reason(prompts, text, speakers, options, error, message):
    with pytest.raises(error, match=message):
        prompts.request(text, speakers, options)


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
    with pytest.raises(RequestError, match="a stage has no session 2"):
        sessions.get(2)


def test_voices_come_from_a_folder_of_wav_files(tmp_path):
    import wave

    for name, rate in (("b.wav", 24_000), ("a.wav", 24_000)):
        with wave.open(str(tmp_path / name), "wb") as file:
            file.setparams((1, 2, rate, 0, "NONE", ""))
            file.writeframes(np.full(100 if name == "a.wav" else 200, 16_384, "<i2").tobytes())
    voices = load_voices(str(tmp_path))
    assert {voice: len(samples) for voice, samples in voices.items()} == {1: 100, 2: 200}
    assert voices[1][0] == pytest.approx(0.5)
    with pytest.raises(InputError, match="no .wav"):
        load_voices(str(tmp_path / "none"))
