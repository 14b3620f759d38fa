"""Where things are: the code that runs, the models and scenarios that go with it, and the folder that it may write in.

A checkout keeps all of them in its top folder. An installed harness has the models and scenarios inside its package,
and writes below the folder in which it was started.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CODE = PACKAGE.parent  # what has to be on a search path for this harness to be imported


def checkout_of(code: Path) -> Path | None:
    """The checkout whose code lies in this folder; None for a folder of installed packages."""
    parts = (code / "pyproject.toml", code / "model_repository", code / "scenarios")
    return code if all(part.exists() for part in parts) else None


CHECKOUT = checkout_of(CODE)
ROOT = CHECKOUT or Path.cwd()
REPOSITORY = (CHECKOUT or PACKAGE) / "model_repository"
SCENARIOS = (CHECKOUT or PACKAGE) / "scenarios"
