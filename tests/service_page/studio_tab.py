"""Fixtures: the page of a fake studio in a real Chromium. A test that leaves an error on the page's console fails."""

from __future__ import annotations

import shutil

import pytest
from fake_studio import FakeStudio, serving

from harness.report.paper import BROWSERS

EXPECTED = "Failed to load resource"  # what Chromium says of every answer that is no success


@pytest.fixture(scope="session")
def studio_browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'"
    )
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        with driver.chromium.launch(executable_path=binary, args=["--no-sandbox"]) as browser:
            yield browser


@pytest.fixture
def studio():
    with serving() as studio:
        yield studio


@pytest.fixture
def tab(studio: FakeStudio, studio_browser):
    """The page, opened; ``asked`` are the addresses that it loaded."""
    with studio_browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-GB") as context:
        page = context.new_page()
        faults, page.asked = [], []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(studio.address)
        page.locator("#voice-1 option, #voices-error:not([hidden]), dialog[open]").first.wait_for(state="attached")
        yield page
        assert [fault for fault in faults if EXPECTED not in fault] == []


def write(tab, script: str) -> None:
    tab.locator("#script").fill(script)


def lines_with(tab, kind: str) -> list[int]:
    """The numbers of the lines that are marked as ``error`` or ``remark``."""
    return tab.evaluate(f"[...document.querySelectorAll('.line')].flatMap((e, k) => e.matches('.has-{kind}') ? k + 1 : [])")


def played(tab) -> dict:
    return tab.evaluate("window.studio.played")


def until_played(tab, state: str, timeout_ms: int = 30_000) -> dict:
    """What the audio thread counted when it was in a state."""
    tab.wait_for_function("state => window.studio.played.state === state", arg=state, timeout=timeout_ms)
    return played(tab)


def fnv1a(data: bytes) -> int:
    """The digest of the page's audio thread: FNV-1a, 32 bits (draft-eastlake-fnv-17.2, section 2)."""
    digest = 0x811C9DC5
    for byte in data:
        digest = (digest ^ byte) * 0x01000193 & 0xFFFFFFFF
    return digest
