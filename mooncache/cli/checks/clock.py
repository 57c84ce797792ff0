"""The clock, from which deadlines and figures are read, in kernels as well."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from mooncache.cli.checks.base import ROOT, Finding, check, read_if_there

BEST = "tsc"
SLOW = ("hpet", "acpi_pm", "jiffies", "refined-jiffies")
"""Sources that are a device or a counter of ticks: reading one leaves the process, or is too coarse."""

SLOW_NS = 500
"""A read within the process takes 20 to 60 ns beside Python's call; one that enters the kernel, 500 to 2,000."""

READS, ROUNDS = 2000, 5


def read_ns() -> float:
    """Measure one read of the monotonic clock, ns, Python's call included: the best of several rounds."""
    clock, monotonic = time.clock_gettime_ns, time.CLOCK_MONOTONIC
    best = float("inf")
    for _ in range(ROUNDS):
        start = clock(monotonic)
        for _ in range(READS):
            clock(monotonic)
        best = min(best, (clock(monotonic) - start) / READS)
    return best


@check("clock")
def clock(cost_ns: float, root: Path = ROOT) -> Iterator[Finding]:
    """Check the clock's source, and what a read costs."""
    sources = root / "sys/devices/system/clocksource/clocksource0"
    source = read_if_there(sources / "current_clocksource")
    text = f"{source or 'unknown source'}; one read takes {cost_ns:.0f} ns from Python"
    if source not in SLOW and cost_ns < SLOW_NS:
        yield Finding("clock", "ok", text)
        return
    cure = None
    if source != BEST and BEST in (read_if_there(sources / "available_clocksource") or "").split():
        cure = f"echo {BEST} > {sources / 'current_clocksource'}    (for good: boot with clocksource={BEST})"
    elif source in SLOW:
        cure = f"dmesg | grep -i {BEST}    (says why the kernel does without it)"
    yield Finding("clock", "warning", f"{text}: each leaves the process, where {BEST} needs some 20 ns", cure)
