"""The house: a room imports only from rooms above it, there is no circle, and CONTRIBUTING shows the same list."""

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest

import local_elasticity
from local_elasticity import _moved

SOURCE = Path(local_elasticity.__file__).parent
ROOMS = (  # from the top: what stands lower may import what stands higher
    "base",
    "networks",
    "data",
    "impact",
    "similarity",
    "collapse",
    "flows",
    "runs",
    "training",
    "lesde",
    "report",
    "studies",
    "cli",
)


@functools.cache
def modules() -> dict[str, Path]:
    """Every module by its name within the package; a package by the name of its folder."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def imports() -> dict[str, set[str]]:
    """What each module imports of ours, wherever in it: late imports and those for types count."""
    found = {}
    for name, path in modules().items():
        found[name] = {
            target
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            for target in targets(node)
            if target != name
        }
    return found


def targets(node: ast.AST) -> set[str]:
    """The modules of ours that a statement imports."""
    found = set()
    if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "local_elasticity":
        package = (node.module or "").partition(".")[2]
        for alias in node.names:
            inner = f"{package}.{alias.name}".strip(".")
            found.add(inner if inner in modules() else package)
    elif isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] == "local_elasticity":
                found.add(alias.name.partition(".")[2])
    return found - {""}


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_stands_in_a_room():
    others = {"", "_moved"}  # the public face, and the old names
    assert {room(name) for name in modules()} - others == set(ROOMS)


def test_rooms_import_only_from_rooms_above_them():
    wrong = [
        f"{name} imports {target}"
        for name, wanted in imports().items()
        for target in wanted
        if name and room(target) in ROOMS and room(name) in ROOMS
        if ROOMS.index(room(target)) > ROOMS.index(room(name))
    ]
    assert not wrong


def test_there_is_no_circle():
    order: list[str] = []
    state: dict[str, int] = {}

    def visit(name: str, way: tuple[str, ...]) -> None:
        if state.get(name) == 2 or name not in modules():
            return
        assert name not in way, f"a circle: {' -> '.join([*way[way.index(name) :], name])}"
        for target in sorted(imports()[name]):
            visit(target, (*way, name))
        state[name] = 2
        order.append(name)

    for name in sorted(modules()):
        visit(name, ())
    assert len(order) == len(modules())


def test_only_pictures_are_reached_from_below():
    """One function reaches upwards by a name: ``plot`` methods ask the room of pictures through it."""
    reaching = [name for name, path in modules().items() if "import_module" in path.read_text(encoding="utf-8")]
    assert sorted(reaching) == ["", "_moved", "base.drawing", "networks", "runs"]  # networks: a user's own file


def test_contributing_shows_the_same_rooms():
    text = (SOURCE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", text, flags=re.MULTILINE)
    assert tuple(shown) == ROOMS


@pytest.mark.parametrize(("old", "new"), _moved.MOVED.items())
def test_modules_are_found_under_their_old_names_with_a_warning(old, new, monkeypatch):
    monkeypatch.delitem(importlib.sys.modules, f"local_elasticity.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=f"{old} is local_elasticity.{new} now"):
        module = importlib.import_module(f"local_elasticity.{old}")
    assert module is importlib.import_module(f"local_elasticity.{new}")
