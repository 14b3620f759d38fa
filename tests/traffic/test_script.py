"""Scripts: what is read as whose turn, and what is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import ScriptError
from harness.traffic.script import (
    Turn,
    count_speakers,
    cut_to_ticks,
    format_script,
    parse_script,
    read_script,
    speech_s,
    speech_ticks,
    validate_utf8,
)

REAL_SCRIPTS = Path(__file__).parents[3] / "shared" / "data" / "scripts"


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
        ("Speakers: a\nSpeaker 1 spoke.\nSpeaker a. Hm", [Turn(1, "Speakers: a Speaker 1 spoke. Speaker a. Hm")]),
        ("Speaker 1: a\nSpeaker1: b\nSPEAKER  2 : c", [Turn(1, "a"), Turn(1, "b"), Turn(2, "c")]),
        ("SPEAKER_00: a\nSPEAKER_01: b\n[SPEAKER_00]: c", [Turn(1, "a"), Turn(2, "b"), Turn(1, "c")]),
        ("SPEAKER_01: a\nSPEAKER_02: b", [Turn(1, "a"), Turn(2, "b")]),
        ("Speaker A: a\nSpeaker-2: b\n(speaker 3) c\nSpeaker #4: d", [Turn(k, "abcd"[k - 1]) for k in range(1, 5)]),
        ("**Speaker 1:** a\n**Speaker 2**: b\n__Speaker 1:__ c\n**[Speaker 2]:** d",
         [Turn(1, "a"), Turn(2, "b"), Turn(1, "c"), Turn(2, "d")]),
        ("- Speaker 1: a\n* **Speaker 2:** **b**\n3. Speaker 3: c", [Turn(1, "a"), Turn(2, "**b**"), Turn(3, "c")]),
        ("**Speaker 1: all of it**", [Turn(1, "all of it")]),
        ("[00:01:23] Speaker 1: a\n00:01:25.500 --> 00:01:30 Speaker 2: b\nSpeaker 1 (1:02): c\n1:03 - Speaker 2: d",
         [Turn(1, "a"), Turn(2, "b"), Turn(1, "c"), Turn(2, "d")]),
        ("Speaker 1  00:12\na\n\n## Speaker 2\nb", [Turn(1, "a"), Turn(2, "b")]),
        ("Speaker １：你好\nSpeaker 2：再见", [Turn(1, "你好"), Turn(2, "再见")]),
        ("Speaker 1: Speaker 2: I am quoted\nSpeaker 2: [SPEAKER_A] too",
         [Turn(1, "Speaker 2: I am quoted"), Turn(2, "[SPEAKER_A] too")]),
    ],
)  # fmt: skip
def test_turns_of_a_script(text, turns):
    assert parse_script(text) == turns


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (" \n\t\n\u200b", "empty"),
        ("Speaker \N{KELVIN SIGN}: a", "line 1: speaker \N{KELVIN SIGN} is outside 1 to 4"),
        ("Speaker \N{LATIN CAPITAL LETTER I WITH DOT ABOVE}: a", "line 1: speaker"),
        ("Speaker 1: a\nSpeaker 5: b", "line 2: speaker 5 is outside 1 to 4"),
        ("Speaker 0: a\nSpeaker 4: b", "line 2: speaker 4 is outside 0 to 3; use 'Speaker 0:' to 'Speaker 3:'"),
        ("Speaker -1: a", "line 1: speaker -1"),
        (f"Speaker {'9' * 5000}: a", "line 1: speaker 9"),
        ("[SPEAKER_E] a", "line 1: speaker 5"),
        ("a\n[SPEAKER_AB] a", r"line 2: there is no speaker \[SPEAKER_AB\]"),
        ("Host: a\nSpeaker 1: b", "line 1: text before the first speaker .this is not a marker"),
        ("Speaker 1: a\n\nSpeaker 2: \nSpeaker 1: b", "line 3: speaker 2 has no text"),
        ("Speaker 1:", "line 1: speaker 1 has no text"),
        ("\nA title\nSpeaker 1: a", "line 2: text before the first speaker"),
    ],
)
def test_what_cannot_be_spoken_is_refused_with_its_line(text, message):
    with pytest.raises(ScriptError, match=message):
        parse_script(text)


@pytest.mark.parametrize(
    ("text", "remarks"),
    [
        ("Speaker 1: a\nSpeaker 2: it is ten: no more\nand https://x.y is no name", []),
        ("just words", ["no line begins with a marker"]),
        ("Speaker 1: a\nSpeaker one: b\nSpeaker 2 - c", ["line 2: 'Speaker one' looks like", "line 3: 'Speaker 2'"]),
        ("Speaker 1: a\nhost: b\nhost: c", ["line 2: 'host'", "line 3: 'host'"]),
        ("Speaker 1: a\n说话人1：你好", ["line 2: '说话人1'"]),
        ("".join(f"P{k}: a\n" for k in range(5)),
         ["no line", "line 1: 'P0'", "line 2: 'P1'", "line 3: 'P2'", "2 more lines"]),
    ],
)  # fmt: skip
def test_what_looks_like_a_marker_and_is_none_is_named_with_its_line(text, remarks):
    found = read_script(text).remarks
    assert len(found) == len(remarks)
    assert all(one.startswith(remark) for one, remark in zip(found, remarks, strict=True))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("Speaker 1: " + "word " * 180, 60),
        ("Speaker 1: Yes.\nSpeaker 2: Yes.\n" * 50, 100 / 3),
        ("Speaker 1: " + "语音合成" * 45, 40),
        ("Speaker 1: " + "ひらがなとカタカナ" * 10, 20),
        ("Speaker 1: " + "안녕하세요 여러분 " * 9, 16),
        ("Speaker 1: " + "ภาษาไทยเขียนติดกัน" * 10, 15),
        ("Speaker 1: 我们用 AI 做 podcast。", 5 / 4.5 + 2 / 3 - 1 / 4.5),
        ("Speaker 1: यह एक छोटा वाक्य है", 5 / 3),
    ],
)
def test_about_how_long_a_text_takes_to_speak_in_any_script(text, seconds):
    assert speech_s(parse_script(text)) == pytest.approx(seconds, rel=0.05)


@given(st.text(st.sampled_from("ab c。，语音กขคงที่ 안ー'—1")).filter(str.strip), st.integers(1, 2000))
def test_a_cut_text_is_its_beginning_and_takes_the_time_asked_for(text, ticks):
    cut, whole = cut_to_ticks(text, ticks), speech_ticks(text)
    assert " ".join(text.split()).startswith(cut) or cut == text
    if ticks >= whole:
        assert speech_ticks(cut) == whole


def markers():
    """How programs write speaker 1 to 4, in one file."""
    number = ["Speaker {}:", "Speaker{} :", "SPEAKER_{}:", "**Speaker {}:**", "- speaker {}：", "[Speaker {}]",
              "[00:01:23] Speaker {}:", "Speaker {} (1:23):", "_Speaker {}_:", "<Speaker {}>",
              "3) Speaker {}:"]  # fmt: skip
    return st.sampled_from(number) | st.sampled_from(["[SPEAKER_{}]", "Speaker {}:", "[SPEAKER_{}]:"]).map("A".__add__)


SPEECH = st.lists(st.text("abZ.,?:é—", min_size=1, max_size=9), min_size=1, max_size=4).map(" ".join)


@given(st.lists(st.builds(Turn, st.integers(1, 4), SPEECH)))
def test_a_formatted_script_reads_back(turns):
    if turns:
        assert parse_script(format_script(turns)) == turns


@given(
    st.lists(
        st.tuples(markers(), st.builds(Turn, st.integers(1, 4), SPEECH.map("so {}".format))), min_size=1, max_size=8
    ),
    st.sampled_from(["\n", "\r\n", "\n\n", "\n   "]),
    st.booleans(),
)
def test_any_mixture_of_markers_reads_back(said, end, from_zero):
    """``from_zero``: numbers as diarising programs count them; letters always count from A."""

    def write(marker, speaker):
        if marker.startswith("A"):
            return marker[1:].format("ABCD"[speaker - 1])
        return marker.format(speaker - from_zero)

    zero_is_there = any(not marker.startswith("A") and turn.speaker == 1 for marker, turn in said)
    text = end.join(f"{write(marker, turn.speaker)} {turn.text}" for marker, turn in said)
    shift = 1 if from_zero and not zero_is_there else 0
    meant = [turn if marker.startswith("A") else Turn(turn.speaker - shift, turn.text) for marker, turn in said]
    assert parse_script(text) == meant
    turns = read_script(text).turns
    assert {turn.speaker for turn in turns} == set(range(1, count_speakers(meant) + 1))
    assert read_script(text).remarks == ()


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
    said = sum(len(turn.text.split()) for turn in read)
    assert (len(read), said, count_speakers(read)) == (turns, words, speakers)


@pytest.mark.skipif(not REAL_SCRIPTS.is_dir(), reason="no ../shared/data beside the repository")
@pytest.mark.parametrize(
    ("name", "turns", "speakers", "seconds"),
    [
        ("script_no_space", 2, 2, 2),
        ("script_markdown", 2, 2, 2),
        ("script_diarised", 2, 2, 2),
        ("script_mixed_markers", 3, 2, 3),
        ("script_chinese", 20, 2, 193),
    ],
)
def test_the_inputs_that_once_came_out_wrong(name, turns, speakers, seconds):
    content = (REAL_SCRIPTS.parent / "inputs" / f"{name}.txt").read_bytes()
    script = read_script(validate_utf8(content))
    assert (len(script.turns), count_speakers(script.turns), script.remarks) == (turns, speakers, ())
    assert speech_s(script.turns) == pytest.approx(seconds, rel=0.01)


@pytest.mark.skipif(not REAL_SCRIPTS.is_dir(), reason="no ../shared/data beside the repository")
def test_real_scripts_have_nothing_to_remark():
    for path in REAL_SCRIPTS.glob("*p_*.txt"):
        assert read_script(validate_utf8(path.read_bytes())).remarks == ()
