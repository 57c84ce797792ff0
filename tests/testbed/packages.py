"""Debian packages that the test bed stands on, installed when they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.testbed import BedError

NEEDED = (Path(__file__).parent / "packages.txt").read_text().split()
INSTALL = ["apt-get", "install", "-y", "-qq", "--no-install-recommends"]


def missing() -> list[str]:
    """Those of `NEEDED` that dpkg does not know as installed."""
    if shutil.which("dpkg-query") is None or shutil.which("apt-get") is None:
        raise BedError(
            "the test bed is made of Debian packages, and this system has no dpkg and apt-get: run it on Debian 12, or "
            "on a machine with an RDMA device of its own, named by MOONCACHE_TEST_RDMA_DEVICE"
        )
    command = ["dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n", *NEEDED]
    known = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return [name for name in NEEDED if f"{name} installed" not in known]


def as_root(*command: str) -> bool:
    """Run it as root, by sudo where we are not; whether that worked."""
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if sudo and shutil.which("sudo") is None:
        return False
    environment = ["env", "DEBIAN_FRONTEND=noninteractive"]
    return subprocess.run([*sudo, *environment, *command], stdout=subprocess.DEVNULL).returncode == 0


def install() -> None:
    """Make sure of all packages, and of the folder that a guest mounts its kernel modules on."""
    if names := missing():
        print(f"test bed: installing Debian packages: {' '.join(names)}", file=sys.stderr, flush=True)
        if not (as_root(*INSTALL, *names) or (as_root("apt-get", "update", "-qq") and as_root(*INSTALL, *names))):
            raise BedError(f"Debian packages are missing; install them as root: apt-get install {' '.join(names)}")
    if not Path("/lib/modules").is_dir() and not as_root("mkdir", "-p", "/lib/modules"):
        raise BedError("/lib/modules is missing, where guests mount their kernel modules; as root: mkdir /lib/modules")
