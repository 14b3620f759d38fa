"""benchmarks/gpu/towers.py: a run on a CPU, by Triton's interpreter, and what it refuses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HAS_GPU

pytest.importorskip("triton", reason="the package triton is not installed (CPU builds of torch come without it)")
ROOT = Path(__file__).resolve().parents[2]


SCRIPT = ROOT / "benchmarks" / "gpu" / "towers.py"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "")  # the script sets it: put back afterwards
        spec = importlib.util.spec_from_file_location("gpu_towers", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


def test_a_quick_run_finds_both_towers_right_and_times_every_layer():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    runner = () if HAS_GPU else ("tests/interpreter.py",)
    command = [sys.executable, *runner, "benchmarks/gpu/towers.py", "--quick"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and figures["preset"] == "tiny"
    assert [(row["tower"], row["sessions"]) for row in figures["towers"]] == [("decoder", 1), ("encoder", 1)]
    for row in figures["towers"]:
        assert row["kernels"] == 15 and row["operators"] >= 7  # stem, head, 6 layers between and 7 blocks; products
        assert 0 <= row["difference"] < 0.15 and row["plain_ms"] > 0
    for tower in ("decoder", "encoder"):
        assert sum(row["layers"] for row in figures["layers"] if row["tower"] == tower) == 15


@pytest.mark.skipif(HAS_GPU, reason="a GPU gives figures")
def test_figures_are_refused_without_a_gpu(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--preset", "1.5b"])
    assert script.run() == 64
    said = capsys.readouterr().err
    assert "no CUDA device" in said and "--quick" in said
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--sessions", "0"])
    with pytest.raises(SystemExit, match="64"):
        script.run()
