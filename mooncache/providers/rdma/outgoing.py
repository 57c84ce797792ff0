"""A connection of ours to a peer: queue pairs on every path, and what is done when one of them breaks.

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
from mooncache.kernels.state import QueuePair, QueueRow
from mooncache.kernels.verbs import WcStatus
from mooncache.limits import SLICES_GATHERED
from mooncache.providers.base import Link
from mooncache.providers.rdma.gids import text_of
from mooncache.providers.rdma.hub import NOTE_DEPTH, NoteQueue, Rail
from mooncache.providers.rdma.owner import Owner
from mooncache.providers.rdma.paths import VERSION, Plan, ends_of, pair, weights
from mooncache.providers.rdma.queues import QueuePair as Verbs
from mooncache.providers.settling import Settler
from mooncache.threads import Thread

log = logging.getLogger("mooncache")

LOST_S = 5.0
"""A peer that has not answered for this long, while a queue pair waits for it, is gone."""

PROBE_S = 20.0
"""Until then a new connection's first write must have got through: a NIC gives up after seconds, at worst."""

BACKOFF_S, BACKOFF_MOST_S = 0.1, 2.0
"""Pause before a queue pair that did not work is tried again; doubled each time."""

INLINE_BYTES = 64
"""Writes up to this long are copied into their work request: a cache line, which saves the NIC a fetch."""

NOTE_S = 2.0
"""An answer to a notification that takes longer is lost: a peer's worker answers within microseconds."""


class Lane:
    """One of our queue pairs: its verbs, where it goes, and the number of the packets it starts with."""

    def __init__(self, plan: int, verbs: Verbs) -> None:
        self.plan, self.verbs, self.psn = plan, verbs, secrets.randbits(24)
        self.peer = 0  # number of its other end
        self.failures, self.not_before = 0, 0.0
        self.ordered = QueueState.READY  # the state that was last answered with an order

    def described(self) -> list[int]:
        """Return the lane as the peer is told of it."""
        return [self.plan, self.verbs.number, self.psn]


