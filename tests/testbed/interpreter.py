"""The Python that runs in a guest: this very environment, with pyverbs in sight and kernels compiled beforehand."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from tests.testbed import CACHE, ROOT, BedError

DEBIAN = Path("/usr/lib/python3/dist-packages/pyverbs")
PASSED_ON = ("CI", "HYPOTHESIS_", "MOONCACHE_", "NUMBA_", "PYTEST_")  # what these variables say holds in a guest too

# Everything that a process of the tests may compile, so that no guest has to: emulated, it takes minutes.
PREWARM = """
import importlib, pkgutil, sys
import mooncache.engine, mooncache.providers, tests.helpers
from mooncache.kernels import jit
for module in pkgutil.walk_packages(mooncache.providers.__path__, "mooncache.providers."):
    importlib.import_module(module.name)
if jit.cold():
    print("test bed: compiling kernels for the guests (minutes, once for each state of the sources)", file=sys.stderr)
jit.prewarm()
"""


def environment() -> dict[str, str]:
    """Variables for guests, and for the host when it compiles for them."""
    passed_on = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    return passed_on | {
        "NUMBA_CPU_NAME": "generic",  # the emulated processor is another than the host's
        "MOONCACHE_CACHE_DIR": str(CACHE / "kernels"),
        "PYTHONPATH": os.pathsep.join(filter(None, [pyverbs(), os.environ.get("PYTHONPATH")])),
    }


def pyverbs() -> str:
    """A folder that holds pyverbs and nothing else; empty where this Python sees pyverbs without."""
    if importlib.util.find_spec("pyverbs"):
        return ""
    built = sorted(DEBIAN.glob("device.*.so"))
    if not built:
        raise BedError(f"{DEBIAN} has no compiled pyverbs: install python3-pyverbs")
    if not any((DEBIAN / f"device{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        raise BedError(
            f"{sys.prefix} has Python {sys.version_info.major}.{sys.version_info.minor}, and Debian's pyverbs is built "
            f"for another ({built[0].name}): make the environment with Debian's Python, "
            "rm -rf .venv && make setup PYTHON=/usr/bin/python3"
        )
    link = CACHE / "pyverbs" / "pyverbs"
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(DEBIAN)
    return str(link.parent)


def prewarm() -> None:
    """Compile all kernels for guests, on this processor; seconds when the cache has them."""
    if subprocess.run([sys.executable, "-c", PREWARM], env=os.environ | environment(), cwd=ROOT).returncode:
        raise BedError("the kernels do not compile, see above")


def read_only() -> Iterable[Path]:
    """Folders that Python is loaded from and nobody writes to: guests may cache them."""
    return {Path(sys.prefix).resolve(), Path(sysconfig.get_path("stdlib")).resolve()}


def runner() -> str:
    """virtme-run, which boots a guest on the host's files."""
    path = Path(sys.executable).with_name("virtme-run")
    found = str(path) if path.exists() else shutil.which("virtme-run")
    if found is None:
        raise BedError(
            f"virtme-run is missing from {sys.prefix}: {sys.executable} -m pip install --editable '.[testbed]'"
        )
    return found
