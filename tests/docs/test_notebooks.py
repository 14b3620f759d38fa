"""The notebooks run as they stand on the stored sample run, and hold no output and no logic of their own."""

import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from plotly.offline import get_plotlyjs

from harness.report import paper

ROOT = Path(__file__).resolve().parents[2]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLOT = "application/vnd.plotly.v1+json"
MOST_LINES = 6  # of code in a cell, imports not counted


def read(path: Path):
    notebook = nbformat.read(path, as_version=4)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def statements(cell) -> list[str]:
    return [line for line in cell.source.splitlines() if line and not line.startswith(("import ", "from "))]


def test_there_are_four():
    assert [path.stem[:2] for path in PATHS] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs(path):
    notebook, code = read(path)
    nbformat.validate(notebook)
    clean = all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert clean, f"run `jupyter nbconvert --clear-output --inplace {path.relative_to(ROOT)}`"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_tells_a_story_and_calls_the_harness(path):
    notebook, code = read(path)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert all(len(statements(cell)) <= MOST_LINES for cell in code)
    assert all(word not in cell.source for cell in code for word in ("def ", "class ", "parquet", "json.load"))
    told = sum(cell.cell_type == "markdown" for cell in notebook.cells)
    assert told >= 5


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_run_is_one_parameter_at_the_top(path):
    _, code = read(path)
    assert code[0].metadata["tags"] == ["parameters"] and 'os.environ.get("HARNESS_RUN"' in code[0].source
    assert sum("Run.open" in cell.source for cell in code) == 1


@pytest.fixture(scope="module")
def executed():
    """Each notebook as it was run on the sample, once for all tests: by path."""
    done = {}

    def of(path: Path):
        if path not in done:
            notebook, _ = read(path)
            with pytest.MonkeyPatch.context() as patched:
                patched.delenv("HARNESS_RUN", raising=False)
                NotebookClient(
                    notebook, timeout=250, startup_timeout=250, resources={"metadata": {"path": str(path.parent)}}
                ).execute()
            done[path] = notebook
        return done[path]

    return of


def outputs_of(notebook) -> list:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def plots_of(notebook) -> list:
    return [output.data[PLOT] for output in outputs_of(notebook) if PLOT in output.get("data", {})]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_runs_on_the_sample(path, executed):
    shown, plots = outputs_of(executed(path)), plots_of(executed(path))
    assert len(plots) >= 2 and all(plot["data"] and plot["layout"]["title"]["text"] for plot in plots)
    assert not [output for output in shown if output.output_type == "stream" and output.name == "stderr"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_its_page_holds_every_plot_and_plotly_once(path, executed):
    html, _ = HTMLExporter().from_notebook_node(executed(path))
    assert html.count(get_plotlyjs()) == 1
    rest = html.replace(get_plotlyjs(), "")
    assert len(re.findall(r'class="plotly-graph-div"', rest)) == len(plots_of(executed(path)))
    assert rest.count("Plotly.newPlot(") == len(plots_of(executed(path))) and "cdn.plot.ly" not in rest


def test_its_page_draws_the_plots_without_a_network(executed, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not any(map(shutil.which, paper.BROWSERS)):
        pytest.skip("no Chromium here: apt-get install chromium")
    page = tmp_path / "page.html"
    page.write_text(HTMLExporter().from_notebook_node(executed(PATHS[-1]))[0])
    with playwright.sync_playwright() as driver:
        with driver.chromium.launch(
            executable_path=paper.browser_path(), args=["--no-sandbox"], timeout=120_000
        ) as browser:
            tab = browser.new_page()
            tab.set_default_timeout(120_000)
            tab.route(re.compile("^https?:"), lambda route: route.abort())
            tab.goto(page.as_uri())
            tab.wait_for_selector(".plotly-graph-div .main-svg", state="attached")
            drawn = tab.locator(".plotly-graph-div:has(.main-svg)")
            expected = len(plots_of(executed(PATHS[-1])))
            playwright.expect(drawn).to_have_count(expected, timeout=120_000)  # waits for the last of them
            assert drawn.count() == expected > 0


def test_the_run_is_chosen_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HARNESS_RUN", os.fspath(tmp_path))
    notebook, _ = read(PATHS[0])
    client = NotebookClient(
        notebook, timeout=250, startup_timeout=250, allow_errors=True, resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    errors = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "error"]
    assert f"{tmp_path} holds no manifest.json" in errors[0].evalue
