"""The memory behind notifications: mailboxes, outboxes, their records, and who may use them. See `notes` for how."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from mooncache import limits
from mooncache.errors import CapacityError
from mooncache.kernels.arrays import WORD, Row, address_of, rows_of
from mooncache.kernels.enums import Access
from mooncache.kernels.inbox import header, sender
from mooncache.kernels.state import CompletionQueue, QueuePair
from mooncache.providers.device import Device, PortRow
from mooncache.providers.rdma import notes
from mooncache.providers.rdma.library import load
from mooncache.providers.rdma.nic import Nic, Registration
from mooncache.providers.rdma.records import HUB, NOTE_NIC, NOTE_PORT, NOTE_QUEUE, RECORD

RECORDS = 2 * limits.PEERS
"""An outbox for each peer, and as many peers with an outbox for us."""

NOTES_CQ_ENTRIES = 4 * RECORDS
"""Completions of one NIC for notifications: a note, its answer and the receives of a connection that is torn down."""

NOTE_DEPTH = 8  # notifications in flight on one rail


class Rail(NamedTuple):
    """The parts of a rail that a record needs.

    Attributes:
        queue_pair: address of the `ibv_qp`.
        nic: index of the NIC here.
        address, rkey: where to write at the peer: its mailbox, or its answer word.
    """

    queue_pair: int
    nic: int
    address: int
    rkey: int


class Record:
    """An outbox of ours, or the mailbox of a peer's outbox.

    Its memory is registered for itself: the keys that one peer is told lead to no other's notifications or answers.

    Attributes:
        mailboxes: addresses where the peer writes notifications, one a rail.
        answer: address where the peer writes its answers.
        rkeys: what the peer shows for both, one a NIC.

    Raises:
        TransportError: a NIC registers no more memory.
    """

    def __init__(self, hub: NoteHub, index: int) -> None:
        self._hub, self.index = hub, index
        self.row = Row(hub.records, index)
        self.address = self.row.address
        base = address_of(hub.memory) + index * hub.record_bytes
        self._rails = [Row(hub.records[index]["rails"], i) for i in range(limits.NICS)]
        self.answer = base
        self.buffer = base + WORD  # of a mailbox: what it answers with
        self.mailboxes = [base + 64 + i * (WORD + hub.note_bytes) for i in range(hub.rails)]
        with ExitStack() as undo:
            self._registered: list[Registration] = []
            for nic in hub.nics:
                self._registered.append(nic.register(base, hub.record_bytes, Access.WRITE | Access.LOCAL))
                undo.callback(self._registered[-1].close)
            undo.pop_all()
        self.rkeys = [registration.rkey for registration in self._registered]

    def open(self, rails: Sequence[Rail], gone: int, most: int = 0) -> None:
        """Make the record usable; its rails are down.

        Args:
            gone: address of the word that says that the peer is.
            most: bytes of the longest notification that the peer takes.
        """
        hub, row = self._hub, self.row
        hub.incarnation = hub.incarnation % 0xFFFF + 1
        row.clear()
        hub.memory[self.index, :8] = 0
        row.set(buffer=self.mailboxes[0], answer=self.answer, gone=gone, most=most)
        for i, rail in enumerate(rails):
            self._rails[i].set(
                qp=rail.queue_pair,
                lkey=self._registered[rail.nic].lkey,
                address=rail.address,
                rkey=rail.rkey,
                buffer=self.mailboxes[i],
            )
        row.put("rail_count", len(rails))
        row.put("incarnation", hub.incarnation)

    def serve(self, caller: str) -> None:
        """Make it a mailbox of a peer, whose writes it answers from a word of their own."""
        self._sender = sender(caller)
        self.row.put("sender", address_of(self._sender))
        self.row.put("buffer", self.buffer)

    def raise_rail(self, rail: int, receives: int) -> None:
        """Post a rail's receives and use its queue pair, which is connected."""
        notes.open_rail(self._hub.address, self.address, rail, receives)

    @property
    def under_way(self) -> int:
        """The number of the last notification sent from it; 0 before the first."""
        return self.row["number"]

    @property
    def rail(self) -> int:
        """The rail that it went over."""
        return self.row["rail"]

    def is_up(self, rail: int) -> bool:
        """Return whether nothing has gone wrong on a rail since it was raised."""
        return bool(self._rails[rail]["up"])

    def lower_rail(self, rail: int) -> None:
        """Use a rail's queue pair no more."""
        notes.close_rail(self._hub.address, self.address, rail)

    def close(self) -> None:
        """Use nothing of the record from now on. Its notification on the way, if any, ends as PEER_GONE."""
        notes.close_rail(self._hub.address, self.address, -1)

    def release(self) -> None:
        """Give the record to another peer, after `close`, once its queue pairs are destroyed.

        Raises:
            TransportError: a NIC did not withdraw the memory, which stays this peer's then.
        """
        while self._registered:
            self._registered.pop().close()
        self._hub.free.append(self.index)


