"""The web page in a real browser: speech is seen live, and its records are downloaded."""

import re
import shutil

import pandas as pd
import pytest
from fake_triton import Timetable, serving
from test_user import page

from harness.drive.web_ui import COLUMNS

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WITHIN_MS = 100_000
PLACES = """[...document.querySelectorAll("#rows tbody tr:last-child td")].map((cell) => {
  const box = cell.getBoundingClientRect();
  return [cell.dataset.key, box.left, box.right];
})"""


@pytest.fixture(scope="module")
def chromium():
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    if binary is None:
        pytest.skip(f"no browser here: none of {', '.join(NAMES)} is on the path (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        with driver.chromium.launch(executable_path=binary, args=["--no-sandbox"], timeout=120_000) as browser:
            yield browser


def test_the_page_shows_speech_live_and_hands_out_its_records(chromium, tmp_path):
    with serving(Timetable(interval_s=0.002)) as fake, page(fake.url) as address:
        tab = open_when_there(chromium.new_page(), address)
        tab.get_by_role("tab", name="Speech").click()
        header = tab.get_by_role("columnheader")
        header.get_by_text("TTFA p95 (s)").wait_for(timeout=WITHIN_MS)
        assert [cell.strip() for cell in header.all_inner_texts()] == list(COLUMNS.values())
        playwright.expect(figure(tab, "done")).not_to_have_text("0", timeout=WITHIN_MS)
        assert 0 <= float(figure(tab, "ttfa_p50").inner_text()) < 60 and float(figure(tab, "audio_s").inner_text()) > 0
        done = int(figure(tab, "done").inner_text())
        records = downloaded(tab, tmp_path)
    assert records["outcome"].value_counts()["done"] >= done > 0
    assert {"traffic_class", "ttfa_s", "rtf", "stall_longest_s", "lateness_p99_s"} <= set(records.columns)


@pytest.mark.parametrize("width", [390, 1280])
def test_our_own_page_shows_all_figures_at_the_width_of_a_phone_and_loads_nothing_from_elsewhere(chromium, width):
    with serving(Timetable(interval_s=0.002)) as fake, page(fake.url) as address:
        tab = open_when_there(chromium.new_page(viewport={"width": width, "height": 844}), address)
        asked, errors = [], []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: errors.append(error))
        tab.get_by_role("link", name="Charts, verdict, gates and SLOs").click()
        tab.locator("#charts svg path").first.wait_for(state="attached", timeout=WITHIN_MS)
        assert tab.locator("#charts svg").count() == 4
        row = tab.locator("#rows tbody tr").last
        for key in ("ttfa_p50", "ttfa_p95", "rtf_p50", "rtf_p95"):
            cell = row.locator(f"[data-key={key}]")
            playwright.expect(cell).to_have_text(re.compile(r"\d\.\d{3}"), timeout=WITHIN_MS)
        places = tab.evaluate(PLACES)  # at once: the page draws its cells anew every second
        assert {"ttfa_p50", "ttfa_p95", "rtf_p50", "rtf_p95"} <= {key for key, _, _ in places}
        assert all(left >= 0 and right <= width for _, left, right in places)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert errors == [] and all(each.startswith((address, "data:")) for each in asked)


def open_when_there(tab, address: str):
    tab.set_default_timeout(WITHIN_MS)
    for _ in range(300):
        try:
            tab.goto(address)
            tab.get_by_role("tab", name="Speech").wait_for(timeout=15_000)
            return tab
        except playwright.Error:  # Locust is starting
            tab.wait_for_timeout(200)
    raise AssertionError(f"no page at {address}")


def figure(tab, column: str):
    """The cell of the row that adds all up."""
    row = tab.get_by_role("row").filter(has_text="Aggregated")
    return row.get_by_role("cell").nth(list(COLUMNS).index(column))


def downloaded(tab, folder) -> pd.DataFrame:
    tab.get_by_role("tab", name="Download Data").click()
    with tab.expect_download() as download:
        tab.get_by_text("Download speech records CSV").click()
    download.value.save_as(folder / download.value.suggested_filename)
    return pd.read_csv(folder / "speech-records.csv")
