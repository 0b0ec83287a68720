"""DESIGN.md's map of rooms is the tree's, and imports run the way that it says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bvpo_kernels"
# From the ground up: a room imports rooms before it. Rooms of one line do not know each other.
FLOORS = [
    {"types", "checks", "call"},
    {"scope", "backends", "oracles"},
    {"losses", "mixing", "ops"},
    {"head", "packing"},
    {"grad_stats"},
    {"integrations"},
]


def _map():
    text = (ROOT / "DESIGN.md").read_text(encoding="utf-8")
    return text.split("<!-- rooms -->")[1].split("<!-- /rooms -->")[0]


def _imported(path):
    """Rooms of the package that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "bvpo_kernels" and len(parts) > 1:
                yield parts[1]


def _room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


ROOMS = {_room(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}


def test_every_room_is_on_the_map_and_on_a_floor():
    named = set(re.findall(r"[a-z_]+", _map()))
    assert named >= ROOMS
    assert set().union(*FLOORS) == ROOMS


@pytest.mark.parametrize("folder", ["bvpo_kernels", "train", "benchmarks", "csrc"])
def test_every_folder_on_the_map_is_there(folder):
    lines = _map().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{folder}/"))
    stop = start + 1
    while stop < len(lines) and lines[stop].startswith(" "):
        stop += 1
    named = re.findall(r"([a-z_]+)/", " ".join(lines[start:stop]).split("/", 1)[1])
    there = {path.name for path in (ROOT / folder).rglob("*") if path.is_dir()}
    files = {path.stem for path in (ROOT / folder).rglob("*.py")}
    assert named
    assert [name for name in named if name not in there | files | {"csrc"}] == []


def test_imports_run_down():
    level = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    up = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in PACKAGE.rglob("*.py")
        for name in _imported(path)
        if (room := _room(path)) in level and name in level and name != room
        if level[name] >= level[room]
    ]
    assert up == []


def test_oracles_and_backends_do_not_know_each_other():
    for room, other in (("oracles", "backends"), ("backends", "oracles")):
        for path in (PACKAGE / room).rglob("*.py"):
            assert other not in set(_imported(path)), path


def test_the_library_does_not_know_the_programs_around_it():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in ("train", "benchmarks", "tests"), path
