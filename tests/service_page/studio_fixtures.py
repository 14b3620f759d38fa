"""Fixtures: the page of a fake studio in a real Chromium. A test that leaves an error on the page's console fails."""

from __future__ import annotations

import shutil

import pytest
from fake_studio import FakeStudio, serving

from harness.report.paper import BROWSERS

PATIENCE_MS = 100_000  # of a machine that others share
EXPECTED = "Failed to load resource"  # what Chromium says of every answer that is no success


@pytest.fixture(scope="module")  # while it is open, an event loop runs in this process: other tests need their own
def studio_browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'"
    )
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    playwright.expect.set_options(timeout=PATIENCE_MS)
    with playwright.sync_playwright() as driver:
        with driver.chromium.launch(executable_path=binary, args=["--no-sandbox"], timeout=120_000) as browser:
            yield browser


@pytest.fixture
def studio():
    with serving() as studio:
        yield studio


@pytest.fixture
def tab(studio: FakeStudio, studio_browser):
    """The page, opened; ``asked``: the addresses that it loaded; ``expected``: parts of errors that are none."""
    with studio_browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-GB") as context:
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        faults, page.asked, page.expected = [], [], [EXPECTED]
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(studio.address)
        page.locator("#voice-1 option, #voices-error:not([hidden]), dialog[open]").first.wait_for(state="attached")
        yield page
        assert [fault for fault in faults if not any(each in fault for each in page.expected)] == []
