"""Cores: how many this process may use, for how much of the time, and how fast they are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mooncache.cli.checks.base import ROOT, Finding, check, read_if_there
from mooncache.cores import cpus_of

CORES = 4  # one engine's worker, which polls; the caller's thread; the listener and other small threads; the system


def quota(root: Path = ROOT) -> float:
    """Return how many cores' time this process's control groups (version 2) grant; infinite without a limit."""
    lines = (read_if_there(root / "proc/self/cgroup") or "").splitlines()
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    top = root / "sys/fs/cgroup"
    granted = float("inf")
    for group in (top / own, *(parent for parent in (top / own).parents if parent.is_relative_to(top))):
        limit, _, period = (read_if_there(group / "cpu.max") or "max").partition(" ")
        if limit != "max":
            granted = min(granted, int(limit) / int(period))
    return granted


@check("cores")
def cores(allowed: set[int], root: Path = ROOT) -> Iterator[Finding]:
    """Compare the cores that this process may use (`os.sched_getaffinity`) with what a polling worker needs."""
    there, granted = cpus_of(root / "sys/devices/system/cpu/online") or allowed, quota(root)
    text = f"{len(allowed)} of {len(there)} cores may be used"
    if granted < len(allowed):
        text += f", for {granted:g} cores' worth of time (cgroup cpu.max)"
    if min(len(allowed), granted) >= CORES:
        yield Finding("cores", "ok", text)
        return
    reason = f"an engine's worker polls on one while it has work; with fewer than {CORES} the callers wait for it"
    cures = []
    if len(allowed) < CORES <= len(there):
        cures = [f"shell: taskset -c {min(there)}-{max(there)} COMMAND", "docker: docker run --cpuset-cpus=0-7 ..."]
    if granted < CORES:
        cures += ["systemd: CPUQuota=", "docker: docker run --cpus=8 ..."]
    yield Finding("cores", "warning", f"{text}: {reason}", "\n".join(cures) or None)


@check("cpu frequency")
def frequency(allowed: set[int], root: Path = ROOT) -> Iterator[Finding]:
    """Check the governors that keep the frequency of the cores that this process may use."""
    files = [root / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor" for core in sorted(allowed)]
    governors = Counter(governor for governor in map(read_if_there, files) if governor)
    spelled = ", ".join(f"{name} on {count} cores" for name, count in governors.most_common())
    if not governors:
        yield Finding("cpu frequency", "ok", "not governed here (usual in a virtual machine)")
    elif set(governors) == {"performance"}:
        yield Finding("cpu frequency", "ok", spelled)
    else:
        text = f"{spelled}: a core that slept is slow at first, and a small transfer is over before it is fast"
        yield Finding("cpu frequency", "warning", text, "cpupower frequency-set -g performance")
