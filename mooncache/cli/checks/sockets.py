"""Buffers of sockets: they limit how much of a TCP connection is under way, and so its rate over a distance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mooncache.cli.checks.base import ROOT, Finding, check
from mooncache.providers.stream.connections import BUFFER_BYTES, buffers

FAR_S = 0.02
"""A round trip between two regions; within one it is a twentieth of that."""

CURE = "as root: sysctl -w net.ipv4.tcp_rmem='4096 131072 33554432' net.ipv4.tcp_wmem='4096 16384 33554432'"


@check("socket buffers")
def sockets(root: Path = ROOT) -> Iterator[Finding]:
    """Check whether connections get large buffers, by the system's tuning or by asking."""
    given = {direction: buffers(direction, root / "proc/sys/net") for direction in "wr"}
    most = min(max(each) for each in given.values())
    text = f"{most / 2**20:.1f} MiB of a TCP connection may be under way"
    text += f": at most {most / FAR_S / 1e6:,.0f} MB/s at a round trip of {FAR_S * 1e3:.0f} ms"
    if most < BUFFER_BYTES:
        yield Finding("socket buffers", "warning", text, CURE)
    else:
        yield Finding("socket buffers", "ok", text)
