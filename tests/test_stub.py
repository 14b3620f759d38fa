"""The Python of Triton's stages: which packages it takes, and what it refuses before Triton starts."""

import json
import os
import subprocess
import venv
from pathlib import Path

import pytest

from harness.triton import stub

ROOT = Path(__file__).resolve().parents[1]
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
    code = "from harness.triton import stub; print(*stub.search_path(), sep='\\n')"
    found = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[0] == str(ROOT)


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
