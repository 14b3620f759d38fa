"""benchmarks/gpu/rows.py on a CPU: its help, mistakes, and a run through by Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the package triton is not installed (CPU builds of torch come without it)")
ROOT = Path(__file__).resolve().parents[2]


SCRIPT = ROOT / "benchmarks" / "gpu" / "rows.py"


@pytest.fixture(scope="module")
def script():
    """The script as a module; it finds device.py beside it, as it does when it runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        patch.setenv("TRITON_INTERPRET", "")  # the script sets it: put back afterwards
        spec = importlib.util.spec_from_file_location("gpu_rows", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look there
        spec.loader.exec_module(module)
        del sys.modules["device"]
    return module


@pytest.fixture
def run(script, monkeypatch):
    """Run the script with these arguments in this process: its exit code."""

    def of(*arguments):
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *arguments])
        try:
            return script.run()
        except SystemExit as end:  # of its parser
            return end.code

    return of


def test_steps_answer_alike_with_the_kernels_and_without():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "tests/interpreter.py", "benchmarks/gpu/rows.py", "--quick"]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
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
def test_a_mistake_is_one_line(run, capsys, arguments, message):
    assert run(*arguments) == 64
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_help_ends_with_an_example(run, capsys):
    assert not run("--help")
    assert "Example:\n  python benchmarks/gpu/rows.py --preset" in capsys.readouterr().out
