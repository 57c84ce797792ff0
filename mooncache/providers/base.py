"""The contract of a provider: resources in Python, slices through two function pointers.

`open` makes completion queues for each worker, `connect` queue pairs for each worker to one peer. Both hand out
addresses of `ibv_cq` and `ibv_qp` structs whose context holds `poll_cq` and `post_send` (see `kernels/verbs.py`); from
then on the kernels call those and Python is not involved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mooncache import limits
from mooncache.background import Background
from mooncache.deadline import Deadline
from mooncache.descriptor import Descriptor, Keys
from mooncache.discovery.messages import Answer, Reply, Request
from mooncache.errors import UsageError
from mooncache.kernels.arrays import Row, rows_of
from mooncache.kernels.records.table import TABLE
from mooncache.kernels.state import CompletionQueue, QueuePair, QueueRow


class Link(NamedTuple):
    """The things a provider needs besides a peer's descriptor in order to connect.

    Attributes:
        table: the header of the peer's region table, whose `gone` the provider sets to 1 when the connection is broken.
        dial: asks the peer `(purpose, body)`; over its Unix socket when a name for that is given. See `discovery.dial`.
        caller: name of the engine that connects.
        deadline: for connecting; whatever `connect` and `start` wait for, they wait for under it.
    """

    table: Row
    dial: Callable[..., Answer]
    caller: str = ""
    deadline: Deadline = Deadline()


def _nobody(*_: object, **__: object) -> Answer:
    raise UsageError("this peer lives in the same process and is not dialled")


HERE = Link(Row(rows_of(TABLE)), _nobody)
"""The link of peers that live in the same process."""


class Provider(ABC):
    """One wire of one engine. Methods are called by one thread at a time; but `register` and `unregister`, which may
    take long, also while others are under way, and by several threads; so is `serve`, by threads of the listener.

    Attributes:
        descriptors: for each worker those that become readable when `poll_cq` has something to do; empty when the wire
            has no such thing and must be polled.
        spins: completions come within microseconds and no descriptor tells of them, so that workers poll without a
            pause while they wait for any. Its descriptors count by their edges: `poll_cq` may leave them readable.
        region_bytes: longest range that `register` takes; the engine cuts longer ones.
        trouble_fd: eventfd that workers write to when a queue pair's state changes; -1 where none ever does.
        reaches_gpus: `register` takes addresses of a GPU's memory.
        background: its threads, if it has any, and what is wrong with them.
    """

    name: str
    descriptors: Sequence[Sequence[int]] = ()
    spins: bool = True
    region_bytes: int = 1 << 62
    trouble_fd: int = -1
    reaches_gpus: bool = False

    @property
    def background(self) -> Background:
        """The threads of the provider, made at first use, so that a provider need not call any `__init__` of ours."""
        return vars(self).setdefault("_background", Background())  # type: ignore[no-any-return]

    @abstractmethod
    def open(
        self, workers: int, queue_depth: int, inbox: np.ndarray, peers: int = limits.PEERS
    ) -> list[list[CompletionQueue]]:
        """Make the device; return the completion queues of each worker. Raises TransportError.

        Args:
            queue_depth: work requests that are to be in flight on one queue pair.
            inbox: int64 words of the engine's inbox (`kernels/inbox.py`), for what peers SEND.
            peers: connected to at once, at most.
        """

    @abstractmethod
    def register(self, address: int, length: int, access: int) -> Keys:
        """Let the device reach `length` bytes at `address`. The bytes must stay mapped until `unregister`."""

    @abstractmethod
    def unregister(self, keys: Keys) -> None:
        """Withdraw a registration; when this returns, no peer's operation touches the range any more."""

    @abstractmethod
    def describe(self, unix: str = "") -> object:
        """Return what a peer's `connect` needs, as `Descriptor.data`.

        `unix`: name of the engine's abstract Unix socket.
        """

    @abstractmethod
    def connect(self, peer: Descriptor, link: Link) -> list[list[QueuePair]]:
        """Connect to a peer; return the queue pairs of each worker.

        A peer that was connected before under its name, and may have been opened anew since, keeps its queue pairs:
        from now on they lead to what `peer` describes. Raises TransportError, and EngineClosed when `link.deadline` was
        ended. May wait for the network, as long as that lasts: the engine calls it for one peer at a time, but for
        several peers at once.
        """

    def start(self, peer: str, queues: Sequence[QueueRow], ctl: int) -> None:  # noqa: B027  (most just go on)
        """Start to give orders about a peer's queue pairs: the workers know them now, by these rows.

        `ctl`: control block for that, used by one thread at a time. Raises TransportError where no bytes get through.
        """

    def stop(self, peer: str, queues: Sequence[QueueRow]) -> None:  # noqa: B027  (most have nothing to do)
        """Stop to give orders about a peer's queue pairs: their rows are about to be taken from the workers."""

    def disconnect(self, peer: str) -> None:  # noqa: B027  (where nothing takes long, it ends by itself)
        """End the connection to a peer: what is under way to it fails as PEER_GONE, or ends by itself. Returns at once.

        No batch to it can be submitted any more. It may be connected to again, or forgotten.
        """

    def quiet(self, peer: str) -> bool:
        """Return whether nothing is under way or in doubt of a peer whose connection has ended: it can be forgotten."""
        return True

    def forget(self, peer: str) -> None:  # noqa: B027  (providers of tests need none)
        """Free all that belongs to a peer, if anything does: disconnected, quiet, and seen by no worker."""

    def serve(self, request: Request) -> Reply:
        """Answer a peer's `Link.dial`. Raises UsageError for a purpose it does not know."""
        raise UsageError(f"provider {self.name!r} knows no purpose {request.purpose!r}")

    def connected(self, peer: str) -> bool:
        """Return whether the connection to a peer has not broken since `connect`."""
        return True

    def wire(self, peer: str) -> str:
        """Describe in a few words how bytes travel to a connected peer."""
        return self.name

    def fence(self, caller: str, limit_s: float) -> int:
        """Let nothing land any more that the engine called `caller` has submitted; return how many connections end.

        Blocks for `limit_s` at most. Raises TransportError when that is not to be had: a process of this host was
        stopped while it copied.
        """
        raise UsageError(f"provider {self.name!r} has no fence")

    @property
    def unsettled(self) -> int:
        """The slices sent on connections that ended, of which it is not known that they land no more."""
        return 0

    def settle(self, limit_s: float) -> None:  # noqa: B027  (most leave nothing in doubt)
        """Wait until nothing is in doubt, for at most so long."""

    def hang_up(self) -> None:  # noqa: B027  (most have nothing to do)
        """Break all connections, so that workers get the last answers now; do nothing where that is not possible."""

    @abstractmethod
    def close(self) -> None:
        """Close the device. No queue pair or completion queue may be used afterwards."""
