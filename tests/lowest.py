"""Prints pip constraints that hold each direct dependency at the lowest version that pyproject.toml takes."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
# Its lowest versions come from PyPI as CUDA builds of gigabytes alone; the Makefile names the one that a CPU runs.
ELSEWHERE = {"torch"}
PATTERN = re.compile(r"(?P<name>[\w.-]+)(\[[\w,-]+\])?\s*(>=|==)\s*(?P<version>[\w.]+)")


def constraints(dependencies: list[str]) -> list[str]:
    """``name==lowest`` for each. Raises ValueError for one without a lower bound."""
    lowest = []
    for each in dependencies:
        found = PATTERN.match(each)
        if found is None:
            raise ValueError(f"{each!r} in pyproject.toml has no lower bound: start it with >= or ==")
        if found["name"] not in ELSEWHERE:
            lowest.append(f"{found['name']}=={found['version']}")
    return lowest


if __name__ == "__main__":
    sys.stdout.write("\n".join(constraints(tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"])) + "\n")
