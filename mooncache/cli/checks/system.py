"""The operating system and the Python that the engine runs on."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import metadata, version
from pathlib import Path

from mooncache.cli.checks.base import ROOT, Finding, check, read

MACHINES = ("x86_64", "aarch64")
"""Architectures whose system calls and fences the kernels know (`kernels/linux.py`, `kernels/atomics.py`)."""

CONTAINERS = {".dockerenv": "Docker", "run/.containerenv": "Podman", "run/systemd/container": "systemd-nspawn"}
"""Files that container engines leave inside."""


def release(root: Path = ROOT) -> tuple[int, int]:
    """Return major and minor version of the running Linux. Raises ValueError for a text that is no version."""
    text = read(root / "proc/sys/kernel/osrelease")
    numbers = re.match(r"(\d+)\.(\d+)", text)
    if numbers is None:
        raise ValueError(f"expected a version of Linux, got {text!r}")
    return int(numbers[1]), int(numbers[2])


@check("system")
def system(root: Path = ROOT, machine: str = platform.machine()) -> Iterator[Finding]:
    """Check Linux, the machine's architecture, and whether this is a container."""
    around = next((engine for file, engine in CONTAINERS.items() if (root / file).exists()), None)
    inside = f", in a container ({around})" if around else ""
    what = f"Linux {read(root / 'proc/sys/kernel/osrelease')} on {machine}{inside}"
    if machine in MACHINES:
        yield Finding("system", "ok", what)
    else:
        yield Finding("system", "error", f"{what}; kernels know the system calls of {' and '.join(MACHINES)} only")


@check("python")
def python(running: tuple[int, int] = sys.version_info[:2], supported: str | None = None) -> Iterator[Finding]:
    """Compare Python with what this package supports, and name the packages that make the machine code.

    Args:
        supported: as in the package's metadata, such as ">=3.10,<3.14", where it is read from by default.
    """
    wanted = supported if supported is not None else metadata("mooncache")["Requires-Python"]
    bounds = [tuple(map(int, found)) for sign in (">=", "<") for found in re.findall(rf"{sign}(\d+)\.(\d+)", wanted)]
    if len(bounds) != 2:
        raise ValueError(f"expected a lower and an upper bound of Python, got {wanted!r}")
    spelled = ".".join(map(str, running))
    if bounds[0] <= running < bounds[1]:
        yield Finding("python", "ok", f"Python {spelled}, " + ", ".join(map(packaged, ("numba", "llvmlite", "numpy"))))
    else:
        cure = "make clean setup PYTHON=python{}.{}".format(*bounds[0])
        yield Finding("python", "error", f"Python {spelled}; this version of Mooncache needs {wanted}", cure)


def packaged(name: str) -> str:
    """Format a package and its version."""
    return f"{name} {version(name)}"
