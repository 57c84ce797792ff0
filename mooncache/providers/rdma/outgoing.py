"""A connection of ours to a peer: the life of its queue pairs (`lanes.py`), and what is done when one of them breaks.

A queue pair that broke is mended in four steps, in a thread of the connection's own while it takes:

    DRAINED --the peer resets its end--> RETURN: its slices go over other queue pairs
    CLOSED  --both ends connect anew---> PROBE: ready when an empty write gets through, else from the start, later

Only after the first no packet of it can reach the peer's memory any more. A peer that does not answer to that within
LOST_S, that knows nothing of this connection, or whose end of the connection's socket closes, is gone: all that is
under way to it fails as PEER_GONE.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from mooncache.background import Background
from mooncache.descriptor import Descriptor
from mooncache.errors import DiscoveryError, MooncacheError, TransportError
from mooncache.kernels.enums import Order, QueueState
from mooncache.kernels.state import QueueRow
from mooncache.kernels.verbs import WcStatus
from mooncache.providers.base import Link
from mooncache.providers.rdma.hub import NoteQueue
from mooncache.providers.rdma.lanes import Lane, Lanes
from mooncache.providers.rdma.owner import Owner
from mooncache.providers.settling import Settler
from mooncache.threads import Thread

log = logging.getLogger("mooncache")

LOST_S = 5.0
"""A peer that has not answered for this long, while a queue pair waits for it, is gone."""

PROBE_S = 20.0
"""Until then a new connection's first write must have got through: a NIC gives up after seconds, at worst."""

BACKOFF_S, BACKOFF_MOST_S = 0.1, 2.0
"""Pause before a queue pair that did not work is tried again; doubled each time."""

NOTE_S = 2.0
"""An answer to a notification that takes longer is lost: a peer's worker answers within microseconds."""


