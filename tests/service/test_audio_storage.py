"""Where audio is kept, in which form, and what is read of strangers' files."""

import io
import struct
import wave

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from harness import wire
from harness.errors import InputError
from harness.service.audio import encode, to_pcm, wav_header
from harness.service.storage import AudioStore
from harness.service.task import StoredSegment, TaskRecord, TaskSpec
from harness.service.voices import ALL, VoiceBank, lay_out
from harness.service.wav_reading import read_wav, wav_of


@pytest.fixture(params=["folder", "memory"])
def store(request, tmp_path):
    return AudioStore(str(tmp_path / "audio") if request.param == "folder" else f"memory://{tmp_path.name}")


def test_objects_are_written_read_in_parts_and_removed(store):
    content = bytes(range(256)) * 9000  # more than two pieces
    store.write("task1", "00000-1.pcm", content)
    store.write("task1", "00001-2.pcm", b"rest")
    store.write("task2", "00000-1.pcm", b"other")
    assert store.read("task1", "00000-1.pcm", 5, 9) == content[5:9]
    assert b"".join(store.pieces("task1", [("00000-1.pcm", len(content)), ("00001-2.pcm", 4)])) == content + b"rest"
    store.keep_only("task1", ["00000-1.pcm"])
    assert store.names("task1") == ["00000-1.pcm"]
    store.remove("task1")
    store.remove("task1")
    assert store.names("task1") == [] and store.names("task2") == ["00000-1.pcm"]
    with pytest.raises(FileNotFoundError):
        store.read("task1", "00000-1.pcm")


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".x", "", "a\0b", "x" * 200, "\\x"])
def test_no_name_leads_out_of_its_folder(store, name):
    for asked in ((name, "a"), ("a", name)):
        with pytest.raises(ValueError, match="no name"):
            store.read(*asked)


def test_a_storage_that_is_not_known_is_refused():
    with pytest.raises(InputError, match="nonsense://x cannot be used"):
        AudioStore("nonsense://x")


def test_the_header_is_that_of_a_wav():
    pcm = to_pcm(np.linspace(-1.5, 1.5, 3200).astype("<f4").tobytes())
    with wave.open(io.BytesIO(wav_header(len(pcm)) + pcm)) as heard:
        assert heard.getparams()[:4] == (1, 2, 24_000, 3200)
    samples = np.frombuffer(pcm, "<i2")
    assert samples[0] == -32767 and samples[-1] == 32767


@pytest.mark.parametrize("kind", ["flac", "opus"])
def test_an_hour_is_encoded_in_pieces(tmp_path, kind):
    pieces = [to_pcm(np.zeros(240_000, "<f4").tobytes())] * 6
    encode(kind, iter(pieces), tmp_path / "out")
    assert soundfile.info(tmp_path / "out").frames == 6 * 240_000


def record(**more):
    spec = TaskSpec(script="Speaker 1: a b", voices=(1,), frames=75, estimate=75, **more.pop("spec", {}))
    return TaskRecord(**{"id": "a", "owner": "me", "spec": spec, "status": "running", **more})


def test_a_view_has_the_figures_of_its_segments():
    view = record(segments=(StoredSegment("s", 30, 192_000),), busy_s=2.0, live=15).view()
    assert (view["frames"], view["of_frames"], view["seconds_of_audio"], view["rtf"]) == (45, 75, 4.0, 0.5)
    assert view["eta_s"] == 2.0, "30 frames of 4 s of audio at 0.5 s of work per second"
    assert record(status="queued").view(3, 1e9)["estimated_start"] == "2001-09-09T01:46:40.000Z"


def test_of_frames_of_a_text_that_ends_by_itself_is_an_estimate_until_it_has_ended():
    spec = dict(until_end=True)
    segments = (StoredSegment("s", 80, 1),)
    assert record(spec=spec).of_frames == 75 and record(spec=spec, segments=segments).of_frames == 80
    assert record(spec=spec, segments=(StoredSegment("s", 60, 1),), spoken=True).of_frames == 60


