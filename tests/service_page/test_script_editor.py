"""What somebody writes: read as the server reads it, coloured, and with mistakes at their line. It stays text."""

import random
import re

import pytest
from studio_tab import lines_with, write

from harness.errors import ScriptError
from harness.traffic.script import parse_script, read_script, speech_s

pytest_plugins = ["studio_fixtures"]

READ = """async (texts) => {
  const { readScript } = await import("/script.js");
  return texts.map((text) => {
    const { lines, errors, remarks, seconds } = readScript(text);
    return { lines: lines.map((line) => line.speaker), errors: errors.map((error) => error.line),
      remarks: remarks.map((remark) => remark.line), seconds };
  });
}"""
MARKERS = (
    "Speaker 1:", "Speaker 2: ", "speaker3:", "Speaker 4 :", "Speaker 5:", "Speaker 0:", "SPEAKER_01:", "Speaker A:",
    "[SPEAKER_B]", "[SPEAKER_Z]", "[Speaker 1]", "(speaker 2)", "**Speaker 1:**", "**Speaker 2**:", "- Speaker 3:",
    "1. Speaker 4:", "[00:01:23] Speaker 1:", "Speaker 2 (1:02):", "Speaker １：", "Speaker ٣:", "Speaker -1:",
    "Speaker 1234567890:", "[speaker_ab]", "Speaker notes:", "Speakers:", "Speaker 1 -", "Host:", "host:", "P3:",
    "Maria Silva:", "说话人1：", "Speaker 1", "__Speaker 2:__", "**Speaker 1: ", "<Speaker 2>",
    "00:01 --> 00:05 Speaker 1:",
)  # fmt: skip
TEXTS = (
    "Hello there.", "", "  ", "**bold**", "我们用 AI 做 podcast。", "ภาษาไทยเขียนติดกัน", "it is ten: no more",
    "안녕하세요 여러분", "यह एक छोटा वाक्य है", "ends in bold**", "\u200b", "Speaker 2: quoted", "\ttab", "https://x.y",
)  # fmt: skip
HOSTILE = "<img src=x onerror='window.hurt = 1'><script>window.hurt = 1</script><b>bold</b>"


def made_up_scripts(count: int) -> list[str]:
    dice = random.Random(20)

    def line() -> str:
        return dice.choice((dice.choice(MARKERS) + dice.choice((" ", "")) + dice.choice(TEXTS), dice.choice(TEXTS)))

    return [dice.choice(("\n", "\r\n", "\n\n")).join(line() for _ in range(dice.randint(1, 6))) for _ in range(count)]


def line_of(error: ScriptError) -> int:
    found = re.match(r"line (\d+):", str(error))
    return int(found[1]) if found else 1


def test_a_script_is_read_on_the_page_as_on_the_server(tab):
    scripts = made_up_scripts(3000)
    refused = 0
    for script, seen in zip(scripts, tab.evaluate(READ, scripts), strict=True):
        try:
            turns = parse_script(script)
        except ScriptError as error:
            refused += 1
            assert line_of(error) in seen["errors"], (script, str(error), seen)
            continue
        assert seen["errors"] == [], (script, seen)
        speakers = [speaker for speaker in seen["lines"] if speaker is not None]
        assert set(speakers) == {turn.speaker for turn in turns}, script
        assert seen["seconds"] == pytest.approx(speech_s(turns), rel=1e-9), script
        remarked = [int(found[1]) for each in read_script(script).remarks if (found := re.match(r"line (\d+)", each))]
        if not any(each.startswith("no line") for each in read_script(script).remarks):
            assert seen["remarks"][: len(remarked)] == remarked, script
    assert 300 < refused < 2700


def test_lines_have_the_colour_of_their_speaker(tab):
    write(tab, "Speaker 1: one\nstill one\nSpeaker 2: two\n[SPEAKER_C] three\nSpeaker 4: four")
    colours = tab.evaluate(
        "[...document.querySelectorAll('.line')].map((e) => getComputedStyle(e, '::after').backgroundColor)"
    )
    assert colours[0] == colours[1] and len(set(colours)) == 4
    markers = tab.locator(".marker").all_inner_texts()
    assert [marker.strip() for marker in markers] == ["Speaker 1:", "Speaker 2:", "[SPEAKER_C]", "Speaker 4:"]
    assert tab.locator("#script-facts").inner_text().startswith("4 speakers")


def test_each_mistake_is_shown_at_its_line_and_leads_to_it(tab):
    write(tab, "Speaker 1: a\nSpeaker 5: b\nSpeaker 2: c\nSpeaker 3:\nSpeaker 1: d")
    tab.locator("#speak").click()
    assert lines_with(tab, "error") == [2, 4]
    problems = tab.get_by_role("list", name="Problems in the script").get_by_role("listitem")
    assert problems.all_inner_texts()[0].startswith("Line 2") and "no speaker 5" in problems.nth(0).inner_text()
    tab.get_by_role("button", name="Line 4").click()
    assert tab.evaluate("document.querySelector('#script').selectionStart") == len(
        "Speaker 1: a\nSpeaker 5: b\nSpeaker 2: c\n"
    )
    assert tab.evaluate("document.activeElement.id") == "script"
    assert tab.locator("#script").get_attribute("aria-invalid") == "true"


