"""The harness as `pip install .` leaves it: built, installed apart from any checkout, and used from an empty folder."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from harness.deploy import stub
from harness.host import places
from harness.planfile.reading import load_mix
from harness.records.store import Run
from harness.runs.opening import spec_of

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
WHERE = "\n".join(
    (
        "from harness.host import places, provenance",
        "print(places.REPOSITORY, places.ROOT, provenance.commit(), sep='\\n')",
    )
)


def run(command, cwd, **more):
    return subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=280, **more)


def done(command, cwd, **more):
    result = run(command, cwd, **more)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def tracked() -> list[str]:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    return [name for name in done(listed, ROOT).split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkout as it is now, under a commit of its own, and without what git leaves out."""
    folder = tmp_path_factory.mktemp("source")
    for name in tracked():
        if not name.startswith(("results/", "tests/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    who = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["git", "init", "-q"], ["git", "add", "-A"], [*who, "commit", "-q", "-m", "now"]):
        done(command, folder)
    return folder


def commit_of(source: Path) -> str:
    return done(["git", "rev-parse", "HEAD"], source).strip()


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    done([*PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, "."], source)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The bin folder of an environment with the wheel in it, and all else that this one has, but its harness."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    (stub.packages_of(folder) / "others.pth").write_text("\n".join(stub.search_path()[1:]))
    done([*PIP, "--python", folder / "bin" / "python", "install", "-q", "--no-deps", wheel], folder)
    return folder / "bin"


@pytest.fixture
def empty(tmp_path):
    """An empty folder, with no harness serving from it."""
    return tmp_path


def test_the_wheel_holds_every_package_every_model_and_every_scenario(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in tracked():
        if name.startswith(("harness/", "model_repository/", "scenarios/", "ops/kubernetes/")):
            inside = name if name.startswith("harness/") else f"harness/{name}"
            assert inside in names, f"{name} is left out: see package_data in setup.py"
    assert not [
        name for name in names if name.startswith(("tests", "results", "model_repository", "benchmarks", "ops"))
    ]


def test_the_wheel_names_the_commit_that_it_was_built_from(wheel, source):
    assert zipfile.ZipFile(wheel).read("harness/commit.txt").decode().strip() == commit_of(source)


def test_a_source_archive_builds_the_same_wheel(source, wheel, tmp_path):
    code = "from setuptools import build_meta; print(build_meta.build_sdist({!r}))"
    done([sys.executable, "-c", code.format(str(tmp_path))], source)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = next(path for path in tmp_path.iterdir() if path.is_dir())
    assert places.checkout_of(unpacked) == unpacked
    done([*PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."], unpacked)
    again = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    assert {name for name in again.namelist() if "RECORD" not in name} == {
        name for name in zipfile.ZipFile(wheel).namelist() if "RECORD" not in name
    }
    assert again.read("harness/commit.txt").decode().strip() == commit_of(source)


def test_an_editable_install_is_the_checkout(source, tmp_path):
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (stub.packages_of(tmp_path / "venv") / "others.pth").write_text("\n".join(stub.search_path()[1:]))
    editable = [*PIP, "--python", python, "install", "-q", "--no-deps", "--no-build-isolation", "-e", source]
    done(editable, tmp_path)
    repository, root, commit = done([python, "-c", WHERE], tmp_path).splitlines()
    assert (repository, root) == (str(source / "model_repository"), str(source))
    assert commit.removesuffix("-dirty") == commit_of(source)


def test_it_keeps_its_state_in_the_folder_where_it_is_started(installed, empty, source):
    repository, root, commit = done([installed / "python", "-c", WHERE], empty).splitlines()
    packages = stub.packages_of(installed.parent)
    assert (repository, root) == (str(packages / "harness" / "model_repository"), str(empty))
    assert commit == f"{commit_of(source)} (installed, version 0.1.0)"
    first = done([installed / "python", "-c", "from harness.deploy import stub; print(stub.search_path()[0])"], empty)
    assert first.strip() == str(packages)


def test_its_commands_work_from_an_empty_folder(installed, empty):
    assert "signoff" in done([installed / "harness", "--help"], empty)
    assert str(installed.parent) in done([installed / "harness", "doctor"], empty, env={**os.environ, "COLUMNS": "300"})
    listed = done([installed / "harness", "scenarios"], empty, env={**os.environ, "COLUMNS": "300"})
    assert {"podcast.py", "quick.yaml", "example.txt", "mixes/answers.yaml"} <= set(listed.split())
    podcast = done([installed / "harness", "scenarios", "podcast"], empty).strip()
    assert Path(podcast).is_file()
    assert "--records" in done([installed / "python", "-m", "locust", "-f", podcast, "--help-speech"], empty)
    assert not list(empty.iterdir())


def test_a_plan_is_exported_from_an_empty_folder(installed, empty):
    """The manifests that an export changes come with the package."""
    sample = ["--run", ROOT / "results" / "sample-quick", "--qps", "5", "--out", "fleet", "--force"]
    assert "3 servers" in done([installed / "harness", "export", "kubernetes", *sample], empty)
    base = {path.name: path.read_text() for path in (ROOT / "ops" / "kubernetes" / "base").iterdir()}
    assert {path.name: path.read_text() for path in (empty / "fleet" / "base").iterdir()} == base


def test_scenarios_are_copied_and_never_over_others(installed, empty):
    done([installed / "harness", "scenarios", "--copy", "mine"], empty)
    copied = {str(path.relative_to(empty / "mine")) for path in (empty / "mine").rglob("*") if path.is_file()}
    assert copied == set(places.scenario_files())
    (empty / "mine" / "quick.yaml").write_text("changed")
    again = run([installed / "harness", "scenarios", "--copy", "mine"], empty)
    assert again.returncode == 64 and "already exists" in again.stderr
    assert (empty / "mine" / "quick.yaml").read_text() == "changed"
    unknown = run([installed / "harness", "scenarios", "nosuch"], empty)
    assert unknown.returncode == 64 and "podcast.py" in unknown.stderr


PLANNED = """
from pathlib import Path
from harness.host.places import plan_file
from harness.planfile.reading import load_plan
from harness.runs.opening import open_run
plan = plan_file(Path("quick"))
run = open_run(plan, load_plan(plan), Path("results"), None)
print(run.path)
"""


def test_a_plan_is_found_by_its_bare_name_and_its_run_is_read_from_anywhere(installed, empty, source):
    path = empty / done([installed / "python", "-c", PLANNED], empty).strip()
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["plan_path"] == "quick" and manifest["commit"].startswith(commit_of(source))
    code = "from harness.runs.opening import spec_of; from harness.records.store import Run; "
    code += f"print(spec_of(Run.open({str(path)!r})).name)"
    assert done([installed / "python", "-c", code], "/").strip() == "quick"
    assert runs_of(ROOT, path) == "quick"


def runs_of(cwd, path) -> str:
    """The plan's name as a checkout reads the run of an installed harness."""
    return spec_of(Run.open(path)).name


@pytest.mark.parametrize("checkout", [True, False])
def test_a_plan_of_ones_own_comes_before_one_that_came_along(tmp_path, monkeypatch, checkout):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "CHECKOUT", ROOT if checkout else None)
    packaged = places.SCENARIOS / "quick.yaml"
    assert places.plan_file(Path("quick")) == places.plan_file(Path("quick.yaml")) == packaged
    assert places.plan_file(Path("other/quick")) == Path("other/quick")
    assert places.plan_file(Path("nosuch")) == Path("nosuch")
    assert places.plan_of_name(places.plan_name(packaged)).resolve() == packaged
    (tmp_path / "quick").mkdir()  # a folder is no plan
    assert places.plan_file(Path("quick")) == packaged
    own = tmp_path / "quick.yaml"
    own.write_text("name: mine")
    assert places.plan_file(Path("quick.yaml")) == Path("quick.yaml")
    assert places.plan_of_name(places.plan_name(Path("quick.yaml"))).resolve() == own


def test_a_dot_inside_a_name_begins_no_file_ending(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "SCENARIOS", tmp_path / "scenarios")
    (tmp_path / "scenarios").mkdir()
    packaged = tmp_path / "scenarios" / "h100-1.5b.yaml"
    packaged.write_text("name: x")
    assert places.plan_file(Path("h100-1.5b")) == places.plan_file(Path("h100-1.5b.yaml")) == packaged
    for name in ("h100-1", "h100-1.7b", "h100-1.5b.json"):
        assert places.plan_file(Path(name)) == Path(name)
    mix = tmp_path / "mix-0.5"
    mix.write_text("classes: {short: {weight: 1, length: {fixed: 4}}}")
    assert load_mix(mix).name == "mix-0.5"
    assert load_mix(mix.rename(tmp_path / "mix-0.5.yaml")).name == "mix-0.5"
    assert places.preset_name("1.5b") == "1.5b" and places.preset_name("sizes/a-1.5b.json") == "a-1.5b"


@pytest.mark.server
def test_it_serves_speaks_and_is_driven_from_an_empty_folder(installed, empty):
    serve = subprocess.Popen([installed / "harness", "serve"], stdout=subprocess.PIPE, text=True, cwd=empty)
    try:
        assert "127.0.0.1:" in serve.stdout.readline()
        script = done([installed / "harness", "scenarios", "example"], empty).strip()
        assert "frames" in done([installed / "harness", "speak", script, "--frames", "15"], empty)
        podcast = done([installed / "harness", "scenarios", "podcast"], empty).strip()
        driven = run([installed / "python", "-m", "locust", "-f", podcast, "--headless", "-u", "2", "-t", "8s"], empty)
        said = driven.stdout + driven.stderr
        assert driven.returncode in (0, 3), said  # 3: on a busy machine it may be INVALID
        assert "0 error" in said and re.search(r"[1-9]\d* done", said) and "Traceback" not in said, said
    finally:
        serve.send_signal(signal.SIGINT)
        serve.wait(120)
    assert [path.name for path in empty.iterdir()] == [".harness"] and not list((empty / ".harness").iterdir())
