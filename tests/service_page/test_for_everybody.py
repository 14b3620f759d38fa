"""The page with a key, on a phone, by keyboard alone, in light and dark, and without a network."""

import pytest
from fake_studio import STRICT, tone, wav
from studio_tab import fnv1a, until_played, write

pytest_plugins = ["studio_fixtures"]

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
LONG = "Speaker 1: " + "word " * 40 + "\nSpeaker 9: " + "x" * 300 + "\nHost: a\nHost: b"
CONTRASTS = """() => {
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (text) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = parts(text).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if ((parts(colour)[3] ?? 1) === 1) return colour;
    }
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const isText = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const isLeftOut = element.disabled || element.matches("option, textarea, noscript");
    if (!isText || isLeftOut || !element.checkVisibility()) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))];
    found.push([element.outerHTML.slice(0, 90), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
}"""
CONTROLS = "button, a, input, select, textarea, progress, meter, audio, dialog, section"
NAMELESS = f"""() => [...document.querySelectorAll("{CONTROLS}")]
  .filter((element) => !(element.labels?.length || element.ariaLabel || element.getAttribute("aria-labelledby")
    || element.textContent.trim())).map((element) => element.outerHTML)"""
FOCUSED = "(({ id, ariaLabel, textContent }) => id || ariaLabel || textContent)(document.activeElement)"


def everything(tab, studio) -> None:
    """A page that shows all that it can: mistakes, notices, every state of a task, and the player."""
    for status in ("queued", "running", "done", "failed", "cancelled"):
        task = studio.add({"voices": [1]}, title=f"{status} " + "y" * 120)["id"]
        studio.run(task, 30, status=status, error="It broke " + "z" * 200 if status == "failed" else None)
    tab.reload()
    expect(tab.locator(".task")).to_have_count(5)
    studio.speech = [tone(30.0)]
    write(tab, "Speaker 1: " + "very long title " * 20)
    tab.locator("#speak").click()
    until_played(tab, "playing")
    tab.locator("#make").click()
    tab.locator("#made").wait_for()
    write(tab, LONG)
    tab.locator("#speak").click()
    tab.locator("#problems li").first.wait_for()


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_width_scrolls_sideways(tab, studio, width):
    tab.set_viewport_size({"width": width, "height": 844})
    everything(tab, studio)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    outside = """() => [...document.querySelectorAll("button, select, .task, .voice")]
      .filter((e) => e.checkVisibility())
      .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.outerHTML)"""
    assert tab.evaluate(outside) == []
    assert tab.locator(".player button:visible").count() >= 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_and_every_control_has_a_name(tab, studio, scheme):
    tab.emulate_media(color_scheme=scheme)
    everything(tab, studio)
    tab.mouse.move(0, 0)
    contrasts = tab.evaluate(CONTRASTS)
    assert len(contrasts) > 40 and [each for each in contrasts if each[1] < 4.5] == []
    assert tab.evaluate(NAMELESS) == []


def test_the_whole_way_by_keyboard_alone(tab, studio):
    sent = tone(1.2)
    studio.speech = [sent]
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the script"
    tab.keyboard.press("Enter")
    tab.keyboard.type("Speaker 1: Hello.\nSpeaker 2: Good day.")
    tab_to(tab, "voice-2")
    tab.keyboard.press("m")  # Maya
    tab_to(tab, "speak")
    outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    tab.keyboard.press("Enter")
    assert until_played(tab, "ended")["digest"] == fnv1a(sent)
    assert studio.spoken[0]["voices"] == [1, 4]
    tab_to(tab, "close")
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "speak"
    tab_to(tab, "make")
    tab.keyboard.press("Enter")
    tab.locator("#made").wait_for()
    tab_to(tab, "Cancel: Hello.")
    tab.keyboard.press("Space")
    expect(tab.locator(".task")).to_contain_text("Cancelled")


def tab_to(tab, name: str) -> None:
    for _ in range(40):
        if tab.evaluate(FOCUSED) == name:
            return
        tab.keyboard.press("Tab")
    raise AssertionError(f"no way to {name} by Tab")