def test_nothing_is_asked_of_the_service_for_a_script_with_mistakes(tab, studio):
    for script in ("", "Speaker 7: a"):
        write(tab, script)
        tab.locator("#speak").click()
        tab.locator("#make").click()
        tab.locator("#problems li").first.wait_for()
    assert not any(call.startswith("POST") for call in studio.calls)


def test_a_line_that_is_being_written_is_no_mistake_yet(tab):
    tab.locator("#script").press_sequentially("Speaker 1: a\nSpeaker 2:")
    tab.wait_for_timeout(1000)
    assert lines_with(tab, "error") == []
    tab.locator("#format").focus()
    assert lines_with(tab, "error") == [2]


@pytest.mark.parametrize("button", ["#speak", "#make"])
def test_what_the_server_refuses_is_shown_at_its_line(tab, studio, button):
    detail = [{"line": 2, "message": f"not this word: {HOSTILE}"}, {"line": 3, "message": "too long"}]
    studio.refusals = {"POST v1/audio/speech": (422, detail), "POST v1/tasks": (422, detail)}
    write(tab, "Speaker 1: a\nSpeaker 2: b\nSpeaker 1: c")
    tab.locator(button).click()
    tab.get_by_role("button", name="Line 3").wait_for()
    assert lines_with(tab, "error") == [2, 3]
    assert HOSTILE in tab.locator("#problems").inner_text()
    assert tab.locator("#failure").inner_text().endswith("see the marked lines.")
    tab.locator("#script").press("End")
    tab.keyboard.type(" more")
    assert lines_with(tab, "error") == []  # it was said of another text


def test_names_at_the_start_of_lines_become_speakers(tab):
    write(tab, "Anna: Hello.\nBen: Hi!\nAnna: How are you?")
    tab.get_by_role("button", name="Make them speakers").click()
    assert tab.locator("#script").input_value() == "Speaker 1: Hello.\nSpeaker 2: Hi!\nSpeaker 1: How are you?"
    tab.keyboard.press("Control+z")
    assert tab.locator("#script").input_value().startswith("Anna: Hello.")


def test_what_looks_like_a_speaker_is_remarked_on_and_no_error(tab):
    write(tab, "Speaker 1: a\nHost: b\nSpeaker 2: c")
    tab.locator("#problems li").first.wait_for()
    assert lines_with(tab, "remark") == [2] and lines_with(tab, "error") == []
    assert tab.locator("#script").get_attribute("aria-invalid") == "false"


@pytest.mark.parametrize("width", [390, 1280])
def test_the_colours_lie_under_the_letters(tab, width):
    tab.set_viewport_size({"width": width, "height": 844})
    words = "Three  spaces   and averyveryveryveryverylongwordthathasnospacesatallandgoesonandonandon, AVATAR fi fl. "
    write(tab, "\n".join(f"Speaker {k % 4 + 1}: {words * (k % 5)}end" for k in range(40)) + "\n\n")
    heights = tab.evaluate("""() => {
      const [field, layer] = [document.querySelector("#script"), document.querySelector("#layer")];
      const drawn = layer.getBoundingClientRect().height, stretched = field.getBoundingClientRect().height;
      field.style.cssText = "align-self: start; height: 0; min-height: 0";
      const written = field.scrollHeight;
      field.style.cssText = "";
      return [drawn, stretched, written];
    }""")
    assert heights[0] == pytest.approx(heights[1], abs=1) and heights[0] == pytest.approx(heights[2], abs=2)


def test_an_edit_in_a_long_script_redraws_its_line_only(tab):
    script = "\n".join(f"Speaker {k % 4 + 1}: line {k}" for k in range(2000))
    kept = tab.evaluate(
        """(script) => {
      const field = document.querySelector("#script");
      field.value = script;
      field.dispatchEvent(new Event("input"));
      const lines = [...document.querySelectorAll(".line")];
      field.setRangeText(" more", 12, 12);
      field.dispatchEvent(new Event("input"));
      return [...document.querySelectorAll(".line")].filter((line) => lines.includes(line)).length;
    }""",
        script,
    )
    assert kept == 1999


def test_what_people_and_servers_wrote_stays_text(tab, studio):
    studio.voices = [{"id": "a/../b?<", "name": HOSTILE}]
    studio.refusals = {"POST v1/audio/speech": (503, HOSTILE)}
    task = studio.add({"voices": ["a"]}, error=HOSTILE, status="failed", title=HOSTILE)
    tab.reload()
    tab.get_by_role("heading", name=HOSTILE).wait_for()
    write(tab, f"Speaker 1: {HOSTILE}\n{HOSTILE}: x\n{HOSTILE}: y")
    tab.locator("#speak").click()
    tab.locator("#failure").get_by_text(HOSTILE).wait_for()
    assert tab.locator("#failure").inner_text() == HOSTILE
    tab.locator("#make").click()
    tab.get_by_role("heading", name=HOSTILE).nth(1).wait_for()
    assert HOSTILE in tab.locator(".line").nth(0).inner_text() and HOSTILE in tab.locator("#voice-1").inner_text()
    assert HOSTILE in tab.locator(".task .error").all_inner_texts() and task["id"]
    made = tab.evaluate("document.querySelectorAll('img, b, script:not([src]), iframe').length")
    assert made == 0 and tab.evaluate("window.hurt") is None
