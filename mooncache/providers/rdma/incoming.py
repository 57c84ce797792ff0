"""A connection of a peer's to us: the ends of its queue pairs here, which it reads and writes our memory through.

We post nothing on them but answers to notifications. They live as long as the connection over which the peer asked for
them: when that ends the peer is gone, and nothing it may still have under way may reach our memory.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mooncache.errors import TransportError, UsageError
from mooncache.kernels.arrays import address_of
from mooncache.providers.rdma.gids import parse, text_of
from mooncache.providers.rdma.hub import NOTE_DEPTH, Rail
from mooncache.providers.rdma.notes import RECEIVES
from mooncache.providers.rdma.owner import Owner
from mooncache.providers.rdma.paths import VERSION, End, PathOf, Plan
from mooncache.providers.rdma.ports import MTUS
from mooncache.providers.rdma.queues import QueuePair


class Incoming:
    """A peer's connection, made by its "rdma-connect".

    Attributes:
        number: by which the peer calls it.
        caller: name of the peer.
        answer: what the peer is answered.

    Raises:
        UsageError: what it asks for does not hold. TransportError, CapacityError: a NIC has no more to give.
    """

    def __init__(self, provider: Owner, caller: str, body: dict[str, Any]) -> None:
        if body["version"] != VERSION:
            raise UsageError(f"this engine speaks RDMA of version {VERSION}, the caller {body['version']!r}")
        self._provider, self.caller, self.number = provider, caller, int(body["connection"])
        self.socket: socket.socket | None = None
        self._plans: list[Plan] = []
        self._ends: list[End] = []
        rkeys = []
        for gid, lid, nic, mtu, rd_atomic, rkey, up in body["paths"]:
            self._plans.append(self._plan(nic, mtu, rd_atomic, up))
            self._ends.append(End(parse(str(gid)), int(lid), 0, 0, 0))
            rkeys.append(int(rkey))
        self._queues: list[tuple[int, int, QueuePair]] = []  # path, number of the other end, ours
        self._note_queues: list[tuple[int, int, QueuePair]] = []
        self._record = provider.hub.record()
        try:
            psns = [self._make(entry, self._queues, 1) for entry in body["queues"]]
            note_psns = [self._make(entry, self._note_queues, RECEIVES) for entry in body["notes"]]
            self._open_mailbox(int(body["answer"]), rkeys)
        except BaseException:
            self.close()
            raise
        self.answer = {
            "note_bytes": provider.hub.note_bytes,
            "queues": [[ours.number, psn] for (_, _, ours), psn in zip(self._queues, psns, strict=True)],
            "notes": [
                [ours.number, psn, self._record.mailboxes[i], self._record.rkeys[self._plans[path].path.local]]
                for i, ((path, _, ours), psn) in enumerate(zip(self._note_queues, note_psns, strict=True))
            ],
        }

    def _plan(self, nic: object, mtu: object, rd_atomic: object, up: object) -> Plan:
        """Check a path as the peer proposes it: `nic` is the index of ours."""
        if not isinstance(nic, int) or not 0 <= nic < len(self._provider.nics):
            raise UsageError(f"expected the index of one of {len(self._provider.nics)} NICs, got {nic!r}")
        own = self._provider.ends[nic]
        if not isinstance(mtu, int) or mtu not in MTUS or mtu > own.mtu:
            raise UsageError(f"expected an MTU of at most {own.mtu} bytes for {text_of(own.gid)}, got {mtu!r}")
        if not isinstance(rd_atomic, int) or not 1 <= rd_atomic <= max(1, own.rd_atomic):
            raise UsageError(f"expected 1 to {own.rd_atomic} reads at once for {text_of(own.gid)}, got {rd_atomic!r}")
        return Plan(PathOf(nic, 0), mtu, rd_atomic, bool(up) and nic not in self._provider.down)

    def _make(self, entry: Sequence[Any], queues: list[tuple[int, int, QueuePair]], receives: int) -> int:
        """Make the end of one queue pair, and connect it if its path is up; return our first packet's number."""
        path, number, psn = (int(value) for value in entry)
        if not 0 <= path < len(self._plans):
            raise UsageError(f"expected the index of one of {len(self._plans)} paths, got {path}")
        local = self._plans[path].path.local
        nic, cq = self._provider.nics[local], self._provider.hub.cqs[local]
        ours = nic.queue_pair(cq, cq, send_depth=NOTE_DEPTH, recv_depth=receives, sges=1, inline=0)
        queues.append((path, number, ours))
        return self._connect(path, number, ours, psn) if self._plans[path].up else 0

    def _connect(self, path: int, number: int, ours: QueuePair, psn: int) -> int:
        own = secrets.randbits(24)
        self._provider.connect_pair(ours, self._ends[path], number, own, psn, self._plans[path])
        return own

    def _open_mailbox(self, answer: int, rkeys: Sequence[int]) -> None:
        rails = [
            Rail(ours.address, self._plans[path].path.local, answer, rkeys[path]) for path, _, ours in self._note_queues
        ]
        self._record.open(rails, address_of(self._provider.never))
        self._record.serve(self.caller)
        for i, (path, _, _) in enumerate(self._note_queues):
            if self._plans[path].up:
                self._record.raise_rail(i, RECEIVES)

    # -------------------------------------------------------------------------- mending
    def fence(self, body: dict[str, Any]) -> dict[str, Any]:
        """Reset our end of queue pairs: nothing that was sent on them reaches our memory after this."""
        for index in body["queues"]:
            self._at(self._queues, index)[2].reset()
        return {}

    def repair(self, body: dict[str, Any]) -> dict[str, Any]:
        """Connect our end of queue pairs anew; the peer's is reset. Return the first packets' numbers."""
        psns = [self._renew(self._at(self._queues, index), psn) for index, psn in body["queues"]]
        note_psns = []
        for index, psn in body["notes"]:
            queue = self._at(self._note_queues, index)
            self._record.lower_rail(index)
            note_psns.append(self._renew(queue, psn))
            self._record.raise_rail(index, RECEIVES)
        return {"queues": psns, "notes": note_psns}

    def _renew(self, queue: tuple[int, int, QueuePair], psn: Any) -> int:
        path, number, ours = queue
        local = self._plans[path].path.local
        if local in self._provider.down:
            raise TransportError(f"port {self._provider.nics[local].port.name} is down here")
        ours.reset()
        return self._connect(path, number, ours, int(psn))

    @staticmethod
    def _at(queues: list[tuple[int, int, QueuePair]], index: object) -> tuple[int, int, QueuePair]:
        if not isinstance(index, int) or not 0 <= index < len(queues):
            raise UsageError(f"expected the index of one of {len(queues)} queue pairs, got {index!r}")
        return queues[index]

    def close(self) -> None:
        """Close all ends. When this returns nothing of the peer's reaches our memory through them any more."""
        self._record.close()
        for _, _, ours in [*self._queues, *self._note_queues]:
            with suppress(TransportError):
                ours.close()
        with suppress(TransportError):  # then it is this peer's until the engine closes
            self._record.release()
        if self.socket is not None:
            self._provider.forget_socket(self.socket)
            self.socket.close()
