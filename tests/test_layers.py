"""Imports point one way: a layer imports only layers below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = {"records", "wire", "errors"}
# Rooms from the ground up; a room may import rooms of lower layers, and of its own layer without a cycle.
LAYERS = {
    0: {
        *VOCABULARY,
        "compiling",
        "nvml",
        "provenance",
        "identity",
        "keys",
        "places",
        "packages",
        "processes",
        "topology",
        "voice_folder",
    },
    1: {
        "columns",
        "rungs",
        "script",
        "workload",
        "arrivals",
        "metrics",
        "slo",
        "steadiness",
        "spec",
        "capacity",
        "certificate",
        "explore",
    },
    2: {
        "channels",
        "targets",
        "replicas",
        "responses",
        "client",
        "recording",
        "watch",
        "desk",
        "readers",
        "triton",
        "probe",
        "store",
        "witness",
    },
    3: {
        "loadtest",
        "ledger",
        "options",
        "first_plan",
        "remote",
        "terminal",
        "locust_test",
        "livepage",
        "user",
        "sweep",
        "hosts",
        "ray_hosts",
        "walk",
        "runs",
        "budget",
        "signoff",
        "profile",
        "speak",
        "doctor",
        "report",
        "display",
        "cli",
        "__main__",
    },
}
SIDE_ROOM = "vibevoice"  # server-side torch
SIDE_ROOM_MAY_IMPORT = {
    *("wire", "errors", "script", "compiling", "voice_folder", "identity", "places", "provenance", "keys"),
    SIDE_ROOM,
}
LAYER_OF = {room: layer for layer, rooms in LAYERS.items() for room in rooms}
FILES = sorted(path for path in (ROOT / "harness").rglob("*.py") if path.name != "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "harness").parts[0].removesuffix(".py")


def rooms_imported(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "harness":
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("harness."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("harness.")}
    return rooms


def test_every_room_has_a_layer():
    assert {room_of(path) for path in FILES} - {SIDE_ROOM} == set(LAYER_OF)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_lies_below(path):
    room = room_of(path)
    if room == SIDE_ROOM:
        assert rooms_imported(path) <= SIDE_ROOM_MAY_IMPORT
    else:
        above = {other for other in rooms_imported(path) if LAYER_OF.get(other, 99) > LAYER_OF[room]}
        assert not above


def test_rooms_of_one_layer_have_no_cycle():
    below = {room: set() for room in LAYER_OF}
    for path in FILES:
        if room_of(path) in below:
            below[room_of(path)] |= rooms_imported(path) & set(LAYER_OF) - {room_of(path)}
    while leaves := [room for room, others in below.items() if not others]:
        for leaf in leaves:
            del below[leaf]
        below = {room: others - set(leaves) for room, others in below.items()}
    assert not below


def test_only_the_model_repository_imports_the_side_room():
    outside = [path for path in FILES if room_of(path) != SIDE_ROOM and SIDE_ROOM in rooms_imported(path)]
    assert outside == []


def test_a_triton_process_loads_neither_locust_nor_pandas():
    assert (ROOT / "harness" / "__init__.py").read_text() == ""
