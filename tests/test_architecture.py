"""Imports run one way only, and no module is a drawer for everything."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import headstart

ROOT = Path(headstart.__file__).parent

# room: what it may import of ours, besides itself. A room is a package, or a module at the top.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "calibration": set(),
    "disk": {"errors"},
    "records": {"errors"},
    "judgement": {"errors", "records"},
    "parts": {"errors"},
    "method": {"errors", "parts"},
    "registry": {"errors", "method"},
    "testing": {"errors", "parts", "method", "registry"},
    "methods": {"errors", "parts", "method"},
    "data": {"errors", "disk", "records"},
    "nets": {"errors", "records", "parts", "data"},  # data: how a network wants its pictures prepared
    "training": {
        *("errors", "disk", "records", "parts", "method", "registry", "data", "nets", "ship", "calibration"),
    },
    "comparison": {
        *("errors", "disk", "records", "parts", "registry", "data", "training", "ship"),
        *("judgement", "report"),
    },
    "report": {"errors", "records", "judgement", "calibration"},  # from files alone: no torch
    "ship": {"errors", "records", "parts", "data", "nets"},
}
EVERYTHING = {"cli", "__main__", "__init__"}  # `__init__` hands out public names, lazily
DRAWERS = {"utils", "util", "common", "helpers", "helper", "core", "base", "misc", "tools", "shared"}


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py"))


def room_of(module: str) -> str:
    """ "headstart.data.splits" is in room data; "headstart.methods.route.spottune" in methods."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def name_of(path: Path) -> str:
    parts = ["headstart", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Every module of ours that is imported anywhere in the file, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name != "headstart"}
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "headstart":
            found.add(f"headstart.{node.attr}")  # what a plain `import headstart` was for
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                up = module.split(".")[: -(node.level - is_package) or None]
                source = ".".join([*up, source] if source else up)
            # `from headstart import registry` names a module after the word import
            found |= (
                {source} if source != "headstart" else {f"headstart.{alias.name}" for alias in node.names}
            )
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(str(node.args[0].value))
    return {name for name in found if name.split(".")[0] == "headstart"} - {"headstart.__version__"}


def forbidden(path: Path, source: str) -> list[str]:
    module = name_of(path)
    room = room_of(module)
    if room in EVERYTHING:
        return []
    if room not in ALLOWED:
        return [f"{module} is in room '{room}', which this test does not know: say what it may import"]
    wrong = []
    for target in sorted(imports(ast.parse(source), module, path.name == "__init__.py")):
        there = room_of(target)
        if there == room:
            if room == "methods" and _inner(target) not in (None, _inner(module)):
                wrong.append(f"{module} imports {target}: rooms of methods never import each other")
        elif there not in ALLOWED[room]:
            wrong.append(f"{module} imports {target}: {room} may import {sorted(ALLOWED[room])}")
    return wrong


def _inner(module: str) -> str | None:
    parts = module.split(".")
    return parts[2] if len(parts) > 2 else None


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    assert forbidden(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_no_module_is_a_drawer(path: Path) -> None:
    names = {part.removesuffix(".py").strip("_") for part in path.relative_to(ROOT).parts}
    assert not names & DRAWERS


def test_the_rules_have_no_ring() -> None:
    """Whatever the files do, the rule itself must run one way."""
    left = {room: set(allowed) for room, allowed in ALLOWED.items()}
    while left:
        free = {room for room, allowed in left.items() if not allowed & left.keys()}
        assert free, f"a ring among {sorted(left)}"
        left = {room: allowed for room, allowed in left.items() if room not in free}


def test_rooms_of_training_never_know_methods() -> None:
    for room in ("training", "comparison", "report", "ship", "data", "nets", "parts", "registry"):
        assert "methods" not in ALLOWED[room]


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("training/loop.py", "from headstart.methods.baseline.full import Full"),
        ("training/loop.py", "def f():\n    import headstart.methods.baseline.full"),
        ("training/loop.py", "from headstart import methods"),
        ("training/loop.py", "from ..methods import baseline"),
        ("training/loop.py", "from .. import methods"),
        ("training/loop.py", "import importlib\nimportlib.import_module('headstart.methods')"),
        ("training/loop.py", "from headstart import Method"),
        ("training/loop.py", "import headstart\nheadstart.compare('x')"),
        ("methods/route/one.py", "from headstart.methods.select.two import Two"),
        ("methods/route/one.py", "from headstart.registry import get"),
        ("parts/tap.py", "from headstart.method import Method"),
        ("ship/server.py", "from headstart.training.loop import fit"),
        ("records.py", "from headstart.method import Method"),
        ("cupboard/x.py", "import os"),
    ],
)
def test_a_wrong_edge_is_seen(where: str, line: str) -> None:
    assert forbidden(ROOT / where, line)


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("methods/route/one.py", "from headstart.methods.route.two import Two"),
        ("methods/route/one.py", "from .two import Two\nfrom ...parts import ranks"),
        ("methods/route/__init__.py", "from .one import One"),
        ("training/loop.py", "import torch\nfrom headstart import registry\nfrom .machine import Machine"),
        ("ship/bundle.py", "import headstart\nprint(headstart.__version__)"),
        ("cli/train.py", "from headstart.methods.baseline.full import Full"),
    ],
)
def test_a_right_edge_passes(where: str, line: str) -> None:
    assert forbidden(ROOT / where, line) == []
