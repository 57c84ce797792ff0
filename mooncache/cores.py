"""This machine's cores, as the kernel numbers them."""

from __future__ import annotations

from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")


def cpus_of(path: Path) -> set[int]:
    """Read the CPUs of a kernel list such as `0,8-11`; none when it is not there."""
    parts = path.read_text().split(",") if path.exists() else []
    ranges = [[int(end) for end in part.split("-")] for part in parts]
    return {cpu for ends in ranges for cpu in range(ends[0], ends[-1] + 1)}


def siblings_of(cpu: int) -> set[int]:
    """Return the hardware threads of a CPU's core, itself among them; none where the kernel does not say."""
    return cpus_of(CPUS / f"cpu{cpu}/topology/thread_siblings_list")
