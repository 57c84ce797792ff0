"""The provider that connections belong to, as they need it."""

from __future__ import annotations

import socket
from typing import Any, Protocol

import numpy as np

from mooncache.background import Background
from mooncache.providers.rdma.hub import NoteHub
from mooncache.providers.rdma.nic import Nic
from mooncache.providers.rdma.paths import End, Plan
from mooncache.providers.rdma.queues import CompletionQueue, QueuePair


class Owner(Protocol):
    """A provider, as its connections know it; see `Rdma`, which is the only one.

    Attributes:
        lock: held while queue pairs are made, connected or destroyed.
        nics, ends: of this engine, and as peers are told of them.
        down: indices of NICs whose port is down.
        cqs: for each worker one a NIC.
        hub: of notifications.
        never: a word that stays 0.
    """

    lock: Any  # an RLock, whose type has no name until Python 3.13
    nics: list[Nic]
    ends: list[End]
    down: set[int]
    cqs: list[list[CompletionQueue]]
    hub: NoteHub
    never: np.ndarray
    queue_pairs: int
    signal: int

    @property
    def background(self) -> Background:
        """The provider's threads."""

    def ends_now(self) -> list[End]:
        """Return this engine's NICs, and whether each is up."""

    def depth_on(self, nic: Nic) -> int:
        """Return the work requests that may be in flight on one queue pair of a NIC."""

    def connect_pair(self, verbs: QueuePair, end: End, number: int, psn: int, remote_psn: int, plan: Plan) -> None:
        """Connect one end of a queue pair to the queue pair `number` at the peer's NIC."""

    def forget_socket(self, sock: socket.socket) -> None:
        """Stop watching a connection's socket, which is about to be closed."""
