"""What is taken from the NVIDIA driver, whatever it says; and from Triton's metrics of another host's GPUs."""

from types import SimpleNamespace

import pynvml
import pytest

from harness.deploy import sampler
from harness.host import nvml, provenance
from harness.records.schema import GpuSample

GIB = 1 << 30


@pytest.fixture
def driver(monkeypatch):
    """``driver(count, untold=(), error=None)``: a host with so many GPUs, which do not tell some things."""

    def install(count, untold=(), error=None):
        def ask(name, answer):
            def answered(*_):
                if name in untold:
                    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
                return answer

            return answered

        def begin():
            if error is not None:
                raise pynvml.NVMLError(error)

        answers = {
            "SystemGetDriverVersion": "580.1",
            "DeviceGetCount": count,
            "DeviceGetName": "NVIDIA H100",
            "DeviceGetMemoryInfo": SimpleNamespace(total=80 * GIB, free=79 * GIB, used=GIB),
            "DeviceGetUtilizationRates": SimpleNamespace(gpu=90),
            "DeviceGetPowerUsage": 412_500,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, f"nvml{name}", ask(name, answer))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda handle: f"GPU-{handle}a")
        monkeypatch.setattr(pynvml, "nvmlInit", begin)
        nvml._open.cache_clear()

    yield install
    nvml._open.cache_clear()


def test_every_gpu_is_told_and_sampled(driver):
    driver(4)
    found = nvml.gpus()
    assert [gpu.index for gpu in found] == [0, 1, 2, 3] and len({gpu.uuid for gpu in found}) == 4
    assert (found[3].name, found[3].memory_bytes, found[3].free_bytes) == ("NVIDIA H100", 80 * GIB, 79 * GIB)
    assert nvml.load() == tuple(GpuSample(f"GPU-{i}a", 90.0, GIB, 412.5) for i in range(4))
    assert provenance.host_facts().gpu.splitlines() == ["NVIDIA H100, driver 580.1, 81920 MiB"] * 4


@pytest.mark.parametrize("untold", ["DeviceGetMemoryInfo", "DeviceGetUtilizationRates", "DeviceGetPowerUsage"])
def test_a_gpu_that_does_not_tell_all_is_no_error(driver, untold):
    driver(1, untold=(untold,))
    (sample,) = nvml.load()
    assert [sample.percent, sample.memory_bytes, sample.power_w].count(None) == 1
    assert len(nvml.gpus()) == 1


def test_a_host_without_a_driver_has_no_gpu_and_one_whose_driver_fails_says_so(driver, monkeypatch, tmp_path):
    driver(0, error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    monkeypatch.setattr(nvml, "CONTROL_FILE", str(tmp_path / "nvidiactl"))
    assert nvml.gpus() == nvml.load() == () and provenance.host_facts().gpu == "none"
    (tmp_path / "nvidiactl").touch()
    driver(0, error=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    with pytest.raises(nvml.DriverError, match="mismatch"):
        nvml.gpus()
    assert nvml.present() == nvml.load() == ()


@pytest.mark.parametrize(
    ("allowed", "indices"),
    [(None, [0, 1, 2]), ("", []), ("2", [2]), ("2,0", [2, 0]), ("GPU-1", [1]), ("0,7,1", [0]), ("-1", [])],
)
def test_processes_see_the_gpus_that_cuda_shows_them(driver, monkeypatch, allowed, indices):
    driver(3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if allowed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    assert [gpu.index for gpu in nvml.visible()] == indices


def test_gpus_of_another_host_are_read_from_its_prometheus_page():
    metrics = {
        "nv_gpu_utilization{GPU-b}": 0.5,
        "nv_gpu_memory_used_bytes{GPU-b}": 2e9,
        "nv_gpu_power_usage{GPU-b}": 300.0,
        "nv_gpu_utilization{GPU-a}": 1.0,
        "nv_cpu_utilization": 0.1,
        "nv_inference_pending_request_count{x}": 3.0,
    }
    assert sampler.gpus_of(metrics) == (GpuSample("GPU-a", 100.0), GpuSample("GPU-b", 50.0, 2_000_000_000, 300.0))
