"""Locations: the running code, the models, scenarios and manifests that belong to it, and the folder for output.

A checkout has all of them in its top folder. An installed harness has models, scenarios and manifests inside its
package, and writes below the current folder.
"""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CODE = PACKAGE.parent  # must be on the search path to import this harness


def checkout_of(code: Path) -> Path | None:
    """The checkout whose code is in this folder; None for a folder of installed packages."""
    parts = (code / "pyproject.toml", code / "model_repository", code / "scenarios")
    return code if all(part.exists() for part in parts) else None


CHECKOUT = checkout_of(CODE)
ROOT = CHECKOUT or Path.cwd()
REPOSITORY = (CHECKOUT or PACKAGE) / "model_repository"
SCENARIOS = (CHECKOUT or PACKAGE) / "scenarios"
OPS = (CHECKOUT or PACKAGE) / "ops"


def plan_file(given: Path) -> Path:
    """The file of a plan: the given path or, if there is none, the file of this name in SCENARIOS."""
    beside = SCENARIOS / f"{bare_name(given, '.yaml')}.yaml"
    bare = len(Path(given).parts) == 1 and not Path(given).is_file()
    return beside if bare and beside.is_file() else Path(given)


def plan_name(file: Path) -> str:
    """The name of a plan in records: relative to a checkout, or the bare name under which it was installed."""
    if CHECKOUT:
        return os.path.relpath(file, CHECKOUT)
    file = Path(file).resolve()
    return file.stem if file.parent == SCENARIOS else str(file)


def plan_of_name(name: str) -> Path:
    """The file with this ``plan_name``."""
    return plan_file(Path(name)) if CHECKOUT is None else CHECKOUT / name


def scenario_files() -> dict[str, Path]:
    """Scenarios, plans, mixes and scripts that come with the harness, by path relative to SCENARIOS."""
    files = (path for path in SCENARIOS.rglob("*") if path.suffix in (".py", ".yaml", ".txt"))
    return {str(path.relative_to(SCENARIOS)): path for path in sorted(files)}


def bare_name(file: Path | str, *endings: str) -> str:
    """A file's name without one of these endings. Any other dot stays: ".5b" in h100-1.5b is not an ending."""
    path = Path(file)
    return path.stem if path.suffix in endings else path.name


def preset_name(preset: str) -> str:
    """The label of a preset: its own name ("1.5b"), or its .json file's without the ending."""
    return bare_name(preset, ".json") if preset.endswith(".json") else preset
