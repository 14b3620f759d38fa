"""Imports point one way, without circles; files and functions are short, and no two classes have one name."""

import ast
import collections
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the ground up, as ARCHITECTURE.md has it; what stands on one line may be imported by what stands on it or above.
ORDER = (
    ("errors", "exit_codes", "clock", "wire", "content", "yaml_text"),
    ("topology", "identity", "device_profile", "gpu_memory", "jit", "server_metrics"),
    ("records",),
    ("host", "traffic"),
    ("capacity.models",),
    ("cards",),
    ("capacity.simulator",),
    ("capacity.fitting",),
    ("capacity.planning",),
    ("capacity.ready",),
    ("planfile.sections",),
    ("planfile.space",),
    ("planfile.plan",),
    ("planfile.reading",),
    ("planfile.jobs",),
    ("client",),
    ("deploy",),
    ("service",),
    ("drive.readers",),
    ("drive",),
    ("runs",),
    ("sweep.optimizer",),
    ("sweep",),
    ("report",),
    ("export",),
    ("signoff",),
    ("cli", "scenario", "__main__"),
)
# What runs inside Triton: torch and the model. It stands apart, and only model_repository/ imports it.
SERVER = "vibevoice"
SERVER_MAY_IMPORT = (
    "errors", "clock", "wire", "content", "identity", "device_profile", "gpu_memory", "jit", "server_metrics", "host",
    "traffic.script", "traffic.voice_folder",
)  # fmt: skip
SERVER_ORDER = (
    ("vibevoice.process", "vibevoice.kernels", "vibevoice.sessions"),
    ("vibevoice.stages",),
    ("vibevoice.compiled",),
    ("vibevoice.profiling",),
    ("vibevoice.backend",),
    ("vibevoice.engine",),
    ("vibevoice.entry",),
    ("vibevoice.counts",),
)
RANKS = {name: rank for order in (ORDER, SERVER_ORDER) for rank, line in enumerate(order) for name in line}
FILES = {
    ".".join(path.relative_to(ROOT / "harness").with_suffix("").parts): path
    for path in sorted((ROOT / "harness").rglob("*.py"))
    if path.name != "__init__.py"
}
MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_A_FILE = 60, 500


def place_of(module: str) -> str | None:
    """The entry of the order that a module belongs to: "drive.readers" for "drive.readers.pool"."""
    parts = module.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in RANKS), None)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def statements(path: Path) -> list[ast.AST]:
    """Every statement of a file, at its top or within others; those of expressions are none."""
    found, left = [], [*tree(path).body]
    while left:
        found.append(node := left.pop())
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            left += getattr(node, block, ())
    return found


def imported(path: Path) -> set[str]:
    """The modules of harness that a file imports, at its top or in a function."""
    found = set()
    for node in statements(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "harness":
            names = {f"{node.module}.{alias.name}".removeprefix("harness.") for alias in node.names}
            found |= {name if name in FILES else node.module.removeprefix("harness.") for name in names}
        elif isinstance(node, ast.Import):
            found |= {each.name.removeprefix("harness.") for each in node.names if each.name.startswith("harness.")}
    return found


@functools.cache
def imports() -> dict[str, set[str]]:
    return {module: imported(path) for module, path in FILES.items()}


def test_every_module_has_its_place():
    assert [module for module in FILES if place_of(module) is None] == []


def test_only_modules_are_imported():
    """A package hands nothing on: its __init__.py is empty."""
    assert {name for names in imports().values() for name in names} <= FILES.keys()
    assert [path for path in (ROOT / "harness").rglob("__init__.py") if path.read_text()] == []


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_what_stands_below(module):
    rank, server = RANKS[place_of(module)], module.startswith(SERVER)
    for other in imports()[module]:
        if server and not other.startswith(SERVER):
            assert other.startswith(SERVER_MAY_IMPORT), other
        else:
            assert other.startswith(SERVER) == server, f"{other} runs inside Triton alone"
            assert RANKS[place_of(other)] <= rank, f"{other} stands above"


def test_no_modules_import_each_other_in_a_circle():
    below = {module: set(others) - {module} for module, others in imports().items()}
    while leaves := {module for module, others in below.items() if not others}:
        below = {module: others - leaves for module, others in below.items() if module not in leaves}
    assert not below


def nodes(kind) -> list[tuple[str, ast.AST]]:
    """Every node of a kind in harness/, with its module."""
    return [(module, node) for module, path in FILES.items() for node in statements(path) if isinstance(node, kind)]


def test_no_two_classes_have_one_name():
    places = collections.defaultdict(list)
    for module, node in nodes(ast.ClassDef):
        places[node.name].append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def test_functions_and_files_are_short():
    functions = {
        f"{module}: {node.name}": node.end_lineno - node.lineno + 1
        for module, node in nodes((ast.FunctionDef, ast.AsyncFunctionDef))
    }
    files = {module: len(path.read_text().splitlines()) for module, path in FILES.items()}
    assert {name: lines for name, lines in functions.items() if lines > MOST_LINES_OF_A_FUNCTION} == {}
    assert {name: lines for name, lines in files.items() if lines > MOST_LINES_OF_A_FILE} == {}