def test_screen_readers_hear_what_happens(tab, studio):
    write(tab, "Speaker 1: Hello.")
    tab.evaluate("""() => {
      window.heard = [];
      const announcer = document.querySelector("#announcer");
      new MutationObserver(() => window.heard.push(announcer.textContent)).observe(announcer, { childList: true });
    }""")
    tab.locator("#speak").click()
    until_played(tab, "ended")
    tab.locator("#make").click()
    expect(tab.locator(".task")).to_have_count(1)
    studio.finish("task1")
    expect(tab.locator(".task")).to_contain_text("Done")
    heard = tab.evaluate("window.heard")
    assert heard[:2] == ["Waiting for the first sound", "Playing"] and "Finished. 0 stalls." in heard
    assert heard[-2:] == ["Hello.: added to the recordings.", "Hello.: done."]


def test_a_key_is_asked_for_once_kept_for_the_tab_and_sent_with_everything(tab, studio, tmp_path):
    studio.key = "s3cret"
    studio.finish(studio.add({"voices": [1]}, title="Mine")["id"])
    tab.reload()
    dialog = tab.get_by_role("dialog", name="Access key")
    field, button = (dialog.locator(each).bounding_box() for each in ("#key", "button >> nth=0"))
    assert button["y"] > field["y"] + field["height"] and button["height"] < 60
    dialog.get_by_label("Key", exact=True).fill("wrong")
    tab.keyboard.press("Enter")
    dialog.get_by_role("alert").filter(has_text="did not accept").wait_for()
    dialog.get_by_label("Key", exact=True).fill("s3cret")
    dialog.get_by_role("button", name="Use this key").click()
    expect(tab.locator("#voice-1")).to_be_enabled()
    tab.get_by_role("heading", name="Mine").wait_for()
    with tab.expect_download() as download:
        tab.get_by_role("link", name="Download: Mine").click()
    download.value.save_as(tmp_path / "mine.wav")
    assert (tmp_path / "mine.wav").read_bytes() == wav(b"") + studio.audio["task1"]
    tab.get_by_role("button", name="Play: Mine").click()
    tab.wait_for_function("() => document.querySelector('audio')?.currentTime > 0.1")
    write(tab, "Speaker 1: Hello.")
    tab.locator("#speak").click()
    until_played(tab, "ended")
    tab.reload()
    expect(tab.locator("#voice-1")).to_be_enabled()
    assert dialog.is_hidden() and "s3cret" not in "".join(tab.asked)
    assert "s3cret" not in tab.evaluate("JSON.stringify(localStorage)")
    tab.get_by_role("button", name="Forget the access key").click()
    tab.reload()
    dialog.wait_for()


def test_a_recording_behind_a_key_is_heard_under_the_strictest_policy(tab, studio):
    studio.key, studio.policy = "s3cret", STRICT
    studio.finish(studio.add({"voices": [1]}, title="Mine", of_frames=6)["id"])
    tab.expected.append("'media-src' was not explicitly set")
    tab.reload()
    tab.get_by_label("Key", exact=True).fill("s3cret")
    tab.keyboard.press("Enter")
    tab.get_by_role("button", name="Play: Mine").click()
    assert until_played(tab, "ended")["digest"] == fnv1a(studio.audio["task1"])


def test_without_a_key_the_page_says_so_and_asks_again_when_it_is_needed(tab, studio):
    studio.key = "s3cret"
    tab.reload()
    dialog = tab.get_by_role("dialog", name="Access key")
    dialog.get_by_role("button", name="Not now").click()
    tab.get_by_text("The service needs a key").first.wait_for()
    tab.wait_for_timeout(300)
    assert dialog.is_hidden()
    write(tab, "Speaker 1: Hello.")
    tab.locator("#speak").click()
    dialog.get_by_label("Key", exact=True).fill("s3cret")
    tab.keyboard.press("Enter")
    until_played(tab, "ended")


def test_the_page_is_whole_without_any_other_place(tab, studio):
    tab.get_by_role("button", name="Use the example").click()
    assert tab.locator("#script-facts").inner_text().startswith("4 speakers")
    assert tab.locator("#problems").is_hidden()
    tab.locator("#speak").click()
    until_played(tab, "playing")
    assert all(address.startswith((studio.address, "blob:")) for address in tab.asked)
    assert not [call for call in studio.calls if call.endswith("not found")]


def test_motion_is_left_out_where_it_is_not_wanted(tab):
    tab.emulate_media(reduced_motion="reduce")
    moving = """[...document.querySelectorAll("*")].map((element) => getComputedStyle(element))
      .filter((style) => style.transitionDuration !== "0s" || style.animationName !== "none").length"""
    assert tab.evaluate(moving) == 0
