"""benchmarks/gpu/rows.py on a CPU: its help, mistakes, and a run through by Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the package triton is not installed (CPU builds of torch come without it)")
ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "benchmarks/gpu/rows.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)


def test_steps_answer_alike_with_the_kernels_and_without():
    answer = run("--quick")
    assert answer.returncode == 0, answer.stderr
    *shown, last = answer.stdout.splitlines()
    content = json.loads(last)
    assert [(step["step"], step["sessions"]) for step in content["steps"]] == [
        (step, sessions) for step in ("LLM", "denoising") for sessions in (1, 2)
    ]
    assert all(0 < step["difference"] < 1e-5 and step["fused_ms"] is None for step in content["steps"])
    assert content["device"] == "cpu, interpreted" and max(map(len, shown)) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "1"], "--context takes 2 or more"),
        (["--preset", "2b"], "unknown preset"),
        (["--x"], "see --help"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    answer = run(*arguments)
    assert answer.returncode == 64 and message in answer.stderr and answer.stderr.count("\n") == 1


def test_help_ends_with_an_example():
    assert "Example:\n  python benchmarks/gpu/rows.py --preset" in run("--help").stdout
