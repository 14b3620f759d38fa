"""Speech is heard while it is made: every sample once, in order, and stalls are counted."""

import json
import threading

import pytest
from fake_studio import FRAME_BYTES, tone
from studio_tab import fnv1a, played, until_played, write

pytest_plugins = ["studio_fixtures"]

FOUR = "Speaker 1: one\nSpeaker 2: two\nSpeaker 3: three\nSpeaker 4: four"


def test_the_samples_that_are_played_are_those_that_the_server_sent(tab, studio, tmp_path):
    sent = tone(1.5) + tone(1.0, 330.0)
    pieces = [sent[at : at + 4_801] for at in range(0, len(sent), 4_801)]  # apart, and within samples
    later = len(pieces) * 3 // 5  # what is heard first is there at once: a busy host makes no stall
    studio.speech = [step for k, piece in enumerate(pieces) for step in (piece, 0.02 * (k >= later))]
    write(tab, FOUR)
    tab.locator("#speak").click()
    heard = until_played(tab, "ended")
    assert (heard["played"], heard["digest"]) == (len(sent) // 2, fnv1a(sent))
    assert heard["stalls"] == 0 and heard["stalled"] == 0
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Save as WAV").click()
    assert download.value.suggested_filename == "one.wav"
    download.value.save_as(tmp_path / "one.wav")
    assert (tmp_path / "one.wav").read_bytes()[44:] == sent


def test_four_speakers_have_the_voices_that_were_chosen(tab, studio):
    write(tab, FOUR)
    tab.get_by_label("Speaker 2", exact=True).select_option("Maya")
    tab.locator("#speak").click()
    until_played(tab, "ended")
    assert studio.spoken == [{"input": FOUR, "voices": [1, 4, 3, 4], "response_format": "pcm", "stream": True}]
    tab.reload()
    tab.locator("#voice-2 option").first.wait_for(state="attached")
    assert tab.locator("#voice-2").input_value() == "4" and tab.locator("#script").input_value() == FOUR


def test_only_the_speakers_of_the_script_have_a_voice(tab, studio):
    write(tab, "Speaker 2: a\nSpeaker 4: b")
    assert [tab.locator(f"#voice-{k}").is_visible() for k in (1, 2, 3, 4)] == [False, True, False, True]
    tab.locator("#speak").click()
    until_played(tab, "ended")
    assert studio.spoken[0]["voices"] == [2, 4]


def test_a_stall_is_shown_and_counted_once_and_loses_no_sample(tab, studio):
    more = threading.Event()
    first, second = tone(0.7), tone(0.8, 330.0)
    studio.speech = [first, more, second]
    write(tab, "Speaker 1: one")
    tab.locator("#speak").click()
    stalled = until_played(tab, "stalled")
    assert (stalled["played"], stalled["digest"]) == (len(first) // 2, fnv1a(first))
    tab.get_by_text("Waiting for more").first.wait_for()
    more.set()
    heard = until_played(tab, "ended")
    assert heard["stalls"] == 1 and heard["stalled"] > 0
    assert (heard["played"], heard["digest"]) == ((len(first) + len(second)) // 2, fnv1a(first + second))
    assert tab.locator("#stalls").inner_text().startswith("1 (")


def test_silence_after_the_last_sample_is_no_stall(tab, studio):
    studio.speech = [tone(0.6), 1.0]
    write(tab, "Speaker 1: one")
    tab.locator("#speak").click()
    assert until_played(tab, "ended")["stalls"] == 0


def test_stop_ends_sound_and_request(tab, studio):
    held = threading.Event()
    studio.speech = [tone(5.0), *([0.05, tone(0.01)] * 200), held]
    write(tab, "Speaker 1: one")
    tab.locator("#speak").click()
    until_played(tab, "playing")
    tab.get_by_role("button", name="Stop").click()
    assert tab.locator("#player-state").inner_text() == "Stopped"
    for _ in range(600):
        if "closed" in studio.calls:
            break
        tab.wait_for_timeout(100)
    held.set()
    assert "closed" in studio.calls
    count = played(tab)["played"]
    tab.wait_for_timeout(400)
    assert played(tab)["played"] == count < 5 * 24_000
    tab.get_by_role("button", name="Close").click()
    assert tab.locator("#player").is_hidden() and tab.evaluate("document.activeElement.id") == "speak"


def test_a_second_speech_takes_the_place_of_the_first(tab, studio):
    studio.speech = [tone(20.0)]
    write(tab, "Speaker 1: one")
    tab.locator("#speak").click()
    until_played(tab, "playing")
    studio.speech = [tone(0.5)]
    tab.locator("#script").press("Control+Enter")
    tab.wait_for_function("() => window.studio.played.state === 'ended' && window.studio.played.played === 12000")
    assert played(tab)["played"] == 12_000 and studio.speech == [tone(0.5)]


@pytest.mark.parametrize(
    ("status", "detail", "shown"),
    [
        (429, "You speak too often.", "You speak too often."),
        (503, "All GPUs are busy.", "All GPUs are busy."),
        (500, None, "The service failed (500)."),
        (422, [{"loc": ["body", "voices"], "msg": "no voice 'x'"}], "no voice 'x'"),
    ],
)
def test_a_refusal_is_said_in_words_and_leaves_no_player(tab, studio, status, detail, shown):
    studio.refusals = {"POST v1/audio/speech": (status, detail)}
    write(tab, "Speaker 1: one")
    tab.locator("#speak").click()
    tab.get_by_role("alert").filter(has_text=shown).wait_for()
    assert tab.locator("#player").is_hidden()


def test_a_sample_of_a_voice_is_played_and_can_be_stopped(tab, studio):
    button = tab.locator("#voice-rows button").first
    assert button.get_attribute("aria-label") == "Sample of Alice, for speaker 1"
    button.click()
    tab.get_by_role("button", name="Stop the sample").wait_for()
    tab.get_by_role("button", name="Sample of Alice").wait_for()  # it has ended
    assert studio.calls.count("GET v1/voices/1/sample") == 1
    button.click()
    tab.get_by_role("button", name="Stop the sample").click()
    tab.get_by_role("button", name="Sample of Alice").wait_for()


def test_a_voice_is_added_from_a_wav_and_nothing_else_is_sent(tab, studio):
    wrong = {"name": "song<b>.mp3", "mimeType": "audio/mpeg", "buffer": b"ID3 not a wave"}
    tab.locator("#voice-file").set_input_files(wrong)
    assert "song<b>.mp3 is not a WAV file" in tab.get_by_role("alert").filter(has_text="WAV").inner_text()
    good = {"name": "Nora.wav", "mimeType": "audio/wav", "buffer": b"RIFF\0\0\0\0WAVEfmt "}
    tab.locator("#voice-file").set_input_files(good)
    tab.get_by_text("Nora is added. Choose it for a speaker.").wait_for()
    tab.get_by_label("Speaker 1", exact=True).select_option("Nora")
    assert studio.calls.count("POST v1/voices") == 1
    studio.refusals = {"POST v1/voices": (413, "A voice has at most 20 MB.")}
    tab.locator("#voice-file").set_input_files(good)
    tab.get_by_text("Nora.wav was not added. A voice has at most 20 MB.").wait_for()


def test_a_service_without_voices_is_asked_for_none(tab, studio):
    studio.voices = []
    tab.reload()
    tab.get_by_text("The service has no voices yet").wait_for()
    write(tab, "Speaker 1: one")
    tab.locator("#speak").click()
    until_played(tab, "ended")
    assert json.loads(json.dumps(studio.spoken[0]))["voices"] is None


def test_a_recording_is_heard_while_it_is_made(tab, studio):
    task = studio.add({"voices": [1]}, of_frames=15, title="Long")["id"]
    studio.run(task, 6)
    tab.reload()
    tab.get_by_role("button", name="Listen: Long").click()
    until_played(tab, "stalled")
    assert played(tab)["played"] == 6 * FRAME_BYTES // 2
    studio.finish(task)
    heard = until_played(tab, "ended")
    whole = studio.audio[task]
    assert (heard["played"], heard["digest"], heard["stalls"]) == (len(whole) // 2, fnv1a(whole), 1)
