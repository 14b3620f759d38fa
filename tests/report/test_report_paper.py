"""The pages on paper, on a phone and in both colour schemes: nothing is cut, hidden, too long or too faint."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import report_sample as sample
from report_page import Page, read
from typer.testing import CliRunner

from harness.cli.main import app
from harness.errors import HarnessError, InputError
from harness.report import facts, figures, paper
from harness.report.page import write_report
from harness.report.seal import check_seal

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "results" / "sample-quick"
STYLE = (ROOT / "harness" / "report" / "style.css").read_text()
LEAST_CONTRAST = 4.5  # of text, WCAG 2.2, 1.4.3
PAPER_PX = 688  # between the margins of an A4 page
DESKTOP_PX, PHONE_PX = (1280, 900), (390, 844)
PHONE_LENGTH_PX = 20_000  # of the sample; it was 39,000 before long lists were folded

INKS = ("ink", "muted", "accent", "met", "missed", "open")
GROUNDS = ("page", "card", "met-soft", "missed-soft", "open-soft", "none-soft")


def colours(dark: bool) -> dict[str, str]:
    light, over = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", STYLE, re.S)
    )
    return light | over if dark else light


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, by WCAG 2.2."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_contrast_is_that_of_the_standard():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_label_stands_out_from_its_ground(dark):
    known = colours(dark)
    faint = {(ink, on): contrast(known[ink], known[on]) for ink in INKS for on in GROUNDS}
    assert {pair: ratio for pair, ratio in faint.items() if ratio < LEAST_CONTRAST} == {}


def test_text_has_no_colour_but_those_that_are_tested():
    text = re.findall(r"(?<![\w-])color: ([^;]+);", STYLE)
    assert set(text) <= {f"var(--{ink})" for ink in (*INKS, "tone")} and text


def test_labels_in_plots_have_the_colour_of_text_or_of_a_limit(tmp_path):
    run = sample.make_run(tmp_path)
    swept = facts.deployments(run.trials(), run.requests(), run.fit(), run.plan())
    drawn = [figures.throughput_latency(swept), figures.first_audio(swept, run.plan().slos)]
    drawn += [figures.stage_time(swept[0], 100.0)]
    labels = [label for figure in drawn for label in figure.layout.annotations]
    assert {label.font.color for label in labels} == {None, figures.LIMIT_COLOUR}  # the page sets both


def test_long_lists_are_folded_with_their_count(tmp_path):
    html = read(sample.make_run(tmp_path, "inconclusive", plan=sample.outlook_record()))
    said = [
        re.sub(r"<.*?>", "", each) for each in re.findall(r'<details class="long" open><summary>(.*?)</summary>', html)
    ]
    assert "6 figures predicted and measured: 6 passed" in said
    assert "9 trials: 1 INVALID" in said and "5 other deployments" in said
    assert all(re.match(r"\d+ ", each) for each in said)
    assert Page(html).tables  # every element that is opened is closed


needs_browser = pytest.mark.skipif(
    not any(map(shutil.which, paper.BROWSERS)), reason="no Chromium here: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'"
    )
    with playwright.sync_playwright() as driver:
        with driver.chromium.launch(
            executable_path=paper.browser_path(), args=["--no-sandbox"], timeout=120_000
        ) as started:
            yield started


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The page of the stored sample as it is written today."""
    folder = tmp_path_factory.mktemp("paper") / "sample-quick"
    shutil.copytree(SAMPLE, folder)
    return write_report(facts.Run.open(folder))


def opened(browser, page: Path, width: int, height: int):
    tab = browser.new_page(viewport={"width": width, "height": height})
    tab.set_default_timeout(120_000)  # of a machine that others share
    tab.goto(page.as_uri())
    tab.wait_for_selector(".plot .main-svg", state="attached")
    return tab


def cut_off(tab) -> list[str]:
    """The captions of the tables that are wider than their place."""
    sizes = "t => [t.caption.innerText, t.scrollWidth, t.parentNode.clientWidth]"
    tables = tab.evaluate(f"[...document.querySelectorAll('table')].map({sizes})")
    assert len(tables) > 10
    return [caption for caption, needed, there in tables if needed > there + 1]


@needs_browser
def test_paper_shows_every_row_every_plot_and_every_column(browser, written):
    tab = opened(browser, written, PAPER_PX, 1000)
    tab.emulate_media(media="print")
    tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    assert (
        tab.evaluate("[...document.querySelectorAll('.plot')].filter(p => !p.querySelector('.main-svg')).length") == 0
    )
    assert cut_off(tab) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= PAPER_PX
    tab.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert tab.evaluate("document.querySelectorAll('details[data-folded], details:not(.long)[open]').length") == 0
    tab.close()


