"""``harness speak``: what it sends, what it writes, what it says, and what it refuses before anything is sent."""

import wave

import pytest
from fake_triton import Timetable, serving

from harness import wire
from harness.cli.speak import Manner, speak_file
from harness.errors import InputError, RequestError, ServerError

NOWHERE = "127.0.0.1:9"


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "talk.txt"
    path.write_text("Speaker 1: Good morning to you.\nSpeaker 2: And to you.")
    return path


def spoken(script, timetable=None, wav=None, **manner):
    """(the sentence, the inputs that the server got)"""
    with serving(timetable or Timetable()) as fake:
        sentence = speak_file(fake.url, script, wav, Manner(**manner))
        return sentence, fake.requests[0]


def test_a_script_is_spoken_as_long_as_its_text_takes(script, tmp_path):
    sentence, sent = spoken(script, wav=tmp_path / "talk.wav")
    assert sent[wire.FRAMES] == [18] and sent[wire.SPEAKER_IDS] == [1, 2]  # 7 words at 180 a minute
    assert "2 speakers, 7 words, 18 of 18 frames (2.4 s of audio)" in sentence and "first audio after" in sentence
    with wave.open(str(tmp_path / "talk.wav")) as file:
        assert (file.getnframes(), file.getframerate()) == (18 * 3200, 24_000)


@pytest.mark.parametrize(
    ("text", "frames"),
    [
        ("Speaker 1: Yes.\nSpeaker 2: Yes.\n" * 50, 250),  # 100 words: markers are none
        ("Speaker 1：大家好，欢迎收听今天的节目。", 20),  # 12 characters at 4.5 a second
    ],
)
def test_markers_are_no_words_and_characters_without_spaces_are_counted(script, text, frames):
    script.write_text(text, encoding="utf-8")
    _, sent = spoken(script)
    assert sent[wire.FRAMES] == [frames]


def test_speakers_keep_the_voice_of_their_number_and_what_is_no_marker_is_said(script):
    script.write_text("SPEAKER 1: Hi.\nSpeaker3: Yes?\nHost: well.")
    sentence, sent = spoken(script)
    assert sent[wire.SPEAKER_IDS] == [1, 3] and "2 speakers, 4 words" in sentence
    assert sent[wire.TEXT_INPUT] == "Speaker 1: Hi.\nSpeaker 2: Yes? Host: well."
    assert "warning: talk.txt: line 3: 'Host' looks like a speaker" in sentence
    script.write_text("Just words.")
    assert "warning: talk.txt: no line begins with a marker" in spoken(script)[0]
    script.write_text("Speaker 9: Hi.")
    with pytest.raises(InputError, match="talk.txt: line 1: speaker 9 is outside 1 to 4"):
        speak_file(NOWHERE, script)


def test_what_is_not_asked_for_is_not_sent(script):
    _, sent = spoken(script, frames=3)
    assert not sent.keys() & {wire.UNTIL_END, wire.DIFFUSION_STEPS, wire.KEEP, wire.CARRY, wire.SAY}


def test_until_the_end_leaves_the_length_to_the_model(script):
    sentence, sent = spoken(script, until_end=True)
    assert wire.FRAMES not in sent and sent[wire.UNTIL_END] == [True]
    assert " 4 frames (" in sentence
    sentence, _ = spoken(script, Timetable(stop_after=2), until_end=True, frames=9)
    assert "2 of at most 9 frames" in sentence
    sentence, _ = spoken(script, Timetable(stop_after=0), until_end=True)
    assert " 0 frames (0.0 s of audio)" in sentence and "first audio" not in sentence


def test_steps_and_guidance_are_passed_on_and_emulation_is_said(script):
    sentence, sent = spoken(script, Timetable(emulated=True), frames=2, steps=5, guidance=2.0)
    assert (sent[wire.DIFFUSION_STEPS], sent[wire.GUIDANCE_SCALE]) == ([5], [2.0])
    assert "emulated" in sentence


def test_a_session_is_kept_in_a_file_and_sent_from_it(script, tmp_path):
    kept = tmp_path / "talk.npz"
    kept.write_bytes(b"an older one")
    sentence, sent = spoken(script, Timetable(carry=b"\0\1\2"), frames=2, keep=kept)
    assert sent[wire.KEEP] == [True] and f"kept in {kept}" in sentence
    assert kept.read_bytes() == b"\0\1\2" and sorted(tmp_path.iterdir()) == sorted([kept, script])
    _, sent = spoken(script, frames=2, resume=kept)
    assert sent[wire.CARRY] == [0, 1, 2] and wire.KEEP not in sent


def test_a_kept_file_stays_as_it_was_if_the_server_fails(script, tmp_path):
    kept = tmp_path / "talk.npz"
    kept.write_bytes(b"an older one")
    with pytest.raises(ServerError, match="out of memory"):
        spoken(script, Timetable(fail_after=1), frames=2, keep=kept)
    assert kept.read_bytes() == b"an older one"


@pytest.mark.parametrize(
    ("manner", "error", "message"),
    [
        *((dict(frames=n), RequestError, f"--frames {n} must lie in 1 to 40500") for n in (0, -2, 40_501, 3 * 10**9)),
        (dict(steps=0), RequestError, "--steps 0 must lie in 1 to 100"),
        (dict(steps=101), RequestError, "--steps 101"),
        (dict(guidance=-0.1), RequestError, "--guidance -0.1"),
        (dict(guidance=float("nan")), RequestError, "--guidance nan"),
    ],
)
def test_numbers_that_nothing_can_speak_need_no_server_to_be_refused(manner, error, message):
    with pytest.raises(error, match=message):
        Manner(**manner)


def test_files_are_looked_at_before_anything_is_spoken(script, tmp_path):
    with pytest.raises(InputError, match="--resume needs --frames .* or --until-end"):
        Manner(resume=tmp_path / "talk.npz")
    with pytest.raises(InputError, match="cannot read .*none.npz: No such file"):
        speak_file(NOWHERE, script, manner=Manner(1, resume=tmp_path / "none.npz"))
    for wav, keep in ((tmp_path / "no" / "a.wav", None), (None, tmp_path / "no" / "a.npz")):
        with pytest.raises(InputError, match="no such folder"):
            speak_file(NOWHERE, script, wav, Manner(1, keep=keep))
    for wav, keep in ((tmp_path, None), (None, tmp_path)):
        with pytest.raises(InputError, match="it is a folder"):
            speak_file(NOWHERE, script, wav, Manner(1, keep=keep))
