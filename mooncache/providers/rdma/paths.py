"""Paths: which NIC here reaches which NIC there, and how much of the load each path should have."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mooncache.descriptor import Descriptor
from mooncache.errors import TransportError
from mooncache.kernels.records.queue import WEIGHT_ONE
from mooncache.providers.rdma.gids import common, is_ipv4, parse, text_of

VERSION = 2  # of what peers tell of themselves and of connections
NODES = "/sys/devices/system/node"
NEAR = 10  # distance of a NUMA node to itself (ACPI)


class End(NamedTuple):
    """A NIC as peers know it.

    Attributes:
        gid: of its port, 16 bytes.
        lid: of its port on InfiniBand; 0 on Ethernet.
        mtu: bytes of payload in a packet.
        rd_atomic: reads it has under way on one connection.
        rate: Gbit/s.
        up: its port can carry data.
    """

    gid: bytes
    lid: int
    mtu: int
    rd_atomic: int
    rate: float
    up: bool = True

    def told(self) -> list[Any]:
        """Return the end as peers are told of it."""
        return [text_of(self.gid), *self[1:]]


class PathOf(NamedTuple):
    """A path: indices of the NIC here and of the NIC at the peer."""

    local: int
    remote: int


class Plan(NamedTuple):
    """A path, what both ends keep to on it, and whether its ports were up at both when the peer was connected to."""

    path: PathOf
    mtu: int
    rd_atomic: int
    up: bool


def pair(here: Sequence[End], there: Sequence[End], peer: str) -> list[PathOf]:
    """Pair each NIC here with the NIC there whose GID has most in common with its own, of several in turn.

    NICs of one rail mostly share a subnet, whatever order each host lists them in. A path whose port is down at either
    end is one, too: it is used once it is up. Raises TransportError where no NIC there speaks the same link layer, or
    has an address of the same family, or where none of the paths is up.
    """
    paths = []
    for i, own in enumerate(here):
        fitting = [j for j, other in enumerate(there) if alike(own, other)]
        if fitting:
            turned = fitting[i % len(fitting) :] + fitting[: i % len(fitting)]
            paths.append(PathOf(i, max(turned, key=lambda j: common(own.gid, there[j].gid))))
    if not any(here[path.local].up and there[path.remote].up for path in paths):
        down = _listed([end for end in (*here, *there) if not end.up])
        raise TransportError(
            f"no NIC here can reach one of peer {peer!r}: GIDs {_listed(here)} here, "
            f"{_listed(there) or 'none'} there{down and f', down: {down}'}; both ends need RoCE "
            "addresses of one family, or InfiniBand (Rdma(family=...) or Rdma(gid_index=...) chooses)"
        )
    return paths


def alike(own: End, other: End) -> bool:
    """Return whether two ports can be on one network: both InfiniBand, or Ethernet with addresses of one family."""
    return bool(own.lid) == bool(other.lid) and (bool(own.lid) or is_ipv4(own.gid) == is_ipv4(other.gid))


def _listed(ends: Sequence[End]) -> str:
    return ", ".join(text_of(end.gid) for end in ends)


def weights(rates: Sequence[float], nodes: Sequence[int], root: str = NODES) -> list[int]:
    """Return each path's share of the load, WEIGHT_ONE for the best: its rate, less if its NIC is far away.

    Args:
        rates: Gbit/s of each path, the slower of its ends.
        nodes: NUMA node of each path's NIC here, -1 where unknown.
    """
    shares = [rate * NEAR / distance(node, root) for rate, node in zip(rates, nodes, strict=True)]
    best = max(shares)
    return [max(1, round(WEIGHT_ONE * share / best)) if best > 0 else WEIGHT_ONE for share in shares]


def distance(node: int, root: str = NODES) -> int:
    """Return the distance from this process's NUMA nodes to a node: the least, as firmware tells it; 10 is near."""
    try:
        distances = [int(d) for d in Path(root, f"node{node}", "distance").read_text().split()]
        own = [n for n in range(len(distances)) if runs_on(n, root)]
        return min((distances[n] for n in own), default=NEAR)
    except (OSError, ValueError, IndexError):
        return NEAR  # one node, or nobody knows


def runs_on(node: int, root: str = NODES) -> bool:
    """Return whether this process may run on a core of the node."""
    cores = set[int]()
    for part in Path(root, f"node{node}", "cpulist").read_text().strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cores |= set(range(int(first), int(last or first) + 1))
    return bool(cores & os.sched_getaffinity(0))


def ends_of(peer: Descriptor) -> list[End]:
    """Return the NICs that a peer's descriptor tells of.

    Raises TransportError when it is of another kind or release.
    """
    data = peer.data
    if not isinstance(data, dict) or data.get("rdma") != VERSION:
        raise TransportError(
            f"peer {peer.name!r} at {peer.address} uses provider {peer.provider!r} and no RDMA of version {VERSION}; "
            "open both ends with provider='rdma', of one release"
        )
    try:
        return [
            End(parse(str(gid)), int(lid), int(mtu), int(reads), float(rate), bool(up))
            for gid, lid, mtu, reads, rate, up in data["nics"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise TransportError(f"what peer {peer.name!r} says of its NICs does not hold: {error!r}") from error
