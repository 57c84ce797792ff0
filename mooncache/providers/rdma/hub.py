"""The memory behind notifications: mailboxes, outboxes, their records, and who may use them. See `notes` for how."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from mooncache import limits
from mooncache.errors import CapacityError
from mooncache.kernels.arrays import WORD, address_of, aligned, put
from mooncache.kernels.enums import Access
from mooncache.kernels.inbox import header, sender
from mooncache.kernels.state import CompletionQueue, QueuePair
from mooncache.kernels.verbs import SGE_BYTES, WC_BYTES, WR_BYTES
from mooncache.providers.device import Device
from mooncache.providers.rdma import notes
from mooncache.providers.rdma.library import load
from mooncache.providers.rdma.nic import Nic, Registration

RECORDS = 2 * limits.PEERS
"""An outbox for each peer, and as many peers with an outbox for us."""

NOTES_CQ_ENTRIES = 4 * RECORDS
"""Completions of one NIC for notifications: a note, its answer and the receives of a connection that is torn down."""


class Rail(NamedTuple):
    """What a record needs to know of a rail.

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
        self.words = hub.records[index]
        self.address = address_of(self.words)
        base = address_of(hub.memory) + index * hub.record_bytes
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
        """Make it usable; its rails are down.

        Args:
            gone: address of the word that says that the peer is.
            most: bytes of the longest notification that the peer takes.
        """
        hub, words = self._hub, self.words
        hub.incarnation = hub.incarnation % 0xFFFF + 1
        words[1:] = 0
        hub.memory[self.index, :8] = 0
        words[[notes.R_BUFFER, notes.R_ANSWER, notes.R_GONE]] = self.mailboxes[0], self.answer, gone
        words[notes.R_MOST] = most
        for i, rail in enumerate(rails):
            row = words[notes.R_OWN + i * notes.RAIL_WORDS :][: notes.RAIL_WORDS]
            row[[notes.RAIL_QP, notes.RAIL_LKEY]] = rail.queue_pair, self._registered[rail.nic].lkey
            row[[notes.RAIL_ADDRESS, notes.RAIL_RKEY, notes.RAIL_BUFFER]] = rail.address, rail.rkey, self.mailboxes[i]
        put(words, notes.R_RAILS, len(rails))
        put(words, notes.R_INCARNATION, hub.incarnation)

    def serve(self, caller: str) -> None:
        """It is a mailbox of this peer's: what it writes are answers, from a word of their own."""
        self._sender = sender(caller)
        put(self.words, notes.R_SENDER, address_of(self._sender))
        put(self.words, notes.R_BUFFER, self.buffer)

    def raise_rail(self, rail: int, receives: int) -> None:
        """A rail's queue pair is connected: post its receives and use it."""
        notes.open_rail(self._hub.address, self.address, rail, receives)

    @property
    def under_way(self) -> int:
        """Number of the last notification sent from it; 0 before the first."""
        return int(self.words[notes.R_NUMBER])

    @property
    def rail(self) -> int:
        """The rail it went over."""
        return int(self.words[notes.R_RAIL])

    def is_up(self, rail: int) -> bool:
        """Whether nothing has gone wrong on a rail since it was raised."""
        return bool(self.words[notes.R_OWN + rail * notes.RAIL_WORDS + notes.RAIL_UP])

    def lower_rail(self, rail: int) -> None:
        """A rail's queue pair must not be used from now on."""
        notes.close_rail(self._hub.address, self.address, rail)

    def close(self) -> None:
        """Use nothing of it from now on. Its notification on the way, if any, ends as PEER_GONE."""
        notes.close_rail(self._hub.address, self.address, -1)

    def release(self) -> None:
        """Give it back, after `close`, once its queue pairs are destroyed: another peer may get it.

        Raises:
            TransportError: a NIC did not withdraw the memory, which stays this peer's then.
        """
        while self._registered:
            self._registered.pop().close()
        self._hub.free.append(self.index)