@needs_browser
def test_a_phone_has_a_short_page_whose_plots_are_drawn_when_they_are_opened(browser, written):
    tab = opened(browser, written, *PHONE_PX)
    assert tab.evaluate("document.documentElement.scrollHeight") < PHONE_LENGTH_PX
    assert tab.evaluate("document.documentElement.scrollWidth") == PHONE_PX[0]
    folded = tab.locator("details.long:not([open]) .plot").first
    assert folded.locator(".main-svg").count() == 0
    tab.locator("details.long:has(.plot) > summary").first.click()
    tab.wait_for_selector("details.long[open] .plot .main-svg", state="attached")
    tab.close()


@pytest.fixture(scope="module")
def priced(tmp_path_factory) -> Path:
    """The page of a plan with all that one can hold, prices too."""
    return write_report(sample.make_run(tmp_path_factory.mktemp("priced"), plan=sample.outlook_record()))


@needs_browser
def test_a_desktop_shows_every_column_of_every_table(browser, priced):
    tab = opened(browser, priced, *DESKTOP_PX)
    tab.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert cut_off(tab) == []
    heads = tab.locator("#targets thead").first.locator("th").all_inner_texts()
    assert (heads[-2], heads[-1]) == ("EUR per audio hour", "Basis")
    tab.close()


@needs_browser
def test_a_phone_reads_each_target_as_a_list_with_its_cost_and_basis(browser, priced):
    tab = opened(browser, priced, *PHONE_PX)
    place, cells = tab.locator("#targets .scroll").first, tab.locator("#targets tbody").first.locator("tr").first
    assert place.evaluate("each => each.scrollWidth - each.clientWidth") <= 1
    assert cells.locator("td[data-label='Cost'], td[data-label='Basis']").count() == 2
    boxes = [each.bounding_box() for each in cells.locator("th, td").all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= PHONE_PX[0] for box in boxes)
    assert [box["y"] for box in boxes] == sorted({box["y"] for box in boxes})  # one below the other
    tab.close()


@needs_browser
def test_the_command_prints_a_signed_run_and_its_seal_holds(tmp_path):
    folder = tmp_path / "sample-quick"
    shutil.copytree(SAMPLE, folder)
    answer = CliRunner().invoke(app, ["report", "--run", str(folder), "--pdf"])
    assert answer.exit_code == 0 and "signoff.pdf" in answer.output.replace("\n", "")
    pdf = (folder / "signoff.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", pdf)) > 10
    assert [problem for problem in check_seal(folder).problems if "expired" not in problem] == []
    assert list(folder.glob(".*.tmp")) == []


def fake_browser(folder: Path, script: str, monkeypatch) -> None:
    path = folder / "bin" / "chromium"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}/usr/bin{os.pathsep}/bin")


@pytest.fixture
def html(tmp_path):
    (tmp_path / "signoff.html").write_text("<p>page</p>")
    (tmp_path / "signoff.pdf").write_text("as it was")
    return tmp_path / "signoff.html"


def test_without_a_browser_it_says_what_to_install(html, monkeypatch):
    monkeypatch.setenv("PATH", str(html.parent))
    with pytest.raises(InputError, match="none of chromium.*apt-get install chromium"):
        paper.write_pdf(html)


def test_a_page_that_is_not_there_is_said(tmp_path):
    with pytest.raises(InputError, match="no such page"):
        paper.write_pdf(tmp_path / "none.html")


def test_a_browser_that_hangs_is_ended_with_its_helpers(html, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fake_browser(tmp_path, f"sleep 300 & echo $! > {tmp_path}/helper; wait", monkeypatch)
    with pytest.raises(HarnessError, match="did not print .* within 3 s"):
        paper.write_pdf(html, timeout_s=3)
    helper = int((tmp_path / "helper").read_text())
    for _ in range(600):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(helper)], capture_output=True, text=True).stdout
        if not state or state.startswith("Z"):
            break
        time.sleep(0.1)
    assert not state or state.startswith("Z")
    assert list(tmp_path.glob("harness-pdf-*")) == [] and html.with_suffix(".pdf").read_text() == "as it was"


def test_a_browser_that_fails_is_quoted(html, tmp_path, monkeypatch):
    fake_browser(tmp_path, "echo first >&2; echo no usable sandbox >&2; exit 3", monkeypatch)
    with pytest.raises(HarnessError, match="could not print .*no usable sandbox"):
        paper.write_pdf(html)
    assert html.with_suffix(".pdf").read_text() == "as it was"
