"""Memory: how much may be pinned, in pages of which size, and whether it can be shared."""

from __future__ import annotations

import mmap
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from mooncache.cli.checks.base import ROOT, Finding, check, number, read, read_if_there
from mooncache.errors import CapacityError, TransportError
from mooncache.segments import HUGE_BYTES, allocate

CAP_IPC_LOCK = 14
MEMLOCK_CURES = (
    "shell: ulimit -l unlimited    (as root; for users: '* - memlock unlimited' in /etc/security/limits.conf)\n"
    "systemd: LimitMEMLOCK=infinity\n"
    "docker: docker run --ulimit memlock=-1 ..."
)
SHARED_WIRES = ("auto", "shm")


def capable(bit: int, root: Path = ROOT) -> bool:
    """Return whether this process has a capability for the whole machine, not only in a user namespace."""
    held = re.search(r"^CapEff:\s*([0-9a-f]+)$", read(root / "proc/self/status"), re.MULTILINE)
    everybody = (read_if_there(root / "proc/self/uid_map") or "").split() in ([], ["0", "0", "4294967295"])
    return everybody and held is not None and bool(int(held[1], 16) >> bit & 1)


def total_bytes(root: Path = ROOT) -> int:
    """Return the memory of this machine."""
    found = re.search(r"^MemTotal:\s*(\d+) kB$", read(root / "proc/meminfo"), re.MULTILINE)
    if found is None:
        raise ValueError(f"expected MemTotal in {root / 'proc/meminfo'}")
    return int(found[1]) << 10


@check("locked memory")
def locked(need: str, limit: int, root: Path = ROOT) -> Iterator[Finding]:
    """Check the limit of locked memory (RLIMIT_MEMLOCK, bytes): registered memory is locked while a NIC may use it."""
    spelled = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / (1 << 20):,g} MiB"
    if limit == resource.RLIM_INFINITY or limit >= total_bytes(root):
        yield Finding("locked memory", "ok", spelled)
    elif capable(CAP_IPC_LOCK, root):
        yield Finding("locked memory", "ok", f"{spelled}, which CAP_IPC_LOCK lifts")
    else:
        text = f"{spelled}: no more than that can be registered with an RDMA device; tcp and shm lock nothing"
        yield Finding("locked memory", "error" if need == "rdma" else "warning", text, MEMLOCK_CURES)


@check("huge pages")
def huge(root: Path = ROOT) -> Iterator[Finding]:
    """Check pages of 2 MiB: those set aside, which `engine.allocate(huge=True)` takes, and transparent ones."""
    kinds = root / "sys/kernel/mm"
    pages = kinds / f"hugepages/hugepages-{HUGE_BYTES >> 10}kB"
    automatic = chosen(kinds / "transparent_hugepage/enabled")
    shared = chosen(kinds / "transparent_hugepage/shmem_enabled")
    setting = f"transparent ones: {automatic}, in shared memory: {shared}"
    if not pages.is_dir():
        yield Finding("huge pages", "warning", f"this kernel has none of 2 MiB; {setting}")
        return
    free, there = number(pages / "free_hugepages"), number(pages / "nr_hugepages")
    text = f"{free:,} of {there:,} pages of 2 MiB are free; {setting}"
    if free:
        yield Finding("huge pages", "ok", text)
    else:
        reason = "engine.allocate(huge=True) takes ordinary pages, of which a NIC has to look up 512 times as many"
        yield Finding("huge pages", "warning", f"{text}: {reason}", "sysctl -w vm.nr_hugepages=4096")


def chosen(path: Path) -> str:
    """Return the setting in brackets: `always [madvise] never` -> madvise; unknown where the kernel tells none."""
    found = re.search(r"\[(\w+)\]", read_if_there(path) or "")
    return found[1] if found else "unknown"


@check("shared memory")
def shareable(need: str) -> Iterator[Finding]:
    """Check whether memory can be made that peers on this host can map: allocate one page and free it."""
    try:
        allocate(mmap.PAGESIZE)
    except (CapacityError, TransportError) as error:
        text = f"{error}; engine.allocate and the shm wire need memfd_create"
        cure = "docker: docker run --security-opt seccomp=PROFILE ... with a profile that allows memfd_create"
        yield Finding("shared memory", "error" if need in SHARED_WIRES else "warning", text, cure)
    else:
        yield Finding("shared memory", "ok", "by memfd; /dev/shm is not used, and its size does not matter")
