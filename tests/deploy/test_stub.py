"""The Python of Triton's stages: which packages it takes, and what it refuses before Triton starts."""

import importlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from harness.deploy import distribution, stub
from harness.deploy.config import Deployment
from harness.deploy.server import TritonServer
from harness.errors import ServerError

ROOT = Path(__file__).resolve().parents[2]
FINDER = """
import sys
from importlib.util import spec_from_file_location
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "harness":
            return spec_from_file_location(name, {decoy!r}, submodule_search_locations=[])
sys.meta_path.append(Finder)
"""


def another_python(folder: Path) -> Path:
    """An environment with the packages of this one and, by every way in which one is installed, another harness."""
    venv.create(folder, symlinks=True)
    packages = Path(stub.packages_of(folder))
    (packages / "harness").mkdir()
    decoy = packages / "harness" / "__init__.py"
    decoy.write_text("raise RuntimeError('the other harness')")
    (packages / "_finder.py").write_text(FINDER.format(decoy=str(decoy)))
    (packages / "_aaa_editable.pth").write_text(f"import _finder\n{packages}\n")
    (packages / "zzz_others.pth").write_text("\n".join(stub.search_path()[1:]))
    return folder / "bin" / "python"


def test_this_harness_comes_first_then_what_the_interpreter_finds():
    first, *others = stub.search_path()
    assert first == str(ROOT)
    assert any((Path(path) / "numpy").is_dir() for path in others)
    assert not any((Path(path) / "encodings").is_dir() for path in others)  # the standard library is the stub's own


def test_what_is_laid_out_is_an_environment_with_that_path(tmp_path):
    first, second = tmp_path / "a b", tmp_path / "c"
    first.mkdir(), second.mkdir()
    folder = stub.lay_out(tmp_path / "python", [str(first), str(second)])
    asked = [folder / "python3", "-I", "-c", "import sys; print(sys.prefix, *sys.path, sep='\\n')"]
    prefix, *path = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    assert prefix == str(tmp_path / "python")
    assert path[-2:] == [str(first), str(second)]


def test_another_harness_in_the_interpreter_is_not_on_the_path_first(tmp_path):
    python = another_python(tmp_path / "venv")
    code = "from harness.deploy import stub; print(*stub.search_path(), sep='\\n')"
    found = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[0] == str(ROOT)


def package(folder: Path, name: str, version: str) -> None:
    """A package as its metadata shows it; it cannot be imported."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("numpy", "torch", "transformers", "words"),
    [
        ("1.26.4", "2.13.0+cpu", "5.20.0", []),
        ("2.0.0", "2.13.0", "5.20.0", ["numpy 2.0.0 in {}"]),
        ("2.5.2", "2.13.0", "5.20.0", ["numpy 2.5.2 in {}"]),
        ("1.22.0", "2.13.0", "5.20.0", ["numpy 1.22.0 in {}"]),
        ("1.26.4", "", "5.20.0", ["torch is not installed"]),
        ("1.26.4", "2.4.1", "4.57.0", ["torch 2.4.1 in {}", "transformers 4.57.0 in {}"]),
        ("", "", "", ["numpy is not", "torch is not", "transformers is not"]),
    ],
)
def test_what_stages_would_fail_on_is_said_with_its_fix(tmp_path, numpy, torch, transformers, words):
    for name, version in (("numpy", numpy), ("torch", torch), ("transformers", transformers)):
        if version:
            package(tmp_path, name, version)
    found = stub.problems([str(tmp_path)])
    assert len(found) == len(words)
    for sentence, word in zip(found, words, strict=True):
        assert word.format(tmp_path) in sentence and "pip install" in sentence


def test_the_package_that_comes_first_on_the_path_counts(tmp_path):
    rest = stub.search_path()
    package(tmp_path / "new", "numpy", "2.5.2")
    stub.check(rest)
    stub.check([*rest, str(tmp_path / "new")])
    with pytest.raises(ServerError, match=r"numpy 2\.5\.2"):
        stub.check([rest[0], str(tmp_path / "new"), *rest[1:]])


def test_a_server_with_numpy_2_is_refused_before_it_starts(tmp_path, monkeypatch):
    package(tmp_path / "new", "numpy", "2.5.2")
    monkeypatch.setattr(stub, "search_path", lambda: (str(tmp_path / "new"), str(ROOT)))
    with pytest.raises(ServerError, match="tensors would be corrupted"):
        TritonServer(Deployment(), root=tmp_path).start()
    assert not list(tmp_path.glob(".harness/*"))


@pytest.fixture
def backend(monkeypatch):
    """The side of the stub that only a stub can import, with Triton's own module left out."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", MagicMock())
    yield importlib.import_module("harness.vibevoice.backend")
    del sys.modules["harness.vibevoice.backend"]


def test_a_stage_refuses_numpy_2_also_in_a_triton_of_somebody_else(backend):
    backend.check_numpy()
    backend.check_numpy("1.26.4")
    for version in ("2.0.0rc1", "2.5.2", "10.0"):
        with pytest.raises(ServerError, match=r"pip install 'numpy<2'"):
            backend.check_numpy(version)


@pytest.mark.parametrize("place", ["LD_LIBRARY_PATH", "sys.prefix"])
def test_a_libpython_that_is_carried_along_is_found(tmp_path, monkeypatch, place):
    folder = tmp_path / "lib"
    folder.mkdir()
    (folder / distribution.libpython_name()).touch()
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: None)
    monkeypatch.setattr(sys, "base_prefix", "/nowhere")
    if place == "sys.prefix":
        monkeypatch.setattr(sys, "prefix", str(tmp_path))
    else:
        monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{folder}")
    assert distribution.find_distribution().libraries[1] == folder


def test_a_missing_libpython_is_said_with_its_fix(monkeypatch):
    monkeypatch.setattr(distribution, "libpython_places", lambda: [Path("/nowhere")])
    with pytest.raises(ServerError, match=r"libpython3\.1\d\.so\.1\.0 was not found .* LD_LIBRARY_PATH"):
        distribution.find_distribution()


@pytest.mark.server
def test_the_stages_import_the_harness_that_started_them(tmp_path):
    """Whatever else the interpreter holds: a copy, an editable install, one on PYTHONPATH."""
    python = another_python(tmp_path / "venv")
    elsewhere = tmp_path / "elsewhere" / "harness"
    elsewhere.mkdir(parents=True)
    (elsewhere / "__init__.py").write_text("raise RuntimeError('the harness on PYTHONPATH')")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}{os.pathsep}{elsewhere.parent}"}
    command = [python, "tests/where_server.py", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert Path(facts["harness"]) == ROOT / "harness" / "__init__.py"
    assert int(facts["numpy"].partition(".")[0]) == 1
    assert Path(facts["prefix"]).is_relative_to(tmp_path)
    assert facts["path"].index(str(ROOT)) < facts["path"].index(str(elsewhere.parent))
