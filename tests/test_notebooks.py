"""The notebooks run as they stand on the stored sample run, and hold no output and no logic of their own."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_runs_on_the_sample(path, monkeypatch):
    monkeypatch.delenv("HARNESS_RUN", raising=False)
    notebook, code = read(path)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    shown = [output for cell in code for output in cell.outputs]
    plots = [output.data[PLOT] for output in shown if PLOT in output.get("data", {})]
    assert len(plots) >= 2 and all(plot["data"] and plot["layout"]["title"]["text"] for plot in plots)
    assert not [output for output in shown if output.output_type == "stream" and output.name == "stderr"]


def test_the_run_is_chosen_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HARNESS_RUN", os.fspath(tmp_path))
    notebook, _ = read(PATHS[0])
    client = NotebookClient(notebook, timeout=120, allow_errors=True, resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    errors = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "error"]
    assert f"{tmp_path} holds no manifest.json" in errors[0].evalue
