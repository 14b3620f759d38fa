"""The packages that the harness requires, and whether a search path has usable versions of them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from harness.host.places import CHECKOUT

NAME = "speech-capacity-harness"


@dataclass(frozen=True)
class Found:
    """A package on a search path: its version, and its folder."""

    version: str
    folder: Path


def required() -> list[Requirement]:
    """Required packages, from pyproject.toml or the installed package's metadata; empty if there is neither."""
    if CHECKOUT:
        asked = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"]
    else:
        asked = _installed_requirements()
    found = [Requirement(each) for each in asked]
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def _installed_requirements() -> list[str]:
    try:
        return metadata.requires(NAME) or []
    except metadata.PackageNotFoundError:
        return []


def find(name: str, search: Iterable[str] | None = None) -> Found | None:
    """The package that an import would find in these folders; None = this interpreter's own search path."""
    given: dict[str, Any] = {} if search is None else {"path": list(search)}
    for found in metadata.Distribution.discover(name=name, **given):
        if found.version:  # a folder left by a failed removal has none
            return Found(found.version, Path(str(found.locate_file(""))))
    return None


def shortfall(requirement: Requirement, found: Found | None) -> str:
    """Why a package does not meet a requirement; "" if it does."""
    if found is None:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(found.version, prereleases=True):
        return ""
    return f"{requirement.name} {found.version} in {found.folder} is not {requirement.specifier}"
