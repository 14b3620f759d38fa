"""benchmarks/gpu/device.py: a file that is whole at any moment, parts that fail alone, and a run on a CPU."""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness import wire
from harness.errors import InputError
from harness.vibevoice.profiling import sampling
from harness.vibevoice.profiling.device_time import BusyTime, DeviceActivity, DeviceTimer
from harness.vibevoice.stages.diffusion import DiffusionStage
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import Weights
from harness.vibevoice.stages.vocoder import VocoderStage

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu" / "device.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_device", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def weights():
    return Weights("tiny", plain=True)


def asked(script, *arguments):
    return script.checked(script.parser().parse_args(["--quick", "--device", "cpu", *arguments]))


def facts(weights=None):
    return {"device": "fake", "preset": "tiny", "dtype": "bfloat16"}


def test_every_finding_is_in_the_file_at_once(script, tmp_path):
    findings = script.Findings(tmp_path / "device.json", **facts())
    for number in range(1, 4):
        findings.add("steps", stage="x", ms=float(number), odd=float("nan"))
        content = json.loads((tmp_path / "device.json").read_text())
        assert [step["ms"] for step in content["steps"]] == [1.0, 2.0, 3.0][:number]
        assert content["steps"][0]["odd"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["device.json"]


def test_a_write_that_breaks_off_leaves_the_findings_before_it(script, tmp_path, monkeypatch):
    findings = script.Findings(tmp_path / "device.json", **facts())
    findings.add("steps", stage="x", ms=1.0)
    monkeypatch.setattr(script.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="device.json: No space left"):
        findings.add("steps", stage="y", ms=2.0)
    assert [step["stage"] for step in json.loads((tmp_path / "device.json").read_text())["steps"]] == ["x"]


@pytest.fixture
def device(script, weights):
    """As if on a GPU: a profiler that answers, and captures that do what a test says."""
    made = script.Device(weights, asked(script), script.Findings(None, **facts()))
    made.on_gpu = True
    made.timer = DeviceTimer({"profiler": lambda call: BusyTime(0.01, launches=5, copies=2)})
    return made


def test_a_step_holds_kernels_busy_time_and_operators(script, device, monkeypatch):
    activities = [
        DeviceActivity("gemm", True, 0, 3),
        DeviceActivity("copy", False, 3, 4),
        DeviceActivity("gemm", True, 4, 6),
    ]
    monkeypatch.setattr(script, "recorded", lambda call: call() or activities)
    square = torch.ones(2, 2)
    cost = SimpleNamespace(bytes=7, operations=1e9)
    device.step(
        "stage",
        lambda batch: (itertools.repeat(lambda: [square @ square for _ in range(3)] and None), cost),
        {"batch": 4},
    )
    (step,) = device.findings.content["steps"]
    assert (step["stage"], step["batch"], step["launches"], step["copies"], step["operators"]) == ("stage", 4, 5, 2, 3)
    assert step["device_ms_from"] == "profiler" and step["device_ms"] <= step["ms"]
    assert step["kernels"] == [{"name": "gemm", "count": 2, "us": 5.0}, {"name": "copy", "count": 1, "us": 1.0}]


def test_a_step_that_fails_is_told_and_the_next_one_is_measured(device):
    def failing(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    device.timer = DeviceTimer({})
    device.step("stage", failing, {"batch": 64})
    device.step(
        "stage", lambda batch: (itertools.repeat(lambda: None), SimpleNamespace(bytes=1, operations=1)), {"batch": 1}
    )
    assert [step["batch"] for step in device.findings.content["steps"]] == [1]
    (error,) = device.findings.content["errors"]
    assert "64" in error["where"] and error["error"] == "OutOfMemoryError: CUDA out of memory"


def test_a_capture_that_fails_is_a_finding_with_its_text(script, device, monkeypatch):
    def refused(call):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(script, "captured", refused)
    device.part("denoising", {"batch": 2}, lambda: lambda: torch.ones(2) + 1)
    replays = []
    monkeypatch.setattr(script, "captured", lambda call: SimpleNamespace(replay=lambda: replays.append(1)))
    device.part("towers", {"batch": 2}, lambda: lambda: torch.ones(2) + 1)
    failed, fine = device.findings.content["graphs"]
    assert failed["error"] == "RuntimeError: operation not permitted when stream is capturing"
    assert failed["eager_ms"] > 0 and failed["operators"] == 2 and "replay_ms" not in failed
    assert fine["replay_ms"] >= 0 and replays and "error" not in fine
    assert not device.findings.content["errors"]
    shown = script.tables(device.findings.content)
    assert "no graph of denoising: RuntimeError: operation not permitted" in shown


PARTS = {
    "LLM backbone": (LLMStage, lambda script, stage: script.backbone_call(stage, 2, 400)),
    "denoising": (DiffusionStage, lambda script, stage: script.denoising_call(stage, 64, 2, 3)),
    "vocoder towers": (VocoderStage, lambda script, stage: script.towers_call(stage, 2)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_captured_computes_the_same_at_every_call(script, part, dtype):
    """What a replay would do: a call that leaves its own inputs alone."""
    stage_type, build = PARTS[part]
    with torch.inference_mode():
        call = build(script, stage_type(Weights("tiny", plain=True, dtype=dtype)))
        first, again = ([tensor.clone() for tensor in _tensors(call())] for _ in range(2))
    assert first and all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert all(torch.isfinite(tensor).all() for tensor in first)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_every_step_and_part_runs_in_the_dtype_of_a_gpu_and_as_many_points_are_timed_as_announced(
    script, monkeypatch, on_gpu
):
    """In float32, an input of the wrong dtype does not show; with too few points announced, the last have no time."""
    monkeypatch.setattr(script, "captured", lambda call: SimpleNamespace(replay=call))
    monkeypatch.setattr(sampling, "_SHORTEST_S", 0.0)
    monkeypatch.setattr(sampling, "_MOST", sampling._FEWEST)  # how sure the times are is no matter here
    several = asked(script)
    several.batches, several.contexts, several.steps = [1, 2], [100, 400], 2
    device = script.Device(Weights("tiny", plain=True, dtype="bfloat16"), several, script.Findings(None, **facts()))
    device.on_gpu, device.sampler.points_left = on_gpu, script.points_of(several, on_gpu)
    device.run()
    content = device.findings.content
    assert content["errors"] == [] and device.sampler.points_left == 0
    assert (len(content["steps"]), len(content["graphs"])) == (8, 8)
    assert all(("replay_ms" in part) == on_gpu and part["eager_ms"] > 0 for part in content["graphs"])


@pytest.mark.parametrize(("preset", "label"), [("1.5b", "1.5b"), ("7b", "7b"), ("sizes/mine-0.5b.json", "mine-0.5b")])
def test_the_label_of_a_preset_keeps_its_dots(script, weights, preset, label):
    assert script.facts_of(weights, preset)["preset"] == label


def _tensors(value):
    return [value] if isinstance(value, torch.Tensor) else list(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "1,,4"], "not a list of whole numbers"),
        (["--batches", "0"], "not a list of whole numbers"),
        (["--budget-seconds", "nan"], "not a number of seconds"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_a_mistake_is_one_line(script, capsys, arguments, message):
    with pytest.raises(SystemExit, match="64"):
        script.main(arguments)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--steps", "0"], "--steps 0"), (["--contexts", "20"], "--contexts 20"), (["--preset", "2b"], "unknown preset")],
)
def test_what_no_model_can_do_is_refused(script, arguments, message):
    with pytest.raises(InputError, match=message):
        script.main(arguments)


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_built(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "Weights", lambda *_, **__: pytest.fail("it was built"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="give another --out"):
        script.main(["--out", str(tmp_path / "file" / "gpu")])


def test_help_ends_with_an_example(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    assert "Example:\n  python benchmarks/gpu/device.py" in capsys.readouterr().out


def test_it_runs_through_on_a_cpu(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--device", "cpu", "--out", str(tmp_path)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert answer.returncode == 0, answer.stderr
    *shown, last = answer.stdout.splitlines()
    content = json.loads(last)
    assert content == json.loads((tmp_path / "device.json").read_text())
    assert content["measured_on"] == "cpu" and content["errors"] == []
    assert [step["stage"] for step in content["steps"]] == list(wire.STAGES)
    assert all(step["device_ms_from"] == "cpu" and step["operators"] > 20 for step in content["steps"])
    assert len(content["graphs"]) == 3 and all("no CUDA graphs" in part["error"] for part in content["graphs"])
    assert content["speed"]["bandwidth_gb_s"] > 0 and max(map(len, shown)) <= 80
