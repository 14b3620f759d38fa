"""benchmarks/gpu/towers.py: a run on a CPU, by Triton's interpreter, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HAS_GPU

pytest.importorskip("triton", reason="the package triton is not installed (CPU builds of torch come without it)")
ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "benchmarks/gpu/towers.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)


def test_a_quick_run_finds_both_towers_right_and_times_every_layer():
    done = run("--quick")
    figures = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and figures["preset"] == "tiny"
    assert [(row["tower"], row["sessions"]) for row in figures["towers"]] == [("decoder", 1), ("encoder", 1)]
    for row in figures["towers"]:
        assert row["kernels"] == 15 and row["operators"] >= 7  # stem, head, 6 layers between and 7 blocks; products
        assert 0 <= row["difference"] < 0.15 and row["plain_ms"] > 0
    for tower in ("decoder", "encoder"):
        assert sum(row["layers"] for row in figures["layers"] if row["tower"] == tower) == 15


@pytest.mark.skipif(HAS_GPU, reason="a GPU gives figures")
def test_figures_are_refused_without_a_gpu():
    done = run("--preset", "1.5b")
    assert done.returncode == 64 and "no CUDA device" in done.stderr and "--quick" in done.stderr
    assert run("--sessions", "0").returncode == 64
