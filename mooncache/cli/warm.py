"""All kernels of the engine are compiled beforehand, on all cores: for images, and to see how long it takes.

`python -m mooncache.cli.warm` is one of the compilers; processes share the work (`jit.prewarm`).
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from mooncache.errors import MooncacheError
from mooncache.kernels import jit
from mooncache.kernels.stored import SUFFIX

ROOT = Path(__file__).parent.parent
FOLDERS = "kernels", "providers"
DECLARES = re.compile(r"^from mooncache\.kernels\.jit import", re.MULTILINE)


class WarmError(MooncacheError):
    """A process that compiles kernels failed."""


class Warmed(NamedTuple):
    """The kernels that were compiled, and what that took."""

    kernels: int  # that the cache holds
    compiled: int  # of them, just now
    seconds: float
    cpu_seconds: float  # of all processes


def modules(folder: Path, package: str) -> Iterator[str]:
    """Yield the names of the modules below a folder that declare kernels."""
    for file in sorted(folder.rglob("*.py")):
        if DECLARES.search(file.read_text()):
            yield ".".join([package, *file.relative_to(folder).with_suffix("").parts])


def load() -> None:
    """Import all modules of the engine that declare kernels."""
    for name in FOLDERS:
        for module in modules(ROOT / name, f"mooncache.{name}"):
            import_module(module)


def warm() -> Warmed:
    """Compile the kernels that are not compiled here yet, with a process a core. Raises WarmError."""
    load()
    before, began, spent = _stored(), monotonic(), _cpu_seconds()
    if jit.cold():
        compile_by([sys.executable, "-m", "mooncache.cli.warm"])
    after = _stored()
    return Warmed(after, after - before, round(monotonic() - began, 2), round(_cpu_seconds() - spent, 2))


def compile_by(command: Sequence[str], folder: Path | None = None) -> None:
    """Run a command that compiles missing kernels, once a core; the first says how far it is. Raises WarmError."""
    others = len(os.sched_getaffinity(0)) - 1
    running = [subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)]
    with tempfile.TemporaryFile() as said:  # what the others say would be mixed with that
        running += [subprocess.Popen(command, cwd=folder, stdout=said, stderr=said) for _ in range(others)]
        failed = [process.returncode for process in running if process.wait()]
        if failed:
            said.seek(0)
            last = said.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise WarmError(f"{len(failed)} of {others + 1} processes that compile kernels failed: {last}")


def _stored() -> int:
    """Count the kernels that the cache holds."""
    where = jit.place()
    if where is None:
        raise WarmError("no directory for compiled kernels can be written: each process compiles for itself")
    return sum(1 for _ in where.path.glob(f"*{SUFFIX}"))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    load()
    jit.prewarm()
