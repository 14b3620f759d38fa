"""The page on GPU hosts: its figures are those of the code. What holds of every page is in test_pages.py."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

from harness import gpu_memory, wire
from harness.deploy.config import GPU_BATCH, GPU_SESSIONS, Deployment
from harness.deploy.flags import STUB_MEMORY, shared_memory_needed
from harness.vibevoice.process import kv_limits

ROOT = Path(__file__).resolve().parents[2]
GPU_HOST = " ".join((ROOT / "docs" / "how-to" / "gpu-host.md").read_text().split())


def test_versions_in_the_gpu_page_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    takes = SpecifierSet(project["requires-python"])
    assert [minor for minor in range(9, 16) if f"3.{minor}" in takes] == [11, 12] and "| 3.11 or 3.12 |" in GPU_HOST
    asked = {re.match(r"[a-z-]+", each)[0]: each for each in project["dependencies"]}
    assert asked["torch"] == "torch>=2.11,<=2.13" and "2.11 to 2.13" in GPU_HOST
    assert asked["numpy"] == "numpy>=1.26.4,<2" and "1.26 (below 2)" in GPU_HOST
    assert asked["nvidia-pytriton"] == "nvidia-pytriton==0.7.0" and "`nvidia-pytriton` 0.7.0" in GPU_HOST
    about = metadata.distribution("nvidia-pytriton")
    stubs = Path(about.locate_file("pytriton/tritonserver/python_backend_stubs"))
    minors = sorted(int(each.name.partition(".")[2]) for each in stubs.iterdir())
    assert f"stubs for Python 3.{minors[0]} to 3.{minors[-1]}" in GPU_HOST
    assert "``2.35``" in about.read_text("METADATA") and "glibc 2.35" in GPU_HOST


def test_shared_memory_in_the_gpu_page_is_what_a_server_takes():
    configs = Deployment().configs()
    assert f"{STUB_MEMORY >> 20} MiB a stage process" in GPU_HOST
    assert f"{shared_memory_needed(configs, 1) >> 20} MiB for one GPU" in GPU_HOST
    assert f"{shared_memory_needed(configs, 8) >> 20} MiB for eight" in GPU_HOST
    assert shared_memory_needed(configs, 8) < 1 << 30, "--shm-size=1g would be too little"


def test_the_kv_room_in_the_gpu_page_is_what_the_stage_computes():
    assert f"On a CPU it is {kv_limits.HOST_BYTES >> 30} GiB" in GPU_HOST
    share = float(re.search(r"\(([\d.]+) x the GPU's memory", GPU_HOST)[1])
    terms = [(int(n), float(gib)) for n, gib in re.findall(r"\((\d+) \+ LLM instances\) x ([\d.]+) GiB", GPU_HOST)]
    assert len(terms) == 2
    for instances in (1, 2, 3):
        by_the_page = (
            share * (80 << 30) - (6 << 30) - sum((n + instances) * gib * 2**30 for n, gib in terms)
        ) / instances
        assert gpu_memory.gpu_room(80 << 30, 6 << 30, instances, 128) == int(by_the_page)


def test_limits_in_the_gpu_page_are_those_of_a_gpu_deployment():
    assert f"batches of up to {GPU_BATCH}, and the entry {GPU_SESSIONS} sessions" in GPU_HOST
    configs = Deployment(preset="1.5b", device="gpu", gpus=4).configs()
    assert all(list(configs[stage].instance_group[0].gpus) == [0, 1, 2, 3] for stage in wire.STAGES)
    assert list(configs[wire.VOICE].instance_group[0].gpus) == [0] and "the voice encoder on GPU 0 alone" in GPU_HOST
    limited = Deployment(parameters={f"{wire.LLM}.kv_limit_bytes": "40e9"}).configs()
    assert limited[wire.LLM].parameters["kv_limit_bytes"].string_value == "40000000000"
