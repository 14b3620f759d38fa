"""The how-to pages: their plans pass, their commands and links are there, and their figures are those of the code."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from harness import wire
from harness.cli.main import app
from harness.deploy.config import GPU_BATCH, GPU_SESSIONS, Deployment
from harness.deploy.flags import STUB_MEMORY, shared_memory_needed
from harness.planfile import load_plan
from harness.vibevoice.process import kv_limits

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
TEXT = {page.name: page.read_text() for page in PAGES}
GPU_HOST = " ".join(TEXT["gpu-host.md"].split())


def every(pattern: str) -> list[tuple[str, str]]:
    return [(name, found) for name, text in TEXT.items() for found in re.findall(pattern, text, re.DOTALL)]


@pytest.mark.parametrize(("page", "text"), every(r"```yaml\n(.*?)```"))
def test_a_plan_in_a_page_passes(tmp_path, page, text):
    (tmp_path / "plan.yaml").write_text(text)
    plan = load_plan(tmp_path / "plan.yaml")
    assert (plan.preset, plan.device, plan.gpus) == ("1.5b", "gpu", 1)


@pytest.mark.parametrize(("page", "command"), every(r"(?:`|    |DEVICES=\d )(harness [a-z][^`\n#]*)"))
def test_a_command_in_a_page_is_one_with_these_options(page, command):
    name, *words = command.split()[1:]
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"})
    assert shown.exit_code == 0, shown.output
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert re.search(rf"{option}\s", shown.output), option


@pytest.mark.parametrize(("page", "target"), every(r"make ([a-z-]+)"))
def test_a_target_of_make_in_a_page_is_there(page, target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("page", "path"), every(r"`?(benchmarks/[a-z/._-]+\.(?:py|sh|txt))"))
def test_a_file_named_in_a_page_is_there(page, path):
    assert (ROOT / path).is_file()


def test_every_page_is_linked_from_the_readme_and_its_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text()
    assert all(f"](docs/how-to/{page.name})" in readme for page in PAGES)
    for page in PAGES:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), link


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
    share = float(re.search(r"\(([\d.]+) x the card's memory", GPU_HOST)[1])
    terms = [(int(n), float(gib)) for n, gib in re.findall(r"\((\d+) \+ LLM instances\) x ([\d.]+) GiB", GPU_HOST)]
    assert len(terms) == 2
    for instances in (1, 2, 3):
        by_the_page = (
            share * (80 << 30) - (6 << 30) - sum((n + instances) * gib * 2**30 for n, gib in terms)
        ) / instances
        assert kv_limits.card_room(80 << 30, 6 << 30, instances, 128) == int(by_the_page)


def test_limits_in_the_gpu_page_are_those_of_a_gpu_deployment():
    assert f"batches of up to {GPU_BATCH}, and the entry {GPU_SESSIONS} sessions" in GPU_HOST
    configs = Deployment(preset="1.5b", device="gpu", gpus=4).configs()
    assert all(list(configs[stage].instance_group[0].gpus) == [0, 1, 2, 3] for stage in wire.STAGES)
    assert list(configs[wire.VOICE].instance_group[0].gpus) == [0] and "the voice encoder on GPU 0 alone" in GPU_HOST
    limited = Deployment(parameters={f"{wire.LLM}.kv_limit_bytes": "40e9"}).configs()
    assert limited[wire.LLM].parameters["kv_limit_bytes"].string_value == "40000000000"
