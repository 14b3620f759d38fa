"""A folder of voices: which files are, in which order, in which formats, and what is refused."""

import subprocess
import sys
import wave

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.vibevoice_acoustic_tokenizer.feature_extraction_vibevoice_acoustic_tokenizer import (
    VibeVoiceAcousticTokenizerFeatureExtractor,
)

from harness.errors import InputError
from harness.traffic.voice_folder import BUILT_IN, count_voices, read_voice, voice_files
from harness.vibevoice.entry.voices import load_voices


def tone(rate_hz, seconds=1.0, pitch_hz=440):
    return 0.3 * np.sin(2 * np.pi * pitch_hz * np.arange(round(rate_hz * seconds)) / rate_hz).astype(np.float32)


@pytest.mark.parametrize("loudness, sharp", [(0.9, 1), (0.001, 1), (0.3, 4000), (0.0, 1)])
def test_voices_are_as_loud_as_the_released_feature_extractor_makes_them(tmp_path, loudness, sharp):
    """A sharp sample has its sound in a few peaks, which -25 dB would lift beyond full scale."""
    sound = np.zeros(24_000, "<i2")
    sound[::sharp] = loudness * 32_767 * np.sin(np.arange(0, 24_000, sharp) / 7 + 1)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 24_000, 0, "NONE", ""))
        file.writeframes(sound.tobytes())
    released = VibeVoiceAcousticTokenizerFeatureExtractor()
    expected = released([sound.astype(np.float32) / 32_768], sampling_rate=24_000)
    samples = expected["input_values"].flatten()[:24_000].numpy()
    np.testing.assert_allclose(load_voices(str(tmp_path))[1], samples, atol=1e-6)