class Outgoing:
    """A connection to a peer that we post to.

    Attributes:
        pairs: for each worker its queue pairs, the last one for notifications.
        gone: it is of no use any more; connect anew.
    """

    def __init__(self, provider: Owner, peer: Descriptor, link: Link, notes: Sequence[NoteQueue]) -> None:
        self._provider, self.peer, self.link, self._notes = provider, peer.name, link, notes
        self._lanes = Lanes(provider, peer, link, notes)
        self.generation = peer.generation
        self.settler = Retirer(self, provider.background)
        self._lost = 0  # work requests that were in flight when the peer was lost
        self.gone = self._closed = False
        self._lock = threading.Lock()
        self._stirred = threading.Event()
        self._mending: Thread | None = None
        self._rows: list[QueueRow] = []
        self._order: Callable[[QueueRow, Order], None] = lambda row, order: None
        self.socket: socket.socket | None = None
        self._note = 0, 0.0  # number of the last notification that was seen on its way, and since when
        try:
            self._lanes.make()
            self.pairs = self._lanes.pairs
            self.socket = self._lanes.dial()
        except BaseException:
            self.close()
            raise

    # -------------------------------------------------------------------------- the beginning
    def start(self, rows: Sequence[QueueRow], order: Callable[[QueueRow, Order], None]) -> None:
        """Probe which queue pairs work: the workers know them now. Raises TransportError when none does."""
        if self._rows:
            return
        self._order = order
        with self._provider.lock:
            self._rows = [row for row in rows if row.pair.breaks]
            probed = []
            for lane, row in zip(self._lanes.data, self._rows, strict=True):
                if self._lanes.is_up(lane):
                    lane.ordered = QueueState.CLOSED
                    self._give(row, Order.PROBE)
                    probed.append(row)
        limit = self.link.deadline.within(PROBE_S)
        limit.waits_for(f"the first bytes to peer {self.peer!r} by RDMA")
        opening = (QueueState.CLOSED, QueueState.PROBING, QueueState.BROKEN)
        limit.until(lambda: self.gone or not any(row.state in opening for row in probed))
        if self.gone:
            raise TransportError(f"peer {self.peer!r} ended the connection right after its answer; try again")
        if self._count(QueueState.READY) == 0:
            why = ", ".join(sorted({self.why(row) for row in probed}))
            self.lose("no bytes got through")
            raise TransportError(
                f"peer {self.peer!r} answers, but no bytes get through to it by RDMA: {why} on "
                f"{self._lanes.wires()}; do the networks of these NICs reach each other (ping the GIDs), with this MTU?"
            )
        self.stir()

    def _give(self, row: QueueRow, order: Order) -> None:
        """Give an order about a queue pair. None replaces, or follows, the order to lose everything."""
        with self._provider.lock:
            if not self.gone:
                self._order(row, order)

    def _count(self, state: QueueState) -> int:
        return sum(row.state == state for row in self._rows)

    @staticmethod
    def why(row: QueueRow) -> str:
        """Explain the error that broke a queue pair."""
        try:
            return WcStatus(row.cause).name if row.cause else "nothing came back"
        except ValueError:
            return f"completion status {row.cause}"

    def wire(self) -> str:
        """Describe how bytes travel, in a few words."""
        return f"rdma, {self._count(QueueState.READY)} of {len(self._rows)} queue pairs ready: {self._lanes.wires()}"

    # -------------------------------------------------------------------------- mending
    def stir(self) -> None:
        """Something may have changed: look, in a thread of the connection's own, as long as something is to be done."""
        self._stirred.set()
        with self._lock:
            idle = self._mending is None and self._rows and not self.gone and not self._closed
            if idle and (self._count(QueueState.READY) < len(self._rows) or self._lanes.fallen()):
                self._mending = self._provider.background.start(
                    f"mooncache-mend-{self.peer}", self._mend, lambda error: self.lose(f"it cannot be mended: {error}")
                )

    def _mend(self) -> None:
        since = time.monotonic()
        while True:
            with self._lock:
                broken = [row for row in self._rows if row.state != QueueState.READY]
                if self.gone or self._closed or not (broken or self._lanes.fallen()):
                    self._mending = None
                    return
            self._stirred.clear()
            try:
                if self._mend_once():
                    since = time.monotonic()
                elif time.monotonic() - since > LOST_S + PROBE_S:
                    self.lose("it answers, but no bytes get through to it by RDMA any more")
            except (TransportError, DiscoveryError) as error:
                refused = isinstance(error.__cause__, ConnectionRefusedError | ConnectionResetError)
                if refused or time.monotonic() - since > LOST_S:
                    self.lose(f"it does not answer: {error}")
            except MooncacheError as error:
                self.lose(f"it knows nothing of this connection any more: {error}")
            self._stirred.wait(BACKOFF_S)

    def _mend_once(self) -> bool:
        """Do what can be done now. False when no queue pair works, so that the peer is out of reach after all."""
        now = time.monotonic()
        for lane, row in zip(self._lanes.data, self._rows, strict=True):
            if row.state == QueueState.BROKEN:
                lane.verbs.fail()  # so that what is in flight comes back, whatever broke it
        seen = self.settler.counters.breaks
        drained = [(i, row) for i, row in enumerate(self._rows) if self._is_new(i, QueueState.DRAINED)]
        if drained:
            self._ask("rdma-fence", {"queues": [i for i, _ in drained], "notes": []})
            fenced = {i for i, _ in drained}
            if not any(self._is_suspect(i) for i in range(len(self._rows)) if i not in fenced):
                self.settler.counters.confirm(seen)
            for i, row in drained:
                log.warning("peer %r: queue pair %s broke: %s", self.peer, self._lanes.name(i), self.why(row))
                self._postpone(self._lanes.data[i])
                self._lanes.data[i].ordered = QueueState.DRAINED
                self._give(row, Order.RETURN)
        closed = [i for i in range(len(self._rows)) if self._is_new(i, QueueState.CLOSED)]
        closed = [i for i in closed if self._may_try(self._lanes.data[i], now)]
        fallen = [i for i in self._lanes.fallen() if self._may_try(self._lanes.notes[i], now)]
        for i in closed:  # one by one: a peer whose own port is down refuses that path only
            self._try_to_repair([i], [])
        for i in fallen:
            self._try_to_repair([], [i])
        for i, row in enumerate(self._rows):
            if row.state == QueueState.READY:
                self._lanes.data[i].failures = 0
        return self._count(QueueState.READY) > 0

    def _may_try(self, lane: Lane, now: float) -> bool:
        return lane.not_before <= now and self._lanes.carries(lane)

    def _is_new(self, i: int, state: QueueState) -> bool:
        """Return whether a queue pair's state was not answered with an order yet: the worker obeys when it can."""
        lane = self._lanes.data[i]
        if self._rows[i].state != lane.ordered:
            lane.ordered = QueueState.READY
        return self._rows[i].state == state != lane.ordered

    def _is_suspect(self, i: int) -> bool:
        """Return whether packets of a broken queue pair may be on their way: its other end was not reset since."""
        state = self._rows[i].state
        return state == QueueState.BROKEN or (state == QueueState.DRAINED and self._lanes.data[i].ordered != state)

    @property
    def unsettled(self) -> int:
        """Work requests in flight when the peer was lost, of which it is not known that they land no more."""
        return self._lost if self.settler.in_doubt else 0

    def retire(self, link: Link) -> None:
        """Ask the peer, or the engine that has its address by now, to end this connection at its side.

        Raises TransportError or DiscoveryError: it did not answer.
        """
        seen = self.settler.counters.breaks
        link.dial("rdma-retire", {"connection": self._lanes.number}, deadline=link.deadline).sock.close()
        self.settler.counters.confirm(seen)

    def _postpone(self, lane: Lane) -> None:
        lane.not_before = time.monotonic() + min(BACKOFF_S * 2**lane.failures, BACKOFF_MOST_S)
        lane.failures += 1

    def _try_to_repair(self, closed: Sequence[int], fallen: Sequence[int]) -> None:
        """Connect queue pairs anew; where that fails and others work, later."""
        try:
            self._repair(closed, fallen)
        except TransportError as error:
            for lane in [*(self._lanes.data[i] for i in closed), *(self._lanes.notes[i] for i in fallen)]:
                self._postpone(lane)
            if self._count(QueueState.READY) == 0:
                raise
            log.info("peer %r: a queue pair waits for its path: %s", self.peer, error)

    def _repair(self, closed: Sequence[int], fallen: Sequence[int]) -> None:
        """Connect queue pairs of which nothing is under way anew, at both ends."""
        lanes, note_lanes = [self._lanes.data[i] for i in closed], [self._lanes.notes[i] for i in fallen]
        for lane in [*lanes, *note_lanes]:
            lane.verbs.reset()
            lane.psn = secrets.randbits(24)
        told = self._ask(
            "rdma-repair",
            {
                "queues": [[i, lane.psn] for i, lane in zip(closed, lanes, strict=True)],
                "notes": [[i, lane.psn] for i, lane in zip(fallen, note_lanes, strict=True)],
            },
        )
        with self._provider.lock:  # not after `lose` has failed them
            if self._closed or self.gone:
                return
            for lane, psn in zip([*lanes, *note_lanes], [*told["queues"], *told["notes"]], strict=True):
                self._lanes.connect(lane, int(psn))
            for i in fallen:
                self._postpone(self._lanes.notes[i])
                self._lanes.record.raise_rail(i, 0)
            for i in closed:
                self._lanes.data[i].ordered = QueueState.CLOSED
                self._give(self._rows[i], Order.PROBE)

    def _ask(self, purpose: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.link.dial(purpose, {"connection": self._lanes.number, **body})
        answer.sock.close()
        return answer.body

    def look_at_note(self) -> None:
        """Send a notification that was not answered for long over another rail: its answer was lost."""
        number, now = self._lanes.record.under_way, time.monotonic()
        seen, since = self._note
        if number != seen or not any(queue.busy for queue in self._notes):
            self._note = number, now
        elif now - since > NOTE_S:
            self._note = number, now
            self._lanes.record.lower_rail(self._lanes.record.rail)

    def fail_nic(self, nic: int) -> None:
        """Get back at once what is on a NIC of ours that went down, instead of after the NIC's patience."""
        for lane, row in zip(self._lanes.data, self._rows, strict=False):
            if self._lanes.is_on(lane, nic):
                self._give(row, Order.BREAK)
                with suppress(TransportError):
                    lane.verbs.fail()

    # -------------------------------------------------------------------------- the end
    def lose(self, why: str) -> None:
        """Let all that is under way to the peer fail: it is gone."""
        with self._provider.lock:
            if self.gone or self._closed:
                return
            self.gone = True
            log.warning("connection to peer %r ended: %s", self.peer, why)
            self._lost = sum(row.outstanding for row in self._rows)
            self.settler.counters.end_epoch(doubtful=self._lost > 0)
            self.link.table.put("gone", 1)
            for row in self._rows:
                self._order(row, Order.LOSE)
            for lane in [*self._lanes.data, *self._lanes.notes]:
                with suppress(TransportError):
                    lane.verbs.fail()
            if self.socket is not None:  # its end is the end of the connection for the peer, which lets go of its side
                with suppress(OSError):
                    self.socket.shutdown(socket.SHUT_RDWR)
        self._stirred.set()
        self.settler.look()

    @property
    def quiet(self) -> bool:
        """True when no worker has anything to do with its queue pairs any more."""
        busy = any(queue.busy for queue in self._notes)
        return not busy and all(row.state == QueueState.CLOSED for row in self._rows)

    def close(self) -> None:
        """Give everything back. It must be quiet, or the workers have left."""
        with self._lock:
            self._closed = True
            mending = self._mending
        self.settler.close()
        self._stirred.set()
        if mending is not None:
            mending.join()
        self._lanes.close()
        if self.socket is not None:
            self._provider.forget_socket(self.socket)
            self.socket.close()


class Retirer(Settler):
    """Asks a peer that was lost to end the connection at its side."""

    def __init__(self, outgoing: Outgoing, background: Background) -> None:
        super().__init__(outgoing.peer, outgoing.link, background)
        self._outgoing = outgoing

    def ask(self) -> None:
        """See `Settler.ask`."""
        self._outgoing.retire(self.link._replace(deadline=self.deadline))
