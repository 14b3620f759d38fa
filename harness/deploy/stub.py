"""The Python environment of Triton's stages, made so that they run this harness and no other copy.

Triton's Python stub starts isolated: it ignores PYTHONPATH and uses the environment of the first ``python3`` on PATH,
that is, its ``site-packages`` and the paths in the ``.pth`` files there, in their order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from harness.errors import ServerError
from harness.host import packages
from harness.host.places import CODE

NEEDS = ("numpy", "torch", "transformers")  # packages that the stages import
_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
_ASK = "import json, sys; print(json.dumps(sys.path))"


@lru_cache(maxsize=1)
def search_path() -> tuple[str, ...]:
    """Folders from which stages import: this harness first, then what a fresh start of this interpreter searches."""
    asked = [sys.executable, "-P", "-c", _ASK]
    try:
        found = json.loads(subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True).stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ServerError(
            f"the Python of this harness, {sys.executable or 'an embedded one'}, does not start on its own ({error}); "
            "Triton's stages need it: run the harness from a virtual environment"
        ) from error
    standard = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    others = [path for path in found if os.path.exists(path) and not _is_standard(path, standard)]
    return tuple(dict.fromkeys([str(CODE), *map(os.path.abspath, others)]))


def _is_standard(path: str, standard: set[str]) -> bool:
    return path in standard or path.endswith(".zip") or os.path.basename(path) == "lib-dynload"


def check(search: Sequence[str]) -> None:
    """Raise ServerError where stages with this search path would fail, or silently compute wrong values."""
    if found := problems(search):
        raise ServerError("; ".join(found))


def problems(search: Sequence[str]) -> list[str]:
    """What the stages would lack or have in a wrong version, one sentence each with its fix."""
    return [sentence for name in NEEDS if (sentence := problem(name, search))]


def problem(name: str, search: Sequence[str]) -> str:
    """The problem with one package that stages import, and its fix; "" where there is none."""
    asked = {each.name: each for each in packages.required()}.get(name, Requirement(name))
    found = packages.find(name, search)
    if name == "numpy" and found and Version(found.version).major >= 2:
        return (
            f"numpy {found.version} in {found.folder} is not numpy 1, for which Triton's Python stub is built: tensors "
            f"would be corrupted. Fix: {sys.executable} -m pip install 'numpy<2'"
        )
    short = packages.shortfall(asked, found)
    return short and f"{short}, and Triton's stages import it. Fix: {sys.executable} -m pip install '{asked}'"


def lay_out(folder: Path, search: Sequence[str]) -> Path:
    """Create an environment with this search path in a folder; returns its ``bin``, to be put first on PATH."""
    interpreter = Path(getattr(sys, "_base_executable", None) or sys.executable)  # not a virtual environment's own
    packages = packages_of(folder)
    packages.mkdir(parents=True)
    (packages / "harness.pth").write_text("".join(f"{path}\n" for path in search))
    (folder / "bin").mkdir()
    (folder / "bin" / "python3").symlink_to(interpreter)
    home = f"home = {interpreter.parent}\ninclude-system-site-packages = false\nversion = {_VERSION}\n"
    (folder / "pyvenv.cfg").write_text(home)
    return folder / "bin"


def packages_of(environment: Path) -> Path:
    """The folder of an environment's packages, for this interpreter's version."""
    return environment / "lib" / f"python{_VERSION}" / "site-packages"
