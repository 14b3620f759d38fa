"""The README's commands run as they stand there, and its figures are those of the stored sample run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SAMPLE = ROOT / "results" / "sample-quick"
BIN = Path(sys.executable).parent
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def test_the_readme_starts_with_the_two_commands_and_ci_runs_the_second():
    first, second = [line.split("#")[0].strip() for line in README.splitlines()[2:4]]
    assert (first, second) == ("make signoff", "make test")
    assert "make test\n" in (ROOT / ".ci" / "run").read_text()
    dry = subprocess.run(["make", "-n", "signoff"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "harness signoff scenarios/quick.yaml" in dry.stdout


def test_its_table_is_the_stored_samples():
    plan = json.loads((SAMPLE / "plan.json").read_text())
    rows = re.findall(r"^\| *([\d.]+) \| *(\d+) \| *(\d+) to (\d+) \|", README, re.MULTILINE)
    stored = [(f"{row['qps']:g}", str(row["devices"]), *map(str, row["interval"])) for row in plan["targets"]]
    assert rows == stored
    assert plan["unit"] in README and f"**{plan['verdict']}**" in README


def test_every_file_it_links_to_is_there():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The repository as a user would see it, with a copy of the sample run that commands may write to."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("scenarios", "model_repository"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(SAMPLE, folder / "results" / "sample-quick")
    return folder


@pytest.fixture(scope="module")
def served(folder):
    """`harness serve`, as the README has it running in another terminal."""
    process = subprocess.Popen([BIN / "harness", "serve"], stdout=subprocess.PIPE, text=True, cwd=folder)
    assert "127.0.0.1:" in process.stdout.readline()
    yield
    process.send_signal(signal.SIGINT)
    process.wait(20)


@pytest.mark.server
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_as_it_stands(command, folder, served):
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=180
    )
    said = result.stdout + result.stderr
    # 3: a measurement on a busy machine may be INVALID, and says so; the command itself works
    assert result.returncode == 0 or (command.startswith("locust") and result.returncode == 3), said
    assert "Traceback" not in said
    if command.startswith("locust"):
        assert "NOT EQUAL" not in said and "0 error" in said and re.search(r"[1-9]\d* done", said), said
