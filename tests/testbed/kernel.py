"""The Linux kernel that guests boot: Debian's own, downloaded once and never installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.testbed import CACHE, BedError
from tests.testbed.packages import as_root

META = "linux-image-amd64"  # depends on the newest kernel of the distribution, which has rdma_rxe as a module


class Kernel(NamedTuple):
    """An unpacked kernel package."""

    version: str
    image: Path


def fetch() -> Kernel:
    """The kernel in the cache; downloads and unpacks it when there is none."""
    folder = CACHE / "kernel"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(prefix="kernel-", dir=CACHE) as scratch:
            _unpack(_download(Path(scratch)), Path(scratch) / "root").rename(folder)
    images = sorted(folder.glob("boot/vmlinuz-*"))
    if not images:
        raise BedError(f"no kernel in {folder}: expected boot/vmlinuz-*; delete the folder to download it anew")
    return Kernel(images[-1].name.removeprefix("vmlinuz-"), images[-1])


def _download(folder: Path) -> Path:
    package = _package()
    print(f"test bed: downloading {package} (70 MB, once)", file=sys.stderr, flush=True)
    command = ["apt-get", "download", "-qq", package]
    if subprocess.run(command, cwd=folder).returncode:
        as_root("apt-get", "update", "-qq")  # the list of packages may be older than the archive
        if subprocess.run(command, cwd=folder).returncode:
            raise BedError(f"{' '.join(command)} failed, see above: the test bed needs Debian's package archive once")
    (archive,) = folder.glob("*.deb")
    return archive


def _package() -> str:
    for _ in range(2):
        answer = subprocess.run(["apt-cache", "depends", META], capture_output=True, text=True).stdout
        if found := re.search(r"Depends: (linux-image-\S+)", answer):
            return found[1]
        as_root("apt-get", "update", "-qq")  # a fresh system has no list of packages
    raise BedError(f"apt-cache knows no {META}: is this Debian on x86-64, and does `apt-get update` work?")


def _unpack(archive: Path, root: Path) -> Path:
    subprocess.run(["dpkg-deb", "--extract", archive, root], check=True)
    if not (root / "lib").exists():
        (root / "lib").symlink_to("usr/lib")  # where newer packages put it
    (modules,) = (root / "lib/modules").iterdir()
    depmod = shutil.which("depmod") or "/usr/sbin/depmod"  # a user's PATH may lack sbin
    subprocess.run([depmod, "--basedir", root, modules.name], check=True)
    return root