class Outgoing:
    """A connection to a peer that we post to.

    Attributes:
        pairs: for each worker its queue pairs, the last one for notifications.
        gone: it is of no use any more; connect anew.
    """

    def __init__(self, provider: Owner, peer: Descriptor, link: Link, notes: Sequence[NoteQueue]) -> None:
        self._provider, self.peer, self.link, self._notes = provider, peer.name, link, notes
        self.generation = peer.generation
        self.settler = Retirer(self, provider.background)
        self._lost = 0  # work requests that were in flight when the peer was lost
        self.gone = self._closed = False
        self._ends = ends_of(peer)
        self._plans = self._planned()
        self._lock = threading.Lock()
        self._stirred = threading.Event()
        self._mending: Thread | None = None
        self._rows: list[QueueRow] = []
        self._order: Callable[[QueueRow, Order], None] = lambda row, order: None
        self._lanes: list[Lane] = []
        self._note_lanes: list[Lane] = []
        self.socket: socket.socket | None = None
        self._note = 0, 0.0  # number of the last notification that was seen on its way, and since when
        self._record = provider.hub.record()
        try:
            self._make()
            self._dial(peer)
        except BaseException:
            self.close()
            raise

    # -------------------------------------------------------------------------- opening
    def _planned(self) -> list[Plan]:
        own = self._provider.ends_now()
        plans = []
        for path in pair(own, self._ends, self.peer):
            here, there = own[path.local], self._ends[path.remote]
            reads = max(1, min(here.rd_atomic, there.rd_atomic))
            plans.append(Plan(path, min(here.mtu, there.mtu), reads, here.up and there.up))
        return plans

    def _make(self) -> None:
        """Our queue pairs: for each worker some on each path, and one a path for notifications."""
        provider = self._provider
        rates = [min(provider.ends[p.path.local].rate, self._ends[p.path.remote].rate) for p in self._plans]
        shares = weights(rates, [provider.nics[p.path.local].port.numa for p in self._plans])
        self.pairs: list[list[QueuePair]] = []
        for worker, cqs in enumerate(provider.cqs):
            pairs = []
            for index, plan in enumerate(self._plans):
                nic, cq = provider.nics[plan.path.local], cqs[plan.path.local]
                for _ in range(provider.queue_pairs):
                    sges = min(SLICES_GATHERED, nic.limits.max_sge)
                    verbs = nic.queue_pair(
                        cq, cq, send_depth=provider.depth_on(nic), recv_depth=1, sges=sges, inline=INLINE_BYTES
                    )
                    self._lanes.append(Lane(index, verbs))
                    depth, local, remote = provider.depth_on(nic), plan.path.local, plan.path.remote
                    made = QueuePair(
                        verbs.address, depth, cq=local, lkeys=local, rkeys=remote, signal=provider.signal, gathers=sges,
                        message_bytes=nic.limits.max_msg_sz, inline=verbs.inline, weight=shares[index], breaks=True,
                    )  # fmt: skip
                    pairs.append(made)
            self.pairs.append([*pairs, self._notes[worker].pair])
        for index, plan in enumerate(self._plans):
            nic, cq = provider.nics[plan.path.local], provider.hub.cqs[plan.path.local]
            verbs = nic.queue_pair(cq, cq, send_depth=NOTE_DEPTH, recv_depth=1, sges=1, inline=0)
            self._note_lanes.append(Lane(index, verbs))

    def _dial(self, peer: Descriptor) -> None:
        provider = self._provider
        self.number = secrets.randbits(62)
        paths = []
        for plan in self._plans:
            local, remote = plan.path
            gid, lid, *_ = provider.ends[local].told()
            paths.append([gid, lid, remote, plan.mtu, plan.rd_atomic, self._record.rkeys[local], plan.up])
        asked = {
            "version": VERSION, "instance": peer.data["instance"], "connection": self.number, "paths": paths,
            "queues": [lane.described() for lane in self._lanes],
            "notes": [lane.described() for lane in self._note_lanes], "answer": self._record.answer,
        }  # fmt: skip
        answer = self.link.dial("rdma-connect", asked, deadline=self.link.deadline)
        self.socket = answer.sock
        try:
            most = min(int(answer.body["note_bytes"]), provider.hub.note_bytes)
            mailboxes = [[int(address), int(rkey)] for _, _, address, rkey in answer.body["notes"]]
            self._join(self._lanes, answer.body["queues"])
            self._join(self._note_lanes, [entry[:2] for entry in answer.body["notes"]])
        except (KeyError, TypeError, ValueError) as error:
            raise TransportError(
                f"peer {self.peer!r} answered to rdma-connect what does not hold: {error!r}"
            ) from error
        rails = [
            Rail(lane.verbs.address, self._plans[lane.plan].path.local, *mailbox)
            for lane, mailbox in zip(self._note_lanes, mailboxes, strict=True)
        ]
        self._record.open(rails, self.link.table.where("gone"), most)
        for queue in self._notes:
            queue.lead_to(self._record)
        for index, lane in enumerate(self._note_lanes):
            if self._plans[lane.plan].up:
                self._record.raise_rail(index, 0)

    def _join(self, lanes: Sequence[Lane], told: Sequence[Sequence[int]]) -> None:
        """Learn the other ends of new queue pairs, and connect those whose path is up; others are mended later."""
        for lane, (number, psn) in zip(lanes, told, strict=True):
            lane.peer = int(number)
            if self._plans[lane.plan].up:
                self._connect(lane, int(psn))

    def _connect(self, lane: Lane, psn: int) -> None:
        plan = self._plans[lane.plan]
        self._provider.connect_pair(lane.verbs, self._ends[plan.path.remote], lane.peer, lane.psn, psn, plan)

    def start(self, rows: Sequence[QueueRow], order: Callable[[QueueRow, Order], None]) -> None:
        """Probe which queue pairs work: the workers know them now. Raises TransportError when none does."""
        if self._rows:
            return
        self._order = order
        with self._provider.lock:
            self._rows = [row for row in rows if row.pair.breaks]
            probed = []
            for lane, row in zip(self._lanes, self._rows, strict=True):
                if self._plans[lane.plan].up:
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
                f"peer {self.peer!r} answers, but no bytes get through to it by RDMA: {why} on {self._wires()}; do the "
                "networks of these NICs reach each other (ping the GIDs), with this MTU?"
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

    def _wires(self) -> str:
        own = self._provider.nics
        return ", ".join(
            f"{own[p.path.local].port.name} -> {text_of(self._ends[p.path.remote].gid)}" for p in self._plans
        )

    def wire(self) -> str:
        """Describe how bytes travel, in a few words."""
        return f"rdma, {self._count(QueueState.READY)} of {len(self._rows)} queue pairs ready: {self._wires()}"

    # -------------------------------------------------------------------------- mending
    def stir(self) -> None:
        """Something may have changed: look, in a thread of the connection's own, as long as something is to be done."""
        self._stirred.set()
        with self._lock:
            idle = self._mending is None and self._rows and not self.gone and not self._closed
            if idle and (self._count(QueueState.READY) < len(self._rows) or self._fallen_notes()):
                self._mending = self._provider.background.start(
                    f"mooncache-mend-{self.peer}", self._mend, lambda error: self.lose(f"it cannot be mended: {error}")
                )

    def _fallen_notes(self) -> list[int]:
        return [i for i in range(len(self._note_lanes)) if not self._record.is_up(i)]

    def _mend(self) -> None:
        since = time.monotonic()
        while True:
            with self._lock:
                broken = [row for row in self._rows if row.state != QueueState.READY]
                if self.gone or self._closed or not (broken or self._fallen_notes()):
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
        for lane, row in zip(self._lanes, self._rows, strict=True):
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
                log.warning("peer %r: queue pair %s broke: %s", self.peer, self._lane_name(i), self.why(row))
                self._postpone(self._lanes[i])
                self._lanes[i].ordered = QueueState.DRAINED
                self._give(row, Order.RETURN)
        closed = [
            i
            for i in range(len(self._rows))
            if self._is_new(i, QueueState.CLOSED) and self._lanes[i].not_before <= now and self._carries(self._lanes[i])
        ]
        fallen = [i for i in self._fallen_notes() if self._note_lanes[i].not_before <= now]
        fallen = [i for i in fallen if self._carries(self._note_lanes[i])]
        for i in closed:  # one by one: a peer whose own port is down refuses that path only
            self._try_to_repair([i], [])
        for i in fallen:
            self._try_to_repair([], [i])
        for i, row in enumerate(self._rows):
            if row.state == QueueState.READY:
                self._lanes[i].failures = 0
        return self._count(QueueState.READY) > 0

    def _is_new(self, i: int, state: QueueState) -> bool:
        """Return whether a queue pair's state was not answered with an order yet: the worker obeys when it can."""
        lane = self._lanes[i]
        if self._rows[i].state != lane.ordered:
            lane.ordered = QueueState.READY
        return self._rows[i].state == state != lane.ordered

    def _is_suspect(self, i: int) -> bool:
        """Return whether packets of a broken queue pair may be on their way: its other end was not reset since."""
        state = self._rows[i].state
        return state == QueueState.BROKEN or (state == QueueState.DRAINED and self._lanes[i].ordered != state)

    @property
    def unsettled(self) -> int:
        """Work requests in flight when the peer was lost, of which it is not known that they land no more."""
        return self._lost if self.settler.in_doubt else 0

    def retire(self, link: Link) -> None:
        """Ask the peer, or the engine that has its address by now, to end this connection at its side.

        Raises TransportError or DiscoveryError: it did not answer.
        """
        seen = self.settler.counters.breaks
        link.dial("rdma-retire", {"connection": self.number}, deadline=link.deadline).sock.close()
        self.settler.counters.confirm(seen)

    def _postpone(self, lane: Lane) -> None:
        lane.not_before = time.monotonic() + min(BACKOFF_S * 2**lane.failures, BACKOFF_MOST_S)
        lane.failures += 1

    def _carries(self, lane: Lane) -> bool:
        return self._plans[lane.plan].path.local not in self._provider.down

    def _lane_name(self, i: int) -> str:
        path = self._plans[self._lanes[i].plan].path
        return f"{i} ({self._provider.nics[path.local].port.name} -> {text_of(self._ends[path.remote].gid)})"

    def _try_to_repair(self, closed: Sequence[int], fallen: Sequence[int]) -> None:
        """Connect queue pairs anew; where that fails and others work, later."""
        try:
            self._repair(closed, fallen)
        except TransportError as error:
            for lane in [*(self._lanes[i] for i in closed), *(self._note_lanes[i] for i in fallen)]:
                self._postpone(lane)
            if self._count(QueueState.READY) == 0:
                raise
            log.info("peer %r: a queue pair waits for its path: %s", self.peer, error)

    def _repair(self, closed: Sequence[int], fallen: Sequence[int]) -> None:
        """Connect queue pairs of which nothing is under way anew, at both ends."""
        lanes, note_lanes = [self._lanes[i] for i in closed], [self._note_lanes[i] for i in fallen]
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
                self._connect(lane, int(psn))
            for i in fallen:
                self._postpone(self._note_lanes[i])
                self._record.raise_rail(i, 0)
            for i in closed:
                self._lanes[i].ordered = QueueState.CLOSED
                self._give(self._rows[i], Order.PROBE)

    def _ask(self, purpose: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.link.dial(purpose, {"connection": self.number, **body})
        answer.sock.close()
        return answer.body

    def look_at_note(self) -> None:
        """Send a notification that was not answered for long over another rail: its answer was lost."""
        number, now = self._record.under_way, time.monotonic()
        seen, since = self._note
        if number != seen or not any(queue.busy for queue in self._notes):
            self._note = number, now
        elif now - since > NOTE_S:
            self._note = number, now
            self._record.lower_rail(self._record.rail)

    def fail_nic(self, nic: int) -> None:
        """Get back at once what is on a NIC of ours that went down, instead of after the NIC's patience."""
        for lane, row in zip(self._lanes, self._rows, strict=False):
            if self._plans[lane.plan].path.local == nic:
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
            for lane in [*self._lanes, *self._note_lanes]:
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
        self._record.close()
        with self._provider.lock:
            for lane in [*self._lanes, *self._note_lanes]:
                with suppress(TransportError):
                    lane.verbs.close()
        with suppress(TransportError):  # then it is this peer's until the engine closes
            self._record.release()
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
