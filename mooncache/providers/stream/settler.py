"""Connections that ended with slices on them: the peer is asked to retire them, and some are made anew."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from mooncache.background import Background
from mooncache.errors import MooncacheError
from mooncache.providers.base import Link
from mooncache.providers.settling import Settler
from mooncache.providers.stream.connections import Port, StreamQueue, give_up


class StreamSettler(Settler):
    """Asks a peer to retire the connections of queue pairs that have ended, and renews those that this end broke.

    Args:
        background: runs it.
        lock: held while queue pairs change connections.
        queues: to the peer, each with the port of its worker.
        connect: connects a queue pair that is new or broken.
    """

    def __init__(
        self, peer: str, link: Link, background: Background, lock: threading.Lock,
        queues: Sequence[tuple[Port, StreamQueue]], connect: Callable[[Port, StreamQueue, str, Link], None],
    ) -> None:  # fmt: skip
        super().__init__(peer, link, background)
        self._changing, self._connect = lock, connect
        self._ports, self._queues = [port for port, _ in queues], [queue for _, queue in queues]

    @property
    def in_doubt(self) -> bool:
        """See `Settler.in_doubt`; also whether a connection waits to be renewed."""
        return super().in_doubt or any(queue.renewing for queue in self._queues)

    @property
    def slices(self) -> int:
        """The number of slices in doubt."""
        return sum(queue.in_doubt for queue in self._queues)

    def ask(self) -> None:
        """See `Settler.ask`. What is connected by now has been retired by that."""
        for port, queue in zip(self._ports, self._queues, strict=True):
            if queue.renewing:
                self._renew(port, queue)
        with self._changing:
            owed = [(q, q.row["doubt"], q.ticket) for q in self._queues if q.in_doubt and q.broken]
        if owed:
            asked = {"tickets": [list(ticket) for _, _, ticket in owed]}
            self.link.dial("retire", asked, deadline=self.deadline).sock.close()
        for queue, total, _ in owed:
            queue.settle(total)

    def _renew(self, port: Port, queue: StreamQueue) -> None:
        """Connect a queue pair anew; if that fails, what waits for it fails, too."""
        try:
            # Not under the deadline of the connect that brought the link: that has passed.
            self._connect(port, queue, self.peer, self.link._replace(deadline=self.deadline))
        except MooncacheError:
            give_up(queue.address)
            raise

    def forgive(self) -> None:
        """See `Settler.forgive`."""
        for queue in self._queues:
            queue.settle(queue.row["doubt"])
