"""Our queue pairs to one peer: some for each worker on every path, and one a path for notifications.

Both ends make theirs, tell each other their numbers in one handshake, and connect those whose path is up.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mooncache.descriptor import Descriptor
from mooncache.errors import TransportError
from mooncache.kernels.enums import QueueState
from mooncache.kernels.state import QueuePair
from mooncache.limits import SLICES_GATHERED
from mooncache.providers.base import Link
from mooncache.providers.rdma.gids import text_of
from mooncache.providers.rdma.hub import NOTE_DEPTH, NoteQueue, Rail
from mooncache.providers.rdma.owner import Owner
from mooncache.providers.rdma.paths import VERSION, Plan, ends_of, pair, weights
from mooncache.providers.rdma.queues import QueuePair as Verbs

INLINE_BYTES = 64
"""Writes up to this long are copied into their work request: a cache line, which saves the NIC a fetch."""


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


class Lanes:
    """The queue pairs to one peer. Whoever makes them closes them, also when `dial` raises.

    Attributes:
        data, notes: those of the workers, and those for notifications, as lanes.
        pairs: for each worker its queue pairs, the last one for notifications.
        record: the outbox for notifications to this peer.
        number: what the peer knows this connection by.
    """

    def __init__(self, provider: Owner, peer: Descriptor, link: Link, notes: Sequence[NoteQueue]) -> None:
        self._provider, self._peer, self._link, self._notes = provider, peer, link, notes
        self._ends = ends_of(peer)
        self._plans = self._planned()
        self.data: list[Lane] = []
        self.notes: list[Lane] = []
        self.pairs: list[list[QueuePair]] = []
        self.number = secrets.randbits(62)
        self.record = provider.hub.record()

    def _planned(self) -> list[Plan]:
        own = self._provider.ends_now()
        plans = []
        for path in pair(own, self._ends, self._peer.name):
            here, there = own[path.local], self._ends[path.remote]
            reads = max(1, min(here.rd_atomic, there.rd_atomic))
            plans.append(Plan(path, min(here.mtu, there.mtu), reads, here.up and there.up))
        return plans

    def make(self) -> None:
        """Make them: for each worker some on each path, and one a path for notifications."""
        provider = self._provider
        rates = [min(provider.ends[p.path.local].rate, self._ends[p.path.remote].rate) for p in self._plans]
        shares = weights(rates, [provider.nics[p.path.local].port.numa for p in self._plans])
        for worker, cqs in enumerate(provider.cqs):
            pairs = []
            for index, plan in enumerate(self._plans):
                nic, cq = provider.nics[plan.path.local], cqs[plan.path.local]
                for _ in range(provider.queue_pairs):
                    sges = min(SLICES_GATHERED, nic.limits.max_sge)
                    verbs = nic.queue_pair(
                        cq, cq, send_depth=provider.depth_on(nic), recv_depth=1, sges=sges, inline=INLINE_BYTES
                    )
                    self.data.append(Lane(index, verbs))
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
            self.notes.append(Lane(index, verbs))

    def dial(self) -> socket.socket:
        """Tell the peer, and connect to what it tells; return the socket whose end is that of the connection.

        Blocks for its answer.

        Raises TransportError or DiscoveryError: it did not answer, or not in a way that holds.
        """
        provider = self._provider
        paths = []
        for plan in self._plans:
            local, remote = plan.path
            gid, lid, *_ = provider.ends[local].told()
            paths.append([gid, lid, remote, plan.mtu, plan.rd_atomic, self.record.rkeys[local], plan.up])
        asked = {
            "version": VERSION, "instance": self._peer.data["instance"], "connection": self.number, "paths": paths,
            "queues": [lane.described() for lane in self.data],
            "notes": [lane.described() for lane in self.notes], "answer": self.record.answer,
        }  # fmt: skip
        answer = self._link.dial("rdma-connect", asked, deadline=self._link.deadline)
        try:
            self._connect_to(answer.body)
        except BaseException:
            answer.sock.close()
            raise
        return answer.sock

    def _connect_to(self, told: dict[str, Any]) -> None:
        try:
            most = min(int(told["note_bytes"]), self._provider.hub.note_bytes)
            mailboxes = [[int(address), int(rkey)] for _, _, address, rkey in told["notes"]]
            self._join(self.data, told["queues"])
            self._join(self.notes, [entry[:2] for entry in told["notes"]])
        except (KeyError, TypeError, ValueError) as error:
            raise TransportError(
                f"peer {self._peer.name!r} answered to rdma-connect what does not hold: {error!r}"
            ) from error
        rails = [
            Rail(lane.verbs.address, self._plans[lane.plan].path.local, *mailbox)
            for lane, mailbox in zip(self.notes, mailboxes, strict=True)
        ]
        self.record.open(rails, self._link.table.where("gone"), most)
        for queue in self._notes:
            queue.lead_to(self.record)
        for index, lane in enumerate(self.notes):
            if self.is_up(lane):
                self.record.raise_rail(index, 0)

    def _join(self, lanes: Sequence[Lane], told: Sequence[Sequence[int]]) -> None:
        """Learn the other ends of new queue pairs, and connect those whose path is up; others are mended later."""
        for lane, (number, psn) in zip(lanes, told, strict=True):
            lane.peer = int(number)
            if self.is_up(lane):
                self.connect(lane, int(psn))

    def connect(self, lane: Lane, psn: int) -> None:
        """Connect one of them to its other end, whose packets start with number `psn`."""
        plan = self._plans[lane.plan]
        self._provider.connect_pair(lane.verbs, self._ends[plan.path.remote], lane.peer, lane.psn, psn, plan)

    # -------------------------------------------------------------------------- looking
    def fallen(self) -> list[int]:
        """Return which of those for notifications do not work."""
        return [i for i in range(len(self.notes)) if not self.record.is_up(i)]

    def is_on(self, lane: Lane, nic: int) -> bool:
        """Return whether a lane is on this NIC of ours."""
        return self._plans[lane.plan].path.local == nic

    def carries(self, lane: Lane) -> bool:
        """Return whether our end of a lane's path is up."""
        return self._plans[lane.plan].path.local not in self._provider.down

    def is_up(self, lane: Lane) -> bool:
        """Return whether both ends of a lane's path were up when it was made."""
        return self._plans[lane.plan].up

    def name(self, i: int) -> str:
        """Name one of the workers', for messages."""
        return f"{i} ({self._wire(self._plans[self.data[i].plan])})"

    def wires(self) -> str:
        """Name all paths, for messages."""
        return ", ".join(map(self._wire, self._plans))

    def _wire(self, plan: Plan) -> str:
        path = plan.path
        return f"{self._provider.nics[path.local].port.name} -> {text_of(self._ends[path.remote].gid)}"

    def close(self) -> None:
        """Give everything back but the socket. The workers have nothing to do with them any more."""
        self.record.close()
        with self._provider.lock:
            for lane in [*self.data, *self.notes]:
                with suppress(TransportError):
                    lane.verbs.close()
        with suppress(TransportError):  # then it is this peer's until the engine closes
            self.record.release()