class NoteHub:
    """The queues and records of the engine's notifications over these NICs.

    Args:
        inbox: words of the engine's inbox, see `kernels/inbox.py`.

    Raises:
        TransportError: a NIC could not give what is needed, such as locked memory.
    """

    def __init__(self, nics: Sequence[Nic], workers: int, inbox: np.ndarray) -> None:
        self.nics, self.rails = nics, len(nics)
        self.note_bytes = int(header(inbox)["bytes"][0])  # of the longest notification as it travels
        self.record_bytes = 64 + self.rails * (WORD + self.note_bytes)
        self.memory = np.zeros((RECORDS, self.record_bytes), np.uint8)
        self.records = rows_of(RECORD, RECORDS)
        self.free = list(range(RECORDS - 1, -1, -1))
        self.incarnation = 0
        self.channels = [nic.completion_channel() for nic in nics]
        self.cqs = [
            nic.completion_queue(min(NOTES_CQ_ENTRIES, nic.limits.max_cqe), channel)
            for nic, channel in zip(nics, self.channels, strict=True)
        ]
        self._make_hub(inbox)
        self._make_workers(workers)

    def _make_hub(self, inbox: np.ndarray) -> None:
        self._rows = rows_of(NOTE_NIC, self.rails)
        self._rows["cq"] = [cq.address for cq in self.cqs]
        self._rows["channel"] = [channel.address for channel in self.channels]
        self._row = Row(rows_of(HUB))
        self.address = self._row.address
        self._row.set(
            inbox=address_of(inbox),
            records=address_of(self.records),
            nics=self.rails,
            nic_rows=address_of(self._rows),
            get_event=ctypes.cast(load().c.ibv_get_cq_event, ctypes.c_void_p).value or 0,
        )

    def _make_workers(self, workers: int) -> None:
        self._device = Device(notes.post_note, notes.poll_notes)
        self._ports = [PortRow(NOTE_PORT, limits.PEERS) for _ in range(workers)]
        self._software = [self._device.completion_queue(port.row.address) for port in self._ports]
        self._queues: list[object] = []
        for worker, port in enumerate(self._ports):
            port.row.set(hub=self.address, serves=worker == 0)

    def completion_queue(self, worker: int) -> CompletionQueue:
        """Return the worker's completion queue for notifications."""
        return CompletionQueue(address_of(self._software[worker]))

    def queue_pair(self, worker: int, cq: int) -> NoteQueue:
        """Make one more queue pair for notifications of a worker, which leads nowhere yet."""
        row = Row(rows_of(NOTE_QUEUE))
        row["hub"] = self.address
        qp = self._device.queue_pair(row.address)
        self._queues += [row, qp]
        port = self._ports[worker]
        count = port.row["count"]
        port.queues[count] = row.address
        port.row.put("count", count + 1)
        return NoteQueue(row, QueuePair(address_of(qp), 1, cq=cq, notes=True))

    def record(self) -> Record:
        """Take a record that nobody uses. Raises CapacityError; TransportError when a NIC registers no more memory."""
        if not self.free:
            raise CapacityError(
                f"all {RECORDS} connections of this engine are in use; forget() peers that are not needed"
            )
        index = self.free.pop()
        try:
            return Record(self, index)
        except BaseException:
            self.free.append(index)
            raise

    def acknowledge(self) -> None:
        """Tell the NICs that all events were dealt with, before their completion queues are destroyed."""
        for cq, row in zip(self.cqs, self._rows, strict=True):
            cq.acknowledge(int(row["events"]))
            row["events"] = 0


class NoteQueue(NamedTuple):
    """A queue pair for notifications, of one worker, to one peer."""

    row: Row
    pair: QueuePair

    @property
    def busy(self) -> bool:
        """True while a notification is on its way, or its end was not reported yet."""
        return bool(self.row["busy"])

    def lead_to(self, record: Record) -> None:
        """Use this outbox from now on. None of its notifications is on its way."""
        self.row.put("record", record.address)
