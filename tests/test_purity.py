"""Who may read the clock, draw by chance, lock, or talk to pyverbs: read off the source, so that nothing slips in."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.helpers import ROOT

FORBIDDEN = {"time", "datetime", "random", "secrets", "threading"}
SEEDED = {"Generator", "Philox"}
ALLOWED = {"mooncache/kernels/jit.py": {"threading"}}  # locks while compiling, never in a kernel
CLOCKS = ("sim/calibrate", "sim/validate", "sim/commands", "sim/malloc_bench", "sim/clock")  # these measure and time


def sources(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> set[str]:
    """Top-level packages that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def dotted(node: ast.AST) -> str:
    """`np.random.default_rng` of an attribute chain, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def unseeded(tree: ast.AST) -> list[str]:
    """Uses of numpy's random module other than Generator and Philox."""
    found = []
    for node in ast.walk(tree):
        name = dotted(node)
        for prefix in ("np.random.", "numpy.random."):
            if name.startswith(prefix) and name.removeprefix(prefix).partition(".")[0] not in SEEDED:
                found.append(name)
        if isinstance(node, ast.ImportFrom) and node.module == "numpy.random":
            found += [f"numpy.random.{alias.name}" for alias in node.names if alias.name not in SEEDED]
    return found


@pytest.mark.parametrize("file", sources("mooncache/kernels", "sim"), ids=name_of)
def test_no_clock_no_chance_no_lock(file):
    tree, name = ast.parse(file.read_text()), name_of(file)
    if not name.startswith(CLOCKS):
        assert imports(tree) & FORBIDDEN <= ALLOWED.get(name, set())
    assert unseeded(tree) == []


@pytest.mark.parametrize("file", sources("mooncache", "sim"), ids=name_of)
def test_only_the_rdma_provider_imports_pyverbs(file):
    if not name_of(file).startswith("mooncache/providers/rdma"):
        assert "pyverbs" not in imports(ast.parse(file.read_text()))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import time as t", {"time"}),
        ("def f():\n    from random import choice", {"random"}),
        ("import numpy.random", {"numpy"}),
    ],
)
def test_the_check_itself_sees_imports(source, expected):
    assert imports(ast.parse(source)) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import numpy as np\nnp.random.rand(3)", ["np.random.rand"]),
        ("from numpy.random import default_rng", ["numpy.random.default_rng"]),
        ("np.random.Generator(np.random.Philox(key=1)).random()", []),
    ],
)
def test_the_check_itself_sees_unseeded_chance(source, expected):
    assert unseeded(ast.parse(source)) == expected
