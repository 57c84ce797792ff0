"""The contract of a provider: resources in Python, slices through two function pointers.

`open` makes a completion queue per worker; `connect` a queue pair per worker for one peer. Both hand out addresses of
`ibv_cq` and `ibv_qp` structs whose context holds `poll_cq` and `post_send` (see `kernels/verbs.py`); from then on the
kernels call those and Python is not involved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple


class Keys(NamedTuple):
    """What a device answers to a registration: the local key, and the key peers must show."""

    lkey: int
    rkey: int


class RemoteRegion(NamedTuple):
    """A region as its owner describes it to peers."""

    address: int
    length: int
    rkey: int
    access: int  # bits of layout.Access


@dataclass(frozen=True)
class Descriptor:
    """What an engine tells its peers: who it is, what is registered, and what its provider needs to connect."""

    name: str
    provider: str
    regions: tuple[RemoteRegion, ...]
    data: object


class Provider(ABC):
    """One wire of one engine. Methods are called by one thread at a time."""

    name: str

    @abstractmethod
    def open(self, workers: int, queue_depth: int) -> list[int]:
        """Make the device; returns the address of one `ibv_cq` a worker. Raises TransportError."""

    @abstractmethod
    def register(self, address: int, length: int, access: int) -> Keys:
        """Let the device reach `length` bytes at `address`. The bytes must stay mapped until `unregister`."""

    @abstractmethod
    def unregister(self, keys: Keys) -> None:
        """Withdraw a registration; when this returns, no peer's operation touches the range any more."""

    @abstractmethod
    def describe(self) -> object:
        """What a peer's `connect` needs, as `Descriptor.data`."""

    @abstractmethod
    def connect(self, peer: Descriptor) -> list[int]:
        """Connect to a peer; returns the address of one `ibv_qp` a worker.

        A peer that was connected before under its name, and may have been opened anew since, keeps its queue pairs:
        from now on they lead to what `peer` describes. Raises TransportError.
        """

    @abstractmethod
    def close(self) -> None:
        """Give everything back. No queue pair or completion queue may be used afterwards."""
