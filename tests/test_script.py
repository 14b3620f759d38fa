"""Scripts: what is read as whose turn, and what is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import ScriptError
from harness.script import Turn, count_speakers, count_words, format_script, parse_script, validate_utf8

REAL_SCRIPTS = Path(__file__).parents[2] / "shared" / "data" / "scripts"


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("Speaker 1: Hello.\nSpeaker 2: Hi!", [Turn(1, "Hello."), Turn(2, "Hi!")]),
        ("[SPEAKER_A] Hello.\n[speaker_d]: Hi!", [Turn(1, "Hello."), Turn(4, "Hi!")]),
        ("just words", [Turn(1, "just words")]),
        ("two\n\n  lines ", [Turn(1, "two lines")]),
        ("Speaker 2: one\ntwo\r\n\r\nSpeaker 2: three", [Turn(2, "one two"), Turn(2, "three")]),
        ("Speaker 3:\nbelow the marker", [Turn(3, "below the marker")]),
        ("\ufeff  speaker 1 : now: then", [Turn(1, "now: then")]),
        ("Speaker 1：你好", [Turn(1, "你好")]),
        ("Speaker notes: are text", [Turn(1, "Speaker notes: are text")]),
    ],
)
def test_turns_of_a_script(text, turns):
    assert parse_script(text) == turns


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (" \n\t\n\u200b", "empty"),
        ("Speaker 1: a\nSpeaker 5: b", "line 2: speaker 5 is outside 1 to 4"),
        ("Speaker 0: a", "line 1: speaker 0"),
        ("Speaker -1: a", "line 1: speaker -1"),
        (f"Speaker {'9' * 5000}: a", "line 1: speaker 9"),
        ("[SPEAKER_E] a", "line 1: speaker 5"),
        ("a\n[SPEAKER_1] a", r"line 2: no speaker is \[SPEAKER_1\]"),
        ("Speaker 1: a\n\nSpeaker 2: \nSpeaker 1: b", "line 3: speaker 2 has no text"),
        ("Speaker 1:", "line 1: speaker 1 has no text"),
        ("\nA title\nSpeaker 1: a", "line 2: text before the first speaker"),
    ],
)
def test_what_cannot_be_spoken_is_refused_with_its_line(text, message):
    with pytest.raises(ScriptError, match=message):
        parse_script(text)


SPEECH = st.lists(st.text("abZ.,?:é—", min_size=1, max_size=9), min_size=1, max_size=4).map(" ".join)


@given(st.lists(st.builds(Turn, st.integers(1, 4), SPEECH)))
def test_a_formatted_script_reads_back(turns):
    if turns:
        assert parse_script(format_script(turns)) == turns
        assert count_words(turns) == len(" ".join(turn.text for turn in turns).split())


@given(st.text(st.sampled_from("Speakr 1234:[]_ABE\n\r\u2028 x"), max_size=60) | st.text())
def test_any_text_is_either_turns_or_a_script_error(text):
    try:
        turns = parse_script(text)
    except ScriptError:
        return
    assert turns and all(1 <= turn.speaker <= 4 and turn.text.strip() for turn in turns)


@given(st.binary())
def test_any_bytes_are_either_text_or_a_script_error(data):
    try:
        assert validate_utf8(data).encode() == data.removeprefix("\ufeff".encode())
    except ScriptError as error:
        assert "offset" in str(error)


@pytest.mark.skipif(not REAL_SCRIPTS.is_dir(), reason="no ../shared/data beside the repository")
@pytest.mark.parametrize(
    ("name", "turns", "words", "speakers"),
    [
        ("1p_abs", 2, 142, 1),
        ("2p_short", 2, 34, 2),
        ("2p_goat", 22, 578, 2),
        ("3p_gpt5", 47, 2111, 3),
        ("4p_climate_45min", 211, 9458, 4),
    ],
)
def test_real_scripts_have_the_turns_and_words_that_their_source_states(name, turns, words, speakers):
    read = parse_script(validate_utf8((REAL_SCRIPTS / f"{name}.txt").read_bytes()))
    assert (len(read), count_words(read), count_speakers(read)) == (turns, words, speakers)
