"""The commands of the README and the docs run as they stand there; figures are those of the stored sample run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import make_sample
import pages
import pytest
import yaml

from harness.deploy.config import Deployment, read_config
from harness.errors import InputError
from harness.planfile.reading import load_plan
from harness.records.store import Run
from harness.report.seal import check_seal, sign

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SAMPLE = ROOT / "results" / "sample-quick"
BIN = Path(sys.executable).parent
COMMANDS = pages.run_commands()
VERBS = re.findall(r"(?m)^\| (?:deploy|drive|sweep|capacity|report) \|.*\| `(.+)` \|$", README)
FUSED = pages.PAGES["docs/how-to/fused-topology.md"]


def test_the_readme_starts_with_the_two_commands_and_ci_runs_the_second():
    first, second = [line.split("#")[0].strip() for line in README.splitlines()[2:4]]
    assert (first, second) == ("make signoff", "make test")
    assert "make test\n" in (ROOT / ".ci" / "run").read_text()
    dry = subprocess.run(["make", "-n", "signoff"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "harness signoff scenarios/quick.yaml" in dry.stdout


@pytest.mark.parametrize("name", make_sample.SAMPLES)
def test_tables_are_those_of_the_stored_samples(name):
    plan = Run.open(make_sample.SAMPLES[name]).plan()
    stored = make_sample.table(plan)
    page = make_sample.PAGES[name].read_text()
    assert f"<!-- table of {name} -->\n{stored}<!-- end of table -->" in page, "run `make sample`"
    assert all(f"| {row.qps:g} | {row.devices or '–'} |" in stored for row in plan.targets)


def test_its_estimates_are_stored_and_what_the_command_gives_today(tmp_path):
    stored = make_sample.stored_estimate()
    assert f"<!-- table of estimates -->\n{make_sample.estimate_table(stored)}<!-- end of table -->" in README
    command = "harness plan --card h100,l40s --qps 1,10"
    assert f"`{command}`" in README
    arguments = [*command.split()[1:], "--accept-estimates", "--out", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "harness", *arguments], check=True, capture_output=True, cwd=ROOT)
    again = json.loads((tmp_path / "estimate.json").read_text())
    assert [each["targets"] for each in again["cards"]] == [each["targets"] for each in stored.to_dict()["cards"]]
    assert {card.basis for card in stored.cards} == {"estimated"}


def test_the_minutes_of_a_first_answer_are_the_stored_samples():
    manifest = Run.open(SAMPLE).manifest
    taken = datetime.fromisoformat(manifest.finished_at) - datetime.fromisoformat(manifest.created_at)
    minutes = round(taken.total_seconds() / 60)
    first, last = re.search(r"\((\d) to (\d) minutes\)", pages.PAGES["docs/tutorial.md"]).groups()
    assert f"(about {minutes} minutes on two cores)" in pages.PAGES["docs/tutorial.md"]
    whole = f"{minutes + int(first)} to {minutes + int(last)} minutes on two cores"
    assert whole in README and whole in pages.PAGES["docs/index.md"]


def test_a_sample_is_taken_from_a_finished_run_only_as_it_was_signed(tmp_path):
    source, sample = tmp_path / "quick-1a2b3c4d", tmp_path / "sample"
    shutil.copytree(SAMPLE, source)
    run = Run.open(source)
    run.update_manifest(finished_at=datetime.now(UTC).isoformat(timespec="seconds"))
    sign(run)
    (source / ".lock").touch()
    make_sample.take(source, sample)
    assert Run.open(sample).plan() == Run.open(source).plan() and not (sample / ".lock").exists()
    assert check_seal(sample).problems == ()
    assert (
        "tmp_path" not in (sample / "signoff.html").read_text() and sample.name in (sample / "signoff.html").read_text()
    )
    (source / "plan.json").write_text("{}")
    with pytest.raises(InputError, match="plan.json was changed"):
        make_sample.take(source, sample)


def test_it_is_a_screen_and_a_half_with_an_example_of_each_verb():
    assert len(README.splitlines()) <= 100
    assert [each.split()[0] for each in VERBS] == ["harness", "locust", "harness", "harness", "harness"]
    not_run = ["harness serve", "harness sweep scenarios/sweep.yaml"]  # it runs below; it takes 13 minutes
    assert [each for each in VERBS if each not in COMMANDS] == not_run


def test_the_plan_and_the_repository_of_the_two_topologies(tmp_path):
    (space,) = [text for page, text in pages.blocks("yaml") if page == "docs/how-to/fused-topology.md"]
    plan = yaml.safe_load((ROOT / "scenarios" / "quick.yaml").read_text()) | yaml.safe_load(space)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    points = load_plan(tmp_path / "plan.yaml").points()
    assert [point["topology"] for point in points] == ["staged"] * 2 + ["fused"] * 2
    (tmp_path / "model_repository").symlink_to(ROOT / "model_repository")
    script = "\n".join(re.findall(r"(?m)^    (?!harness)(.+)", FUSED))
    subprocess.run(script, shell=True, cwd=tmp_path, check=True)
    expected = Deployment(topology="fused").configs()
    assert {each.name for each in (tmp_path / "fused").iterdir()} == set(expected)
    for model, config in expected.items():
        assert read_config(tmp_path / "fused" / model / "config.pbtxt") == config


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
    """`harness serve`, as the tutorial has it running in another terminal."""
    process = subprocess.Popen([BIN / "harness", "serve"], stdout=subprocess.PIPE, text=True, cwd=folder)
    assert "127.0.0.1:" in process.stdout.readline()
    yield
    process.send_signal(signal.SIGINT)
    process.wait(120)


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
