"""The opened port that queues are made on, as they need it."""

from __future__ import annotations

from threading import Lock
from typing import Any, NamedTuple, Protocol

from mooncache.providers.rdma.ports import Port


class Limits(NamedTuple):
    """The capacities of a device, as it says itself.

    Attributes:
        max_qp_wr: work requests in one send or receive queue.
        max_sge: ranges of memory in one work request.
        max_cqe: entries of one completion queue.
        max_mr_size: bytes of one registration.
        max_rd_atomic: RDMA reads under way on one connection, as far as it can both send and answer them.
        max_qp, max_mr: queue pairs and registrations.
        max_msg_sz: bytes of one message over the port.
    """

    max_qp_wr: int
    max_sge: int
    max_cqe: int
    max_mr_size: int
    max_rd_atomic: int
    max_qp: int
    max_mr: int
    max_msg_sz: int


class Closable(Protocol):
    """A resource that a NIC holds until it is closed."""

    def close(self) -> None:
        """Close the resource."""


class Device(Protocol):
    """An opened port, as its queues know it; see `Nic`, which is the only one."""

    port: Port
    gid: bytes
    gid_index: int
    lid: int
    limits: Limits
    telling: Lock
    verbs: Any
    context: Any
    pd: Any
    context_address: int
    pd_address: int

    def hold(self, resource: Closable) -> None:
        """Keep a resource until it is closed, at the latest with this device."""

    def let_go(self, resource: Closable) -> None:
        """Forget a resource, which closes by itself."""