def test_voices_come_from_a_folder_of_wav_files(tmp_path):
    for name, rate in (("b.wav", 24_000), ("a.wav", 24_000)):
        with wave.open(str(tmp_path / name), "wb") as file:
            file.setparams((1, 2, rate, 0, "NONE", ""))
            file.writeframes(np.full(100 if name == "a.wav" else 200, 16_384, "<i2").tobytes())
    voices = load_voices(str(tmp_path))
    assert {voice: len(samples) for voice, samples in voices.items()} == {1: 100, 2: 200}
    assert voices[1][0] == pytest.approx(10 ** (-25 / 20), rel=1e-4)  # of constant value: its RMS
    with wave.open(str(tmp_path / "c.wav"), "wb") as file:
        file.setparams((1, 2, 24_000, 0, "NONE", ""))
    with pytest.raises(InputError, match="c.wav holds no sound"):
        load_voices(str(tmp_path))
    with pytest.raises(InputError, match="none: no such folder"):
        load_voices(str(tmp_path / "none"))
    with pytest.raises(InputError, match="a.wav: it is a file; give a folder"):
        load_voices(str(tmp_path / "a.wav"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no voice"):
        load_voices(str(tmp_path / "empty"))


@settings(max_examples=300)
@given(cut=st.integers(0, 144), spoiled=st.dictionaries(st.integers(0, 47), st.integers(0, 255), max_size=4))
def test_whatever_lies_in_a_voice_file_is_a_voice_or_refused(tmp_path_factory, cut, spoiled):
    folder = tmp_path_factory.mktemp("voices")
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((1, 2, 24_000, 0, "NONE", ""))
        file.writeframes(np.full(50, 100, "<i2").tobytes())
    content = bytearray((folder / "a.wav").read_bytes())
    for place, byte in spoiled.items():
        content[place] = byte
    (folder / "a.wav").write_bytes(content[:cut])
    try:
        assert len(load_voices(str(folder))[1]) > 0
    except InputError as error:
        assert "a.wav" in str(error)


def test_a_folder_that_is_named_as_a_voice_is_refused(tmp_path):
    (tmp_path / "a.wav").mkdir()
    with pytest.raises(InputError, match="a.wav is not a readable sound file .it is a folder"):
        load_voices(str(tmp_path))


def test_voices_are_numbered_as_people_count_and_droppings_are_none(tmp_path):
    for name in ("voice10.wav", "voice2.WAV", "Voice1.flac", "voice1b.ogg", "notes.txt", "._voice2.WAV", ".DS_Store"):
        if name.endswith((".txt", ".DS_Store")) or name.startswith("._"):
            (tmp_path / name).write_bytes(b"\0\5\x16\7")
        else:
            with soundfile.SoundFile(tmp_path / name, "w", 24_000, 1) as file:
                file.write(tone(24_000))
    names = [path.name for path in voice_files(str(tmp_path))]
    assert names == ["Voice1.flac", "voice1b.ogg", "voice2.WAV", "voice10.wav"]
    assert count_voices(str(tmp_path)) == 4 and len(load_voices(str(tmp_path))) == 4
    assert count_voices("") == BUILT_IN == len(load_voices())


@pytest.mark.parametrize(
    ("ending", "kind", "rate_hz", "channels"),
    [
        ("wav", "PCM_16", 24_000, 1),
        ("wav", "PCM_24", 48_000, 2),
        ("wav", "FLOAT", 22_050, 1),
        ("wav", "ULAW", 8_000, 1),
        ("flac", "PCM_24", 44_100, 2),
        ("ogg", "VORBIS", 16_000, 1),
        ("ogg", "OPUS", 48_000, 1),
        ("mp3", None, 44_100, 1),
        ("aiff", "PCM_16", 96_000, 1),
        ("au", "PCM_16", 11_025, 1),
    ],
)
def test_every_format_becomes_24_khz_mono_with_the_same_pitch(tmp_path, capfd, ending, kind, rate_hz, channels):
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, np.stack([tone(rate_hz)] * channels, axis=1), rate_hz, subtype=kind)
    samples, note = read_voice(path)
    assert samples.dtype == np.float32 and samples.ndim == 1 and len(samples) == pytest.approx(24_000, rel=0.1)
    spectrum = np.abs(np.fft.rfft(samples))
    assert np.argmax(spectrum) * 24_000 / len(samples) == pytest.approx(440, abs=3)
    changed = [f"resampled from {rate_hz} Hz"] * (rate_hz != 24_000) + ["2 channels were mixed"] * (channels == 2)
    assert bool(note) == bool(changed) and all(change in note for change in changed)
    load_voices(str(tmp_path))
    assert capfd.readouterr().out == (f"voice 1: {note}\n" if note else "")


def test_the_usual_format_is_taken_bit_by_bit(tmp_path):
    sound = np.arange(-32_768, 32_767, 7, dtype="<i2")
    soundfile.write(tmp_path / "a.wav", sound, 24_000)
    assert np.array_equal(read_voice(tmp_path / "a.wav")[0], sound.astype(np.float32) / 32_768)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.wav", b"", "a.wav is not a readable sound file"),
        ("a.mp3", b"no music", "a.mp3 is not a readable sound file"),
        ("a.m4a", b"\0", "a.m4a has a format that cannot be read: convert it to .wav"),
    ],
)
def test_a_broken_voice_is_named_in_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        load_voices(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_a_sample_that_is_no_voice_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(100, np.nan), 24_000, subtype="FLOAT")
    with pytest.raises(InputError, match="a.wav contains samples that are not numbers"):
        load_voices(str(tmp_path))
    soundfile.write(tmp_path / "a.wav", np.zeros(8000 * 601), 8000)
    with pytest.raises(InputError, match="a.wav lasts 60. s: use a sample of 9 to 30 s"):
        load_voices(str(tmp_path))


def test_a_process_without_voices_loads_no_library_for_them():
    code = "from harness.vibevoice.entry.voices import load_voices; load_voices(); import sys; "
    code += "print('soundfile' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
