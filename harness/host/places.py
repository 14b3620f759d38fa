"""Where things are: the code that runs, the models and scenarios that go with it, and the folder that it may write in.

A checkout keeps all of them in its top folder. An installed harness has the models and scenarios inside its package,
and writes below the folder in which it was started.
"""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CODE = PACKAGE.parent  # what has to be on a search path for this harness to be imported


def checkout_of(code: Path) -> Path | None:
    """The checkout whose code lies in this folder; None for a folder of installed packages."""
    parts = (code / "pyproject.toml", code / "model_repository", code / "scenarios")
    return code if all(part.exists() for part in parts) else None


CHECKOUT = checkout_of(CODE)
ROOT = CHECKOUT or Path.cwd()
REPOSITORY = (CHECKOUT or PACKAGE) / "model_repository"
SCENARIOS = (CHECKOUT or PACKAGE) / "scenarios"


def plan_file(given: Path) -> Path:
    """The file of a plan: the path that was given or, where no file is there, the one of this name in SCENARIOS."""
    beside = SCENARIOS / f"{bare_name(given, '.yaml')}.yaml"
    bare = len(Path(given).parts) == 1 and not Path(given).is_file()
    return beside if bare and beside.is_file() else Path(given)


def plan_name(file: Path) -> str:
    """How a record names a plan: from the top of a checkout, or by the bare name under which it was installed."""
    if CHECKOUT:
        return os.path.relpath(file, CHECKOUT)
    file = Path(file).resolve()
    return file.stem if file.parent == SCENARIOS else str(file)


def plan_of_name(name: str) -> Path:
    """The file that ``plan_name`` named."""
    return plan_file(Path(name)) if CHECKOUT is None else CHECKOUT / name


def scenario_files() -> dict[str, Path]:
    """Scenarios, plans, mixes and scripts that come with the harness, by their path below SCENARIOS."""
    files = (path for path in SCENARIOS.rglob("*") if path.suffix in (".py", ".yaml", ".txt"))
    return {str(path.relative_to(SCENARIOS)): path for path in sorted(files)}


def bare_name(file: Path | str, *endings: str) -> str:
    """A file's name without one of these endings. Any other dot stays: the last part of h100-1.5b is no ending."""
    path = Path(file)
    return path.stem if path.suffix in endings else path.name


def preset_name(preset: str) -> str:
    """The label of a preset: its own name ("1.5b"), or that of its .json file without the ending."""
    return bare_name(preset, ".json") if preset.endswith(".json") else preset
