"""Compile all kernels that tests use, on all cores at once, so that no test waits for that beside others.

`warm()` for the processes that run tests; `python -m tests.warm` is one of its compilers, which share the work.
"""

from __future__ import annotations

import importlib
import sys

from mooncache.cli import warm as product
from mooncache.kernels import jit
from tests.helpers import ROOT

FOLDERS = ("mooncache", "sim", "tests")


def modules() -> list[str]:
    """Of the project, those that declare kernels; tests that make kernels of their own pay for them themselves."""
    declaring = [name for folder in FOLDERS for name in product.modules(ROOT / folder, folder)]
    return [name for name in declaring if not name.rpartition(".")[2].startswith("test_")]


def warm() -> None:
    """Compile what has yet to be compiled; seconds when that is nothing. Raises WarmError."""
    product.compile_by([sys.executable, "-m", "tests.warm"], ROOT)


if __name__ == "__main__":
    for module in modules():
        importlib.import_module(module)
    jit.prewarm()
