"""Other packages' wheels, each in a virtual environment of its own, for `mooncache bench transfer --against`.

Made once, below the user's cache directory, with venv and pip. The packages see ours through PYTHONPATH, so that the
very same process measures them and us.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mooncache.bench.harness.process import ProcessError

INSTALL_S = 900.0


class Package(NamedTuple):
    """One package: how to install it, how to see that it works, and what it can be asked for."""

    requirements: tuple[str, ...]
    module: str
    transports: Mapping[str, Mapping[str, str]]  # name -> environment that makes it use this one


PACKAGES = {
    "mooncake": Package(
        ("mooncake-transfer-engine-non-cuda==0.3.13.post1",),
        "mooncake.engine",
        # By default it refuses a batch of 4,096 slices or more, and gives up after 30 s.
        {"tcp": {"MC_FORCE_TCP": "1", "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535", "MC_TRANSFER_TIMEOUT": "120"}},
    ),
    "nixl": Package(
        # Without what it requires: that is torch, 5 GB of it, which it imports only for tensors.
        ("--no-deps", "numpy", "nixl-cu12==1.5.1"),
        "nixl_cu12._api",
        {"tcp": {"UCX_TLS": "tcp"}, "shm": {"UCX_TLS": "sm,self,tcp"}},  # where it may, it copies; tcp only connects
    ),
}


def folder(name: str) -> Path:
    """Return where the package's environment lies; other requirements, or another Python, have another one."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    version = PACKAGES[name].requirements[-1].replace("==", "-")
    return Path(base) / "mooncache" / f"against-{version}-py{sys.version_info.major}{sys.version_info.minor}"


def options(name: str, transport: str) -> dict[str, Any]:
    """Return how to start a `Process` that can import the package."""
    return {"python": str(folder(name) / "bin/python"), "environment": PACKAGES[name].transports[transport]}


@cache
def prepare(name: str) -> None:
    """Install the package unless it is. Raises ProcessError, with the reason, if it cannot be installed or imported."""
    package, home = PACKAGES[name], folder(name)
    python = str(home / "bin/python")
    if not (home / "installed").exists():
        print(f"mooncache: installing {package.requirements[-1]} into {home}, once", file=sys.stderr)
        _run(f"cannot make an environment for {name}", sys.executable, "-m", "venv", "--clear", str(home))
        _run(f"cannot install {package.requirements[-1]}", python, "-m", "pip", "install", "-q", *package.requirements)
        (home / "installed").touch()
    _run(f"cannot import {package.module}", python, "-c", f"import {package.module}")


def _run(what: str, *command: str) -> None:
    """Run a command whose answer is not needed; the error quotes the last line of its complaint."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProcessError(f"{what}: {error}") from error
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise ProcessError(f"{what}: {lines[-1] if lines else f'status {done.returncode}'}")
