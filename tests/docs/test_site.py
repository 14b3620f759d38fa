"""The documentation as a site: it builds without a warning, holds every page, and needs no network."""

import os
import re
import shutil
import subprocess
import sys

import pages
import pytest

from harness.report import paper

TO_LOAD = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc=["'](?:https?:)?//|<link[^>]*rel=["']?(?:stylesheet|preconnect|icon|preload)[^>]*href=["'](?:https?:)?//""")  # fmt: skip  # noqa: E501
IN_STYLE = re.compile(r"""url\(["']?(?:https?:)?//|@import\s+["']?(?:url\()?["']?(?:https?:)?//""")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=pages.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_it_holds_every_page(site):
    inside = {page.removeprefix("docs/") for page in pages.PAGES if page.startswith("docs/")}
    top = {f"project/{page.lower()}" for page in pages.TOP if page != "README.md"}
    built = {str(path.relative_to(site).with_suffix(".md")) for path in site.rglob("*.html")} - {"404.md"}
    assert built == inside | top
    assert not list(site.rglob("*.py"))


def test_it_loads_nothing_from_the_network(site):
    for path in site.rglob("*.html"):
        assert not TO_LOAD.search(path.read_text()), path
    for path in site.rglob("*.css"):
        assert not IN_STYLE.search(path.read_text()), path


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://unpkg.com/x"></script>',
        '<img alt="" src="//a.b/c.png">',
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css">',
    ],
)
def test_a_resource_of_the_network_would_be_found(html):
    assert TO_LOAD.search(html)


def test_a_link_on_the_site_never_leaves_it(site):
    for path in site.rglob("*.html"):
        for link in re.findall(r"""<a[^>]*\shref=["']?([^"'>\s]+)""", path.read_text()):
            if not re.match(r"(https?:|#|mailto:)", link) and path.name != "404.html":
                target = (path.parent / link.partition("#")[0]).resolve()
                assert target.exists() and target.is_relative_to(site), f"{path}: {link}"


def test_its_search_works_from_a_file_and_asks_no_network(site):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not any(map(shutil.which, paper.BROWSERS)):
        pytest.skip("no Chromium here: apt-get install chromium")
    asked = []
    with playwright.sync_playwright() as driver:
        with driver.chromium.launch(
            executable_path=paper.browser_path(), args=["--no-sandbox"], timeout=120_000
        ) as browser:
            tab = browser.new_page(viewport={"width": 390, "height": 844})
            tab.set_default_timeout(120_000)
            tab.on("request", lambda request: asked.append(request.url) if request.url.startswith("http") else None)
            for page in ("reference/plan-file.html", "reference/cli.html", "index.html"):
                tab.goto((site / page).as_uri())
                wide = tab.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
                assert not wide, f"{page} is wider than a phone"
            tab.set_viewport_size({"width": 1280, "height": 900})
            tab.locator(".md-search__input").press_sequentially("utilisation")  # it listens to keys, not to values
            tab.wait_for_selector(".md-search-result__item", state="attached")
    assert asked == []