def test_a_spec_survives_its_record():
    spec = TaskSpec(script="Speaker 1: ä", voices=(1, 2), frames=3, estimate=4, webhook="http://x/", guidance=2.5)
    assert TaskSpec.of(spec.text()) == spec


def as_wav(samples, rate, subtype):
    data = io.BytesIO()
    soundfile.write(data, samples, rate, subtype, format="WAV")
    return data.getvalue()


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_uncompressed_wavs_of_every_kind_are_read(subtype):
    samples = 0.5 * np.sin(np.arange(48_000) / 30)
    heard = read_wav(as_wav(samples, 24_000, subtype), 60)
    assert heard.dtype == np.float32 and np.allclose(heard, samples, atol=0.01 if subtype == "PCM_U8" else 1e-4)


def test_a_voice_is_mixed_and_resampled():
    tone = np.sin(2 * np.pi * 440 * np.arange(44_100 * 2) / 44_100)
    heard = read_wav(as_wav(np.stack([tone, tone], 1), 44_100, "PCM_16"), 60)
    assert len(heard) == 48_000 and np.abs(np.fft.rfft(heard)).argmax() == 880


@given(st.binary(max_size=300))
def test_no_bytes_are_anything_but_a_voice_or_an_error_in_words(data):
    with pytest.raises(InputError):
        read_wav(data, 60)


@given(st.binary(min_size=16, max_size=40), st.binary(max_size=200), st.integers(0, 2**32 - 1))
def test_no_header_is_anything_but_a_voice_or_an_error_in_words(layout, content, size):
    head = b"RIFF\0\0\0\0WAVEfmt " + struct.pack("<I", len(layout)) + layout
    with pytest.raises(InputError):
        read_wav(head + b"data" + struct.pack("<I", size) + content, 60)


def test_what_the_studio_writes_is_read_exactly():
    samples = np.random.default_rng(0).uniform(-1, 1, 30_000).astype(np.float32)
    assert np.array_equal(read_wav(wav_of(samples), 60), samples)
    assert np.array_equal(soundfile.read(io.BytesIO(wav_of(samples)), dtype="float32")[0], samples)


def test_ids_of_voices_keep_their_meaning_when_some_are_added(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("zoe.wav", "10 anna.wav", "2 bert.wav"):
        soundfile.write(source / name, np.zeros(48_000), 24_000)
    folder = tmp_path / "voices"
    lay_out(folder, str(source))
    bank = VoiceBank(str(folder))
    before = bank.names("me")
    number = bank.add("me", "aaa.wav", wav_of(np.ones(48_000, np.float32)), 60)
    assert before == {1: "2 bert", 2: "10 anna", 3: "zoe"} and number == 4
    assert bank.names("me") == {**before, 4: "aaa"} and bank.names("you") == before == bank.names(ALL)
    lay_out(folder, str(source))
    assert bank.names("me")[4] == "aaa", "a second start keeps them"
    with pytest.raises(InputError, match="was made from the voices of"):
        lay_out(folder, "")


def test_voices_of_a_folder_that_is_not_the_studios_stay_as_they_are(tmp_path):
    soundfile.write(tmp_path / "0001.all.x.wav", np.zeros(48_000), 24_000)
    bank = VoiceBank(str(tmp_path))
    assert bank.names("me") == {1: "0001.all.x"} and not bank.may_grow
    with pytest.raises(InputError, match="fixed set"):
        bank.add("me", "n", b"", 60)


def test_without_a_folder_the_voices_are_the_built_in_ones():
    bank = VoiceBank("")
    assert list(bank.names("me")) == [1, 2, 3, 4] and bank.sample("me", 5) is None
    assert len(bank.sample("me", 1)) == 44 + 2 * 9 * wire.SAMPLE_RATE_HZ
