"""An engine's description for its peers: who it is, which regions it has registered, and the keys peers must show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Keys(NamedTuple):
    """The answer to a registration: for each NIC the local key, and the key peers must show."""

    lkeys: tuple[int, ...]
    rkeys: tuple[int, ...]


class RemoteRegion(NamedTuple):
    """A region as its owner describes it to peers."""

    address: int
    length: int
    rkeys: tuple[int, ...]  # one for each of its NICs
    access: int  # bits of enums.Access

    def covered_by(self, other: RemoteRegion) -> bool:
        """Return whether every byte of this region can be reached through the other, in every way."""
        end, others = self.address + self.length, other.address + other.length
        return other.address <= self.address and end <= others and self.access & ~other.access == 0


@dataclass(frozen=True)
class Descriptor:
    """An engine's description for its peers: its name, what is registered, and what its provider needs to connect.

    Attributes:
        generation: random, 63 bits; another one means that another engine has this name now.
        address: "host:port" where it answers handshakes; empty when it is reached in this process only.
        data: for providers that reach other processes, plain JSON values.
    """

    name: str
    generation: int
    address: str
    provider: str
    regions: tuple[RemoteRegion, ...]
    data: Any
