"""Stages as Triton's Python backend starts them, with its ``args`` for GPUs: no GPU and no Triton are needed."""

import importlib
import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from made_up_profile import write

from harness import gpu_memory, wire
from harness.errors import InputError
from harness.host import places
from harness.identity import CPU, EMULATED, GPU
from harness.vibevoice.process import kv_limits
from harness.vibevoice.profiling.emulation import EmulatedGPU, EmulatedVocoder
from harness.vibevoice.profiling.times import ProfiledTimes
from harness.vibevoice.stages.llm import LLMStage
from harness.vibevoice.stages.presets import Weights

GIB = 1 << 30


@pytest.fixture
def backend(monkeypatch):
    fake = ModuleType("triton_python_backend_utils")
    fake.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START, fake.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END = 1, 2
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake)
    monkeypatch.delitem(sys.modules, "harness.vibevoice.backend", raising=False)
    yield importlib.import_module("harness.vibevoice.backend")
    sys.modules.pop("harness.vibevoice.backend", None)


@pytest.fixture
def cuda(monkeypatch):
    """``cuda(count)``: what torch says on a host with so many GPUs; ``made_current``: the devices that were set."""
    made_current = []

    def install(count, total=80 * GIB):
        gpu = SimpleNamespace(name="NVIDIA H100", uuid="abc", total_memory=total)
        for name, answer in {
            "is_available": count > 0,
            "device_count": count,
            "get_device_properties": gpu,
            "mem_get_info": (total, total),
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: made_current.append(str(device)))

    install.made_current = made_current
    return install


def args(model=wire.LLM, kind="GPU", device=0, count=1, **parameters):
    given = {"preset": "tiny", "weights_seed": "0", "emulate": "", "gpus": "1", "kv_limit_bytes": "auto", **parameters}
    config = {
        "instance_group": [{"count": count, "gpus": [0, 1]}],
        "parameters": {name: {"string_value": value} for name, value in given.items()},
    }
    return {
        "model_name": model,
        "model_instance_name": f"{model}_0_0",
        "model_instance_kind": kind,
        "model_instance_device_id": str(device),
        "model_repository": "/tmp/models/x",
        "model_config": json.dumps(config),
    }


def test_a_stage_on_gpu_1_makes_it_the_device_of_its_kernels(backend, cuda):
    cuda(2)
    given = backend.weights(args(device=1))
    assert cuda.made_current == ["cuda:1"] and str(given.device) == "cuda:1" and given.dtype == torch.bfloat16
    assert backend.weights(args(device=1, dtype="float16")).dtype == torch.float16


def test_a_stage_on_a_cpu_touches_no_gpu(backend, cuda):
    cuda(2)
    assert str(backend.weights(args(kind="CPU")).device) == "cpu" and not cuda.made_current


@pytest.mark.parametrize(
    ("count", "given", "says"),
    [
        (0, args(), "run on GPU 0, but torch .* finds none: install a CUDA build"),
        (1, args(device=1), "run on GPU 1, but torch .* finds 1"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_refused_instead_of_the_cpu_taken(backend, cuda, count, given, says):
    cuda(count)
    with pytest.raises(InputError, match=says):
        backend.device_of(given)


def test_a_stage_that_is_not_where_it_was_asked_to_be_refuses(backend, cuda):
    cuda(1)
    asked_gpu, asked_cpu = args(kind="CPU"), args(kind="GPU")
    for given, device in ((asked_gpu, "gpu"), (asked_cpu, "cpu")):
        content = json.loads(given["model_config"])
        content["parameters"]["device"] = {"string_value": device}
        with pytest.raises(InputError, match=f"must run on a {device}, but Triton gave it a .*KIND_{device.upper()}"):
            backend.device_of(given | {"model_config": json.dumps(content)})


def test_room_for_kv_caches_is_what_the_gpu_has_beside_all_weights(backend, cuda):
    cuda(1)
    shapes = Weights("1.5b", device="meta")
    shapes.device, shapes.graph_batch = torch.device("cuda:0"), 128
    weights_gib = 2 * sum(shapes.parameters().values()) / GIB
    assert 5 < weights_gib < 6  # of 2.7 G numbers in bfloat16
    alone, process_gib = backend.kv_room(args(), shapes) / GIB, gpu_memory.PROCESS_BYTES / GIB
    assert alone == pytest.approx(0.9 * 80 - weights_gib - 4 * process_gib - 3, abs=0.01)
    shared = backend.kv_room(args(count=2), shapes) / GIB  # a second LLM process: its own weights, half of the rest
    assert shared < alone / 2 and 2 * shared == pytest.approx(
        alone - 2 * shapes.parameters()["llm"] / GIB - process_gib - 1, abs=0.01
    )
    assert backend.kv_room(args(kv_limit_bytes="1000000"), shapes) == 1_000_000
    assert backend.kv_room(args(kind="CPU"), Weights("tiny")) == kv_limits.HOST_BYTES
    cuda(1, total=8 * GIB)
    with pytest.raises(InputError, match="does not fit this GPU: its weights need 5.* of 8.0 GiB; choose"):
        backend.kv_room(args(), shapes)


def test_a_stage_says_what_it_computes_with(backend, cuda, tmp_path):
    cuda(2)
    said = backend.identity_of(args(kind="CPU"), LLMStage(Weights("tiny"), 1 << 20))
    assert (said.kind, said.device, said.dtype, said.preset, said.weights) == (
        CPU,
        "cpu",
        "float32",
        "tiny",
        "random, seed 0",
    )
    assert (said.kv_limit_bytes, said.kv_bytes_per_token) == (1 << 20, 512)
    assert said.code == str(places.CODE) and said.versions["torch"] == torch.__version__ and said.code_digest
    on_gpu = SimpleNamespace(device=torch.device("cuda:1"), dtype=torch.bfloat16)
    said = backend.identity_of(args(wire.VOCODER, device=1), on_gpu)
    assert (said.kind, said.device, said.dtype) == (GPU, "cuda:1", "bfloat16")
    assert (said.gpu, said.gpu_uuid, said.gpu_memory_bytes) == ("NVIDIA H100", "GPU-abc", 80 * GIB)
    assert said.instance == f"{wire.VOCODER}_0_0@1"
    emulated = EmulatedVocoder(ProfiledTimes(write(tmp_path / "h200.json")), EmulatedGPU(tmp_path / "gpu"))
    said = backend.identity_of(args(), emulated)
    assert (said.kind, said.device, said.dtype) == (EMULATED, "emulated NVIDIA H200", "bfloat16")
    assert backend.identity_of(args(wire.ENTRY)).preset == ""


def test_an_emulated_gpu_has_the_room_that_the_measured_one_had(backend):
    profile = SimpleNamespace(sizes=SimpleNamespace(kv_room_bytes=100 * GIB))
    room = lambda count, gpus, **more: backend._emulated_kv_room(args(count=count, gpus=gpus, **more), profile)  # noqa: E731
    assert room(1, "1") == room(4, "4") == 100 * GIB
    assert room(8, "4") == 50 * GIB
    assert room(1, "1", kv_limit_bytes="7") == 7


def test_a_process_that_serves_loads_no_package_that_only_readers_of_records_need():
    """Pandas and scipy took a fifth of a stage's start, in every process of a server."""
    code = (
        "import sys; from unittest.mock import MagicMock\n"
        "sys.modules['triton_python_backend_utils'] = MagicMock()\n"
        "import harness.vibevoice.entry.endpoint\n"
        "print([name for name in ('pandas', 'scipy', 'pyarrow', 'torch', 'numba', 'grpc') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