class NoteHub:
    """What the engine's workers need for notifications over these NICs.

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
        self.records = aligned(RECORDS * notes.RECORD_WORDS).reshape(RECORDS, notes.RECORD_WORDS)
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
        self._rows = aligned(self.rails * notes.NIC_WORDS).reshape(self.rails, notes.NIC_WORDS)
        self._rows[:, notes.N_CQ] = [cq.address for cq in self.cqs]
        self._rows[:, notes.N_CHANNEL] = [channel.address for channel in self.channels]
        sizes = (notes.LOT * WC_BYTES, WR_BYTES, SGE_BYTES, notes.RECV_WR_BYTES)
        self._scratch = [aligned(size // WORD) for size in sizes]
        self.words = aligned(notes.HUB_WORDS)
        self.address = address_of(self.words)
        get_event = ctypes.cast(load().c.ibv_get_cq_event, ctypes.c_void_p).value
        wc, wr, sge, receive = map(address_of, self._scratch)
        for field, value in (
            (notes.H_INBOX, address_of(inbox)),
            (notes.H_RECORDS, address_of(self.records)),
            (notes.H_NICS, self.rails),
            (notes.H_NIC_ROWS, address_of(self._rows)),
            (notes.H_GET_EVENT, get_event or 0),
            (notes.H_WC, wc),
            (notes.H_WR, wr),
            (notes.H_SGE, sge),
            (notes.H_RECV, receive),
        ):
            self.words[field] = value

    def _make_workers(self, workers: int) -> None:
        self._device = Device(notes.post_note, notes.poll_notes)
        self._lists = [aligned(notes.C_QUEUES + limits.PEERS) for _ in range(workers)]
        self._software = [self._device.completion_queue(words) for words in self._lists]
        self._queues: list[np.ndarray] = []
        for worker, words in enumerate(self._lists):
            words[[notes.C_HUB, notes.C_SERVES]] = self.address, worker == 0

    def completion_queue(self, worker: int) -> CompletionQueue:
        """The worker's completion queue for notifications."""
        return CompletionQueue(address_of(self._software[worker]))

    def queue_pair(self, worker: int, cq: int) -> NoteQueue:
        """One more queue pair for notifications of a worker, which leads nowhere yet."""
        words = aligned(notes.QUEUE_WORDS)
        words[notes.Q_HUB] = self.address
        qp = self._device.queue_pair(words)
        self._queues += [words, qp]
        listed = self._lists[worker]
        count = int(listed[notes.C_COUNT])
        listed[notes.C_QUEUES + count] = address_of(words)
        put(listed, notes.C_COUNT, count + 1)
        return NoteQueue(words, QueuePair(address_of(qp), 1, cq=cq, notes=True))

    def record(self) -> Record:
        """A record that nobody uses. Raises CapacityError; TransportError when a NIC registers no more memory."""
        if not self.free:
            raise CapacityError(f"all {RECORDS} connections of this engine are in use")
        index = self.free.pop()
        try:
            return Record(self, index)
        except BaseException:
            self.free.append(index)
            raise

    def acknowledge(self) -> None:
        """Tell the NICs that all events were dealt with, before their completion queues are destroyed."""
        for cq, row in zip(self.cqs, self._rows, strict=True):
            cq.acknowledge(int(row[notes.N_EVENTS]))
            row[notes.N_EVENTS] = 0


class NoteQueue(NamedTuple):
    """A queue pair for notifications, of one worker, to one peer."""

    words: np.ndarray
    pair: QueuePair

    @property
    def busy(self) -> bool:
        """Whether a notification is on its way, or its end was not reported yet."""
        return bool(self.words[notes.Q_BUSY])

    def lead_to(self, record: Record) -> None:
        """Use this outbox from now on. None of its notifications is on its way."""
        put(self.words, notes.Q_RECORD, record.address)
