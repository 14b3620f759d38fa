"""The traffic mix: lengths, the steady state, scripts of the right size."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import InputError, ScriptError
from harness.traffic.mix import MIXES, Lengths, Mix, ScriptSource, TrafficClass, requests
from harness.traffic.script import count_speakers, parse_script, speech_s
from harness.wire import MAX_FRAMES

REAL_SCRIPTS = Path(__file__).parents[3] / "shared" / "data" / "scripts"


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def take(count, *arguments, **options):
    return list(itertools.islice(requests(*arguments, **options), count))


def test_lengths_are_given_in_seconds_and_kept_in_frames():
    assert Lengths.parse({"fixed": 10}).frames.tolist() == [75]
    uniform = Lengths.parse({"uniform": [4, 16]})
    assert (uniform.frames.min(), uniform.frames.max()) == (30, 120)
    assert uniform.mean_frames() == pytest.approx(75, rel=1e-3)


def test_a_lognormal_without_a_cut_has_its_closed_form_mean_and_median():
    lengths = Lengths.parse({"lognormal": {"median": 90, "sigma": 0.5}})
    assert lengths.mean_frames() == pytest.approx(7.5 * 90 * math.exp(0.5**2 / 2), rel=2e-3)
    assert np.median(lengths.frames) == pytest.approx(7.5 * 90, abs=1)


@given(median=st.floats(1, 5000), sigma=st.floats(0.01, 5), cut=st.floats(1, 5400), seed=st.integers(0, 99))
def test_a_lognormal_stays_below_its_cut_and_samples_have_its_mean(median, sigma, cut, seed):
    cut = max(median, cut)
    lengths = Lengths.parse({"lognormal": {"median": median, "sigma": sigma, "max": cut}})
    sample = lengths.sample(np.random.default_rng(seed), 4000)
    assert 1 <= sample.min() and sample.max() <= min(round(cut * 7.5), MAX_FRAMES)
    assert abs(sample.mean() - lengths.mean_frames()) <= 6 * lengths.frames.std() / math.sqrt(4000) + 1e-9


def test_empirical_lengths_are_those_of_the_file(tmp_path):
    (tmp_path / "lengths.csv").write_text("id,seconds\na,2\nb,4\nc,5400\n")
    assert Lengths.parse({"empirical": "lengths.csv"}, tmp_path).frames.tolist() == [15, 30, MAX_FRAMES]
    (tmp_path / "bare.csv").write_text("2\n4\n")
    assert Lengths.parse({"empirical": "bare.csv"}, tmp_path).frames.tolist() == [15, 30]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"fixt": 1}, "one of fixed, uniform"),
        ({"fixed": 1, "uniform": [1, 2]}, "one of"),
        ({"fixed": 0}, "above 0"),
        ({"fixed": 5401}, "at most 5400"),
        ({"fixed": "10"}, "'10' must be seconds"),
        ({"fixed": math.nan}, "nan must be seconds"),
        ({"uniform": [3]}, r"\[lowest, highest\]"),
        ({"uniform": [5, 4]}, "above the highest"),
        ({"lognormal": {"median": 1}}, "median, sigma"),
        ({"lognormal": {"median": 1, "sigma": 0}}, "sigma 0 must be above 0"),
        ({"lognormal": {"median": 9, "sigma": 1, "max": 8}}, "below the median"),
        ({"empirical": "none.csv"}, "none.csv: cannot be read"),
        (10, "not 10"),
    ],
)
def test_impossible_lengths_are_refused(spec, message):
    with pytest.raises(InputError, match=message):
        Lengths.parse(spec)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("seconds\n", "no rows"),
        ("1\nx\n", "line 2: 'x' is no length in seconds"),
        ("1\n-2\n", "line 2: -2 must be seconds above 0"),
        ("1\nnan\n", "line 2"),
        (
            "seconds\n60\n5400.1\n",
            "line 3: 5400.1 must be .* at most 5400 .*: convert minutes and milliseconds to seconds",
        ),
        ("minutes\n3\n", "line 1: the column 'minutes' seems to hold minutes: convert it to seconds"),
        ("duration_ms\n900\n", "line 1: the column 'duration_ms' seems to hold ms"),
        ("id,length\n1,10\n", "line 1: none of 2 columns is named seconds; the first row is 'id, length'"),
    ],
)
def test_an_empirical_file_without_lengths_is_refused_by_its_line(content, message, tmp_path):
    (tmp_path / "bad.csv").write_text(content)
    with pytest.raises(InputError, match=f"bad.csv: .*{message}"):
        Lengths.parse({"empirical": "bad.csv"}, tmp_path)


def test_empirical_lengths_name_their_column_in_any_case(tmp_path):
    """Read as the first column, it would be a sizing ten times too small."""
    (tmp_path / "lengths.csv").write_text("\ufefftalk; SECONDS \r\n1;10,5\r\n2;20\r\n3;30\r\n", encoding="utf-8")
    lengths = Lengths.parse({"empirical": "lengths.csv"}, tmp_path)
    assert (lengths.frames / 7.5).tolist() == pytest.approx([10.5, 20, 30], abs=0.07)


def test_classes_come_in_proportion_to_their_weights(rng):
    drawn = [MIXES["quick"].sample(rng) for _ in range(4000)]
    assert sum(each.traffic_class == "short" for each in drawn) / 4000 == pytest.approx(0.7, abs=0.03)
    assert {each.speakers for each in drawn if each.traffic_class == "long"} == {2, 3, 4}
    mean = np.mean([each.frames for each in drawn])
    assert mean == pytest.approx(MIXES["quick"].mean_frames(), rel=0.06)


def test_the_mixed_mix_is_short_by_count_and_long_by_work():
    short, long = MIXES["mixed"].classes
    assert short.weight > 0.9 * (short.weight + long.weight)
    assert long.weight * long.length.mean_frames() > 0.9 * MIXES["mixed"].mean_frames()


def test_sessions_in_progress_are_biased_to_long_ones_and_uniform_in_phase(rng):
    mix = MIXES["quick"]
    found = [mix.sample_in_progress(rng) for _ in range(6000)]
    table = [(each.weight, each.length.frames.astype(float)) for each in mix.classes]
    second_moment = sum(weight * np.mean(frames**2) for weight, frames in table)
    first_moment = sum(weight * frames.mean() for weight, frames in table)
    assert np.mean([each.frames for each in found]) == pytest.approx(second_moment / first_moment, rel=0.04)
    assert np.mean([each.phase / each.frames for each in found]) == pytest.approx(0.5, abs=0.02)
    assert all(0 <= each.phase < each.frames for each in found)


def test_requests_are_the_same_for_the_same_seed_and_have_ids_of_their_own(rng):
    one, same = (take(20, MIXES["quick"], np.random.default_rng(3), ScriptSource()) for _ in range(2))
    assert one == same
    source = ScriptSource()
    ids = [each.request_id for _ in range(3) for each in take(50, MIXES["quick"], rng, source)]
    assert len(set(ids)) == 150


def test_a_steady_request_speaks_the_rest_of_its_length(rng):
    for request in take(50, MIXES["ninety"], rng, ScriptSource(), steady=True):
        assert request.start_frame + request.frames == MAX_FRAMES
        assert request.frames >= 1 and request.start_frame >= 0
    assert all(each.start_frame == 0 for each in take(5, MIXES["ninety"], rng, ScriptSource()))


def words_of(turns):
    return sum(len(turn.text.split()) for turn in turns)


@settings(deadline=None, max_examples=50)
@given(frames=st.integers(1, 3000) | st.just(MAX_FRAMES), speakers=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_generated_script_has_the_words_and_speakers_asked_for(frames, speakers, seed):
    script, count = ScriptSource().script(np.random.default_rng(seed), frames, speakers)
    turns = parse_script(script)
    assert words_of(turns) == max(math.ceil(frames * 0.4), speakers)
    assert count == count_speakers(turns) == len({turn.speaker for turn in turns}) == speakers
    if speakers > 1:
        assert all(turn.speaker != after.speaker for turn, after in itertools.pairwise(turns))


def test_files_are_cut_or_repeated_and_their_speakers_win(rng, tmp_path):
    (tmp_path / "talk.txt").write_text("Speaker 1: one two three\nSpeaker 3: four five six seven")
    source = ScriptSource.from_folder(tmp_path)
    assert source.script(rng, 5, 4) == ("Speaker 1: one two", 1)
    script, speakers = source.script(rng, 25, 1)
    assert speakers == 2  # 1 and 3: nobody is speaker 2
    assert script.split("\n")[-2:] == ["Speaker 2: four five six seven", "Speaker 1: one two three"]


CHINESE = "大家好，欢迎收听今天的节目。我们要讨论的是人工智能在语音合成领域的最新进展，以及它对普通人生活的影响。"
JAPANESE = "みなさん、こんにちは。今日は音声合成の最新の進歩について話します。"
KOREAN = "여러분 안녕하세요. 오늘은 음성 합성의 최신 발전에 대해 이야기합니다."
THAI = "สวัสดีทุกคนยินดีต้อนรับสู่รายการของเราวันนี้เราจะพูดคุยเกี่ยวกับปัญญาประดิษฐ์"
MIXED = "今天我们用 VibeVoice 做一个 podcast，大家听听看。"


@pytest.mark.parametrize("text", [CHINESE, JAPANESE, KOREAN, THAI, MIXED])
@pytest.mark.parametrize("seconds", [10, 600, 1800])
def test_scripts_without_spaces_are_fitted_to_the_length_by_their_characters(rng, tmp_path, text, seconds):
    """Counted by spaces, 600 s of Chinese were a text of two hours."""
    (tmp_path / "talk.txt").write_text(f"Speaker 1: {text}\nSpeaker 2: {text}\n" * 10, encoding="utf-8")
    script, _ = ScriptSource.from_folder(tmp_path).script(rng, round(seconds * 7.5), 1)
    assert speech_s(parse_script(script)) == pytest.approx(seconds, abs=0.4)
    spoken = "".join(turn.text for turn in parse_script(script))
    assert 2 * seconds < len(spoken) < 16 * seconds


def test_a_class_can_speak_its_scripts_whole(rng, tmp_path):
    (tmp_path / "short.txt").write_text("Speaker 1: one two three")
    (tmp_path / "long.txt").write_text("Speaker 1: " + "word " * 60 + "\nSpeaker 2: yes")
    source = ScriptSource.from_folder(tmp_path)
    mix = Mix("own", (TrafficClass("all", 1.0, Lengths.parse("from_script")),))
    with pytest.raises(InputError, match="from_script needs real scripts"):
        mix.mean_frames()
    with pytest.raises(InputError, match="from_script needs real scripts"):
        mix.of_scripts(ScriptSource())
    mix = mix.of_scripts(source)
    assert mix.mean_frames() == (8 + 152) / 2
    for request in [*take(20, mix, rng, source), *take(20, mix, rng, source, steady=True)]:
        expected = {8: ("Speaker 1: one two three", 1), 152: (source.whole(rng, 152)[0], 2)}
        assert (request.script, len(request.speaker_ids)) == expected[request.start_frame + request.frames]


def test_a_script_longer_than_a_request_cannot_be_spoken_whole(tmp_path):
    (tmp_path / "long.txt").write_text("word " * 16_300)
    with pytest.raises(ScriptError, match=f"{tmp_path}: a script takes about 91 minutes .* at most 90: cut it"):
        ScriptSource.from_folder(tmp_path).lengths  # noqa: B018


def test_what_the_writer_of_a_script_may_not_have_meant_is_named_with_its_file(tmp_path):
    (tmp_path / "a.txt").write_text("Speaker 1: fine")
    (tmp_path / "b.txt").write_text("Alice: hello\nBob: hello")
    (tmp_path / "._b.txt").write_bytes(b"\0\xff")  # macOS leaves these on other disks
    remarks = ScriptSource.from_folder(tmp_path).remarks
    assert remarks[0] == (
        f"{tmp_path}/b.txt: no line begins with a marker such as 'Speaker 1:': all of it is spoken by one speaker"
    )
    assert remarks[1].startswith(f"{tmp_path}/b.txt: line 1: 'Alice' looks like a speaker") and len(remarks) == 3


def test_a_folder_without_usable_scripts_is_refused(tmp_path):
    with pytest.raises(ScriptError, match="no .txt file"):
        ScriptSource.from_folder(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"Speaker 1: \xff")
    with pytest.raises(ScriptError, match="bad.txt: .*not UTF-8"):
        ScriptSource.from_folder(tmp_path)
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(InputError, match="a.txt: cannot be read: it is a folder"):
        ScriptSource.from_folder(tmp_path)


def test_a_request_names_a_voice_for_each_speaker_of_its_script(rng):
    mix = Mix("one", MIXES["quick"].classes, chunk_frames=3, voices=(4, 5))
    for request in take(30, mix, rng, ScriptSource()):
        assert len(request.speaker_ids) == count_speakers(parse_script(request.script))
        assert set(request.speaker_ids) <= {4, 5} and request.chunk_frames == 3


@pytest.mark.parametrize(
    ("weight", "speakers"), [(0, (1, 1)), (math.inf, (1, 1)), (1, (0, 1)), (1, (3, 2)), (1, (1, 5))]
)
def test_an_impossible_class_is_refused(weight, speakers):
    with pytest.raises(InputError, match="class odd"):
        TrafficClass("odd", weight, Lengths.parse({"fixed": 1}), speakers)


@pytest.mark.skipif(not REAL_SCRIPTS.is_dir(), reason="no ../shared/data beside the repository")
@pytest.mark.parametrize("frames", [30, 4000, MAX_FRAMES])
def test_real_scripts_give_any_length(rng, frames):
    source = ScriptSource.from_folder(REAL_SCRIPTS)
    for _ in range(10):
        script, speakers = source.script(rng, frames, 1)
        turns = parse_script(script)
        assert (words_of(turns), count_speakers(turns)) == (math.ceil(frames * 0.4), speakers)
