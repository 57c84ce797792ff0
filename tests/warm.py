"""Compile all kernels that tests use, on all cores at once, so that no test waits for that beside others.

`warm()` for the processes that run tests; `python -m tests.warm` is one of its compilers, which share the work.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

from mooncache.kernels import jit
from tests.helpers import ROOT

DECLARES = re.compile(r"^from mooncache\.kernels\.jit import", re.MULTILINE)
FOLDERS = ("mooncache", "sim", "tests")


def modules() -> list[str]:
    """Of the project, those that declare kernels; tests that make kernels of their own pay for them themselves."""
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    return [_name(file) for file in files if not file.name.startswith("test_") and DECLARES.search(file.read_text())]


def _name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def warm() -> None:
    """Compile what has yet to be compiled; seconds when that is nothing. Raises CalledProcessError."""
    command = [sys.executable, "-m", "tests.warm"]
    running = [subprocess.Popen(command, cwd=ROOT) for _ in os.sched_getaffinity(0)]
    for status in [process.wait() for process in running]:
        if status:
            raise subprocess.CalledProcessError(status, command)


if __name__ == "__main__":
    for module in modules():
        importlib.import_module(module)
    jit.prewarm()
