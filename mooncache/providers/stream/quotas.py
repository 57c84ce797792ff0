"""Quotas: how much of an engine one peer may take, and how much of the process all of them together."""

from __future__ import annotations

import resource
from collections.abc import Sequence

from mooncache import limits
from mooncache.errors import CapacityError
from mooncache.providers.stream.connections import LANES_MOST

LANES = limits.WORKERS * LANES_MOST
"""Connections of one peer to us: of each of its workers as many as may be."""

LEASES = 4
"""Mappings of our memory by one peer: it needs one, while its former ones may not have been noticed to have ended."""


def check_lanes(callers: Sequence[str], caller: str) -> None:
    """Raise CapacityError when a peer may have no further connection to us; `callers`: of all connections."""
    if callers.count(caller) >= LANES:
        raise CapacityError(f"{caller!r} has {LANES} connections to this engine, as many as one peer may")
    _check_descriptors(len(callers))


def check_leases(callers: Sequence[str], caller: str) -> None:
    """Raise CapacityError when a peer may not map our memory once more; `callers`: of all mappings."""
    if callers.count(caller) >= LEASES:
        raise CapacityError(f"{caller!r} maps memory of this engine {LEASES} times already, as often as one peer may")
    _check_descriptors(2 * len(callers))  # a socket and the guards


def _check_descriptors(held: int) -> None:
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and held >= most // 2:
        raise CapacityError(
            f"peers hold {held} descriptors of this engine, half of the {most} that its process may have; let it have "
            "more (`ulimit -n`)"
        )
