"""benchmarks/gpu/streams.py: what Triton counted for each model, as figures of an execution and of a request."""

import importlib.util
from pathlib import Path

import pytest
from rich.console import Console

from harness import wire
from harness.records.schema import BatchStatistics, StageStatistics

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "streams.py"
MS = 1_000_000


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_streams", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_compute_is_that_of_an_execution_and_queue_that_of_a_request(script):
    """Triton counts a batch's compute time once for each of its requests, and once in its batch statistics."""
    batches = (BatchStatistics(1, 2, 2 * 10 * MS), BatchStatistics(4, 2, 2 * 30 * MS))
    llm = StageStatistics(wire.LLM, 10, 4, 50 * MS, 2 * 10 * MS + 8 * 30 * MS, batches)
    idle = StageStatistics(wire.VOICE, 0, 0, 0, 0)
    assert script.models([llm, idle]) == {
        wire.LLM: {"executions": 4, "mean_batch": 2.5, "queue_ms": 5.0, "compute_ms": 20.0}
    }


def test_a_model_without_batch_counts_has_the_time_of_its_requests(script):
    frame = StageStatistics(wire.FRAME, 5, 5, 0, 5 * 40 * MS)
    assert script.models([frame])[wire.FRAME] == {
        "executions": 5,
        "mean_batch": 1.0,
        "queue_ms": 0.0,
        "compute_ms": 40.0,
    }


def test_the_tables_name_every_model_whole_within_80_columns(script):
    figures = {"executions": 123_456, "mean_batch": 127.5, "queue_ms": 1234.56, "compute_ms": 1234.56}
    load = {"streams": 128, "frames_per_s": 13_000.0, "frame_ms_p50": 1118.4, "frame_ms_p95": 1192.0, "failed": 0}
    load["models"] = dict.fromkeys((wire.ENTRY, wire.FRAME, *wire.STAGES, wire.VOICE), figures)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    for each in script.tables("1.5b", "NVIDIA H100 80GB HBM3", [load, load]):
        console.print(each)
    shown = console.export_text()
    assert all(shown.count(f" {model} ") == 2 for model in load["models"])
    assert shown.count("1234.6") == 2 * 2 * len(load["models"]) and max(map(len, shown.splitlines())) <= 80
